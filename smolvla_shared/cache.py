"""Rows that are computed once: filled in restartable shards under a key, then read as memory-mapped arrays.

    <directory>/cache.json                  the key; once complete also each array's dtype and shape
    <directory>/shards/000012.safetensors   while it is being filled: a shard is there whole or not at all
    <directory>/<array>.npy                 once complete: row i belongs to frame i of the dataset

What is asked for and what is there must have the same key; any difference is refused with both sides.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from smolvla_shared.files import write_text

MANIFEST = "cache.json"
# Of a data file the fingerprint reads this many bytes at either end, and its size: videos are too long to hash whole.
FINGERPRINT_EDGE = 1 << 16


def dataset_fingerprint(root: Path) -> str:
    """sha256 that tells a LeRobotDataset from another or an edited one, wherever it lies.

    Of every file its name within the dataset and its size; of the metadata all the bytes, of data and videos the first
    and last 64 KiB.
    """
    digest = hashlib.sha256()
    for folder in ("meta", "data", "videos", "images"):
        for path in sorted((root / folder).rglob("*")):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root)} {size}\n".encode())
            with path.open("rb") as file:
                if folder == "meta" or size <= 2 * FINGERPRINT_EDGE:
                    digest.update(file.read())
                else:
                    digest.update(file.read(FINGERPRINT_EDGE))
                    file.seek(-FINGERPRINT_EDGE, os.SEEK_END)
                    digest.update(file.read())
    return digest.hexdigest()


@dataclass(frozen=True)
class RowCache:
    """`num_rows` rows of named arrays in `directory`, under a key of JSON values."""

    directory: Path
    key: dict[str, Any]
    num_rows: int
    # A kill loses at most this many rows of work a process.
    shard_rows: int

    def is_complete(self) -> bool:
        """Whether all rows are there; False where nothing is. Raises ValueError if what is there has another key.

        Of a complete cache it removes the shards that a kill at the end of finish() left.
        """
        path = self.directory / MANIFEST
        if not path.is_file():
            if self.directory.exists() and any(self.directory.iterdir()):
                raise ValueError(f"{self.directory} holds something that is no cache: name another directory")
            return False
        found = json.loads(path.read_text())
        asked = json.loads(json.dumps(self.key | {"rows": self.num_rows}))
        there = found["key"]
        differences = [
            f"  {name}: asked for {asked.get(name)}, found {there.get(name)}"
            for name in sorted(asked.keys() | there.keys())
            if asked.get(name) != there.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.directory} was made for something else. Make another one, or remove it:\n"
                + "\n".join(differences)
            )
        if complete := "arrays" in found:
            self._remove_shards()
        return complete

    def claim(self) -> None:
        """Start or go on filling; one process calls it before any writes."""
        if not self.is_complete():
            (self.directory / "shards").mkdir(parents=True, exist_ok=True)
            self._write_manifest({})

    def _write_manifest(self, extra: dict[str, Any]) -> None:
        manifest = {"key": self.key | {"rows": self.num_rows}} | extra
        write_text(self.directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def shards(self) -> list[range]:
        starts = range(0, self.num_rows, self.shard_rows)
        return [range(start, min(start + self.shard_rows, self.num_rows)) for start in starts]

    def _shard_path(self, rows: range) -> Path:
        return self.directory / "shards" / f"{rows.start // self.shard_rows:06d}.safetensors"

    def missing(self) -> list[range]:
        """The shards that nobody has written yet."""
        return [rows for rows in self.shards() if not self._shard_path(rows).exists()]

    def write(self, rows: range, arrays: dict[str, np.ndarray]) -> None:
        """Keep a shard's rows; a process that is killed meanwhile leaves nothing under the shard's name."""
        path = self._shard_path(rows)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(arrays, temporary)
        temporary.replace(path)

    def finish(self) -> None:
        """Join the shards to memory-mapped arrays, one shard at a time in memory; one process calls it."""
        assert not self.missing()
        arrays: dict[str, np.memmap] = {}
        for rows in self.shards():
            for name, values in load_file(self._shard_path(rows)).items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        self.directory / f"{name}.npy.tmp",
                        mode="w+",
                        dtype=values.dtype,
                        shape=(self.num_rows, *values.shape[1:]),
                    )
                arrays[name][rows.start : rows.stop] = values
        for name, array in arrays.items():
            array.flush()
            (self.directory / f"{name}.npy.tmp").replace(self.directory / f"{name}.npy")
        self._write_manifest({"arrays": {n: {"dtype": str(a.dtype), "shape": a.shape} for n, a in arrays.items()}})
        self._remove_shards()

    def _remove_shards(self) -> None:
        shutil.rmtree(self.directory / "shards", ignore_errors=True)  # several processes may do it

    def open(self) -> dict[str, np.ndarray]:
        """The arrays, memory-mapped. Raises ValueError for another key, unfinished work and damaged files."""
        if not self.is_complete():
            if not (self.directory / MANIFEST).is_file():
                there = sorted(path.name for path in self.directory.parent.glob("*/")) or "nothing"
                raise ValueError(f"there is no cache at {self.directory}; beside it: {there}")
            done = len(self.shards()) - len(self.missing())
            raise ValueError(
                f"{self.directory} is not complete ({done} of {len(self.shards())} shards): run the command that "
                "fills it again, it goes on where it stopped"
            )
        arrays = {}
        for name, about in json.loads((self.directory / MANIFEST).read_text())["arrays"].items():
            try:
                arrays[name] = np.load(self.directory / f"{name}.npy", mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.directory / name}.npy is damaged, fill the cache again: {error}") from error
            assert [str(arrays[name].dtype), list(arrays[name].shape)] == [about["dtype"], about["shape"]]
        return arrays
