"""Reading a clip: every frame at its time, upright and at the size of the dataset.

FFmpeg reads it, through PyAV; a clip may also be a folder of images. Worker processes import this module, so it stays
free of torch and LeRobot.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

VIDEOS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .3g2 .ogv .vob .mxf .gif .y4m .h264 .hevc"
    " .ivf .asf .f4v .divx".split()
)
IMAGES = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff .ppm".split())
# What PIL raises for a picture that is damaged.
IMAGE_ERRORS = OSError, SyntaxError, ValueError, Image.DecompressionBombError
# Which frames of which clips are a dataset's episodes: `smolvla_shared.video` writes it into its datasets.
CLIPS_FILE = "clips.jsonl"
# Matroska and others round times to a millisecond, so a frame may be stamped that much after its time.
ROUNDING_S = Fraction(1, 1000)


@dataclass(frozen=True)
class Look:
    """What the first frame and the container tell about a clip."""

    width: int  # as it is shown: turned upright, with square pixels
    height: int
    seconds: float  # 0: not known


def images_in(folder: Path) -> list[Path]:
    """Images in the order of the numbers in their names: frame_9.png before frame_10.png."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith(".")]
    return sorted(files, key=lambda file: re.sub("[0-9]+", lambda number: number.group().zfill(20), file.name))


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change: a clip with another stamp is another clip."""
    stats = [file.stat() for file in (images_in(path) if path.is_dir() else [path])]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def read_image(file: Path) -> Image.Image:
    """Upright, in RGB. Raises ValueError for a file that is no image, is cut short, or has 16 bits a pixel."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # in 8 bits, nearly all would be white
                raise ValueError("it has more than 8 bits a channel, as pictures of depth have")
            return ImageOps.exif_transpose(image).convert("RGB")
    except IMAGE_ERRORS as error:
        raise ValueError(f"{file.name}: {error}") from error


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and the main video stream of a clip. Raises ValueError if it has none."""
    with av.open(str(path.absolute())) as container:  # FFmpeg would take "take:1.mp4" for a protocol
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("there is no video in it")
        stream.codec_context.thread_count = 1  # the processes share the cores
        yield container, stream


def declared_s(container: Any, stream: Any) -> float:
    """Length of a video stream as its file says it, in seconds; 0 if the file does not."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if tag := re.match(r"(\d+):(\d+):([\d.]+)$", stream.metadata.get("DURATION", "")):  # Matroska
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def source_frames(path: Path, image_fps: int) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """(time, duration, frame) of every frame of a clip in the order of presentation, in seconds; the first is at 0.

    Raises ValueError or FFmpeg's own errors, some of which are OSErrors, for a clip that is damaged or cut short.
    """
    if path.is_dir():
        files, size = images_in(path), None
        for index, file in enumerate(files):
            image = read_image(file)
            size = size or image.size
            if image.size != size:
                sizes = "{} is {} x {} pixels, {} {} x {}".format(files[0].name, *size, file.name, *image.size)
                raise ValueError(f"{sizes}: a folder of images is one video, of one size")
            yield Fraction(index, image_fps), Fraction(1, image_fps), av.VideoFrame.from_image(image)
        return
    with open_stream(path) as (container, stream):
        first, last, end = None, Fraction(-1), Fraction(0)
        usual = 1 / Fraction(stream.guessed_rate or stream.average_rate or image_fps)
        for index, frame in enumerate(container.decode(stream)):
            # A bare stream has no times, only an order.
            time = index * usual if frame.pts is None else frame.pts * frame.time_base
            first = time if first is None else first
            time -= first
            if frame.is_corrupt or time < last:
                what = "a frame is damaged" if frame.is_corrupt else "the times go back"
                raise ValueError(f"{what} {float(time):.2f} s after the start")
            duration = frame.duration * frame.time_base if frame.duration and frame.time_base else usual
            last, end = time, time + duration
            yield time, duration, frame
        # A tenth and half a second less are no damage: lengths in files are not exact.
        if first is None or end < 0.9 * declared_s(container, stream) - 0.5:
            raise ValueError(f"it ends after {float(end):.2f} s of {declared_s(container, stream):.2f} s")


def at_constant_rate(frames: Iterable[tuple[Fraction, Fraction, av.VideoFrame]], fps: int) -> Iterator[av.VideoFrame]:
    """The frames shown at 0, 1/fps, 2/fps, ... seconds: at each time the last frame whose time has come."""
    shown, end, index = None, Fraction(0), 0
    for time, duration, frame in frames:
        while shown is not None and Fraction(index, fps) + ROUNDING_S < time:
            yield shown
            index += 1
        shown, end = frame, time + duration
    while shown is not None and Fraction(index, fps) + ROUNDING_S < end:
        yield shown
        index += 1


def look(path: Path, image_fps: int) -> Look:
    """Raises what source_frames does if there is no first frame."""
    if path.is_dir():
        images = images_in(path)
        return Look(*read_image(images[0]).size, len(images) / image_fps)
    with open_stream(path) as (container, stream):
        if (frame := next(container.decode(stream), None)) is None:
            raise ValueError("there are no frames in it")
        width = round(frame.width * (stream.sample_aspect_ratio or 1))
        width, height = (frame.height, width) if frame.rotation % 180 else (width, frame.height)
        return Look(width, height, declared_s(container, stream))


# --- pictures ---------------------------------------------------------------------------------------------------------


def fitted(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the longer side scaled to `size`, both even, as H.264's colours need them."""
    longer = max(width, height)
    return tuple(max(2, 2 * round(side * size / longer / 2)) for side in (width, height))


class Pictures:
    """Decoded frames as pictures of the dataset, [height, width, 3] uint8: upright, scaled, centred on black."""

    def __init__(self, shown: Look, size: int, frame: tuple[int, ...]):
        """frame: height and width of the pictures"""
        self.width, self.height = fitted(shown.width, shown.height, size)
        self.top, self.left = (frame[0] - self.height) // 2, (frame[1] - self.width) // 2
        self.frame = frame
        self.reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turned = frame.rotation % 180 != 0
        width, height = (self.height, self.width) if turned else (self.width, self.height)
        is_full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        # PyAV takes neither the matrix nor the range from the frame unless both sides are stated.
        rgb = self.reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=frame.colorspace,
            dst_colorspace="DEFAULT",
            src_color_range="JPEG" if is_full else "MPEG",
            dst_color_range="JPEG",
            interpolation="BICUBIC",
        )
        picture = np.rot90(rgb.to_ndarray(), frame.rotation // 90)
        if picture.shape[:2] == self.frame:
            return np.ascontiguousarray(picture)
        canvas = np.zeros((*self.frame, 3), np.uint8)
        canvas[self.top : self.top + self.height, self.left : self.left + self.width] = picture
        return canvas
