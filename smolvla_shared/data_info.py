"""meta/info.json of a LeRobotDataset: what is read of it, and what is wrong with it.

A problem is a text, as in data_problems.py. Features say what a column or a camera is; where its values are stored must
be what they say.
"""

import math
import string
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from smolvla_shared.data_columns import read_schema
from smolvla_shared.refusals import read_json, shown

FORMAT = "v3.0"
# What a path to a file needs to be that of one file.
DATA_FIELDS, VIDEO_FIELDS = ["chunk_index", "file_index"], ["video_key", "chunk_index", "file_index"]
CONVERT = "python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={name} --root={root} --push-to-hub=false"


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
        fix = "versions before v2.1 are converted to v2.1 first, by an older LeRobot"
        if version == "v2.1":
            fix = f"convert it: {CONVERT.format(name=root.resolve().name, root=root)}"
        elif not isinstance(version, str) or not version.startswith(("v1.", "v2.")):
            fix = "record, convert or download it in that format"
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
    videos = [key for key, feature in features.items() if isinstance(feature, dict) and feature.get("dtype") == "video"]
    for name, needed in {"data_path": DATA_FIELDS, "video_path": VIDEO_FIELDS if videos else []}.items():
        if name not in info or not needed or is_path(info[name], needed):
            continue
        problem = f"{name} is {shown(info[name])}, it should be a path with {{{'}, {'.join(needed)}}}"
        at_rows = f', or, if the rows hold the frames, the dtype of {", ".join(videos)} should be "image"'
        problems.append(problem + at_rows * (name == "video_path" and info[name] is None))
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


def is_path(value: Any, needed: list[str]) -> bool:
    """A relative path with these fields, each of a few digits: a width of 10^9 would ask for so much memory. Without
    one of them, several files would be one.
    """
    if not isinstance(value, str) or not value or Path(value).is_absolute() or ".." in Path(value).parts:
        return False
    try:
        parts = [(name, spec) for _, name, spec, _ in string.Formatter().parse(value) if name is not None]
    except ValueError:
        return False
    return {name for name, _ in parts} == {*needed} and all(spec in ("", "03d", "06d") for _, spec in parts)


def dimension_names(feature: dict[str, Any]) -> list[Any]:
    """What names a vector feature's dimensions: a dataset gives a list, lists in groups, or indices by name. What is
    none of these counts as one name.
    """
    names = feature.get("names")
    values = [*names.values()] if isinstance(names, dict) else []
    if values and all(isinstance(group, list) for group in values):
        return [name for group in values for name in group]
    if values and all(type(index) is int for index in values) and sorted(values) == [*range(len(values))]:
        return sorted(names, key=names.get)
    return [] if names is None else names if isinstance(names, list) else [names]


def names_problem(key: str, feature: dict[str, Any]) -> str | None:
    """Why the names of a vector feature cannot be those of its dimensions. One name may be that of the whole vector."""
    names, (width,) = dimension_names(feature), feature["shape"]
    if len(names) in (0, 1, width) and all(isinstance(name, str) for name in names):
        return None
    return (
        f"{key} has {width} numbers in a row and the names {shown(feature['names'])}: write {width} names into its "
        "feature in meta/info.json, in the order of the numbers, or null"
    )


# --- cameras ----------------------------------------------------------------------------------------------------------


def refuse_misplaced(root: Path, features: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError for a feature whose values are not where its dtype says: frames in videos or in the rows, and
    numbers in the rows; and for a column of the rows that is no feature, which LeRobot refuses, too. Of several files
    the first of each table is asked. What is damaged or missing its reader names.
    """
    rows, episodes = (first_schema(root / folder) for folder in ("data", "meta/episodes"))
    if rows is None or episodes is None:
        return
    if unnamed := [name for name in rows.names if name not in features]:
        raise ValueError(
            f"{root / 'meta' / 'info.json'} does not name what the rows have, {', '.join(unnamed)}: write its feature "
            "there, or write the rows without it"
        )
    for key, feature in features.items():
        said = feature["dtype"] if feature["dtype"] in ("image", "video") else "numbers"
        found = "video" if f"videos/{key}/from_timestamp" in episodes.names else None
        if key in rows.names and found is None:
            kind = rows.field(rows.names.index(key)).type
            found = "image" if pa.types.is_struct(kind) else "numbers"
        if feature["dtype"] in ("string", "language") or said == found or (said == "numbers" and found is None):
            continue
        where = {"video": "its frames are in videos", "image": "its frames are in the rows", "numbers": "it is numbers"}
        fix = {"video": 'write "video"', "image": 'write "image"', "numbers": "write their type, such as float32"}
        raise ValueError(
            f"{root / 'meta' / 'info.json'}: feature {key} has the dtype {shown(feature['dtype'])}, but "
            + (f"{where[found]}: {fix[found]}" if found else "the dataset has no frames of it: take the feature out")
        )


def first_schema(folder: Path) -> pa.Schema | None:
    """The columns of a table, by its first file; None: it cannot be read."""
    try:
        return read_schema(min(folder.glob("*/*.parquet"), default=folder))
    except (pa.ArrowException, OSError):
        return None


def channels_last(feature: dict[str, Any]) -> bool:
    """Recordings use both orders; LeRobot, too, goes by the names. Ports of Open X-Embodiment say rgb."""
    return feature["names"][2] in ("channel", "channels", "rgb")


def channels(feature: dict[str, Any]) -> int | None:
    """Channels of a camera's frames; None: its names do not tell which of the three sizes it is."""
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3 or not isinstance(names, list | tuple) or len(names) != 3:
        return None
    count = shape[2] if channels_last(feature) else shape[0]
    return count if count <= 4 else None


def is_depth(feature: dict[str, Any]) -> bool:
    marks = [mark for name in ("info", "video_info") if isinstance(mark := feature.get(name), dict)]
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
