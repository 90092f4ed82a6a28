"""Stage 2: teach the core to predict latent actions from video. No action labels are read.

accelerate launch train_stage2.py --laq-ckpt laq_openx.pt --data.repo-ids my/videos --run-dir runs/s2
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from smolvla_shared.config import LATENT, ModelConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class Stage2Config(StageConfig):
    """Train the SmolVLM trunk and the shared expert on the latent actions of a frozen LAQ teacher."""

    # The trunk, and what of it trains.
    model: ModelConfig = field(default_factory=ModelConfig)
    # The report of `python -m smolvla_shared.teacher check` on these labels; its verdict travels in the artifact.
    label_health: Path | None = None
    # Learn labels that failed the check all the same, as for a control arm.
    accept_label_health: bool = False
    # (noise, time) draws that are trained on one prefix pass of a sample.
    flow_draws: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.labels == "online" and self.laq_ckpt is None:
            raise ValueError("whose latent actions? Pass --laq-ckpt, or --labels cache with --label-cache")
        if self.accept_label_health and self.label_health is None:
            raise ValueError("--accept-label-health accepts a report: pass it with --label-health")


def main(config: Stage2Config) -> None:
    from smolvla_shared import artifact, checkpoint, data, features, health, model, smolvla, teacher, training
    from smolvla_shared.preprocess import Preprocessor

    # What a user can get wrong is found out before train() makes the run directory.
    init = smolvla.load_init(config.model)
    sources = data.open_sources(config.data)
    cameras, label_camera = data.choose_cameras(sources, smolvla.init_cameras(config.data, init))
    frames, held_out_frames = data.split_sources(sources, config.data, config.seed)
    pair_share = data.valid_pair_share(sources, frames)
    labels = teacher.open_labels(config, sources, label_camera)
    verdict = health.check_report(config.label_health, config.accept_label_health, labels, config.data, label_camera)
    code_seq_len, latent_dim = labels.shape
    state_dim = data.common_dim(sources, data.STATE_KEY) if config.model.use_state else 0
    accelerator = training.make_accelerator(config)
    resume_from = checkpoint.check_run(config, accelerator)

    core, tokenizer = smolvla.make_core(
        config.model,
        init,
        cameras,
        state_dim=state_dim,
        latent_vector_dim=code_seq_len * latent_dim,
        code_seq_len=code_seq_len,
    )
    core_config = core.config
    unused_head = ["action head"] if init else []  # kept for Stage 3
    model.freeze(core, model.frozen_parts(config.model, core_config) + unused_head)
    model.configure_layers(core, config.model)
    before = artifact.fingerprints(core.state_dict())
    labels.to(accelerator.device)
    statistics = {LATENT: teacher.latent_statistics(labels, sources, frames, config.seed, accelerator.device)}
    if state_dim:
        statistics["state"] = data.vector_statistics(sources, data.STATE_KEY)
    if init:
        accelerator.print(smolvla.describe(init, cameras))
    accelerator.print(data.describe(sources, with_pairs=True))
    accelerator.print(model.parameter_table(core))
    accelerator.print(
        f"Stage 2: {data.plan(data.group_frames(frames), config)}; cameras {', '.join(cameras)}; {labels.kind} "
        f"latents of teacher {labels.teacher_id[:12]} ({config.labels}) on {label_camera}, {pair_share:.1%} of the "
        f"frames have a pair; label health: {verdict.get('health', 'not measured (teacher check, --label-health)')}"
    )

    spec = data.SampleSpec(
        cameras=cameras,
        state_dim=state_dim,
        label_camera=labels.camera,
        pair_size=labels.pair_size,
        draws={LATENT: labels.shape},
        num_draws=config.flow_draws,
        time_beta=(core_config.time_beta_alpha, core_config.time_beta_beta),
        features=features.prepare_features(core, sources, cameras, config, accelerator),
    )
    groups = data.group_frames(frames), data.group_frames(held_out_frames)
    loaders = data.make_loaders(sources, *groups, spec, config, accelerator, config.data.random_shift)
    preprocessor = Preprocessor(core_config, tokenizer, statistics)

    def evaluate() -> dict[str, float]:
        return training.held_out_errors(core, loaders.held_out(), preprocessor, accelerator, labels)

    weights = training.train(
        config,
        accelerator,
        core,
        loaders.train,
        preprocessor,
        labels=labels,
        evaluate=evaluate if loaders.held_out else None,
        resume_from=resume_from,
    )
    if accelerator.is_main_process:
        after = artifact.fingerprints(weights)
        path = artifact.save_artifact(
            config.run_dir / "artifacts",
            core_config,
            weights,
            tokenizer,
            statistics,
            artifact.Latents(
                labels.teacher_id, labels.kind, config.data.frame_gap_s, label_camera, pair_share, **verdict
            ),
            artifact.Origin(
                **training.origin(config, config.steps, [source.name for source in sources]),
                changed_parts=tuple(part for part in after if after[part] != before[part]),
            ),
        )
        print(f"artifact: {path}")


if __name__ == "__main__":
    main(tyro.cli(Stage2Config))
