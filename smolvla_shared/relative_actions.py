"""Relative actions: where a recording says where to, a policy may learn how far from where the robot is.

An action of a chunk is then what was recorded, minus the state at the chunk's first frame; a gripper's stays as it is.
It is the conversion of LeRobot's RelativeActionsProcessorStep and of openpi's DeltaActions. In a rollout
lerobot_processor.py adds the state again.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smolvla_shared.action_config import ActionOptions
from smolvla_shared.data import ACTION_KEY, STATE_KEY, RobotDataset, vector_names
from smolvla_shared.data_rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

MAX_CHUNKS = 10_000  # that statistics are over


@dataclass(frozen=True)
class Relative:
    """The relative actions of a run."""

    chunk_size: int
    absolute_actions: tuple[str, ...]
    mask: tuple[bool, ...]  # [A]: whether a dimension is relative

    @classmethod
    def find(cls, options: ActionOptions, labelled: list[RobotDataset]) -> "Relative":
        """Raises ValueError for datasets whose state does not measure what their actions are targets of, as far as
        names, widths and values tell, and where no name says which dimensions stay absolute.
        """
        masks = {dataset.name: relative_dims(dataset, options) for dataset in labelled}
        if len(set(masks.values())) > 1:
            raise ValueError(f"--relative-actions: the datasets differ in which actions would be relative: {masks}")
        return cls(options.chunk_size, options.absolute_actions, next(iter(masks.values())))

    def chunks(self, datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]]) -> np.ndarray:
        """The actions of chunks from MAX_CHUNKS or more of these rows, evenly spaced: [n, A] float64."""
        every, found = max(1, sum(len(rows) for _, rows in rows_of) // MAX_CHUNKS), []
        for index, rows in rows_of:
            dataset, first = datasets[index], rows[np.arange(0, len(rows), every)]
            end = dataset.episode_to[dataset.episode_of(first)]
            for offset in range(self.chunk_size):
                start = first[first + offset < end]
                found.append(differences(dataset, start, offset, self.mask))
        return np.concatenate(found)

    def of(self, actions: "Tensor", state: "Tensor") -> "Tensor":
        """Chunks [B, T, A] and states [B, S] at their first frames, as recorded -> relative chunks [B, T, A]."""
        return actions - (state[:, : len(self.mask)] * state.new_tensor(self.mask))[:, None]


def differences(dataset: RobotDataset, rows: np.ndarray, offset: int, mask: tuple[bool, ...]) -> np.ndarray:
    """The actions `offset` frames after these rows, relative to the states in the rows: [n, A] float64."""
    state, actions = (dataset.vector(key).reshape(dataset.num_frames, -1) for key in (STATE_KEY, ACTION_KEY))
    return actions[rows + offset].astype(np.float64) - np.where(mask, state[rows, : len(mask)], 0)


def relative_dims(dataset: RobotDataset, options: ActionOptions) -> tuple[bool, ...]:
    """Which dimensions of a dataset's actions are relative. Raises ValueError as `Relative.find`."""
    width, absolute = dataset.vector_dim(ACTION_KEY), options.absolute_actions
    if STATE_KEY not in dataset.features or not options.model.use_state:
        raise ValueError(f"--relative-actions: {dataset.name} has no {STATE_KEY} that is read, to be relative to")
    names, of_state = (vector_names(dataset.features[key]) for key in (ACTION_KEY, STATE_KEY))
    if absolute and names is None:
        raise ValueError(
            f"--relative-actions: the actions of {dataset.name} have no names, which are of {' or '.join(absolute)}? "
            "Name them in meta/info.json, or make all relative: --absolute-actions without a value"
        )
    # As LeRobot's step: a part of a name, in letters of either case.
    mask = tuple(not any(text.lower() in name.lower() for text in absolute) for name in names or ("",) * width)
    if absolute and len(set(mask)) == 1:
        raise ValueError(
            f"--relative-actions: {'all' if mask[0] else 'none'} of the actions of {dataset.name} would be relative "
            f"({', '.join(names)}): name some with --absolute-actions; without a value all are relative"
        )
    unlike = bool(names and of_state) and any(
        is_relative and [name] != [*of_state[i : i + 1]] for i, (name, is_relative) in enumerate(zip(names, mask))
    )
    if unlike or dataset.vector_dim(STATE_KEY) < width:
        said = {"state": of_state or dataset.vector_dim(STATE_KEY), "actions": names or width}
        raise ValueError(
            f"--relative-actions: the state of {dataset.name} does not measure, one by one, what its actions are "
            f"targets of: {said}"
        )
    rows = np.arange(0, dataset.num_frames, max(1, dataset.num_frames // MAX_CHUNKS))
    relative, recorded = (differences(dataset, rows, 0, dims).std(0) for dims in (mask, (False,) * width))
    if np.median(relative[[*mask]] / np.maximum(recorded[[*mask]], 1e-6)) >= 1:
        raise ValueError(
            f"--relative-actions: the actions of {dataset.name} are no absolute positions, they vary less than their "
            f"differences to the state: {recorded.round(4).tolist()}, {relative.round(4).tolist()}"
        )
    return mask
