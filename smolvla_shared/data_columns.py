"""Columns of parquet files as memory-mapped arrays: a process holds none of them, and reads a row in microseconds.

Parquet has no access to a single row. The arrays are written when the columns are first opened, beside what Hugging
Face's datasets keep (HF_DATASETS_CACHE), in a directory named by the hash of the files' paths, sizes and times.
"""

import shutil
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock

from smolvla_shared.files import json_sha256

ROWS_AT_ONCE = 1 << 16


class Columns:
    """columns[name] is a column, [rows] or [rows, width]. Pickled, it is a path: a loader worker maps the same files.

    files: parquet files, in the order of the rows
    rows:  how many these are in all

    Raises ValueError if they hold another number of rows.
    """

    def __init__(self, files: list[Path], names: list[str], rows: int):
        stats = [(str(file.resolve()), file.stat()) for file in files]
        key = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        self.names, self.directory = names, Path(HF_DATASETS_CACHE) / "smolvla_shared" / json_sha256([key, names, rows])
        if not self.directory.exists():
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory.with_suffix(".lock")):
                if not self.directory.exists():
                    self._write(files, rows)

    def _write(self, files: list[Path], rows: int) -> None:
        part = self.directory.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            found = write_columns(part, files, self.names, rows)
            if found != rows:
                raise ValueError(
                    f"{files[0].parent.parent} holds {found:,} rows, meta/info.json says {rows:,}: the dataset is not "
                    "complete, copy or download it again"
                )
            part.replace(self.directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        paths = [array_path(self.directory, number) for number in range(len(self.names))]
        return dict(zip(self.names, (np.asarray(np.load(path, mmap_mode="r")) for path in paths)))

    def __getstate__(self) -> dict:
        return {"names": self.names, "directory": self.directory}


def array_path(directory: Path, number: int) -> Path:
    return directory / f"{number}.npy"


def write_columns(directory: Path, files: list[Path], names: list[str], rows: int) -> int:
    """Write each column as an array of `rows` rows, a part at a time; returns how many rows there were."""
    found, first = 0, {}
    with ExitStack() as stack:
        outs = [stack.enter_context(array_path(directory, number).open("wb")) for number in range(len(names))]
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=names):
                for name, out in zip(names, outs):
                    values = to_numpy(batch.column(name))
                    if name not in first:
                        first[name] = values[:0]
                        header = np.lib.format.header_data_from_array_1_0(values)
                        np.lib.format.write_array_header_1_0(out, header | {"shape": (rows, *values.shape[1:])})
                    # Files may differ in type, which their dataset's features make the same.
                    out.write(values.reshape(-1, *first[name].shape[1:]).astype(first[name].dtype, copy=False).data)
                found += len(batch)
    return found


def to_numpy(column: pa.Array) -> np.ndarray:
    """[n] of a column of numbers, [n, width] of one of lists."""
    values = column
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    values = values.to_numpy(zero_copy_only=False)
    return values if len(values) == len(column) else values.reshape(len(column), -1)
