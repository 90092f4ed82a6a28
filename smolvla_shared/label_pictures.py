"""The pictures of a health report: codes.png, probe.png and transfer.png."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def draw_transfer(path: Path, columns: dict[str, Tensor]) -> None:  # title -> [N, 3, H, W] in [0, 1]
    """A grid of images: a column for each title, a row for each pair."""
    axes = _axes(len(next(iter(columns.values()))), len(columns), 1.6, 1.6)
    for column, (title, frames) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=8)
        for row, frame in enumerate(frames):
            axes[row][column].imshow(frame.clamp(0, 1).permute(1, 2, 0).numpy())
            axes[row][column].axis("off")
    _save(axes, path)


def draw_usage(path: Path, counts: list[list[int]]) -> None:  # [S][C]
    """How often each slot uses each code."""
    shares = np.array(counts, float) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    axes = _axes(len(shares), 1, 4, 1.1)
    for slot, (row,) in enumerate(axes):
        row.bar(range(shares.shape[1]), shares[slot])
        row.set(ylim=(0, 1), ylabel=f"slot {slot}", xticks=range(shares.shape[1]) if slot == len(shares) - 1 else [])
    axes[-1][0].set_xlabel("code (height: share of the pairs)")
    _save(axes, path)


def draw_probe(path: Path, probes: dict[str, dict[str, Any]]) -> None:
    """A row for each target: R² of its dimensions beside its controls."""
    axes = _axes(len(probes), 1, 5, 3)
    for (bars,), (name, row) in zip(axes, probes.items()):
        dimensions = row["dimensions"]
        shown = {key: row[key] for key in ("ceiling", "latents", "random_teacher", "shuffled") if row[key]}
        width = 0.8 / len(shown)
        for place, (key, values) in enumerate(shown.items()):
            heights = [0.0 if value is None else value for value in values]
            bars.bar(np.arange(len(heights)) + width * place, heights, width, label=key.replace("_", " "))
        bars.set(title=name, ylabel="R² out of fold", ylim=(None, 1))
        bars.set_xticks(range(len(dimensions)), dimensions)
        bars.axhline(0, color="black", linewidth=0.5)
        bars.legend(fontsize=7)
    _save(axes, path)


def _axes(rows: int, columns: int, width: float, height: float) -> np.ndarray:  # [rows, columns]
    return Figure(figsize=(width * columns, height * rows)).subplots(rows, columns, squeeze=False)


def _save(axes: np.ndarray, path: Path) -> None:
    figure = axes[0, 0].figure
    figure.tight_layout()
    figure.savefig(path, dpi=110)
