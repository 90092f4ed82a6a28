"""The picture of a dataset that `data_check` draws: a few frames of each camera, lengths, tasks, ranges of vectors."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smolvla_shared.files import replacing

if TYPE_CHECKING:
    from smolvla_shared.data_outliers import Vector
    from smolvla_shared.data_report import Report

FRAMES = 6  # of each camera
OUTLIER = 3.0  # usual ranges; from here on the axis is logarithmic


def draw(path: Path, report: "Report") -> None:
    rows = [*report.cameras, "", *report.vectors]
    figure = Figure(figsize=(12, 2.4 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(report.dataset.name)
    for part, name in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows):
        if name in report.cameras:
            seen = report.cameras[name]
            part.suptitle(f"{name}: {len(seen.pictures)} episodes, {seen.still:.0%} of the pairs are still", fontsize=9)
            step = max(1, len(seen.pictures) // FRAMES)
            for axes, picture in zip(part.subplots(1, FRAMES), seen.pictures[::step]):
                axes.imshow(picture)
            for axes in part.axes:
                axes.axis("off")
        elif name in report.vectors:
            draw_vector(part.subplots(), name, report.vectors[name])
        else:
            draw_lengths(*part.subplots(1, 2), report)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def draw_lengths(lengths: Axes, tasks: Axes, report: "Report") -> None:
    dataset = report.dataset
    lengths.hist((dataset.episode_to - dataset.episode_from) / dataset.fps, bins=30)
    lengths.set(xlabel="length of an episode, s", ylabel="episodes")
    texts = [text if len(text) < 40 else f"{text[:37]}..." for text, _ in report.tasks[:10]]
    tasks.barh(np.arange(len(texts)), [count for _, count in report.tasks[:10]])
    tasks.set_yticks(np.arange(len(texts)), texts)
    tasks.invert_yaxis()
    tasks.set_xlabel("episodes of the most frequent tasks")
    tasks.tick_params(labelsize=7)


def draw_vector(axes: Axes, name: str, vector: "Vector") -> None:
    """Each dimension in usual ranges: its 1% to 99% are a bar, all of it is a line."""
    scale = np.where(vector.usual_high > vector.usual_low, vector.usual_high - vector.usual_low, 1)
    middle = (vector.usual_high + vector.usual_low) / 2
    low, high, least, most = (
        np.nan_to_num((values - middle) / scale, posinf=1e9, neginf=-1e9)
        for values in (vector.usual_low, vector.usual_high, vector.all.low, vector.all.high)
    )
    places = np.arange(len(vector.names))
    axes.bar(places, high - low, 0.3, bottom=low, label="1% to 99%")
    axes.vlines(places, least, most, color="black", linewidth=1, label="all")
    for outlier in vector.outliers:
        at = outlier.dimension
        axes.plot(at, (outlier.value - middle[at]) / scale[at], "ro", label="furthest outlier")
    if (far := max(1.0, np.abs(least).max(), np.abs(most).max())) > OUTLIER:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-2 * far, 2 * far)
    axes.set_ylabel("usual ranges", fontsize=8)
    labels = [
        f"{text[-14:]}\n{bottom:.3g}\nto {top:.3g}"
        for text, bottom, top in zip(vector.names, vector.all.low, vector.all.high)
    ]
    axes.set_xticks(places, labels, fontsize=7)
    axes.set_title(f"{name}: each dimension around the middle of its usual range, 1% to 99% of the rows", fontsize=9)
    handles, titles = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(titles, zip(handles, titles))).values()), fontsize=7)  # each once
