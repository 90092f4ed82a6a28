"""Weights and texts in files: published names, hashes, strict checks, the hub, and writes that leave no torn file."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

SOURCE_NAME = "source.json"  # of a policy: where its weights are from
PROCESSORS = "policy_*processor*"  # of a policy: the files that LeRobot writes for its two processors


def public_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published part of a state_dict, sorted by name: without names that have a component beginning with `_`.

    These are private buffers (counters, caches), kept in training checkpoints only.
    """
    return {key: state[key] for key in sorted(state) if not any(part.startswith("_") for part in key.split("."))}


def check_weights(where: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError, listing every missing key, unknown key and wrong shape."""
    problems = [f"missing: {key} {list(expected[key].shape)}" for key in expected.keys() - found.keys()]
    problems += [f"unknown: {key} {list(found[key].shape)}" for key in found.keys() - expected.keys()]
    problems += [
        f"wrong shape: {key} {list(found[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if expected[key].shape != found[key].shape
    ]
    if problems:
        raise ValueError(f"{where} does not hold the model that it describes:\n  " + "\n  ".join(sorted(problems)))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """sha256 of a JSON value; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def state_sha256(tensors: dict[str, Tensor]) -> str:
    """sha256 of the names, shapes and values of tensors; their order does not count.

    Values count as float32: weights that were stored in a wider or narrower float type keep the hash if every value
    survived, and change it if one was rounded.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def policy_sha256(directory: Path) -> str:
    """sha256 of a saved policy's config, weights and processors."""
    files = sorted([*directory.glob("*.json"), *directory.glob("*.safetensors")])
    return json_sha256({path.name: file_sha256(path) for path in files})


def write_weights(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a .safetensors file under a temporary name, sync and rename it; returns its sha256."""
    temporary = path.with_suffix(".safetensors.tmp")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
    share(temporary)
    sha256 = file_sha256(temporary)
    sync(temporary)
    os.replace(temporary, path)
    return sha256


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, sync and rename it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)


def find_directory(
    what: str, name: str | Path, needed: tuple[str, ...], optional: tuple[str, ...] = (), **hub: Any
) -> Path:
    """The local directory `name` or, if there is none, a copy of the hub's repository `name`.

    what:     the contents, such as "policy", for messages
    needed:   files that must be in the directory
    optional: others to fetch from the hub; processors and source.json always are
    hub:      snapshot_download's options (revision, token, cache_dir, ...)

    Raises ValueError if there is neither, or a needed file is missing.
    """
    directory = Path(name)
    if not directory.is_dir():
        try:
            # A repository may also hold checkpoints with their optimizers, and videos.
            wanted = [*needed, *optional, PROCESSORS, SOURCE_NAME]
            directory = Path(snapshot_download(str(name), allow_patterns=wanted, **hub))
        except (OSError, ValueError) as error:
            raise ValueError(f"no {what} {name}: there is no such directory, and the hub says: {error}") from error
    for file in needed:
        if not (directory / file).is_file():
            found = sorted(path.name for path in directory.iterdir())
            raise ValueError(f"no {what} in {directory}: {file} is missing, found {found}")
    return directory


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, named `path` once the context ends without error. Raises ValueError if `path` exists."""
    if path.exists():
        raise ValueError(f"{path} exists already: name a new directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        (filled := Path(temporary) / path.name).mkdir()
        yield filled
        filled.rename(path)


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk: otherwise a crash may leave its name without its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Give a file the permissions that the umask says: safetensors' own can be read by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
