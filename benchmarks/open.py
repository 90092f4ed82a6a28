"""What opening a dataset costs, by its number of episodes: CPU time and memory of a process, ours and LeRobotDataset's.

python benchmarks/open.py                           # 300, 3,000 and 30,000 episodes of 250 frames, two minutes
python benchmarks/open.py --episodes 3000 300000    # 75 million frames

The datasets have the tables and videos that LeRobot records, of an episode that it did record, repeated. Every figure
is of a process of its own, from after its imports. "unchecked" is what ours takes without looking for anything wrong.
"""

import json
import os
import pickle
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_shared import data, data_order, data_problems, data_rows, data_split, data_values
from smolvla_shared.config import DEFAULT_GAP_S
from smolvla_shared.mixture import DatasetEntry

CAMERAS = ("observation.images.top", "observation.images.wrist")
FPS, FRAMES = 20, 250
EPISODES_OF_A_FILE = 1000
EPISODES_OF_A_META_FILE = 30_000  # about the 100 MB after which LeRobot begins another one
META, DATA = "meta/episodes/chunk-000/file-{:03d}.parquet", "data/chunk-000/file-{:03d}.parquet"
VIDEO = "videos/{}/chunk-000/file-{:03d}.mp4"
STEP_SAMPLES = 64
MILLION_HOURS = 10**6 * 3600 * FPS // FRAMES  # episodes


@dataclass(frozen=True)
class Options:
    """The cost of opening a dataset, by its number of episodes."""

    # Numbers of episodes, at least two.
    episodes: tuple[int, ...] = (300, 3000, 30000)
    # LeRobotDataset, which takes longer, is opened up to this number.
    lerobot_up_to: int = 3000
    # Write all figures here as JSON.
    out: Path | None = None


# --- datasets ---------------------------------------------------------------------------------------------------------


def record(root: Path) -> None:
    """One episode, by LeRobot."""
    image = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (7,), "names": None}
    features = dict.fromkeys(CAMERAS, image) | {data.STATE_KEY: vector, data.ACTION_KEY: vector}
    h264 = RGBEncoderConfig(vcodec="h264")
    dataset = LeRobotDataset.create("one", fps=FPS, features=features, root=root, rgb_encoder=h264)
    rng = np.random.default_rng(0)
    for _ in range(FRAMES):
        state, action = rng.normal(size=(2, 7)).astype(np.float32)
        pictures = dict.fromkeys(CAMERAS, np.zeros((64, 64, 3), np.uint8))
        dataset.add_frame(pictures | {data.STATE_KEY: state, data.ACTION_KEY: action, "task": "push the square"})
    dataset.save_episode()
    dataset.finalize()


def replaced(table: pa.Table, columns: dict[str, np.ndarray]) -> pa.Table:
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return table


def repeat_video(one: Path, path: Path, episodes: int) -> None:
    """The packets of a video, so many times."""
    with av.open(str(one)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        times, base = [(packet.pts, packet.dts, packet.duration) for packet in packets], stream.time_base
        whole = round(FRAMES / FPS / base)
        out = target.add_stream_from_template(stream, opaque=True)
        for number in range(episodes):
            for packet, (pts, dts, duration) in zip(packets, times, strict=True):
                packet.stream, packet.time_base, packet.duration = out, base, duration
                packet.pts, packet.dts = pts + number * whole, dts + number * whole
                target.mux(packet)


def multiply(one: Path, root: Path, episodes: int) -> None:
    """A dataset of an episode, so many times, in row groups as LeRobot writes them: ten episodes, and one's frames."""
    shutil.copytree(one, root)
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(
        json.dumps(info | {"total_episodes": episodes, "total_frames": episodes * FRAMES})
    )
    meta, frames = pq.read_table(one / META.format(0)), pq.read_table(one / DATA.format(0))
    ten = meta.take(pa.array([0] * 10))
    for file, first in enumerate(range(0, episodes, EPISODES_OF_A_META_FILE)):
        last = min(first + EPISODES_OF_A_META_FILE, episodes)
        with pq.ParquetWriter(root / META.format(file), meta.schema) as writer:
            for start in range(first, last, 10):
                numbers = np.arange(start, min(start + 10, last))
                columns = {"episode_index": numbers, "data/file_index": numbers // EPISODES_OF_A_FILE}
                columns |= {"dataset_from_index": numbers * FRAMES, "dataset_to_index": (numbers + 1) * FRAMES}
                for camera in CAMERAS:
                    columns[f"videos/{camera}/file_index"] = numbers // EPISODES_OF_A_FILE
                    start_s = numbers % EPISODES_OF_A_FILE * FRAMES / FPS
                    columns |= {f"videos/{camera}/from_timestamp": start_s}
                    columns |= {f"videos/{camera}/to_timestamp": start_s + FRAMES / FPS}
                writer.write_table(replaced(ten.slice(0, len(numbers)), columns))
    videos: dict[tuple[str, int], Path] = {}  # by camera and number of episodes
    for file, start in enumerate(range(0, episodes, EPISODES_OF_A_FILE)):
        with pq.ParquetWriter(root / DATA.format(file), frames.schema) as writer:
            for number in range(start, min(start + EPISODES_OF_A_FILE, episodes)):
                index = number * FRAMES + np.arange(FRAMES)
                writer.write_table(replaced(frames, {"index": index, "episode_index": np.full(FRAMES, number)}))
        for camera in CAMERAS:
            key = camera, min(EPISODES_OF_A_FILE, episodes - start)
            path = root / VIDEO.format(camera, file)
            path.unlink(missing_ok=True)
            if key not in videos:
                repeat_video(one / VIDEO.format(camera, 0), path, key[1])
            else:
                path.hardlink_to(videos[key])
            videos.setdefault(key, path)


# --- what is measured, each in a process of its own -------------------------------------------------------------------


def open_ours(root: Path, checked: bool = True) -> int:
    """As a run of Stage 3 opens it: the dataset and the samples of a step. Returns the bytes that a worker gets."""
    datasets = [data.RobotDataset(DatasetEntry(root=str(root)), root, DEFAULT_GAP_S)]
    if checked:
        data_problems.refuse_tables(datasets)
        data_values.refuse_vectors(datasets, data.STATE_KEY, data.ACTION_KEY)
    training, _ = data_split.split_datasets(datasets, 0.05, seed=0)
    (keys,) = data_order.StepSampler(data_rows.group_rows(training), 0, STEP_SAMPLES, 10**5, 10**5 + 1)
    for key in keys:
        datasets[0].task(key.row)
        for name in (data.STATE_KEY, data.ACTION_KEY):
            datasets[0].vector(name)[key.row]
    return len(pickle.dumps(datasets))


def open_unchecked(root: Path) -> int:
    return open_ours(root, checked=False)


def open_lerobot(root: Path) -> int:
    return len(pickle.dumps(LeRobotDataset("many", root=root)))


def memory(name: str) -> float:
    """A figure of /proc/self/status, MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def cost(opens: Callable[[Path], int], root: Path) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before, start = memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    pickled = opens(root)
    end = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    return {"cpu_s": cpu_s, "peak_mb": memory("VmHWM") - before, "pickled_kb": pickled / 1000}


def alone(opens: Callable[[Path], int], root: Path) -> dict[str, float]:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(cost, (opens, root))


def measure(options: Options, directory: Path) -> Iterator[dict[str, float | str]]:
    record(directory / "one")
    for episodes in options.episodes:
        root = directory / str(episodes)
        multiply(directory / "one", root, episodes)
        for what, opens in {"ours": open_ours, "unchecked": open_unchecked, "LeRobotDataset": open_lerobot}.items():
            if opens is not open_lerobot or episodes <= options.lerobot_up_to:
                for opened in ("first", "again") if opens is not open_unchecked else ("again",):
                    yield {"episodes": episodes, "what": what, "opened": opened} | alone(opens, root)
        shutil.rmtree(root)


def main(options: Options) -> None:
    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_HOME"] = str(Path(directory) / "hf")  # of the processes that measure
        print(f"{'episodes':>9}{'frames':>12}  {'':<23}{'CPU s':>9}{'peak MB':>9}{'pickled KB':>12}")
        for row in measure(options, Path(directory)):
            rows.append(row)
            what = f"{row['what']}, {row['opened']}"
            figures = f"{row['cpu_s']:9.2f}{row['peak_mb']:9.0f}{row['pickled_kb']:12.0f}"
            print(f"{row['episodes']:>9,}{row['episodes'] * FRAMES:>12,}  {what:<23}{figures}", flush=True)
    of = {(row["episodes"], row["what"], row["opened"]): row for row in rows}
    for episodes, what, opened in of:
        if what == "unchecked":
            share = 1 - of[episodes, what, opened]["cpu_s"] / of[episodes, "ours", opened]["cpu_s"]
            print(f"{episodes:,} episodes, {opened}: checks are {share:.0%} of the CPU time of opening")
        if what == "LeRobotDataset":
            ratio = of[episodes, "ours", opened]["cpu_s"] / of[episodes, what, opened]["cpu_s"]
            print(f"{episodes:,} episodes, {opened}: {ratio:.4f} of the CPU time of {what}")
    for opened, name in (("first", "cpu_s"), ("again", "cpu_s"), ("again", "peak_mb")):
        few, many = (of[episodes, "ours", opened][name] for episodes in options.episodes[-2:])
        growth = (many - few) / (options.episodes[-1] - options.episodes[-2])
        print(f"a million hours, {opened}: {name} {growth * MILLION_HOURS:,.0f}, if the last growth goes on")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
