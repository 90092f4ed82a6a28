"""Columns of parquet files as memory-mapped arrays: a process holds none of them, and reads a row in microseconds.

Parquet has no access to a single row. The arrays are written when the columns are first opened, beside what Hugging
Face's datasets keep (HF_DATASETS_CACHE), in a directory named by the hash of the files' paths, sizes and times.
"""

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from smolvla_shared.hashes import json_sha256

ROWS_AT_ONCE = 1 << 16
# As Hugging Face's datasets has it, which takes a second to import.
HF_DATASETS_CACHE = Path(os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets"))
MEND = "record or convert the dataset again"


class Columns:
    """columns[name] is a column, [rows] or [rows, width]. Pickled, it is a path: a loader worker maps the same files.

    files: parquet files, in the order of the rows
    kinds: the columns by name, and what a row of each holds: int, a whole number, read as int64; float, a number; list,
           one or several numbers, as many as every other row
    rows:  how many these are in all

    Raises ValueError if they hold another number of rows, or anything else.
    """

    def __init__(self, files: list[Path], kinds: dict[str, type], rows: int):
        key = [*map(version, files), *([name, kind.__name__] for name, kind in kinds.items())]
        self.names, self.directory = [*kinds], kept(key, rows)
        if not self.directory.exists():
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory.with_suffix(".lock")):
                if not self.directory.exists():
                    self._write(files, kinds, rows)

    def _write(self, files: list[Path], kinds: dict[str, type], rows: int) -> None:
        part = self.directory.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            found = write_columns(part, files, kinds, rows)
            if found != rows:
                why = (
                    "the dataset is not complete, copy or download it again"
                    if found < rows
                    else "rows or files of another recording are among them, copy or download it to a new directory"
                )
                raise ValueError(f"{files[0].parent.parent} holds {found:,} rows, meta/info.json says {rows:,}: {why}")
            part.replace(self.directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        paths = [array_path(self.directory, number) for number in range(len(self.names))]
        return dict(zip(self.names, (np.asarray(np.load(path, mmap_mode="r")) for path in paths)))

    def __len__(self) -> int:
        return len(self[self.names[0]])

    def release(self) -> None:
        """Let go of what was read: pages of a mapped file count as this process's memory until the machine needs it."""
        for array in self._arrays.values():
            array.base.base.madvise(mmap.MADV_DONTNEED)

    def __getstate__(self) -> dict:
        return {"names": self.names, "directory": self.directory}


def version(file: Path) -> list[str | int]:
    """What tells a file from others and from what it was before."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def kept(*key: Any) -> Path:
    """Where what was read of files is kept."""
    return HF_DATASETS_CACHE / "smolvla_shared" / json_sha256([*key])


def read_schema(file: Path) -> pa.Schema:
    """The columns of a parquet file, which are kept, too: to read them takes the file's whole directory. That of 30,000
    episodes in meta/episodes takes 360 MB.
    """
    path = kept("schema", version(file))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            part = path.with_suffix(".part")
            part.write_bytes(pq.read_schema(file).serialize())
            part.replace(path)
    return pa.ipc.read_schema(pa.py_buffer(path.read_bytes()))


def array_path(directory: Path, number: int) -> Path:
    return directory / f"{number}.npy"


def write_columns(directory: Path, files: list[Path], kinds: dict[str, type], rows: int) -> int:
    """Write each column as an array of `rows` rows, a part at a time; returns how many rows there were.

    Raises ValueError for a file that is damaged, and for a column that is not of its kind.
    """
    found, first, names = 0, {}, [*kinds]
    with ExitStack() as stack:
        outs = [stack.enter_context(array_path(directory, number).open("wb")) for number in range(len(names))]
        for file in files:
            for batch in read_batches(file, names):
                for name, out in zip(names, outs):
                    values = of_kind(kinds[name], to_numpy(batch.column(name), f"{file}: {name}"), f"{file}: {name}")
                    if name in first and values.shape[1:] != first[name].shape[1:]:
                        widths = [array.shape[1] if array.ndim > 1 else 1 for array in (values, first[name])]
                        raise ValueError(f"{file}: {name} has {widths[0]} numbers in a row, before {widths[1]}: {MEND}")
                    if name not in first:
                        first[name] = values[:0]
                        header = np.lib.format.header_data_from_array_1_0(values)
                        np.lib.format.write_array_header_1_0(out, header | {"shape": (rows, *values.shape[1:])})
                    # Files may differ in type, which their dataset's features make the same.
                    out.write(values.astype(first[name].dtype, copy=False).data)
                found += len(batch)
    return found


def read_batches(file: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Raises ValueError for a file that is damaged, lacks a column, or has one twice."""
    try:
        # Read-ahead and threads take twice the CPU time where row groups are small (benchmarks/open.py), as LeRobot's.
        parquet = pq.ParquetFile(file, pre_buffer=False)
        counts = {name: parquet.schema_arrow.names.count(name) for name in names}
        is_sound = set(counts.values()) == {1}
        yield from parquet.iter_batches(ROWS_AT_ONCE, columns=names, use_threads=False) if is_sound else ()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): copy or download it again") from error
    if not is_sound:
        missing = [name for name, count in counts.items() if count == 0]
        several = [name for name, count in counts.items() if count > 1]
        what = f"has no column {', '.join(missing)}" if missing else f"has the column {', '.join(several)} twice"
        raise ValueError(f"{file} {what}: {MEND}")


def to_numpy(column: pa.Array, where: str) -> np.ndarray:
    """[n] of a column of numbers, [n, width] of one of lists. Raises ValueError, with `where`, for anything else."""
    values = column
    while True:
        if values.null_count:
            raise ValueError(f"{where} has no value in {values.null_count} rows: {MEND}")
        is_list = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
        if not any(kind(values.type) for kind in is_list):
            break
        if len(widths := pc.unique(pc.list_value_length(values))) > 1:
            raise ValueError(f"{where} has now {widths[0]}, now {widths[1]} numbers in a row: {MEND}")
        values = values.flatten()
    values = values.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds {column.type}, not numbers: {MEND}")
    return values if len(values) == len(column) else values.reshape(len(column), -1)


def of_kind(kind: type, values: np.ndarray, where: str) -> np.ndarray:
    """The values of a column of this kind. Raises ValueError, with `where`, if it is of another."""
    if kind is list:
        return values
    if values.ndim > 1:
        raise ValueError(f"{where} has {values.shape[1]} numbers in a row, expected one: {MEND}")
    if kind is float:
        return values
    with np.errstate(invalid="ignore"):  # NaN
        whole = values.astype(np.int64, copy=False)
    if (bad := whole != values).any():
        raise ValueError(f"{where} has {values[bad][0]} in a row, expected whole numbers: {MEND}")
    return whole
