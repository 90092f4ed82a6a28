"""The run directory: claiming it, writing and reading checkpoints, and what a resumed run may change."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict

from smolvla_shared.config import RunConfig
from smolvla_shared.files import sync, write_text
from smolvla_shared.hashes import file_sha256
from smolvla_shared.locks import lock
from smolvla_shared.paths import check_run_dir
from smolvla_shared.refusals import decode, read_json
from smolvla_shared.run_metrics import METRICS_FILE, read_metrics
from smolvla_shared.run_sharding import gather, scatter_
from smolvla_shared.run_signals import STOPPED_FILE

# Settings that --resume may change. Weights stay bit-equal, except that accumulation_steps and the number of processes
# change the rounding, and steps changes the schedule from there on.
FREE_ON_RESUME = {
    *("resume", "run_dir", "steps", "save_every", "keep", "log_every", "eval_every", "trackers"),
    *("accumulation_steps", "data.num_workers", "data.feature_cache_gb", "model.activation_checkpointing"),
}
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
STATE_FILE = Path("training_state") / "state.pt"
RECORD_FILE = "checkpoint.json"
INPUTS_FILE = "inputs.json"
CHECKPOINT_NAME = re.compile(r"[0-9]+")
# export(directory, full weights by name, step) writes a policy, an artifact or a teacher.
Export = Callable[[Path, dict[str, Tensor], int], None]


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """checkpoint.json: every other file of a checkpoint, to detect truncated or mixed checkpoints."""

    step: int
    files: dict[str, FileRecord]


@dataclass
class TrainingState:
    """The state of a run at a step. What the step reads is a function of the step, and not part of the state."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    # Exponential moving average (EMA) of the trained parameters, by name; empty without --ema-decay.
    ema: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def ema_weights(state: TrainingState) -> Iterator[None]:
    """Within this context the module holds the EMA weights, if there are any."""
    parameters = dict(state.module.named_parameters())
    pairs = [(parameters[name], ema) for name, ema in state.ema.items()]
    _swap(pairs)
    try:
        yield
    finally:
        _swap(pairs)


@torch.no_grad()
def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        value = one.clone()
        one.copy_(other)
        other.copy_(value)


@torch.no_grad()
def update_ema(state: TrainingState, decay: float) -> None:
    """Move the EMA towards the weights. The decay is smaller in early steps, so that the initial weights fade soon."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    trained = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    torch._foreach_lerp_(list(state.ema.values()), trained, 1 - decay)


# --- starting and resuming --------------------------------------------------------------------------------------------


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as a flat one with dotted keys."""
    items = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def config_json(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    """All options as JSON values, with the precision that they and the Accelerate configuration amount to."""
    return json.loads(json.dumps(asdict(config), default=str)) | {"precision": accelerator.mixed_precision}


def flag(key: str) -> str:
    """What the user types for a setting: optim.warmup_steps -> --optim.warmup-steps."""
    return "--" + key.replace("_", "-")


def check_run(config: RunConfig, accelerator: Accelerator, product: Path | None = None) -> Path | None:
    """Validate run directory, batch size and --resume before anything expensive is loaded.

    product: a file that the script writes after the last checkpoint; without it the run is not finished

    Returns the checkpoint to resume from; None: start at step 0. Raises ValueError if a new run would overwrite a run,
    --resume would change the run or has nothing to do, the last checkpoint is damaged, another process trains in the
    directory, or the batch cannot be split evenly.
    """
    run_dir = config.run_dir
    if config.batch_size % (accelerator.num_processes * config.accumulation_steps):
        raise ValueError(
            f"--batch-size {config.batch_size} (all processes together) is not divisible by "
            f"{accelerator.num_processes} process(es) x {config.accumulation_steps} accumulation step(s)"
        )
    check_run_dir(run_dir, config.resume)
    if accelerator.is_main_process:
        check_links(run_dir)
    if not config.resume:
        return None
    if accelerator.is_main_process:
        lock_run(run_dir)
    before, now = flat(read_json(run_dir / "config.json")), flat(config_json(config, accelerator))
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    if changed - FREE_ON_RESUME:
        raise ValueError(
            "--resume would be another run, these settings differ from its config.json:\n"
            + "".join(f"  {flag(k)}: was {before.get(k)}, now {now.get(k)}\n" for k in sorted(changed - FREE_ON_RESUME))
            + f"Free to change are {', '.join(map(flag, sorted(FREE_ON_RESUME)))} and the number of processes"
        )
    for key in sorted(changed - {"resume", "run_dir"}):
        accelerator.print(f"{flag(key)}: was {before.get(key, 'not recorded')}, now {now.get(key)}")
    read_metrics(run_dir / METRICS_FILE)
    checkpoint = last_checkpoint(run_dir)
    if checkpoint and not (run_dir / INPUTS_FILE).is_file():  # it would be written anew, with whatever the data is now
        raise ValueError(
            f"--resume: {run_dir / INPUTS_FILE} is missing, without which nobody can tell whether the run reads "
            "what it began with\nPut the file back, or start a new run in another --run-dir"
        )
    done = int(checkpoint.name) if checkpoint else 0
    if done > config.steps:
        raise ValueError(f"--resume: {done} steps are done, --steps {config.steps} asks for fewer: pass {done} or more")
    if done == config.steps and (product is None or is_of(product, done)):
        accelerator.print(f"the run is finished, its {done} steps are done: pass a larger --steps to go on")
        raise SystemExit(0)  # as the run itself: a job that is queued again has not failed
    return checkpoint


def is_of(product: Path, step: int) -> bool:
    """Whether a file of the run was written after this step: that of a shorter run may still be there."""
    source = read_json(product).get("source") if product.exists() else None
    return isinstance(source, dict) and source.get("global_step") == step


def lock_run(run_dir: Path) -> None:
    lock(run_dir, f"--run-dir {run_dir}", "wait for it or stop it, or pass another --run-dir")


def check_links(run_dir: Path) -> None:
    """Raise ValueError where no link can be made, as checkpoints/last is one: some network and USB disks have none."""
    there = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.is_dir())
    with TemporaryDirectory(dir=there, prefix=".links.") as temporary:
        try:
            (Path(temporary) / "last").symlink_to("000001")
        except OSError as error:
            raise ValueError(
                f"--run-dir {run_dir}: this file system has no symbolic links ({error.strerror or error}), "
                "and checkpoints/last is one: name a directory on another disk"
            ) from error


def claim_run(config: RunConfig, accelerator: Accelerator, inputs: dict[str, str] | None = None) -> None:
    """Make the run directory, once every process has found it free; remove what a killed run left half written.

    inputs: hashes of what the run reads, by name. Raises ValueError where a resumed run would read something else, and
    if another run has taken the directory meanwhile.
    """
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        lock_run(config.run_dir)
        if (config.run_dir / "config.json").exists() and not config.resume:  # of a run that began at the same time
            check_run_dir(config.run_dir, config.resume)
        check_inputs(config.run_dir / INPUTS_FILE, inputs or {}, config.resume)
        write_text(config.run_dir / "config.json", json.dumps(config_json(config, accelerator), indent=2) + "\n")
        (config.run_dir / STOPPED_FILE).unlink(missing_ok=True)
        for left in (config.run_dir / "checkpoints").glob(".*.tmp"):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)


def check_inputs(path: Path, inputs: dict[str, str], resume: bool) -> None:
    """Record the inputs of a run, or raise ValueError if they are not those that were recorded."""
    if not resume or not path.exists():
        write_text(path, json.dumps(inputs, indent=2) + "\n")
    recorded = read_json(path)
    if changed := [name for name in recorded | inputs if recorded.get(name) != inputs.get(name)]:
        raise ValueError(
            f"--resume: not what the run began with: {', '.join(changed)} (sha256 in {path.name})\n"
            "Put back what was there, or start a new run in another --run-dir"
        )


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that checkpoints/last names; None: there is no checkpoint yet.

    If that checkpoint is damaged, or `last` is no link, raises ValueError with the name of the newest whole one.
    """
    last = run_dir / "checkpoints" / "last"
    if not last.is_symlink() and last.exists():
        found = f"{last} is no link to a checkpoint, a copy of the run has followed the link"
        raise ValueError(f"--resume: {found}\n{_go_on_from(run_dir, last, f'rm -r {last} && ')}")
    if not last.is_symlink():
        match numbered(run_dir):
            case []:
                return None
            case [first] if not damage(first):  # the process was killed before it could name its first checkpoint
                return first.resolve()
    found = last.parent / last.readlink() if last.is_symlink() else last
    problems = damage(found)
    if not problems and not CHECKPOINT_NAME.fullmatch(found.name):
        problems = [f"{found.name} is no checkpoint's name, which is its step"]
    if not problems:
        return found.resolve()
    listing = "\n  ".join(problems)
    raise ValueError(f"--resume: {found} is damaged:\n  {listing}\n{_go_on_from(run_dir, found)}")


def _go_on_from(run_dir: Path, damaged: Path, before: str = "") -> str:
    """What to do where `last` names a damaged checkpoint, with a command; `before`: what comes before it."""
    last = run_dir / "checkpoints" / "last"
    good = next((path for path in reversed(numbered(run_dir)) if path != damaged and not damage(path)), None)
    if good is None:
        return f"No other is whole: start again in another --run-dir, or remove {run_dir}"
    return f"The newest that is whole is {good.name}; to go on from it:\n  {before}ln -sfn {good.name} {last}"


def numbered(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, by step. What a user keeps beside them under other names counts for nothing."""
    found = [path for path in (run_dir / "checkpoints").glob("[0-9]*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name))


def damage(checkpoint: Path) -> list[str]:
    """How the files of a checkpoint differ from what was written, in words; [] if the checkpoint is whole."""
    try:
        record = decode(Record, read_json(checkpoint / RECORD_FILE), RECORD_FILE)
    except ValueError as error:
        return [str(error)]
    problems = []
    if CHECKPOINT_NAME.fullmatch(checkpoint.name) and int(checkpoint.name) != record.step:
        problems.append(f"it is of step {record.step}")
    for name, written in record.files.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != written.bytes:
            problems.append(f"{name}: {path.stat().st_size:,} bytes, {written.bytes:,} were written")
        elif file_sha256(path) != written.sha256:
            problems.append(f"{name}: not what was written (sha256 differs)")
    return problems


# --- writing and reading ----------------------------------------------------------------------------------------------


def save_checkpoint(config: RunConfig, state: TrainingState, accelerator: Accelerator, export: Export | None) -> None:
    """Write checkpoints/<step>, point checkpoints/last at it, and remove what --keep does not keep.

    Whenever the process dies, `last` names a whole checkpoint: a new one is written under a temporary name, synced to
    disk and renamed before the link is replaced. Sharded tensors are gathered: any number of processes can read it.
    Raises OSError, and removes the new checkpoint, if it cannot be written.
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
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except Exception as error:  # libraries report a full disk in many ways
        shutil.rmtree(temporary, ignore_errors=True)
        last = directory.with_name("last")
        raise OSError(
            f"the checkpoint of step {state.step} could not be written: {error}. {directory.parent} has "
            f"{shutil.disk_usage(directory.parent).free / 1e9:,.3f} GB free; what was written of it is removed again, "
            + (f"{last.readlink()} is still the last one. " if last.is_symlink() else "there is no earlier one. ")
            + "Make room (--keep 1 needs the least) and go on with --resume"
        ) from error
    remove(directory)  # written before the run went back to an earlier checkpoint
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
    """Write checkpoint.json: size and sha256 of every file."""
    files = {
        str(path.relative_to(checkpoint)): FileRecord(path.stat().st_size, file_sha256(path))
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    (checkpoint / RECORD_FILE).write_text(json.dumps(asdict(Record(step, files)), indent=2) + "\n")


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint if it exists. It is renamed first: a directory named by a step must be whole."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old.tmp")))


def load_checkpoint(checkpoint: Path, state: TrainingState, accelerator: Accelerator) -> None:
    """Restore a TrainingState in place."""
    # Memory-mapped: each process reads only its shards of the full tensors.
    record = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    set_state_dict(
        state.module,
        state.optimizer,
        model_state_dict=record["model"],
        optim_state_dict=record["optimizer"],
        options=FULL_STATE,
    )
    state.step = record["step"]
    for name, ema in state.ema.items():
        scatter_(ema, record["ema"][name])


def checkpoint_bytes(state: TrainingState, has_export: bool) -> int:
    """Approximate size of a checkpoint: weights, AdamW's two moments, EMA, and export."""
    parameters = list(state.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return weights * (1 + has_export) + 4 * trained * (2 + bool(state.ema))


def plan_checkpoints(config: RunConfig, state: TrainingState, has_export: bool) -> str:
    """How much of the disk the remaining checkpoints take, in words. Raises ValueError if they do not fit."""
    size = checkpoint_bytes(state, has_export)
    count = math.ceil(config.steps / config.save_every) - state.step // config.save_every
    if config.keep:  # the oldest is removed after the next is written
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
