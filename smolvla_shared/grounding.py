"""Grounding: a few labelled episodes beside the video teach the teacher which motion is the robot's.

A linear head learns to predict the actions from the latent, together with the teacher (LAOM, arXiv 2502.00379). The
published teacher is a LAQ without this head; its JSON file records the labelled episodes.
"""

from typing import Any

import torch
from torch import Tensor

from smolvla_shared import data, data_split, data_values, label_probe
from smolvla_shared.batch import RawBatch
from smolvla_shared.data_rows import Rows
from smolvla_shared.hashes import dataset_fingerprint
from smolvla_shared.normalization import Statistics
from smolvla_shared.teacher_config import ActionMode, GroundingConfig


class Grounding:
    """The actions over the gap of every training pair of the labelled datasets.

    first: index of the first labelled dataset in the run
    rows:  (dataset index in the run, training rows) of each labelled dataset

    Raises ValueError for a dataset without actions, and for datasets whose actions are unlike.
    """

    def __init__(
        self,
        labelled: list[data.RobotDataset],
        first: int,
        config: GroundingConfig,
        val_fraction: float | None,
        seed: int,
    ):
        self.config, self.rows, self.used, known, kinds = config, [], {}, {}, {}
        for index, dataset in enumerate(labelled, start=first):
            if label_probe.action_key(dataset) is None:
                raise ValueError(f"--grounding: {dataset.name} has no actions, it has {sorted(dataset.features)}")
            data_values.refuse_vectors([dataset], data.STATE_KEY, label_probe.action_key(dataset))
            end = dataset.episode_to[: config.episodes or None][-1]
            rows, _ = data_split.split_episodes(dataset, val_fraction, seed)
            some = rows.end <= end
            rows = dataset.rows_with_pairs(Rows(rows.start[some], rows.end[some]))
            pairs = torch.from_numpy(rows.numpy())
            mode, reason = label_probe.action_mode(dataset)
            kinds[dataset.name] = dataset.vector_dim(label_probe.action_key(dataset)), mode, reason
            refuse_unlike(kinds)
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


def refuse_unlike(kinds: dict[str, tuple[int, ActionMode, str]]) -> None:
    """Raise ValueError unless the actions of the last dataset are as those of the first: of one width, and sums or
    changes. One head learns all, standardised by one mean and deviation.

    kinds: width, mode and the mode's reason (label_probe.action_mode) by the dataset's name
    """
    names = [*kinds]
    first, last = names[0], names[-1]
    if kinds[first][:2] != kinds[last][:2]:
        said = [
            f"  {name}: {kinds[name][0]} dimensions, their {kinds[name][1]} over the gap ({kinds[name][2]})"
            for name in (first, last)
        ]
        title, fix = "--grounding: one head cannot learn actions of two kinds:", "Name datasets of one kind"
        raise ValueError("\n".join([title, *said, fix]))
