"""The data of a run in a table: what each dataset is, how much of a batch it is, and how often its frames are seen."""

from dataclasses import dataclass

import numpy as np

from smolvla_shared import data_views
from smolvla_shared.config import RunConfig
from smolvla_shared.data import RobotDataset
from smolvla_shared.data_order import StepSampler
from smolvla_shared.data_rows import RowGroup

NAMES = "dataset", "robot", "pairs"  # the columns of texts; numbers stand at the right of theirs


@dataclass(frozen=True)
class Reading:
    """What a run reads of one dataset.

    share:  of the samples of a batch
    epochs: how often each of the frames is seen in the whole run
    """

    episodes: int
    frames: int
    share: float = 0.0
    epochs: float = 0.0


def describe(
    datasets: list[RobotDataset],
    groups: list[RowGroup],
    config: RunConfig,
    cameras: tuple[str, ...] = (),
    label_cameras: tuple[str, ...] = (),
    start: tuple[str, ...] = (),
) -> str:
    """The first lines of a run: its datasets, and what its policy sees of their cameras.

    groups:  the training rows, as they are mixed
    cameras: the policy's; (): a teacher trains. The last three arguments are those of `data_views.camera_table`.

    Raises ValueError for a batch that is too small for the groups.
    """
    lines = [f"{config.steps:,} steps of {config.batch_size:,} samples:"]
    lines += [data_table(datasets, groups, config, cameras, label_cameras)]
    if cameras:
        lines += [data_views.camera_table(datasets, cameras, start), *data_views.unnamed_robots(datasets)]
    return "\n".join(lines)


def readings(groups: list[RowGroup], number: int, config: RunConfig | None = None) -> list[Reading]:
    """What is read of each of so many datasets. Without a run's options no share and no epochs are known.

    Raises ValueError for a batch that is too small for the groups.
    """
    found = [Reading(0, 0)] * number
    slots = [0] * len(groups)
    if config:
        slots = StepSampler(groups, config.seed, config.batch_size, 0, 0).slots_of_group.tolist()
    for taken, group in zip(slots, groups, strict=True):
        lengths = group.rows.end - group.rows.start
        for index in np.unique(group.dataset).tolist():
            of_dataset = lengths[group.dataset == index]  # a range of rows for each episode
            episodes, frames = len(of_dataset), int(of_dataset.sum())
            share = taken / config.batch_size * frames / len(group) if config else 0.0
            found[index] = Reading(episodes, frames, share, config.steps * taken / len(group) if config else 0.0)
    return found


def data_table(
    datasets: list[RobotDataset],
    groups: list[RowGroup],
    config: RunConfig | None = None,
    cameras: tuple[str, ...] = (),
    label_cameras: tuple[str, ...] = (),
) -> str:
    """A line for each dataset: episodes, frames and hours are those that are read. Then one for each that is not.

    config: of the run whose shares and epochs are shown, if there is one; cameras, label_cameras: those of the run
    """
    read = readings(groups, len(datasets), config)
    columns = {
        "dataset": [d.name for d in datasets],
        "episodes": [out_of(of.episodes, len(d.episode_from)) for of, d in zip(read, datasets)],
        "frames": [f"{of.frames:,}" for of in read],
        "hours": [three_digits(of.frames / d.fps / 3600) for of, d in zip(read, datasets)],
        "fps": [f"{d.fps:g}" for d in datasets],
    }
    if cameras:
        columns["cameras"] = [out_of(sum(name in d.views for name in cameras), len(cameras)) for d in datasets]
    if config:
        columns["share"] = [f"{of.share:.1%}" for of in read]
        columns["epochs"] = [three_digits(of.epochs) for of in read]
    if any(d.entry.robot for d in datasets):
        columns["robot"] = [d.entry.robot or "-" for d in datasets]
    if label_cameras:
        columns["pairs"] = [f"{' '.join(d.label_views(label_cameras))}, {d.gap_s:.3g} s" for d in datasets]
    lines = [""] * (1 + len(datasets))
    for title, cells in columns.items():
        width = max(map(len, [title, *cells]))
        aligned = [cell.ljust(width) if title in NAMES else cell.rjust(width) for cell in (title, *cells)]
        lines = [f"{line}  {cell}".lstrip() for line, cell in zip(lines, aligned)]
    unread = [d for of, d in zip(read, datasets) if not of.frames]
    lines += [f"{d.name}: no episode is longer than its frame gap of {d.gap_s:.3g} s, none is read" for d in unread]
    return "\n".join(line.rstrip() for line in lines)


def three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def out_of(number: int, of: int) -> str:
    return f"{number:,}" if number == of else f"{number:,} of {of:,}"
