"""Datasets that are broken in one way each: refused when a command opens them, and listed by data_check."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import equal, set_vectors
from lerobot.datasets.compute_stats import get_feature_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from test_lerobot_smolvla import run_stage
from torch.utils.data import DataLoader, Dataset

import train_stage2
import train_stage3
from smolvla_shared import data, data_check, data_outliers, data_pictures, data_report, data_values, data_views
from smolvla_shared.command import EXIT_MISTAKE, in_few_lines, run_command
from smolvla_shared.config import ACTION, DataConfig, ModelConfig
from smolvla_shared.data_loader import SampleDataset, SampleSpec
from smolvla_shared.data_order import SampleKey
from smolvla_shared.initial import open_initial
from smolvla_shared.label_cache import LabelConfig, label
from smolvla_shared.robots import Robots
from smolvla_shared.trunk_files import load_trunk_tokenizer
from smolvla_shared.video_source import CLIPS_FILE

CAMERA, STATE = "observation.image", "observation.state"
ROOT = Path(__file__).parent.parent


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A function that changes a JSON file of a dataset; `change` edits its object or returns another."""

    def edit(root: Path) -> None:
        path = root / "meta" / name
        body = json.loads(path.read_text())
        changed = change(body)
        path.write_text(json.dumps(body if changed is None else changed))

    return edit


def edit_table(pattern: str, change: Callable[[pd.DataFrame], Any]) -> Callable[[Path], None]:
    """The same for a parquet file. The types of the columns stay."""

    def edit(root: Path) -> None:
        (path,) = root.glob(pattern)
        table = pq.read_table(path)
        frame = table.to_pandas()
        changed = change(frame)
        changed = frame if changed is None else changed
        columns = [pa.array(changed[field.name].tolist(), field.type) for field in table.schema]  # NaN stays NaN
        pq.write_table(pa.Table.from_arrays(columns, schema=table.schema), path)

    return edit


def info(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return edit_json("info.json", change)


def feature(key: str, **fields: Any) -> Callable[[Path], None]:
    return info(lambda body: body["features"][key].update(fields))


def stats(key: str, **fields: Any) -> Callable[[Path], None]:
    return edit_json("stats.json", lambda body: body[key].update(fields))


def stat(key: str, name: str, dimension: int, change: Callable[[float], float]) -> Callable[[Path], None]:
    def edit(body: Any) -> None:
        body[key][name][dimension] = change(body[key][name][dimension])

    return edit_json("stats.json", edit)


def rows(change: Callable[[pd.DataFrame], Any]) -> Callable[[Path], None]:
    return edit_table("data/*/*.parquet", change)


def cell(column: str, row: int, value: Any) -> Callable[[Path], None]:
    return rows(lambda frame: frame.__setitem__(column, put(frame[column], row, value)))


def element(column: str, row: int, dimension: int, value: float) -> Callable[[Path], None]:
    def change(frame: pd.DataFrame) -> None:
        vectors = [np.array(vector) for vector in frame[column]]
        vectors[row][dimension] = value
        frame[column] = vectors

    return rows(change)


def put(column: pd.Series, row: int, value: Any) -> list:
    values = column.tolist()
    values[row] = value
    return values


def episodes(column: str, row: int, value: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(frame: pd.DataFrame) -> None:
        frame[column] = put(frame[column], row, value(frame[column][row]))

    return edit_table("meta/episodes/*/*.parquet", change)


def swapped(one: int, other: int) -> Callable[[Path], None]:
    """Two episodes of nearly one length, each in the other's place in the video."""

    def change(frame: pd.DataFrame) -> None:
        order = [{one: other, other: one}.get(row, row) for row in range(len(frame))]
        for name in "from_timestamp", "to_timestamp":
            column = frame[f"videos/{CAMERA}/{name}"]
            frame[f"videos/{CAMERA}/{name}"] = column[order].to_numpy()

    return edit_table("meta/episodes/*/*.parquet", change)


def tasks(*texts: str | None, numbers: tuple[int, ...] = (0, 1)) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        table = pd.DataFrame({"task_index": numbers}, index=pd.Index(texts, name="task"))
        table.to_parquet(root / "meta" / "tasks.parquet")

    return write


def video(
    frames: int = 188,
    rate: int = 20,
    size: tuple[int, int] = (96, 96),
    shade: Callable[[int], int] = lambda index: index % 256,
    contrast: int = 0,
) -> Callable[[Path], None]:
    """The file of all episodes, written anew with frames of a shade, which the right half is brighter than."""

    def write(root: Path) -> None:
        (path,) = root.glob("videos/*/*/*.mp4")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"g": "2"})
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for index in range(frames):
                picture = np.full((*size, 3), shade(index), np.uint8)
                picture[:, size[1] // 2 :] += np.uint8(contrast)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    return write


def retyped(column: str, of: pa.DataType, change: Callable[[int, list], list]) -> Callable[[Path], None]:
    """A column of another type, with changed rows."""

    def write(root: Path) -> None:
        (path,) = root.glob("data/*/*.parquet")
        table = pq.read_table(path)
        index = table.schema.get_field_index(column)
        values = [change(row, vector) for row, vector in enumerate(table[column].to_pylist())]
        pq.write_table(table.set_column(index, column, pa.array(values, of)).replace_schema_metadata(), path)

    return write


def twice(name: str, key: str) -> Callable[[Path], None]:
    """A JSON file whose object has a key twice. The last of its values is the one that it had."""

    def edit(root: Path) -> None:
        path = root / "meta" / name
        path.write_text("{" + f'"{key}": 7, ' + path.read_text().lstrip()[1:])

    return edit


def table(pattern: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """A parquet file with other columns."""

    def edit(root: Path) -> None:
        (path,) = root.glob(pattern)
        pq.write_table(change(pq.read_table(path)), path)

    return edit


def typed(pattern: str, column: str, change: Callable[[int, Any], Any]) -> Callable[[Path], None]:
    """A column of another type: that of what `change` makes of a row's number and value."""

    def edit(found: pa.Table) -> pa.Table:
        values = [change(row, value) for row, value in enumerate(found[column].to_pylist())]
        return found.set_column(found.schema.get_field_index(column), column, pa.array(values))

    return table(pattern, lambda found: edit(found).replace_schema_metadata())


EPISODES, START = "meta/episodes/*/*.parquet", f"videos/{CAMERA}/from_timestamp"
OPENED = {
    # meta/info.json
    "a rate twice": (
        twice("info.json", "fps"),
        r'info.json is not JSON \(an object has the key "fps" twice\): it is da',
    ),
    "a newer format": (info(lambda body: body.update(codebase_version="v4.0")), "record, convert or download it in"),
    "a path of one file": (
        info(lambda body: body.update(video_path="videos/{video_key}/chunk-000/file-{file_index:03d}.mp4")),
        r"video_path is .*with {video_key}, {chunk_index}, {file_index}$",
    ),
    "no path of videos": (
        info(lambda body: body.update(video_path=None)),
        'or, if the rows hold the frames, the dtype of observation.image should be "image"',
    ),
    "a video that is said to be images": (
        feature(CAMERA, dtype="image"),
        'feature observation.image has the dtype "image", but its frames are in videos: write "video"',
    ),
    "a video that is said to be numbers": (
        feature(CAMERA, dtype="uint8"),
        'feature observation.image has the dtype "uint8", but its frames are in videos: write "video"',
    ),
    "numbers that are said to be a video": (
        feature(STATE, dtype="video"),
        'observation.state has the dtype "video", but it is numbers: write their type, such as float32',
    ),
    "a camera that is not there": (
        info(lambda body: body["features"].update(wrist=body["features"][CAMERA])),
        'feature wrist has the dtype "video", but the dataset has no frames of it: take the feature out',
    ),
    "a column that is no feature": (
        info(lambda body: body["features"].pop(STATE) and None),
        "info.json does not name what the rows have, observation.state: write its feature there, or write the rows",
    ),
    "format v2.1": (
        info(lambda body: body.update(codebase_version="v2.1")),
        r'format "v2.1".*convert it: python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=copy --root=\S* '
        "--push-to-hub=false",
    ),
    "format v2.0": (info(lambda body: body.update(codebase_version="v2.0")), "converted to v2.1 first"),
    "no format": (info(lambda body: body.pop("codebase_version") and None), "format null, v3.0 is read"),
    "no rate": (info(lambda body: body.update(fps=0)), "fps is 0, it should be the frames of a second"),
    "an infinite rate": (info(lambda body: body.update(fps=float("inf"))), "fps is Infinity"),
    "a number of episodes as text": (info(lambda body: body.update(total_episodes="8")), 'total_episodes is "8"'),
    "no features": (info(lambda body: body.update(features=[])), r"features is \[\]"),
    "a feature without a shape": (feature(STATE, shape=None), f"feature {STATE}: shape is null"),
    "an empty shape": (feature("action", shape=[]), r"feature action: shape is \[\]"),
    "an unknown type": (feature("frame_index", dtype="int64x"), 'feature frame_index: dtype is "int64x"'),
    "a path that asks for memory": (
        info(lambda body: body.update(video_path="videos/{video_key:>999999999}.mp4")),
        "video_path is .*should be a path",
    ),
    "a path out of the dataset": (info(lambda body: body.update(data_path="../../x.parquet")), "data_path is"),
    "info.json is a list": (info(lambda body: [body]), "info.json should hold a JSON object"),
    "info.json is cut": (lambda root: cut(root / "meta" / "info.json"), r"info.json is not JSON"),
    # parquet files
    "a column twice": (
        table(EPISODES, lambda found: found.append_column("length", found["length"])),
        "file-000.parquet has the column length twice",
    ),
    "an episode that is no number": (
        typed(EPISODES, "episode_index", lambda row, value: str(value)),
        "episode_index holds string, not numbers",
    ),
    "half an episode": (
        typed(EPISODES, "episode_index", lambda row, value: value + row / 2),
        "episode_index has 1.5 in a row, expected whole numbers",
    ),
    "a file that is no number": (
        typed(EPISODES, "data/file_index", lambda row, value: float("nan") if row == 3 else value),
        "data/file_index has nan in a row, expected whole numbers",
    ),
    "two lengths of an episode": (
        typed(EPISODES, "length", lambda row, value: [value, value]),
        "length has 2 numbers in a row, expected one",
    ),
    "two starts of a video": (
        typed(EPISODES, START, lambda row, value: [value, value]),
        f"{START} has 2 numbers in a row, expected one",
    ),
    "no length of episodes": (
        table(EPISODES, lambda found: found.drop_columns(["length"])),
        "file-000.parquet has no column length",
    ),
    "half a task": (
        typed("data/*/*.parquet", "task_index", lambda row, value: value + 0.5),
        "task_index has [01].5 in a row, expected whole numbers",
    ),
    "a row without a task": (
        typed("data/*/*.parquet", "task_index", lambda row, value: None if row == 5 else value),
        "task_index has no value in 1 rows",
    ),
    "another recording's rows beside its own": (
        lambda root: shutil.copy(path := next(root.glob("data/*/*.parquet")), path.with_name("file-001.parquet")),
        "holds 376 rows, meta/info.json says 188: rows or files of another recording are among them, copy",
    ),
    "a damaged table": (lambda root: cut(next(root.glob("data/*/*.parquet"))), r"parquet is damaged \("),
    # episodes
    "an episode twice": (
        episodes("episode_index", 3, lambda _: 2),
        "meta/episodes lists episode 2 twice",
    ),
    "episodes out of order": (
        edit_table(
            "meta/episodes/*/*.parquet", lambda frame: frame.iloc[[0, 2, 1, *range(3, 8)]].reset_index(drop=True)
        ),
        "lists episode 2 in the place of episode 1: its episodes are out of order",
    ),
    "episodes that overlap": (
        episodes("dataset_to_index", 2, lambda end: end + 3),
        r"episode 3 begins at row 63, but row 65 is of the episode before it",
    ),
    "an episode's start is late": (
        episodes("dataset_from_index", 1, lambda start: start + 3),
        r"rows 20 to 22 are of no episode, before episode 1",
    ),
    "an episode of no rows": (episodes("dataset_to_index", 2, lambda _: 0), "episode 2 has the rows 41 to 0"),
    "rows behind the last episode": (
        lambda root: [episodes(name, 7, lambda value: value - 5)(root) for name in ("dataset_to_index", "length")],
        "the last episode ends at row 183, there are 188 rows",
    ),
    # rows
    "rows in reverse order": (
        rows(lambda frame: frame.iloc[::-1].reset_index(drop=True)),
        r"episode 0 frame 0 \(row 0\) has index 187, expected 0, and so do 188 rows: rows are missing or out of order",
    ),
    "two rows swapped": (
        rows(lambda frame: frame.iloc[[*range(30), 31, 30, *range(32, 188)]].reset_index(drop=True)),
        r"episode 1 frame 10 \(row 30\) has index 31, expected 30, and so do 2 rows",
    ),
    "frame numbers that skip": (
        cell("frame_index", 25, 6),
        r"episode 1 frame 5 \(row 25\) has frame_index 6, expected 5",
    ),
    "a row of another episode": (cell("episode_index", 25, 0), r"\(row 25\) has episode_index 0, expected 1"),
    "ten rows are missing": (
        rows(lambda frame: frame.drop(index=range(50, 60)).reset_index(drop=True)),
        r"holds 178 rows, meta/info.json says 188",
    ),
    "another rate than the rows'": (
        info(lambda body: body.update(fps=10)),
        r"episode 0 frame 2 is at 0.100 s, at 10 fps expected 0.200 s",
    ),
    # tasks
    "a task that is not there": (cell("task_index", 21, 2), "episode 1 frame 1 has the task 2 of 2, numbered from 0"),
    "a negative task": (cell("task_index", 21, -1), "episode 1 frame 1 has the task -1 of 2"),
    "tasks in another order": (
        tasks("pull the square", "push the square", numbers=(1, 0)),
        r"numbers its tasks \[1, 0\], a task's row must be its number",
    ),
    "no task text": (tasks("push the square", None), "task 1 is null, it should be a text"),
    "task texts in a column": (
        lambda root: pq.write_table(
            pa.table({"task_index": [0, 1], "task": ["push", "pull"]}), root / "meta" / "tasks.parquet"
        ),
        r'has the index null and the columns \["task_index", "task"\], it should have the index task and the column',
    ),
    "tasks that are numbers": (tasks(5, 6), "task 0 is 5, it should be a text"),
    "no tasks": (lambda root: (root / "meta" / "tasks.parquet").unlink(), "is not complete, missing: .*tasks.parquet"),
    "a task of control characters": (tasks("push", "pull\x00"), r"task 1 has the control characters \['\\x00'\]"),
    # videos
    "a video that starts late": (
        episodes(f"videos/{CAMERA}/from_timestamp", 3, lambda start: start + 0.5),
        r"episode 3 has 23 frames, but 13.0 frames of time in its video of observation.image",
    ),
    "a video of another place": (
        lambda root: [
            episodes(f"videos/{CAMERA}/{name}", 3, lambda seconds: seconds + 0.5)(root)
            for name in ("from_timestamp", "to_timestamp")
        ],
        "episodes 3 and 4 have 10.0 frames of the video of observation.image in common",
    ),
    "two episodes in the places of each other": (
        swapped(2, 3),
        r"episode 3 is before episode 2 in the videos of observation.image \(2.050 s in file 0, 3.150 s in file 0\)",
    ),
    "a video that starts at NaN": (
        episodes(f"videos/{CAMERA}/from_timestamp", 3, lambda _: float("nan")),
        "episode 3: its video of observation.image is from nan",
    ),
    "a video that lacks its last frame": (
        video(187),
        r"file-000.mp4: it has 187 frames at 20 fps, an episode ends with that at 9.350 s",
    ),
    "a video of another recording": (
        video(250),
        "file-000.mp4: it has 250 frames at 20 fps, the last 62 are of no episode: it is of another recording, or",
    ),
    "a video of another rate": (video(376, rate=40), "it has 40 frames a second, the dataset 20"),
    "a video of another size": (
        video(size=(48, 64)),
        r"its frames have 48 x 64 pixels \(height x width\), meta/info.json says 96 x 96",
    ),
    "a video that is cut": (
        lambda root: cut(next(root.glob("videos/*/*/*.mp4"))),
        "mp4: it is cut before 9.350 s, where",
    ),
    "a video without its last bytes": (
        lambda root: cut(path := next(root.glob("videos/*/*/*.mp4")), path.stat().st_size - 10),
        "mp4: it is cut before 9.350 s, where an episode ends",
    ),
    "a camera whose names are not of its shape": (
        feature(CAMERA, names=["channels", "height", "width"]),
        r'has the shape \[96, 96, 3\] and the names \["channels", "height", "width"\]: write "names"',
    ),
    "a video that is none": (lambda root: cut(next(root.glob("videos/*/*/*.mp4")), 100), "mp4: it cannot be read"),
}
VALUES = {
    "a column is not there": (
        lambda root: drop_column(root, "action"),
        "parquet has no column action: record or convert the dataset again",
    ),
    "a null in a column": (cell("action", 5, None), "parquet: action has no value in 1 rows"),
    "a shorter vector": (
        retyped("action", pa.list_(pa.float32()), lambda row, vector: vector[: 2 if row == 5 else 4]),
        "action has now 4, now 2 numbers in a row",
    ),
    "NaN": (element("action", 47, 1, np.nan), r"episode 2 frame 6 has action nan in dimension 1, and 1 row\(s\)"),
    "an infinity": (element(STATE, 47, 1, -np.inf), "episode 2 frame 6 has observation.state -inf in dimension 1"),
    "an absurd value": (element("action", 5, 1, 1e30), "episode 0 frame 5 has action 1e[+]30 in dimension 1"),
    **{
        f"names of {kind}": (
            feature("action", names=names),
            "action has 4 numbers in a row and the names .*write 4 names",
        )
        for kind, names in {
            "numbers": [1, 2, 3, 4],
            "one number": 7,
            "groups of numbers": {"arm": [1, 2, 3, 4]},
            "lists": [["x", "y"], ["z", "grip"]],
            "groups in groups": {"arm": {"x": 0}},
            "null": ["x", None, "z", "grip"],
            "three": ["x", "y", "z"],
            "five": ["x", "y", "z", "grip", "stop"],
            "an index twice": {"x": 0, "y": 0, "z": 1, "grip": 2},
        }.items()
    },
    "actions that are said to be integers": (
        feature("action", dtype="int64"),
        "action is of type float32 in the rows, int64 in meta/info.json, into which LeRobot would convert it",
    ),
    "a state that is said to be text": (
        feature(STATE, dtype="string"),
        "float32 in the rows, string in meta/info.json",
    ),
    "a state of integers": (
        retyped(STATE, pa.list_(pa.int64(), 4), lambda _, vector: [int(value) for value in vector]),
        "observation.state is of type int64 in the rows, float32 in meta/info.json",
    ),
    "statistics twice": (twice("stats.json", "action"), r'is not JSON \(an object has the key "action" twice\)'),
    "statistics that are a list": (edit_json("stats.json", lambda body: [body]), "should hold a JSON object"),
    "a least value above the most": (
        stat("action", "min", 3, lambda low: low + 9),
        "min of action is above its max",
    ),
    "integer actions": (
        retyped("action", pa.list_(pa.int64(), 4), lambda _, vector: [int(100 * value) for value in vector]),
        "action is of type int64, a policy learns real",
    ),
    "another width": (feature("action", shape=[3]), "action has 4 numbers in a row, meta/info.json says 3"),
    "two dimensions": (feature(STATE, shape=[2, 2]), r"has the shape \[2, 2\], a policy reads vectors: write its 4"),
    "statistics of another width": (stats("action", mean=[0.0] * 3), r"mean of action is \[0.0, .*expected 4 numbers"),
    "statistics of one number": (stats("action", std=1.0), "std of action is 1.0, expected 4 numbers"),
    "statistics that are text": (stats(STATE, mean="0"), 'mean of observation.state is "0", expected 4 numbers'),
    "statistics of more rows": (
        stats("action", count=[189]),
        r"stats.json is of 189 rows of action, the dataset has 188: they were",
    ),
    "statistics of no rows": (stats("action", count=[0]), r"count of action is \[0\], expected one number of rows"),
    "statistics of half a row": (stats(STATE, count=1.5), "count of observation.state is 1.5, expected one number"),
    "a deviation of 0": (stat("action", "std", 1, lambda _: 0.0), r"action has the std 0 in dimension 1, .* 0\.050"),
    "a negative deviation": (stat("action", "std", 0, lambda std: -std), "std -0.035.* in dimension 0"),
    "an infinite deviation": (stat(STATE, "std", 0, lambda _: np.inf), "the std inf in dimension 0"),
    "a tiny deviation": (stat("action", "std", 1, lambda _: 1e-12), "the std 1e-12 in dimension 1"),
    "a mean of 401 digits": (
        stat(STATE, "mean", 2, lambda _: 10**400),
        "mean of observation.state .*expected 4 numbers",
    ),
    "statistics in a pipe": (
        lambda root: ((root / "meta" / "stats.json").unlink(), os.mkfifo(root / "meta" / "stats.json")),
        "stats.json is no file",
    ),
    "statistics behind a dead link": (
        lambda root: ((root / "meta" / "stats.json").unlink(), (root / "meta" / "stats.json").symlink_to("nowhere")),
        "stats.json cannot be read: No such file",
    ),
    "a mean that is NaN": (stat(STATE, "mean", 2, lambda _: np.nan), "the mean nan in dimension 2"),
    "a mean far from the rows": (
        stat("action", "mean", 3, lambda mean: mean + 1000),
        "the mean 999.969 in dimension 3",
    ),
    "a deviation far from the rows": (
        stat("action", "std", 3, lambda std: std / 100),
        "the std 0.0094.*rows have 0.94",
    ),
    "actions times 100": (
        rows(lambda frame: frame.__setitem__("action", [100 * np.array(vector) for vector in frame["action"]])),
        r"the mean 3.7234 in dimension 2, its rows have 372.34 \(1 dimension\(s\) differ\)",
    ),
    "actions that never change": (
        rows(lambda frame: frame.__setitem__("action", [np.full(4, 0.5, np.float32)] * 188)),
        r"the mean 0.00257958 in dimension 0, its rows have 0.5 \(4 dimension\(s\) differ\)",
    ),
}


def cut(path: Path, length: int | None = None) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if length is None else length])


def drop_column(root: Path, name: str) -> None:
    (path,) = root.glob("data/*/*.parquet")
    pq.write_table(pq.read_table(path).drop_columns([name]), path)


@pytest.fixture
def copy(labelled_dataset, tmp_path) -> Path:
    return shutil.copytree(labelled_dataset, tmp_path / "copy")


@pytest.fixture
def image_copy(image_dataset, tmp_path) -> Path:
    return shutil.copytree(image_dataset, tmp_path / "copy")


def open_datasets(*roots: Path, **options) -> list[data.RobotDataset]:
    return data.open_datasets(DataConfig(roots=roots, **options))


def checked(capsys, *words: str | Path) -> tuple[int, str]:
    out = [] if "--out" in words else ["--out", Path(words[0]).parent / "check"]
    code = data_check.main([str(word) for word in (*words, *out)])
    return code, capsys.readouterr().out


def problems_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.lstrip().startswith("problem: ")]


def look(root: Path, **options) -> data_report.Report:
    return data_report.look(data_report.open_one(str(root)), data_check.DataCheckConfig((str(root),), **options))


def listed(root: Path) -> list[str]:
    """What data_check calls a problem."""
    try:
        return look(root).problems
    except ValueError as error:  # it cannot be read at all
        return [str(error)]


@pytest.mark.parametrize("case", OPENED)
def test_what_does_not_fit_is_refused_when_a_dataset_is_opened(case, copy):
    edit, message = OPENED[case]
    edit(copy)
    with pytest.raises(ValueError) as refused:
        data_views.choose_cameras(open_datasets(copy), DataConfig(roots=(copy,)))
    assert re.search(message, str(refused.value)), refused.value
    assert str(copy) in str(refused.value) and len(in_few_lines(refused.value).splitlines()) <= 4
    assert any(re.search(message, problem) for problem in listed(copy))


def test_a_copied_clip_keeps_frames_of_no_episode(copy):
    """`smolvla_shared.video` copies H.264 without a loss, and leaves episodes out that are short or still."""
    video(250)(copy)
    (copy / CLIPS_FILE).touch()
    assert open_datasets(copy)[0].num_frames == 188


@pytest.mark.parametrize("case", VALUES)
def test_values_that_nothing_can_be_trained_on_are_refused_where_they_are_read(case, copy):
    edit, message = VALUES[case]
    edit(copy)
    datasets = open_datasets(copy)  # a run that does not read them does not mind
    with pytest.raises(ValueError) as refused:
        Robots.find(datasets, [ACTION])
    said = str(refused.value)
    assert re.search(message, said), said
    assert str(copy) in said and len(in_few_lines(refused.value).splitlines()) <= 4
    assert any(re.search(message, problem) for problem in listed(copy))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a column is not there", "a null in a column", "a shorter vector"])
def test_stage_2_and_labelling_do_not_look_at_actions(case, copy, tmp_path, laq_checkpoint):
    """Their labels and their artifact are those of the same recording with sound actions."""
    written = []
    for edit in (lambda root: None, VALUES[case][0]):
        edit(copy)
        run = tmp_path / f"run_{len(written)}"
        teacher = {"laq_ckpt": laq_checkpoint, "label_cache": run / "labels"}
        recordings = DataConfig(roots=(copy,), num_workers=0)
        label(LabelConfig(**teacher, data=recordings), data_views.open_video(recordings))
        options = (
            "--data.roots",
            copy,
            "--laq-ckpt",
            laq_checkpoint,
            "--model.preset",
            "tiny",
            "--data.num-workers",
            "1",
        )
        run_stage(train_stage2, run / "s2", *options)
        shards = sorted((run / "labels").rglob("*.safetensors"))
        artifact = run / "s2" / "artifacts" / "smolvla_shared_stage2_artifact.safetensors"
        written.append([load_file(path) for path in (*shards, artifact)])
    assert equal(*written) and len(written[0]) > 1
    with pytest.raises(ValueError, match=VALUES[case][1]):
        run_stage(train_stage3, tmp_path / "s3", "--data.roots", copy, "--model.preset", "tiny")


def test_a_sound_dataset_is_described_and_drawn(labelled_dataset, image_dataset, tmp_path, capsys):
    out = tmp_path / "check"
    code, printed = checked(capsys, labelled_dataset, image_dataset, "--out", out, "--every-frame")
    assert (code, problems_of(printed)) == (0, [])
    assert printed.count("nothing wrong was found") == 2
    assert "note: datasets of different rates" in printed and f"{image_dataset} 10" in printed
    for words in (
        "188 frames, 8 episodes",
        "1.00 s (episode 0) to 1.35 s (episode 7)",
        "     4  'push the square'",
        "observation.images.wrist: 32 x 40 pixels",
    ):
        assert words in printed
    values = np.array(
        [list(vector) for vector in pq.read_table(next(labelled_dataset.glob("data/*/*")))["action"].to_pylist()]
    )
    (line,) = [
        line for line in printed.splitlines() if line.startswith("    3 ") and f"{values[:, 3].min():.4g}" in line
    ]
    expected = values[:, 3].min(), values[:, 3].mean(), values[:, 3].std(), values[:, 3].max()
    assert [float(line.split()[place]) for place in (1, 3, 4, 6)] == pytest.approx(expected, rel=1e-3)
    assert (out / "report.txt").read_text().strip() in printed
    pictures = sorted(out.glob("*.png"))
    assert [path.stem.split("--")[1] for path in pictures] == ["images", "labelled"]
    for path in pictures:
        with av.open(str(path)) as picture:
            (frame,) = picture.decode(video=0)
            assert frame.to_ndarray(format="gray").std() > 20


def test_every_problem_is_listed_and_the_exit_code_is_1(copy, capsys):
    for edit in (
        element("action", 47, 1, np.nan),
        stat(STATE, "std", 0, lambda std: -std),
        tasks("push the square", None),
        cell("frame_index", 25, 6),
        video(180),
    ):
        edit(copy)
    code, printed = checked(capsys, copy)
    found = problems_of(printed)
    words = "frame_index 6", "task 1 is null", "180 frames", "action nan", "std -0.2"
    assert code == 1 and [any(word in problem for problem in found) for word in words] == [True] * 5, printed
    # The last episode's last frames are not in the video, which decoding finds, too.
    assert any("episode 7: frames of observation.image cannot be read" in problem for problem in found)
    assert "1 more" not in printed and "problem(s)" in printed


def test_a_wrong_path_ends_with_exit_code_2_before_torch_is_imported(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    for path, said in (
        (tmp_path / "nowhere", "there is no directory"),
        (tmp_path, "meta/info.json is missing (found: []"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "smolvla_shared.data_check", path], capture_output=True, text=True, env=environment
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and said in last, done.stderr[-500:]
        assert not re.search(r"\| *torch$", done.stderr, re.M)


def test_missing_statistics_stop_nothing_but_are_named(copy):
    """This project computes its own; LeRobot's training does not."""
    stats("action", std=None)(copy)
    edit_json("stats.json", lambda body: body["action"].pop("std") and None)(copy)
    assert Robots.find(open_datasets(copy), [ACTION]).dims["action_dim"] == 4
    assert any("stats.json has no std of action, which LeRobot" in problem for problem in listed(copy))
    (copy / "meta" / "stats.json").unlink()
    assert Robots.find(open_datasets(copy), [ACTION]).dims["action_dim"] == 4
    assert any("stats.json is missing, which LeRobot" in problem for problem in listed(copy))


def test_statistics_of_a_sample_stop_nothing_but_are_named(copy):
    """As those of LeRobot's older versions are."""
    assert not look(copy).notes
    stats("action", count=[100])(copy)
    assert Robots.find(open_datasets(copy), [ACTION]).dims["action_dim"] == 4
    (note,) = look(copy).notes
    assert "stats.json is not of all 188 rows, but of 100 of action" in note and not listed(copy)


def test_a_dataset_under_two_names_and_its_copy_are_refused(copy, labelled_dataset, video_dataset, tmp_path, capsys):
    (tmp_path / "link").symlink_to(copy)
    with pytest.raises(ValueError, match=r"copy and .*link are one directory: name it once"):
        open_datasets(copy, tmp_path / "link")
    with pytest.raises(ValueError, match=rf"{labelled_dataset} is a copy of {copy}: name one of them"):
        open_datasets(copy, labelled_dataset)
    assert len(open_datasets(labelled_dataset, video_dataset)) == 2  # as long, but another
    code, printed = checked(capsys, copy, labelled_dataset, "--episodes", "1")
    assert code == 1 and "is a copy of" in problems_of(printed)[-1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shape": [96, 96, 1]}, "is a depth camera (1 channel), a policy reads pictures of 3"),
        ({"info": {"is_depth_map": True}}, "is a depth camera (3 channel)"),
        ({"shape": [96, 96, 4]}, "has 4 channels, a policy reads pictures of 3"),
        ({"names": None}, 'the names null: write "names": ["height", "width", "channels"]'),
        ({"shape": [96, 96]}, "has the shape [96, 96] and the names"),
    ],
)
def test_a_camera_that_no_policy_can_read_is_refused_where_it_is_used(image_dataset, tmp_path, fields, said):
    root = shutil.copytree(image_dataset, tmp_path / "copy")
    feature(CAMERA, **fields)(root)
    datasets, wrist = open_datasets(root), "observation.images.wrist"
    for options in {}, {"cameras": (CAMERA, wrist)}, {"label_cameras": (CAMERA,)}:
        with pytest.raises(ValueError) as refused:
            data_views.choose_cameras(datasets, DataConfig(roots=(root,), **options))
        assert CAMERA in str(refused.value) and said in str(refused.value)
        assert f"pass --data.cameras {wrist}" in str(refused.value)
    assert data_views.choose_cameras(datasets, DataConfig(roots=(root,), cameras=(wrist,)))[0] == (wrist,)
    report = look(root)
    assert any(said in text for text in (report.notes if "depth" in said else report.problems))
    assert [*report.cameras] == [wrist]


def test_what_a_policy_reads_of_long_tasks_is_said(copy):
    """How many tokens are lost, as the tokenizer itself counts them."""
    long = " ".join(["push the square to the left"] * 8)
    tasks("push the square", long)(copy)
    tokenizer = load_trunk_tokenizer("tiny", None)
    count = len(tokenizer(f"{long}\n")["input_ids"])
    expected = f"1 of 2 task texts are cut after 48 tokens, the longest loses {count - 48} of {count}: "
    assert any(expected in problem for problem in look(copy, tokenizer="tiny").problems)
    assert look(copy, tokenizer="tiny", max_text_tokens=count).problems == []
    initial, datasets = open_initial(ModelConfig(preset="tiny")), open_datasets(copy)
    core = initial.build(ModelConfig(), (CAMERA,), ["action"], action_dim=4, chunk_size=6)
    assert initial.describe(core, None, datasets).splitlines()[-1].startswith(f"{copy}: {expected}")


def test_ports_that_say_rgb_are_read_as_lerobots_own(copy):
    """ "names": ["height", "width", "rgb"], as in ports of Open X-Embodiment."""
    (before,) = open_datasets(copy)
    shape = before.frame_shape(CAMERA)
    feature(CAMERA, names=["height", "width", "rgb"])(copy)
    (dataset,) = open_datasets(copy)
    assert dataset.frame_shape(CAMERA) == shape == (3, 96, 96)
    assert data_views.choose_cameras([dataset], DataConfig(roots=(copy,)))[0] == (CAMERA,)
    assert look(copy).problems == []


@pytest.mark.parametrize("spread", [0, 0.02, 0.1])
@pytest.mark.parametrize("center", [100.05, 178.9, 2048.0])
def test_statistics_that_lerobot_rounds_are_no_contradiction(copy, center, spread):
    """A joint that is held: LeRobot's deviation of it is its rounding."""
    rng = np.random.default_rng(0)
    (dataset,) = open_datasets(copy)
    values = np.array(dataset.vector(STATE), np.float32)
    values[:, 0] = center + spread * rng.normal(size=len(values))
    of_lerobot = get_feature_stats(values, axis=0, keepdims=False)
    rows(lambda frame: frame.__setitem__(STATE, list(values)))(copy)
    stats(STATE, **{name: of_lerobot[name].tolist() for name in ("mean", "std", "min", "max")})(copy)
    data_values.refuse_vectors(open_datasets(copy), STATE)
    stat(STATE, "std", 0, lambda std: std + 0.1 * center)(copy)
    with pytest.raises(ValueError, match="std"):
        data_values.refuse_vectors(open_datasets(copy), STATE)


def test_frames_without_a_task_text_are_counted(copy):
    tasks("push the square", " ")(copy)
    datasets = open_datasets(copy)
    count = sum(row["task_index"].item() == 1 for row in LeRobotDataset(copy.name, root=copy).hf_dataset)
    (line,) = data_values.without_text(datasets)
    assert count > 0 and line == f"{copy}: {count} of {datasets[0].num_frames} frames have an empty task text"
    assert line in look(copy).notes and look(copy).problems == []


def test_demonstrations_without_any_task_text_are_said(copy):
    tasks("", " ")(copy)
    datasets = open_datasets(copy)
    said = [f"{copy}: every task text is empty, the policy is not told what to do"]
    assert data_values.without_text(datasets) == said
    datasets[0].hide_actions()
    assert data_values.without_text(datasets) == []


def test_chunks_much_longer_than_the_episodes_are_said(labelled_dataset):
    datasets = open_datasets(labelled_dataset)
    lengths = (datasets[0].episode_to - datasets[0].episode_from).tolist()
    trained = sum(min(60, length - frame) for length in lengths for frame in range(length))
    (line,) = data_values.chunk_cost(datasets, 60)
    assert f": {trained / (60 * sum(lengths)):.1%} of their actions are trained" in line
    assert data_values.chunk_cost(datasets, 6) == data_values.chunk_cost(datasets, 0) == []
    datasets[0].hide_actions()
    assert data_values.chunk_cost(datasets, 60) == []


@pytest.mark.parametrize(("ranges", "is_problem"), [(20, False), (2000, True)])
def test_outliers_are_named_and_impossible_ones_are_problems(copy, ranges, is_problem):
    values = np.array(pq.read_table(next(copy.glob("data/*/*")))["action"].to_pylist())[:, 0]
    low, high = np.quantile(values, [0.01, 0.99])
    value = high + ranges * (high - low)
    element("action", 47, 0, value)(copy)
    report = look(copy)
    (said,) = [text for text in report.notes + report.problems if "stats.json" not in text]
    assert said.startswith(f"episode 2 frame 6 has action {value:.5g} in dimension 0, of which 98% are in -0.06")
    assert (said in report.problems) == is_problem
    lines = data_outliers.unusual(open_datasets(copy), ["observation.state", "action"])
    assert [line.partition(": ")[2] for line in lines] == [f"{said}: it decides the statistics, leave the episode out"][
        : int(is_problem)
    ]


def test_actions_that_never_change_are_named(copy, labelled_dataset):
    set_vectors(copy, {"action": np.tile(np.float32([0.5, 0, 1, -2]), (len(LeRobotDataset(copy.name, root=copy)), 1))})
    (line,) = data_outliers.unusual(open_datasets(copy), ["observation.state", "action"])
    assert line.startswith(f"{copy}: every action is 0.5, 0, 1, -2: a policy learns nothing from it")
    assert line.partition(": ")[2] in look(copy).problems
    assert data_outliers.unusual(open_datasets(copy), ["observation.state"]) == []
    assert data_outliers.unusual(open_datasets(labelled_dataset), ["observation.state", "action"]) == []


@pytest.mark.parametrize("horizon", [6, 60])
def test_latent_actions_in_a_row_much_longer_than_the_episodes_are_said(labelled_dataset, horizon):
    """Counted one by one as the loader masks them, over the frames with a pair."""
    datasets = open_datasets(labelled_dataset)
    data.set_frame_gap(datasets, 0.1)
    spec = SampleSpec(cameras=(), label_cameras=(CAMERA,), horizon=horizon)
    samples = SampleDataset(datasets, spec, seed=0)
    found = np.array([samples.num_pairs(SampleKey(0, 0, 0, row)) for row in range(datasets[0].num_frames)])
    share = found.sum() / (horizon * (found > 0).sum())
    lines = data_values.horizon_cost(datasets, horizon)
    assert (share < 0.5) == (horizon == 60) == bool(lines)
    assert all(f": {share:.1%} of them are trained" in line for line in lines)
    assert data_values.horizon_cost(datasets, 1) == []


def test_still_frames_are_counted(copy, labelled_dataset):
    assert look(labelled_dataset).cameras[CAMERA].still == 0
    # Nothing moves in the first 63 frames, which are three of the eight episodes.
    video(shade=lambda index: 50 if index < 63 else 50 + 10 * (index // 5 % 8), contrast=100)(copy)
    report = look(copy)
    assert (report.cameras[CAMERA].still, report.problems) == (3 / 8, [])


def test_a_picture_on_a_full_disk_leaves_no_half_file(labelled_dataset, tmp_path, monkeypatch):
    def savefig(figure: Figure, path: Path, **options) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    report = look(labelled_dataset)
    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match=r"picture.png cannot be written: .*No space left on device"):
        data_pictures.draw(tmp_path / "picture.png", report)
    assert list(tmp_path.iterdir()) == []


def test_a_covered_camera_is_named(copy):
    video(shade=lambda index: 50)(copy)
    report = look(copy)
    assert report.cameras[CAMERA].still == 1
    assert report.problems == [f"every frame of {CAMERA} that was decoded is of one colour: was it covered or off?"]


def test_every_frame_finds_what_is_damaged_between(copy, capsys):
    (path,) = copy.glob("videos/*/*/*.mp4")
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    for place in range(start + 2000, start + 6000):
        content[place] = 0
    path.write_bytes(bytes(content))
    code, printed = checked(capsys, copy, "--episodes", "1", "--every-frame")
    assert code == 1 and "file-000.mp4 is damaged" in printed


def names_of(root: Path, names: Any) -> tuple[str, ...] | None:
    feature("action", names=names)(root)
    (dataset,) = open_datasets(root)
    data_values.refuse_vectors([dataset], "action")
    return data.vector_names(dataset.features["action"])


def test_names_of_every_form_are_those_of_the_dimensions(copy):
    expected = ("x", "y", "z", "grip")
    for names in [*expected], {"arm": ["x", "y", "z"], "hand": ["grip"]}, {"grip": 3, "z": 2, "x": 0, "y": 1}:
        assert names_of(copy, names) == expected
    for names in None, [], ["actions"], {"arm": ["actions"]}:  # one for the whole vector names no dimension
        assert names_of(copy, names) is None


def test_whole_numbers_of_another_type_are_those_numbers(copy, labelled_dataset):
    """As tables that pandas has merged have them."""
    for pattern, names in {EPISODES: data.EPISODES, "data/*/*.parquet": data.FRAMES}.items():
        for name in names:
            typed(pattern, name, lambda _, value: float(value))(copy)
    (found,), (expected,) = open_datasets(copy), open_datasets(labelled_dataset)
    for of in "episodes", "frames":
        for name in getattr(expected, of).names:
            assert np.array_equal(getattr(found, of)[name], getattr(expected, of)[name]), name
    assert [found.task(row) for row in range(188)] == [expected.task(row) for row in range(188)]
    assert equal(found.read_frames(CAMERA, [3, 187]), expected.read_frames(CAMERA, [3, 187]))


def image(row: int, content: bytes | None) -> Callable[[Path], None]:
    """The image file of a row."""

    def change(found: pa.Table) -> pa.Table:
        index = found.schema.get_field_index(CAMERA)
        cells = found[CAMERA].to_pylist()
        cells[row] = content and {"bytes": content, "path": None}
        return found.set_column(index, found.schema.field(index), pa.array(cells, found.schema.field(index).type))

    return table("data/*/*.parquet", change)


def png(mode: str, width: int = 64, height: int = 48) -> bytes:
    Image.new(mode, (width, height)).save(content := io.BytesIO(), format="PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "first", "later"),
    [
        (None, "is not there", "has no image"),
        (
            b"no picture",
            r"cannot be read \(cannot identify image file\)",
            r"cannot be read \(cannot identify image file\)",
        ),
        (png("RGB")[:60], "cannot be read", "cannot be read"),
        (
            png("L"),
            "has the mode L, a policy reads RGB",
            "has the mode L and 64 x 48 pixels .*, expected RGB and 64 x 48",
        ),
        (png("I;16"), "has the mode I;16, a", "has the mode I;16 and 64 x 48"),
        (png("RGBA"), "has the mode RGBA, a", "has the mode RGBA and 64 x 48"),
        (png("RGB", 20, 30), "has 30 x 20 pixels .*says 48 x 64", "20 x 30 pixels .*, expected RGB and 64 x 48"),
    ],
)
def test_an_image_that_no_policy_can_read_is_refused(image_copy, capsys, content, first, later):
    """The first of a file when the dataset is opened, another one when it is read, or by --every-frame."""
    image(5, content)(image_copy)
    (dataset,) = open_datasets(image_copy)
    with pytest.raises(ValueError, match=f"episode 0 frame 5.*{later}"):
        dataset.read_frames(CAMERA, [4, 5])
    code, printed = checked(capsys, image_copy, "--episodes", "1", "--every-frame")
    (problem,) = problems_of(printed)
    assert code == 1 and "episode 0 frame 5" in problem
    image(0, content)(image_copy)
    with pytest.raises(ValueError, match=rf"file-000.parquet: its first image of {CAMERA} {first}"):
        open_datasets(image_copy)


@pytest.mark.parametrize("path", [None, "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"])
def test_images_that_are_said_to_be_a_video_are_refused(image_copy, path):
    feature(CAMERA, dtype="video")(image_copy)
    info(lambda body: body.update(video_path=path))(image_copy)
    with pytest.raises(ValueError, match=f'{CAMERA}.*"image"') as refused:
        open_datasets(image_copy)
    assert ("its frames are in the rows" in str(refused.value)) == (path is not None)


class Frames(Dataset):
    """The first frame of a recording; a number is a bug."""

    def __init__(self, recording: data.RobotDataset | int):
        self.recording = recording

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.recording.read_frames(CAMERA, [index])


def damage(path: Path) -> None:
    """The first frames of a video, behind its header."""
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 6000] = bytes(6000)
    path.write_bytes(bytes(content))


def test_what_a_loaders_worker_refuses_is_said_as_what_the_command_refuses(copy, capsys):
    damage(next(copy.glob("videos/*/*/*.mp4")))
    (recording,) = open_datasets(copy)

    def load(recording: data.RobotDataset | int) -> None:
        list(DataLoader(Frames(recording), batch_size=None, num_workers=1, multiprocessing_context="fork"))

    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: load(recording))
    with pytest.raises(ValueError, match=r"file-000.mp4 is damaged .*: copy or download the dataset again") as refused:
        recording.read_frames(CAMERA, [0])
    assert stopped.value.code == EXIT_MISTAKE and capsys.readouterr().err.splitlines() == [f"error: {refused.value}"]
    with pytest.raises(AttributeError, match="Caught AttributeError in DataLoader worker process 0"):
        run_command(lambda: load(7))


def test_checking_values_holds_a_part_of_them_at_a_time(labelled_dataset, monkeypatch):
    """What is read of a mapped file counts as this process's memory until it is let go."""
    (dataset,) = data.open_datasets(DataConfig(roots=(labelled_dataset,)))
    dataset.vector(data.ACTION_KEY)
    columns, released = dataset.vectors[data.ACTION_KEY], []
    monkeypatch.setattr(data_values, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(columns, "release", lambda: released.append(True))
    assert data_values.vector_problems(dataset, data.ACTION_KEY) == []
    assert len(released) >= dataset.num_frames / 50 > 3
