"""What is recorded of a run: metrics.jsonl first, the curves drawn from it."""

import json
import time
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor


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
