"""Hashes of files, JSON values and datasets: what they are known by, wherever they are stored."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# Bytes that the fingerprint reads at either end of a data file: videos are too large to hash whole.
FINGERPRINT_EDGE = 1 << 16


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """sha256 of a JSON value; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
