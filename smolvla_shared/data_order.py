"""Which sample a slot of a step is: the held-out episodes, mixtures, and a deterministic order.

Everything random is a pure function of (seed, step, slot): the row that is read, its augmentation, its noise and times.
A run resumed at step k needs nothing but k, and any number of processes may share the slots of a step without changing
the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from smolvla_shared.config import RunConfig, StageOptions
from smolvla_shared.data import RobotDataset, with_pairs
from smolvla_shared.data_rows import RowGroup, Rows, group_rows, shuffled


def split_episodes(
    dataset: RobotDataset, val_fraction: float, seed: int, max_episodes: int | None = None
) -> tuple[Rows, Rows]:
    """Training and held-out rows of a dataset. Whole episodes are held out, drawn at random with the seed.

    max_episodes: so many of the other episodes are for training, the first in the same random order; default: all

    Raises ValueError if there are too few episodes.
    """
    num_episodes = len(dataset.episode_from)
    num_val = max(1, round(val_fraction * num_episodes)) if val_fraction else 0
    if num_val >= num_episodes:
        raise ValueError(
            f"{dataset.name} has {num_episodes} episode(s), too few to hold out a share of {val_fraction}: "
            "record more, or pass --val-fraction 0"
        )
    if max_episodes and max_episodes > num_episodes - num_val:
        raise ValueError(
            f"--data.max-episodes {max_episodes}: {dataset.name} has {num_episodes - num_val} episode(s) to train on, "
            f"and {num_val} held out (--val-fraction {val_fraction}): pass a smaller number, or leave it out"
        )
    order = np.random.default_rng([seed, num_episodes]).permutation(num_episodes)

    def rows(episodes: np.ndarray) -> Rows:
        episodes = np.sort(episodes)
        return Rows(dataset.episode_from[episodes], dataset.episode_to[episodes])

    return rows(order[num_val:][:max_episodes]), rows(order[:num_val])


@dataclass(frozen=True)
class SampleKey:
    """A sample: the row that is read, and the (step, slot) that its randomness is a function of."""

    step: int
    slot: int
    dataset: int
    row: int


def split_datasets(
    datasets: list[RobotDataset], val_fraction: float, seed: int, max_episodes: int | None = None
) -> tuple[list[tuple[int, Rows]], list[tuple[int, Rows]]]:
    """Training and held-out rows of all datasets (split_episodes), each as a list of (dataset index, rows)."""
    splits = [split_episodes(dataset, val_fraction, seed, max_episodes) for dataset in datasets]
    train = [(index, rows) for index, (rows, _) in enumerate(splits)]
    held_out = [(index, rows) for index, (_, rows) in enumerate(splits) if len(rows)]
    return train, held_out


def mix(labelled: list, video: list, video_share: float) -> list[RowGroup]:
    """Two lists of (dataset index, rows) as two groups, or as one group if there is no video."""
    if not video:
        return group_rows(labelled)
    return group_rows(labelled, 1 - video_share) + group_rows(video, video_share)


def split_with_video(
    datasets: list[RobotDataset], num_labelled: int, config: StageOptions, video_share: float
) -> tuple[list[tuple[int, Rows]], list[RowGroup], list[RowGroup]]:
    """Training rows of all datasets; their mixture; held-out rows of the labelled datasets, which come first.

    Raises ValueError for video of which no frame has a pair, and for fewer labelled episodes than --data.max-episodes.
    """
    labelled, held_out = split_datasets(
        datasets[:num_labelled], config.val_fraction, config.seed, config.data.max_episodes
    )
    video, _ = split_datasets(datasets[num_labelled:], config.val_fraction, config.seed)
    video = [(num_labelled + index, rows) for index, rows in video]
    # A frame of video without a pair teaches nothing.
    mixture = mix(labelled, with_pairs(datasets, video), video_share)
    return labelled + video, mixture, group_rows(held_out)


class StepSampler(Sampler[list[SampleKey]]):
    """The sample keys of each forward pass of one process, from `first_step` on.

    A step has batch_size slots, over which the groups' shares are spread evenly. Each group reads its rows in a new
    random order every epoch: the group's p-th sample is entry p mod M of the order of epoch p // M (shuffled).
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
            if not len(group):
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

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation_steps

    def keys(self, step: int, slots: np.ndarray) -> list[SampleKey]:
        """The samples of some slots of a step."""
        keys = {}
        for index, group in enumerate(self.groups):
            own = slots[self.group_of_slot[slots] == index]
            places = step * int(self.slots_of_group[index]) + self.place_in_group[own]
            epochs, places = np.divmod(places, len(group))
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                order = shuffled(places[now], len(group), (self.seed, index, epoch))
                for slot, place in zip(own[now].tolist(), group.at(order)):
                    keys[slot] = SampleKey(step, slot, *place)
        return [keys[slot] for slot in slots.tolist()]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        block = self.batch_size // (self.num_processes * self.accumulation_steps)
        for step in self.steps:
            for micro in range(self.accumulation_steps):
                start = (micro * self.num_processes + self.process) * block
                yield self.keys(step, np.arange(start, start + block))


def plan(groups: list[RowGroup], config: RunConfig) -> str:
    """How many epochs of each group a run reads, for its first lines."""
    slots = StepSampler(groups, config.seed, config.batch_size, 0, 0).slots_of_group
    epochs = [
        f"{config.steps * taken / len(group):.3g} x {len(group):,} training frames"
        for taken, group in zip(slots, groups)
    ]
    return f"{config.steps:,} steps of {config.batch_size} samples = {' + '.join(epochs)}"
