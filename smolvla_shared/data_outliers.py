"""What is unusual in the vectors of a dataset, though it can be trained on: outliers, and actions that never change."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smolvla_shared import data, data_values
from smolvla_shared.data_problems import place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smolvla_shared.data import RobotDataset

# Rows, evenly among all, from which the usual range of a vector is taken: 1% to 99% of them.
SAMPLE = 100_000
# A value so many usual ranges outside of it is named; so many, and it is a problem.
OUTLIER, IMPOSSIBLE = 10.0, 1000.0


@dataclass(frozen=True)
class Outlier:
    row: int
    dimension: int
    value: float
    ranges: float  # how many usual ranges it is outside of the usual range


@dataclass(frozen=True)
class Vector:
    """A vector feature as the report and the picture show it; arrays are [A]."""

    names: tuple[str, ...]
    all: data_values.Summary
    usual_low: np.ndarray
    usual_high: np.ndarray
    outliers: list[Outlier]  # the furthest of each dimension that has some


def look_at_vector(dataset: "RobotDataset", key: str) -> Vector:
    values = dataset.vector(key).reshape(dataset.num_frames, -1)
    sample = np.asarray(values[:: -(-len(values) // SAMPLE)], np.float64)
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(np.where(np.isfinite(sample), sample, np.nan), [0.01, 0.99], axis=0)
    summary, outliers = dataset.summaries.get(key) or data_values.summarize(values), []
    for dimension in np.flatnonzero(high > low).tolist():
        usual = high[dimension] - low[dimension]
        away = {"low": low[dimension] - summary.low[dimension], "high": summary.high[dimension] - high[dimension]}
        side = max(away, key=away.get)
        if away[side] > OUTLIER * usual:
            column = values[:, dimension]
            row = int(column.argmin() if side == "low" else column.argmax())
            outliers.append(Outlier(row, dimension, float(column[row]), float(away[side] / usual)))
    dataset.vectors[key].release()
    names = data.vector_names(dataset.features[key]) or tuple(map(str, range(values.shape[1])))
    return Vector(names, summary, low, high, outliers)


def outlier_text(dataset: "RobotDataset", key: str, vector: Vector, outlier: Outlier) -> str:
    at = outlier.dimension
    return (
        f"{place(dataset, outlier.row)} has {key} {outlier.value:.5g} in dimension {vector.names[at]}, of which 98% "
        f"are in {vector.usual_low[at]:.5g} to {vector.usual_high[at]:.5g}"
    )


def still_actions(dataset: "RobotDataset") -> list[str]:
    """A line if every action of a dataset is the same."""
    if data.ACTION_KEY not in dataset.features:
        return []
    rows = dataset.summaries.get(data.ACTION_KEY) or data_values.summarize(dataset.vector(data.ACTION_KEY))
    if not (rows.low == rows.high).all():
        return []
    values = ", ".join(f"{value:.4g}" for value in rows.low)
    return [f"every {data.ACTION_KEY} is {values}: a policy learns nothing from it, were the commands recorded?"]


def unusual(datasets: "Sequence[RobotDataset]", keys: list[str]) -> list[str]:
    """For the first lines of a run that reads these features: actions that never change, impossible outliers."""
    lines = []
    for dataset in datasets:
        if data.ACTION_KEY in keys:  # else nobody reads them, and they may hold anything
            lines += [f"{dataset.name}: {text}" for text in still_actions(dataset)]
        for key in keys:
            vector = look_at_vector(dataset, key) if key in dataset.features else None
            for outlier in vector.outliers if vector else ():
                if outlier.ranges > IMPOSSIBLE:
                    said = outlier_text(dataset, key, vector, outlier)
                    lines.append(f"{dataset.name}: {said}: it decides the statistics, leave the episode out")
    return lines
