"""Which sample a slot of a step is: a deterministic order.

Everything random is a pure function of (seed, step, slot): the row that is read, its augmentation, its noise and times.
A run resumed at step k needs nothing but k, and any number of processes may share the slots of a step without changing
the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from smolvla_shared.data_rows import RowGroup, shuffled


@dataclass(frozen=True)
class SampleKey:
    """A sample: the row that is read, and the (step, slot) that its randomness is a function of."""

    step: int
    slot: int
    dataset: int
    row: int


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
