"""The LAQ teacher's commands: train one, write its labels into a cache, check whether its labels are any good.

accelerate launch -m smolvla_shared.teacher train --data.roots my/videos --run-dir runs/laq
accelerate launch -m smolvla_shared.teacher label --laq-ckpt laq.safetensors --data.roots my/videos --label-cache labels
python -m smolvla_shared.teacher check --laq-ckpt laq.safetensors --data.roots my/videos --out runs/check
"""

import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from smolvla_shared import data
from smolvla_shared.batch import RawBatch, to_device
from smolvla_shared.cache import RowCache, dataset_fingerprint
from smolvla_shared.check import CheckConfig, check
from smolvla_shared.config import LATENT, RunConfig, SourceConfig, StageConfig, TeacherKind, TeacherOptions
from smolvla_shared.labels import (
    CachedLabels,
    LabelKey,
    Labels,
    OnlineLabels,
    cached_teacher_id,
    label_directories,
    label_store,
)
from smolvla_shared.laq import (
    LAQ,
    LAQConfig,
    PairBatch,
    load_laq,
    perplexity,
    replace_dead_codes,
    save_laq,
    teacher_id,
)
from smolvla_shared.preprocess import Statistics, unit_range

TEACHER_FILE = "laq.safetensors"
NOISE = "nsvq"  # the key of the quantiser's noise in a RawBatch


# --- labels -----------------------------------------------------------------------------------------------------------


def open_labels(config: StageConfig, sources: list[data.Source], camera: str) -> Labels:
    """The latent targets that the options name; an online teacher is on the CPU still.

    Raises ValueError for a teacher that cannot be loaded, and for a cache that is not complete or whose key differs.
    """
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size) if config.laq_ckpt else None
    if config.labels == "online":
        assert laq is not None  # both scripts' options see to it
        return OnlineLabels(laq, config.teacher_kind, camera)
    directories = label_directories(config.label_cache, [source.name for source in sources])
    teacher = teacher_id(laq) if laq else cached_teacher_id(directories[0])
    keys = [label_key(source, teacher, config.teacher_kind, camera) for source in sources]
    return CachedLabels([label_store(*x) for x in zip(directories, keys, [s.num_frames for s in sources])])


def label_key(source: data.Source, teacher: str, kind: TeacherKind, camera: str) -> LabelKey:
    return LabelKey(
        teacher_id=teacher,
        teacher_kind=kind,
        frame_gap_s=source.gap_s,
        camera=camera,
        dataset=dataset_fingerprint(source.dataset.root),
        versions={name: metadata.version(name) for name in ("torch", "lerobot", data.video_decoder())},
    )


def latent_statistics(
    labels: Labels,
    sources: list[data.Source],
    frames: list[tuple[int, np.ndarray]],
    seed: int,
    device: torch.device | str = "cpu",
) -> Statistics:
    """Mean and standard deviation of the latent targets over up to 512 valid training pairs, drawn with the seed."""
    spec = data.SampleSpec(
        cameras=(), label_camera=labels.camera, pair_size=labels.pair_size, draws={LATENT: labels.shape}
    )
    sampler = data.StepSampler(data.group_frames(frames), seed, batch_size=32, first_step=0, last_step=16)
    loader = data.make_loader(data.SampleDataset(sources, spec, seed), sampler, num_workers=0)
    vectors = [labels(to_device(raw, device)).flatten(1).cpu()[raw.pair_mask] for raw in loader]
    statistics = Statistics.of(torch.cat(vectors))
    if max(statistics.std) == 0:
        raise ValueError(
            "the teacher gives every pair the same latent action: its codebook has collapsed, or the pairs do not "
            "move (try a larger --data.frame-gap-s, or train the teacher longer)"
        )
    # A dimension that never changes carries nothing; a floor keeps rounding from being blown up to a target.
    floor = 1e-3 * max(statistics.std)
    return Statistics(statistics.mean, tuple(max(std, floor) for std in statistics.std))


@dataclass(frozen=True, kw_only=True)
class LabelConfig(TeacherOptions):
    """Write the latent actions of every frame of the datasets into a cache, for --labels cache of the scripts. A
    command that was killed goes on where it stopped when it is run again."""

    # The teacher: a .safetensors file of `teacher train`, or LAPA's .pt file.
    laq_ckpt: Path
    # Directory of the label cache; each dataset gets one of its own in it.
    label_cache: Path
    # Which recordings, and which pairs of their frames.
    data: SourceConfig
    # Pairs that the teacher sees at once.
    batch_size: int = 64


def label(config: LabelConfig) -> None:
    accelerator = Accelerator()
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size)
    sources = data.open_sources(config.data)
    _, camera = data.choose_cameras(sources, config.data)
    data.valid_pair_share(sources, [(i, np.arange(source.num_frames)) for i, source in enumerate(sources)])
    directories = label_directories(config.label_cache, [source.name for source in sources])
    stores = [
        label_store(directory, label_key(source, teacher_id(laq), config.teacher_kind, camera), source.num_frames)
        for directory, source in zip(directories, sources)
    ]
    unfinished = [not store.is_complete() for store in stores]  # all keys are compared before any work
    laq.to(accelerator.device)
    for source, store, todo in zip(sources, stores, unfinished):
        if todo:
            label_dataset(laq, source, camera, store, config, accelerator)
        accelerator.print(f"{store.directory}: {source.num_frames:,} frames {'labelled' if todo else 'were labelled'}")


@torch.no_grad()
def label_dataset(
    laq: LAQ, source: data.Source, camera: str, store: RowCache, config: LabelConfig, accelerator: Accelerator
) -> None:
    """Fill the label cache of a dataset; every process does its share of the shards."""
    slots, width = laq.config.code_seq_len, laq.config.quant_dim

    def empty(num_rows: int) -> dict[str, np.ndarray]:
        arrays = {
            "indices": np.zeros((num_rows, slots), np.min_scalar_type(laq.config.codebook_size - 1)),
            "mask": np.zeros(num_rows, bool),
        }
        if config.teacher_kind == "continuous":
            arrays["continuous"] = np.zeros((num_rows, slots, width), np.float32)
        return arrays

    def compute(frames: Tensor, places: Tensor) -> dict[str, np.ndarray]:
        latents = laq.encode(laq.resize(unit_range(frames))[places])
        arrays = {"indices": latents.indices.numpy(force=True), "mask": np.ones(len(places), bool)}
        if config.teacher_kind == "continuous":
            arrays["continuous"] = latents.continuous.numpy(force=True)
        return arrays

    if accelerator.is_main_process:
        store.claim()
        np.save(store.directory / "codebook.npy", laq.vq.codebooks.numpy(force=True))
    data.fill_cache(
        store,
        source,
        camera,
        offsets=(0, source.gap),
        blocks_of=lambda rows: data.episode_blocks(source, source.rows_with_pairs(np.array(rows)), config.batch_size),
        empty=empty,
        compute=compute,
        num_workers=config.data.num_workers,
        accelerator=accelerator,
    )


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(RunConfig):
    """Train a LAQ teacher on video: it learns codes that tell a frame from an earlier one. Needs no actions."""

    # The defaults are the shape of LAPA's released teacher.
    laq: LAQConfig = field(default_factory=LAQConfig)
    # A LAQ to fine-tune, ours or LAPA's, instead of fresh weights: the stable way where video is scarce. It brings its
    # shape; of a LAPA file only --laq.code-seq-len and --laq.image-size are not in it.
    init_from: Path | None = None
    # Steps between replacements of dead codes; their uses are counted over all processes.
    replace_every: int = 100
    # A code is dead when it was used less than this share of the average.
    dead_below: float = 0.05
    # No replacement in the last share of the run, so that the codes settle.
    settle_share: float = 0.2
    # Warn when the slots effectively use fewer codes than this on average, three times in a row.
    collapse_below: float = 1.5


def start_laq(config: TeacherConfig) -> LAQ:
    """A fresh LAQ, or the one to fine-tune. Raises ValueError where --laq.* contradicts its shape."""
    if config.init_from is None:
        return LAQ(config.laq)
    default = asdict(LAQConfig())
    stated = {name: value for name, value in asdict(config.laq).items() if value != default[name]}
    given = load_laq(config.init_from, stated.get("code_seq_len"), stated.get("image_size"))
    shape = asdict(given.config)
    rows = [
        f"  {name}: command line {value}, file {shape[name]}" for name, value in stated.items() if value != shape[name]
    ]
    if rows:
        raise ValueError(f"--init-from {config.init_from} brings its own shape, leave these out:\n" + "\n".join(rows))
    laq = LAQ(given.config)
    laq.load_state_dict(given.state_dict())
    return laq


def train_teacher(config: TeacherConfig) -> None:
    from smolvla_shared.checkpoint import check_run
    from smolvla_shared.training import make_accelerator, origin, train

    accelerator = make_accelerator(config)
    if accelerator.is_fsdp2:
        raise ValueError("a teacher fits every GPU and is not divided: use configs/accelerate/ddp_8gpu.yaml")
    sources = data.open_sources(config.data)
    _, label_camera = data.choose_cameras(sources, config.data)
    frames, held_out_frames = data.split_sources(sources, config.data, config.seed)
    pair_share = data.valid_pair_share(sources, frames)
    resume_from = check_run(config, accelerator)
    laq = start_laq(config)
    accelerator.print(data.describe(sources, with_pairs=True))
    accelerator.print(
        f"LAQ {f'from {config.init_from}' if config.init_from else 'with fresh weights'}: "
        f"{sum(p.numel() for p in laq.parameters()):,} parameters; a latent action is {laq.config.code_seq_len} codes "
        f"out of {laq.config.codebook_size}; {data.plan(data.group_frames(frames), config)}; pairs of {label_camera}, "
        f"{pair_share:.1%} of the frames have one"
    )

    spec = data.SampleSpec(
        cameras=(),
        label_camera=label_camera,
        pair_size=laq.config.image_size,
        draws={NOISE: (laq.config.code_seq_len, laq.config.quant_dim)},
    )
    loaders = data.make_loaders(
        sources, data.group_frames(frames), data.group_frames(held_out_frames), spec, config, accelerator
    )

    def prepare(raw: RawBatch) -> PairBatch:
        return PairBatch(raw.pairs, raw.pair_mask, raw.noise[NOISE][:, 0])

    collapsed = 0  # reports in a row

    def replace_and_report(step: int) -> dict[str, float]:
        nonlocal collapsed
        if step % config.replace_every:
            return {}
        usage = laq.vq._usage.clone()
        laq.vq._usage.zero_()
        replaced = 0
        if step <= (1 - config.settle_share) * config.steps:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            replaced = replace_dead_codes(laq, usage, config.dead_below, generator)
        per_slot = perplexity(usage.float())
        collapsed = collapsed + 1 if per_slot.mean() < config.collapse_below else 0
        if collapsed == 3 and accelerator.is_main_process:
            tqdm.write(
                f"warning: at step {step} a slot effectively uses {per_slot.mean():.2f} codes of "
                f"{laq.config.codebook_size}: the codebook has collapsed. If it does not recover, fine-tune a healthy "
                "teacher (--init-from), lower --optim.lr, or replace dead codes more often (--replace-every)"
            )
        return {
            "usage/perplexity": per_slot.mean().item(),
            "usage/lowest_slot_perplexity": per_slot.min().item(),
            "usage/replaced_codes": replaced,
            **{f"usage/perplexity_of_slot_{slot}": value for slot, value in enumerate(per_slot.tolist())},
        }

    def evaluate() -> dict[str, float]:
        """Error of the reconstruction from the codes, beside that of repeating the first frame."""
        sums = torch.zeros(3, device=accelerator.device)
        for raw in loaders.held_out():
            frames = laq.resize(unit_range(raw.pairs.to(accelerator.device)))
            mask = raw.pair_mask.to(accelerator.device)
            predicted = laq.reconstruct(frames)
            errors = [(p - frames[:, 1]).square().mean((1, 2, 3)) * mask for p in (predicted, frames[:, 0])]
            sums += torch.stack([errors[0].sum(), errors[1].sum(), mask.sum()])
        reconstruction, copy, count = accelerator.reduce(sums, "sum").tolist()
        return {"reconstruction": reconstruction / max(count, 1), "reconstruction_of_first_frame": copy / max(count, 1)}

    def export(directory: Path, weights: dict[str, Tensor], step: int) -> None:
        directory.mkdir(parents=True)
        with torch.device("meta"):
            published = LAQ(laq.config)
        published.load_state_dict(weights, assign=True)
        source = origin(config, step, [s.name for s in sources])
        source |= {"frame_gap_s": config.data.frame_gap_s, "label_camera": label_camera}
        save_laq(published, directory / TEACHER_FILE, extra=source)

    train(
        config,
        accelerator,
        laq,
        loaders.train,
        prepare,
        evaluate=torch.no_grad()(evaluate) if loaders.held_out else None,
        export=export,
        after_step=replace_and_report,
        resume_from=resume_from,
    )
    accelerator.print(f"teacher: {config.run_dir / 'checkpoints' / 'last' / 'pretrained_model' / TEACHER_FILE}")


COMMANDS = {"train": (TeacherConfig, train_teacher), "label": (LabelConfig, label), "check": (CheckConfig, check)}


def main(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "nothing"
    if name not in COMMANDS:
        raise SystemExit(f"python -m smolvla_shared.teacher {{{','.join(COMMANDS)}}} [--help]; got {name}")
    config_class, command = COMMANDS[name]
    command(tyro.cli(config_class, prog=f"python -m smolvla_shared.teacher {name}", args=arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
