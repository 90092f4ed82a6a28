"""The training loop, checkpoints and logging of every training command: one function, train()."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils.data import DataLoader
from tqdm import tqdm

from smolvla_shared import losses
from smolvla_shared.batch import Batch, to_device
from smolvla_shared.config import OptimConfig, RunConfig
from smolvla_shared.model import SmolVLASharedCore

# What a resumed run may do differently without becoming another run.
FREE_ON_RESUME = {"resume", "run_dir", "steps", "save_every", "log_every", "eval_every", "data.num_workers"}
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainingState:
    """All that a run is at a step; what it sees next is a function of the step alone (data.py)."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    # Running average of the trained parameters, by name; empty without --ema-decay.
    ema: dict[str, Tensor] = field(default_factory=dict)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's device placement and mixed precision, and the seed of the initial weights."""
    accelerator = Accelerator(mixed_precision=config.precision, step_scheduler_with_optimizer=False)
    set_seed(config.seed)
    return accelerator


# --- the run directory ------------------------------------------------------------------------------------------------


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


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its step. On resume the lines after it are dropped."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        kept = [line for line in self.read() if line["step"] <= first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def write(self, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def plot_curves(metrics: list[dict[str, float]], path: Path) -> None:
    """Losses and held-out metrics over steps; what belongs together, an error and its baseline, shares a panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, list[str]] = {}
    for name in sorted({key for line in metrics for key in line if key.startswith(("loss/", "val/", "usage/"))}):
        panels.setdefault(name.split("/")[1].split("_of_")[0], []).append(name)
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if name in line]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axis.set(title=title, xlabel="step")
        if any(name.startswith("loss/") for name in names):
            axis.set_yscale("log")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


@torch.no_grad()
def held_out_errors(
    core: SmolVLASharedCore, batches: DataLoader, prepare: Callable[[Any], Batch], accelerator: Accelerator
) -> dict[str, float]:
    """Errors on held-out samples, for each target, normalised: {target}, the flow-matching loss; {target}_error, the
    mean squared error of the predicted mean; {target}_error_of_mean, that of always predicting the training mean.

    The predicted mean is a sample of a single Euler step: at t = 1 the network knows nothing of the target but the
    observation, and its best velocity there is noise - E[target | observation].
    """
    totals: dict[str, Tensor] = {}
    for raw in batches:
        batch = prepare(to_device(raw, accelerator.device))
        with accelerator.autocast():
            errors = core(batch)
            for name, target in batch.targets.items():
                mean = core.sample(batch, name, target.noise[:, 0], num_steps=1)
                truth = target.value[..., : mean.shape[-1]]
                rows = {
                    name: errors[name],
                    f"{name}_error": (mean - truth).square().mean(-1),
                    f"{name}_error_of_mean": truth.square().mean(-1),
                }
                for key, values in rows.items():
                    part = torch.stack([losses.masked_sum(values, target.mask), target.mask.sum()])
                    totals[key] = totals.get(key, 0) + part
    reduced = {key: accelerator.reduce(total, "sum").tolist() for key, total in totals.items()}
    return {key: total / max(count, 1) for key, (total, count) in reduced.items()}


# --- the loop ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from the peak down to its final share; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress)))


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


def accumulate_gradients(
    accelerator: Accelerator, module: nn.Module, passes: list[Any], weights: dict[str, float]
) -> dict[str, Tensor]:
    """Backward through one step's batches; returns this process's part of each target's loss.

    A loss is the mean over the valid tokens of the *whole* step, over all processes and accumulation steps: the parts
    add up to it.
    """
    counts = {name: sum(batch.masks[name].sum() for batch in passes) for name in passes[0].masks}
    counts = {name: accelerator.reduce(count.float(), "sum") for name, count in counts.items()}
    totals: dict[str, Tensor] = {}
    for index, batch in enumerate(passes):
        is_last = index == len(passes) - 1
        with nullcontext() if is_last else accelerator.no_sync(module):
            with accelerator.autocast():
                errors = module(batch)
            parts = {name: losses.masked_mean(e, batch.masks[name], counts[name]) for name, e in errors.items()}
            loss = sum(weights.get(name, 1.0) * part for name, part in parts.items())
            # DDP averages gradients over processes; the loss is a part of a sum over them.
            accelerator.backward(loss * accelerator.num_processes)
        totals = {name: totals.get(name, 0) + part.detach() for name, part in parts.items()}
    return totals


@torch.no_grad()
def update_average(state: TrainingState, decay: float) -> None:
    """Move the running average towards the weights. It forgets its start as fast as it can: early on it is a mean."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    trained = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    torch._foreach_lerp_(list(state.ema.values()), trained, 1 - decay)


class Window:
    """What has happened since the last line of metrics.jsonl; losses stay on the device until they are read."""

    def __init__(self, first_step: int):
        self.first_step, self.start = first_step, time.perf_counter()
        self.losses: dict[str, Tensor] = {}
        self.extra: dict[str, float] = {}

    def add(self, parts: dict[str, Tensor], extra: dict[str, float]) -> None:
        self.losses = {name: self.losses.get(name, 0) + part for name, part in parts.items()}
        self.extra |= extra

    def read(self, accelerator: Accelerator, step: int, batch_size: int) -> dict[str, float]:
        """Mean losses over the window's steps, the newest extra metrics, and the speed."""
        span = step - self.first_step
        means = {f"loss/{name}": (accelerator.reduce(s, "sum") / span).item() for name, s in self.losses.items()}
        samples_per_s = span * batch_size / (time.perf_counter() - self.start)
        return means | self.extra | {"samples": step * batch_size, "time/samples_per_s": samples_per_s}


def train(
    config: RunConfig,
    accelerator: Accelerator,
    module: nn.Module,
    make_batches: Callable[[int], DataLoader],
    prepare: Callable[[Any], Any],
    *,
    loss_weights: dict[str, float] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    export: Callable[[Path], None] | None = None,
    after_step: Callable[[int], dict[str, float]] = lambda step: {},
    checkpoint: Path | None = None,
) -> None:
    """Train `module` in place for config.steps optimizer steps; with --ema-decay it ends as the running average.

    module:       module(batch) returns the error of each token, {target: [B, T]}; batch.masks says which count
    make_batches: the loader of this process from a given step on, accumulation_steps raw batches a step
    prepare:      raw batch, on the device, -> what module takes
    loss_weights: weight of each target in the loss; 1 where not given
    evaluate:     held-out metrics, called every eval_every steps and at the end
    export:       writes a directory that can be used without the run, called for every checkpoint
    after_step:   called with the step after each one; what it returned last is logged
    checkpoint:   what to go on from (check_run)
    """
    claim_run(config, accelerator)
    optim = config.optim
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    prepared, prepared_optimizer = accelerator.prepare(module, optimizer)
    state = TrainingState(module, optimizer)
    if config.ema_decay:
        state.ema = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    if checkpoint:
        load_checkpoint(checkpoint, state)
    is_main = accelerator.is_main_process
    log = MetricsLog(config.run_dir / "metrics.jsonl", state.step) if is_main else None

    module.train()
    batches = iter(make_batches(state.step))
    bar = tqdm(initial=state.step, total=config.steps, desc=config.run_dir.name, unit="step", disable=not is_main)
    window = Window(state.step)
    while state.step < config.steps:
        passes = [prepare(to_device(next(batches), accelerator.device)) for _ in range(config.accumulation_steps)]
        parts = accumulate_gradients(accelerator, prepared, passes, loss_weights or {})
        grad_norm = accelerator.clip_grad_norm_(trained, optim.max_grad_norm)
        rate = learning_rate(state.step, config.steps, optim)
        for group in optimizer.param_groups:
            group["lr"] = rate
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        if config.ema_decay:
            update_average(state, config.ema_decay)
        state.step += 1
        window.add(parts, after_step(state.step))
        bar.update()

        is_end = state.step == config.steps
        evaluates = evaluate is not None and (state.step % config.eval_every == 0 or is_end)
        saves = state.step % config.save_every == 0 or is_end
        # Logged before it is saved: a resumed run has nothing to average over, and nothing that is not finite is kept.
        if state.step % config.log_every == 0 or evaluates or saves:
            metrics = window.read(accelerator, state.step, config.batch_size)
            metrics |= {"lr": rate, "grad_norm": float(grad_norm)}
            if not all(math.isfinite(value) for value in metrics.values()):
                raise FloatingPointError(f"loss or gradients are not finite at step {state.step}: {metrics}")
            shown = {name.removeprefix("loss/"): f"{v:.4f}" for name, v in metrics.items() if name.startswith("loss/")}
            bar.set_postfix(shown | {"samples/s": f"{metrics['time/samples_per_s']:.0f}"})
            if evaluates:
                module.eval()
                with ema_weights(state):
                    metrics |= {f"val/{name}": value for name, value in evaluate().items()}
                module.train()
            if log:
                log.write({"step": state.step, **metrics})
            window = Window(state.step)
        if saves:
            save_checkpoint(config.run_dir, state, accelerator, export)
            accelerator.wait_for_everyone()
            if log:
                plot_curves(log.read(), config.run_dir / "curves.png")
    bar.close()
    del batches  # ends the loader's workers
    if config.ema_decay:
        for parameter, average in zip(trained, state.ema.values(), strict=True):
            parameter.data.copy_(average)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide about the numbers."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "lerobot", "accelerate", "numpy")}
