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
from typing import Literal

import numpy as np
import tyro

from smolvla_shared.config import DataConfig, TeacherKind


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
    from smolvla_shared import data
    from smolvla_shared.label_cache import cached_teacher_id, label_directories, label_key, label_store

    datasets = data.open_datasets(config.data)
    _, camera = data.choose_cameras(datasets, config.data)
    names = [dataset.name for dataset in datasets]
    sources = label_directories(config.source_cache, names) if config.source_cache else [None] * len(names)
    for dataset, source, directory in zip(datasets, sources, label_directories(config.label_cache, names), strict=True):
        rows = dataset.rows_with_pairs(np.arange(dataset.num_frames))
        if source is None:
            if data.EXECUTED_ACTION_KEY not in dataset.features:
                raise ValueError(
                    f"{dataset.name} has no column {data.EXECUTED_ACTION_KEY}: record it with --kind labelled"
                )
            column = dataset.lerobot.hf_dataset.select_columns([data.EXECUTED_ACTION_KEY]).with_format("numpy")
            latents = executed_latents(column[:][data.EXECUTED_ACTION_KEY], rows, dataset.gap, config.slots)
            arrays = {
                "indices": np.zeros((dataset.num_frames, config.slots), np.uint8),
                "continuous": np.zeros((dataset.num_frames, *latents.shape[1:]), np.float32),
            }
            arrays["continuous"][rows] = latents
            codebook = np.zeros((1, latents.shape[-1]), np.float32)
            key = label_key(dataset, f"executed actions, {config.slots} slots", "continuous", camera)
        else:
            teacher = cached_teacher_id(source)
            found = label_store(source, label_key(dataset, teacher, config.teacher_kind, camera), dataset.num_frames)
            arrays = {name: np.array(array) for name, array in found.open().items() if name != "mask"}
            order = np.random.default_rng(config.seed).permutation(rows)
            for array in arrays.values():
                array[rows] = array[order]
            codebook = np.load(source / "codebook.npy")
            key = label_key(dataset, f"{teacher}, shuffled with seed {config.seed}", config.teacher_kind, camera)
        arrays["mask"] = np.isin(np.arange(dataset.num_frames), rows)
        store = label_store(directory, key, dataset.num_frames)
        store.claim()
        np.save(directory / "codebook.npy", codebook)
        for shard in store.missing():
            store.write(shard, {name: array[shard.start : shard.stop] for name, array in arrays.items()})
        store.finish()
        print(f"{directory}: {len(rows):,} of {dataset.num_frames:,} frames, {config.kind}")


if __name__ == "__main__":
    main(tyro.cli(RelabelConfig))
