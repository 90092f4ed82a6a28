"""The label cache: the latent actions of every frame of a dataset, and the command `teacher label` that writes them.

A cache directory holds the labels of any number of datasets, each under a key of everything that determines a label
(cache.py). A row is 0 if the episode ends before the pair's second frame.

    <directory>/<dataset>/shards/                a row: [S] codes if quantized, [S, D] latents if continuous
    <directory>/<dataset>/codebook.safetensors   codebook [C, D]
"""

from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from smolvla_shared import data, data_blocks, data_frames, data_views, paths, ranges
from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import (
    MANIFEST,
    ROW_FIELDS,
    RowCache,
    dataset_directories,
    read_key,
    read_sealed,
    write_sealed,
)
from smolvla_shared.config import TeacherKind
from smolvla_shared.data_rows import Rows
from smolvla_shared.hashes import dataset_fingerprint
from smolvla_shared.laq import LAQ
from smolvla_shared.laq_files import load_laq, teacher_id, teachers_grounding, teachers_pairs
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import unit_range
from smolvla_shared.refusals import ADDED_LATER, decode
from smolvla_shared.run_processes import make_accelerator
from smolvla_shared.teacher_config import GroundedIn, LabelConfig

# How a recorded frame becomes the teacher's input (LAQ.resize). Raise the number when that changes.
PREPROCESSING = "1: uint8 / 255, antialiased bilinear to the teacher's square"
CODEBOOK = "codebook.safetensors"
SHARD_ROWS = 1024  # 16 KB of codes or 0.5 MB of latents, which two CPU cores compute in 4 s


@dataclass(frozen=True)
class LabelKey:
    """Everything that determines the labels of a dataset."""

    teacher_id: str  # sha256 of the teacher's configuration and weights
    teacher_kind: TeacherKind
    frame_gap_s: ranges.Positive
    cameras: tuple[str, ...]
    dataset: str  # hashes.dataset_fingerprint
    versions: dict[str, str]  # of the libraries that decode and compute
    preprocessing: str = PREPROCESSING
    # None is left out of the key, so that caches of a teacher without grounding are what they were before this field.
    teacher_grounding: GroundedIn | None = field(default=None, metadata=ADDED_LATER)


def label_stores(
    cache: Path,
    datasets: list[data.RobotDataset],
    teacher: str | None,
    kind: TeacherKind,
    cameras: tuple[str, ...],
    grounding: GroundedIn | None = None,
) -> list[RowCache]:
    """The label cache of each dataset, complete or not.

    cameras:   the run's label cameras
    teacher:   the teacher's id. None: the teacher whose labels are there; raises ValueError if there are none
    grounding: what this teacher was grounded in
    """
    directories = dataset_directories(cache, [dataset.name for dataset in datasets])
    if teacher is None:
        there = cached_key(directories[0])
        teacher, grounding = there.teacher_id, there.teacher_grounding
    stores = []
    for directory, dataset in zip(directories, datasets, strict=True):
        key = LabelKey(
            teacher_id=teacher,
            teacher_kind=kind,
            frame_gap_s=dataset.frame_gap_s,
            cameras=dataset.label_views(cameras),
            dataset=dataset_fingerprint(dataset.root),
            versions={name: metadata.version(name) for name in ("torch", "lerobot", data_frames.video_decoder())},
            teacher_grounding=grounding,
        )
        known = {name: value for name, value in asdict(key).items() if value is not None}
        stores.append(RowCache(directory, known, dataset.num_frames, SHARD_ROWS))
    return stores


def cached_key(directory: Path) -> LabelKey:
    """The key of the labels in a directory. Raises ValueError if there are none, or they are not labels."""
    if not (directory / MANIFEST).is_file():
        raise paths.no_labels(directory)
    key = {name: value for name, value in read_key(directory).items() if name not in ROW_FIELDS}
    return decode(LabelKey, key, f"{directory / MANIFEST}")


def grounding_of(store: RowCache) -> GroundedIn | None:
    """What the teacher of these labels was grounded in."""
    found = store.key.get("teacher_grounding")
    return GroundedIn(**found) if found else None


def write_codebook(store: RowCache, codebook: Tensor) -> None:  # [C, D]
    write_sealed(store.directory / CODEBOOK, "codebook", codebook, store.key)


def read_codebook(store: RowCache) -> Tensor:  # [C, D]
    """Raises ValueError where the codebook is not the one that was written with these labels."""
    return read_sealed(f"{store.directory}/{CODEBOOK}", "codebook", store.key)


class CachedLabels:
    """Labels from complete caches. Neither the teacher nor frame pairs are read."""

    cameras = ()
    pair_size = 0

    def __init__(self, stores: list[RowCache], gaps: list[int], horizon: int = 1):
        """stores, gaps: one for each dataset of the run, in order; rows from the first frame of a pair to the second

        Raises ValueError for what RowCache.open refuses.
        """
        for store in stores:
            store.open()
        self.stores, self.gaps, self.horizon = stores, gaps, horizon
        self.teacher_id: str = stores[0].key["teacher_id"]
        self.teacher_grounding = grounding_of(stores[0])
        self.kind: TeacherKind = stores[0].key["teacher_kind"]
        # [C, D], of the first dataset: all have the same teacher.
        self.codebook = read_codebook(stores[0])
        self.shape = horizon * len(stores[0][0]), self.codebook.shape[1]

    def to(self, device: torch.device) -> None:
        self.codebook = self.codebook.to(device)

    def statistics(self, rows_of: list[tuple[int, Rows]]) -> Statistics:
        """Mean and standard deviation of a latent action's S*D dimensions over all targets of these rows, exactly: a
        pair counts as often as it is a target, which is up to M times. A shard is in memory at a time.

        rows_of: (dataset index, rows that have a pair) of whole episodes, data.with_pairs
        """
        # NumPy adds in one thread and one order: every process gets the same sums.
        codebook, first, count, total, squares = self.codebook.cpu().numpy(), None, 0, 0.0, 0.0
        for index, rows in rows_of:
            for shard in self.stores[index].shards():
                times = self.times_a_target(index, rows, np.arange(shard.start, shard.stop))
                if not times.any():
                    continue
                labels = self.stores[index].shard(shard).numpy()[times > 0]
                latents = (labels if self.kind == "continuous" else codebook[labels]).reshape(len(labels), -1)
                # Of differences to one of the latents: the sums cancel little, and those of a constant are 0.
                first = latents[0].astype(np.float64) if first is None else first
                apart, times = latents - first, times[times > 0]
                count += times.sum()
                total += np.einsum("n,nf->f", times, apart)
                squares += np.einsum("n,nf,nf->f", times, apart, apart)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return Statistics((first + mean).tolist(), std.tolist())

    def times_a_target(self, index: int, rows: Rows, labelled: np.ndarray) -> np.ndarray:  # [n] -> [n] int64
        """How often the label of each of these rows of a dataset is a target, as one of M in a row; 0 if it is not."""
        at = np.searchsorted(rows.end, labelled, side="right").clip(max=len(rows.end) - 1)
        since = labelled - rows.start[at]
        times = np.minimum(since // self.gaps[index] + 1, self.horizon)
        return np.where((since >= 0) & (labelled < rows.end[at]), times, 0)

    def __call__(self, raw: RawBatch) -> Tensor:  # [B, M*S, D]
        rows = torch.stack([self.in_a_row(*place) for place in zip(raw.dataset, raw.row, strict=True)])
        rows = rows.to(self.codebook.device, non_blocking=True)
        return rows if self.kind == "continuous" else self.codebook[rows.long()]

    def in_a_row(self, dataset: int, row: int) -> Tensor:  # [M*S] codes or [M*S, D] latents
        store, last = self.stores[dataset], self.stores[dataset].num_rows - 1
        # Beyond the episode it may be another one's label, which raw.pair_mask hides.
        return torch.cat([store[min(row + i * self.gaps[dataset], last)] for i in range(self.horizon)])


def label(config: LabelConfig, datasets: list[data.RobotDataset]) -> None:
    accelerator = make_accelerator()
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size)
    options = teachers_pairs(config.laq_ckpt, config.data, config.accept_other_pairs)
    data.set_frame_gap(datasets, options.gap_s)
    _, cameras = data_views.choose_cameras(datasets, options)
    data.valid_pair_share(datasets, [(i, dataset.rows()) for i, dataset in enumerate(datasets)])
    teacher = teacher_id(laq), config.teacher_kind, cameras, teachers_grounding(config.laq_ckpt)
    stores = label_stores(config.label_cache, datasets, *teacher)
    unfinished = [not store.is_complete() for store in stores]  # refuses wrong keys before any work
    laq.to(accelerator.device)
    for dataset, store, todo in zip(datasets, stores, unfinished):
        label_dataset(laq, dataset, dataset.label_views(cameras), store, config, accelerator)
        accelerator.print(f"{store.directory}: {dataset.num_frames:,} frames {'labelled' if todo else 'were labelled'}")


@torch.no_grad()
def label_dataset(
    laq: LAQ,
    dataset: data.RobotDataset,
    cameras: tuple[str, ...],
    store: RowCache,
    config: LabelConfig,
    accelerator: Accelerator,
) -> None:
    """Fill the label cache of a dataset. Every process fills its share of the shards."""
    continuous, slots = config.teacher_kind == "continuous", len(cameras) * laq.config.code_seq_len

    def compute(frames: list[Tensor], places: Tensor) -> Tensor:
        pairs = torch.stack([laq.resize(unit_range(of_camera))[places] for of_camera in frames], dim=1)
        latents = laq.encode(pairs.flatten(0, 1))
        return (latents.continuous if continuous else latents.indices).unflatten(0, (len(places), -1)).flatten(1, 2)

    if accelerator.is_main_process and not (store.directory / CODEBOOK).exists():
        store.claim()
        write_codebook(store, laq.vq.codebooks)
    data_blocks.fill_cache(
        store,
        dataset,
        cameras,
        pairs=True,
        row_shape=(slots, laq.config.quant_dim) if continuous else (slots,),
        dtype=torch.float32 if continuous else torch.int32,
        compute=compute,
        rows_at_once=config.batch_size,
        num_workers=config.data.num_workers,
        accelerator=accelerator,
    )
