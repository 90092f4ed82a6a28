"""What is wrong with a LeRobotDataset, as far as its tables and the headers of its videos tell.

A problem is a text: where it is, what was found, and what to do. Every command that opens datasets asks for them in its
first seconds. Columns are compared as arrays, 2^16 rows at a time. No frame is decoded here: data_check.py does that.
"""

import math
import string
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pandas as pd
from pyarrow import ArrowException

from smolvla_shared.data_columns import MEND, ROWS_AT_ONCE, Columns
from smolvla_shared.hashes import dataset_fingerprint
from smolvla_shared.refusals import read_json, shown
from smolvla_shared.video_source import declared_s, open_stream

if TYPE_CHECKING:
    from smolvla_shared.data import RobotDataset

FORMAT, TASKS = "v3.0", "meta/tasks.parquet"
CONVERT = "python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={name} --root={root} --push-to-hub=false"
# Video files whose headers a script reads, evenly among all. The command data_check reads all.
HEADERS = 100


def refuse(dataset: "RobotDataset", problems: Collection[str]) -> None:
    """Raise ValueError with the first problem and the number of the others, if there are any."""
    if problems:
        first, *others = problems
        more = f"\n  and {len(others)} more" if others else ""
        raise ValueError(
            f"{dataset.name} cannot be trained on: {first}{more}\n  `python -m smolvla_shared.data_check "
            f"{dataset.name}` lists everything that is wrong with it"
        )


def refuse_tables(datasets: "list[RobotDataset]") -> None:
    """Raise ValueError for a dataset whose tables or videos do not fit each other, and for one that is given twice."""
    for dataset in datasets:
        refuse(dataset, [*table_problems(dataset), *header_problems(dataset, HEADERS)])
    if problems := twice(datasets):
        raise ValueError(problems[0])


def twice(datasets: "list[RobotDataset]") -> list[str]:
    """The datasets that are the same: one directory under two names, or a copy."""
    problems = []
    for index, dataset in enumerate(datasets):
        for other in datasets[:index]:
            if dataset.root.resolve() == other.root.resolve():
                problems.append(f"{other.name} and {dataset.name} are one directory: name it once")
            elif np.array_equal(dataset.episode_to, other.episode_to) and (
                dataset_fingerprint(dataset.root) == dataset_fingerprint(other.root)
            ):
                problems.append(f"{dataset.name} is a copy of {other.name}: name one of them")
    return problems


# --- meta/info.json ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Info:
    """What is read of meta/info.json. LeRobot's class of it is imported with torch and more, in seconds."""

    fps: float
    features: dict[str, dict[str, Any]]
    total_episodes: int
    total_frames: int
    total_tasks: int
    # LeRobot's defaults.
    data_path: str = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video_path: str = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    robot_type: str | None = None


def read_info(root: Path) -> Info:
    """Raises ValueError for a meta/info.json that LeRobot's reader would not understand, or misunderstand;
    FileNotFoundError if there is none.
    """
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(path)
    if problems := info_problems(root, body := read_json(path)):
        raise ValueError(f"{path}: " + "; ".join(problems))
    of = {key: feature | {"shape": tuple(feature["shape"])} for key, feature in body["features"].items()}
    return Info(**{field.name: body[field.name] for field in fields(Info) if field.name in body} | {"features": of})


def info_problems(root: Path, info: dict[str, Any]) -> list[str]:
    version = info.get("codebase_version")
    if version != FORMAT and (not isinstance(version, str) or not version.startswith("v3.")):
        convert = f"convert it: {CONVERT.format(name=root.resolve().name, root=root)}"
        fix = convert if version == "v2.1" else "versions before v2.1 are converted to v2.1 first, by an older LeRobot"
        return [f"the dataset has the format {shown(version)}, {FORMAT} is read: {fix}"]
    problems = []
    if not is_number(fps := info.get("fps")) or not 0 < fps < 10_000:
        problems.append(f"fps is {shown(fps)}, it should be the frames of a second")
    for name in ("total_episodes", "total_frames", "total_tasks"):
        if type(value := info.get(name)) is not int or value < (name != "total_tasks"):
            problems.append(f"{name} is {shown(value)}, it should be a number of at least {int(name != 'total_tasks')}")
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        return [*problems, f"features is {shown(features)}, it should be an object with a feature for each column"]
    for key, feature in features.items():
        problems += feature_problems(key, feature)
    if not isinstance(info.get("robot_type"), str | None):
        problems.append(f"robot_type is {shown(info['robot_type'])}, it should be a name, or null")
    has_video = any(isinstance(feature, dict) and feature.get("dtype") == "video" for feature in features.values())
    for name in ("data_path", "video_path") if has_video else ("data_path",):
        if name in info and not is_path(info[name], {"video_key", "chunk_index", "file_index"}):
            problems.append(f"{name} is {shown(info[name])}, it should be a path with {{chunk_index}}, {{file_index}}")
    return problems


def feature_problems(key: str, feature: Any) -> list[str]:
    if not isinstance(feature, dict):
        return [f"feature {key} is {shown(feature)}, it should be an object with dtype, shape and names"]
    problems, shape, dtype = [], feature.get("shape"), feature.get("dtype")
    if not isinstance(dtype, str) or not (dtype in ("image", "video", "string", "language") or is_dtype(dtype)):
        problems.append(f"feature {key}: dtype is {shown(dtype)}, it should be a type such as float32, or video")
    sizes = shape if isinstance(shape, list) else [0]
    if any(type(size) is not int or size < 1 for size in sizes) or not sizes:
        problems.append(f"feature {key}: shape is {shown(shape)}, it should be a list of sizes, such as [7]")
    return problems


def is_dtype(name: str) -> bool:
    try:
        return np.dtype(name).kind in "biuf"
    except TypeError:
        return False


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_path(value: Any, fields: set[str]) -> bool:
    """A relative path whose fields have these names and a few digits: a width of 10^9 would ask for so much memory."""
    if not isinstance(value, str) or not value or Path(value).is_absolute() or ".." in Path(value).parts:
        return False
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError:
        return False
    return all(name is None or (name in fields and spec in ("", "03d", "06d")) for _, name, spec, _ in parts)


# --- cameras ----------------------------------------------------------------------------------------------------------


def channels_last(feature: dict[str, Any]) -> bool:
    """Recordings use both orders; LeRobot, too, goes by the names. Ports of Open X-Embodiment say rgb."""
    return feature["names"][2] in ("channel", "channels", "rgb")


def channels(feature: dict[str, Any]) -> int | None:
    """Channels of a camera's frames; None: its names do not tell which of the three sizes it is."""
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3 or not isinstance(names, list | tuple) or len(names) != 3:
        return None
    return shape[2] if channels_last(feature) else shape[0]


def is_depth(feature: dict[str, Any]) -> bool:
    marks = [feature.get(name) or {} for name in ("info", "video_info")]
    is_marked = any(mark.get("is_depth_map") or mark.get("video.is_depth_map") for mark in marks)
    return is_marked or channels(feature) == 1


def camera_problem(key: str, feature: dict[str, Any]) -> str | None:
    """Why a policy cannot read a camera."""
    count = channels(feature)
    if is_depth(feature):
        return f"{key} is a depth camera ({count or 'no'} channel), a policy reads pictures of 3: leave it out"
    if count is None:
        return (
            f"{key} has the shape {list(feature['shape'])} and the names {shown(feature.get('names'))}: write "
            '"names": ["height", "width", "channels"], in the order of the shape, into its feature in meta/info.json'
        )
    return f"{key} has {count} channels, a policy reads pictures of 3: leave it out" if count != 3 else None


def refuse_cameras(datasets: "list[RobotDataset]", cameras: Collection[str]) -> None:
    """Raise ValueError for a camera, by the policy's name, that a policy cannot read in a dataset that has it."""
    for dataset in datasets:
        own = {camera: dataset.views[camera] for camera in cameras if camera in dataset.views}
        own |= {camera: camera for camera in dataset.entry.label_cameras or ()}
        problems = {camera: camera_problem(view, dataset.features[view]) for camera, view in own.items()}
        if bad := [problem for problem in problems.values() if problem]:
            others = " ".join(camera for camera, problem in problems.items() if not problem)
            fix = f": pass --data.cameras {others} (or --data.label-cameras)" if others else ""
            raise ValueError(f"{dataset.name}: {'; '.join(bad)}{fix}")


# --- tables -----------------------------------------------------------------------------------------------------------


def table_problems(dataset: "RobotDataset") -> list[str]:
    """What is wrong with episodes, rows, tasks, and the places of episodes in videos."""
    episodes = list(episode_problems(dataset))
    # What rows should be is known from the episodes.
    rows = [] if episodes else list(row_problems(dataset))
    return [*episodes, *rows, *task_problems(dataset), *([] if episodes else place_problems(dataset))]


def first(bad: np.ndarray) -> int | None:
    places = np.flatnonzero(bad)
    return int(places[0]) if len(places) else None


def episode_problems(dataset: "RobotDataset") -> Iterator[str]:
    start, end, total = dataset.episode_from, dataset.episode_to, dataset.num_frames
    number, length = dataset.episodes["episode_index"], dataset.episodes["length"]
    names = dict(enumerate(f"episode {n}" for n in number.tolist()))
    repeated = first(np.isin(number, [n for n, count in zip(*np.unique(number, return_counts=True)) if count > 1]))
    if repeated is not None:
        yield f"meta/episodes lists {names[repeated]} twice: {MEND}"
    elif (at := first(number != np.arange(len(number)))) is not None:
        yield f"meta/episodes lists {names[at]} in the place of episode {at}: its episodes are out of order, {MEND}"
    if (at := first(end <= start)) is not None:
        yield f"{names[at]} has the rows {start[at]} to {end[at]}, which are none: {MEND}"
    before = np.append(0, end[:-1])
    if (at := first(start < before)) is not None:
        yield f"{names[at]} begins at row {start[at]}, but row {before[at] - 1} is of the episode before it: {MEND}"
    if (at := first(start > before)) is not None:
        yield f"rows {before[at]} to {start[at] - 1} are of no episode, before {names[at]}: {MEND}"
    if end[-1] != total:
        yield f"the last episode ends at row {end[-1]}, there are {total} rows: {MEND}"
    if (at := first(end - start != length)) is not None:
        yield f"{names[at]} has the rows {start[at]} to {end[at]}, but a length of {length[at]}: {MEND}"


def differences(columns: Columns, bad: Callable[[np.ndarray], np.ndarray]) -> tuple[int | None, int]:
    """The first row and the number of rows for which bad(rows), which reads these columns, is true."""
    at, count = None, 0
    for start in range(0, len(columns), ROWS_AT_ONCE):
        found = bad(np.arange(start, min(start + ROWS_AT_ONCE, len(columns))))
        columns.release()
        count += int(np.count_nonzero(found))
        if at is None and (place := first(found)) is not None:
            at = start + place
    return at, count


def row_problems(dataset: "RobotDataset") -> Iterator[str]:
    """Rows that are missing, repeated or out of order. The episodes are known to be sound."""
    frames, starts = dataset.frames, dataset.episode_from
    expected = {
        "index": lambda rows: rows,
        "episode_index": dataset.episode_of,
        "frame_index": lambda rows: rows - starts[dataset.episode_of(rows)],
    }
    for name, of in expected.items():
        at, count = differences(frames, lambda rows, of=of, name=name: frames[name][rows] != of(rows))
        if at is not None:
            yield (
                f"{place(dataset, at)} (row {at}) has {name} {frames[name][at]}, expected {of(np.array([at]))[0]}, and "
                f"so do {count} rows: rows are missing or out of order, {MEND}"
            )
    number, fps = expected["frame_index"], dataset.fps
    at, count = differences(frames, lambda rows: ~(np.abs(frames["timestamp"][rows] * fps - number(rows)) <= 0.51))
    if at is not None:
        yield (
            f"{place(dataset, at)} is at {frames['timestamp'][at]:.3f} s, at {fps:g} fps expected "
            f"{number(np.array([at]))[0] / fps:.3f} s, and so are {count} rows: mend fps in meta/info.json, or {MEND}"
        )


def place(dataset: "RobotDataset", row: int) -> str:
    return dataset.frame_name(row).removeprefix(f"{dataset.name} ")


def task_problems(dataset: "RobotDataset") -> Iterator[str]:
    try:
        table = pd.read_parquet(dataset.root / TASKS)
    except (OSError, ArrowException) as error:
        yield f"{TASKS} cannot be read ({error}): copy or download the dataset again"
        return
    texts, total = table.index.tolist(), len(table)
    if total != dataset.info.total_tasks:
        yield f"meta/tasks.parquet has {total} tasks, meta/info.json says {dataset.info.total_tasks}: {MEND}"
    numbers = table["task_index"].tolist() if "task_index" in table else []
    if numbers != list(range(total)):
        yield (
            f"meta/tasks.parquet numbers its tasks {shown(numbers)}, a task's row must be its number: sort the table "
            f"by task_index, or {MEND}"
        )
    for number, text in enumerate(texts):
        if problem := text_problem(text):
            yield f"task {number} {problem}: lerobot-edit-dataset --operation.type modify_tasks writes another"
    indices = dataset.frames["task_index"]
    at, count = differences(dataset.frames, lambda rows: ~((indices[rows] >= 0) & (indices[rows] < total)))
    if at is not None:
        where = f"row {at}" if at >= dataset.episode_to[-1] else place(dataset, at)
        yield f"{where} has the task {indices[at]} of {total}, numbered from 0, and so do {count} rows: {MEND}"


def text_problem(text: Any) -> str | None:
    """Why a task's text is none. It may be empty: video without captions."""
    if not isinstance(text, str):
        return f"is {shown(text)}, it should be a text"
    if controls := sorted({letter for letter in text if ord(letter) < 32 and letter not in "\n\t\r"}):
        return f"has the control characters {controls}"
    return None


def place_problems(dataset: "RobotDataset") -> Iterator[str]:
    """Where the episodes are in the video files, by the table of episodes."""
    frames = (dataset.episode_to - dataset.episode_from).astype(float)
    for camera in dataset.video_keys:
        chunk, file, start, end = (
            dataset.episodes[f"videos/{camera}/{name}"]
            for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        )
        if (at := first(~(np.isfinite(start) & np.isfinite(end) & (start >= 0)))) is not None:
            yield f"episode {at}: its video of {camera} is from {start[at]} to {end[at]} s: {MEND}"
            continue
        recorded = (end - start) * dataset.fps
        if (at := first(np.abs(recorded - frames) > np.maximum(1.5, 0.01 * frames))) is not None:
            yield (
                f"episode {at} has {frames[at]:.0f} frames, but {recorded[at]:.1f} frames of time in its video of "
                f"{camera} ({start[at]:.3f} to {end[at]:.3f} s at {dataset.fps:g} fps): {MEND}"
            )
        order = np.lexsort((start, file, chunk))
        is_same = (np.diff(chunk[order]) == 0) & (np.diff(file[order]) == 0)
        overlap = (end[order][:-1] - start[order][1:]) * dataset.fps
        if (at := first(is_same & (overlap > 1.5))) is not None:
            one, other = order[at], order[at + 1]
            yield (
                f"episodes {one} and {other} have {overlap[at]:.1f} frames of the video of {camera} in common "
                f"({start[one]:.3f} to {end[one]:.3f} s, and from {start[other]:.3f} s): {MEND}"
            )


# --- headers of videos ------------------------------------------------------------------------------------------------


def header_problems(dataset: "RobotDataset", limit: int | None = None) -> Iterator[str]:
    """What the headers of the video files tell: rate, size, start, and whether every episode is in its file.

    limit: so many files of a camera, evenly among all; None: all
    """
    for camera in dataset.video_keys:
        files = np.stack([dataset.episodes[f"videos/{camera}/{name}_index"] for name in ("chunk", "file")], axis=1)
        places, of = np.unique(files, axis=0, return_inverse=True)
        last = dataset.episodes[f"videos/{camera}/from_timestamp"] + (
            (dataset.episode_to - dataset.episode_from - 1) / dataset.fps
        )
        until = np.full(len(places), -np.inf)
        with np.errstate(invalid="ignore"):  # place_problems names a time that is NaN
            np.maximum.at(until, of.ravel(), last)  # time of the last frame that is read
        some = np.unique(np.linspace(0, len(places) - 1, min(limit or len(places), len(places))).round().astype(int))
        for index in some.tolist():
            chunk, file = places[index].tolist()
            path = dataset.info.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
            if problem := header_problem(dataset, camera, dataset.root / path, float(until[index])):
                yield f"{path}: {problem}"


def header_problem(dataset: "RobotDataset", camera: str, path: Path, until: float) -> str | None:
    try:
        with open_stream(path) as (container, stream):
            rate, frames = float(stream.average_rate or 0), stream.frames
            start, seconds = float((stream.start_time or 0) * stream.time_base), declared_s(container, stream)
            size = stream.height, stream.width
    except (av.FFmpegError, OSError, ValueError) as error:
        return f"it cannot be read ({error}): copy or download the dataset again"
    frames = frames or round(seconds * rate)
    if rate and abs(rate - dataset.fps) > 0.01 * dataset.fps:
        return f"it has {rate:.4g} frames a second, the dataset {dataset.fps:g}: {MEND}"
    if frames and rate and until * rate > frames - 0.5 + 1e-3:
        return f"it has {frames} frames at {rate:.4g} fps, an episode ends with that at {until:.3f} s: {MEND}"
    if start > 0.5 / dataset.fps:
        return f"it starts at {start:.3f} s instead of 0: {MEND}"
    if channels(dataset.features[camera]) and size != dataset.frame_shape(camera)[1:]:
        expected = "{} x {}".format(*dataset.frame_shape(camera)[1:])
        return f"its frames have {size[0]} x {size[1]} pixels (height x width), meta/info.json says {expected}: {MEND}"
    return None
