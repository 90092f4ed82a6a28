"""What is a robot's own in a run: widths and statistics of its state and of its actions.

A mixture file says which robot a dataset is of. Datasets of one robot share its widths and statistics; those of a run
that names no robot count as one robot's. A model has the widest robot's state and actions, the others' are padded: a
padded dimension carries nothing, and no loss counts it. robot_preprocessor.py normalises a batch of several robots.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from smolvla_shared import data_values
from smolvla_shared.action_config import ActionOptions
from smolvla_shared.config import ACTION, CoreConfig, NormalizationMode
from smolvla_shared.data import ACTION_KEY, STATE_KEY, RobotDataset, vector_names
from smolvla_shared.data_columns import ROWS_AT_ONCE
from smolvla_shared.data_rows import Rows
from smolvla_shared.relative_actions import Relative

if TYPE_CHECKING:
    from smolvla_shared.normalization import Statistics

KEYS = {"state": STATE_KEY, ACTION: ACTION_KEY}
QUANTILES = 0.01, 0.99
Robot = str | None  # a robot's name; None: of the datasets of a run that names no robot


@dataclass(frozen=True)
class Robots:
    """The robots of a run.

    of_dataset: the robot of each dataset of the run; None, too, for a dataset that has neither state nor actions
    widths:     of "state" and "action", as far as the run reads them: each robot's width
    relative:   the relative actions; None: all are as recorded
    """

    of_dataset: tuple[Robot, ...]
    widths: dict[str, dict[Robot, int]]
    relative: Relative | None = None

    @classmethod
    def find(
        cls,
        datasets: list[RobotDataset],
        targets: Collection[str],
        use_state: bool = True,
        num_labelled: int | None = None,
        of_one_robot: str = "",
        options: ActionOptions | None = None,
    ) -> "Robots":
        """The robots whose state is read, and whose actions if they are a target. Hidden actions are not.

        num_labelled: so many datasets, the first, are demonstrations; without a state in one of them none is read.
                      Default: all
        of_one_robot: an option that was given and does not go with several robots
        options:      of the demonstrations' actions

        Raises ValueError for several robots beside such an option, for a dataset that leaves its robot open where
        others name theirs, for datasets of one robot that differ in width or in names, for values that cannot be
        trained on (data_values.py), and for actions that cannot be relative (relative_actions.py).
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
        for key in keys.values():
            refuse_names(datasets, robots, key)
        found = cls(robots, widths)
        if len(found.names) > 1 and of_one_robot:
            names = ", ".join(map(str, found.names))
            raise ValueError(
                f"{of_one_robot} is of one robot, the datasets are of {names}: leave it out, or train on one robot"
            )
        if options is None or not options.relative_actions:
            return found
        return replace(found, relative=Relative.find(options, datasets[:num_labelled]))

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
        self,
        datasets: list[RobotDataset],
        rows_of: list[tuple[int, Rows]],
        num_labelled: int | None = None,
        mode: NormalizationMode = "mean_std",
    ) -> "dict[str, Statistics]":
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
                relative = self.relative if name == ACTION else None
                about = datasets, KEYS[name], labelled or of_robot, mode, relative
                found[self.key(name, robot)] = vector_statistics(*about)
        return found

    def statistics_of(self, robot: Robot, statistics: "dict[str, Statistics]") -> "dict[str, Statistics]":
        """One robot's, by "state" and "action"."""
        return {name: statistics[self.key(name, robot)] for name in self.widths if robot in self.widths[name]}


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


def refuse_names(datasets: list[RobotDataset], robots: tuple[Robot, ...], key: str) -> None:
    """Raise ValueError for datasets of one robot that name the dimensions of a vector feature differently: the angles
    of joints and the pose of a hand may be of one width, and would share their statistics. Names in another order are
    other names. A dataset without names, or with one for the whole vector, goes with any.
    """
    first: dict[Robot, RobotDataset] = {}  # the first dataset of each robot that has names
    for dataset, robot in zip(datasets, robots, strict=True):
        names = vector_names(dataset.features[key]) if key in dataset.features else None
        if names is None:
            continue
        known = first.setdefault(robot, dataset)
        others = vector_names(known.features[key])
        if names != others:
            are = f"are of the robot {robot}" if robot else "count as one robot's"
            fix = ", or pass --model.no-use-state" * (key == STATE_KEY)
            raise ValueError(
                f"{known.name} and {dataset.name} {are}, but name the numbers of {key} differently: "
                f"{', '.join(others)}, and {', '.join(names)}. Give each a `robot` of its own in --data.mixture, or "
                f"--video-mixture; if they mean the same in one order, rename them in meta/info.json{fix}"
            )


def vector_statistics(
    datasets: list[RobotDataset],
    key: str,
    rows_of: list[tuple[int, Rows]] | None = None,
    mode: NormalizationMode = "mean_std",
    relative: Relative | None = None,
) -> "Statistics":
    """The statistics of a mode over the frames of (dataset index, rows) whose dataset has the feature; default: all.

    A dimension that never changes gets the deviation 1: divided by 0, a later change of 0.01 would be 1e6 to the model.
    A dimension whose quantiles are equal, such as of a gripper that is hardly ever closed, gets the mean minus and plus
    the deviation for them.

    relative: of actions that are relative; their statistics are over chunks
    """
    from smolvla_shared.normalization import of_mode

    rows_of = rows_of or [(index, dataset.rows()) for index, dataset in enumerate(datasets)]
    rows_of = [(index, rows) for index, rows in rows_of if key in datasets[index].features]
    chunks = relative.chunks(datasets, rows_of) if relative else None
    about = datasets, key, rows_of
    mean, deviation = (chunks.mean(0), chunks.std(0)) if relative else mean_and_deviation(*about)
    still = 1e-6 * np.maximum(1, np.abs(mean))
    deviation[deviation <= still] = 1
    found = {"mean": mean, "std": deviation}
    if mode == "quantiles":
        q01, q99 = np.quantile(chunks, QUANTILES, axis=0) if relative else quantiles(*about)
        equal = q99 - q01 <= still
        found |= {"q01": np.where(equal, mean - deviation, q01), "q99": np.where(equal, mean + deviation, q99)}
    return of_mode(mode, {name: values.tolist() for name, values in found.items()})


def mean_and_deviation(
    datasets: list[RobotDataset], key: str, rows_of: list[tuple[int, Rows]]
) -> tuple[np.ndarray, np.ndarray]:  # [A] float64 each
    count, mean, squares = 0, np.zeros(()), np.zeros(())  # squares: summed squared distances from the mean
    for index, rows in rows_of:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            places = np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))
            values = np.asarray(datasets[index].vector(key)[rows[places]], np.float64).reshape(len(places), -1)
            shift, share = values.mean(0) - mean, len(places) / (count + len(places))
            squares = squares + values.var(0) * len(places) + shift**2 * count * share  # Chan et al., 1979
            mean, count = mean + shift * share, count + len(places)
    return mean, np.sqrt(squares / count)


def quantiles(datasets: list[RobotDataset], key: str, rows_of: list[tuple[int, Rows]]) -> np.ndarray:
    """The quantiles 0.01 and 0.99 of each dimension, [2, A] float64, exact. One dimension at a time is in memory."""
    vectors = {index: datasets[index].vector(key).reshape(datasets[index].num_frames, -1) for index, _ in rows_of}
    ranges = [(vectors[index], *range_) for index, rows in rows_of for range_ in zip(rows.start, rows.end)]
    found = []
    for dimension in range(ranges[0][0].shape[1]):
        values = np.concatenate([vector[start:end, dimension] for vector, start, end in ranges])
        found.append(np.quantile(values, QUANTILES, overwrite_input=True))
    return np.stack(found, axis=1)
