"""A linear probe: how well latents predict the recorded motion between the two frames of a pair.

The recorded motion is the executed actions over the gap, and the displacement of the proprioceptive state.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smolvla_shared.data import ACTION_KEY, EXECUTED_ACTION_KEY, STATE_KEY, RobotDataset, vector_names
from smolvla_shared.teacher_config import ActionMode

# How the actions over a gap become one vector. sum: of velocities or deltas. change: of absolute positions.
DISPLACEMENT = "displacement of observation.state"
FOLDS = 5
# Added to the diagonal of the features' correlation matrix: enough that 128 collinear dimensions do not fit noise.
RIDGE = 1e-2
# Without a state, actions count as absolute positions if successive ones correlate more than this.
POSITION_CORRELATION = 0.995


# --- targets ----------------------------------------------------------------------------------------------------------


def action_key(dataset: RobotDataset) -> str | None:
    """The column of executed actions or, if there is none, of actions; None without either."""
    return next((key for key in (EXECUTED_ACTION_KEY, ACTION_KEY) if key in dataset.features), None)


def column(dataset: RobotDataset, key: str) -> Tensor:
    """A vector feature of all frames, [N, A] float64."""
    values = np.array(dataset.vector(key), np.float64)
    return torch.from_numpy(values).view(len(values), -1)


def dimension_names(dataset: RobotDataset, key: str) -> tuple[str, ...]:
    """Names of a vector feature's dimensions; their numbers if the dataset has no names."""
    return vector_names(dataset.features[key]) or tuple(map(str, range(dataset.vector_dim(key))))


def over_gap(values: Tensor, rows: Tensor, gap: int, mode: ActionMode) -> Tensor:  # [N, A], [n] -> [n, A]
    """Change of a vector from a pair's first to its second frame, or its sum over the frames before the second."""
    if mode == "sum":
        values = F.pad(values.cumsum(0), (0, 0, 1, 0))
    return values[rows + gap] - values[rows]


def displacements(dataset: RobotDataset, rows: Tensor) -> Tensor:  # [n] -> [n, A]
    return over_gap(column(dataset, STATE_KEY), rows, dataset.gap, "change")


def actions_over_gap(dataset: RobotDataset, rows: Tensor, mode: ActionMode) -> Tensor:  # [n] -> [n, A]
    """The actions (action_key) over the gap of each pair."""
    return over_gap(column(dataset, action_key(dataset)), rows, dataset.gap, mode)


def action_mode(dataset: RobotDataset) -> tuple[ActionMode, str]:
    """Whether a dataset's actions are velocities (`sum`) or absolute positions (`change`), and why, in words.

    If the displacement of the state explains the actions: the mode in which it explains them better. If not, or without
    a state: `change` if successive actions are nearly equal.
    """
    rows = torch.from_numpy(dataset.rows_with_pairs(dataset.rows()).numpy())
    episodes = torch.from_numpy(dataset.episode_of(rows.numpy()))
    if STATE_KEY in dataset.features:
        moved = displacements(dataset, rows)
        explained = {m: mean_r2(moved, actions_over_gap(dataset, rows, m), episodes) for m in ("sum", "change")}
        if max(explained.values()) > 0.1:
            reason = f"the displacement explains {explained['sum']:.2f} of sums, {explained['change']:.2f} of changes"
            return max(explained, key=explained.get), reason
    actions = column(dataset, action_key(dataset))
    inside = np.setdiff1d(np.arange(1, dataset.num_frames), dataset.episode_from)
    before, now = actions[inside - 1], actions[inside]
    correlation = torch.stack([torch.corrcoef(torch.stack(both))[0, 1] for both in zip(before.T, now.T)])
    median = correlation[~correlation.isnan()].median().item()
    return ("change" if median > POSITION_CORRELATION else "sum"), f"an action and the next correlate by {median:.3f}"


# --- the fit ----------------------------------------------------------------------------------------------------------


@dataclass
class Ridge:
    """A linear map with an offset, fitted by ridge regression on standardised features."""

    weights: Tensor  # [F, A]
    offset: Tensor  # [A]

    @classmethod
    def fit(cls, features: Tensor, targets: Tensor, penalty: float = RIDGE) -> "Ridge":  # [N, F], [N, A]
        x, y = features.double(), targets.double()
        scale = x.std(0)
        scale[scale <= 1e-6 * scale.max()] = torch.inf  # a constant feature gets no weight
        mean_x, mean_y = x.mean(0), y.mean(0)
        x = (x - mean_x) / scale
        gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ (y - mean_y)) / scale[:, None]
        return cls(weights, mean_y - mean_x @ weights)

    def __call__(self, features: Tensor) -> Tensor:  # [..., F] -> [..., A]
        return features.to(self.weights) @ self.weights + self.offset


def out_of_fold(features: Tensor, targets: Tensor, episodes: Tensor, penalty: float = RIDGE) -> Tensor | None:
    """Ridge predictions of `targets` [N, A] from `features` [N, F], each by a fit that has not seen its episode.

    None if there are fewer than two episodes.
    """
    names = episodes.unique()
    if len(names) < 2:
        return None
    fold_of = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)) % FOLDS
    fold = fold_of[torch.searchsorted(names, episodes)]
    predicted = torch.empty_like(targets, dtype=torch.float64)
    for held_out in fold.unique():
        train, test = fold != held_out, fold == held_out
        predicted[test] = Ridge.fit(features[train], targets[train], penalty)(features[test])
    return predicted


def r2(predicted: Tensor, targets: Tensor) -> list[float | None]:  # [N, A] -> A
    """Share of each dimension's variance that is predicted; None for a dimension that does not vary."""
    targets = targets.double()
    error, total = (predicted - targets).square().sum(0), (targets - targets.mean(0)).square().sum(0)
    return [1 - (e / t).item() if t > 1e-12 * len(targets) else None for e, t in zip(error, total)]


def probe(latents: Tensor, targets: Tensor, episodes: Tensor, penalty: float = RIDGE) -> list[float | None] | None:
    """R² of each target dimension from the latents, out of fold, over the pairs whose target is known (not NaN).

    None if these pairs are from fewer than two episodes.
    """
    known = ~targets.isnan().any(1)
    measurable = known.any() and targets.shape[1]
    predicted = out_of_fold(latents[known], targets[known], episodes[known], penalty) if measurable else None
    return None if predicted is None else r2(predicted, targets[known])


def mean_r2(latents: Tensor, targets: Tensor, episodes: Tensor) -> float:
    """Mean of the probe over the dimensions that vary; 0 if none varies or there is only one episode."""
    values = [value for value in probe(latents, targets, episodes) or [] if value is not None]
    return sum(values) / len(values) if values else 0.0
