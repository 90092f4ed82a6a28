"""The training loop of every training command: one function, train()."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils.data import DataLoader

from smolvla_shared import losses
from smolvla_shared.batch import Batch, to_device
from smolvla_shared.checkpoint import (
    FULL_STATE,
    Export,
    TrainingState,
    claim_run,
    ema_weights,
    exported_weights,
    load_checkpoint,
    plan_checkpoints,
    save_checkpoint,
    update_average,
)
from smolvla_shared.config import LATENT, OptimConfig, RunConfig
from smolvla_shared.metrics import OTHER, Recorder, StepClock
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.sharding import check_plugin, distribute, whole
from smolvla_shared.stopping import StopSignals


def make_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's device placement, mixed precision and trackers, and the seed of the initial weights."""
    if missing := [name for name in config.trackers if not find_spec(name)]:
        raise ValueError(f"--trackers {' '.join(missing)}: not installed here: pip install {' '.join(missing)}")
    accelerator = Accelerator(
        mixed_precision=config.precision,
        step_scheduler_with_optimizer=False,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.run_dir), logging_dir=str(config.run_dir / "tensorboard")),
    )
    check_plugin(accelerator)
    set_seed(config.seed)
    return accelerator


@torch.no_grad()
def held_out_errors(
    core: SmolVLASharedCore,
    batches: DataLoader,
    prepare: Callable[..., Batch],
    accelerator: Accelerator,
    labels: Callable[[Any], Tensor] | None = None,
) -> dict[str, float]:
    """Errors on held-out samples, for each target, normalised: {target}, the flow-matching loss; {target}_error, the
    mean squared error of the predicted mean; {target}_error_of_mean, that of always predicting the training mean.

    The predicted mean is a sample of a single Euler step: at t = 1 the network knows nothing of the target but the
    observation, and its best velocity there is noise - E[target | observation].
    """
    totals: dict[str, Tensor] = {}
    for raw in batches:
        raw = to_device(raw, accelerator.device)
        batch = prepare(raw, *([labels(raw)] if labels else []))
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


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW: on a CPU, too, it takes a fraction of the time of PyTorch's default."""
    options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    return torch.optim.AdamW(parameters, **options, fused=True)


def clip_gradients(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Have the fused AdamW's next step read the gradients scaled down to `max_norm` at most; returns their norm.

    The gradients times min(1, max_norm / norm), like torch.nn.utils.clip_grad_norm_, but without a pass of its own over
    all of them: the kernels divide by a scale anyway, that of gradients which were scaled up to fit float16.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    optimizer.grad_scale = (norm.float() / max_norm).clamp(min=1)
    return norm


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from the peak down to its final share; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def accumulate_gradients(
    accelerator: Accelerator, module: nn.Module, passes: list[Any], weights: dict[str, float], clock: StepClock
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Backward through one step's batches; returns this process's part of each target's loss, and of latent targets
    the errors of each slot, [2, S]: the sum of the valid ones and their number.

    A loss is the mean over the valid tokens of the *whole* step, over all processes and accumulation steps: the parts
    add up to it.
    """
    counts = {name: sum(batch.masks[name].sum() for batch in passes) for name in passes[0].masks}
    counts = {name: accelerator.reduce(count.float(), "sum") for name, count in counts.items()}
    totals: dict[str, Tensor] = {}
    slots: dict[str, Tensor] = {}
    for index, batch in enumerate(passes):
        is_last = index == len(passes) - 1
        with nullcontext() if is_last else accelerator.no_sync(module):
            with accelerator.autocast():
                errors = module(batch)
            parts = {name: losses.masked_mean(e, batch.masks[name], counts[name]) for name, e in errors.items()}
            loss = sum(weights.get(name, 1.0) * part for name, part in parts.items())
            # A factor of 1, or NaN: a loss that is not finite makes gradients that are not, in every process.
            loss = loss * (1 + 0 * loss.detach())
            clock.mark("forward")
            # DDP and FSDP average gradients over processes; the loss is a part of a sum over them.
            accelerator.backward(loss * accelerator.num_processes)
        totals = {name: totals.get(name, 0) + part.detach() for name, part in parts.items()}
        if LATENT in errors:
            mask = batch.masks[LATENT]
            sums = torch.stack([(errors[LATENT].detach() * mask).sum(0), mask.sum(0)])
            slots[LATENT] = slots.get(LATENT, 0) + sums
        clock.mark("backward")
    return totals, slots


class FiniteGradients:
    """Stops a run whose gradients are not finite, and keeps them out of the weights until the host knows.

    Asking the device in every step would make each wait for the last. So the first step whose gradient norm is not
    finite is kept on the device, and from it on AdamW (fused) skips its updates: the weights stay those of that step
    until it is read, at once on a CPU, at the next line of metrics.jsonl or checkpoint on a GPU. All processes see the
    same norm, so they stop together.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.is_free = device.type == "cpu"  # to ask
        self.first_bad = torch.full((), math.inf, device=device)
        optimizer.found_inf = self.skip = torch.zeros((), device=device)

    def watch(self, step: int, grad_norm: Tensor) -> None:
        self.first_bad = torch.minimum(self.first_bad, torch.where(grad_norm.isfinite(), math.inf, float(step)))
        self.skip.copy_(self.first_bad.isfinite())

    def bad_step(self, must_know: bool) -> int | None:
        """The first bad step, counted from 1; None also where asking costs and nobody must know yet."""
        if not (self.is_free or must_know):
            return None
        step = self.first_bad.item()
        return int(step) if math.isfinite(step) else None


def read_passes(
    batches: Iterator[Any],
    count: int,
    accelerator: Accelerator,
    labels: Callable[[Any], Tensor] | None,
    prepare: Callable[..., Any],
    clock: StepClock,
) -> list[Any]:
    """The next `count` batches as the module takes them, on the device."""
    passes = []
    for _ in range(count):
        raw = next(batches)
        clock.mark("data")
        raw = to_device(raw, accelerator.device)
        clock.mark("transfer")
        latents = [labels(raw)] if labels else []
        clock.mark("teacher")
        passes.append(prepare(raw, *latents))
        clock.mark("preprocess")
    return passes


@torch.no_grad()
def save_not_finite(
    step: int,
    config: RunConfig,
    accelerator: Accelerator,
    module: nn.Module,
    batches: Iterator[Any],
    labels: Callable[[Any], Tensor] | None,
    prepare: Callable[..., Any],
) -> FloatingPointError:
    """Save what reproduces a step whose loss or gradients are not finite; returns the error to raise.

    Each process writes <run_dir>/not_finite/process<rank>.pt: the step, the fields of its raw batches (the first of
    `batches`), and the weights that the step was taken from.
    """
    raws = [next(batches) for _ in range(config.accumulation_steps)]
    guilty = []
    for raw in raws:
        on_device = to_device(raw, accelerator.device)
        with accelerator.autocast():
            errors = module(prepare(on_device, *([labels(on_device)] if labels else [])))
        bad = torch.stack([~e.isfinite().all(-1) for e in errors.values()]).any(0)
        guilty += [key for key, is_bad in zip(raw.keys, bad.tolist(), strict=True) if is_bad]
    path = config.run_dir / "not_finite" / f"process{accelerator.process_index}.pt"
    path.parent.mkdir(exist_ok=True)
    weights = get_model_state_dict(module, options=FULL_STATE)
    torch.save({"step": step, "batches": [asdict(raw) for raw in raws], "weights": weights}, path)
    guilty, everyone = gather_object(guilty), gather_object([key for raw in raws for key in raw.keys])
    which = "the errors of these samples" if guilty else "no sample's error, but the gradient of one or more of these"
    return FloatingPointError(
        f"loss or gradients are not finite at step {step}: {which}: {'; '.join(guilty or everyone)}. The batch and the "
        f"weights before it: torch.load({str(path)!r}). Nothing of it is in a checkpoint"
    )


def train(
    config: RunConfig,
    accelerator: Accelerator,
    module: nn.Module,
    make_batches: Callable[[int], DataLoader],
    prepare: Callable[..., Any],
    *,
    labels: Callable[[Any], Tensor] | None = None,
    loss_weights: dict[str, float] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    export: Export | None = None,
    after_step: Callable[[int], dict[str, float]] = lambda step: {},
    resume_from: Path | None = None,
) -> dict[str, Tensor]:
    """Train `module` in place for config.steps optimizer steps; returns, on the main process, the whole weights to
    publish: those of the last step or, with --ema-decay, their running average.

    module:       module(batch) returns the error of each token, {target: [B, T]}; batch.masks says which count
    make_batches: the loader of this process from a given step on, accumulation_steps raw batches a step
    prepare:      raw batch, on the device (and its latents) -> what module takes
    labels:       raw batch, on the device -> its latents
    loss_weights: weight of each target in the loss; 1 where not given
    evaluate:     held-out metrics, called every eval_every steps and at the end
    export:       writes what can be used without the run, called for every checkpoint
    after_step:   called with the step after each one; what it returned last is logged
    resume_from:  the checkpoint to go on from (check_run)

    Raises SystemExit(EXIT_STOPPED) after a signal (stopping.py), FloatingPointError at a step that is not finite,
    OSError where a checkpoint cannot be written.
    """
    optim = config.optim
    prepared = distribute(module, accelerator)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, optim)
    state = TrainingState(module, optimizer)
    if config.ema_decay:
        state.ema = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    if resume_from:
        load_checkpoint(resume_from, state, accelerator)
    accelerator.print(plan_checkpoints(config, state, export is not None))
    claim_run(config, accelerator)
    gradients = FiniteGradients(optimizer, accelerator.device)
    module.train()
    with (
        StopSignals(accelerator.num_processes) as signals,
        Recorder(config, accelerator, state.window, state.step) as recorder,
    ):
        with signals.hidden():
            batches = iter(make_batches(state.step))
        while state.step < config.steps:
            passes = read_passes(batches, config.accumulation_steps, accelerator, labels, prepare, recorder.clock)
            parts, slots = accumulate_gradients(accelerator, prepared, passes, loss_weights or {}, recorder.clock)
            grad_norm = clip_gradients(optimizer, trained, optim.max_grad_norm)
            gradients.watch(state.step + 1, grad_norm)
            rate = learning_rate(state.step, config.steps, optim)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            if config.ema_decay:
                update_average(state, config.ema_decay)
            state.step += 1
            recorder.add(parts, slots, after_step(state.step))

            is_end = state.step == config.steps
            stops = signals.wanted() and not is_end
            evaluates = evaluate is not None and (state.step % config.eval_every == 0 or is_end)
            logs = state.step % config.log_every == 0 or evaluates or is_end
            saves = state.step % config.save_every == 0 or is_end or stops
            if bad_step := gradients.bad_step(must_know=logs or saves):
                # What a step reads is a function of the step: its batch need not be kept, it is read again.
                again = iter(make_batches(bad_step - 1))
                raise save_not_finite(bad_step, config, accelerator, module, again, labels, prepare)
            held_out = {}
            if evaluates:
                module.eval()
                with ema_weights(state):
                    held_out = {f"val/{name}": value for name, value in evaluate().items()}
                module.train()
            if logs:
                recorder.write({"lr": rate, "grad_norm": float(grad_norm), **held_out})
            if saves:
                save_checkpoint(config, state, accelerator, export)
                accelerator.wait_for_everyone()
            if evaluates or saves:
                recorder.draw()
            if stops:
                signals.exit(config.run_dir, state.step, accelerator)
            recorder.clock.mark(OTHER)
        del batches  # ends the loader's workers
    return exported_weights(state, accelerator)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide about the numbers."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "lerobot", "accelerate", "numpy")}


def origin(config: RunConfig, step: int, datasets: list[str]) -> dict[str, Any]:
    """Where published weights are from, for the JSON file beside them."""
    return {
        "run": config.run_dir.name,
        "global_step": step,
        "datasets": tuple(datasets),
        "weights": config.published_weights,
        "versions": versions(),
    }
