"""Where latent targets come from: the teacher in every step, or a label cache, behind one interface.

A cache directory holds the labels of any number of datasets, each under a key of all that decides about a label
(cache.py):

    <directory>/<dataset>/indices.npy     [frames, S] codes; 0 where the episode ends before the second frame
    <directory>/<dataset>/mask.npy        [frames] bool, False there
    <directory>/<dataset>/continuous.npy  [frames, S, D], the latents before quantisation (kind `continuous` only)
    <directory>/<dataset>/codebook.npy    [C, D]
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import MANIFEST, RowCache
from smolvla_shared.config import TeacherKind
from smolvla_shared.laq import LAQ, LatentActions, teacher_id
from smolvla_shared.preprocess import unit_range

# How a recorded frame becomes what the teacher sees (LAQ.resize); raised when that changes.
PREPROCESSING = "1: uint8 / 255, antialiased bilinear to the teacher's square"


class Labels(Protocol):
    """Latent actions of the samples of a batch."""

    teacher_id: str
    kind: TeacherKind
    # S, D of a latent action.
    shape: tuple[int, int]
    # What it needs of a sample: the camera whose frame pairs are read, None if none is, and the side of the square they
    # become where the datasets' sizes differ.
    camera: str | None
    pair_size: int

    def to(self, device: torch.device) -> None:
        """Where the batches will be."""

    def __call__(self, raw: RawBatch) -> Tensor:
        """[B, S, D] float32; without meaning where raw.pair_mask is False."""


class OnlineLabels:
    """Labels from the teacher itself, on the device that it is on."""

    def __init__(self, laq: LAQ, kind: TeacherKind, camera: str):
        self.laq, self.kind, self.camera = laq, kind, camera
        self.teacher_id = teacher_id(laq)
        self.shape = laq.config.code_seq_len, laq.config.quant_dim
        self.pair_size = laq.config.image_size

    def to(self, device: torch.device) -> None:
        self.laq.to(device)

    def choose(self, latents: LatentActions) -> Tensor:  # [B, S, D]
        """Those of its latents that are the labels."""
        return latents.continuous if self.kind == "continuous" else latents.vectors

    @torch.no_grad()
    def __call__(self, raw: RawBatch) -> Tensor:  # [B, S, D]
        return self.choose(self.laq.encode(unit_range(raw.pairs)))


@dataclass(frozen=True)
class LabelKey:
    """All that decides about the labels of a dataset."""

    teacher_id: str  # sha256 of the teacher's configuration and weights
    teacher_kind: TeacherKind
    frame_gap_s: float
    camera: str
    dataset: str  # cache.dataset_fingerprint
    versions: dict[str, str]  # of the libraries that decode and compute
    preprocessing: str = PREPROCESSING


def label_directories(cache: Path, names: list[str]) -> list[Path]:
    """Where the labels of each dataset are kept: the last two parts of its repo id or path, joined."""
    directories = [cache / "--".join(Path(name).parts[-2:]) for name in names]
    if len(set(directories)) < len(directories):
        raise ValueError(f"two of {names} end in the same names: give them label caches of their own")
    return directories


def label_store(directory: Path, key: LabelKey, num_frames: int) -> RowCache:
    return RowCache(directory, asdict(key), num_frames, shard_rows=128)


def cached_teacher_id(directory: Path) -> str:
    """Whose labels a directory holds. Raises ValueError if it holds none."""
    if not (directory / MANIFEST).is_file():
        there = sorted(path.name for path in directory.parent.glob("*/")) or "nothing"
        raise ValueError(
            f"--label-cache: there are no labels at {directory} (in {directory.parent}: {there}); "
            "make them with `python -m smolvla_shared.teacher label`"
        )
    return json.loads((directory / MANIFEST).read_text())["key"]["teacher_id"]


class CachedLabels:
    """Labels of one or several datasets from complete caches; reads neither teacher nor frames."""

    camera = None
    pair_size = 0

    def __init__(self, stores: list[RowCache]):
        """stores: of the run's datasets, in its order. Raises ValueError for what RowCache.open refuses."""
        self.teacher_id: str = stores[0].key["teacher_id"]
        self.kind: TeacherKind = stores[0].key["teacher_kind"]
        arrays = [store.open() for store in stores]
        # [C, D]; the same for every dataset, since the teacher is.
        self.codebook = torch.from_numpy(np.load(stores[0].directory / "codebook.npy"))
        self.rows = [a["continuous" if self.kind == "continuous" else "indices"] for a in arrays]
        self.shape = (arrays[0]["indices"].shape[1], self.codebook.shape[1])

    def to(self, device: torch.device) -> None:
        self.codebook = self.codebook.to(device)

    def __call__(self, raw: RawBatch) -> Tensor:  # [B, S, D]
        places = zip(raw.source, raw.frame, strict=True)
        rows = torch.from_numpy(np.stack([self.rows[source][frame] for source, frame in places]))
        rows = rows.to(self.codebook.device, non_blocking=True)
        return rows if self.kind == "continuous" else self.codebook[rows.long()]
