"""The label cache: the latent actions of every frame of a dataset, and the command that writes them.

A cache directory holds the labels of any number of datasets, each under a key of all that decides about a label
(cache.py):

    <directory>/<dataset>/indices.npy     [frames, S] codes; 0 where the episode ends before the second frame
    <directory>/<dataset>/mask.npy        [frames] bool, False there
    <directory>/<dataset>/continuous.npy  [frames, S, D], the latents before quantisation (kind `continuous` only)
    <directory>/<dataset>/codebook.npy    [C, D]
"""

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from smolvla_shared import data, data_blocks
from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import MANIFEST, RowCache, dataset_fingerprint
from smolvla_shared.config import DataConfig, TeacherKind, TeacherOptions
from smolvla_shared.laq import LAQ
from smolvla_shared.laq_files import load_laq, teacher_id, teachers_pairs
from smolvla_shared.preprocess import unit_range

# How a recorded frame becomes what the teacher sees (LAQ.resize); raised when that changes.
PREPROCESSING = "1: uint8 / 255, antialiased bilinear to the teacher's square"


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


def cached_key(directory: Path) -> dict[str, Any]:
    """What labels a directory holds, the fields of LabelKey. Raises ValueError if it holds none."""
    if not (directory / MANIFEST).is_file():
        there = sorted(path.name for path in directory.parent.glob("*/")) or "nothing"
        raise ValueError(
            f"--label-cache: there are no labels at {directory} (in {directory.parent}: {there}); "
            "make them with `python -m smolvla_shared.teacher label`"
        )
    return json.loads((directory / MANIFEST).read_text())["key"]


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
        places = zip(raw.dataset, raw.row, strict=True)
        rows = torch.from_numpy(np.stack([self.rows[dataset][frame] for dataset, frame in places]))
        rows = rows.to(self.codebook.device, non_blocking=True)
        return rows if self.kind == "continuous" else self.codebook[rows.long()]


def label_key(dataset: data.RobotDataset, teacher: str, kind: TeacherKind, camera: str) -> LabelKey:
    return LabelKey(
        teacher_id=teacher,
        teacher_kind=kind,
        frame_gap_s=dataset.gap_s,
        camera=camera,
        dataset=dataset_fingerprint(dataset.lerobot.root),
        versions={name: metadata.version(name) for name in ("torch", "lerobot", data.video_decoder())},
    )


@dataclass(frozen=True, kw_only=True)
class LabelConfig(TeacherOptions):
    """Write the latent actions of every frame of the datasets into a cache, for --labels cache of the scripts. A
    command that was killed goes on where it stopped when it is run again."""

    # The teacher: a .safetensors file of `teacher train`, or LAPA's .pt file.
    laq_ckpt: Path
    # Directory of the label cache; each dataset gets one of its own in it.
    label_cache: Path
    # Which recordings, and which pairs of their frames.
    data: DataConfig
    # Pairs that the teacher sees at once.
    batch_size: int = 64


def label(config: LabelConfig) -> None:
    accelerator = Accelerator()
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size)
    options = teachers_pairs(config.laq_ckpt, config.data, config.accept_other_pairs)
    datasets = data.open_datasets(options)
    _, camera = data.choose_cameras(datasets, options)
    data.valid_pair_share(datasets, [(i, np.arange(dataset.num_frames)) for i, dataset in enumerate(datasets)])
    directories = label_directories(config.label_cache, [dataset.name for dataset in datasets])
    stores = [
        label_store(directory, label_key(dataset, teacher_id(laq), config.teacher_kind, camera), dataset.num_frames)
        for directory, dataset in zip(directories, datasets)
    ]
    unfinished = [not store.is_complete() for store in stores]  # all keys are compared before any work
    laq.to(accelerator.device)
    for dataset, store, todo in zip(datasets, stores, unfinished):
        if todo:
            label_dataset(laq, dataset, camera, store, config, accelerator)
        accelerator.print(f"{store.directory}: {dataset.num_frames:,} frames {'labelled' if todo else 'were labelled'}")


@torch.no_grad()
def label_dataset(
    laq: LAQ, dataset: data.RobotDataset, camera: str, store: RowCache, config: LabelConfig, accelerator: Accelerator
) -> None:
    """Fill the label cache of a dataset; every process does its share of the shards."""
    slots, width = laq.config.code_seq_len, laq.config.quant_dim

    def empty(num_rows: int) -> dict[str, np.ndarray]:
        arrays = {
            "indices": np.zeros((num_rows, slots), np.min_scalar_type(laq.config.codebook_size - 1)),
            "mask": np.zeros(num_rows, bool),
        }
        if config.teacher_kind == "continuous":
            arrays["continuous"] = np.zeros((num_rows, slots, width), np.float32)
        return arrays

    def compute(frames: Tensor, places: Tensor) -> dict[str, np.ndarray]:
        latents = laq.encode(laq.resize(unit_range(frames))[places])
        arrays = {"indices": latents.indices.numpy(force=True), "mask": np.ones(len(places), bool)}
        if config.teacher_kind == "continuous":
            arrays["continuous"] = latents.continuous.numpy(force=True)
        return arrays

    if accelerator.is_main_process:
        store.claim()
        np.save(store.directory / "codebook.npy", laq.vq.codebooks.numpy(force=True))
    data_blocks.fill_cache(
        store,
        dataset,
        camera,
        offsets=(0, dataset.gap),
        blocks_of=lambda rows: data_blocks.episode_blocks(
            dataset, dataset.rows_with_pairs(np.array(rows)), config.batch_size
        ),
        empty=empty,
        compute=compute,
        num_workers=config.data.num_workers,
        accelerator=accelerator,
    )
