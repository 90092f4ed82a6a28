"""The LAQ teacher's commands: train a teacher, write its labels into a cache, check whether they are worth learning.

accelerate launch -m smolvla_shared.teacher train --data.roots my/videos --run-dir runs/laq
accelerate launch -m smolvla_shared.teacher label --laq-ckpt laq.safetensors --data.roots my/videos --label-cache labels
python -m smolvla_shared.teacher check --laq-ckpt laq.safetensors --data.roots my/videos --out runs/check
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from smolvla_shared.command import parse, run_command
from smolvla_shared.paths import TEACHER_FILE
from smolvla_shared.refusals import refuse_differences
from smolvla_shared.teacher_config import FRESH, CheckConfig, LabelConfig, TeacherConfig

if TYPE_CHECKING:
    from torch import Tensor

    from smolvla_shared.data import RobotDataset
    from smolvla_shared.laq import LAQ

NOISE = "nsvq"  # the key of the quantiser's noise in a RawBatch


def given_laq(config: TeacherConfig) -> "LAQ | None":
    """The LAQ to fine-tune, if there is one. Raises ValueError where --laq.* contradicts its shape."""
    from smolvla_shared.laq_files import load_laq

    if config.init_from is None:
        return None
    default = asdict(FRESH)
    stated = {name: value for name, value in asdict(config.laq).items() if value != default[name]}
    given = load_laq(config.init_from, stated.get("code_seq_len"), stated.get("image_size"))
    shape = asdict(given.config)
    refuse_differences(
        f"--init-from {config.init_from} brings its own shape, leave these out",
        [(name, value, shape[name]) for name, value in stated.items()],
        found="file",
    )
    return given


def open_recordings(config: TeacherConfig) -> "tuple[list[RobotDataset], int, tuple[str, ...]]":
    """The datasets of video, then those of grounding; the number of the former; the label cameras, which all have."""
    from smolvla_shared import data, data_views

    options, labelled = config.data, config.grounding.data_options(config.data)
    video = data.open_datasets(options)
    datasets = video + (data.open_datasets(labelled) if labelled else [])
    data_views.refuse_named(datasets, options, starts_elsewhere=config.init_from is not None)
    if config.init_from:
        from smolvla_shared.laq_files import teachers_pairs

        options = teachers_pairs(config.init_from, options, accept_other=True)
        data.set_frame_gap(datasets, options.gap_s)
    _, label_cameras = data_views.choose_cameras(datasets, options)
    return datasets, len(video), label_cameras


def train_teacher(config: TeacherConfig) -> None:
    # What a user can get wrong is refused before Run makes the run directory; what the data tells, before torch comes.
    datasets, num_videos, label_cameras = open_recordings(config)

    from smolvla_shared import data, data_loader, data_split, data_table, data_views
    from smolvla_shared.evaluate import reconstruction_errors, repeat_error
    from smolvla_shared.grounding import Grounding
    from smolvla_shared.laq import LAQ, PairBatch
    from smolvla_shared.laq_codebook import CodebookKeeper
    from smolvla_shared.laq_files import assemble_laq, save_laq, teacher_id
    from smolvla_shared.losses import masked_mean, valid_tokens
    from smolvla_shared.run import Run, inputs, origin, start_run

    given = given_laq(config)
    config = replace(config, optim=config.optim.of_width((given.config if given else config.laq).dim))
    accelerator, resume_from = start_run(config)
    if accelerator.is_fsdp2:
        raise ValueError("a teacher fits every GPU and is not sharded: use configs/accelerate/ddp_8gpu.yaml")
    training, held_out = data_split.split_datasets(datasets[:num_videos], config.val_fraction, config.seed)
    pair_share = data.valid_pair_share(datasets, training)
    training, held_out = (data.with_pairs(datasets, rows) for rows in (training, held_out))
    laq = LAQ(given.config if given else config.laq)
    started_from = {"teacher": teacher_id(given)} if given else {}
    if given:  # load_laq freezes; this copy trains
        laq.load_state_dict(given.state_dict())
    grounding = None
    weights = data_split.weights_of(datasets, training, config.data.balance)
    groups = data_split.weighted(training, weights)
    if datasets[num_videos:]:
        grounding = Grounding(datasets[num_videos:], num_videos, config.grounding, config.val_fraction, config.seed)
        laq.ground(grounding.action_dim)
        groups = data_split.mix(grounding.rows, training, 1 - config.grounding.share, video_weights=weights)
    accelerator.print(
        f"{data_table.describe(datasets, groups, config, label_cameras=label_cameras)}\n"
        f"LAQ {f'from {config.init_from}' if config.init_from else 'with fresh weights'}: "
        f"{sum(p.numel() for p in laq.parameters()):,} parameters; a latent action is {laq.config.code_seq_len} codes "
        f"out of {laq.config.codebook_size}; {laq.config.image_size}-pixel pairs of {', '.join(label_cameras)}, "
        f"{pair_share:.1%} of the frames have one" + (f"; {grounding}" if grounding else "")
    )
    spec = data_loader.SampleSpec(
        cameras=(),
        label_cameras=label_cameras,
        pair_size=laq.config.image_size,
        draws={NOISE: (len(label_cameras) * laq.config.code_seq_len, laq.config.quant_dim)},
    )
    if laq.config.predicts_change:
        laq._repeat_error.fill_(repeat_error(laq, data_loader.sample_pairs(datasets, training, spec, 512, config.seed)))
    loaders = data_loader.make_loaders(datasets, groups, data_split.weighted(held_out), spec, config, accelerator)
    keeper = CodebookKeeper(laq, config)
    weight = {"reconstruction": 1.0, "grounding": config.grounding.weight}

    def export(directory: Path, weights: "dict[str, Tensor]", step: int) -> None:
        directory.mkdir(parents=True)
        source = origin(config, step, datasets[:num_videos])
        source |= data_views.pairs_source(datasets[:num_videos], label_cameras)
        source |= {"grounding": grounding.source if grounding else None}
        save_laq(assemble_laq(laq.config, weights), directory / TEACHER_FILE, extra=source)

    with Run(config, accelerator, laq, resume_from, export, inputs(datasets, started_from)) as run:
        for raws in run.steps(loaders.train):
            actions = [grounding(raw) if grounding else None for raw in raws]  # [B, A] of the labelled pairs
            batches = [PairBatch.of(raw, raw.noise[NOISE][:, 0], a) for raw, a in zip(raws, actions)]
            counts = valid_tokens(batches, accelerator)
            run.mark("preprocess")
            for batch in run.passes(batches):
                errors = run.core(batch)  # {"reconstruction": [B]} and, with --grounding, {"grounding": [B]}
                parts = {name: masked_mean(errors[name], batch.masks[name], counts[name]) for name in errors}
                run.backward(sum(weight[name] * part for name, part in parts.items()))
                run.record(parts, errors, batch.masks)
            run.update()
            run.log(keeper.after_step(run.step))
            if run.evaluates and loaders.held_out:
                with run.evaluation():
                    run.log(reconstruction_errors(laq, loaders.held_out(), accelerator))
    accelerator.print(f"teacher: {config.run_dir / 'checkpoints' / 'last' / 'pretrained_model' / TEACHER_FILE}")


def main(arguments: list[str] | None = None) -> None:
    config = parse(
        Annotated[TeacherConfig, tyro.conf.subcommand("train")]
        | Annotated[LabelConfig, tyro.conf.subcommand("label")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check")],
        prog="python -m smolvla_shared.teacher",
        args=arguments,
    )
    if isinstance(config, TeacherConfig):
        return train_teacher(config)

    from smolvla_shared import data_views

    datasets = data_views.open_video(config.data)  # refused before torch is imported
    if isinstance(config, LabelConfig):
        from smolvla_shared.label_cache import label

        label(config, datasets)
    else:
        from smolvla_shared.label_check import check

        check(config, datasets)


if __name__ == "__main__":
    run_command(main)
