"""Where latent targets come from, behind one interface: the teacher in every step, or a label cache."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smolvla_shared import data, data_loader
from smolvla_shared.batch import Labels, RawBatch, to_device
from smolvla_shared.cache import dataset_directories
from smolvla_shared.config import DataConfig, StageOptions, TeacherKind
from smolvla_shared.data_rows import Rows
from smolvla_shared.label_cache import CachedLabels, cached_key, label_stores
from smolvla_shared.laq import LAQ, LatentActions
from smolvla_shared.laq_files import load_laq, teacher_id, teachers_grounding, teachers_pairs
from smolvla_shared.mixture import DatasetEntry, policy_names
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import unit_range

STATISTICS_PAIRS = 10_000


class OnlineLabels:
    """Labels that the teacher computes in every step, on the teacher's device."""

    def __init__(self, laq: LAQ, kind: TeacherKind, cameras: tuple[str, ...], horizon: int = 1, grounding=None):
        self.laq, self.kind, self.cameras, self.horizon = laq, kind, cameras, horizon
        self.teacher_id, self.teacher_grounding = teacher_id(laq), grounding
        self.shape = horizon * len(cameras) * laq.config.code_seq_len, laq.config.quant_dim
        self.pair_size = laq.config.image_size

    @property
    def codebook(self) -> Tensor:  # [C, D]
        return self.laq.vq.codebooks.detach()

    def to(self, device: torch.device) -> None:
        self.laq.to(device)

    def choose(self, latents: LatentActions) -> Tensor:  # [B, S, D]
        """The latents of this kind: before quantisation if continuous, after it if quantized."""
        return latents.continuous if self.kind == "continuous" else latents.vectors

    @torch.no_grad()
    def __call__(self, raw: RawBatch) -> Tensor:  # [B, M*S, D]
        frames = unit_range(raw.pairs).transpose(1, 2)  # [B, M + 1, V, 3, h, w]
        pairs = torch.stack([frames[:, :-1], frames[:, 1:]], dim=3).flatten(0, 2)  # [B*M*V, 2, 3, h, w]
        return self.choose(self.laq.encode(pairs)).view(len(frames), *self.shape)


def labels_pairs[Data: DataConfig](config: StageOptions, data: Data, entries: Sequence[DatasetEntry] = ()) -> Data:
    """The data options; frame gap and label cameras that they leave out are those of the labels that `config` names.

    entries: of all datasets of the run, if these are more than the options'

    Raises ValueError if the options contradict the teacher (laq_files.teachers_pairs). A label cache refuses other
    pairs when it is opened.
    """
    if config.laq_ckpt:
        return teachers_pairs(config.laq_ckpt, data, config.accept_other_pairs, entries)
    if config.labels == "online":  # no labels: Stage 3 without co-training
        return data
    directories = dataset_directories(config.label_cache, [entry.name for entry in data.entries])
    own = {}
    for directory, entry in zip(directories, data.entries, strict=True):
        key = cached_key(directory)
        if entry.frame_gap_s is None:
            own.setdefault("frame_gap_s", key.frame_gap_s)
        if entry.label_cameras is None:
            own.setdefault("label_cameras", policy_names(data.entries, key.cameras))
    return replace(data, **{name: value for name, value in own.items() if not getattr(data, name)})


def open_labels(
    config: StageOptions, datasets: list[data.RobotDataset], cameras: tuple[str, ...], horizon: int = 1
) -> Labels:
    """The labels that the options name, on the CPU (Labels.to moves them).

    horizon: latent actions in a row (M), if the options leave it out

    Raises ValueError for a teacher that cannot be loaded, and for a cache that is incomplete or has another key.
    """
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size) if config.laq_ckpt else None
    grounding, horizon = teachers_grounding(config.laq_ckpt), config.latent_horizon or horizon
    if config.labels == "online":
        assert laq is not None  # the scripts' options refuse this
        return OnlineLabels(laq, config.teacher_kind, cameras, horizon, grounding)
    teacher = teacher_id(laq) if laq else None
    stores = label_stores(config.label_cache, datasets, teacher, config.teacher_kind, cameras, grounding)
    return CachedLabels(stores, [dataset.gap for dataset in datasets], horizon)


def latent_statistics(
    labels: Labels,
    datasets: list[data.RobotDataset],
    rows: list[tuple[int, Rows]],
    seed: int,
    device: torch.device | str = "cpu",
    recorded: Statistics | None = None,
) -> Statistics:
    """Mean and standard deviation (Statistics.with_floor) of the latent targets over the training pairs: all of a label
    cache, otherwise at most STATISTICS_PAIRS, drawn with the seed; the same for each of the M latent actions in a row.

    rows:     (dataset index, training rows) of each dataset
    recorded: the statistics of a latent head that has already learned these latents; returned as they are

    Moves the labels to the device. Raises ValueError if the teacher gives every pair the same latent action.
    """
    labels.to(device)
    if recorded:
        return recorded
    if isinstance(labels, CachedLabels):
        statistics = labels.statistics(data.with_pairs(datasets, rows))
    else:
        spec, limit = data_loader.SampleSpec.of_pairs(labels), STATISTICS_PAIRS // labels.horizon
        raws = data_loader.sample_pairs(datasets, rows, spec, limit, seed)
        found = [labels(to_device(raw, device)).cpu().unflatten(1, (labels.horizon, -1))[raw.pair_mask] for raw in raws]
        statistics = Statistics.of(torch.cat(found).flatten(1))
    if max(statistics.std) == 0:
        raise ValueError(
            "the teacher gives every pair the same latent action: its codebook has collapsed, or the pairs do not "
            "move (try a larger --data.frame-gap-s, or train the teacher longer)"
        )
    return Statistics(statistics.mean * labels.horizon, statistics.with_floor().std * labels.horizon)
