"""Grounding: a teacher that sees a few labelled episodes beside its video learns which motion is the robot's.

A linear head reads the actions from the latent while both are trained (LAOM, arXiv 2502.00379). It is only for
training; the published teacher is a LAQ like any other, and its JSON file says what grounded it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolvla_shared import data, data_order, label_probe
from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import dataset_fingerprint
from smolvla_shared.config import DataConfig
from smolvla_shared.preprocess import Statistics


@dataclass(frozen=True)
class GroundingConfig:
    """A few labelled episodes that the teacher learns from beside its video. Optional: without datasets nothing is."""

    # Hub ids of labelled LeRobotDatasets (v3). Their executed actions are used where there are some, else the actions.
    repo_ids: tuple[str, ...] = ()
    # Local directories of labelled LeRobotDatasets (v3).
    roots: tuple[Path, ...] = ()
    # Labelled episodes of each dataset to use, the first ones; 0: all. What --val-fraction holds out is not used.
    episodes: int = 0
    # Weight of the squared error of the standardised actions beside the reconstruction's.
    weight: float = 0.1
    # Share of a batch that the labelled pairs get.
    share: float = 0.25

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"--grounding.share is a share of the batch in (0, 1), got {self.share}")
        if self.weight <= 0:
            raise ValueError(
                f"--grounding.weight must be above 0, got {self.weight}: to ground nothing, name no dataset"
            )

    def data_options(self, data: DataConfig) -> DataConfig | None:
        """The labelled datasets, read as the video is; None if there are none."""
        return replace(data, repo_ids=self.repo_ids, roots=self.roots) if self.repo_ids or self.roots else None


class Grounding:
    """The labelled datasets of a run, and the actions over the gap of every pair of them.

    first: place of the first of them among the run's datasets
    rows:  (dataset index, training rows) of each, in the run's numbering
    """

    def __init__(
        self, labelled: list[data.RobotDataset], first: int, config: GroundingConfig, val_fraction: float, seed: int
    ):
        self.config, self.rows, self.used, known = config, [], {}, {}
        for index, dataset in enumerate(labelled, start=first):
            if label_probe.action_key(dataset) is None:
                raise ValueError(f"--grounding: {dataset.name} has no actions, it has {sorted(dataset.features)}")
            end = dataset.episode_to[: config.episodes or None][-1]
            rows, _ = data_order.split_episodes(dataset, val_fraction, seed)
            rows = rows[rows < end]
            pairs = torch.from_numpy(dataset.rows_with_pairs(rows))
            mode, reason = label_probe.action_mode(dataset)
            known[index] = dataset, pairs, label_probe.actions_over_gap(dataset, pairs, mode)
            self.rows.append((index, rows))
            self.used[dataset.name] = {
                "fingerprint": dataset_fingerprint(dataset.lerobot.root),
                "episodes": sorted(set(np.searchsorted(dataset.episode_to, rows, side="right").tolist())),
                "actions": f"{label_probe.action_key(dataset)}, {mode} over the gap ({reason})",
            }
        statistics = Statistics.of(torch.cat([actions for *_, actions in known.values()]).float())
        mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
        self.action_dim = len(mean)
        self.actions = {}  # dataset index -> [N, A], standardised; NaN where a row has no pair
        for index, (dataset, pairs, actions) in known.items():
            self.actions[index] = torch.full((dataset.num_frames, self.action_dim), torch.nan)
            # A dimension that does not vary has nothing to tell.
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
        """What the teacher's JSON file records of it."""
        return {"weight": self.config.weight, "share": self.config.share, "datasets": self.used}
