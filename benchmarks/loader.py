"""Our data loader beside LeRobot's default one: samples a second from the same videos, taking turns.

python benchmarks/loader.py           # two cameras of 640 x 480, H.264 and AV1, about 11 minutes on two calm cores
python benchmarks/loader.py --quick   # tiny videos, half a minute: does it run? Its figures say nothing

LeRobot's is what lerobot-train makes: LeRobotDataset with delta_timestamps, frames as uint8, in a shuffling
DataLoader. Both read the same: Stage 2 a frame pair of the first camera and a frame of the second, Stage 3 a frame of
both and an action chunk.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader, RandomSampler

from smolvla_shared import data, data_loader, data_order, data_rows, data_split
from smolvla_shared.cache import RowCache
from smolvla_shared.config import DataConfig
from smolvla_shared.feature_cache import SHARD_ROWS

CAMERAS = ("observation.images.top", "observation.images.wrist")
FPS, GAP_S, CHUNK_SIZE = 30, 0.5, 50


@dataclass(frozen=True)
class Options:
    """Samples a second from video, ours beside LeRobot's default loader."""

    # Small videos and few batches.
    quick: bool = False
    # Loader processes of either.
    num_workers: int = min(4, os.cpu_count() or 1)
    # Samples in a batch.
    batch_size: int = 32
    # Batches that are timed in a round, after as many as fill the workers' queues.
    batches: int = 12
    # Rounds that a median is taken over.
    repeats: int = 3
    # Frames between key frames of the videos; 2 is what LeRobot records.
    gop: int = 2
    # Write all figures here as JSON.
    out: Path | None = None


def record(root: Path, quick: bool, gop: int) -> None:
    """Four episodes of moving squares over a textured background."""
    height, width = (96, 128) if quick else (480, 640)
    image = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (6,), "names": None}
    dataset = LeRobotDataset.create(
        repo_id="benchmark",
        fps=FPS,
        features=dict.fromkeys(CAMERAS, image) | {"observation.state": vector, "action": vector},
        root=root,
        # LeRobot's default, SVT-AV1, makes the whole process a real-time one when root runs it.
        rgb_encoder=RGBEncoderConfig(vcodec="h264", g=gop),
    )
    rng = np.random.default_rng(0)
    background = np.kron(rng.integers(0, 255, (height // 16, width // 16, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    for _ in range(4):
        for frame in range(30 if quick else 100):
            picture = np.roll(background, frame, axis=1)
            y, x = height // 4 + frame % (height // 4), width // 4 + 2 * frame % (width // 2)
            picture[y : y + height // 6, x : x + width // 6] = 255
            values = rng.normal(size=(2, 6)).astype(np.float32)
            dataset.add_frame(
                dict.fromkeys(CAMERAS, picture)
                | {"observation.state": values[0], "action": values[1], "task": "push the square"}
            )
        dataset.save_episode()
    dataset.finalize()


def transcode_to_av1(root: Path, gop: int) -> None:
    """Replace a dataset's videos; by the ffmpeg command, whose process may run as it likes."""
    first, *others = sorted((root / "videos").rglob("*.mp4"))
    av1 = first.with_suffix(".av1.mp4")
    command = ["ffmpeg", "-v", "error", "-i", first, "-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "30"]
    subprocess.run([*command, "-g", str(gop), "-fps_mode", "passthrough", av1], check=True)
    av1.replace(first)
    for other in others:  # the cameras recorded the same
        shutil.copy(first, other)


# --- the two loaders --------------------------------------------------------------------------------------------------


def lerobot_loader(root: Path, stage: int, options: Options) -> DataLoader:
    deltas = {"action": [i / FPS for i in range(CHUNK_SIZE)]} if stage == 3 else {CAMERAS[0]: [0.0, GAP_S]}
    dataset = LeRobotDataset("benchmark", root=root, delta_timestamps=deltas, return_uint8=True)
    return DataLoader(
        dataset,
        batch_size=options.batch_size,
        # Shuffled, without an end: what a new epoch costs is not counted.
        sampler=RandomSampler(dataset, replacement=True, num_samples=10**6),
        num_workers=options.num_workers,
        prefetch_factor=4 if options.num_workers else None,
    )


def our_loader(root: Path, stage: int, caches: str, options: Options) -> DataLoader:
    """caches: "none", "labels" or "labels and features", of what is read from a cache and not from the videos."""
    config = DataConfig(roots=(root,), frame_gap_s=GAP_S)
    datasets = data.open_datasets(config)
    frames, _ = data_split.split_datasets(datasets, 0, seed=0)
    spec = data_loader.SampleSpec(CAMERAS, state_dim=6)
    if stage == 3:
        spec = replace(spec, chunk_size=CHUNK_SIZE, action_dim=6)
    elif caches == "none":
        spec = replace(spec, label_cameras=CAMERAS[:1])
    if "features" in caches:
        spec = replace(spec, features=dict.fromkeys(CAMERAS, (feature_store(root, datasets[0].num_frames),)))
    sampler = data_order.StepSampler(data_rows.group_rows(frames), 0, options.batch_size, 0, 10**6)
    return data_loader.make_loader(data_loader.SampleDataset(datasets, spec, seed=0), sampler, options.num_workers)


def feature_store(root: Path, num_frames: int) -> RowCache:
    """A feature cache of a 500M trunk, but for the values."""
    store = RowCache(root.parent / f"tokens of {root.name}", {}, num_frames, SHARD_ROWS)
    store.claim()
    for rows in store.missing():
        store.write(rows, torch.zeros(len(rows), 64, 960, dtype=torch.bfloat16))
    return store


def samples_per_s(make_loader: partial, options: Options) -> float:
    """Of a loader whose workers run; what they had prepared before the clock starts is not counted."""
    batches = iter(make_loader())
    for _ in range(5 * options.num_workers + 1):  # both queue 4 batches a worker
        next(batches)
    start = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    return options.batches * options.batch_size / (time.perf_counter() - start)


def compare(codec: str, root: Path, options: Options) -> Iterator[dict[str, str | float]]:
    """A row of figures for each kind of sample; the loaders take turns."""
    for stage, what, caches in (
        (2, "frame pairs", ("none", "labels", "labels and features")),
        (3, "action chunks", ("none", "features")),
    ):
        loaders = {"lerobot": partial(lerobot_loader, root, stage, options)}
        loaders |= {some: partial(our_loader, root, stage, some, options) for some in caches}
        rounds = [{n: samples_per_s(loader, options) for n, loader in loaders.items()} for _ in range(options.repeats)]
        medians = {name: statistics.median(speeds[name] for speeds in rounds) for name in loaders}
        for some in caches:
            name = f"{codec}, {what}" if some == "none" else f"  with cached {some}"
            figures = {"lerobot": medians["lerobot"], "ours": medians[some]}
            yield {"what": name} | figures | {"ratio": medians[some] / medians["lerobot"]}


def main(options: Options) -> None:
    print(f"{os.cpu_count()} cores, {options.num_workers} workers; load before the start {os.getloadavg()[0]:.1f}")
    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as directory:
        h264, av1 = Path(directory) / "h264", Path(directory) / "av1"
        record(h264, options.quick, options.gop)
        shutil.copytree(h264, av1)
        transcode_to_av1(av1, options.gop)
        print(f"\n{'samples a second':<36}{'LeRobot':>10}{'ours':>10}{'ratio':>8}  goal")
        for codec, root in (("H.264", h264), ("AV1", av1)):
            for row in compare(codec, root, options):
                rows.append(row)
                verdict = "yes" if row["ratio"] >= 1.5 else "NO"
                figures = f"{row['lerobot']:10.1f}{row['ours']:10.1f}{row['ratio']:8.2f}"
                print(f"{row['what']:<36}{figures}  >= 1.50 {verdict}", flush=True)
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
