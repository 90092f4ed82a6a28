"""Reading LeRobotDatasets (v3): frames, vectors, tasks and frame pairs, and what several datasets have in common.

A dataset is opened, and refused, without torch and LeRobot, which take seconds to import: only what reads frames, asks
the hub, or makes statistics imports them.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from huggingface_hub.constants import HF_HOME
from pyarrow import ArrowException

from smolvla_shared import data_info, data_problems, paths
from smolvla_shared.config import DataConfig
from smolvla_shared.data_columns import Columns
from smolvla_shared.data_rows import Rows
from smolvla_shared.mixture import DatasetEntry
from smolvla_shared.video_source import IMAGE_ERRORS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from smolvla_shared.data_values import Summary

STATE_KEY, ACTION_KEY = "observation.state", "action"
# What the robot was told to do where `action` is what an expert would have done. LeRobot takes every column whose name
# starts with "action" for a policy's output, so this one does not.
EXECUTED_ACTION_KEY = "executed_action"
# As LeRobot has it, which takes a second to import.
HF_LEROBOT_HOME = Path(os.environ.get("HF_LEROBOT_HOME", f"{HF_HOME}/lerobot")).expanduser()
# Where an episode is in a camera's video files: two numbers of the path, and its start in the file, seconds.
VIDEO_PLACE = ("chunk_index", "file_index", "from_timestamp")
# What a row of these tables holds, as Columns has it.
EPISODES = {
    "episode_index": int,
    "length": int,
    "dataset_from_index": int,
    "dataset_to_index": int,
    "data/chunk_index": int,
    "data/file_index": int,
}
VIDEO = {"chunk_index": int, "file_index": int, "from_timestamp": float, "to_timestamp": float}
FRAMES = {"index": int, "episode_index": int, "frame_index": int, "timestamp": float, "task_index": int}


class RobotDataset:
    """One LeRobotDataset; a row is a frame's number in it.

    It is opened and read by its columns: what LeRobotDataset makes of an episode would take minutes for 30,000. All
    cameras here are named as the dataset names them; `views` has these names by those of the policy.

    Raises ValueError if there is no dataset at `root`, not all of it, or not a camera that `entry` names.
    """

    def __init__(self, entry: DatasetEntry, root: Path, gap_s: float):
        self.name, self.root, self.entry, self.frame_gap_s = entry.name, root, entry, entry.frame_gap_s or gap_s
        is_local = entry.repo_id is None or os.environ.get("HF_HUB_OFFLINE") == "1"
        if is_local:
            paths.check_dataset(root)
        try:
            self._open()
        except FileNotFoundError as error:
            if is_local:
                raise ValueError(f"the LeRobotDataset at {root} is not complete, missing: {error}") from error
            self._download()
            self._open()
        self.views = entry.cameras or {camera: camera for camera in self.camera_keys}
        named = dict.fromkeys([*self.views.values(), *(entry.label_cameras or ())])
        if missing := [camera for camera in named if camera not in self.camera_keys]:
            raise ValueError(
                f"the mixture names {', '.join(missing)} as a camera of {self.name}, which has "
                f"{', '.join(self.camera_keys) or 'none'}"
            )

    def label_views(self, cameras: tuple[str, ...]) -> tuple[str, ...]:
        """The cameras that show its pairs in a run whose label cameras are these, by the policy's names."""
        return self.entry.label_cameras or tuple(self.views[camera] for camera in cameras)

    def _download(self) -> None:
        """As LeRobotDataset does, which would then read all of it: into LeRobot's cache of the hub, where either finds
        what the other has downloaded. Raises ValueError if the hub does not give it.
        """
        import httpx
        from huggingface_hub import snapshot_download
        from lerobot.datasets.utils import CompatibilityError, get_safe_version

        from smolvla_shared.files import hub_or_cache

        problem = ""
        try:
            with hub_or_cache() as problem:
                revision = get_safe_version(self.name, data_info.FORMAT)
                self.root = Path(
                    snapshot_download(
                        self.name, repo_type="dataset", revision=revision, cache_dir=HF_LEROBOT_HOME / "hub"
                    )
                )
        except (OSError, ValueError, httpx.HTTPError, RuntimeError, CompatibilityError) as error:
            raise ValueError(
                f"no LeRobotDataset {self.name}: it is not, or not whole, in {self.root}, and the hub says: "
                f"{problem or error}"
            ) from error

    def _open(self) -> None:
        """Raises FileNotFoundError if a file is missing, ValueError if one cannot be understood."""
        self.info = data_info.read_info(self.root)
        self.fps, self.features = self.info.fps, self.info.features
        self.camera_keys = [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]
        self.video_keys = [key for key in self.camera_keys if self.features[key]["dtype"] == "video"]
        data_info.refuse_misplaced(self.root, self.features)
        videos = {f"videos/{key}/{name}": kind for key in self.video_keys for name, kind in VIDEO.items()}
        self.episodes = self._columns("meta/episodes", EPISODES | videos, self.info.total_episodes)
        for path in self._files():
            if not path.is_file():
                raise FileNotFoundError(path)
        self.frames = self._columns("data", FRAMES, self.info.total_frames)
        self.vectors: dict[str, Columns] = {}  # of the vector features that were asked for
        self.summaries: dict[str, Summary] = {}  # of those that were checked

    def _columns(self, folder: str, kinds: dict[str, type], rows: int) -> Columns:
        files = sorted((self.root / folder).glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(self.root / folder / "*" / "*.parquet")
        return Columns(files, kinds, rows)

    def _files(self) -> Iterator[Path]:
        """All data files and videos, and the table of tasks."""
        if self.info.total_tasks:
            yield self.root / data_problems.TASKS
        for key in ("data", *(f"videos/{key}" for key in self.video_keys)):
            path = self.info.data_path if key == "data" else self.info.video_path
            numbers = np.stack([self.episodes[f"{key}/{name}"] for name in ("chunk_index", "file_index")], axis=1)
            for chunk, file in np.unique(numbers, axis=0).tolist():
                camera = key.removeprefix("videos/")
                yield self.root / path.format(video_key=camera, chunk_index=chunk, file_index=file)

    def __getstate__(self) -> dict:
        """What a loader worker gets: paths, no tables."""
        return {name: value for name, value in vars(self).items() if name != "tasks"}

    @cached_property
    def tasks(self) -> list[str]:
        return pd.read_parquet(self.root / data_problems.TASKS).index.tolist()

    @cached_property
    def images(self) -> dict[str, Any]:
        """One table for each camera that is no video, because reading a row decodes all its images.

        Raises ValueError if the columns of images are damaged.
        """
        from datasets.exceptions import DatasetsError
        from lerobot.datasets.feature_utils import get_hf_features_from_features
        from lerobot.datasets.io_utils import load_nested_dataset

        try:
            table = load_nested_dataset(self.root / "data", features=get_hf_features_from_features(self.info.features))
        except (DatasetsError, ArrowException) as error:
            reason = error.__cause__ or error
            if getattr(reason, "errno", None):  # of the machine: the disk is full
                raise
            raise ValueError(
                f"the images in {self.root / 'data'} cannot be read ({reason}): copy or download the dataset again"
            ) from error
        cameras = [key for key in self.camera_keys if key not in self.video_keys]
        return {key: table.select_columns([key]).with_format(None) for key in cameras}

    def vector(self, key: str) -> np.ndarray:  # [num_frames, A]; a feature of width 1 may be [num_frames]
        """A vector feature, read when it is asked for: a run that does not read it does not mind what it holds.

        Raises ValueError if it is none: a value is missing, or the rows differ in width.
        """
        if key not in self.vectors:
            self.vectors[key] = self._columns("data", {key: list}, self.info.total_frames)
        return self.vectors[key][key]

    @property
    def episode_from(self) -> np.ndarray:  # [episodes]
        return self.episodes["dataset_from_index"]

    @property
    def episode_to(self) -> np.ndarray:  # [episodes]
        return self.episodes["dataset_to_index"]

    @cached_property
    def gap(self) -> int:
        """Rows from the first frame of a pair to the second; computed only if pairs are used.

        Raises ValueError if rounding to whole frames changes --data.frame-gap-s by more than 10%.
        """
        gap = round(self.frame_gap_s * self.fps)
        if gap < 1 or abs(gap / self.fps - self.frame_gap_s) > 0.1 * self.frame_gap_s:
            below = max(1, int(self.frame_gap_s * self.fps))
            near = ", ".join(f"{frames / self.fps:.4g}" for frames in (below, below + 1))
            raise ValueError(
                f"--data.frame-gap-s {self.frame_gap_s} is not a whole number of frames of {self.name} at {self.fps} "
                f"fps: take one near {near}"
            )
        return gap

    @property
    def num_frames(self) -> int:
        return self.info.total_frames

    @property
    def gap_s(self) -> float:
        """Time between the frames of a pair, seconds: --data.frame-gap-s rounded to whole frames."""
        return self.gap / self.fps

    def hide_actions(self) -> None:
        """From now on the dataset has no action column."""
        self.features = {key: feature for key, feature in self.features.items() if key != ACTION_KEY}

    def episode_of(self, rows: int | np.ndarray) -> np.ndarray:
        """The episode of a row, or of each of several."""
        return np.searchsorted(self.episode_to, rows, side="right")

    def task(self, row: int) -> str:
        return self.tasks[self.frames["task_index"][row]]

    def frame_name(self, row: int) -> str:
        episode = self.episode_of(row)
        return f"{self.name} episode {episode} frame {row - int(self.episode_from[episode])}"

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """The rows of a range; default: all."""
        stop = self.num_frames if stop is None else stop
        episodes = slice(self.episode_of(start), self.episode_of(stop - 1) + 1)
        return Rows(np.maximum(self.episode_from[episodes], start), np.minimum(self.episode_to[episodes], stop))

    def rows_with_pairs(self, rows: Rows) -> Rows:
        """The rows whose pair does not cross the episode's end."""
        end = np.minimum(rows.end, self.episode_to[self.episode_of(rows.start)] - self.gap)
        some = rows.start < end
        return Rows(rows.start[some], end[some])

    def vector_dim(self, key: str) -> int:
        return self.features[key]["shape"][0] if key in self.features else 0

    def read_frames(self, camera: str, rows: list[int]) -> "Tensor":
        """A camera's frames of these rows, [len(rows), 3, h, w] uint8. Raises ValueError for those that are damaged."""
        from smolvla_shared import data_frames

        if camera not in self.video_keys:
            places = [f"{self.frame_name(row)}, {camera}" for row in rows]
            return data_frames.as_pictures([self.image(camera, row) for row in rows], places)
        episodes = self.episode_of(rows)
        chunks, files, starts = (self.episodes[f"videos/{camera}/{name}"][episodes] for name in VIDEO_PLACE)
        times = starts + (np.asarray(rows) - self.episode_from[episodes]) / self.fps
        parts = []
        for chunk, file in sorted(set(zip(chunks.tolist(), files.tolist()))):
            path = self.info.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
            places = np.flatnonzero((chunks == chunk) & (files == file))
            parts.append((places, data_frames.decode(self.root / path, times[places], self.fps)))
        return data_frames.merge(parts)

    def image(self, camera: str, row: int) -> "Image | None":
        """A picture that is kept in its row. Raises ValueError if it is damaged."""
        images = self.images[camera]
        try:
            return images[row][camera]
        except IMAGE_ERRORS as error:
            reason = str(error).partition(" <")[0]  # PIL names the object in memory
            raise ValueError(
                f"{self.frame_name(row)}: its image of {camera} cannot be read ({reason}): copy or download the "
                "dataset again"
            ) from error

    def frame_shape(self, camera: str) -> tuple[int, int, int]:
        """(3, h, w) of the recorded frames."""
        first, second, third = self.features[camera]["shape"]
        is_last = data_info.channels_last(self.features[camera])
        return (third, first, second) if is_last else (first, second, third)


def vector_names(feature: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of a vector feature's dimensions; None: it has none, or one for the whole vector."""
    names = data_info.dimension_names(feature)
    is_each = len(names) == feature["shape"][0] and all(isinstance(name, str) for name in names)
    return tuple(names) if is_each else None


def place(entry: DatasetEntry) -> Path:
    """The directory that a dataset is in, as LeRobot has it: for a hub id HF_LEROBOT_HOME/<id>, or the hub's version of
    it in HF_LEROBOT_HOME/hub. What LeRobot no longer reads, an older version's download into the former, is the last
    choice. Where there is neither, the former is returned.

    Raises ValueError for HF_LEROBOT_HUB_CACHE in the environment: it is a name in LeRobot's code, which reads none.
    """
    if entry.root:
        return Path(entry.root).expanduser()
    if "HF_LEROBOT_HUB_CACHE" in os.environ:
        raise ValueError(
            f"HF_LEROBOT_HUB_CACHE is set to {os.environ['HF_LEROBOT_HUB_CACHE']}, which neither LeRobot nor this "
            "command reads: unset it, and set HF_LEROBOT_HOME, whose directory hub is the cache"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    own = HF_LEROBOT_HOME / entry.repo_id
    if (own / "meta" / "info.json").is_file() and not (own / ".cache" / "huggingface" / "download").exists():
        return own
    cache = {"revision": data_info.FORMAT, "cache_dir": HF_LEROBOT_HOME / "hub", "local_files_only": True}
    try:
        return Path(snapshot_download(entry.repo_id, repo_type="dataset", **cache))
    except (LocalEntryNotFoundError, HFValidationError):  # not there, not all of it, or no name of the hub
        return own


def open_datasets(config: DataConfig) -> list[RobotDataset]:
    """The datasets of a configuration, in its order: hub ids from the local cache, else from the hub.

    Raises ValueError for datasets whose tables do not fit each other (data_problems.py).
    """
    datasets = [RobotDataset(entry, place(entry), config.gap_s) for entry in config.entries]
    data_problems.refuse_tables(datasets)
    return datasets


def set_frame_gap(datasets: list[RobotDataset], gap_s: float) -> None:
    """Pairs of the datasets that have no gap of their own are so many seconds apart: what the teacher says is known
    after they are opened.
    """
    for dataset in datasets:
        dataset.frame_gap_s = dataset.entry.frame_gap_s or gap_s


def square_sides(datasets: list[RobotDataset], cameras: tuple[str, ...]) -> dict[str, int]:
    """For each of the policy's cameras whose frames differ in size between datasets: side of the square they are all
    padded to.
    """
    sizes = {camera: {d.frame_shape(d.views[camera])[1:] for d in datasets if camera in d.views} for camera in cameras}
    return {camera: max(max(size) for size in found) for camera, found in sizes.items() if len(found) > 1}


def with_pairs(datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]]) -> list[tuple[int, Rows]]:
    """(dataset index, rows) without the rows whose pair would cross the episode's end: they have no latent action.

    Raises ValueError if there are rows and none has a pair.
    """
    paired = [(index, datasets[index].rows_with_pairs(rows)) for index, rows in rows_of]
    paired = [(index, rows) for index, rows in paired if len(rows)]
    if rows_of and not paired:
        gaps = {datasets[index].name: f"{datasets[index].gap_s:.3g} s" for index, _ in rows_of}
        raise ValueError(
            f"no episode is longer than --data.frame-gap-s, {gaps}: pass a smaller gap, or --val-fraction 0 if these "
            f"are the held-out episodes alone ({sum(len(rows) for _, rows in rows_of)} frames)"
        )
    return paired


def valid_pair_share(datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]]) -> float:
    """Share of (dataset index, rows) whose pair does not cross the episode's end. Raises ValueError if it is 0."""
    return sum(len(rows) for _, rows in with_pairs(datasets, rows_of)) / sum(len(rows) for _, rows in rows_of)
