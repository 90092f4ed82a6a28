"""A training run: everything that keeps it alive, so that a script's loop shows nothing but the method.

    accelerator, resume_from = start_run(config)
    ...
    with Run(config, accelerator, core, resume_from, export) as run:
        for raws in run.steps(loaders.train):          # accumulation_steps raw batches of this process
            batches = [...]                            # labels, preprocessing
            counts = valid_tokens(batches, accelerator)
            for batch in run.passes(batches):
                errors = run.core(batch)
                loss = masked_mean(errors[name], batch.masks[name], counts[name])
                run.backward(loss)
            run.update()

The parts of a run are in files of their own: run_checkpoint, run_metrics, run_optimizer, run_processes, run_sharding,
run_signals.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
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

from smolvla_shared.batch import Labels, RawBatch, to_device
from smolvla_shared.command import is_out_of_memory
from smolvla_shared.config import RunConfig
from smolvla_shared.data import RobotDataset
from smolvla_shared.hashes import dataset_fingerprint, json_sha256
from smolvla_shared.run_checkpoint import (
    FULL_STATE,
    Export,
    TrainingState,
    check_run,
    claim_run,
    ema_weights,
    load_checkpoint,
    plan_checkpoints,
    save_checkpoint,
    update_ema,
)
from smolvla_shared.run_metrics import OTHER, Recorder
from smolvla_shared.run_optimizer import FiniteGradients, clip_gradients, learning_rate, make_optimizer
from smolvla_shared.run_processes import Transfer, describe_precision, make_accelerator
from smolvla_shared.run_sharding import check_plugin, distribute, gather
from smolvla_shared.run_signals import StopSignals


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    # By the index that samples name them with.
    dataset_names: list[str] = field(default_factory=list)
    # By name: a dataset or an artifact may change while its path stays.
    hashes: dict[str, str] = field(default_factory=dict)


def start_run(config: RunConfig, product: Path | None = None) -> tuple[Accelerator, Path | None]:
    """The Accelerator of a run, and the checkpoint that --resume goes on from (None: step 0).

    product: a JSON file that the script writes after the last checkpoint, with the step in its `source`

    Seeds the initial weights; does not make the run directory yet. Raises ValueError for trackers that are not
    installed, an Accelerate configuration that would be ignored, and what run_checkpoint.check_run and
    launch.stated_precision refuse.
    """
    if missing := [name for name in config.trackers if not find_spec(name)]:
        raise ValueError(f"--trackers {' '.join(missing)}: not installed here: pip install {' '.join(missing)}")
    accelerator = make_accelerator(
        config.precision,
        step_scheduler_with_optimizer=False,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.run_dir), logging_dir=str(config.run_dir / "tensorboard")),
    )
    accelerator.print(describe_precision(config.precision, accelerator.device))
    check_plugin(accelerator)
    resume_from = check_run(config, accelerator, product)
    set_seed(config.seed)
    return accelerator, resume_from


class Run:
    """Keeps a run alive around a script's loop: resuming, signals, accumulation, clipping and the AdamW step, EMA,
    metrics, checkpoints and export. Use it as a context; see the top of this file.

    core:      what a training pass calls: the given module, as a full copy or sharded over the processes
    step:      optimizer steps done
    evaluates: after update(), whether this step is due for an evaluation on held-out samples
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        module: nn.Module,
        resume_from: Path | None = None,
        export: Export | None = None,
        inputs: Inputs | None = None,
    ):
        """Distribute the module, restore the checkpoint `resume_from`, and claim the run directory.

        export: writes a policy, an artifact or a teacher into a directory of each checkpoint, from full weights
        inputs: what the run reads (`inputs`); a resumed run must read the same

        Raises ValueError if the disk has no room for the checkpoints to come, and what run_checkpoint.claim_run
        refuses.
        """
        self.config, self.accelerator, self.module, self.export = config, accelerator, module, export
        self.core = distribute(module, accelerator)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.trained, config.optim)
        self.state = TrainingState(module, self.optimizer)
        if config.ema_decay:
            self.state.ema = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        if resume_from:
            load_checkpoint(resume_from, self.state, accelerator)
        inputs = inputs or Inputs()
        self.dataset_names = inputs.dataset_names if len(inputs.dataset_names) > 1 else []
        self.dataset: Tensor | None = None  # [B], of this pass's samples, if there are several
        accelerator.print(plan_checkpoints(config, self.state, export is not None))
        claim_run(config, accelerator, inputs.hashes)
        self.gradients = FiniteGradients(self.optimizer, accelerator.device)
        self.bad_samples: list[Tensor] = []  # of this step's passes
        self.evaluates = False
        module.train()

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            self.signals = stack.enter_context(StopSignals(self.accelerator.num_processes))
            self.recorder = stack.enter_context(
                Recorder(self.config, self.accelerator, self.state.step, self.dataset_names)
            )
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self.stack.__exit__(kind, error, traceback)
        if error and is_out_of_memory(error):
            config, processes = self.config, self.accelerator.num_processes
            parts, of_process = processes * config.accumulation_steps, config.batch_size // processes
            more = [n for n in range(config.accumulation_steps + 1, of_process + 1) if of_process % n == 0]
            fix = f"--accumulation-steps {more[0]}, which keeps the batch, or " if more else ""
            raise ValueError(
                f"out of memory at step {self.step + 1}: {str(error).splitlines()[0]}\n"
                f"A pass has {config.batch_size // parts} samples (--batch-size {config.batch_size} / {parts}): pass "
                f"{fix}a smaller --batch-size. --precision bf16 takes less memory, too, and in both stages "
                "--model.activation-checkpointing"
            ) from error

    @property
    def step(self) -> int:
        return self.state.step

    def mark(self, phase: str) -> None:
        """Charge the time since the last mark to this phase of the step, such as "teacher" or "preprocess"."""
        self.recorder.clock.mark(phase)

    def steps(self, make_batches: Callable[[int], DataLoader]) -> Iterator[list[RawBatch]]:
        """The raw batches of every step that is left, on the device; accumulation_steps batches for each.

        make_batches: the loader of this process, from a given step on

        A step's metrics and checkpoint are written when the next step is asked for. Raises FloatingPointError after a
        step whose gradients are not finite, SystemExit(EXIT_STOPPED) after a signal (run_signals.py), and OSError if a
        checkpoint cannot be written.
        """
        self.make_batches, transfer = make_batches, Transfer(self.accelerator.device)
        with self.signals.hidden():
            batches = iter(make_batches(self.step))
        while self.step < self.config.steps:
            raws = []
            for _ in range(self.config.accumulation_steps):
                raw = next(batches)
                self.mark("data")
                raws.append(transfer(raw))
                self.mark("transfer")
            self.raws = raws
            yield raws
            self._finish_step()

    def passes[B](self, batches: Sequence[B]) -> Iterator[B]:
        """The batches of a step, one forward and backward pass each.

        DDP sums the gradients over the processes in the last pass only. FSDP2 does in every pass: until it has, each
        process holds the full gradients, and accumulation is asked for where memory is short.
        """
        for index, batch in enumerate(batches):
            sums = index == len(batches) - 1 or self.accelerator.is_fsdp2
            if self.dataset_names:
                numbers = torch.tensor(self.raws[index].dataset)
                pinned = numbers.pin_memory() if torch.cuda.is_available() else numbers  # else the host would wait
                self.dataset = to_device(pinned, self.accelerator.device)
            with nullcontext() if sums else self.accelerator.no_sync(self.core):
                yield batch

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this pass's part of the loss. The loss is the sum of the parts of all passes and processes."""
        # If the loss is inf or NaN, so are all gradients (inf * 0 = NaN): every process then sees it in the norm.
        loss = loss * (1 + 0 * loss.detach())
        self.mark("forward")
        # DDP and FSDP average gradients over the processes.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        self.mark("backward")

    def record(self, losses: dict[str, Tensor], errors: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        """Record a pass for metrics.jsonl: the pass's part of each loss, and token errors and masks, [B, T], [B] or,
        of a teacher, [B * V]: all views of a sample, then of the next.
        """
        self.recorder.window.add(losses, errors, masks, self.dataset)
        bad = [~error.detach().isfinite().reshape(len(error), -1).all(1) for error in errors.values()]
        self.bad_samples.append(torch.stack(bad).any(0))

    def update(self) -> None:
        """Clip the gradients, take the optimizer's step if they are finite, and update the EMA."""
        config, state = self.config, self.state
        self.grad_norm = clip_gradients(self.optimizer, self.trained, config.optim.max_grad_norm)
        self.gradients.watch(self.step + 1, self.grad_norm, torch.cat(self.bad_samples))
        self.bad_samples.clear()
        self.rate = learning_rate(self.step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if config.ema_decay:
            update_ema(state, config.ema_decay)
        state.step += 1
        self.recorder.step_done()

        self.is_end = self.step == config.steps
        self.evaluates = self.step % config.eval_every == 0 or self.is_end

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within this context the module is in eval mode and holds the EMA weights, if there are any."""
        self.module.eval()
        with ema_weights(self.state):
            yield
        self.module.train()

    def log(self, metrics: dict[str, float]) -> None:
        """Add metrics to the next line of metrics.jsonl."""
        self.recorder.window.extra |= metrics

    def weights(self) -> dict[str, Tensor]:
        """The full weights to publish, on the main process: of the EMA if there is one, else of the last step."""
        state = self.state
        return gather(state.module.state_dict(), self.accelerator) | gather(state.ema, self.accelerator)

    def _finish_step(self) -> None:
        stops = self.signals.wanted() and not self.is_end
        saves = self.step % self.config.save_every == 0 or self.is_end or stops
        # A checkpoint ends a line of metrics.jsonl, so that it need not keep the sums of half a line.
        logs = self.step % self.config.log_every == 0 or self.evaluates or saves
        if bad_step := self.gradients.bad_step(must_know=logs):
            raise self._not_finite(bad_step)
        if logs:
            self.recorder.write({"lr": self.rate, "grad_norm": float(self.grad_norm)})
        if saves:
            save_checkpoint(self.config, self.state, self.accelerator, self.export)
            self.accelerator.wait_for_everyone()
        if self.evaluates or saves:
            self.recorder.draw()
        if stops:
            self.signals.exit(self.config.run_dir, self.step, self.accelerator)
        self.mark(OTHER)

    def _not_finite(self, step: int) -> FloatingPointError:
        """Save what reproduces a step whose loss or gradients are not finite. Returns the error to raise.

        Each process writes <run_dir>/not_finite/process<rank>.pt: the step, the fields of its raw batches, and the
        weights before the step; of a sharded model only the first process's file has weights. The batches are read
        again: what a step reads is a function of the step.
        """
        again = iter(self.make_batches(step - 1))
        raws = [next(again) for _ in range(self.config.accumulation_steps)]
        path = self.config.run_dir / "not_finite" / f"process{self.accelerator.process_index}.pt"
        path.parent.mkdir(exist_ok=True)
        weights = get_model_state_dict(self.module, options=FULL_STATE)
        torch.save({"step": step, "batches": [asdict(raw) for raw in raws], "weights": weights}, path)
        keys = [key for raw in raws for key in raw.keys]
        bad_samples = self.gradients.bad_samples.reshape(len(keys), -1).any(1)  # of a teacher: the views of each
        guilty = [key for key, bad in zip(keys, bad_samples.tolist(), strict=True) if bad]
        guilty, everyone = gather_object(guilty), gather_object(keys)
        which = (
            "the errors of these samples" if guilty else "no sample's error, but the gradient of one or more of these"
        )
        return FloatingPointError(
            f"loss or gradients are not finite at step {step}: {which}: {'; '.join(guilty or everyone)}. The batch and "
            f"the weights before it: torch.load({str(path)!r}). No checkpoint contains this step.\n"
            "Look at these samples for what is not a number, or lower --optim.lr"
        )


def inputs(datasets: list[RobotDataset], provenance: dict[str, Any], labels: Labels | None = None) -> Inputs:
    """provenance: of the initial weights"""
    hashes = {f"dataset {dataset.name}": dataset_fingerprint(dataset.root) for dataset in datasets}
    hashes |= {"initial weights": json_sha256(provenance)} if provenance else {}
    hashes |= {"teacher": labels.teacher_id} if labels else {}
    names = [dataset.name for dataset in datasets]
    # A dataset may be read twice, as demonstrations and as video.
    return Inputs([f"{name} (video)" if name in names[:index] else name for index, name in enumerate(names)], hashes)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide about the numbers."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "lerobot", "accelerate", "numpy")}


def command() -> str:
    """The command that runs, as it was typed, without that of its launcher."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def origin(config: RunConfig, step: int, datasets: list[RobotDataset]) -> dict[str, Any]:
    """The source of published weights, for the JSON file beside them."""
    return {
        "run": config.run_dir.name,
        "global_step": step,
        "datasets": tuple(dataset.name for dataset in datasets),
        "weights": config.published_weights,
        "versions": versions(),
    }
