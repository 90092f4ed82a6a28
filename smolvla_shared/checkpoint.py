"""The run directory: claiming it, writing and reading checkpoints, and what a resumed run may change."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from smolvla_shared.config import RunConfig

# What a resumed run may do differently without becoming another run.
FREE_ON_RESUME = {
    *("resume", "run_dir", "steps", "save_every", "log_every", "eval_every"),
    *("data.num_workers", "model.activation_checkpointing"),
}
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainingState:
    """All that a run is at a step; what it sees next is a function of the step alone (data.py)."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    # Running average of the trained parameters, by name; empty without --ema-decay.
    ema: dict[str, Tensor] = field(default_factory=dict)


class ema_weights:
    """Within this context the module holds the averaged weights, if there are any."""

    def __init__(self, state: TrainingState):
        parameters = dict(state.module.named_parameters())
        self.pairs = [(parameters[name], average) for name, average in state.ema.items()]

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, average in self.pairs:
                value = parameter.clone()
                parameter.copy_(average)
                average.copy_(value)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: Any) -> None:
        self._swap()


@torch.no_grad()
def update_average(state: TrainingState, decay: float) -> None:
    """Move the running average towards the weights. It forgets its start as fast as it can: early on it is a mean."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    trained = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    torch._foreach_lerp_(list(state.ema.values()), trained, 1 - decay)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys."""
    items = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def config_json(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=str))


def check_run(config: RunConfig, accelerator: Accelerator) -> Path | None:
    """What can be told of a run before its data and model are there; with --resume, the checkpoint to go on from.

    Raises ValueError where a new run would overwrite another, a resumed one would be another run, or a batch does not
    divide.
    """
    run_dir = config.run_dir
    if config.batch_size % (accelerator.num_processes * config.accumulation_steps):
        raise ValueError(
            f"--batch-size {config.batch_size} (all processes together) is not divisible by "
            f"{accelerator.num_processes} process(es) x {config.accumulation_steps} accumulation step(s)"
        )
    if not config.resume:
        if run_dir.exists():
            raise ValueError(f"--run-dir {run_dir} exists: pass --resume to go on with it, or another directory")
        return None
    last = run_dir / "checkpoints" / "last"
    if not last.exists():
        raise ValueError(
            f"--resume: there is no checkpoint at {last}; remove {run_dir} if it exists, and start without --resume"
        )
    before, now = flat(json.loads((run_dir / "config.json").read_text())), flat(config_json(config))
    changed = [
        f"  {key}: was {before.get(key)}, now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME
    ]
    if changed:
        raise ValueError(
            "--resume would be another run, these settings differ from its config.json "
            f"(free to change: {', '.join(sorted(FREE_ON_RESUME))}):\n" + "\n".join(changed)
        )
    return last.resolve()


def claim_run(config: RunConfig, accelerator: Accelerator) -> None:
    """Make the directory of a new run, once every process has found it free."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not config.resume:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.json").write_text(json.dumps(config_json(config), indent=2) + "\n")


def save_checkpoint(
    run_dir: Path, state: TrainingState, accelerator: Accelerator, export: Callable[[Path], None] | None
) -> None:
    """Write checkpoints/<step> under a temporary name, rename it, and point checkpoints/last at it."""
    model_state, optimizer_state = get_state_dict(state.module, state.optimizer, options=FULL_STATE)
    if not accelerator.is_main_process:
        return
    name = f"{state.step:06d}"
    checkpoints = run_dir / "checkpoints"
    temporary = checkpoints / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "training_state").mkdir(parents=True)
    record = {"step": state.step, "model": model_state, "optimizer": optimizer_state, "ema": state.ema}
    torch.save(record, temporary / "training_state" / "state.pt")
    if export:
        with ema_weights(state):
            export(temporary / "pretrained_model")
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(checkpoints / name, ignore_errors=True)
    temporary.rename(checkpoints / name)
    link = checkpoints / ".last.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(checkpoints / "last")


def load_checkpoint(checkpoint: Path, state: TrainingState) -> None:
    """Restore a TrainingState in place."""
    record = torch.load(checkpoint / "training_state" / "state.pt", map_location="cpu", weights_only=True)
    set_state_dict(
        state.module,
        state.optimizer,
        model_state_dict=record["model"],
        optim_state_dict=record["optimizer"],
        options=FULL_STATE,
    )
    state.step = record["step"]
    for name, average in state.ema.items():
        average.copy_(record["ema"][name])
