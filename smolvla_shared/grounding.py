"""Grounding: a few labelled episodes beside the video teach the teacher which motion is the robot's.

A linear head learns to predict the actions from the latent, together with the teacher (LAOM, arXiv 2502.00379). The
published teacher is a LAQ without this head; its JSON file records the labelled episodes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvla_shared import data, data_split, label_probe, ranges
from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import dataset_fingerprint
from smolvla_shared.config import DataConfig
from smolvla_shared.data_rows import Rows
from smolvla_shared.preprocess import Statistics


@dataclass(frozen=True)
class GroundingConfig:
    """A few labelled episodes that the teacher learns from beside its video. Without datasets there is no grounding."""

    # Hub ids of labelled LeRobotDatasets (v3). The column executed_action is used or, if there is none, action.
    repo_ids: tuple[str, ...] = ()
    # Local directories of labelled LeRobotDatasets (v3).
    roots: tuple[Path, ...] = ()
    # Use the first this many episodes of each dataset; 0: all. Episodes that --val-fraction holds out are not used.
    episodes: ranges.CountOrNone = 0
    # Weight of the standardised actions' squared error in the loss. The reconstruction has weight 1.
    weight: ranges.Positive = 0.1
    # Share of labelled pairs in a batch.
    share: ranges.ShareOfSome = 0.25

    def __post_init__(self):
        ranges.check(self, "--grounding.")
        is_there, unused = bool(self.repo_ids or self.roots), "episodes weight share"
        ranges.refuse_without(self, is_there, "--grounding.repo-ids or --grounding.roots", unused, "--grounding.")

    def data_options(self, data: DataConfig) -> DataConfig | None:
        """The video's data options, but with the labelled datasets; None if there are none."""
        named = {"repo_ids": self.repo_ids, "roots": self.roots, "mixture": None, "weights": ()}
        return replace(data, **named) if self.repo_ids or self.roots else None


class Grounding:
    """The actions over the gap of every training pair of the labelled datasets.

    first: index of the first labelled dataset in the run
    rows:  (dataset index in the run, training rows) of each labelled dataset

    Raises ValueError for a dataset without actions.
    """

    def __init__(
        self, labelled: list[data.RobotDataset], first: int, config: GroundingConfig, val_fraction: float, seed: int
    ):
        self.config, self.rows, self.used, known = config, [], {}, {}
        for index, dataset in enumerate(labelled, start=first):
            if label_probe.action_key(dataset) is None:
                raise ValueError(f"--grounding: {dataset.name} has no actions, it has {sorted(dataset.features)}")
            end = dataset.episode_to[: config.episodes or None][-1]
            rows, _ = data_split.split_episodes(dataset, val_fraction, seed)
            some = rows.end <= end
            rows = dataset.rows_with_pairs(Rows(rows.start[some], rows.end[some]))
            pairs = torch.from_numpy(rows.numpy())
            mode, reason = label_probe.action_mode(dataset)
            known[index] = dataset, pairs, label_probe.actions_over_gap(dataset, pairs, mode)
            self.rows.append((index, rows))
            self.used[dataset.name] = {
                "fingerprint": dataset_fingerprint(dataset.root),
                "episodes": dataset.episode_of(rows.start).tolist(),
                "actions": f"{label_probe.action_key(dataset)}, {mode} over the gap ({reason})",
            }
        statistics = Statistics.of(torch.cat([actions for *_, actions in known.values()]).float())
        mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
        self.action_dim = len(mean)
        self.actions = {}  # dataset index -> [N, A], standardised; NaN where a row has no pair
        for index, (dataset, pairs, actions) in known.items():
            self.actions[index] = torch.full((dataset.num_frames, self.action_dim), torch.nan)
            # Without a floor, a constant dimension would become rounding noise.
            self.actions[index][pairs] = (actions.float() - mean) / std.clamp(min=1e-3 * std.max())

    def __call__(self, raw: RawBatch) -> Tensor:  # [B, A]
        """The standardised actions over the gap of each pair; NaN for a pair of the video."""
        unknown = torch.full((self.action_dim,), torch.nan)
        rows = [self.actions[d][row] if d in self.actions else unknown for d, row in zip(raw.dataset, raw.row)]
        return torch.stack(rows).to(raw.pairs.device)

    def __str__(self) -> str:
        named = [f"{len(used['episodes'])} episodes of {name} ({used['actions']})" for name, used in self.used.items()]
        return f"grounded by {', '.join(named)}"

    @property
    def source(self) -> dict[str, Any]:
        """What the teacher's JSON file records of the grounding."""
        return {"weight": self.config.weight, "share": self.config.share, "datasets": self.used}
