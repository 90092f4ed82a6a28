"""The training loop of every training command: one function, train()."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from smolvla_shared import losses
from smolvla_shared.batch import Batch, to_device
from smolvla_shared.checkpoint import (
    TrainingState,
    claim_run,
    ema_weights,
    load_checkpoint,
    save_checkpoint,
    update_average,
)
from smolvla_shared.config import OptimConfig, RunConfig
from smolvla_shared.metrics import MetricsLog, Window, plot_curves
from smolvla_shared.model import SmolVLASharedCore


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's device placement and mixed precision, and the seed of the initial weights."""
    accelerator = Accelerator(mixed_precision=config.precision, step_scheduler_with_optimizer=False)
    set_seed(config.seed)
    return accelerator


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


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from the peak down to its final share; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress)))


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
    resume_from: Path | None = None,
) -> None:
    """Train `module` in place for config.steps optimizer steps; with --ema-decay it ends as the running average.

    module:       module(batch) returns the error of each token, {target: [B, T]}; batch.masks says which count
    make_batches: the loader of this process from a given step on, accumulation_steps raw batches a step
    prepare:      raw batch, on the device, -> what module takes
    loss_weights: weight of each target in the loss; 1 where not given
    evaluate:     held-out metrics, called every eval_every steps and at the end
    export:       writes a directory that can be used without the run, called for every checkpoint
    after_step:   called with the step after each one; what it returned last is logged
    resume_from:  the checkpoint to go on from (check_run)
    """
    claim_run(config, accelerator)
    optim = config.optim
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    prepared, prepared_optimizer = accelerator.prepare(module, optimizer)
    state = TrainingState(module, optimizer)
    if config.ema_decay:
        state.ema = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    if resume_from:
        load_checkpoint(resume_from, state)
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
