"""Labels: pairs a second, and what a Stage 2 step costs with cached labels, labels in memory and the teacher online.

python benchmarks/labels.py --laq-ckpt laq.safetensors --data.roots my/videos

Timings of the three kinds of step alternate within one process; only their ratios mean something.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from smolvla_shared import data, data_loader, data_order, data_rows, data_split, data_views, label_cache, model
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import LATENT, DataConfig, ModelConfig, PolicyDataConfig, StageOptions
from smolvla_shared.labels import latent_statistics, open_labels
from smolvla_shared.losses import masked_mean
from smolvla_shared.preprocess import Preprocessor
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    # The teacher.
    laq_ckpt: Path
    # Recordings to label.
    data: DataConfig
    # Samples of a step.
    batch_size: int = 32
    # Steps of each kind.
    steps: int = 30
    # Pairs that the teacher sees at once.
    label_batch_size: int = 64


def main(config: Benchmark) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "labels"
        start = time.perf_counter()
        options = label_cache.LabelConfig(
            label_cache=cache, laq_ckpt=config.laq_ckpt, data=config.data, batch_size=config.label_batch_size
        )
        label_cache.label(options, data_views.open_video(options.data))
        seconds = time.perf_counter() - start
        run = StageOptions(
            data=PolicyDataConfig(**vars(config.data)),
            laq_ckpt=config.laq_ckpt,
        )
        datasets = data.open_datasets(run.data)
        cameras, camera = data_views.choose_cameras(datasets, run.data)
        pairs = sum(len(s.rows_with_pairs(s.rows())) for s in datasets)
        print(f"labelled {pairs:,} pairs at {pairs / seconds:,.0f} pairs/s, start-up included")

        online = open_labels(run, datasets, camera)
        cached = open_labels(replace(run, labels="cache", label_cache=cache), datasets, camera)
        in_memory = {
            (s, f): cached(place(s, f))[0] for s, dataset in enumerate(datasets) for f in range(dataset.num_frames)
        }
        kinds = {
            "in memory": lambda raw: torch.stack([in_memory[place] for place in zip(raw.dataset, raw.row)]),
            "cached": cached,
            "online": online,
        }
        times = measure(config, run, datasets, cameras, online, kinds)
    print(f"\n{'labels':<12}{'label s':>10}{'step s':>10}{'step / in memory':>18}")
    for kind, rows in times.items():
        label_s, step_s = (statistics.median(column) for column in zip(*rows))
        ratio = statistics.median(mine[1] / theirs[1] for mine, theirs in zip(rows, times["in memory"]))
        print(f"{kind:<12}{label_s:>10.5f}{step_s:>10.4f}{ratio:>18.3f}")


def place(dataset: int, frame: int) -> RawBatch:
    """A raw batch of which only the place of its one sample is known."""
    empty = torch.empty(0)
    return RawBatch(
        images=[],
        image_mask=empty,
        tasks=[],
        state=empty,
        state_mask=empty,
        pairs=None,
        pair_mask=empty,
        actions=empty,
        action_mask=empty,
        noise={},
        time={},
        dataset=[dataset],
        row=[frame],
        keys=[""],
    )


def measure(config: Benchmark, run: StageOptions, datasets, cameras, online, kinds) -> dict[str, list[tuple]]:
    """(seconds of labelling, of the whole step) of each kind; the same batch by turns, data loading left out."""
    core_config = make_core_config(
        ModelConfig(preset="tiny"),
        cameras,
        latent_vector_dim=online.shape[0] * online.shape[1],
        code_seq_len=online.shape[0],
    )
    core = model.SmolVLASharedCore(core_config)
    optimizer = torch.optim.AdamW(core.parameters())
    frames, _ = data_split.split_datasets(datasets, 0.05, seed=0)
    targets = {LATENT: latent_statistics(online, datasets, frames, seed=0)}
    preprocessor = Preprocessor(core_config, load_trunk_tokenizer("tiny", None), targets)
    spec = data_loader.SampleSpec(
        cameras, label_cameras=online.cameras, pair_size=online.pair_size, draws={LATENT: online.shape}
    )
    sampler = data_order.StepSampler(data_rows.group_rows(frames), 0, config.batch_size, 0, config.steps + 2)
    times: dict[str, list[tuple]] = {kind: [] for kind in kinds}
    for step, raw in enumerate(
        data_loader.make_loader(data_loader.SampleDataset(datasets, spec, 0), sampler, num_workers=0)
    ):
        for kind, labels in kinds.items():
            start = time.perf_counter()
            latents = labels(raw)
            labelled = time.perf_counter()
            batch = preprocessor(raw, latents)
            loss = masked_mean(core(batch)[LATENT], batch.masks[LATENT])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= 2:  # warm
                times[kind].append((labelled - start, time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
