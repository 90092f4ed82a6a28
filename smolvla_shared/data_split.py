"""Which episodes are held out, and how the rest of the datasets is mixed."""

import math
from collections.abc import Mapping

import numpy as np

from smolvla_shared import ranges
from smolvla_shared.config import RunConfig, StageOptions
from smolvla_shared.data import RobotDataset, with_pairs
from smolvla_shared.data_rows import RowGroup, Rows, group_rows

# Where --val-fraction is left out: this share of a dataset is held out, but nothing of one with fewer episodes.
VAL_FRACTION, FEWEST_EPISODES = 0.05, 20


def split_episodes(
    dataset: RobotDataset,
    val_fraction: float | None,
    seed: int,
    max_episodes: int | None = None,
    episodes: tuple[int, ...] = (),
) -> tuple[Rows, Rows]:
    """Training and held-out rows of a dataset. Whole episodes are held out, drawn at random with the seed.

    val_fraction: share of the episodes; None: VAL_FRACTION, but nothing of fewer than FEWEST_EPISODES
    max_episodes: so many of the other episodes are for training, the first in the same random order; default: all
    episodes:     only these are read, for training or held out; default: all

    Raises ValueError if there are too few episodes, and for the number of one that does not exist.
    """
    refuse_unknown(dataset, episodes)
    chosen = np.sort(episodes) if episodes else np.arange(len(dataset.episode_from))
    num_episodes = len(chosen)
    if val_fraction is None:
        val_fraction = VAL_FRACTION if num_episodes >= FEWEST_EPISODES else 0
    num_val = max(1, round(val_fraction * num_episodes)) if val_fraction else 0
    if num_val >= num_episodes:
        of, more = (" of --data.episodes", "name") if episodes else ("", "record")
        raise ValueError(
            f"{dataset.name} has {num_episodes} episode(s){of}, too few to hold out a share of {val_fraction}: "
            f"{more} more, or pass --val-fraction 0"
        )
    if max_episodes and max_episodes > num_episodes - num_val:
        raise ValueError(
            f"--data.max-episodes {max_episodes}: {dataset.name} has {num_episodes - num_val} episode(s) to train on, "
            f"and {num_val} held out (--val-fraction {val_fraction}): pass a smaller number, or leave it out"
        )
    order = chosen[np.random.default_rng([seed, num_episodes]).permutation(num_episodes)]

    def rows(numbers: np.ndarray) -> Rows:
        numbers = np.sort(numbers)
        return Rows(dataset.episode_from[numbers], dataset.episode_to[numbers])

    return rows(order[num_val:][:max_episodes]), rows(order[:num_val])


def refuse_unknown(dataset: RobotDataset, episodes: tuple[int, ...]) -> None:
    """Raise ValueError for numbers of episodes that the dataset does not have."""
    last = len(dataset.episode_from) - 1
    if unknown := [number for number in episodes if number > last]:
        raise ValueError(
            f"--data.episodes {' '.join(map(str, episodes))}: {dataset.name} has the episodes 0 to {last}, not "
            f"{', '.join(map(str, unknown))}: leave these out"
        )


def split_datasets(
    datasets: list[RobotDataset],
    val_fraction: float | None,
    seed: int,
    max_episodes: int | None = None,
    episodes: tuple[int, ...] = (),
) -> tuple[list[tuple[int, Rows]], list[tuple[int, Rows]]]:
    """Training and held-out rows of all datasets (split_episodes), each as a list of (dataset index, rows)."""
    splits = [split_episodes(dataset, val_fraction, seed, max_episodes, episodes) for dataset in datasets]
    train = [(index, rows) for index, (rows, _) in enumerate(splits)]
    held_out = [(index, rows) for index, (_, rows) in enumerate(splits) if len(rows)]
    return train, held_out


def unused_evaluation(config: RunConfig, held_out: list[RowGroup]) -> str:
    """A line if options of evaluation are stated, and nothing is held out because all datasets are small."""
    options = ranges.stated(config, "eval_every eval_samples")
    if held_out or config.val_fraction is not None or not options:
        return ""
    return (
        f"{options} has no effect: nothing is held out, since without --val-fraction datasets of fewer than "
        f"{FEWEST_EPISODES} episodes are trained on as a whole"
    )


def weights_of(datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]], balance: str) -> dict[int, float]:
    """The weight of each of these datasets, by its index: its own, or that of --data.balance.

    {}: every frame counts the same
    """
    own = {index: datasets[index].entry.weight for index, _ in rows_of}
    if any(own.values()):
        return own
    return {index: math.sqrt(len(rows)) for index, rows in rows_of} if balance == "sqrt" else {}


def weighted(
    rows_of: list[tuple[int, Rows]], weights: Mapping[int, float] | None = None, share: float = 1.0
) -> list[RowGroup]:
    """A list of (dataset index, rows) as groups that take this share of a batch together.

    weights: of each dataset, by its index; {} or None: one group, in which every frame counts the same
    """
    if not (weights and rows_of):
        return group_rows(rows_of, share)
    total = sum(weights[index] for index, _ in rows_of)
    return [group for index, rows in rows_of for group in group_rows([(index, rows)], share * weights[index] / total)]


def balanced(datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]], balance: str) -> list[RowGroup]:
    """A list of (dataset index, rows) as groups, with the weights of `weights_of`."""
    return weighted(rows_of, weights_of(datasets, rows_of, balance))


def mix(
    labelled: list,
    video: list,
    video_share: float,
    weights: Mapping[int, float] | None = None,
    video_weights: Mapping[int, float] | None = None,
) -> list[RowGroup]:
    """Two lists of (dataset index, rows), labelled ones and video, as groups; each with weights as in `weighted`."""
    return weighted(labelled, weights, 1 - video_share if video else 1) + weighted(video, video_weights, video_share)


def split_with_video(
    datasets: list[RobotDataset], num_labelled: int, config: StageOptions, video_share: float
) -> tuple[list[tuple[int, Rows]], list[RowGroup], list[RowGroup]]:
    """Training rows of all datasets; their mixture; held-out rows of the labelled datasets, which come first.

    Raises ValueError for video of which no frame has a pair, for fewer labelled episodes than --data.max-episodes, and
    for those of --data.episodes that do not exist.
    """
    chosen = config.data.max_episodes, config.data.episodes
    labelled, held_out = split_datasets(datasets[:num_labelled], config.val_fraction, config.seed, *chosen)
    video, _ = split_datasets(datasets[num_labelled:], config.val_fraction, config.seed)
    video = [(num_labelled + index, rows) for index, rows in video]
    # A frame of video without a pair teaches nothing.
    paired = with_pairs(datasets, video)
    weights = [weights_of(datasets, rows_of, config.data.balance) for rows_of in (labelled, paired)]
    mixture = mix(labelled, paired, video_share, *weights)
    return labelled + video, mixture, group_rows(held_out)
