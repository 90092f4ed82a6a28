"""Weights and texts in files: published names, hashes, strict checks, the hub, and writes that leave no torn file."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolvla_shared.command import of_machine
from smolvla_shared.hashes import file_sha256, json_sha256
from smolvla_shared.paths import check_hub_id, found_in, hub_place
from smolvla_shared.refusals import decode, read_json, refuse_schema

MANIFEST_NAME = "manifest.json"  # of a policy: the sha256 of its other files, but for its card
MANIFEST_SCHEMA = "smolvla_shared.files.v1"
HUB_TIMEOUT_S = 5
SOURCE_NAME = "source.json"  # of a policy: where its weights are from
PROCESSORS = "policy_*processor*"  # of a policy: the files that LeRobot writes for its two processors


def public_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published part of a state_dict, sorted by name: without names that have a component beginning with `_`.

    These are private buffers (counters, caches), kept in training checkpoints only.
    """
    return {key: state[key] for key in sorted(state) if not any(part.startswith("_") for part in key.split("."))}


def check_weights(where: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError, listing every missing key, unknown key, wrong shape or type, and what is not finite."""
    problems = [f"missing: {key} {list(expected[key].shape)}" for key in expected.keys() - found.keys()]
    problems += [f"unknown: {key} {list(found[key].shape)}" for key in found.keys() - expected.keys()]
    problems += [
        f"wrong shape: {key} {list(found[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if expected[key].shape != found[key].shape
    ]
    problems += [
        f"wrong type: {key} {found[key].dtype}, expected {expected[key].dtype}"
        for key in expected.keys() & found.keys()
        if expected[key].is_floating_point() != found[key].is_floating_point()
    ]
    problems += [f"not finite: {key}" for key, tensor in found.items() if not tensor.isfinite().all()]
    if problems:
        raise ValueError(f"{where} does not hold the model that it describes:\n  " + "\n  ".join(sorted(problems)))


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


def sealed(body: dict[str, Any]) -> str:
    """A JSON object as text, with a hash of itself."""
    return json.dumps(body | {"manifest_sha256": json_sha256(body)}, indent=2) + "\n"


def unseal(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The object that was sealed. Raises ValueError if it is not the one that was written."""
    body = dict(body)
    if (written := body.pop("manifest_sha256", None)) != json_sha256(body):
        raise ValueError(
            f"{path} does not match its own manifest_sha256 ({written}): a field was edited after it was written. "
            "Copy the file again, or have the command that wrote it write it again"
        )
    return body


def read_sealed[T](cls: type[T], path: Path, schema: str, what: str = "") -> T:
    """The dataclass that was written as sealed JSON, read strictly.

    Raises ValueError for another schema, for wrong fields and values, and for an edit by hand.
    """
    body = read_json(path)
    refuse_schema(path, body, schema)
    fields = {name: value for name, value in body.items() if name != "manifest_sha256"}
    decoded = decode(cls, fields, f"{what} {path}".strip())  # first: the fields tell more than the hash
    unseal(path, body)
    return decoded


@dataclass(frozen=True)
class FilesManifest:
    """manifest.json of a policy: its files are those that were written."""

    files: dict[str, str]  # sha256 by name
    schema_version: str = MANIFEST_SCHEMA


def write_manifest(directory: Path, names: Iterable[str]) -> None:
    """Record the hashes of these files of a directory, in place of an earlier record."""
    files = {name: file_sha256(directory / name) for name in sorted(names)}
    write_text(directory / MANIFEST_NAME, sealed(asdict(FilesManifest(files))))


def check_manifest(directory: Path) -> set[str]:
    """The names of the files that are what was written; none where nothing was recorded.

    Raises ValueError if a recorded file is missing or is another one.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return set()
    recorded = read_sealed(FilesManifest, path, MANIFEST_SCHEMA).files
    problems = [f"{name} is missing" for name in recorded if not (directory / name).is_file()]
    problems = problems or [
        f"{name} was changed" for name in recorded if file_sha256(directory / name) != recorded[name]
    ]
    if problems:
        raise ValueError(
            f"{directory} is not what was written: {', '.join(problems)}. Copy the directory again; to load what you "
            f"have edited yourself, remove {MANIFEST_NAME}"
        )
    return set(recorded)


def read_weights(path: str | Path, fix: str = "copy or write it again") -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped. Raises ValueError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): {fix}") from error


@contextmanager
def refusing(what: str, fix: str = "copy the directory again") -> Iterator[None]:
    """Within this context, what a library raises because of a file's contents becomes a ValueError: `what`, why, and
    the fix. Libraries raise errors of many kinds. What the machine refuses, such as a full disk, stays what it is.
    """
    try:
        yield
    except Exception as error:
        if of_machine(error):
            raise
        raise ValueError(f"{what}: {in_a_line(error)}: {fix}") from error


def in_a_line(error: BaseException) -> str:
    """What a library's error says, without line breaks; with its kind, where the text alone may be only a key."""
    error = error.__cause__ or error
    text = " ".join(str(error).split())
    text = text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary file to write, synced and renamed to `path` once the context ends without error.

    size: bytes to be written, where they are known. Raises OSError, and leaves nothing, if they cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        takes = f"it takes {size:,} bytes, " if size is not None else ""
        place = next(place for place in path.absolute().parents if place.exists())
        free = shutil.disk_usage(place).free
        raise OSError(
            f"{path} cannot be written: {error}\n{takes}{place} has {free:,} bytes free: make room, or name "
            "another directory, and run the command again"
        ) from error


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a .safetensors file by `replacing`; returns its sha256."""
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        share(temporary)
        return file_sha256(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file by `replacing`."""
    with replacing(path, len(text.encode())) as temporary:
        temporary.write_text(text)


@cache
def ask_hub() -> str:
    """Why the hub does not answer, in words; "": it does, or HF_HUB_OFFLINE forbids to ask. Asked once in a process.

    Raises ValueError for a proxy that cannot be used.
    """
    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except (ImportError, ValueError) as error:  # httpx's, of the proxies that the environment names
        raise ValueError(
            f"{constants.ENDPOINT} cannot be asked by the proxy in ALL_PROXY or HTTPS_PROXY ({error}): for SOCKS pip "
            "install 'httpx[socks]', or correct or unset the variable"
        ) from error
    except httpx.HTTPError as error:
        problem = f"{constants.ENDPOINT} does not answer within {HUB_TIMEOUT_S} s ({error or type(error).__name__})"
        print(f"{problem}: only what the local cache holds can be read", file=sys.stderr)
        return problem
    return ""


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Within this context the hub's libraries read the local cache only, as with HF_HUB_OFFLINE=1, if the hub does not
    answer: they would ask again and again, for minutes. Yields what `ask_hub` says.
    """
    problem, before = ask_hub(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def find_directory(
    what: str, name: str | Path, needed: tuple[str, ...], optional: tuple[str, ...] = (), **hub: Any
) -> Path:
    """The local directory `name` or, if there is none, a copy of the hub's repository `name`, or of its directory
    robots/<robot>.

    what:     the contents, such as "policy", for messages
    needed:   files that must be in the directory
    optional: others to fetch from the hub; processors, source.json and manifest.json always are
    hub:      snapshot_download's options (revision, token, cache_dir, ...)

    Raises ValueError if there is neither, or a needed file is missing.
    """
    directory = Path(name)
    if not directory.is_dir():
        check_hub_id(what, str(name))
        repository, folder = hub_place(str(name))
        # A repository may also hold checkpoints with their optimizers, and videos.
        files = [*needed, *optional, PROCESSORS, SOURCE_NAME, MANIFEST_NAME]
        wanted, problem = [f"{folder}/{file}" if folder else file for file in files], ""
        try:
            with hub_or_cache() as problem:
                directory = Path(snapshot_download(repository, allow_patterns=wanted, **hub)) / folder
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise ValueError(
                f"no {what} {name}: there is no such directory, and the hub says: {problem or error}"
            ) from error
    for file in needed:
        if not (directory / file).is_file():
            raise ValueError(f"no {what} in {directory}: {file} is missing, found {found_in(directory)}")
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


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file one more name (a hard link); where the file system has none, a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


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
