"""The run directory: claiming it, writing and reading checkpoints, and what a resumed run may change."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict

from smolvla_shared.config import RunConfig
from smolvla_shared.files import file_sha256, sync, write_text
from smolvla_shared.run_sharding import gather, scatter_
from smolvla_shared.run_signals import STOPPED_FILE

# What a resumed run may do differently and still be the same run: bit-equal, but for accumulation_steps and the number
# of processes, which only change the rounding, and for steps, whose schedule holds from there on.
FREE_ON_RESUME = {
    *("resume", "run_dir", "steps", "save_every", "keep", "log_every", "eval_every", "trackers"),
    *("accumulation_steps", "data.num_workers", "data.feature_cache_gb", "model.activation_checkpointing"),
}
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
STATE_FILE = Path("training_state") / "state.pt"
# Size and sha256 of every other file of a checkpoint: what tells a truncated or mixed one.
RECORD_FILE = "checkpoint.json"
# Writes a directory that can be used without the run, from whole weights, by name, of a step.
Export = Callable[[Path, dict[str, Tensor], int], None]


@dataclass
class TrainingState:
    """All that a run is at a step; what it sees next is a function of the step alone (data.py)."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    # Exponential moving average (EMA) of the trained parameters, by name; empty without --ema-decay.
    ema: dict[str, Tensor] = field(default_factory=dict)


class ema_weights:
    """Within this context the module holds the EMA weights, if there are any."""

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
def update_ema(state: TrainingState, decay: float) -> None:
    """Move the EMA towards the weights. Early on the decay is smaller, so that the EMA forgets its start soon."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    trained = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    torch._foreach_lerp_(list(state.ema.values()), trained, 1 - decay)


# --- starting and resuming --------------------------------------------------------------------------------------------


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys."""
    items = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def config_json(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=str))


def flag(key: str) -> str:
    """What the user types for a setting: optim.warmup_steps -> --optim.warmup-steps."""
    return "--" + key.replace("_", "-")


def check_run(config: RunConfig, accelerator: Accelerator) -> Path | None:
    """What can be told of a run before its data and model are there; with --resume, the checkpoint to go on from.

    A run that died before its first checkpoint goes on from step 0 (None). Raises ValueError where a new run would
    overwrite another, a resumed one would be another run, its last checkpoint is damaged, or a batch does not divide.
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
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"--resume: there is no run at {run_dir} (no config.json); start without --resume")
    before, now = flat(json.loads((run_dir / "config.json").read_text())), flat(config_json(config))
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    if changed - FREE_ON_RESUME:
        raise ValueError(
            "--resume would be another run, these settings differ from its config.json:\n"
            + "".join(f"  {flag(k)}: was {before.get(k)}, now {now.get(k)}\n" for k in sorted(changed - FREE_ON_RESUME))
            + f"Free to change are {', '.join(map(flag, sorted(FREE_ON_RESUME)))} and the number of processes"
        )
    for key in sorted(changed - {"resume", "run_dir"}):
        accelerator.print(f"{flag(key)}: was {before[key]}, now {now[key]}")
    return last_checkpoint(run_dir)


def claim_run(config: RunConfig, accelerator: Accelerator) -> None:
    """Make the directory of a new run, once every process has found it free; clean up what a killed one left."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        write_text(config.run_dir / "config.json", json.dumps(config_json(config), indent=2) + "\n")
        (config.run_dir / STOPPED_FILE).unlink(missing_ok=True)
        for left in (config.run_dir / "checkpoints").glob(".*.tmp"):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that checkpoints/last names, once all its files are found to be what was written.

    None where the run has none yet. Raises ValueError for a damaged one, with the newest that is not.
    """
    last = run_dir / "checkpoints" / "last"
    if not last.is_symlink() and not numbered(run_dir):
        return None
    found = last.parent / last.readlink() if last.is_symlink() else last
    problems = damage(found)
    if not problems:
        return found.resolve()
    good = next((path for path in reversed(numbered(run_dir)) if path != found and not damage(path)), None)
    raise ValueError(
        f"--resume: {found} is damaged:\n  "
        + "\n  ".join(problems)
        + (
            f"\nThe newest that is whole is {good.name}; to go on from it:\n  ln -sfn {good.name} {last}"
            if good
            else f"\nNo other is whole: start again in another --run-dir, or remove {run_dir}"
        )
    )


def numbered(run_dir: Path) -> list[Path]:
    """The checkpoints under their own names, by step."""
    return sorted((run_dir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def damage(checkpoint: Path) -> list[str]:
    """How the files of a checkpoint differ from what was written; empty for a whole one."""
    try:
        files = json.loads((checkpoint / RECORD_FILE).read_text())["files"]
    except (OSError, ValueError) as error:
        return [f"{RECORD_FILE}: {error}"]
    problems = []
    for name, written in files.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != written["bytes"]:
            problems.append(f"{name}: {path.stat().st_size:,} bytes, {written['bytes']:,} were written")
        elif file_sha256(path) != written["sha256"]:
            problems.append(f"{name}: not what was written (sha256 differs)")
    return problems


# --- writing and reading ----------------------------------------------------------------------------------------------


def exported_weights(state: TrainingState, accelerator: Accelerator) -> dict[str, Tensor]:
    """The weights to publish, whole, on the main process: the EMA where there is one, else the last step's."""
    return gather(state.module.state_dict(), accelerator) | gather(state.ema, accelerator)


def save_checkpoint(config: RunConfig, state: TrainingState, accelerator: Accelerator, export: Export | None) -> None:
    """Write checkpoints/<step>, point checkpoints/last at it, and remove what --keep does not keep.

    Whenever the process dies, `last` names a whole checkpoint: everything is written under a temporary name, synced to
    the disk and renamed, and only then the link is replaced. Divided tensors are gathered: a checkpoint does not depend
    on how many processes wrote it, or will read it. Raises OSError, and leaves nothing of the new one, where it cannot
    be written.
    """
    record = {
        "step": state.step,
        "model": gather(state.module.state_dict(), accelerator),
        "optimizer": get_optimizer_state_dict(state.module, state.optimizer, options=FULL_STATE),
        "ema": gather(state.ema, accelerator),
    }
    if not accelerator.is_main_process:
        return
    directory = config.run_dir / "checkpoints" / f"{state.step:06d}"
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        (temporary / STATE_FILE).parent.mkdir(parents=True)
        torch.save(record, temporary / STATE_FILE)
        if export:
            export(temporary / "pretrained_model", record["model"] | record["ema"], state.step)
        write_record(temporary, state.step)
        sync_tree(temporary)
    except Exception as error:  # whatever a library makes of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        last = directory.with_name("last")
        raise OSError(
            f"the checkpoint of step {state.step} could not be written: {error}. {directory.parent} has "
            f"{shutil.disk_usage(directory.parent).free / 1e9:,.3f} GB free; what was written of it is removed again, "
            + (f"{last.readlink()} is still the last one. " if last.is_symlink() else "there is no earlier one. ")
            + "Make room (--keep 1 needs the least) and go on with --resume"
        ) from error
    remove(directory)  # a later one of a run that went back to an earlier one
    temporary.rename(directory)
    sync(directory.parent)
    link = directory.with_name(".last.tmp")
    link.symlink_to(directory.name)
    link.replace(directory.with_name("last"))
    sync(directory.parent)
    if config.keep:
        for old in [path for path in numbered(config.run_dir) if int(path.name) <= state.step][: -config.keep]:
            remove(old)


def write_record(checkpoint: Path, step: int) -> None:
    """Write checkpoint.json: of every file its size and sha256."""
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    (checkpoint / RECORD_FILE).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there. Renamed first: what is under a step's own name is whole."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old.tmp")))


def sync_tree(directory: Path) -> None:
    """Wait until all files and directories below are on the disk."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def load_checkpoint(checkpoint: Path, state: TrainingState, accelerator: Accelerator) -> None:
    """Restore a TrainingState in place."""
    # Mapped, not read: each process takes its part of the whole tensors.
    record = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    set_state_dict(
        state.module,
        state.optimizer,
        model_state_dict=record["model"],
        optim_state_dict=record["optimizer"],
        options=FULL_STATE,
    )
    state.step = record["step"]
    for name, average in state.ema.items():
        scatter_(average, record["ema"][name])


def checkpoint_bytes(state: TrainingState, has_export: bool) -> int:
    """About what a checkpoint takes: the weights, AdamW's two averages and the running one, and the export."""
    parameters = list(state.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return weights * (1 + has_export) + 4 * trained * (2 + bool(state.ema))


def plan_checkpoints(config: RunConfig, state: TrainingState, has_export: bool) -> str:
    """What the checkpoints to come take of the disk, in words. Raises ValueError if it has less."""
    size = checkpoint_bytes(state, has_export)
    count = math.ceil(config.steps / config.save_every) - state.step // config.save_every
    if config.keep:  # the oldest goes once the next is there
        count = min(count, config.keep + 1 - min(config.keep, len(numbered(config.run_dir))))
    place = next(path for path in (config.run_dir.absolute(), *config.run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    need = f"{count} checkpoint(s) of about {size / 1e9:,.3f} GB take {count * size / 1e9:,.3f} GB more of the disk"
    if count * size > free:
        raise ValueError(
            f"{need}, but {place} has {free / 1e9:,.3f} GB free: pass --keep 1 (the newest only), a larger "
            "--save-every or another --run-dir"
        )
    return f"{need}; {free / 1e9:,.0f} GB are free"
