"""Rows that are computed once: filled in restartable shards under a key, then read from those shards.

    <directory>/cache.json                  the key
    <directory>/shards/000012.safetensors   row i is row i % shard_rows of shard i // shard_rows

A shard exists whole or not at all, and a cache is complete when all its shards exist. A key that differs from the one
asked for is refused, with both sides of every difference. A shard records the key and the rows that it was made for and
the sha256 of its values: opening a cache checks the former always, and the latter in caches of up to HASHED_BYTES.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from smolvla_shared.files import read_weights, write_text, write_weights
from smolvla_shared.hashes import json_sha256
from smolvla_shared.locks import LOCK_FILE, lock, unlock
from smolvla_shared.refusals import read_json, refuse_differences

MANIFEST = "cache.json"
ROW_FIELDS = "rows", "shard_rows"  # what a RowCache adds to its key
# Files that a process keeps mapped at a time. A mapping takes addresses, not memory; Linux allows 65,530 of them.
MAPPED_FILES = 4096
# Larger caches are features of many hours of video. To hash 100 GB takes minutes before every run, and a damaged value
# there is one of the 10^5 of one frame; where it is not finite, the run stops at its loss.
HASHED_BYTES = 10**9
FILL_AGAIN = "remove it and run the command that filled the cache again, which makes it again"


def dataset_directories(cache: Path, names: list[str]) -> list[Path]:
    """Each dataset's directory in a cache, by the end of its repo id or path; one for a dataset that is named twice.

    Raises ValueError if two datasets would share a directory.
    """
    directories, owners = [cache / "--".join(Path(name).parts[-2:]) for name in names], {}
    for name, directory in zip(names, directories, strict=True):
        if Path(other := owners.setdefault(directory, name)) != Path(name):
            raise ValueError(
                f"{other} and {name} would share {directory}, as their last two names are equal: rename a directory of "
                "one of them, or name it by a link to it (ln -s)"
            )
    return directories


def read_key(directory: Path) -> dict[str, Any]:
    """The key of a cache. Raises ValueError for a manifest that is damaged."""
    key = read_json(directory / MANIFEST).get("key")
    if not isinstance(key, dict):
        raise ValueError(f"{directory / MANIFEST} has no key: remove the directory and fill the cache again")
    return key


@lru_cache(maxsize=MAPPED_FILES)
def read_mapped(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file of a cache, memory-mapped: reading a row reads that row only."""
    return read_weights(path, fix=FILL_AGAIN)


def write_sealed(path: Path, name: str, values: Tensor, about: Any) -> None:
    """Write a tensor to a .safetensors file of a cache, with hashes of it and of `about`: JSON, what it is for."""
    values = values.detach().cpu().contiguous()
    hashed = hashlib.sha256(values.flatten().view(torch.uint8).numpy()).hexdigest()
    # One entry: safetensors writes several in any order, and equal contents should be equal files.
    write_weights(path, {name: values}, {"sealed": f"{_about(about, name, values)} {hashed}"})


def read_sealed(path: str, name: str, about: Any, with_values: bool = True) -> Tensor:
    """The memory-mapped tensor of a file that `write_sealed` wrote for the same `about`.

    with_values: compare the values, too, which reads the file once. Raises ValueError for what was not written so.
    """
    tensors = read_mapped(path)
    with safe_open(path, "pt") as file:
        about_written, _, values_written = (file.metadata() or {}).get("sealed", "").partition(" ")
    if [*tensors] != [name]:
        raise ValueError(f"{path} holds {sorted(tensors)[:8]}, expected only {name!r}: {FILL_AGAIN}")
    if about_written != _about(about, name, tensors[name]):
        raise ValueError(f"{path} was made for another teacher, dataset, place or shape than the cache: {FILL_AGAIN}")
    if with_values and values_written != _values_sha256(path):
        raise ValueError(f"{path} is damaged (its values are not those that were written): {FILL_AGAIN}")
    return tensors[name]


def _about(about: Any, name: str, values: Tensor) -> str:
    return json_sha256([about, name, str(values.dtype), list(values.shape)])


def _values_sha256(path: str) -> str:
    """sha256 of what stands behind a .safetensors file's header. Reading it as mapped would keep it in memory."""
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            of_a_kill = {f"{MANIFEST}.tmp", LOCK_FILE}
            if {path.name for path in self.directory.glob("*")} - of_a_kill:
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
        """Prepare the directory for writing, and keep it to this process until `release`, unless it is complete.

        One process calls this before any process writes. Raises ValueError while another process fills the cache.
        """
        if not self.is_complete():
            self.directory.mkdir(parents=True, exist_ok=True)
            lock(self.directory, f"the cache {self.directory}", "wait for it, then run this command again")
            write_text(self.directory / MANIFEST, self._manifest())
            (self.directory / "shards").mkdir(exist_ok=True)

    def release(self) -> None:
        """Let other processes fill the cache."""
        unlock(self.directory)

    def _about(self, rows: range) -> list[Any]:
        return [self.key, rows.start, rows.stop]

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
        write_sealed(own, "rows", values, self._about(rows))
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
        paths = [self._shard(rows.start) for rows in self.shards()]
        with_values = sum(map(os.path.getsize, paths)) <= HASHED_BYTES
        for rows, path in zip(self.shards(), paths, strict=True):
            values = read_sealed(path, "rows", self._about(rows), with_values)
            if len(values) != len(rows):
                raise ValueError(f"{path} has {len(values)} rows, expected {len(rows)}: {FILL_AGAIN}")

    def shard(self, rows: range) -> Tensor:
        """The rows of a shard, mapped anew: once they are let go of, none of the file is left in the process's memory.

        Raises ValueError if the file is damaged.
        """
        return read_weights(self._shard(rows.start), fix=FILL_AGAIN)["rows"]

    def __getitem__(self, row: int) -> Tensor:
        """A row, as a view of the mapped file. Copy the row before another process gets it."""
        return read_mapped(self._shard(row))["rows"][row % self.shard_rows]
