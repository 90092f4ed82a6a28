"""Stage 3: fine-tune the action head, and what the trunk options leave trainable, on labelled demonstrations.

    accelerate launch train_stage3.py --stage2-artifact runs/s2/artifacts/smolvla_shared_stage2_artifact.safetensors \
        --data.repo-ids my/teleop --run-dir runs/s3
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from smolvla_shared.config import ACTION, LATENT, ModelConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class Stage3Config(StageConfig):
    """Train the policy on action chunks, from a Stage 2 artifact or (without one) from the trunk's own weights."""

    # The weights file of Stage 2; its manifest decides about the model. None: the scratch arm.
    stage2_artifact: Path | None = None
    # The trunk of the scratch arm, and what trains in either arm.
    model: ModelConfig = field(default_factory=ModelConfig)
    # Actions in a chunk: what the policy predicts at once.
    chunk_size: int = 50
    # Actions executed of each chunk before the next is predicted; stored with the policy, rollouts may override it.
    n_action_steps: int = 10
    # State statistics: those of the Stage 3 data, or those the artifact was trained with. With --init-from, artifact
    # means the state and action statistics of that policy.
    normalization: Literal["data", "artifact"] = "data"
    # (noise, time) draws that are trained on one prefix pass of a sample.
    flow_draws: int = 1
    # Weight of the latent loss beside the action loss; above 0 it co-trains the latent head, on Stage 2's labels.
    latent_loss_weight: float = 0.0
    # Local directories of action-free datasets to co-train the latent head on.
    video_roots: tuple[Path, ...] = ()
    # Hub ids of action-free datasets to co-train the latent head on.
    video_repo_ids: tuple[str, ...] = ()
    # Share of a batch that the action-free datasets get.
    video_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
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
        if (self.video_roots or self.video_repo_ids) and not self.latent_loss_weight:
            raise ValueError("--video-roots and --video-repo-ids only teach the latent head: pass --latent-loss-weight")
        if not 0 < self.video_share < 1:
            raise ValueError(f"--video-share is a share of the batch in (0, 1), got {self.video_share}")


def main(config: Stage3Config) -> None:
    from smolvla_shared import artifact, checkpoint, data, features, model, policy, smolvla, teacher, training
    from smolvla_shared.preprocess import Preprocessor

    # What a user can get wrong is found out before train() makes the run directory.
    stage2 = artifact.load_artifact(config.stage2_artifact) if config.stage2_artifact else None
    init = smolvla.load_init(config.model)
    data_config = smolvla.init_cameras(config.data, init)
    if stage2:
        manifest = stage2.manifest
        stated = {"model_name": config.model.stated_name, "model_revision": config.model.revision}
        artifact.check_agreement(manifest.core, stated | {"cameras": config.data.cameras or None})
        label_camera = manifest.latents.label_camera if config.latent_loss_weight else None
        data_config = replace(config.data, cameras=manifest.core.cameras, label_camera=label_camera)
    labelled = data.open_sources(data_config)
    for source in labelled:
        if data.ACTION_KEY not in source.features:
            raise ValueError(
                f"{source.name} has no {data.ACTION_KEY!r} column, it has {sorted(source.features)}: Stage 3 learns "
                "from labelled demonstrations; action-free video goes into --video-roots"
            )
    sources = list(labelled)
    if has_video := bool(config.video_repo_ids or config.video_roots):
        sources += data.open_sources(replace(data_config, repo_ids=config.video_repo_ids, roots=config.video_roots))
    cameras, label_camera = data.choose_cameras(sources, data_config)
    dims = {
        "state_dim": data.common_dim(sources, data.STATE_KEY) if config.model.use_state else 0,
        "action_dim": data.common_dim(labelled, data.ACTION_KEY),
        "chunk_size": config.chunk_size,
    }
    labels = teacher.open_labels(config, sources, label_camera) if config.latent_loss_weight else None
    if labels and stage2:
        artifact.check_teacher(manifest, labels.teacher_id, labels.kind, config.data)
    recorded = manifest.normalization if stage2 else {}
    if init and config.normalization == "artifact":
        recorded = smolvla.init_statistics(init, dims)
    recorded_state = recorded.get("state")
    if config.normalization == "artifact" and (not recorded_state or len(recorded_state.mean) != dims["state_dim"]):
        raise ValueError(
            f"--normalization artifact: the data's state has {dims['state_dim']} dimensions, the artifact's statistics "
            f"have {len(recorded_state.mean) if recorded_state else 'none'}: use --normalization data"
        )
    accelerator = training.make_accelerator(config)
    resume_from = checkpoint.check_run(config, accelerator)

    if stage2:
        core, has_fresh_head = artifact.build_core(stage2, **dims)
        tokenizer = stage2.tokenizer
        accelerator.print(
            f"from {config.stage2_artifact}: {manifest.source.run} step {manifest.source.global_step}, action head "
            + ("freshly initialised" if has_fresh_head else "from the artifact")
        )
    else:
        if labels:
            dims |= {"latent_vector_dim": labels.shape[0] * labels.shape[1], "code_seq_len": labels.shape[0]}
        core, tokenizer = smolvla.make_core(config.model, init, cameras, **dims)
        scratch = "scratch arm: no Stage 2 artifact, the trunk's own weights"
        accelerator.print(smolvla.describe(init, cameras) if init else scratch)
    core_config = core.config
    unused_head = ["latent head"] if core_config.latent_vector_dim and not labels else []
    model.freeze(core, model.frozen_parts(config.model, core_config) + unused_head)
    model.configure_layers(core, config.model)

    frames, held_out = data.split_sources(sources, config.data, config.seed)
    held_out = [(index, rows) for index, rows in held_out if index < len(labelled)]
    groups = data.group_frames(frames[: len(labelled)], 1 - config.video_share if has_video else 1.0)
    groups += data.group_frames(frames[len(labelled) :], config.video_share)

    statistics = {ACTION: data.vector_statistics(labelled, data.ACTION_KEY)}
    if core_config.state_dim:
        statistics["state"] = data.vector_statistics(labelled, data.STATE_KEY)
        if recorded_state:
            difference = statistics["state"].difference(recorded_state)
            accelerator.print(f"state statistics: {difference}; using those of the {config.normalization}")
        if config.normalization == "artifact":
            statistics |= {name: recorded[name] for name in ("state", ACTION) if name in recorded}
    if labels:
        labels.to(accelerator.device)
        statistics[LATENT] = (
            manifest.normalization[LATENT]
            if stage2
            else teacher.latent_statistics(labels, sources, frames, config.seed, accelerator.device)
        )
    accelerator.print(data.describe(sources, with_pairs=labels is not None))
    accelerator.print(model.parameter_table(core))
    accelerator.print(
        f"Stage 3: {data.plan(groups, config)}; cameras {', '.join(cameras)}; chunks of "
        f"{config.chunk_size} actions of {core_config.action_dim}"
        + (f"; co-training the latent head with weight {config.latent_loss_weight}" if labels else "")
    )

    draws = {ACTION: (config.chunk_size, core_config.max_action_dim)}
    if labels:
        draws[LATENT] = labels.shape
    spec = data.SampleSpec(
        cameras=cameras,
        state_dim=core_config.state_dim,
        chunk_size=config.chunk_size,
        action_dim=core_config.action_dim,
        label_camera=labels.camera if labels else None,
        pair_size=labels.pair_size if labels else 0,
        draws=draws,
        num_draws=config.flow_draws,
        time_beta=(core_config.time_beta_alpha, core_config.time_beta_beta),
        features=features.prepare_features(core, sources, cameras, config, accelerator),
    )
    splits = groups, data.group_frames(held_out)
    loaders = data.make_loaders(sources, *splits, spec, config, accelerator, config.data.random_shift)
    preprocessor = Preprocessor(core_config, tokenizer, statistics)

    def evaluate() -> dict[str, float]:
        return training.held_out_errors(core, loaders.held_out(), preprocessor, accelerator, labels)

    def export(directory: Path, weights: dict, step: int) -> None:
        origin = training.origin(config, step, [source.name for source in sources])
        origin |= {"stage2_artifact": manifest.weights.sha256 if stage2 else None}
        shapes = {camera: labelled[0].frame_shape(camera) for camera in cameras}
        policy.save_policy(
            directory, core_config, weights, tokenizer, statistics, config.n_action_steps, origin, shapes
        )

    training.train(
        config,
        accelerator,
        core,
        loaders.train,
        preprocessor,
        labels=labels,
        loss_weights={LATENT: config.latent_loss_weight},
        evaluate=evaluate if loaders.held_out else None,
        export=export,
        resume_from=resume_from,
    )
    accelerator.print(f"policy: {config.run_dir / 'checkpoints' / 'last' / 'pretrained_model'}")


if __name__ == "__main__":
    main(tyro.cli(Stage3Config))
