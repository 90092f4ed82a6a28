"""What is a robot's own in a run: widths and statistics of its state and of its actions.

A mixture file says which robot a dataset is of. Datasets of one robot share its widths and statistics; those of a run
that names no robot count as one robot's. A model has the widest robot's state and actions, the others' are padded: a
padded dimension carries nothing, and no loss counts it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolvla_shared import data_values
from smolvla_shared.batch import Batch, RawBatch, to_device
from smolvla_shared.config import ACTION, CoreConfig
from smolvla_shared.data import ACTION_KEY, STATE_KEY, RobotDataset
from smolvla_shared.data_columns import ROWS_AT_ONCE
from smolvla_shared.data_rows import Rows
from smolvla_shared.preprocess import EPS, Preprocessor, Statistics, pad_width

KEYS = {"state": STATE_KEY, ACTION: ACTION_KEY}
Robot = str | None  # a robot's name; None: of the datasets of a run that names no robot


@dataclass(frozen=True)
class Robots:
    """The robots of a run.

    of_dataset: the robot of each dataset of the run; None, too, for a dataset that has neither state nor actions
    widths:     of "state" and "action", as far as the run reads them: each robot's width
    """

    of_dataset: tuple[Robot, ...]
    widths: dict[str, dict[Robot, int]]

    @classmethod
    def find(
        cls,
        datasets: list[RobotDataset],
        targets: Collection[str],
        use_state: bool = True,
        num_labelled: int | None = None,
    ) -> "Robots":
        """The robots whose state is read, and whose actions if they are a target. Hidden actions are not.

        num_labelled: so many datasets, the first, are demonstrations; without a state in one of them none is read.
                      Default: all

        Raises ValueError for a dataset that leaves its robot open where others name theirs, for datasets of one robot
        that differ in width, and for values that cannot be trained on (data_values.py).
        """
        has_state = use_state and any(STATE_KEY in dataset.features for dataset in datasets[:num_labelled])
        keys = {name: KEYS[name] for name, is_read in (("state", has_state), (ACTION, ACTION in targets)) if is_read}
        data_values.refuse_vectors(datasets, *keys.values())
        named = [dataset.name for dataset in datasets if dataset.entry.robot]
        nameless = [d.name for d in datasets if not d.entry.robot and any(key in d.features for key in keys.values())]
        if named and nameless:
            raise ValueError(
                f"whose state and actions are those of {', '.join(nameless)}? The robots of {', '.join(named)} have "
                "names: give these a `robot` in --data.mixture, or --video-mixture, too, or name none"
            )
        robots = tuple(dataset.entry.robot for dataset in datasets)
        widths = {name: common_widths(datasets, robots, key) for name, key in keys.items()}
        return cls(robots, widths)

    @property
    def names(self) -> list[Robot]:
        """The robots that have a state or actions, in the order of their datasets."""
        known = {robot for widths in self.widths.values() for robot in widths}
        return [robot for robot in dict.fromkeys(self.of_dataset) if robot in known]

    @property
    def acting(self) -> list[Robot]:
        """The robots with demonstrations."""
        return [robot for robot in self.names if robot in self.widths[ACTION]]

    @property
    def dims(self) -> dict[str, int]:
        """The fields of CoreConfig that say how wide state (0: the model sees none) and actions are."""
        widest = {name: max(widths.values(), default=0) for name, widths in self.widths.items()}
        return {f"{name}_dim": width for name, width in ({"state": 0} | widest).items()}

    def datasets_of(self, robot: Robot, datasets: list[RobotDataset]) -> list[RobotDataset]:
        return [dataset for dataset, of in zip(datasets, self.of_dataset) if of == robot]

    def core_of(self, robot: Robot, core: CoreConfig) -> CoreConfig:
        """The model as this robot alone needs it. The weights are the same: they are of the padded widths."""
        return replace(core, **{f"{name}_dim": widths.get(robot, 0) for name, widths in self.widths.items()})

    def key(self, name: str, robot: Robot) -> str:
        """The name of a robot's statistics: "state", or "state of so100" where the run has several robots."""
        return name if len(self.names) == 1 else f"{name} of {robot}"

    def statistics(
        self, datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]], num_labelled: int | None = None
    ) -> dict[str, Statistics]:
        """The statistics of every robot, over its training frames: of its demonstrations, if it has some.

        rows_of:      (dataset index, rows) of the training frames of all datasets
        num_labelled: as in `find`
        """
        found = {}
        for name, widths in self.widths.items():
            for robot in widths:
                of_robot = [
                    (index, rows)
                    for index, rows in rows_of
                    if self.of_dataset[index] == robot and KEYS[name] in datasets[index].features
                ]
                labelled = [(index, rows) for index, rows in of_robot if num_labelled is None or index < num_labelled]
                found[self.key(name, robot)] = vector_statistics(datasets, KEYS[name], labelled or of_robot)
        return found

    def statistics_of(self, robot: Robot, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
        """One robot's, by "state" and "action"."""
        return {name: statistics[self.key(name, robot)] for name in self.widths if robot in self.widths[name]}

    def refuse_several(self, asked: str) -> None:
        """Raise ValueError if there are several robots and the options ask for what is one robot's."""
        if len(self.names) > 1 and asked:
            raise ValueError(
                f"{asked} is of one robot, the datasets are of {', '.join(map(str, self.names))}: leave it out, or "
                "train on one robot"
            )


def common_widths(datasets: list[RobotDataset], robots: tuple[Robot, ...], key: str) -> dict[Robot, int]:
    """Width of a vector feature, by robot. Raises ValueError if the datasets of one robot differ."""
    widths: dict[Robot, dict[str, int]] = {}
    for dataset, robot in zip(datasets, robots, strict=True):
        if key in dataset.features:
            widths.setdefault(robot, {})[dataset.name] = dataset.vector_dim(key)
    for robot, found in widths.items():
        if len(set(found.values())) > 1:
            fix = ", or pass --model.no-use-state" * (key == STATE_KEY)
            of = f"of the robot {robot} " if robot else ""
            raise ValueError(
                f"the datasets {of}have {key} of different widths, they cannot be one robot's: {found}: leave one out, "
                f"name the robot of each in --data.mixture{fix}"
            )
    return {robot: next(iter(found.values())) for robot, found in widths.items()}


def vector_statistics(
    datasets: list[RobotDataset], key: str, rows_of: list[tuple[int, Rows]] | None = None
) -> Statistics:
    """Mean and standard deviation over the frames of (dataset index, rows) whose dataset has the feature; default: all.

    A dimension that never changes gets the deviation 1: divided by 0, a later change of 0.01 would be 1e6 to the model.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())  # squares: summed squared distances from the mean
    for index, rows in rows_of or [(index, dataset.rows()) for index, dataset in enumerate(datasets)]:
        for start in range(0, len(rows) if key in datasets[index].features else 0, ROWS_AT_ONCE):
            places = np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))
            values = np.asarray(datasets[index].vector(key)[rows[places]], np.float64).reshape(len(places), -1)
            shift, share = values.mean(0) - mean, len(places) / (count + len(places))
            squares = squares + values.var(0) * len(places) + shift**2 * count * share  # Chan et al., 1979
            mean, count = mean + shift * share, count + len(places)
    deviation = np.sqrt(squares / count)
    deviation[deviation <= 1e-6 * np.maximum(1, np.abs(mean))] = 1
    return Statistics(mean.tolist(), deviation.tolist())


class RobotsPreprocessor(Preprocessor):
    """A Preprocessor that normalises state and actions of each sample with the statistics of its robot."""

    def __init__(self, config: CoreConfig, tokenizer: Any, statistics: dict[str, Statistics], robots: Robots):
        super().__init__(config, tokenizer, statistics)
        self.tables = {name: tables(robots, statistics, name, config) for name in robots.widths}

    def of_samples(self, name: str, dataset: list[int], device: torch.device) -> list[Tensor]:
        """Mean, deviation, and whether a dimension is the robot's, of samples of these datasets: [B, A] each."""
        self.tables = to_device(self.tables, device)  # copied once
        index = torch.tensor(dataset, device=device)
        return [of[index] for of in self.tables[name]]

    def normalize(self, name: str, values: Tensor, dataset: list[int]) -> Tensor:
        """State [B, A] or actions [B, T, A]; the padding stays 0."""
        mean, std, own = self.of_samples(name, dataset, values.device)
        if values.ndim == 3:
            mean, std, own = mean[:, None], std[:, None], own[:, None]
        return ((values.float() - mean) / (std + EPS)).where(own, 0)

    def __call__(self, raw: RawBatch, latents: Tensor | None = None) -> Batch:
        batch = super().__call__(raw, latents)
        if ACTION in batch.targets:
            # What is not the robot's is NaN, unknown to the loss. As in a policy of that robot alone it has no noise,
            # unless the model is one whose padding is noisy.
            target, config = batch.targets[ACTION], self.config
            *_, own = self.of_samples(ACTION, raw.dataset, target.value.device)
            value = target.value[..., : config.action_dim].where(own[:, None], torch.nan)
            value = pad_width(value, config.max_action_dim)
            noise = target.noise
            if not config.noisy_padding:
                noise = noise * pad_width(own, config.max_action_dim)[:, None, None]
            batch.targets[ACTION] = replace(target, value=value, noise=noise)
        return batch


def tables(
    robots: Robots, statistics: dict[str, Statistics], name: str, config: CoreConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the robot of each dataset, and which dimensions it has: [datasets, A] each.

    A dataset without a robot, whose samples do not count, has all of them.
    """
    shape = len(robots.of_dataset), {"state": config.state_dim, ACTION: config.action_dim}[name]
    mean, std, own = torch.zeros(shape), torch.ones(shape), torch.ones(shape, dtype=torch.bool)
    for index, robot in enumerate(robots.of_dataset):
        if width := robots.widths[name].get(robot):
            of = statistics[robots.key(name, robot)]
            mean[index, :width], std[index, :width] = of.tensors()
            own[index, width:] = False
    return mean, std, own


def make_preprocessor(
    config: CoreConfig, tokenizer: Any, statistics: dict[str, Statistics], robots: Robots
) -> Preprocessor:
    """statistics: those of `Robots.statistics`, and of "latent" """
    if len(robots.names) < 2:
        return Preprocessor(config, tokenizer, statistics)
    return RobotsPreprocessor(config, tokenizer, statistics, robots)
