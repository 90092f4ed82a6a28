"""Options that have no effect beside the other options of their command: refused when these are parsed."""

from pathlib import Path
from typing import TYPE_CHECKING

from smolvla_shared import ranges

if TYPE_CHECKING:
    from smolvla_shared.config import ModelConfig, RunConfig, StageOptions


def check_run(options: "RunConfig") -> None:
    """Raise ValueError for options of a training run that it would not heed."""
    ranges.refuse_without(options, options.val_fraction != 0, "--val-fraction above 0", "eval_every eval_samples")
    if (warmup := options.optim.warmup_steps) and warmup > options.steps:
        raise ValueError(
            f"--optim.warmup-steps {warmup} are more than --steps {options.steps}: the learning rate would never reach "
            "--optim.lr; leave the option out (a tenth of the steps at most), or train longer"
        )


def check_stage(options: "StageOptions") -> None:
    """Raise ValueError for options of a stage that it would not heed."""
    model = options.model
    has_teacher = options.labels == "online" or options.laq_ckpt is not None
    ranges.refuse_without(options, has_teacher, "--laq-ckpt", "laq_code_seq_len laq_image_size accept_other_pairs")
    ranges.refuse_without(options.data, model.use_state, "--model.use-state", "state_dropout", "--data.")
    if options.data.state_dropout == 1:
        raise ValueError(
            "--data.state-dropout 1 hides every state in training, and a rollout would be the first to show one: pass "
            "a smaller share, or --model.no-use-state for a model without it"
        )
    if model.revision and (model.preset == "tiny" or (model.name and Path(model.name).is_dir())):
        raise ValueError(
            f"--model.revision {model.revision} is of a trunk on the hub, {model.stated_name} is none: leave it out"
        )
    if model.stated_name or not options.start:
        check_freezing(model, is_pretrained=model.preset != "tiny")


def check_freezing(model: "ModelConfig", is_pretrained: bool) -> None:
    """Raise ValueError for a vision tower that is to train in a trunk that is frozen."""
    is_frozen = is_pretrained if model.freeze_trunk is None else model.freeze_trunk
    if is_frozen and model.freeze_vision is False:
        why = "--model.freeze-trunk True" if model.freeze_trunk else "the default for pretrained weights"
        raise ValueError(
            f"--model.freeze-vision False has no effect, the vision tower is frozen with the whole trunk ({why}): pass "
            "--model.freeze-trunk False, too, or leave it out"
        )
