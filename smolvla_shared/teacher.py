"""The LAQ teacher: training one, and its labels.

accelerate launch -m smolvla_shared.teacher train --data.roots my/videos --run-dir runs/laq
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor

from smolvla_shared import data
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import RunConfig
from smolvla_shared.laq import LAQ, LAQConfig, PairBatch, perplexity, replace_dead_codes, save_laq
from smolvla_shared.preprocess import Statistics

TEACHER_FILE = "laq.safetensors"
NOISE = "nsvq"  # the key of the quantiser's noise in a RawBatch


def to_float(frames: Tensor) -> Tensor:
    """Frames as data.py reads them, uint8 or already in [0, 1] -> float32 in [0, 1]."""
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames


@torch.no_grad()
def latent_vectors(teacher: LAQ, pairs: Tensor) -> Tensor:
    """Online labels: frame pairs [B, 2, 3, h, w], uint8 (or float in [0, 1]) -> quantised latent actions [B, S, D]."""
    return teacher.encode(to_float(pairs)).vectors


def latent_statistics(
    teacher: LAQ, sources: list[data.Source], frames: list[tuple[int, data.np.ndarray]], camera: str, seed: int
) -> Statistics:
    """Mean and standard deviation of the latent targets over up to 512 valid training pairs, drawn with the seed."""
    spec = data.SampleSpec(cameras=(), label_camera=camera)
    sampler = data.StepSampler(data.group_frames(frames), seed, batch_size=32, first_step=0, last_step=16)
    loader = data.make_loader(data.SampleDataset(sources, spec, seed), sampler, num_workers=0)
    device = next(teacher.parameters()).device
    vectors = [latent_vectors(teacher, raw.pairs.to(device)).flatten(1).cpu()[raw.pair_mask] for raw in loader]
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
class TeacherConfig(RunConfig):
    """Train a LAQ teacher on video: it learns codes that tell a frame from an earlier one. Needs no actions."""

    # The defaults are the shape of LAPA's released teacher.
    laq: LAQConfig = field(default_factory=LAQConfig)
    # Steps between replacements of dead codes; their uses are counted over all processes.
    replace_every: int = 100
    # A code is dead when it was used less than this share of the average.
    dead_below: float = 0.05
    # No replacement in the last share of the run, so that the codes settle.
    settle_share: float = 0.2


def train_teacher(config: TeacherConfig) -> None:
    from smolvla_shared.checkpoint import check_run
    from smolvla_shared.training import make_accelerator, train

    accelerator = make_accelerator(config)
    sources = data.open_sources(config.data)
    _, label_camera = data.choose_cameras(sources, config.data)
    frames, held_out_frames = data.split_sources(sources, config.data, config.seed)
    pair_share = data.valid_pair_share(sources, frames)
    resume_from = check_run(config, accelerator)
    laq = LAQ(config.laq)
    accelerator.print(data.describe(sources, with_pairs=True))
    accelerator.print(
        f"LAQ: {sum(p.numel() for p in laq.parameters()):,} parameters; a latent action is {config.laq.code_seq_len} "
        f"codes out of {config.laq.codebook_size}; pairs of {label_camera}, "
        f"{pair_share:.1%} of the frames have one"
    )

    spec = data.SampleSpec(
        cameras=(),
        label_camera=label_camera,
        draws={NOISE: (config.laq.code_seq_len, config.laq.quant_dim)},
    )
    loaders = data.make_loaders(
        sources, data.group_frames(frames), data.group_frames(held_out_frames), spec, config, accelerator
    )

    def prepare(raw: RawBatch) -> PairBatch:
        frames = raw.pairs if raw.pairs.dtype == torch.uint8 else raw.pairs * 255
        return PairBatch(frames, raw.pair_mask, raw.noise[NOISE][:, 0])

    def replace_and_report(step: int) -> dict[str, float]:
        if step % config.replace_every:
            return {}
        usage = laq.vq._usage.clone()
        laq.vq._usage.zero_()
        replaced = 0
        if step <= (1 - config.settle_share) * config.steps:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            replaced = replace_dead_codes(laq, usage, config.dead_below, generator)
        per_slot = perplexity(usage.float())
        return {
            "usage/perplexity": per_slot.mean().item(),
            "usage/lowest_slot_perplexity": per_slot.min().item(),
            "usage/replaced_codes": replaced,
        }

    def evaluate() -> dict[str, float]:
        """Error of the reconstruction from the codes, beside that of repeating the first frame."""
        sums = torch.zeros(3, device=accelerator.device)
        for raw in loaders.held_out():
            frames = laq.resize(to_float(raw.pairs.to(accelerator.device)))
            mask = raw.pair_mask.to(accelerator.device)
            predicted = laq.reconstruct(frames)
            errors = [(p - frames[:, 1]).square().mean((1, 2, 3)) * mask for p in (predicted, frames[:, 0])]
            sums += torch.stack([errors[0].sum(), errors[1].sum(), mask.sum()])
        reconstruction, copy, count = accelerator.reduce(sums, "sum").tolist()
        return {"reconstruction": reconstruction / max(count, 1), "reconstruction_of_first_frame": copy / max(count, 1)}

    def export(directory: Path) -> None:
        directory.mkdir(parents=True)
        source = {
            "run": config.run_dir.name,
            "datasets": [s.name for s in sources],
            "frame_gap_s": config.data.frame_gap_s,
            "label_camera": label_camera,
        }
        save_laq(laq, directory / TEACHER_FILE, extra=source)

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


COMMANDS = {"train": (TeacherConfig, train_teacher)}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name not in COMMANDS:
        raise SystemExit(f"python -m smolvla_shared.teacher {{{','.join(COMMANDS)}}} [--help]; got {name}")
    config_class, command = COMMANDS[name]
    command(tyro.cli(config_class, prog=f"python -m smolvla_shared.teacher {name}", args=sys.argv[2:]))


if __name__ == "__main__":
    main()
