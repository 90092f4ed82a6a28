"""Stage 2: teach the core to predict latent actions from video. No action labels are read.

accelerate launch train_stage2.py --laq-ckpt laq_openx.pt --data.repo-ids my/videos --run-dir runs/s2
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvla_shared import paths
from smolvla_shared.command import run_command
from smolvla_shared.config import LATENT, RunConfig, StageOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from smolvla_shared.artifact import Latents
    from smolvla_shared.data import RobotDataset
    from smolvla_shared.model import SmolVLASharedCore
    from smolvla_shared.normalization import Statistics


@dataclass(frozen=True, kw_only=True)
class Stage2Config(StageOptions, RunConfig):
    """Train the SmolVLM trunk and the shared expert on the latent actions of a frozen LAQ teacher."""

    # Report of `python -m smolvla_shared.teacher check` on these labels; the artifact records its verdict.
    label_health: paths.File | None = None
    # Train on labels although --label-health says that they failed, for example as a control arm.
    accept_label_health: bool = False

    def __post_init__(self):
        RunConfig.__post_init__(self)
        StageOptions.__post_init__(self)
        if self.labels == "online" and self.laq_ckpt is None:
            raise ValueError("whose latent actions? Pass --laq-ckpt, or --labels cache with --label-cache")
        if self.accept_label_health and self.label_health is None:
            raise ValueError("--accept-label-health accepts a report: pass it with --label-health")


def export_artifact(
    config: Stage2Config,
    core: "SmolVLASharedCore",
    tokenizer: "PreTrainedTokenizerFast",
    statistics: "dict[str, Statistics]",
    latents: "Latents",
    datasets: "list[RobotDataset]",
) -> "Callable[[Path, dict[str, Tensor], int], None]":
    """A function that writes weights and their step into a directory, as the artifact of this run.

    core: not yet trained, to tell afterwards which parts have changed
    """
    from smolvla_shared import artifact
    from smolvla_shared.run import origin

    before = artifact.fingerprints(core.state_dict())

    def export(directory: Path, weights: "dict[str, Tensor]", step: int) -> None:
        changed = artifact.changed_parts(before, weights)
        source = artifact.Origin(**origin(config, step, datasets), changed_parts=changed)
        artifact.save_artifact(directory, core.config, weights, tokenizer, statistics, latents, source)

    return export


def main(config: Stage2Config) -> None:
    from smolvla_shared import data, data_split, data_views
    from smolvla_shared.robots import Robots

    # What a user can get wrong is refused before Run makes the run directory; what the data tells, before torch comes.
    datasets = data_views.open_video(config.data, starts_elsewhere=config.model.init_from is not None)
    chosen = config.data.max_episodes, config.data.episodes
    training, held_out = data_split.split_datasets(datasets, config.val_fraction, config.seed, *chosen)
    robots = Robots.find(datasets, [LATENT], config.model.use_state)

    from smolvla_shared import artifact, data_table, evaluate, feature_cache, label_health, losses, robot_preprocessor
    from smolvla_shared.data_loader import SampleSpec, make_loaders
    from smolvla_shared.initial import open_initial
    from smolvla_shared.labels import open_labels
    from smolvla_shared.run import Run, inputs, start_run

    initial = open_initial(config.model)
    options, cameras, label_cameras = initial.choose_views(config, datasets, with_latents=True)
    labels = open_labels(config, datasets, label_cameras, initial.latent_horizon)
    dims = robots.dims | initial.latent_dims(labels, options, label_cameras, config.latent_head)
    about = {"label_cameras": label_cameras, "valid_pair_share": data.valid_pair_share(datasets, training)}
    about |= {"horizon": labels.horizon} | data_views.gaps(datasets) | data_views.own_label_cameras(datasets)
    latents = artifact.Latents(labels.teacher_id, labels.kind, **about, teacher_grounding=labels.teacher_grounding)
    latents = label_health.with_health(latents, config.label_health, config.accept_label_health)
    accelerator, resume_from = start_run(config, config.run_dir / "artifacts" / f"{paths.ARTIFACT_NAME}.json")

    core = initial.build(config.model, cameras, [LATENT], accelerator.mixed_precision, **dims)
    statistics = robots.statistics(datasets, training, mode=initial.normalization_mode(config))
    statistics[LATENT] = initial.latent_statistics(labels, datasets, training, config.seed, accelerator.device)
    core.learn_codes(labels.codebook, statistics[LATENT])
    paired = [data.with_pairs(datasets, rows) for rows in (training, held_out)]
    groups = [data_split.balanced(datasets, paired[0], config.data.balance), data_split.weighted(paired[1])]
    table = data_table.describe(datasets, groups[0], config, cameras, label_cameras, initial.core.cameras)
    accelerator.print(initial.describe(core, statistics, datasets), f"Stage 2: {table}", latents, sep="\n")
    features = feature_cache.prepare_features(core, datasets, cameras, config, accelerator)
    spec = SampleSpec.of(core.config, [LATENT], labels, features, config.flow_draws)
    loaders = make_loaders(datasets, *groups, spec, config, accelerator, **config.data.augmentation)
    preprocessor = robot_preprocessor.make_preprocessor(core.config, initial.tokenizer, statistics, robots)
    export = export_artifact(config, core, initial.tokenizer, statistics, latents, datasets)

    with Run(config, accelerator, core, resume_from, export, inputs(datasets, initial.provenance, labels)) as run:
        for raws in run.steps(loaders.train):
            targets = [labels(raw) for raw in raws]  # latent actions [B, M*S, D]: what happened between two frames
            run.mark("teacher")
            batches = [preprocessor(raw, latent) for raw, latent in zip(raws, targets, strict=True)]
            counts = losses.valid_tokens(batches, accelerator)
            run.mark("preprocess")
            for batch in run.passes(batches):
                errors = run.core(batch)  # {"latent": [B, M*S]}: flow-matching error of each token
                loss = losses.masked_mean(errors[LATENT], batch.masks[LATENT], counts[LATENT])
                run.backward(loss)
                run.record({LATENT: loss}, errors, batch.masks)
            run.update()
            if run.evaluates and loaders.held_out:
                with run.evaluation():
                    run.log(evaluate.held_out_errors(core, loaders.held_out(), preprocessor, accelerator, labels))
    weights = run.weights()
    if accelerator.is_main_process:
        export(config.run_dir / "artifacts", weights, run.step)
        print("artifact:", config.run_dir / "artifacts" / f"{artifact.ARTIFACT_NAME}.safetensors")


if __name__ == "__main__":
    run_command(main, Stage2Config)
