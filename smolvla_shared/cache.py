"""Rows that are computed once: filled in restartable shards under a key, then read from those shards.

    <directory>/cache.json                  the key
    <directory>/shards/000012.safetensors   row i is row i % shard_rows of shard i // shard_rows

A shard exists whole or not at all, and a cache is complete when all its shards exist. A key that differs from the one
asked for is refused, with both sides of every difference.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smolvla_shared.files import write_text, write_weights
from smolvla_shared.refusals import read_json, refuse_differences

MANIFEST = "cache.json"
ROW_FIELDS = "rows", "shard_rows"  # what a RowCache adds to its key
# Bytes that the fingerprint reads at either end of a data file: videos are too large to hash whole.
FINGERPRINT_EDGE = 1 << 16
# Files that a process keeps mapped at a time. A mapping takes addresses, not memory; Linux allows 65,530 of them.
MAPPED_FILES = 4096


def dataset_fingerprint(root: Path) -> str:
    """sha256 of a LeRobotDataset: the same wherever the dataset is stored, another one after an edit.

    Hashed are the name and size of every file, all bytes of metadata, and the first and last 64 KiB of data and videos.
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


def dataset_directories(cache: Path, names: list[str]) -> list[Path]:
    """Each dataset's directory in a cache, by the end of its repo id or path. Raises ValueError if two are equal."""
    directories = [cache / "--".join(Path(name).parts[-2:]) for name in names]
    if len(set(directories)) < len(directories):
        raise ValueError(f"two of {names} end in the same names: give each a cache directory of its own")
    return directories


def read_key(directory: Path) -> dict[str, Any]:
    """The key of a cache. Raises ValueError for a manifest that is damaged."""
    key = read_json(directory / MANIFEST).get("key")
    if not isinstance(key, dict):
        raise ValueError(f"{directory / MANIFEST} has no key: remove the directory and fill the cache again")
    return key


@lru_cache(maxsize=MAPPED_FILES)
def read_mapped(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file of a cache, memory-mapped: reading a row reads that row only.

    Raises ValueError for a file that is missing or cut short.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and run the command that filled the cache again, which makes it "
            "again"
        ) from error


@dataclass(frozen=True)
class RowCache:
    """`num_rows` tensors of one shape and dtype in `directory`, under a key of JSON values."""

    directory: Path
    key: dict[str, Any]
    num_rows: int
    # Rows of a shard. A kill loses at most one shard of work in each process.
    shard_rows: int

    def is_complete(self) -> bool:
        """Whether all shards exist; False if the directory is missing or empty.

        Raises ValueError if the directory has another key or holds something else.
        """
        manifest = self.directory / MANIFEST
        if not manifest.is_file():
            if {path.name for path in self.directory.glob("*")} - {f"{MANIFEST}.tmp"}:  # a kill may leave .tmp
                raise ValueError(f"{self.directory} holds something that is no cache: name another directory")
            return False
        asked, found = json.loads(self._manifest())["key"], read_key(self.directory)
        refuse_differences(
            f"{self.directory} was made for something else. Make another one, or remove it",
            [(name, asked.get(name), found.get(name)) for name in sorted(asked.keys() | found.keys())],
            asked="asked for",
        )
        return not self.missing()

    def claim(self) -> None:
        """Prepare the directory for writing. One process calls this before any process writes."""
        if not self.is_complete():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / MANIFEST, self._manifest())
            (self.directory / "shards").mkdir(exist_ok=True)

    def _manifest(self) -> str:
        key = self.key | dict(zip(ROW_FIELDS, (self.num_rows, self.shard_rows)))
        return json.dumps({"key": key}, indent=2) + "\n"

    def shards(self) -> list[range]:
        starts = range(0, self.num_rows, self.shard_rows)
        return [range(start, min(start + self.shard_rows, self.num_rows)) for start in starts]

    def _shard(self, row: int) -> str:
        """The path of a row's shard. A text, because making a Path takes longer than reading a row of codes."""
        return f"{self.directory}/shards/{row // self.shard_rows:06d}.safetensors"

    def missing(self) -> list[range]:
        """The shards that nobody has written yet."""
        there = set(map(str, (self.directory / "shards").glob("*.safetensors")))
        return [rows for rows in self.shards() if self._shard(rows.start) not in there]

    def write(self, rows: range, values: Tensor) -> None:
        """Write a shard. A process that is killed meanwhile leaves nothing under the shard's name."""
        path = Path(self._shard(rows.start))
        own = path.with_suffix(f".{os.getpid()}.part")  # another run may be filling the same cache
        write_weights(own, {"rows": values})
        own.replace(path)

    def open(self) -> None:
        """Check and map every shard. Raises ValueError for another key, and for missing or damaged shards."""
        if not self.is_complete():
            if not (self.directory / MANIFEST).is_file():
                there = sorted(path.name for path in self.directory.parent.glob("*/")) or "nothing"
                raise ValueError(f"there is no cache at {self.directory}; beside it: {there}")
            shards = len(self.shards())
            raise ValueError(
                f"{self.directory} is not complete ({shards - len(self.missing())} of {shards} shards): run the "
                "command that fills it again, it goes on where it stopped"
            )
        for rows in self.shards():
            read_mapped(self._shard(rows.start))

    def __getitem__(self, row: int) -> Tensor:
        """A row, as a view of the mapped file. Copy the row before another process gets it."""
        return read_mapped(self._shard(row))["rows"][row % self.shard_rows]
