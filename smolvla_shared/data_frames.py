"""Frames of videos as LeRobot decodes them, and frames of several videos and sizes as one tensor."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.import_utils import get_safe_default_video_backend
from torch import Tensor

from smolvla_shared import preprocess
from smolvla_shared.data_columns import MEND


def video_decoder() -> str:
    """The distribution that LeRobot decodes videos with on this machine."""
    return {"torchcodec": "torchcodec", "pyav": "av"}[get_safe_default_video_backend()]


@lru_cache(maxsize=100)
def _open_video(path: Path) -> Any:
    """A torchcodec VideoDecoder; a process keeps the last 100 open, as LeRobot does. LeRobot hands over a Python file
    object, which is slower than a path: every read goes through Python.
    """
    try:
        from torchcodec.decoders import VideoDecoder  # not available on every platform
    except (RuntimeError, ImportError, OSError) as error:  # it finds no libraries of FFmpeg, or of another torch
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torchcodec cannot be loaded ({reason}): install FFmpeg's libraries (apt-get install ffmpeg, or conda "
            "install ffmpeg), or uninstall torchcodec, PyAV then decodes"
        ) from error
    return VideoDecoder(path, seek_mode="approximate")


def decode(path: Path, times: np.ndarray, fps: float) -> Tensor:
    """Frames of a video at times in seconds, in any order: [len(times), 3, h, w] uint8, in the decoder's memory layout
    (torchcodec: channels innermost).

    A time's frame is number round(time * frame rate), as in LeRobot. Raises ValueError if the video is damaged, and if
    a frame is shown more than half a frame away from its time.
    """
    try:
        return _decode(path, times, fps)
    except (RuntimeError, IndexError) as error:  # torchcodec's
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).partition("\n")[0])
        raise ValueError(f"{path} is damaged ({reason}): copy or download the dataset again") from error


def _decode(path: Path, times: np.ndarray, fps: float) -> Tensor:
    if video_decoder() != "torchcodec":
        return decode_video_frames(path, times.tolist(), 0.5 / fps, return_uint8=True)
    # decode_video_frames gives the same frames but copies each once more: a third of the time of decoding H.264.
    # torchcodec reads the video in order, whatever the order of the indices.
    decoder = _open_video(path)
    rate, last = decoder.metadata.average_fps, decoder.metadata.num_frames - 1
    frames = decoder.get_frames_at(indices=[min(round(time * rate), last) for time in times.tolist()])
    away_s = np.abs(frames.pts_seconds.numpy() - times)
    # Half a frame of the lower rate, and a little more: a 29.97 fps video of a 30 fps dataset can be half a frame off.
    if away_s.max() >= 0.5 / min(rate, fps) + 1e-4:
        raise ValueError(
            f"{path}: the frame for {times[away_s.argmax()]:.3f} s is {away_s.max():.3f} s away, more than half "
            f"a frame ({rate:.4g} fps, dataset {fps:.4g} fps): video and data of this recording do not belong "
            "together, record or convert it again"
        )
    return frames.data


def as_pictures(images: list[Any], places: list[str]) -> Tensor:
    """PIL's images as frames [n, 3, h, w] uint8. Raises ValueError, with its place, for one that differs from a picture
    of three channels of 8 bits, or in size from the first.
    """
    for image, place in zip(images, places, strict=True):
        if image is None:
            raise ValueError(f"{place} has no image: {MEND}")
        if image.mode != "RGB" or image.size != images[0].size:
            size, first = ("{} x {}".format(*one.size) for one in (image, images[0]))
            raise ValueError(
                f"{place}: its image has the mode {image.mode} and {size} pixels (width x height), expected RGB and "
                f"{first}: {MEND}"
            )
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def merge(parts: list[tuple[np.ndarray, Tensor]]) -> Tensor:
    """Frames [n, 3, h, w] in the order of their places 0..n-1, from parts (places, frames). A single part, which must
    be in order, is not copied.
    """
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1]
    layout = torch.channels_last if first.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    merged = torch.empty(sum(len(p) for p, _ in parts), *first.shape[1:], dtype=first.dtype, memory_format=layout)
    for places, frames in parts:
        for place, frame in zip(places, frames, strict=True):
            merged[place] = frame
    return merged


def common_size(frames: Tensor, square_side: int | None) -> Tensor:
    """uint8 frames [n, 3, h, w] as they are, or as float32 squares in [0, 1] if a side is given."""
    return preprocess.resize_with_pad(preprocess.unit_range(frames), square_side) if square_side else frames
