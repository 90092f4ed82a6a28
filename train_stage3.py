"""Stage 3: train the action head, and what --model.freeze-* leaves trainable, on labelled demonstrations.

    accelerate launch train_stage3.py --stage2-artifact runs/s2/artifacts/smolvla_shared_stage2_artifact.safetensors \
        --data.repo-ids my/teleop --run-dir runs/s3
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from smolvla_shared.config import ACTION, LATENT, RunConfig, StageOptions

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from smolvla_shared.config import CoreConfig
    from smolvla_shared.data import RobotDataset
    from smolvla_shared.data_order import RowGroup
    from smolvla_shared.initial import InitialWeights
    from smolvla_shared.preprocess import Statistics


@dataclass(frozen=True, kw_only=True)
class Stage3Config(StageOptions, RunConfig):
    """Train the policy on action chunks, from a Stage 2 artifact, a policy, or the trunk's own weights."""

    # Weights file (.safetensors) of the Stage 2 artifact to start from. Without it and without --init-from, training
    # starts from the trunk's own weights: the scratch arm.
    stage2_artifact: Path | None = None
    # Actions in a chunk, which the policy predicts at once.
    chunk_size: int = 50
    # Actions executed of each chunk before the next chunk is predicted; saved with the policy.
    n_action_steps: int = 10
    # Statistics that normalise state and action. data: those of the labelled datasets. artifact: those of the artifact
    # or policy to start from.
    normalization: Literal["data", "artifact"] = "data"
    # Weight of the latent loss, added to the action loss; 0: the latent head is not trained.
    latent_loss_weight: float = 0.0
    # Co-training: local directories of datasets without actions, which train the latent head only.
    video_roots: tuple[Path, ...] = ()
    # Co-training: hub ids of datasets without actions, which train the latent head only.
    video_repo_ids: tuple[str, ...] = ()
    # Co-training: share of each batch that is read from the datasets without actions.
    video_share: float = 0.5

    def __post_init__(self):
        RunConfig.__post_init__(self)
        StageOptions.__post_init__(self)
        if self.stage2_artifact and self.model.init_from:
            raise ValueError("--stage2-artifact and --init-from both give the weights: drop one")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"--n-action-steps {self.n_action_steps} must be between 1 and --chunk-size {self.chunk_size}"
            )
        if (self.latent_loss_weight > 0) != (self.laq_ckpt is not None or self.labels == "cache"):
            raise ValueError(
                f"co-training needs --latent-loss-weight > 0 (got {self.latent_loss_weight}) and labels: --laq-ckpt "
                f"(got {self.laq_ckpt}) or --labels cache (got {self.labels})"
            )
        if self.latent_head and not self.latent_loss_weight:
            raise ValueError(
                f"--latent-head {self.latent_head} trains nothing: pass --latent-loss-weight, or leave it out"
            )
        if self.has_video and not self.latent_loss_weight:
            raise ValueError("--video-roots and --video-repo-ids only teach the latent head: pass --latent-loss-weight")
        if not 0 < self.video_share < 1:
            raise ValueError(f"--video-share is a share of the batch in (0, 1), got {self.video_share}")

    @property
    def has_video(self) -> bool:
        return bool(self.video_roots or self.video_repo_ids)


def open_recordings(config: Stage3Config) -> "tuple[list[RobotDataset], list[RobotDataset]]":
    """The labelled datasets; these and the video datasets. Raises ValueError for a labelled one without actions."""
    from smolvla_shared import data

    labelled = data.open_datasets(config.data)
    for dataset in labelled:
        if data.ACTION_KEY not in dataset.features:
            raise ValueError(
                f"{dataset.name} has no {data.ACTION_KEY!r} column, it has {sorted(dataset.features)}: Stage 3 learns "
                "from labelled demonstrations; action-free video goes into --video-roots"
            )
    video = replace(config.data, repo_ids=config.video_repo_ids, roots=config.video_roots) if config.has_video else None
    return labelled, labelled + (data.open_datasets(video) if video else [])


def split_rows(
    config: Stage3Config, datasets: "list[RobotDataset]", num_labelled: int
) -> "tuple[list[tuple[int, np.ndarray]], list[RowGroup], list[RowGroup]]":
    """Training rows of all datasets; their mixture; held-out rows of the labelled datasets, which come first.

    Raises ValueError for video of which no frame has a pair.
    """
    from smolvla_shared import data, data_order

    training, held_out = data_order.split_datasets(datasets, config.val_fraction, config.seed)
    video = data.with_pairs(datasets, training[num_labelled:])  # a frame without a pair teaches nothing there
    mixture = data_order.mix(training[:num_labelled], video, config.video_share)
    return training, mixture, data_order.group_rows([(i, rows) for i, rows in held_out if i < num_labelled])


def export_policy(
    config: Stage3Config,
    core: "CoreConfig",
    initial: "InitialWeights",
    statistics: "dict[str, Statistics]",
    datasets: "list[RobotDataset]",
    directory: Path,
    weights: "dict[str, Tensor]",
    step: int,
) -> None:
    """Write a checkpoint's policy. The first dataset is labelled: its frames have the size of the robot's images."""
    from smolvla_shared.lerobot_policy import save_policy
    from smolvla_shared.run import origin

    source = origin(config, step, datasets) | initial.provenance
    shapes = {camera: datasets[0].frame_shape(camera) for camera in core.cameras}
    save_policy(directory, core, weights, initial.tokenizer, statistics, config.n_action_steps, source, shapes)


def main(config: Stage3Config) -> None:
    from smolvla_shared import data, data_order
    from smolvla_shared.data_loader import SampleSpec, make_loaders
    from smolvla_shared.evaluate import held_out_errors
    from smolvla_shared.feature_cache import prepare_features
    from smolvla_shared.initial import open_initial
    from smolvla_shared.labels import labels_pairs, latent_statistics, open_labels
    from smolvla_shared.losses import masked_mean, valid_tokens
    from smolvla_shared.preprocess import Preprocessor
    from smolvla_shared.run import Run, start_run

    # What a user can get wrong is refused here, before Run makes the run directory.
    weight = {ACTION: 1.0} | ({LATENT: config.latent_loss_weight} if config.latent_loss_weight else {})
    labelled, datasets = open_recordings(config)
    initial = open_initial(config.model, config.stage2_artifact)
    options = labels_pairs(config, initial.data_options(config.data, with_latents=LATENT in weight))
    data.set_frame_gap(datasets, options.gap_s)
    cameras, label_camera = data.choose_cameras(datasets, options)
    dims = {"action_dim": data.common_dim(labelled, data.ACTION_KEY), "chunk_size": config.chunk_size}
    dims |= data.state_dims(datasets, config.model.use_state)
    recorded = initial.recorded_statistics(dims) if config.normalization == "artifact" else {}
    horizon = config.latent_horizon or initial.latent_horizon
    labels = open_labels(config, datasets, label_camera, horizon) if LATENT in weight else None
    dims |= initial.latent_dims(labels, options, label_camera, config.latent_head) if labels else {}
    training, groups, held_out = split_rows(config, datasets, len(labelled))
    accelerator, resume_from = start_run(config)

    core = initial.build(config.model, cameras, weight, **dims)
    statistics = data.statistics(labelled, core.config, weight)
    described = initial.describe(core, statistics.get("state")), data.describe(datasets, with_pairs=LATENT in weight)
    plan = f"Stage 3: {data_order.plan(groups, config)}; loss {weight}; statistics of the {config.normalization}"
    accelerator.print(*described, plan, sep="\n")
    statistics |= recorded
    if labels:
        about = labels, datasets, training, config.seed, accelerator.device
        statistics[LATENT] = latent_statistics(*about, recorded=initial.statistics.get(LATENT))
        core.learn_codes(labels.codebook, statistics[LATENT])
    features = prepare_features(core, datasets, cameras, config, accelerator)
    spec = SampleSpec.of(core.config, weight, labels, features, config.flow_draws)
    loaders = make_loaders(datasets, groups, held_out, spec, config, accelerator, config.data.random_shift)
    preprocessor = Preprocessor(core.config, initial.tokenizer, statistics)
    export = partial(export_policy, config, core.config, initial, statistics, datasets)

    with Run(config, accelerator, core, resume_from, export) as run:
        for raws in run.steps(loaders.train):
            targets = [labels(raw) if labels else None for raw in raws]  # latent actions [B, M*S, D], if co-training
            run.mark("teacher")
            batches = [preprocessor(raw, latent) for raw, latent in zip(raws, targets, strict=True)]
            counts = valid_tokens(batches, accelerator)
            run.mark("preprocess")
            for batch in run.passes(batches):
                errors = run.core(batch)  # {"action": [B, T], "latent": [B, M*S]}: flow-matching error of each token
                parts = {name: masked_mean(errors[name], batch.masks[name], counts[name]) for name in errors}
                run.backward(sum(weight[name] * part for name, part in parts.items()))
                run.record(parts, errors, batch.masks)
            run.update()
            if run.evaluates and loaders.held_out:
                with run.evaluation():
                    run.log(held_out_errors(core, loaders.held_out(), preprocessor, accelerator, labels))
    accelerator.print(f"policy: {config.run_dir / 'checkpoints' / 'last' / 'pretrained_model'}")


if __name__ == "__main__":
    main(tyro.cli(Stage3Config))
