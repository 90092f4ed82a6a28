"""Stage 3: train the action head, and what --model.freeze-* leaves trainable, on labelled demonstrations.

    accelerate launch train_stage3.py --stage2-artifact runs/s2/artifacts/smolvla_shared_stage2_artifact.safetensors \
        --data.repo-ids my/teleop --run-dir runs/s3
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from smolvla_shared import paths, ranges
from smolvla_shared.action_config import ActionOptions
from smolvla_shared.command import run_command
from smolvla_shared.config import ACTION, LATENT, PolicyDataConfig, RunConfig
from smolvla_shared.mixture import DatasetEntry

if TYPE_CHECKING:
    from torch import Tensor

    from smolvla_shared.action_decoder import ActionDecoder, AsIs
    from smolvla_shared.config import CoreConfig
    from smolvla_shared.data import RobotDataset
    from smolvla_shared.initial import InitialWeights
    from smolvla_shared.normalization import Statistics
    from smolvla_shared.robots import Robot, Robots


@dataclass(frozen=True, kw_only=True)
class Stage3Config(ActionOptions, RunConfig):
    """Train the policy on action chunks, from a Stage 2 artifact, a policy, or the trunk's own weights."""

    # Weights file (.safetensors) of the Stage 2 artifact to start from. Without it and without --init-from, training
    # starts from the trunk's own weights: the scratch arm.
    stage2_artifact: paths.Artifact | None = None
    # Weight of the latent loss, added to the action loss; 0: the latent head is not trained.
    latent_loss_weight: ranges.NotNegative = 0.0
    # Local directories of datasets whose actions, if there are any, are not read. They train the latent head
    # (--latent-loss-weight), the action head (--decode-actions), or both.
    video_roots: tuple[paths.Dataset, ...] = ()
    # Hub ids of such datasets.
    video_repo_ids: tuple[paths.HubDataset, ...] = ()
    # YAML file of such datasets, as --data.mixture, instead of these two.
    video_mixture: paths.File | None = None
    # What the file held.
    video_mixture_entries: tuple[DatasetEntry, ...] = field(init=False, default=())
    # Share of each batch that is read from them.
    video_share: ranges.ShareOfSome = 0.5
    # Train the action head on video, too: its latent actions are decoded into actions by a linear map that is fitted to
    # the demonstrations. Of a chunk, (--latent-horizon - 1) x --data.frame-gap-s seconds are decoded.
    decode_actions: bool = False

    def __post_init__(self):
        RunConfig.__post_init__(self)
        ActionOptions.__post_init__(self)
        if self.video_mixture:
            ranges.refuse_beside(self, f"--video-mixture {self.video_mixture}", "video_roots video_repo_ids")
            object.__setattr__(self, "video_mixture_entries", self.video_data.mixture_entries)
        if self.stage2_artifact and self.model.init_from:
            raise ValueError("--stage2-artifact and --init-from both give the weights: drop one")
        if self.needs_labels != (self.laq_ckpt is not None or self.labels == "cache"):
            raise ValueError(
                f"--latent-loss-weight > 0 (got {self.latent_loss_weight}) or --decode-actions goes with labels: "
                f"--laq-ckpt (got {self.laq_ckpt}) or --labels cache (got {self.labels})"
            )
        if self.has_video and not self.needs_labels:
            raise ValueError("--video-roots, -repo-ids, -mixture need --latent-loss-weight, --decode-actions, or both")
        if self.decode_actions and not self.has_video:
            raise ValueError("--decode-actions decodes the actions of video: pass --video-roots or --video-repo-ids")
        # Where the option leaves it out, it is that of what training starts from, or 1.
        if self.decode_actions and (self.latent_horizon == 1 or not (self.latent_horizon or self.start)):
            raise ValueError("--decode-actions reads latent actions in a row: pass --latent-horizon of 2 or more")
        ranges.refuse_without(self, self.has_video, "--video-roots or --video-repo-ids", "video_share")
        needed = self.needs_labels, "--latent-loss-weight or --decode-actions"
        ranges.refuse_without(self, *needed, "teacher_kind laq_code_seq_len laq_image_size accept_other_pairs")
        ranges.refuse_without(self, *needed, "latent_horizon")
        ranges.refuse_without(self, self.latent_loss_weight > 0, "--latent-loss-weight", "latent_head")
        ranges.refuse_without(self.data, *needed, "label_cameras frame_gap_s", "--data.")

    @property
    def has_video(self) -> bool:
        return bool(self.video_roots or self.video_repo_ids or self.video_mixture)

    @property
    def start(self) -> Path | str | None:
        return self.stage2_artifact or self.model.init_from

    @property
    def video_data(self) -> PolicyDataConfig | None:
        named = {"repo_ids": self.video_repo_ids, "roots": self.video_roots, "mixture": self.video_mixture}
        return replace(self.data, **named, weights=()) if self.has_video else None

    @property
    def of_one_robot(self) -> str:  # an option that does not go with several
        artifact = "--normalization artifact" * (self.normalization == "artifact")
        return "--decode-actions" * self.decode_actions or "--relative-actions" * self.relative_actions or artifact

    @property
    def needs_labels(self) -> bool:
        return self.latent_loss_weight > 0 or self.decode_actions


def export_policy(
    config: Stage3Config,
    core: "CoreConfig",
    initial: "InitialWeights",
    statistics: "dict[str, Statistics]",
    datasets: "list[RobotDataset]",
    decode: "ActionDecoder | AsIs",
    robots: "Robots",
    optional_cameras: "dict[Robot, tuple[str, ...]]",
    directory: Path,
    weights: "dict[str, Tensor]",
    step: int,
) -> None:
    """Write a checkpoint's policy, or that of each robot."""
    from smolvla_shared.lerobot_files import save_policies
    from smolvla_shared.run import command, origin

    hub_ids = [dataset.entry.repo_id for dataset in datasets if dataset.entry.repo_id]
    more = {"actions": str(decode), "command": command(), "hub_datasets": hub_ids}
    source = origin(config, step, datasets) | initial.provenance | more
    about = statistics, config.n_action_steps, source, robots, datasets, optional_cameras
    save_policies(directory, core, weights, initial.tokenizer, *about)


def main(config: Stage3Config) -> None:
    from smolvla_shared import data_split, data_views
    from smolvla_shared.robots import Robots

    # What a user can get wrong is refused before Run makes the run directory; what the data tells, before torch comes.
    labelled, datasets = data_views.open_recordings(config.data, config.video_data, starts_elsewhere=bool(config.start))
    robots = Robots.find(datasets, [ACTION], config.model.use_state, len(labelled), config.of_one_robot, config)

    from smolvla_shared import action_decoder, data_table, evaluate, feature_cache, losses, robot_preprocessor
    from smolvla_shared.data_loader import SampleSpec, make_loaders
    from smolvla_shared.initial import open_initial
    from smolvla_shared.labels import open_labels
    from smolvla_shared.run import Run, inputs, start_run

    weight = {ACTION: 1.0} | ({LATENT: config.latent_loss_weight} if config.latent_loss_weight else {})
    initial = open_initial(config.model, config.stage2_artifact)
    chosen, cameras, label_cameras = initial.choose_views(config, datasets, with_latents=config.needs_labels)
    optional = {name: data_views.may_be_missing(robots.datasets_of(name, labelled), cameras) for name in robots.acting}
    dims = robots.dims | {"chunk_size": config.chunk_size}
    recorded = initial.recorded_statistics(dims) if config.normalization == "artifact" else {}
    action_decoder.check_horizon(config.decode_actions, config.latent_horizon or initial.latent_horizon)
    labels = open_labels(config, datasets, label_cameras, initial.latent_horizon) if config.needs_labels else None
    dims |= initial.latent_dims(labels, chosen, label_cameras, config.latent_head, datasets) if LATENT in weight else {}
    training, groups, held_out = data_split.split_with_video(datasets, len(labelled), config, config.video_share)
    accelerator, resume_from = start_run(config)
    about = datasets, training, config.seed, accelerator.device
    decode = action_decoder.fit(labels if config.decode_actions else None, len(labelled), *about, robots.relative)
    core = initial.build(config.model, cameras, weight, accelerator.mixed_precision, **dims)
    statistics = robots.statistics(datasets, training, len(labelled), initial.normalization_mode(config))
    table = data_table.describe(datasets, groups, config, cameras, label_cameras, initial.core.cameras)
    plan = f"Stage 3: {table}\nloss {weight}; statistics of the {config.normalization}"
    accelerator.print(initial.describe(core, statistics, datasets, recorded), plan, decode, sep="\n")
    statistics |= recorded
    if LATENT in weight:
        statistics[LATENT] = initial.latent_statistics(labels, *about)
        core.learn_codes(labels.codebook, statistics[LATENT])
    features = feature_cache.prepare_features(core, datasets, cameras, config, accelerator)
    spec = SampleSpec.of(core.config, weight, labels, features, config.flow_draws)
    loaders = make_loaders(datasets, groups, held_out, spec, config, accelerator, **config.data.augmentation)
    preprocessor = robot_preprocessor.make_preprocessor(core.config, initial.tokenizer, statistics, robots)
    export = partial(export_policy, config, core.config, initial, statistics, datasets, decode, robots, optional)

    with Run(config, accelerator, core, resume_from, export, inputs(datasets, initial.provenance, labels)) as run:
        for raws in run.steps(loaders.train):
            targets = [labels(raw) if labels else None for raw in raws]  # latent actions [B, M*S, D], if any
            run.mark("teacher")
            batches = [preprocessor(decode(raw, latent), latent) for raw, latent in zip(raws, targets, strict=True)]
            counts = losses.valid_tokens(batches, accelerator)
            run.mark("preprocess")
            for batch in run.passes(batches):
                errors = run.core(batch)  # {"action": [B, T], "latent": [B, M*S]}: flow-matching error of each token
                parts = {name: losses.masked_mean(errors[name], batch.masks[name], counts[name]) for name in errors}
                run.backward(sum(weight[name] * part for name, part in parts.items()))
                run.record(parts, errors, batch.masks)
            run.update()
            if run.evaluates and loaders.held_out:
                with run.evaluation():
                    data = loaders.held_out(), preprocessor, accelerator, labels
                    run.log(evaluate.held_out_errors(core, *data, executed=config.n_action_steps))
    accelerator.print(f"policy: {config.run_dir / 'checkpoints' / 'last' / 'pretrained_model'}")


if __name__ == "__main__":
    run_command(main, Stage3Config)
