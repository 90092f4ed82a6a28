"""What is wrong with the vectors and texts of a LeRobotDataset: with what a policy is trained on, one value at a time.

A problem is a text, as in data_problems.py. Vectors are asked for where their width is (robots.py), so that a
column that a run does not read may hold anything.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from smolvla_shared.data_columns import MEND, ROWS_AT_ONCE
from smolvla_shared.data_info import is_dtype, names_problem
from smolvla_shared.data_problems import differences, place, refuse
from smolvla_shared.refusals import read_json, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from smolvla_shared.data import RobotDataset

ACTION_KEYS = "action", "executed_action"
# No joint, gripper or velocity is recorded in a unit that makes it so large, whatever the robot.
ABSURD = 1e8
# Statistics further from the rows' are not the rows': the mean by this share of the deviation, the deviation by this
# factor. LeRobot's are exact for vectors, but those of older versions are of a sample of the rows.
MEAN_AWAY, STD_FACTOR = 0.25, 1.5
STATS = "meta/stats.json"
RECOMPUTE = (
    "the rows or the statistics were edited: record or convert the dataset again, or compute them anew "
    "(lerobot-edit-dataset --operation.type recompute_stats)"
)


@dataclass(frozen=True)
class Summary:
    """Of each dimension of a vector feature over all rows, [A] float64."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def summarize(values: np.ndarray, release: Callable[[], None] = lambda: None) -> Summary:  # [rows] or [rows, A]
    """Raises nothing for values that are not finite: what depends on them is NaN. release: of mapped columns."""
    shift = np.asarray(values[0], np.float64).reshape(-1)
    low, high = np.full(len(shift), np.inf), np.full(len(shift), -np.inf)
    sums, squares = np.zeros(len(shift)), np.zeros(len(shift))
    with np.errstate(all="ignore"):
        for start in range(0, len(values), ROWS_AT_ONCE):
            part = np.asarray(values[start : start + ROWS_AT_ONCE]).reshape(-1, len(shift))
            part = part.T.astype(np.float64, order="C")  # [A, rows]: numpy reduces along what is next to each other
            low, high = np.minimum(low, part.min(1)), np.maximum(high, part.max(1))
            part -= shift[:, None]
            sums, squares = sums + part.sum(1), squares + np.einsum("ar,ar->a", part, part)
            release()
        mean = sums / len(values)
        return Summary(low, high, mean + shift, np.sqrt(np.maximum(squares / len(values) - mean**2, 0)))


def refuse_vectors(datasets: "list[RobotDataset]", *keys: str) -> None:
    """Raise ValueError for a dataset that has one of these features, but with values that cannot be trained on."""
    for dataset in datasets:
        refuse(dataset, [problem for key in keys for problem in vector_problems(dataset, key)])


def vector_problems(dataset: "RobotDataset", key: str) -> list[str]:
    if key not in dataset.features:
        return []
    try:
        shape, values = dataset.features[key]["shape"], dataset.vector(key)
    except ValueError as error:
        return [str(error)]
    if len(shape) != 1:
        return [
            f"{key} has the shape {list(shape)}, a policy reads vectors: write its {int(np.prod(shape))} numbers as "
            "one dimension, in the rows and in meta/info.json"
        ]
    width = values.shape[1] if values.ndim > 1 else 1
    if width != shape[0]:
        return [f"{key} has {width} numbers in a row, meta/info.json says {shape[0]}: {MEND}"]
    if problem := names_problem(key, dataset.features[key]):
        return [problem]
    if key in ACTION_KEYS and values.dtype.kind not in "f":
        return [
            f"{key} is of type {values.dtype}, a policy learns real numbers: record them as float32, unless they "
            "number choices, which no policy of this kind learns"
        ]
    dtype = dataset.features[key]["dtype"]
    if not is_dtype(dtype) or (np.dtype(dtype).kind == "f") != (values.dtype.kind == "f"):
        return [
            f"{key} is of type {values.dtype} in the rows, {dtype} in meta/info.json, into which LeRobot would convert "
            "it: write the type of the rows there"
        ]
    rows = dataset.summaries[key] = summarize(values, dataset.vectors[key].release)
    is_sound = bool((np.abs([rows.low, rows.high]) <= ABSURD).all())  # NaN compares as false
    problems = list(statistics_problems(dataset, key, rows) if is_sound else value_problems(dataset, key, values))
    dataset.vectors[key].release()
    return problems


def value_problems(dataset: "RobotDataset", key: str, values: np.ndarray) -> Iterator[str]:
    def is_bad(rows: np.ndarray) -> np.ndarray:
        return ~(np.abs(values[rows]).reshape(len(rows), -1) <= ABSURD).all(1)  # NaN compares as false

    at, count = differences(dataset.vectors[key], is_bad)
    if at is not None:
        row = np.reshape(values[at], -1)
        (dimension, *_) = np.flatnonzero(~(np.abs(row) <= ABSURD)).tolist()
        yield (
            f"{place(dataset, at)} has {key} {row[dimension]:.6g} in dimension {dimension}, and {count} row(s) have "
            "such values: leave these episodes out (lerobot-edit-dataset --operation.type delete_episodes), or record "
            "them again"
        )


def read_statistics(dataset: "RobotDataset") -> dict[str, Any] | None:
    """meta/stats.json; None: there is none."""
    path = dataset.root / STATS
    return read_json(path) if os.path.lexists(path) else None


def fits_float(value: Any) -> bool:
    """Whether a JSON value is a number that float64 can hold; integers may have any number of digits."""
    return type(value) is float or (type(value) is int and abs(value) < 10**300)


def statistics_problems(dataset: "RobotDataset", key: str, rows: Summary) -> Iterator[str]:
    """What in meta/stats.json contradicts the rows. Where it has nothing, nothing contradicts: missing_statistics."""
    try:
        stats = (read_statistics(dataset) or {}).get(key)
    except ValueError as error:
        yield str(error)
        return
    if not isinstance(stats, dict):
        if stats is not None:
            yield f"{STATS}: {key} is {shown(stats)}, it should be an object: {RECOMPUTE}"
        return
    if (count := stats.get("count")) is not None:
        if not (isinstance(count, list) and len(count) == 1 and type(count[0]) is int and count[0] > 0):
            yield f"{STATS}: count of {key} is {shown(count)}, expected one number of rows: {RECOMPUTE}"
            return
        if count[0] > dataset.num_frames:
            yield (
                f"{STATS} is of {count[0]:,} rows of {key}, the dataset has {dataset.num_frames:,}: they were taken "
                f"out, or it is a part of a dataset that has kept the statistics of the whole; {RECOMPUTE}"
            )
            return
    found = {}
    for name in ("mean", "std", "min", "max"):
        if name not in stats:
            continue
        values = stats[name] if isinstance(stats[name], list) else [None]
        if len(values) != len(rows.mean) or not all(map(fits_float, values)):
            yield f"{STATS}: {name} of {key} is {shown(stats[name])}, expected {len(rows.mean)} numbers: {RECOMPUTE}"
            return
        found[name] = np.array(values, np.float64)
    if {"min", "max"} <= found.keys() and (found["min"] > found["max"]).any():
        yield f"{STATS}: min of {key} is above its max: {RECOMPUTE}"
    # A dimension that never changes has the deviation 0, or what rounding makes of it. LeRobot makes more of it: its
    # variance is the mean of float32 squares minus the mean's square (measured: 0.31% of the mean at most).
    scale = np.maximum(rows.std, 1e-4 * np.maximum(1, np.abs(rows.mean)))
    noise = (5e-3 * np.abs(rows.mean)) ** 2
    with np.errstate(all="ignore"):
        near = {
            "mean": lambda mean: np.abs(mean - rows.mean) <= MEAN_AWAY * scale,
            "std": lambda std: (
                (std >= 0)
                & (std**2 <= STD_FACTOR**2 * scale**2 + noise)
                & (std**2 >= rows.std**2 / STD_FACTOR**2 - noise)
            ),
            "min": lambda low: np.abs(low - rows.low) <= 10 * scale,
            "max": lambda high: np.abs(high - rows.high) <= 10 * scale,
        }
        for name, values in found.items():
            expected = {"mean": rows.mean, "std": rows.std, "min": rows.low, "max": rows.high}[name]
            bad = np.flatnonzero(~near[name](values)).tolist()
            if bad:
                yield (
                    f"{STATS} says that {key} has the {name} {values[bad[0]]:.6g} in dimension {bad[0]}, its rows have "
                    f"{expected[bad[0]]:.6g} ({len(bad)} dimension(s) differ): {RECOMPUTE}"
                )


def missing_statistics(dataset: "RobotDataset", keys: list[str]) -> list[str]:
    """What meta/stats.json lacks of these features. This project computes its own; LeRobot's training needs these."""
    try:
        stats = read_statistics(dataset)
    except ValueError as error:
        return [str(error)]
    if stats is None:
        return [f"{STATS} is missing, which LeRobot's own training reads: {RECOMPUTE}"]
    lacking = [
        f"{name} of {key}"
        for key in keys
        for name in ("mean", "std", "min", "max")
        if name not in (stats.get(key) or {})
    ]
    return [f"{STATS} has no {', '.join(lacking)}, which LeRobot's own training reads: {RECOMPUTE}"] if lacking else []


def sampled_statistics(dataset: "RobotDataset", keys: list[str]) -> list[str]:
    """A line if statistics are of fewer rows: LeRobot's older versions took a sample."""
    counts = {key: ((read_statistics(dataset) or {}).get(key) or {}).get("count") for key in keys}
    said = [f"{count[0]:,} of {key}" for key, count in counts.items() if count and count[0] < dataset.num_frames]
    rows = f"{dataset.num_frames:,} rows"
    return [f"{STATS} is not of all {rows}, but of {', '.join(said)}: a sample, or rows were added"] if said else []


def texts_cut(datasets: "Sequence[RobotDataset]", tokenizer: "PreTrainedTokenizerFast", max_tokens: int) -> list[str]:
    """A line for each dataset with task texts that are longer than what a model reads of them."""
    from smolvla_shared.preprocess import TextTokenizer

    whole, lines = TextTokenizer(tokenizer, 1 << 20), []
    for dataset in datasets:
        # A token is a byte or more, and a newline is added.
        long = [text for text in dataset.tasks if len(text.encode()) >= max_tokens]
        lengths = [int(whole([text])[1].sum()) for text in long]
        cut = {text: length for text, length in zip(long, lengths) if length > max_tokens}
        if cut:
            longest = max(cut, key=cut.get)
            lines.append(
                f"{dataset.name}: {len(cut)} of {len(dataset.tasks)} task texts are cut after {max_tokens} tokens, the "
                f"longest loses {cut[longest] - max_tokens} of {cut[longest]}: {shown(longest)}"
            )
    return lines


def without_text(datasets: "Sequence[RobotDataset]") -> list[str]:
    """A line for each dataset of which some frames have a task text and others an empty one, and for each with actions
    that has no text at all. Video without texts is as it was made.
    """
    lines = []
    for dataset in datasets:
        empty = [number for number, text in enumerate(dataset.tasks) if not text.strip()]
        if len(empty) == len(dataset.tasks) and ACTION_KEYS[0] in dataset.features:
            lines.append(f"{dataset.name}: every task text is empty, the policy is not told what to do")
        elif 0 < len(empty) < len(dataset.tasks):
            count = int(np.isin(dataset.frames["task_index"], empty).sum())
            lines.append(f"{dataset.name}: {count:,} of {dataset.num_frames:,} frames have an empty task text")
    return lines


def horizon_cost(datasets: "Sequence[RobotDataset]", horizon: int) -> list[str]:
    """A line for each dataset of whose latent actions in a row, from frames that have one, less than half is trained:
    those past an episode's end are masked.
    """
    lines = []
    for dataset in datasets if horizon > 1 else ():
        frames = dataset.episode_to - dataset.episode_from
        # From frame f of an episode, latent action m reaches to frame f + m * gap.
        trained = [np.maximum(0, frames - m * dataset.gap).sum() for m in range(1, horizon + 1)]
        if trained[0] and (share := sum(trained) / (horizon * trained[0])) < 0.5:
            lines.append(
                f"{dataset.name}: {horizon:,} latent actions in a row ({horizon * dataset.gap_s:.3g} s) reach past the "
                f"end of episodes of {np.median(frames):,.0f} frames: {share:.1%} of them are trained, the others cost "
                "time and memory (--latent-horizon)"
            )
    return lines


def chunk_cost(datasets: "Sequence[RobotDataset]", chunk_size: int) -> list[str]:
    """A line for each dataset of whose chunks less than half is trained: what is past an episode's end is masked."""
    lines = []
    for dataset in datasets if chunk_size else ():
        if ACTION_KEYS[0] not in dataset.features:
            continue
        frames = (dataset.episode_to - dataset.episode_from).astype(float)
        short = np.minimum(frames, chunk_size)
        # Of the chunks from an episode's frames, those from the last `short` ones have 1, 2, ... short actions.
        trained = short * (short + 1) / 2 + (frames - short) * chunk_size
        share = trained.sum() / (frames.sum() * chunk_size)
        if share < 0.5:
            lines.append(
                f"{dataset.name}: chunks of {chunk_size:,} actions ({chunk_size / dataset.fps:.3g} s) reach past the "
                f"end of episodes of {np.median(frames):,.0f} frames: {share:.1%} of their actions are trained, the "
                "others cost time and memory (--chunk-size)"
            )
    return lines
