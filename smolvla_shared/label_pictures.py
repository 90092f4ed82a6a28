"""The pictures of a health report: codes.png, probe.png and transfer.png."""

from pathlib import Path

import numpy as np
from torch import Tensor


def draw_transfer(path: Path, columns: dict[str, Tensor]) -> None:  # title -> [N, 3, H, W] in [0, 1]
    """A row for each pair: its frames, and what the decoder makes of its own and of another pair's codes."""
    figure, axes = _figure(len(next(iter(columns.values()))), len(columns), 1.6, 1.6)
    for column, (title, frames) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=8)
        for row, frame in enumerate(frames):
            axes[row][column].imshow(frame.clamp(0, 1).permute(1, 2, 0).numpy())
            axes[row][column].axis("off")
    _save(figure, path)


def draw_usage(path: Path, counts: list[list[int]]) -> None:  # [S][C]
    """How often each slot uses each code."""
    shares = np.array(counts, float) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    figure, axes = _figure(len(shares), 1, 4, 1.1)
    for slot, (row,) in enumerate(axes):
        row.bar(range(shares.shape[1]), shares[slot])
        row.set(ylim=(0, 1), ylabel=f"slot {slot}", xticks=range(shares.shape[1]) if slot == len(shares) - 1 else [])
    axes[-1][0].set_xlabel("code; share of the pairs")
    _save(figure, path)


def draw_probe(path: Path, probes: dict[str, list[float | None]], sweep: dict[float, list[float | None]]) -> None:
    """R² of each action dimension, beside its controls and, where it was asked for, over frame gaps."""
    figure, axes = _figure(1, 2 if sweep else 1, 5, 3)
    width = 0.8 / len(probes)
    for place, (name, values) in enumerate(probes.items()):
        heights = [0.0 if value is None else value for value in values]
        axes[0][0].bar(np.arange(len(heights)) + width * place, heights, width, label=name.replace("_", " "))
    axes[0][0].set(xlabel="action dimension", ylabel="R² out of fold", xticks=range(len(values)), ylim=(None, 1))
    axes[0][0].axhline(0, color="black", linewidth=0.5)
    axes[0][0].legend(fontsize=7)
    for dimension in range(len(values) if sweep else 0):
        line = [by_gap[dimension] for by_gap in sweep.values()]
        axes[0][1].plot(list(sweep), [np.nan if v is None else v for v in line], marker="o", label=str(dimension))
    if sweep:
        axes[0][1].set(xlabel="frame gap, s", ylim=(None, 1), title="by frame gap")
        axes[0][1].legend(fontsize=7, title="dimension")
    _save(figure, path)


def _figure(rows: int, columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
