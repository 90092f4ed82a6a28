"""Datasets that are damaged or edited anywhere: refused by a message that names them, or what was recorded, to the bit.

MUTATIONS=5000 pytest tests/test_wrong_datasets.py tries more than the default. What no reader can tell is a bit that
gives other numbers or pixels, which are as good as those that were recorded: only that is left out here.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wrong_inputs import MUTATIONS, SEEDED, SHARE, VALUES, WHOLES, change_field, in_place_of, pick

from smolvla_shared import data, data_check, data_frames, data_report, data_views
from smolvla_shared.command import in_few_lines, is_mistake
from smolvla_shared.config import ACTION, DataConfig
from smolvla_shared.robots import Robots

PLACES = {
    ".json": ["flip", "cut", "whole", "zeros", "removed", "field", "field", "field", "field deleted", "key twice"],
    ".mp4": ["flip", "cut", "whole", "zeros", "removed"],
    ".parquet": """flip cut whole zeros removed column-dropped column-renamed column-twice column-retyped cell cell cell
    cell rows-dropped rows-twice rows-swapped""".split(),
}
# In place of a value of a column. What a recording may have is left out: nobody can tell it from what was recorded.
CELLS = [None, -1, 7, 10**9, -1.5, float("nan"), float("inf"), "text", [], [1, 2, 3]]
TEXTS = [None, "push\x00"]
NUMBERS = [None, float("nan"), float("inf"), -float("inf"), 1e30, -3e38]
TYPES = [pa.string(), pa.float64(), pa.int32(), pa.bool_(), pa.list_(pa.float32()), pa.null()]
IN_BYTES = {"flip", "zeros"}


def read(root: Path) -> Any:
    """Everything that training reads of a dataset: rates, sizes, rows, texts, vectors, frames; no names."""
    data_frames._open_video.cache_clear()
    config = DataConfig(roots=(root,))
    (dataset,), datasets = data_views.open_recordings(config, None, starts_elsewhere=False)
    cameras = data_views.choose_cameras(datasets, config)
    robots = Robots.find(datasets, [ACTION])
    rows = range(dataset.num_frames)
    keys = [key for key in (data.STATE_KEY, data.ACTION_KEY) if key in dataset.features]
    return (
        {"fps": float(dataset.fps), "cameras": cameras, "dims": robots.dims},
        [dataset.episode_from.tolist(), dataset.episode_to.tolist(), [dataset.task(row) for row in rows]],
        {camera: dataset.frame_shape(camera) for camera in dataset.camera_keys},
        [np.array(dataset.vector(key)).tobytes() for key in keys],
        {camera: dataset.read_frames(camera, [*rows]) for camera in dataset.camera_keys},
    )


# --- mutations --------------------------------------------------------------------------------------------------------


def change_table(data: bytes, place: str, share: float, other: float) -> bytes:
    table = pq.read_table(pa.BufferReader(data))
    names, last = table.schema.names, max(len(table) - 1, 1)
    name, row = pick(names, share), int(other * len(table))
    index, values = names.index(name), table[name].to_pylist()
    if place == "column-dropped":
        table = table.drop_columns([name])
    elif place == "column-renamed":
        table = table.rename_columns([f"{n}x" if n == name else n for n in names])
    elif place == "column-twice":
        table = table.append_column(name, table[pick(names, other)])
    elif place == "column-retyped":
        table = table.set_column(index, name, retyped(values, pick(TYPES, other)))
    elif place == "cell":
        table = table.set_column(index, name, with_cell(table[name].type, values, row, other * 997 % 1))
    elif place == "rows-dropped":
        table = pa.concat_tables([table[:row], table[row + 1 + int(share * 5) :]])
    elif place == "rows-twice":
        table = pa.concat_tables([table[: row + 1], table[row:]])
    else:
        order = [*range(len(table))]
        one = int(share * last)
        order[row], order[one] = order[one], order[row]
        table = table.take(order)
    pq.write_table(table, out := pa.BufferOutputStream())
    return out.getvalue().to_pybytes()


def retyped(values: list, kind: pa.DataType) -> pa.Array:
    """The same numbers, as far as the type has them, or nothing."""
    try:
        return pa.array(values).cast(kind)
    except pa.ArrowException:
        return pa.nulls(len(values), kind)


def with_cell(kind: pa.DataType, values: list, row: int, share: float) -> pa.Array:
    old = values[row]
    if isinstance(old, list) and old and isinstance(old[0], float):
        vectors = [[pick(NUMBERS, share), *old[1:]], None, old[:-1], [*old, 0.0], []]
        values[row] = pick(vectors, share * 31 % 1)
    elif isinstance(old, str):
        values[row] = pick(TEXTS, share)
    else:
        values[row] = pick(CELLS, share)
    for of in ({"type": kind}, {}):
        try:
            return pa.array(values, **of)
        except (pa.ArrowException, TypeError, OverflowError):
            continue
    return pa.array([str(value) for value in values])


def mutated(data: bytes, suffix: str, place: str, share: float, other: float) -> bytes | None:
    """What a file of these bytes is changed into; None: it is removed."""
    at = int(share * len(data))
    if place == "removed":
        return None
    if place == "whole":
        return pick(WHOLES, other)
    if place == "cut":
        return data[:at]
    if place == "flip":
        return data[:at] + bytes([data[at] ^ 1 << int(other * 7.99)]) + data[at + 1 :]
    if place == "zeros":
        length = int(other * min(4096, len(data) - at))
        return data[:at] + bytes(length) + data[at + length :]
    if place == "key twice":
        key = pick([*json.loads(data)], share)
        return b"{" + json.dumps(key).encode() + b": 0, " + data.lstrip()[1:]
    if suffix == ".json":
        return json.dumps(change_field(json.loads(data), share, pick(VALUES, other), "deleted" in place)).encode()
    return change_table(data, place, share, other)


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, labelled_dataset, image_dataset) -> dict[str, tuple[Path, Any]]:
    """Copies of a dataset with a video and of one with images, and what they hold."""
    found = {}
    for name, source in {"video": labelled_dataset, "images": image_dataset}.items():
        root = shutil.copytree(source, tmp_path_factory.mktemp("wrong") / name)
        found[name] = root, read(root)
    return found


@contextmanager
def refusing(root: Path, path: Path, what: str) -> Iterator[list[str]]:
    """What is said within the context, which may end with a mistake of the user's in at most four lines, and with
    nothing else.
    """
    said: list[str] = []
    try:
        yield said
    except Exception as error:
        assert is_mistake(error), f"{what}: {type(error).__name__}: {error}"
        said.append(in_few_lines(error))
        assert len(said[0].splitlines()) <= 4 and (path.name in said[0] or str(root) in said[0]), f"{what}: {said[0]}"


def is_as_good(path: Path, place: str, found: Any, expected: Any) -> bool:
    """Whether only numbers or pixels differ of which a few bytes were changed in the file."""
    *others, vectors, _ = (equal(one, other) for one, other in zip(found, expected, strict=True))
    return place in IN_BYTES and all(others) and (vectors if path.suffix == ".mp4" else path.parts[-3] == "data")


@contextmanager
def damaged(
    root: Path, kind: str, file: float, place: float, share: float, other: float
) -> Iterator[tuple[Path, str, str]]:
    """The dataset with one of its files damaged: which, in which place, and both in words."""
    path = pick(sorted(path for path in root.rglob("*") if path.suffix in PLACES), file)
    name = pick(PLACES[path.suffix], place)
    with in_place_of(path, mutated(path.read_bytes(), path.suffix, name, share, other)):
        yield path, name, f"{kind} {path.relative_to(root)} {name} {share} {other}"


def judge(recorded: dict, kind: str, **mutation: float) -> None:
    root, expected = recorded[kind]
    with damaged(root, kind, **mutation) as (path, name, what):
        with refusing(root, path, what) as said:
            found = read(root)
        if not said:
            assert equal(found, expected) or is_as_good(path, name, found, expected), f"{what}: something else"


MUTATION = {name: SHARE for name in ("file", "place", "share", "other")}


@settings(max_examples=MUTATIONS // 2, **SEEDED)
@given(**MUTATION)
def test_a_mutation_of_a_dataset_is_refused_by_name_or_changes_nothing(recorded, **mutation):
    judge(recorded, "video", **mutation)


@settings(max_examples=max(20, MUTATIONS // 20), **SEEDED)
@given(**MUTATION)
def test_a_mutation_of_a_dataset_of_images_is_refused_by_name_or_changes_nothing(recorded, **mutation):
    judge(recorded, "images", **mutation)


@settings(max_examples=max(20, MUTATIONS // 20), **SEEDED)
@given(kind=st.sampled_from(["video", "images"]), **MUTATION)
def test_what_is_refused_is_a_problem_of_data_check(recorded, kind, **mutation):
    root, _ = recorded[kind]
    with damaged(root, kind, **mutation) as (path, _, what):
        with refusing(root, path, what) as refused:
            read(root)
        problems = [""]
        with refusing(root, path, what) as unread:
            config = data_check.DataCheckConfig((str(root),), episodes=1, every_frame=True)
            problems = data_report.look(data_report.open_one(str(root)), config).problems
    assert unread or problems or not refused, f"{what}: {refused}"
