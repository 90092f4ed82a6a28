"""What is recorded of a run: metrics.jsonl, the curves drawn from it, trackers, and the time that steps take."""

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from smolvla_shared.config import LATENT, RunConfig
from smolvla_shared.files import replacing, write_text
from smolvla_shared.refusals import from_json

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All complete lines of metrics.jsonl. A killed run may leave a torn last line, which is skipped.

    Raises ValueError for a line that is no object of numbers with a step.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_numbers(line, f"{path}, line {row}") for row, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def _numbers(line: bytes, where: str) -> dict[str, float]:
    try:
        found = from_json(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, int | float) for value in found.values()):
        raise ValueError(f"{where} holds no metrics, {line[:60]!a}: the file is damaged, remove the line")
    if not isinstance(found.get("step"), int):
        raise ValueError(f"{where} has no step, {line[:60]!a}: the file was edited, remove the line")
    return found


class MetricsLog:
    """metrics.jsonl: a JSON object per line, with its step. A resumed run drops the lines after its `first_step`."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        kept = [line for line in self.read() if line["step"] <= first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list[dict[str, float]]:
        return read_metrics(self.path)

    def write(self, metrics: dict[str, float]) -> None:
        """Add a line and sync it to disk, before the step's checkpoint. Raises OSError if it cannot be written."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error}. Make room and go on with --resume") from error


def plot_curves(metrics: list[dict[str, float]], path: Path) -> None:
    """Losses and held-out metrics over steps. An error and its baseline share a panel."""
    panels: dict[str, list[str]] = {}
    for name in sorted({key for line in metrics for key in line if key.startswith(("loss/", "val/", "usage/"))}):
        panels.setdefault(name.split("/")[1].split("_of_")[0], []).append(name)
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3))
    axes = figure.subplots(1, len(panels), squeeze=False)
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
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


class Window:
    """Sums since the last line of metrics.jsonl. They stay on the device until `read`.

    dataset_names: of a run that reads several datasets
    """

    def __init__(self, dataset_names: Sequence[str] = ()):
        self.dataset_names = dataset_names
        self.clear()

    def clear(self) -> None:
        self.steps = 0
        self.losses: dict[str, Tensor] = {}  # this process's part of each loss, summed over the steps
        self.slots: dict[str, Tensor] = {}  # [2, S]: sum and number of the valid errors of each latent slot
        self.of_datasets: dict[str, Tensor] = {}  # [2, datasets]: sum and number of the valid errors of each
        self.extra: dict[str, float] = {}  # metrics that are not averaged: the newest value

    def add(
        self,
        losses: dict[str, Tensor],
        errors: dict[str, Tensor],
        masks: dict[str, Tensor],
        dataset: Tensor | None = None,
    ) -> None:
        """Add a pass: its part of each loss, token errors and masks, [B, T] or [B], and its samples' datasets [B]."""
        self.losses |= {name: self.losses.get(name, 0) + part.detach() for name, part in losses.items()}
        if LATENT in errors:
            mask = masks[LATENT]
            sums = torch.stack([(errors[LATENT].detach() * mask).sum(0), mask.sum(0)])
            self.slots[LATENT] = self.slots.get(LATENT, 0) + sums
        for name, error in errors.items() if dataset is not None else ():
            mask = masks[name].reshape(len(dataset), -1)
            sums = torch.stack([(error.detach().reshape(mask.shape) * mask).sum(1), mask.sum(1)])
            # Not index_add, whose order of summation a GPU leaves open.
            of_each = F.one_hot(dataset, len(self.dataset_names)).to(sums.dtype)
            self.of_datasets[name] = self.of_datasets.get(name, 0) + sums @ of_each

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses and errors of each slot and dataset over the window's steps, and the newest extra metrics.

        A dataset that none of the steps has read has no mean.
        """
        means = {f"loss/{name}": accelerator.reduce(s, "sum") / self.steps for name, s in self.losses.items()}
        for name, sums in self.slots.items():
            errors, counts = accelerator.reduce(sums, "sum")
            means |= {f"slot/{name}_{slot}": e for slot, e in enumerate(errors / counts.clamp(min=1))}
        for name, sums in self.of_datasets.items():
            of_each = zip(self.dataset_names, *accelerator.reduce(sums, "sum"), strict=True)
            means |= {f"loss/{name}_of_{dataset}": error / count for dataset, error, count in of_each if count}
        return {name: mean.item() for name, mean in means.items()} | self.extra


class StepClock:
    """Seconds by phase of the steps: mark(phase) charges the time since the last mark to the phase.

    On a GPU the marks are events in its stream, read at the log step, which waits for the device anyway. A phase is
    charged for the time that the device works or idles in it: waiting for data costs nothing while the device is still
    busy with the previous step.
    """

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = [("", self._now())]
        self.seconds: Counter[str] = Counter()

    def _now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        self.marks.append((phase, self._now()))

    def read(self) -> Counter[str]:
        """Seconds by phase since the clock was made."""
        if self.is_cuda:
            self.marks[-1][1].synchronize()
        for (_, start), (phase, end) in pairwise(self.marks):
            self.seconds[phase] += start.elapsed_time(end) / 1000 if self.is_cuda else end - start
        self.marks = self.marks[-1:]
        return self.seconds.copy()


OTHER = "other"  # the phase of evaluating, logging and saving, which does not count as part of a step
BOUND_FROM = 0.25  # share of a step from which on a phase is called the bottleneck
ADVICE = {
    "data": "waiting for data (reading and decoding video); raise --data.num-workers or cache the "
    "features of a frozen vision tower (--data.feature-cache)",
    "transfer": "copying to the device",
    "teacher": "the teacher; write its labels once (python -m smolvla_shared.teacher label) and pass --labels cache",
}


def verdict(seconds: Counter[str]) -> str:
    """The steps' bottleneck, in words. seconds: by phase"""
    total = seconds.total() - seconds[OTHER]
    worst = max(ADVICE, key=lambda phase: seconds[phase])
    if seconds[worst] >= BOUND_FROM * total:
        return f"{worst}-bound: {seconds[worst] / total:.0%} of a step is {ADVICE[worst]}"
    share = 1 - sum(seconds[phase] for phase in ADVICE) / total
    return f"compute-bound: {share:.0%} of a step is preprocessing, forward, backward and optimizer"


def start_trackers(config: RunConfig, accelerator: Accelerator, step: int) -> None:
    """Open the --trackers on the first process. A resumed run continues its records from `step` on."""
    id_file = config.run_dir / "wandb_id"
    if accelerator.is_main_process and "wandb" in config.trackers and not id_file.exists():
        write_text(id_file, uuid.uuid4().hex)
    name = config.run_dir.name
    wandb_id = id_file.read_text() if id_file.exists() else None
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": name, "id": wandb_id, "resume": "allow", "dir": str(config.run_dir)},
        "trackio": {"name": name, "resume": "allow"},
    }
    settings = asdict(config) | {"precision": accelerator.mixed_precision}
    settings = {key: str(value) for key, value in settings.items()}
    accelerator.init_trackers("smolvla_shared", settings, options)


class Recorder:
    """What a run reports while it trains: metrics.jsonl, curves.png, trackers, progress bar and bottleneck."""

    FIRST_REPORT = 20  # steps until the first estimate of the remaining time

    def __init__(self, config: RunConfig, accelerator: Accelerator, step: int, dataset_names: Sequence[str]):
        self.config, self.accelerator, self.window = config, accelerator, Window(dataset_names)
        self.is_main = accelerator.is_main_process
        self.step = self.first_step = step
        if self.is_main:
            self.log = MetricsLog(config.run_dir / METRICS_FILE, step)
        start_trackers(config, accelerator, step)

    def __enter__(self) -> "Recorder":
        name, steps = self.config.run_dir.name, self.config.steps
        self.bar = tqdm(initial=self.step, total=steps, desc=name, unit="step", disable=not self.is_main)
        self.clock = StepClock(self.accelerator.device)
        self.last_line = self.step, self.clock.read()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:  # not end_training(): the processes still have weights to gather
            tracker.finish()
        if error is None and self.step > self.first_step:
            self.accelerator.print(verdict(self.clock.read()))

    def step_done(self) -> None:
        self.window.steps += 1
        self.clock.mark("optimizer")
        self.step += 1
        self.bar.update()
        if self.step == self.first_step + self.FIRST_REPORT and self.is_main:
            seconds = self.clock.read()
            per_step = seconds.total() / self.FIRST_REPORT
            left = timedelta(seconds=round(per_step * (self.config.steps - self.step)))
            tqdm.write(f"{per_step:.3g} s a step, {left} to go (h:mm:ss); {verdict(seconds)}")

    def write(self, metrics: dict[str, float]) -> None:
        """Write a line of metrics.jsonl: the window's means, these metrics, and seconds per step by phase."""
        metrics = self.window.read(self.accelerator) | metrics
        self.window.clear()
        steps, seconds = self.step - self.last_line[0], self.clock.read()  # on every process, or marks would pile up
        if not self.is_main:
            return
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items() if name.startswith("loss/")})
        spent, self.last_line = seconds - self.last_line[1], (self.step, seconds)
        samples_per_s = steps * self.config.batch_size / (spent.total() - spent[OTHER])
        metrics |= {"samples": self.step * self.config.batch_size, "time/samples_per_s": samples_per_s}
        metrics |= {f"time/{phase}": value / steps for phase, value in spent.items()}
        self.log.write({"step": self.step, **metrics})
        self.accelerator.log(metrics, step=self.step)

    def draw(self) -> None:
        if self.is_main:
            plot_curves(self.log.read(), self.config.run_dir / "curves.png")
