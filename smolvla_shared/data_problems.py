"""What is wrong with a LeRobotDataset, as far as its tables and the headers of its videos tell.

A problem is a text: where it is, what was found, and what to do. Every command that opens datasets asks for them in its
first seconds. Columns are compared as arrays, 2^16 rows at a time. No frame is decoded here: data_check.py does that.
"""

import io
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import ArrowException

from smolvla_shared.data_columns import MEND, ROWS_AT_ONCE, Columns
from smolvla_shared.data_info import camera_problem, channels
from smolvla_shared.hashes import dataset_fingerprint
from smolvla_shared.refusals import shown
from smolvla_shared.video_source import CLIPS_FILE, IMAGE_ERRORS, declared_s, open_stream

if TYPE_CHECKING:
    from smolvla_shared.data import RobotDataset

TASKS = "meta/tasks.parquet"
# Files of videos, and of rows with images, whose first bytes a script reads, evenly among all. data_check reads all.
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
        frames = [*header_problems(dataset, HEADERS), *image_problems(dataset, HEADERS)]
        refuse(dataset, [*table_problems(dataset), *frames])
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

    def episode_of(rows: np.ndarray) -> np.ndarray:
        """Of consecutive rows."""
        first, last = dataset.episode_of(rows[[0, -1]])
        ends = np.minimum(dataset.episode_to[first : last + 1], rows[-1] + 1)
        return np.repeat(np.arange(first, last + 1), np.diff(ends, prepend=rows[0]))

    expected = {
        "index": lambda rows: rows,
        "episode_index": episode_of,
        "frame_index": lambda rows: rows - starts[episode_of(rows)],
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
    except (OSError, ArrowException, ValueError, TypeError, LookupError, AttributeError) as error:  # pandas' metadata
        yield f"{TASKS} cannot be read ({type(error).__name__}: {error}): copy or download the dataset again"
        return
    texts, total = table.index.tolist(), len(table)
    if "task" in table or "task_index" not in table:
        yield (
            f"{TASKS} has the index {shown(table.index.name)} and the columns {shown([*table])}, it should have the "
            f"index task and the column task_index: mend it with pandas, or {MEND}"
        )
        return
    if total != dataset.info.total_tasks:
        yield f"meta/tasks.parquet has {total} tasks, meta/info.json says {dataset.info.total_tasks}: {MEND}"
    numbers = table["task_index"].tolist()
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
        # Whatever writes this format appends: places in another order are those of other episodes, as long or nearly.
        if (at := first(np.diff(order) < 0)) is not None:
            one, other = order[at], order[at + 1]
            yield (
                f"episode {one} is before episode {other} in the videos of {camera} ({start[one]:.3f} s in file "
                f"{file[one]}, {start[other]:.3f} s in file {file[other]}): their places are swapped, {MEND}"
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
        is_trimmed = (dataset.root / CLIPS_FILE).is_file()  # clips that are copied keep what is in no episode
        for index in evenly(len(places), limit):
            chunk, file = places[index].tolist()
            path = dataset.info.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
            if problem := header_problem(dataset, camera, dataset.root / path, float(until[index]), is_trimmed):
                yield f"{path}: {problem}"


def evenly(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` numbers from 0 on, the first and the last among them; None: all."""
    return np.unique(np.linspace(0, count - 1, min(limit or count, count)).round().astype(int)).tolist()


def reach(container: Any, stream: Any, until: float) -> float:
    """The time of the last frame up to `until`, seconds, whose bytes are in the file; none is decoded."""
    last = -math.inf
    container.seek(int(until / stream.time_base), stream=stream)
    for packet in container.demux(stream):
        if packet.pts is not None and not packet.is_corrupt:
            last = max(last, float(packet.pts * stream.time_base))
        if last >= until:
            break
    return last


def header_problem(
    dataset: "RobotDataset", camera: str, path: Path, until: float, is_trimmed: bool = False
) -> str | None:
    """until: time of the last frame that an episode has in the file; is_trimmed: more may follow it"""
    try:
        with open_stream(path) as (container, stream):
            rate, frames = float(stream.average_rate or 0), stream.frames
            start, seconds = float((stream.start_time or 0) * stream.time_base), declared_s(container, stream)
            size = stream.height, stream.width
            frames = frames or round(seconds * rate)
            reached = reach(container, stream, start + until) - start if 0 <= until * rate < frames else until
    except (av.FFmpegError, OSError, ValueError) as error:
        return f"it cannot be read ({error}): copy or download the dataset again"
    if rate and abs(rate - dataset.fps) > 0.01 * dataset.fps:
        return f"it has {rate:.4g} frames a second, the dataset {dataset.fps:g}: {MEND}"
    if frames and rate and until * rate > frames - 0.5 + 1e-3:
        return f"it has {frames} frames at {rate:.4g} fps, an episode ends with that at {until:.3f} s: {MEND}"
    more = frames - 1 - until * rate
    if frames and rate and not is_trimmed and more > max(1.5, 0.01 * frames):
        return (
            f"it has {frames} frames at {rate:.4g} fps, the last {more:.0f} are of no episode: it is of another "
            f"recording, or episodes are missing in meta/episodes, {MEND}"
        )
    if start > 0.5 / dataset.fps:
        return f"it starts at {start:.3f} s instead of 0: {MEND}"
    if reached < until - 0.5 / dataset.fps:
        return f"it is cut before {until:.3f} s, where an episode ends: copy or download the dataset again"
    if channels(dataset.features[camera]) and size != dataset.frame_shape(camera)[1:]:
        expected = "{} x {}".format(*dataset.frame_shape(camera)[1:])
        return f"its frames have {size[0]} x {size[1]} pixels (height x width), meta/info.json says {expected}: {MEND}"
    return None


def image_problems(dataset: "RobotDataset", limit: int | None = None) -> Iterator[str]:
    """What the first row of each file tells of the images in it, of the cameras that a policy can read.

    limit: as in header_problems
    """
    cameras = {key: dataset.features[key] for key in dataset.camera_keys if key not in dataset.video_keys}
    cameras = [key for key, feature in cameras.items() if camera_problem(key, feature) is None]
    files = sorted((dataset.root / "data").glob("*/*.parquet")) if cameras else []
    for index in evenly(len(files), limit):
        try:
            rows = next(pq.ParquetFile(files[index]).iter_batches(1, columns=cameras)).to_pylist()
        except (ArrowException, OSError, StopIteration):
            continue  # the columns of numbers are read from it, too, by a reader that names what is wrong
        for camera in cameras:
            if problem := image_problem(dataset, camera, rows[0].get(camera)):
                yield f"{files[index].relative_to(dataset.root)}: its first image of {camera} {problem}"


def image_problem(dataset: "RobotDataset", camera: str, cell: dict[str, Any] | None) -> str | None:
    """cell: {"bytes": of a PNG or another file, "path": its name}"""
    if not isinstance(cell, dict) or not cell.get("bytes"):
        return f"is not there: {MEND}"
    try:
        with Image.open(io.BytesIO(cell["bytes"])) as image:
            mode, size = image.mode, (image.height, image.width)
            image.load()
    except IMAGE_ERRORS as error:
        return f"cannot be read ({str(error).partition(' <')[0]}): copy or download the dataset again"
    if mode != "RGB":
        return f"has the mode {mode}, a policy reads RGB: {MEND}"
    if size != (expected := dataset.frame_shape(camera)[1:]):
        sizes = "{} x {} pixels (height x width), meta/info.json says {} x {}".format(*size, *expected)
        return f"has {sizes}: {MEND}"
    return None
