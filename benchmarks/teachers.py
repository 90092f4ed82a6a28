"""What `teacher check` says of teachers whose worth is known: the table that label_health.Thresholds come from.

    python benchmarks/teachers.py --video data/video --labelled data/labelled

with two recordings of examples/record_metaworld.py. All see the first camera. Good and grounded teachers are trained on
the video, the latter with the first ten labelled episodes; a mediocre one for a tenth of the steps; a random one not at
all; the collapsed one is the good one with all codes but one out of reach; the camera's sees the same video before a
camera that shakes. A part that is there is not made again.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from smolvla_shared import data
from smolvla_shared.config import DataConfig
from smolvla_shared.laq import LAQ
from smolvla_shared.laq_files import load_laq, save_laq, teachers_source
from smolvla_shared.teacher_config import FRESH

GAP_S = 0.05
SHAKE = 6  # pixels that a shaken frame is shifted by, at most


@dataclass(frozen=True)
class Config:
    """Train six teachers, check them, and print what the checks measured."""

    # Action-free video of examples/record_metaworld.py.
    video: Path
    # Labelled demonstrations of it; the first ten episodes ground a teacher, the others are checked on.
    labelled: Path
    # Where teachers, checks and table go.
    out: Path = Path("runs/teachers")
    # Training steps of the good teachers, and their batch.
    steps: int = 2500
    batch_size: int = 16
    seed: int = 0
    # Pairs that a check looks at.
    pairs: int = 3000


def run(*command: object) -> int:
    print(*command, flush=True)
    return subprocess.run([sys.executable, "-m", "smolvla_shared.teacher", *map(str, command)]).returncode


def train(config: Config, name: str, video: Path, steps: int, *options: object) -> Path:
    directory = config.out / name
    resume = ["--resume"] if directory.exists() else []
    common = ["--data.roots", video, "--data.frame-gap-s", GAP_S, "--data.num-workers", 0, "--seed", config.seed]
    sizes = ["--steps", steps, "--batch-size", config.batch_size, "--save-every", steps, "--eval-every", steps]
    path = directory / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors"
    if not path.exists() and run("train", "--run-dir", directory, *common, *sizes, *options, *resume):
        raise SystemExit(f"the training of {name} failed")
    return path


def save(config: Config, name: str, laq: LAQ) -> Path:
    path = config.out / name / "laq.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_laq(laq, path, {"frame_gap_s": GAP_S, "label_cameras": []})
    return path


def collapsed(good: Path) -> LAQ:
    laq = load_laq(good)
    with torch.no_grad():
        laq.vq.codebooks[1:] = laq.vq.codebooks[0] + 100
    return laq


def fresh(seed: int) -> LAQ:
    """Random weights; its codes are random latents of its own scale, so that it uses them all."""
    torch.manual_seed(seed)
    laq = LAQ(FRESH)
    with torch.no_grad():
        frames = torch.rand(64, 2, 3, FRESH.image_size, FRESH.image_size)
        latents = laq.encode(frames).continuous.flatten(0, 1)
        laq.vq.codebooks[:] = latents[torch.randperm(len(latents))[: FRESH.codebook_size]]
    return laq


def shaken(video: Path, root: Path, seed: int, episodes: int = 40) -> Path:
    """The video before a camera that jumps by up to SHAKE pixels from frame to frame."""
    if root.exists():
        return root
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = data.open_datasets(DataConfig(roots=(video,)))[0]
    camera, rng = dataset.camera_keys[0], np.random.default_rng(seed)
    features = {key: dataset.features[key] for key in (camera, data.STATE_KEY)}
    features[camera] = features[camera] | {"dtype": "image"}
    created = LeRobotDataset.create("shaken", dataset.fps, features, root=root, use_videos=False)
    vectors = dataset.vector(data.STATE_KEY)
    for start, end in zip(dataset.episode_from[::2][:episodes], dataset.episode_to[::2][:episodes]):
        for row, frame in zip(range(start, end), dataset.read_frames(camera, list(range(start, end)))):
            frame = frame.roll(tuple(rng.integers(-SHAKE, SHAKE + 1, 2).tolist()), (1, 2))
            state = np.asarray(vectors[row], np.float32)
            shown = {camera: frame.permute(1, 2, 0).numpy(), data.STATE_KEY: state, "task": dataset.task(row)}
            created.add_frame(shown)
        created.save_episode()
    created.finalize()
    return root


def check(config: Config, name: str, path: Path, *roots: Path) -> dict:
    out = config.out / f"check-{name}"
    if not out.exists():
        options = ["--data.roots", *roots, "--data.num-workers", 0, "--pairs", config.pairs, "--detailed-pairs", 300]
        gap = [] if teachers_source(path).get("frame_gap_s") else ["--data.frame-gap-s", GAP_S]
        run("check", "--laq-ckpt", path, "--out", out, *options, *gap)
    return json.loads((out / "label_health.json").read_text())


def row(name: str, report: dict) -> str:
    """A line of the table."""
    found = report["measured"]

    def mean(values: list[float | None] | None) -> str:
        known = [value for value in values or [] if value is not None]
        return f"{np.mean(known):.2f}" if known else "-"

    perplexity = found["codes"]["perplexity"]
    parts = [f"{np.mean(perplexity):.1f} ({min(perplexity):.1f})", f"{found['codes']['most_common_share']:.0%}"]
    parts += [f"{found['reconstruction']['gain']:.0%}", f"{found['camera_share'] or 0:.0%}", mean([found["leakage"]])]
    for target in ("displacement of observation.state", "executed_action"):
        probe = found["probe"].get(target, {})
        parts += ["; ".join(mean(probe.get(key)) for key in ("latents", "random_teacher", "gained_share"))]
    return f"| {name} | {' | '.join(parts)} | {report['verdict']} |"


def main(config: Config) -> None:
    ten = ["--grounding.roots", config.labelled, "--grounding.episodes", 10]
    both = config.video, config.labelled
    good = train(config, "good", config.video, config.steps)
    shaky = shaken(config.video, config.out / "shaken", config.seed)
    teachers = {
        "good": (good, *both),
        "grounded": (train(config, "grounded", config.video, config.steps, *ten), *both),
        "mediocre": (train(config, "mediocre", config.video, config.steps // 10), *both),
        "random": (save(config, "random", fresh(config.seed)), *both),
        "collapsed": (save(config, "collapsed", collapsed(good)), *both),
        "camera": (train(config, "camera", shaky, config.steps // 4), shaky),
    }
    reports = {name: check(config, name, *where) for name, where in teachers.items()}
    lines = [
        "| teacher | perplexity (lowest slot) | most common | own latent's gain | camera | past/future | displacement: "
        "R²; random; gained | executed action: R²; random; gained | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(name, report) for name, report in reports.items()),
    ]
    (config.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for name, report in reports.items():
        print(name, *report["reasons"], sep="\n  ")


if __name__ == "__main__":
    main(tyro.cli(Config))
