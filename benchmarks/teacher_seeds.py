"""Whether teachers of other seeds learn as much, and whether the codes of one collapse.

    python benchmarks/teacher_seeds.py --video data/video --held-out data/held_out
    python benchmarks/teacher_seeds.py --video data/video --held-out data/held_out --gap-s 0.0125 --seeds 0 1 2

with two recordings of examples/record_metaworld.py. Their cameras stand still; with a smaller gap there is less motion,
too. Each teacher is trained on the video, of which it holds out nothing, and checked on the other recording. The sizes
are those of examples/quickstart.sh. A teacher or a check that is there is not made again.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

CHECKS = "quantized", "continuous"
AXES = "x", "y", "z"


@dataclass(frozen=True)
class Config:
    """Train a teacher of each seed, check it, and print the perplexity of its codes and what its latents tell."""

    # Action-free video that the teachers are trained on.
    video: Path
    # A recording that they are checked on.
    held_out: Path
    # Where teachers, checks and table go.
    out: Path = Path("runs/teacher_seeds")
    seeds: tuple[int, ...] = tuple(range(10))
    # Cameras of the recordings; without any, the first.
    cameras: tuple[str, ...] = ("observation.images.topview", "observation.images.corner2")
    gap_s: float = 0.05
    # Training steps, and their batch.
    steps: int = 1200
    batch_size: int = 16
    # Pairs that a check looks at.
    pairs: int = 2000


def run(*command: object) -> int:
    print(*command, flush=True)
    return subprocess.run([sys.executable, "-m", "smolvla_shared.teacher", *map(str, command)]).returncode


def train(config: Config, seed: int) -> Path:
    directory = config.out / f"{seed}"
    path = directory / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors"
    cameras = ["--data.label-cameras", *config.cameras] if config.cameras else []
    words = ["--data.roots", config.video, "--data.frame-gap-s", config.gap_s, "--data.num-workers", 1, *cameras]
    words += ["--val-fraction", 0, "--seed", seed, "--steps", config.steps, "--batch-size", config.batch_size]
    words += ["--save-every", config.steps, *(["--resume"] if directory.exists() else [])]
    if not path.exists() and run("train", "--run-dir", directory, *words):
        raise SystemExit(f"the training of seed {seed} failed")
    return path


def check(config: Config, seed: int, laq: Path, kind: str) -> dict:
    """What a check measured; it fails where the teacher is a bad one, which is no error here."""
    out = config.out / f"check-{seed}-{kind}"
    if not out.exists():
        words = ["--data.roots", config.held_out, "--data.num-workers", 1, "--pairs", config.pairs]
        run("check", "--laq-ckpt", laq, "--out", out, "--teacher-kind", kind, "--detailed-pairs", 300, *words)
    return json.loads((out / "label_health.json").read_text())["measured"]


def main(config: Config) -> None:
    rows = []
    for seed in config.seeds:
        laq = train(config, seed)
        found = {kind: check(config, seed, laq, kind) for kind in CHECKS}
        perplexity = found["quantized"]["codes"]["perplexity"]
        told = [found[kind]["probe"]["displacement of observation.state"] for kind in CHECKS]
        told = [[dict(zip(one["dimensions"], one["latents"]))[axis] for axis in AXES] for one in told]
        rows.append([seed, np.mean(perplexity), min(perplexity), *(np.mean(one) for one in told)])
    lines = [
        "| seed | perplexity of the codes | of the lowest slot | R² of displacement, quantized | continuous |",
        "|---|---|---|---|---|",
        *("| {} | {:.1f} | {:.1f} | {:.2f} | {:.2f} |".format(*row) for row in rows),
        "| **mean** | {:.1f} | {:.1f} | {:.2f} | {:.2f} |".format(*np.mean(rows, axis=0)[1:]),
        "| **lowest** | {:.1f} | {:.1f} | {:.2f} | {:.2f} |".format(*np.min(rows, axis=0)[1:]),
    ]
    (config.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
