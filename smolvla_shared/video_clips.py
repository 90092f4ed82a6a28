"""Converting a clip: where its episodes begin and end, and its stream, encoded or copied.

The scene score, the encoder and the copy are FFmpeg's, through PyAV. Worker processes import this module, so it stays
free of torch and LeRobot.
"""

import ctypes
import errno
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import av
import numpy as np
from av.filter import Graph

from smolvla_shared.video_source import (
    ROUNDING_S,
    Pictures,
    at_constant_rate,
    look,
    open_stream,
    source_frames,
    stamp,
)

# Motion is what changes within this time: the default frame gap of a pair.
CHANGE_S = 0.5
BLOCK = 16  # pixels; in the mean of a block the codec's noise is small, and a hand's motion is not
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}  # those of LeRobot's statistics


@dataclass(frozen=True)
class ClipOptions:
    """What a converted clip depends on, beside the clip. The fields of VideoConfig, explained there, and the frame."""

    fps: int
    image_fps: int
    frame: tuple[int, ...]  # height, width of the dataset's frames
    size: int
    cut: Literal["none", "length", "scenes"]
    scene_threshold: float
    max_episode_s: float
    min_episode_s: float
    min_motion: float
    crf: int
    max_gop: int


@dataclass(frozen=True)
class Part:
    """A converted clip: a video file of `frames` frames at the dataset's rate, and what is known about it."""

    source: tuple[int, ...]  # `stamp` of the clip
    frames: int
    copied: bool
    # Frames [start, end) of each episode, in order. Frames between them are left out.
    episodes: tuple[tuple[int, ...], ...]
    # Of the clip's pixels in [0, 1], by channel, with the names of LeRobot's statistics.
    statistics: dict[str, tuple[float, ...]]
    # How much the most changing block changes within CHANGE_S, of 255: the 10%, 50% and 90% quantiles over the frames.
    motion: tuple[float, ...]


def block_means(picture: np.ndarray) -> np.ndarray:
    """Mean grey value of each block of BLOCK x BLOCK pixels of [h, w, 3], flat."""
    rows, columns = (max(1, side // BLOCK) for side in picture.shape[:2])
    grey = picture[: rows * BLOCK, : columns * BLOCK].mean(axis=2, dtype=np.float32)
    return grey.reshape(rows, -1, columns, grey.shape[1] // columns).mean(axis=(1, 3)).ravel()


def pixel_statistics(pictures: list[np.ndarray]) -> dict[str, tuple[float, ...]]:
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures]) / 255
    found = {name: getattr(pixels, name)(axis=0) for name in ("min", "max", "mean", "std")}
    found |= {name: np.quantile(pixels, share, axis=0) for name, share in QUANTILES.items()}
    return {name: tuple(values.tolist()) for name, values in found.items()}


# --- episodes ---------------------------------------------------------------------------------------------------------


class SceneChanges:
    """FFmpeg's scene score (filter `select`) of frames that pass through; `times` are those of the changes, seconds."""

    def __init__(self, threshold: float):
        self.condition = f"gt(scene,{threshold / 100})"
        self.times: list[Fraction] = []
        self.shape, self.graph = None, None

    def watch(self, frames: Iterable[tuple[Fraction, Fraction, av.VideoFrame]]) -> Iterator[tuple]:
        for time, duration, frame in frames:
            if (shape := (frame.width, frame.height, frame.format.name)) != self.shape:
                self.shape, self.graph = shape, Graph()
                source = self.graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
                )
                self.graph.link_nodes(source, self.graph.add("select", self.condition), self.graph.add("buffersink"))
                self.graph.configure()
            self.graph.push(frame)
            try:
                self.graph.pull()
                self.times.append(time)
            except av.error.BlockingIOError:  # not selected
                pass
            yield time, duration, frame


def changes(blocks: np.ndarray, gap: int) -> np.ndarray:
    """How much the most changing block changes from each frame to the one `gap` later, of [frames, blocks]."""
    return np.abs(blocks[gap:] - blocks[:-gap]).max(axis=1) if 0 < gap < len(blocks) else np.zeros(0)


def moving_stretches(start: int, end: int, blocks: np.ndarray, gap: int, min_motion: float) -> list[tuple[int, int]]:
    """The parts of [start, end) whose frames belong to a pair, `gap` frames apart, that changes enough."""
    gap = min(gap, end - start - 1)
    keep = np.zeros(end - start + 2, bool)  # one more at either end, so that every stretch begins and ends inside
    for first in np.flatnonzero(changes(blocks[start:end], gap) >= min_motion):
        keep[first + 1 : first + gap + 2] = True
    edges = start + np.flatnonzero(np.diff(keep)).reshape(-1, 2)
    return [(first, last) for first, last in edges.tolist()]


def cut_episodes(blocks: np.ndarray, scenes: Iterable[Fraction], options: ClipOptions) -> list[tuple[int, int]]:
    """Frames [start, end) of each episode. blocks: [frames, blocks]; scenes: times of scene changes, seconds."""
    starts = {math.ceil((time - ROUNDING_S) * options.fps) for time in scenes}  # the first frames that show a scene
    bounds = [0, *sorted(start for start in starts if 0 < start < len(blocks)), len(blocks)]
    pieces = list(pairwise(bounds))
    if options.min_motion > 0:
        gap = max(1, round(CHANGE_S * options.fps))
        pieces = [part for piece in pieces for part in moving_stretches(*piece, blocks, gap, options.min_motion)]
    episodes = []
    for start, end in pieces:
        longest = end - start if options.cut == "none" else max(1, int(options.max_episode_s * options.fps))
        equal = np.linspace(start, end, -(-(end - start) // longest) + 1).astype(int).tolist()
        episodes += pairwise(equal)
    return [(start, end) for start, end in episodes if end - start >= max(2, options.min_episode_s * options.fps)]


# --- the stream -------------------------------------------------------------------------------------------------------


def encoder_options(crf: int) -> dict[str, Any]:
    """Key frames at every other frame, as LeRobot encodes: training reads frames in any order."""
    return {"g": 2, "crf": crf, "bf": 0}


class Encoder:
    """Pictures as an H.264 file at a constant rate. Without B-frames, a packet is a frame, in order."""

    def __init__(self, path: Path, options: ClipOptions):
        self.container = av.open(str(path), "w", format="mp4")
        settings = {name: str(value) for name, value in encoder_options(options.crf).items()}
        self.stream = self.container.add_stream("libx264", rate=options.fps, options=settings)
        self.stream.height, self.stream.width = options.frame
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.thread_count = 1
        self.time_base = Fraction(1, options.fps)

    def __enter__(self) -> "Encoder":
        return self

    def write(self, index: int, picture: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        frame.pts, frame.time_base = index, self.time_base
        self.container.mux(self.stream.encode(frame))

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.container.mux(self.stream.encode())
        self.container.close()


def places(times: list[Fraction], fps: int) -> list[int] | None:
    """Each packet's place in the order of presentation, by its time; None unless that is a constant `fps`."""
    start = min(times, default=Fraction(0))
    order = [round((time - start) * fps) for time in times]
    is_regular = all(abs(time - start - Fraction(place, fps)) <= ROUNDING_S for time, place in zip(times, order))
    return order if is_regular and sorted(order) == list(range(len(order))) else None


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream that hold a frame, in the order of decoding."""
    return (packet for packet in container.demux(stream) if packet.size)


def constant_rate_order(path: Path, options: ClipOptions) -> list[int] | None:
    """The place of each packet in the order of presentation, if a clip's stream can be the dataset's as it is."""
    if path.is_dir():
        return None
    with open_stream(path) as (container, stream):
        if (stream.codec.canonical_name, stream.pix_fmt) != ("h264", "yuv420p"):
            return None
        if (stream.height, stream.width) != options.frame or (stream.sample_aspect_ratio or 1) != 1:
            return None
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in packets_of(container, stream)]
        tick = stream.time_base
    with open_stream(path) as (container, stream):
        if next(container.decode(stream)).rotation:
            return None
    keys = [index for index, (_, is_key, _) in enumerate(packets) if is_key]
    if keys[:1] != [0] or max(np.diff([*keys, len(packets)])) > options.max_gop:
        return None
    if any(pts is None or is_discard for pts, _, is_discard in packets):
        return None
    return places([pts * tick for pts, *_ in packets], options.fps)


def copy_stream(path: Path, target: Path, order: list[int], fps: int) -> None:
    """The packets of a clip that fits, untouched, with exact times and without sound."""
    with open_stream(path) as (source, stream), av.open(str(target), "w", format="mp4") as container:
        copy = container.add_stream_from_template(stream, opaque=True)
        copy.time_base = Fraction(1, fps)
        delay = max(index - place for index, place in enumerate(order))  # a frame is decoded before it is shown
        for index, (packet, place) in enumerate(zip(packets_of(source, stream), order)):
            packet.stream, packet.time_base = copy, Fraction(1, fps)
            packet.pts, packet.dts, packet.duration = place, index - delay, 1
            container.mux(packet)


def convert(path: Path, options: ClipOptions, target: Path) -> Part:
    """Write a clip's video to `target`, whole or not at all. Raises what source_frames does.

    A clip that is copied is decoded all the same: for its episodes and statistics, and to know that it is whole.
    """
    source, order = stamp(path), constant_rate_order(path, options)
    pictures = Pictures(look(path, options.image_fps), options.size, options.frame)
    scenes, frames = SceneChanges(options.scene_threshold), source_frames(path, options.image_fps)
    if options.cut == "scenes":
        frames = scenes.watch(frames)
    step = max(1, max(options.frame) // 50)  # of the pixels that statistics are taken of, one frame a second
    blocks, samples = [], []
    unfinished = target.with_suffix(".part")
    try:
        with Encoder(unfinished, options) if order is None else nullcontext() as encoder:
            for index, frame in enumerate(at_constant_rate(frames, options.fps)):
                picture = pictures(frame)
                if encoder:
                    encoder.write(index, picture)
                blocks.append(block_means(picture))
                if index % options.fps == 0:
                    samples.append(picture[::step, ::step])
                    worker.progress.value += 1
        if order is not None:
            copy_stream(path, unfinished, order, options.fps)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    grid = np.stack(blocks)
    motion = changes(grid, max(1, round(CHANGE_S * options.fps)))
    return Part(
        source=source,
        frames=len(blocks),
        copied=order is not None,
        episodes=tuple(cut_episodes(grid, scenes.times, options)),
        statistics=pixel_statistics(samples[:: -(-len(samples) // 200)]),
        motion=tuple(np.quantile(motion, (0.1, 0.5, 0.9)).tolist()) if len(motion) else (0.0, 0.0, 0.0),
    )


# --- worker processes -------------------------------------------------------------------------------------------------


class worker:
    """What a worker process was given: a shared number, the seconds of video that all of them have read."""

    progress: Any = SimpleNamespace(value=0)


def start_worker(progress: Any) -> None:
    worker.progress = progress
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback for each worker
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends when the command is killed


def attempt[T](function: Callable[..., T], path: Path, *arguments: Any) -> T | str:
    """What a function makes of a clip, or why the clip is broken. Raises OSError if the disk is full."""
    try:
        return function(path, *arguments)
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, "the disk is full; the same command goes on where it stopped", str(path)
            ) from None
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
