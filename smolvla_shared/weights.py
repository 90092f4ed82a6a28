"""Weights in files: public names, hashes, strict checks, writing without leaving a torn file. Knows no model."""

import hashlib
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn


def public_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights that are published, sorted by name: all but those with a path component that begins with `_`.

    Such private buffers (counters, caches) belong in training checkpoints only.
    """
    state = module.state_dict()
    return {key: state[key] for key in sorted(state) if not any(part.startswith("_") for part in key.split("."))}


def check_weights(where: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise a ValueError that lists every missing key, unknown key and wrong shape."""
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


def write_weights(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a .safetensors file under a temporary name, then rename it; returns its sha256."""
    temporary = path.with_suffix(".safetensors.tmp")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
    temporary.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else can read
    sha256 = file_sha256(temporary)
    os.replace(temporary, path)
    return sha256


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
