"""Which sample a slot of a step is: the held-out episodes, mixtures, and a deterministic order.

Everything random is a pure function of (seed, step, slot): the row that is read, its augmentation, its noise and times.
A run resumed at step k needs nothing but k, and any number of processes may share the slots of a step without changing
the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from smolvla_shared.config import RunConfig
from smolvla_shared.data import RobotDataset, with_pairs


def split_episodes(dataset: RobotDataset, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out rows of a dataset. Whole episodes are held out, drawn at random with the seed."""
    num_episodes = len(dataset.episode_from)
    num_val = max(1, round(val_fraction * num_episodes)) if val_fraction else 0
    if num_val >= num_episodes:
        raise ValueError(
            f"{dataset.name} has {num_episodes} episode(s), too few to hold out a share of {val_fraction}: "
            "record more, or pass --val-fraction 0"
        )
    order = np.random.default_rng([seed, num_episodes]).permutation(num_episodes)

    def rows(episodes: np.ndarray) -> np.ndarray:
        ranges = [np.arange(dataset.episode_from[e], dataset.episode_to[e]) for e in sorted(episodes)]
        return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)

    return rows(order[num_val:]), rows(order[:num_val])


@dataclass(frozen=True)
class SampleKey:
    """A sample: the row that is read, and the (step, slot) that its randomness is a function of."""

    step: int
    slot: int
    dataset: int
    row: int


def split_datasets(datasets: list[RobotDataset], val_fraction: float, seed: int) -> tuple[list, list]:
    """Training and held-out rows of all datasets, each as a list of (dataset index, rows)."""
    splits = [split_episodes(dataset, val_fraction, seed) for dataset in datasets]
    train = [(index, rows) for index, (rows, _) in enumerate(splits)]
    held_out = [(index, rows) for index, (_, rows) in enumerate(splits) if len(rows)]
    return train, held_out


@dataclass(frozen=True)
class RowGroup:
    """Rows that get a fixed share of every step's slots."""

    rows: np.ndarray  # [M, 2]: dataset index and row within that dataset
    share: float = 1.0


def group_rows(rows_of: list[tuple[int, np.ndarray]], share: float = 1.0) -> list[RowGroup]:
    """A list of (dataset index, rows) as one group; no group for an empty list."""
    if not rows_of:
        return []
    pairs = [np.stack([np.full(len(rows), dataset), rows], axis=1) for dataset, rows in rows_of]
    return [RowGroup(np.concatenate(pairs), share)]


def mix(labelled: list, video: list, video_share: float) -> list[RowGroup]:
    """Two lists of (dataset index, rows) as two groups, or as one group if there is no video."""
    if not video:
        return group_rows(labelled)
    return group_rows(labelled, 1 - video_share) + group_rows(video, video_share)


def split_with_video(
    datasets: list[RobotDataset], num_labelled: int, config: RunConfig, video_share: float
) -> tuple[list[tuple[int, np.ndarray]], list[RowGroup], list[RowGroup]]:
    """Training rows of all datasets; their mixture; held-out rows of the labelled datasets, which come first.

    Raises ValueError for video of which no frame has a pair.
    """
    training, held_out = split_datasets(datasets, config.val_fraction, config.seed)
    video = with_pairs(datasets, training[num_labelled:])  # a frame without a pair teaches nothing there
    mixture = mix(training[:num_labelled], video, video_share)
    return training, mixture, group_rows([(i, rows) for i, rows in held_out if i < num_labelled])


class StepSampler(Sampler[list[SampleKey]]):
    """The sample keys of each forward pass of one process, from `first_step` on.

    A step has batch_size slots, over which the groups' shares are spread evenly. Each group reads its rows in a new
    random order every epoch: the group's p-th sample is entry p mod M of the permutation of epoch p // M.
    Pass m of process r takes block m * num_processes + r of the slots.
    """

    def __init__(
        self,
        groups: list[RowGroup],
        seed: int,
        batch_size: int,
        first_step: int,
        last_step: int,
        process: int = 0,
        num_processes: int = 1,
        accumulation_steps: int = 1,
    ):
        assert batch_size % (num_processes * accumulation_steps) == 0  # run_checkpoint.check_run tells the user
        for group in groups:
            if not len(group.rows):
                raise ValueError("a group of training data has no frames")
        self.groups, self.seed, self.batch_size = groups, seed, batch_size
        self.steps = range(first_step, last_step)
        self.process, self.num_processes, self.accumulation_steps = process, num_processes, accumulation_steps
        bounds = np.cumsum([0.0] + [group.share for group in groups])
        slots = np.arange(batch_size)
        # Slot s goes to the group whose share its place in a low-discrepancy sequence falls into.
        golden = (slots * 0.6180339887498949) % 1.0
        ranks = np.argsort(np.argsort(golden)) + 0.5
        self.group_of_slot = np.searchsorted(bounds / bounds[-1] * batch_size, ranks) - 1
        self.place_in_group = np.array([(self.group_of_slot[:s] == self.group_of_slot[s]).sum() for s in slots])
        self.slots_of_group = np.bincount(self.group_of_slot, minlength=len(groups))
        if not all(self.slots_of_group):
            raise ValueError(
                f"--batch-size {batch_size} is too small for shares of {[group.share for group in groups]}: their "
                f"samples in a batch are {self.slots_of_group.tolist()}"
            )
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation_steps

    def order(self, group: int, epoch: int) -> np.ndarray:
        """The permutation of an epoch. A group's newest two are kept: a step may end one epoch and begin the next."""
        if (group, epoch) not in self._orders:
            self._orders.pop((group, epoch - 2), None)
            rng = np.random.default_rng([self.seed, group, epoch])
            self._orders[group, epoch] = rng.permutation(len(self.groups[group].rows))
        return self._orders[group, epoch]

    def key(self, step: int, slot: int) -> SampleKey:
        group = int(self.group_of_slot[slot])
        place = step * int(self.slots_of_group[group]) + int(self.place_in_group[slot])
        epoch, place = divmod(place, len(self.groups[group].rows))
        dataset, row = self.groups[group].rows[self.order(group, epoch)[place]]
        return SampleKey(step, slot, int(dataset), int(row))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        block = self.batch_size // (self.num_processes * self.accumulation_steps)
        for step in self.steps:
            for micro in range(self.accumulation_steps):
                start = (micro * self.num_processes + self.process) * block
                yield [self.key(step, slot) for slot in range(start, start + block)]


def plan(groups: list[RowGroup], config: RunConfig) -> str:
    """How many epochs of each group a run reads, for its first lines."""
    slots = StepSampler(groups, config.seed, config.batch_size, 0, 0).slots_of_group
    epochs = [
        f"{config.steps * taken / len(group.rows):.3g} x {len(group.rows):,} training frames"
        for taken, group in zip(slots, groups)
    ]
    return f"{config.steps:,} steps of {config.batch_size} samples = {' + '.join(epochs)}"
