"""Write latent actions that no teacher gave into a label cache: control arms of an experiment.

    python examples/relabel.py --kind executed --data.roots data/video --data.frame-gap-s 0.2 --slots 4 \
        --label-cache labels/executed
    python examples/relabel.py --kind shuffled --data.roots data/video --data.frame-gap-s 0.05 \
        --source-cache labels/laq --label-cache labels/shuffled

`executed` is what a perfect teacher would say: the actions that the robot executed between the two frames. `shuffled`
is what a useless one would: the latent actions of another cache, each given to another frame of the same dataset.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from smolvla_shared.command import run_command
from smolvla_shared.config import DataConfig, TeacherKind

if TYPE_CHECKING:
    from smolvla_shared.data import RobotDataset


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """Write latent actions that no teacher gave into a label cache."""

    # `executed`: the executed actions, as continuous latents. `shuffled`: those of --source-cache in a random order.
    kind: Literal["executed", "shuffled"]
    # Which recordings, and which pairs of their frames.
    data: DataConfig
    # Directory of the new label cache.
    label_cache: Path
    # The label cache whose latent actions are shuffled.
    source_cache: Path | None = None
    # Which latents the source cache holds.
    teacher_kind: TeacherKind = "quantized"
    # Equal parts that the gap between the two frames is divided into; a slot has the mean action of its part.
    slots: int = 1
    # The random order is a function of it.
    seed: int = 0

    def __post_init__(self):
        if (self.kind == "shuffled") != (self.source_cache is not None):
            raise ValueError("--kind shuffled and --source-cache belong together")


def executed_latents(executed: np.ndarray, rows: np.ndarray, gap: int, slots: int) -> np.ndarray:
    """The mean executed action [len(rows), slots, A] of each part of the gap after each row.

    executed: [frames, A], the action of a row leads to the next row's frame
    """
    if gap % slots:
        raise ValueError(f"--slots {slots} do not divide a gap of {gap} frames into equal parts")
    part = gap // slots
    steps = executed[rows[:, None] + np.arange(gap)]  # [len(rows), gap, A]
    return steps.reshape(len(rows), slots, part, -1).mean(2).astype(np.float32)


def main(config: RelabelConfig) -> None:
    from smolvla_shared import data, data_views
    from smolvla_shared.label_cache import grounding_of, label_stores, read_codebook, write_codebook

    datasets = data.open_datasets(config.data)
    _, cameras = data_views.choose_cameras(datasets, config.data)
    if config.source_cache:
        kind = config.teacher_kind
        sources = label_stores(config.source_cache, datasets, None, kind, cameras)
        for source in sources:
            source.open()
        teacher = f"{sources[0].key['teacher_id']}, shuffled with seed {config.seed}"
        grounding = grounding_of(sources[0])
    else:
        kind, sources = "continuous", [None] * len(datasets)
        teacher, grounding = f"executed actions, {config.slots} slots", None
    stores = label_stores(config.label_cache, datasets, teacher, kind, cameras, grounding)
    for dataset, source, store in zip(datasets, sources, stores, strict=True):
        rows = dataset.rows_with_pairs(dataset.rows()).numpy()
        if source is None:
            latents = torch.from_numpy(executed_latents(executed_actions(dataset), rows, dataset.gap, config.slots))
            labels = torch.zeros(dataset.num_frames, *latents.shape[1:])
            labels[rows] = latents
            codebook = torch.zeros(1, latents.shape[-1])
        else:
            labels = torch.stack([source[row] for row in range(dataset.num_frames)])
            labels[rows] = labels[np.random.default_rng(config.seed).permutation(rows)]
            codebook = read_codebook(source)
        store.claim()
        write_codebook(store, codebook)
        for shard in store.missing():
            store.write(shard, labels[shard.start : shard.stop].clone())
        store.release()
        print(f"{store.directory}: {len(rows):,} of {dataset.num_frames:,} frames, {config.kind}")


def executed_actions(dataset: "RobotDataset") -> np.ndarray:  # [frames, A]
    """The column of executed actions or, if there is none, of actions."""
    from smolvla_shared.label_probe import action_key, column

    if (key := action_key(dataset)) is None:
        raise ValueError(f"{dataset.name} has no actions, it has {sorted(dataset.features)}")
    return column(dataset, key).numpy()


if __name__ == "__main__":
    run_command(main, RelabelConfig)
