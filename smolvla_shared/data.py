"""LeRobotDataset v3 -> RawBatch: frame pairs, action chunks, mixtures, and a deterministic order.

Everything random is a pure function of (seed, step, slot): which frame is read, how it is augmented, the noise and
the time it is trained at. A run resumed at step k needs nothing but k, and the slots of a step may be spread over
any number of processes without changing the step.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.constants import HF_LEROBOT_HOME
from lerobot.utils.import_utils import get_safe_default_video_backend
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from smolvla_shared import flow, preprocess
from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import RowCache
from smolvla_shared.config import LATENT, DataConfig, RunConfig, SourceConfig
from smolvla_shared.preprocess import Statistics
from smolvla_shared.stopping import hide_worker

STATE_KEY, ACTION_KEY = "observation.state", "action"


@dataclass(frozen=True)
class SampleSpec:
    """What a sample consists of, beside its images and its task."""

    cameras: tuple[str, ...]
    # Width of the state; 0 reads none.
    state_dim: int = 0
    # Read action chunks of this many actions of this width; 0 reads none.
    chunk_size: int = 0
    action_dim: int = 0
    # Camera whose frame pairs are read for the teacher; None reads single frames.
    label_camera: str | None = None
    # Side of the teacher's square: what pairs become where the datasets' sizes differ, so that a label does not depend
    # on what else is in the mixture.
    pair_size: int = 0
    # Shape [tokens, width] of the noise of each flow target, and how many draws of it a sample gets.
    draws: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_draws: int = 1
    time_beta: tuple[float, float] = (1.5, 1.0)
    # Files of image tokens, by camera one for each source, that are read instead of its frames (features.py).
    features: dict[str, tuple[Path, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Videos:
    """Where each episode of a camera is in its video files."""

    file: np.ndarray  # [episodes, 2], the chunk and file index in a path
    start: np.ndarray  # [episodes], seconds


class Source:
    """One LeRobotDataset: which frames it has, and how to read one.

    Raises ValueError where the dataset does not have what the configuration asks for.
    """

    def __init__(self, repo_id: str, root: Path, config: SourceConfig):
        # LeRobot takes a local directory without its metadata for a dataset to download.
        if not (root / "meta" / "info.json").is_file() and (
            repo_id == str(root) or os.environ.get("HF_HUB_OFFLINE") == "1"
        ):
            found = sorted(path.name for path in root.iterdir()) if root.is_dir() else "no such directory"
            raise ValueError(f"no LeRobotDataset at {root}: meta/info.json is missing (found: {found})")
        # Video is decoded here, camera by camera, not by LeRobotDataset, which always decodes all of them.
        self.dataset = LeRobotDataset(repo_id, root=root)
        self.name = repo_id
        self.meta = self.dataset.meta
        self.fps = self.meta.fps
        self.features = self.meta.features
        self.episode_from = np.asarray(self.meta.episodes["dataset_from_index"])
        self.episode_to = np.asarray(self.meta.episodes["dataset_to_index"])
        vectors = [key for key in (STATE_KEY, ACTION_KEY) if key in self.features]
        self.vectors = self.dataset.hf_dataset.select_columns(vectors).with_format("numpy") if vectors else None
        # A column each, because reading a row decodes every image in it.
        images = {key: self.dataset.hf_dataset.select_columns([key]) for key in self.meta.image_keys}
        self.images = {key: column.with_format(None) for key, column in images.items()}
        # As columns, because a row of the episodes' metadata takes longer to read than a frame to decode.
        episodes = self.meta.episodes.with_format("numpy")
        self.videos = {}
        for key in self.meta.video_keys:
            file = [episodes[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")]
            self.videos[key] = Videos(np.stack(file, axis=1), np.asarray(episodes[f"videos/{key}/from_timestamp"]))
        self.task_index = np.asarray(self.dataset.hf_dataset.with_format("numpy")["task_index"])
        self.frame_gap_s = config.frame_gap_s

    @cached_property
    def gap(self) -> int:
        """Frames between the two of a pair; asked for only where there are pairs."""
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
        return self.meta.total_frames

    @property
    def gap_s(self) -> float:
        """Time between the frames of a pair, seconds: --data.frame-gap-s in whole frames."""
        return self.gap / self.fps

    def episode_of(self, row: int) -> int:
        return int(np.searchsorted(self.episode_to, row, side="right"))

    def task(self, row: int) -> str:
        return self.meta.tasks.iloc[self.task_index[row]].name

    def frame_name(self, row: int) -> str:
        episode = self.episode_of(row)
        return f"{self.name} episode {episode} frame {row - int(self.episode_from[episode])}"

    def rows_with_pairs(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows whose pair does not cross the episode's end."""
        ends = self.episode_to[np.searchsorted(self.episode_to, rows, side="right")]
        return rows[rows + self.gap < ends]

    def vector_dim(self, key: str) -> int:
        return self.features[key]["shape"][0] if key in self.features else 0

    def read_frames(self, camera: str, frames: list[int]) -> Tensor:
        """Frames by index within the dataset: [len(frames), 3, h, w] uint8."""
        if camera not in self.meta.video_keys:
            images = [np.asarray(self.images[camera][frame][camera]) for frame in frames]
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        video, rows = self.videos[camera], np.asarray(frames)
        episodes = np.searchsorted(self.episode_to, rows, side="right")
        times = video.start[episodes] + (rows - self.episode_from[episodes]) / self.fps
        parts = []
        for chunk, file in np.unique(video.file[episodes], axis=0).tolist():
            path = self.meta.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
            places = np.flatnonzero((video.file[episodes] == (chunk, file)).all(axis=1))
            parts.append((places, decode(self.dataset.root / path, times[places], self.fps)))
        return merge(parts)

    def frame_shape(self, camera: str) -> tuple[int, int, int]:
        """(3, h, w) of the recorded frames."""
        shape, names = self.features[camera]["shape"], self.features[camera]["names"]
        # Either order is found in recordings; the names tell which, as in LeRobot itself.
        if names[2] in ("channel", "channels"):
            height, width, channels = shape
        else:
            channels, height, width = shape
        return channels, height, width


def video_decoder() -> str:
    """The distribution that LeRobot decodes videos with on this machine."""
    return {"torchcodec": "torchcodec", "pyav": "av"}[get_safe_default_video_backend()]


@lru_cache(maxsize=100)
def _open_video(path: Path) -> Any:
    """A torchcodec VideoDecoder. A process keeps the last 100 open, as in LeRobot; but of the path: every read of a
    Python file object would come back to Python.
    """
    from torchcodec.decoders import VideoDecoder  # not there on every platform

    return VideoDecoder(path, seek_mode="approximate")


def decode(path: Path, times: np.ndarray, fps: float) -> Tensor:
    """Frames of a video at times in seconds, in any order: [len(times), 3, h, w] uint8, laid out as the decoder does it
    (torchcodec: channels innermost).

    They are found by their number, time * frame rate, as LeRobot does it. A ValueError where such a frame is more than
    half a frame away from its time, wherever else it is in its batch.
    """
    if video_decoder() != "torchcodec":
        return decode_video_frames(path, times.tolist(), 0.5 / fps, return_uint8=True)
    # decode_video_frames gives the same frames and would copy each of them once more: a third of the time of decoding
    # H.264. torchcodec itself goes through the video in order, whatever the order of the indices.
    decoder = _open_video(path)
    rate, last = decoder.metadata.average_fps, decoder.metadata.num_frames - 1
    frames = decoder.get_frames_at(indices=[min(round(time * rate), last) for time in times.tolist()])
    away_s = np.abs(frames.pts_seconds.numpy() - times)
    # Of the lower rate, and a little more, because a 29.97 fps video of a 30 fps dataset is up to half a frame away.
    if away_s.max() >= 0.5 / min(rate, fps) + 1e-4:
        raise ValueError(
            f"{path}: the frame for {times[away_s.argmax()]:.3f} s is {away_s.max():.3f} s away, more than half "
            f"a frame ({rate:.4g} fps, dataset {fps:.4g} fps): video and data of this recording do not belong "
            "together, record or convert it again"
        )
    return frames.data


def merge(parts: list[tuple[np.ndarray, Tensor]]) -> Tensor:
    """Images [n, 3, h, w] in their places, 0 to n - 1, from parts (places, images); a single part is not copied."""
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1]
    layout = torch.channels_last if first.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    whole = torch.empty(sum(len(p) for p, _ in parts), *first.shape[1:], dtype=first.dtype, memory_format=layout)
    for places, images in parts:
        for place, image in zip(places, images, strict=True):
            whole[place] = image
    return whole


def open_sources(config: SourceConfig) -> list[Source]:
    """The datasets of a configuration, in its order: repo ids (the local cache before the hub), then roots."""
    sources = [Source(repo_id, HF_LEROBOT_HOME / repo_id, config) for repo_id in config.repo_ids]
    return sources + [Source(str(root), Path(root), config) for root in config.roots]


def choose_cameras(sources: list[Source], config: SourceConfig) -> tuple[tuple[str, ...], str]:
    """The model's cameras and the label camera; refuses a key that a dataset does not have."""
    found = {source.name: source.meta.camera_keys for source in sources}
    common = [key for key in sources[0].meta.camera_keys if all(key in keys for keys in found.values())]
    cameras = config.cameras or tuple(common)
    label_camera = config.label_camera or (cameras[0] if cameras else "")
    unknown = [key for key in (*cameras, label_camera) if key not in common]
    if unknown or not cameras:
        listing = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in found.items())
        raise ValueError(
            f"every dataset must have every camera; asked for {list(cameras) or 'all they share'}, "
            f"label camera {label_camera or 'none'}; found {listing}. Pass --data.cameras"
        )
    return cameras, label_camera


def common_dim(sources: list[Source], key: str) -> int:
    """Width of a vector feature over the datasets that have it; 0 if none has."""
    dims = {source.name: source.vector_dim(key) for source in sources if key in source.features}
    if len(set(dims.values())) > 1:
        raise ValueError(f"the datasets' {key} have different widths, they cannot share a model: {dims}")
    return next(iter(dims.values()), 0)


def vector_statistics(sources: list[Source], key: str) -> Statistics:
    """Mean and standard deviation over all datasets that have the feature, as recorded in their metadata."""
    stats = aggregate_stats([{key: source.meta.stats[key]} for source in sources if key in source.features])[key]
    return Statistics(tuple(stats["mean"].tolist()), tuple(stats["std"].tolist()))


def split_episodes(source: Source, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out frames of a dataset, by whole episodes drawn at random with the seed."""
    num_episodes = len(source.episode_from)
    num_val = max(1, round(val_fraction * num_episodes)) if val_fraction else 0
    if num_val >= num_episodes:
        raise ValueError(
            f"{source.name} has {num_episodes} episode(s), too few to hold out a share of {val_fraction}: "
            "record more, or pass --data.val-fraction 0"
        )
    order = np.random.default_rng([seed, num_episodes]).permutation(num_episodes)

    def frames(episodes: np.ndarray) -> np.ndarray:
        ranges = [np.arange(source.episode_from[e], source.episode_to[e]) for e in sorted(episodes)]
        return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)

    return frames(order[num_val:]), frames(order[:num_val])


@dataclass(frozen=True)
class SampleKey:
    """Names a sample: what is read, and the (step, slot) that all its randomness comes from."""

    step: int
    slot: int
    source: int
    frame: int


def square_sides(sources: list[Source], cameras: tuple[str, ...]) -> dict[str, int]:
    """Side of the square that the images of a camera become whose size is not the same everywhere."""
    sizes = {camera: {source.frame_shape(camera)[1:] for source in sources} for camera in cameras}
    return {camera: max(max(size) for size in found) for camera, found in sizes.items() if len(found) > 1}


def common_size(frames: Tensor, square_side: int | None) -> Tensor:
    """uint8 frames [F, 3, h, w] as recorded, or as float32 squares in [0, 1] of the given side."""
    return preprocess.resize_with_pad(preprocess.unit_range(frames), square_side) if square_side else frames


@lru_cache
def _mapped(path: Path) -> np.ndarray:
    """Opened once in each process that reads it: a memory-mapped array would be sent to a loader's worker whole."""
    return np.load(path, mmap_mode="r")


def read_features(path: Path, frame: int) -> Tensor:
    """Cached image tokens of a frame, [tokens, hidden]."""
    tokens = torch.from_numpy(np.array(_mapped(path)[frame]))
    return tokens.view(torch.bfloat16) if tokens.dtype == torch.int16 else tokens


class SampleDataset(Dataset):
    """dataset[keys] is the batch of these samples, whose frames are decoded together.

    `random_shift` augments the policy's images (preprocess.random_shift).
    """

    def __init__(self, sources: list[Source], spec: SampleSpec, seed: int, random_shift: float = 0.0):
        self.sources, self.spec, self.seed, self.random_shift = sources, spec, seed, random_shift
        # Decided for the run, not for a batch, so that a frame looks the same whichever others it is read with.
        label_cameras = (spec.label_camera,) if spec.label_camera else ()
        self.square_side = square_sides(sources, (*spec.cameras, *label_cameras))
        from_video = [camera for camera in spec.cameras if camera not in spec.features]
        self.cameras_to_read = tuple(dict.fromkeys((*from_video, *label_cameras)))

    def __getitem__(self, keys: list[SampleKey]) -> RawBatch:
        # What is random of a sample is drawn in this order: the shift of each camera, then noise and times.
        spec, rngs = self.spec, [np.random.default_rng([self.seed, key.step, key.slot]) for key in keys]
        frames = {camera: self.read_camera(camera, keys) for camera in self.cameras_to_read}
        images = [
            self.features(camera, keys) if camera in spec.features else self.images(camera, frames[camera], rngs)
            for camera in spec.cameras
        ]
        states, state_valid, actions, action_valid = zip(*map(self.read_vectors, keys), strict=True)
        noise, time = {}, {}
        for name, shape in spec.draws.items():
            draws = [flow.draw_noise_and_time(rng, spec.num_draws, shape, *spec.time_beta) for rng in rngs]
            noise[name], time[name] = map(_stack, zip(*draws, strict=True))
        # Latents that come from a cache need to know, too, where the episode is too short for a pair.
        pair_valid = [self.has_pair(key) if spec.label_camera or LATENT in spec.draws else True for key in keys]
        return RawBatch(
            images=images,
            tasks=[self.sources[key.source].task(key.frame) for key in keys],
            state=_stack(states),
            state_mask=torch.tensor(state_valid),
            pairs=self.pairs(frames[spec.label_camera]) if spec.label_camera else None,
            pair_mask=torch.tensor(pair_valid),
            actions=_stack(actions),
            action_mask=_stack(action_valid),
            noise=noise,
            time=time,
            source=[key.source for key in keys],
            frame=[key.frame for key in keys],
            keys=[self.sources[key.source].frame_name(key.frame) for key in keys],
        )

    def has_pair(self, key: SampleKey) -> bool:
        source = self.sources[key.source]
        return key.frame + source.gap < source.episode_to[source.episode_of(key.frame)]

    def read_camera(self, camera: str, keys: list[SampleKey]) -> list[tuple[np.ndarray, Tensor]]:
        """What a batch needs of a camera's frames, [n, 3, h, w] uint8, in parts of one size, and their places in it:
        the label camera's second frames, of t + gap, have places of their own behind those of all B first ones.
        """
        parts = []
        for index in sorted({key.source for key in keys}):
            source, places = self.sources[index], np.flatnonzero([key.source == index for key in keys])
            wanted = [keys[place].frame for place in places]
            if camera == self.spec.label_camera:
                # Of a pair that the episode's end cuts, which is masked, the frame itself stands in for the second.
                wanted += [keys[place].frame + source.gap * self.has_pair(keys[place]) for place in places]
                places = np.concatenate([places, len(keys) + places])
            parts.append((places, source.read_frames(camera, wanted)))
        if camera in self.square_side:
            return parts
        merged = merge(parts)
        return [(np.arange(len(merged)), merged)]

    def images(
        self, camera: str, parts: list[tuple[np.ndarray, Tensor]], rngs: list[np.random.Generator]
    ) -> Tensor:  # [B, 3, h, w]
        """The policy's images. Where nothing is done to them they and the pairs are views of the same frames, and a
        pair's first frame is sent to the training process once.
        """
        images = []
        for places, frames in parts:
            first = places[places < len(rngs)]
            own = frames[: len(first)]
            if self.random_shift:
                shifts = zip(own, first, strict=True)
                own = torch.stack([preprocess.random_shift(i, self.random_shift, rngs[place]) for i, place in shifts])
            images.append((first, common_size(own, self.square_side.get(camera))))
        return merge(images)

    def pairs(self, parts: list[tuple[np.ndarray, Tensor]]) -> Tensor:  # [B, 2, 3, h, w]
        """The teacher's frames, never augmented."""
        if self.spec.label_camera in self.square_side:
            size = self.spec.pair_size
            parts = [(places, preprocess.stretch(preprocess.unit_range(f), size)) for places, f in parts]
        return merge(parts).unflatten(0, (2, -1)).transpose(0, 1)

    def features(self, camera: str, keys: list[SampleKey]) -> Tensor:  # [B, tokens, hidden]
        files = self.spec.features[camera]
        return torch.stack([read_features(files[key.source], key.frame) for key in keys])

    def read_vectors(self, key: SampleKey) -> tuple[np.ndarray, bool, np.ndarray, np.ndarray]:
        """State [state_dim], whether the dataset has one; action chunk [T, A], which of its actions count [T]."""
        spec, source = self.spec, self.sources[key.source]
        state, has_state = np.zeros(spec.state_dim, np.float32), bool(spec.state_dim) and STATE_KEY in source.features
        actions = np.zeros((spec.chunk_size, spec.action_dim), np.float32)
        action_valid = np.zeros(spec.chunk_size, bool)
        if source.vectors is not None:
            end = int(source.episode_to[source.episode_of(key.frame)])
            rows = source.vectors[key.frame : min(key.frame + max(spec.chunk_size, 1), end)]
            if has_state:
                state = rows[STATE_KEY][0].astype(np.float32).reshape(-1)  # LeRobot stores width 1 as a scalar
            if spec.chunk_size and ACTION_KEY in source.features:
                chunk = rows[ACTION_KEY].reshape(-1, spec.action_dim)
                actions[: len(chunk)], action_valid[: len(chunk)] = chunk, True
                actions[len(chunk) :] = chunk[-1]
        return state, has_state, actions, action_valid


def _stack(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(arrays)))


@dataclass(frozen=True)
class FrameGroup:
    """Frames that take a fixed share of every step's slots: pairs (source, frame), [M, 2]."""

    frames: np.ndarray
    share: float = 1.0


def group_frames(frames: list[tuple[int, np.ndarray]], share: float = 1.0) -> list[FrameGroup]:
    """The given (source index, frames) lists as one group; none if there are no frames."""
    if not frames:
        return []
    columns = [np.stack([np.full(len(f), source), f], axis=1) for source, f in frames]
    return [FrameGroup(np.concatenate(columns), share)]


class StepSampler(Sampler[list[SampleKey]]):
    """The sample keys of each forward pass of one process, from `first_step` on.

    A step has batch_size slots; the groups' shares are spread evenly over them. Each group goes through its frames in
    a new random order every epoch: its p-th sample overall is entry p mod M of the permutation of epoch p // M.
    The slots are dealt in blocks: pass m of process r takes block m * num_processes + r.
    """

    def __init__(
        self,
        groups: list[FrameGroup],
        seed: int,
        batch_size: int,
        first_step: int,
        last_step: int,
        process: int = 0,
        num_processes: int = 1,
        accumulation_steps: int = 1,
    ):
        assert batch_size % (num_processes * accumulation_steps) == 0  # checkpoint.check_run tells the user
        for group in groups:
            if not len(group.frames):
                raise ValueError("a group of training data has no frames")
        self.groups, self.seed, self.batch_size = groups, seed, batch_size
        self.steps = range(first_step, last_step)
        self.process, self.num_processes, self.accumulation_steps = process, num_processes, accumulation_steps
        bounds = np.cumsum([0.0] + [group.share for group in groups])
        slots = np.arange(batch_size)
        # Slot s goes to the group whose share its place in a low-discrepancy sequence falls into.
        golden = (slots * 0.6180339887498949) % 1.0
        ranks = np.argsort(np.argsort(golden)) + 0.5
        self.group_of_slot = np.searchsorted(bounds / bounds[-1] * batch_size, ranks) - 1
        self.place_in_group = np.array([(self.group_of_slot[:s] == self.group_of_slot[s]).sum() for s in slots])
        self.slots_of_group = np.bincount(self.group_of_slot, minlength=len(groups))
        if not all(self.slots_of_group):
            raise ValueError(
                f"--batch-size {batch_size} is too small for shares of {[group.share for group in groups]}: their "
                f"samples in a batch are {self.slots_of_group.tolist()}"
            )
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation_steps

    def order(self, group: int, epoch: int) -> np.ndarray:
        """The permutation of an epoch; only the newest two of a group are kept, a step spans no more."""
        if (group, epoch) not in self._orders:
            self._orders.pop((group, epoch - 2), None)
            rng = np.random.default_rng([self.seed, group, epoch])
            self._orders[group, epoch] = rng.permutation(len(self.groups[group].frames))
        return self._orders[group, epoch]

    def key(self, step: int, slot: int) -> SampleKey:
        group = int(self.group_of_slot[slot])
        place = step * int(self.slots_of_group[group]) + int(self.place_in_group[slot])
        epoch, place = divmod(place, len(self.groups[group].frames))
        source, frame = self.groups[group].frames[self.order(group, epoch)[place]]
        return SampleKey(step, slot, int(source), int(frame))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        block = self.batch_size // (self.num_processes * self.accumulation_steps)
        for step in self.steps:
            for micro in range(self.accumulation_steps):
                start = (micro * self.num_processes + self.process) * block
                yield [self.key(step, slot) for slot in range(start, start + block)]


def make_loader(dataset: SampleDataset, sampler: StepSampler, num_workers: int) -> DataLoader:
    """Batches in the sampler's order."""
    return _loader(dataset, num_workers, sampler=sampler, worker_init_fn=hide_worker)


def _loader(dataset: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """Batches as the dataset makes them. Workers are forked from a clean server process: video decoders do not survive
    a fork of the training process, and imports are paid once, not once a worker.
    """
    if num_workers:
        multiprocessing.set_forkserver_preload(["smolvla_shared.data"])
        options |= {"multiprocessing_context": "forkserver", "prefetch_factor": 4}
    return DataLoader(
        dataset, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available(), **options
    )


@dataclass(frozen=True)
class Loaders:
    """The loaders of one process: training batches from a given step on, and the same held-out batches every time."""

    train: Callable[[int], DataLoader]
    held_out: Callable[[], DataLoader] | None  # None without held-out episodes


def make_loaders(
    sources: list[Source],
    training: list[FrameGroup],
    held_out: list[FrameGroup],
    spec: SampleSpec,
    config: RunConfig,
    accelerator: Accelerator,
    random_shift: float = 0.0,
) -> Loaders:
    """Loaders of a run; held-out batches are read in the process itself, so that they take no workers from training.

    random_shift: of training samples (SampleDataset)
    """
    process = accelerator.process_index, accelerator.num_processes

    def train(first_step: int) -> DataLoader:
        steps = first_step, config.steps
        sampler = StepSampler(training, config.seed, config.batch_size, *steps, *process, config.accumulation_steps)
        samples = SampleDataset(sources, spec, config.seed, random_shift)
        return make_loader(samples, sampler, config.data.num_workers)

    def validate() -> DataLoader:
        steps = 0, max(1, config.eval_samples // config.batch_size)
        sampler = StepSampler(held_out, config.seed, config.batch_size, *steps, *process)
        return make_loader(SampleDataset(sources, spec, config.seed), sampler, num_workers=0)

    return Loaders(train, validate if held_out else None)


class FrameBlocks(Dataset):
    """Reads the frames of one camera at several offsets from each row of a block, every frame once and in order.

    blocks:  rows of one dataset that lie in one episode, for each block
    offsets: frames from a row, such as (0, gap) for pairs
    """

    def __init__(self, source: Source, camera: str, blocks: list[np.ndarray], offsets: tuple[int, ...]):
        self.source, self.camera, self.blocks, self.offsets = source, camera, blocks, np.array(offsets)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frames [F, 3, h, w] uint8; which of them each row wants, [n, offsets]; whether the episode has it, likewise.

        Where it has not, the row's own frame stands in.
        """
        rows = self.blocks[index]
        episode = self.source.episode_of(rows[0])
        wanted = rows[:, None] + self.offsets
        valid = (wanted >= self.source.episode_from[episode]) & (wanted < self.source.episode_to[episode])
        frames, place = np.unique(np.where(valid, wanted, rows[:, None]), return_inverse=True)
        pictures = self.source.read_frames(self.camera, frames.tolist())
        return pictures, torch.from_numpy(place.reshape(wanted.shape)), torch.from_numpy(valid)


def episode_blocks(source: Source, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Sorted rows in blocks of at most `size`, none of which spans two episodes."""
    episodes = np.searchsorted(source.episode_to, rows, side="right")
    by_episode = np.split(rows, np.flatnonzero(np.diff(episodes)) + 1) if len(rows) else []
    return [block[start : start + size] for block in by_episode for start in range(0, len(block), size)]


def block_loader(blocks: FrameBlocks, num_workers: int) -> DataLoader:
    """The blocks in their order, one at a time."""
    return _loader(blocks, num_workers)


def fill_cache(
    store: RowCache,
    source: Source,
    camera: str,
    offsets: tuple[int, ...],
    blocks_of: Callable[[range], list[np.ndarray]],
    empty: Callable[[int], dict[str, np.ndarray]],
    compute: Callable[[Tensor, Tensor], dict[str, np.ndarray]],
    num_workers: int,
    accelerator: Accelerator,
) -> None:
    """Fill a dataset's cache from a camera's frames; every process does its share of the shards.

    blocks_of: the rows of a shard that are computed, in blocks as FrameBlocks takes them
    empty:     arrays for so many rows; what is not computed stays as it is here
    compute:   frames and places of a block, as FrameBlocks gives them, on the device -> its rows of every array
    """
    if accelerator.is_main_process:
        store.claim()
    accelerator.wait_for_everyone()
    if store.is_complete():  # another run filled it meanwhile
        return
    missing = {rows.start for rows in store.missing()}
    mine = store.shards()[accelerator.process_index :: accelerator.num_processes]
    plan = [(rows, blocks_of(rows)) for rows in mine if rows.start in missing]
    blocks = FrameBlocks(source, camera, [block for _, parts in plan for block in parts], offsets)
    batches = iter(block_loader(blocks, num_workers))
    progress = tqdm(
        initial=source.num_frames - sum(len(rows) for rows, _ in plan) * accelerator.num_processes,
        total=source.num_frames,
        desc=f"{store.directory.parent.name}/{store.directory.name}",
        unit="frame",
        disable=not accelerator.is_main_process,
    )
    for rows, parts in plan:
        arrays = empty(len(rows))
        for block in parts:
            frames, places, _ = next(batches)
            for name, values in compute(frames.to(accelerator.device), places.to(accelerator.device)).items():
                arrays[name][block - rows.start] = values
        store.write(rows, arrays)
        progress.update(len(rows) * accelerator.num_processes)
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.finish()
    accelerator.wait_for_everyone()


def split_sources(sources: list[Source], config: DataConfig, seed: int) -> tuple[list, list]:
    """(source index, frames) of every source, for training and held out."""
    splits = [split_episodes(source, config.val_fraction, seed) for source in sources]
    train = [(index, frames) for index, (frames, _) in enumerate(splits)]
    held_out = [(index, frames) for index, (_, frames) in enumerate(splits) if len(frames)]
    return train, held_out


def valid_pair_share(sources: list[Source], frames: list[tuple[int, np.ndarray]]) -> float:
    """Share of the frames whose pair does not cross the episode's end; a ValueError if there is none."""
    valid = total = 0
    for index, rows in frames:
        valid, total = valid + len(sources[index].rows_with_pairs(rows)), total + len(rows)
    if not valid:
        gaps = {source.name: f"{source.gap_s:.3g} s" for source in sources}
        raise ValueError(f"no episode is longer than --data.frame-gap-s, there is nothing to label: {gaps}")
    return valid / total


def plan(groups: list[FrameGroup], config: RunConfig) -> str:
    """How much a run reads, for its first lines: every group of frames so many times over."""
    slots = StepSampler(groups, config.seed, config.batch_size, 0, 0).slots_of_group
    epochs = [
        f"{config.steps * taken / len(group.frames):.3g} x {len(group.frames):,} training frames"
        for taken, group in zip(slots, groups)
    ]
    return f"{config.steps:,} steps of {config.batch_size} samples = {' + '.join(epochs)}"


def describe(sources: list[Source], with_pairs: bool) -> str:
    """A line for each dataset, for the first lines of a run."""
    return "\n".join(
        f"{s.name}: {s.num_frames:,} frames, {len(s.episode_from):,} episodes, "
        f"{s.num_frames / s.fps / 3600:.2f} h at {s.fps} fps"
        + (f", pairs {s.gap} frames = {s.gap_s:.3g} s apart" if with_pairs else "")
        for s in sources
    )
