"""Converted clips as a LeRobotDataset (v3): packets packed into video files, tables, and LeRobot's own metadata."""

import json
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.compute_stats import compute_episode_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.feature_utils import get_hf_features_from_features
from lerobot.datasets.io_utils import write_info, write_table_one_row_group_per_episode
from tqdm import tqdm

from smolvla_shared.files import write_text
from smolvla_shared.video_clips import ClipOptions, Part, encoder_options
from smolvla_shared.video_source import CLIPS_FILE

ROWS_PER_FILE = 1_000_000  # of a data file; its video is in other files


@dataclass(frozen=True)
class Converted:
    """A clip that is to be in the dataset."""

    clip: Path
    tasks: tuple[str, ...]  # of each episode
    part: Part
    video: Path


class VideoFiles:
    """The dataset's video files. Encoded clips follow each other in files of LeRobot's size; a copied one, which has
    headers of its own, gets a file of its own.
    """

    def __init__(self, meta: LeRobotDatasetMetadata, camera: str):
        self.meta, self.camera = meta, camera
        self.number = -1  # of the present file
        self.container, self.stream = None, None  # the present file, if more can follow in it
        self.frames = self.bytes = 0  # in the present file
        self.headers = b""

    def add(self, video: Path, part: Part) -> list[tuple[int, int]]:
        """For each episode of a clip: the number of its file, and its first frame there."""
        if part.copied:
            self.close()
            shutil.copyfile(video, self._next_path())
            return [(self.number, start) for start, _ in part.episodes]
        with av.open(str(video)) as source:
            stream = source.streams.video[0]
            packets = [packet for packet in source.demux(stream) if packet.size]
            limit = self.meta.video_files_size_in_mb * 2**20
            size = sum(packet.size for packet in packets)
            if not self.container or self.bytes + size > limit or stream.codec_context.extradata != self.headers:
                self._open(stream)
            return [(self.number, self._write(packets, start, end)) for start, end in part.episodes]

    def _write(self, packets: list[Any], start: int, end: int) -> int:
        """Append frames [start, end), from the key frame before; returns the number of the first of them."""
        key = next(index for index in range(start, -1, -1) if packets[index].is_keyframe)
        for packet in packets[key:end]:
            self.bytes += packet.size
            packet.stream, packet.time_base = self.stream, Fraction(1, self.meta.fps)
            packet.pts = packet.dts = self.frames
            packet.duration = 1
            self.container.mux(packet)
            self.frames += 1
        return self.frames - (end - start)

    def _open(self, template: Any) -> None:
        self.close()
        self.container = av.open(str(self._next_path()), "w", options={"movflags": "faststart"})
        self.stream = self.container.add_stream_from_template(template, opaque=True)
        self.stream.time_base = Fraction(1, self.meta.fps)
        self.headers = template.codec_context.extradata

    def _next_path(self) -> Path:
        self.number += 1
        self.frames = self.bytes = 0
        chunk, file = divmod(self.number, self.meta.chunks_size)
        path = self.meta.video_path.format(video_key=self.camera, chunk_index=chunk, file_index=file)
        (self.meta.root / path).parent.mkdir(parents=True, exist_ok=True)
        return self.meta.root / path

    def close(self) -> None:
        if self.container:
            self.container.close()
            self.container = None


def write_rows(meta: LeRobotDatasetMetadata, number: int, episodes: list[dict[str, np.ndarray]]) -> None:
    """One data file, with a row for each frame."""
    chunk, file = divmod(number, meta.chunks_size)
    path = meta.root / meta.data_path.format(chunk_index=chunk, file_index=file)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = get_hf_features_from_features(meta.features).arrow_schema
    columns = {name: np.concatenate([episode[name] for episode in episodes]) for name in schema.names}
    write_table_one_row_group_per_episode(pa.table(columns, schema=schema), path)


def episode_rows(episode: int, length: int, meta: LeRobotDatasetMetadata, task: str) -> dict[str, np.ndarray]:
    frames = np.arange(length)
    return {
        "timestamp": (frames / meta.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, episode),
        "index": meta.total_frames + frames,
        "task_index": np.full(length, meta.get_task_index(task)),
    }


def write_dataset(
    root: Path, repo_id: str, camera: str, clips: list[Converted], options: ClipOptions
) -> LeRobotDatasetMetadata:
    """Write the dataset of these clips, in their order, into a directory that does not exist yet."""
    height, width = options.frame
    names = ["height", "width", "channels"]
    meta = LeRobotDatasetMetadata.create(
        repo_id=repo_id,
        fps=options.fps,
        features={camera: {"dtype": "video", "shape": (height, width, 3), "names": names}},
        root=root,
        metadata_buffer_size=1000,
    )
    meta.save_episode_tasks(
        list(dict.fromkeys(task for clip in clips for task in clip.tasks))
    )  # once: each call writes the whole file
    videos, rows, data_file = VideoFiles(meta, camera), [], 0
    for clip in tqdm(clips, desc="write", unit="clip"):
        placed = videos.add(clip.video, clip.part)
        for (start, end), task, (video_file, first_frame) in zip(clip.part.episodes, clip.tasks, placed, strict=True):
            episode, length = meta.total_episodes, end - start
            if meta.total_frames // ROWS_PER_FILE > data_file:
                write_rows(meta, data_file, rows)
                rows, data_file = [], data_file + 1
            rows.append(episode_rows(episode, length, meta, task))
            statistics = compute_episode_stats(rows[-1], meta.features)
            pixels = {name: np.reshape(values, (3, 1, 1)) for name, values in clip.part.statistics.items()}
            statistics[camera] = pixels | {"count": np.array([length])}
            video = {
                **file_number(f"videos/{camera}", video_file, meta),
                f"videos/{camera}/from_timestamp": first_frame / meta.fps,
                f"videos/{camera}/to_timestamp": (first_frame + length) / meta.fps,
            }
            meta.save_episode(episode, length, [task], statistics, file_number("data", data_file, meta) | video)
    videos.close()
    write_rows(meta, data_file, rows)
    encoder = encoder_options(options.crf)
    encoder = RGBEncoderConfig(vcodec="h264", extra_options={"bf": encoder.pop("bf")}, **encoder)
    # What LeRobot reads from the first video file; an encoder's settings are only told if all of them were encoded.
    meta.update_video_info(camera, None if any(clip.part.copied for clip in clips) else encoder)
    write_info(meta.info, meta.root)
    meta.finalize()
    return meta


def file_number(kind: str, number: int, meta: LeRobotDatasetMetadata) -> dict[str, int]:
    chunk, file = divmod(number, meta.chunks_size)
    return {f"{kind}/chunk_index": chunk, f"{kind}/file_index": file}


def write_report(root: Path, clips: list[Converted], without_episode: list[Path], broken: dict[Path, str]) -> None:
    """CLIPS_FILE: a line for each clip, with its episodes or why it has none."""
    lines, episode = [], 0
    for clip in clips:
        episodes = {str(episode + number): span for number, span in enumerate(clip.part.episodes)}
        episode += len(episodes)
        motion = [round(value, 2) for value in clip.part.motion]
        lines.append({"clip": str(clip.clip), "tasks": clip.tasks, "copied": clip.part.copied, "motion": motion})
        lines[-1]["episodes"] = episodes  # frames [start, end) of the clip at the dataset's rate
    lines += [{"clip": str(clip), "episodes": {}} for clip in without_episode]
    lines += [{"clip": str(clip), "broken": reason} for clip, reason in broken.items()]
    write_text(root / CLIPS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
