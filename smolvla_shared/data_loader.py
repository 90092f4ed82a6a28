"""Samples as RawBatches: frames, frame pairs, action chunks, and the noise and times to train them at."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smolvla_shared import flow, preprocess
from smolvla_shared.augmentation import Augmentation
from smolvla_shared.batch import Labels, RawBatch
from smolvla_shared.cache import RowCache
from smolvla_shared.config import ACTION, LATENT, CoreConfig, RunConfig
from smolvla_shared.data import ACTION_KEY, STATE_KEY, RobotDataset, square_sides, with_pairs
from smolvla_shared.data_frames import common_size, merge
from smolvla_shared.data_order import SampleKey, StepSampler
from smolvla_shared.data_rows import RowGroup, Rows, group_rows, shuffled
from smolvla_shared.data_split import unused_evaluation
from smolvla_shared.data_values import horizon_cost
from smolvla_shared.run_processes import check_shared_memory, make_worker_loader
from smolvla_shared.run_signals import hide_worker

Part = tuple[np.ndarray, Tensor]  # places in a batch, and their frames [n, 3, h, w]


@dataclass(frozen=True)
class SampleSpec:
    """What is read and drawn for a sample."""

    cameras: tuple[str, ...]
    # Width of the state; 0: no state is read.
    state_dim: int = 0
    # Actions in a chunk and width of an action; 0: no actions are read.
    chunk_size: int = 0
    action_dim: int = 0
    # Cameras whose frame pairs are read for the teacher; (): no pairs are read.
    label_cameras: tuple[str, ...] = ()
    # Latent actions in a row (M): M + 1 frames are read of a label camera. 0: no latent actions, no pairs.
    horizon: int = 1
    # Side of the teacher's square. If the pairs' sizes differ, they are resized to it: a label must not depend on
    # the other datasets.
    pair_size: int = 0
    # Shape [tokens, width] of each flow target's noise, the number of (noise, time) draws K of a sample, and the Beta
    # distribution (alpha, beta) of each target's times; uniform where none is given.
    draws: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_draws: int = 1
    time_beta: dict[str, tuple[float, float]] = field(default_factory=dict)
    # By camera: a cache of image tokens for each dataset, read instead of the frames (feature_cache.py); None where the
    # dataset lacks the camera.
    features: dict[str, tuple[RowCache | None, ...]] = field(default_factory=dict)

    @classmethod
    def of_pairs(cls, labels: Labels) -> "SampleSpec":
        """What the labels alone need of a sample."""
        return cls(cameras=(), label_cameras=labels.cameras, pair_size=labels.pair_size, horizon=labels.horizon)

    @classmethod
    def of(
        cls,
        core: CoreConfig,
        targets: Collection[str],
        labels: Labels | None,
        features: dict[str, tuple[RowCache | None, ...]],
        num_draws: int = 1,
    ) -> "SampleSpec":
        """What a core needs of a sample to train on these targets."""
        shapes = {ACTION: (core.chunk_size, core.max_action_dim), LATENT: (core.code_seq_len, core.latent_dim)}
        return cls(
            cameras=core.cameras,
            state_dim=core.state_dim,
            chunk_size=core.chunk_size if ACTION in targets else 0,
            action_dim=core.action_dim if ACTION in targets else 0,
            label_cameras=labels.cameras if labels else (),
            horizon=labels.horizon if labels else 0,
            pair_size=labels.pair_size if labels else 0,
            draws={name: shape for name, shape in shapes.items() if name in targets},
            num_draws=num_draws,
            time_beta=core.time_beta,
            features=features,
        )


class SampleDataset(Dataset):
    """dataset[keys] is the batch of these samples; their frames are decoded together.

    state_dropout: share of the samples whose state is hidden
    augmentation:  of the policy's images, the options of Augmentation
    """

    def __init__(
        self, datasets: list[RobotDataset], spec: SampleSpec, seed: int, state_dropout=0.0, **augmentation: float
    ):
        self.datasets, self.spec, self.seed = datasets, spec, seed
        self.state_dropout, self.augment = state_dropout, Augmentation(**augmentation)
        # Decided for the run, so that a frame looks the same in every batch.
        self.square_side = square_sides(datasets, spec.cameras)
        self.blank = {camera: self.black(camera) for camera in spec.cameras if camera not in spec.features}
        self.label_views = [d.label_views(spec.label_cameras) if spec.label_cameras else () for d in datasets]
        self.resizes_pairs = len({d.frame_shape(v) for d, views in zip(datasets, self.label_views) for v in views}) > 1
        # By camera, the label camera whose first frames are its images: what both have is sent only once.
        changed = self.blank if self.augment or self.resizes_pairs else self.square_side
        as_they_are = [camera for camera in self.blank if camera not in changed]
        by_camera = {views: place for place, views in enumerate(zip(*self.label_views))}
        own = {camera: tuple(d.views.get(camera) for d in datasets) for camera in as_they_are}
        self.in_pairs = {camera: by_camera[views] for camera, views in own.items() if views in by_camera}

    def __getitem__(self, keys: list[SampleKey]) -> RawBatch:
        # A sample's random numbers are drawn in this order: noise and times, state dropout. Augmentation has its own.
        spec, rngs = self.spec, [np.random.default_rng([self.seed, key.step, key.slot]) for key in keys]
        frames = self.read_frames(keys)
        pairs = self.pairs(frames) if spec.label_cameras else None
        images = []
        for camera in spec.cameras:
            if camera in spec.features:
                images.append(self.features(camera, keys))
            else:
                place = self.in_pairs.get(camera)
                images.append(self.images(camera, frames, keys) if place is None else pairs[:, place, 0])
        has_camera = [[camera in self.datasets[key.dataset].views for camera in spec.cameras] for key in keys]
        states, state_valid, actions, action_valid = zip(*map(self.read_vectors, keys), strict=True)
        noise, time = {}, {}
        for name, shape in spec.draws.items():
            time_beta = spec.time_beta.get(name, (1.0, 1.0))
            draws = [flow.draw_noise_and_time(rng, spec.num_draws, shape, *time_beta) for rng in rngs]
            noise[name], time[name] = map(_stack, zip(*draws, strict=True))
        state_mask = torch.tensor(state_valid)
        if self.state_dropout:
            state_mask &= torch.tensor([rng.random() >= self.state_dropout for rng in rngs])
        num_pairs = [self.num_pairs(key) for key in keys]
        return RawBatch(
            images=images,
            image_mask=torch.tensor(has_camera, dtype=torch.bool),
            tasks=[self.datasets[key.dataset].task(key.row) for key in keys],
            state=_stack(states),
            state_mask=state_mask,
            pairs=pairs,
            pair_mask=torch.arange(spec.horizon) < torch.tensor(num_pairs)[:, None],
            actions=_stack(actions),
            action_mask=_stack(action_valid),
            noise=noise,
            time=time,
            dataset=[key.dataset for key in keys],
            row=[key.row for key in keys],
            keys=[self.datasets[key.dataset].frame_name(key.row) for key in keys],
        )

    def num_pairs(self, key: SampleKey) -> int:
        """How many of its M pairs a sample has before its episode ends."""
        if not self.spec.horizon:
            return 0
        dataset = self.datasets[key.dataset]
        left = int(dataset.episode_to[dataset.episode_of(key.row)]) - 1 - key.row
        return min(self.spec.horizon, left // dataset.gap)

    def read_frames(self, keys: list[SampleKey]) -> dict[tuple[int, str], Part]:
        """Decode, for the whole batch, every camera that is read of a dataset: {(dataset, its camera): part}.

        Places 0..B-1 are the frames at t. For a label camera, places i B..(i + 1) B - 1 are those at t + i gap.
        """
        spec, parts = self.spec, {}
        for index in sorted({key.dataset for key in keys}):
            dataset, places = self.datasets[index], np.flatnonzero([key.dataset == index for key in keys])
            rows = [keys[place].row for place in places]
            cameras = [dataset.views[camera] for camera in self.blank if camera in dataset.views]
            label_views = self.label_views[index]
            for camera in dict.fromkeys((*cameras, *label_views)):
                wanted, at = rows, places
                if camera in label_views:
                    # Where the episode ends, the last frame before stands in; the pair is masked.
                    last, in_a_row = [self.num_pairs(keys[place]) for place in places], range(spec.horizon + 1)
                    wanted = [row + dataset.gap * min(i, end) for i in in_a_row for row, end in zip(rows, last)]
                    at = np.concatenate([places + i * len(keys) for i in in_a_row])
                parts[index, camera] = at, dataset.read_frames(camera, wanted)
        return parts

    def images(self, camera: str, frames: dict[tuple[int, str], Part], keys: list[SampleKey]) -> Tensor:  # [B, 3, h, w]
        """The policy's images, black where a dataset lacks the camera."""
        images, absent = [], np.ones(len(keys), bool)
        for (index, view), (places, of_view) in frames.items():
            if self.datasets[index].views.get(camera) != view:
                continue
            first = places[places < len(keys)]
            own = of_view[: len(first)]
            if self.augment:
                samples = [(self.seed, keys[place].step, keys[place].slot) for place in first]
                own = torch.stack([self.augment(i, sample) for i, sample in zip(own, samples, strict=True)])
            images.append((first, common_size(own, self.square_side.get(camera))))
            absent[first] = False
        if absent.any():
            images.append((np.flatnonzero(absent), self.blank[camera].repeat(absent.sum(), 1, 1, 1)))
        return merge(images)

    def black(self, camera: str) -> Tensor:  # [1, 3, h, w]
        """The image of a sample whose dataset lacks the camera; its tokens are masked."""
        dataset = next(dataset for dataset in self.datasets if camera in dataset.views)
        shape = dataset.frame_shape(dataset.views[camera])
        return common_size(torch.zeros(1, *shape, dtype=torch.uint8), self.square_side.get(camera))

    def pairs(self, frames: dict[tuple[int, str], Part]) -> Tensor:  # [B, V, M + 1, 3, h, w]
        """The teacher's frames, never augmented."""
        of_cameras = []
        for place in range(len(self.spec.label_cameras)):
            parts = [part for (index, view), part in frames.items() if view == self.label_views[index][place]]
            if self.resizes_pairs:
                size = self.spec.pair_size
                parts = [(places, preprocess.stretch(preprocess.unit_range(f), size)) for places, f in parts]
            of_cameras.append(merge(parts).unflatten(0, (self.spec.horizon + 1, -1)))
        return torch.stack(of_cameras).permute(2, 0, 1, 3, 4, 5)

    def features(self, camera: str, keys: list[SampleKey]) -> Tensor:  # [B, tokens, hidden]
        stores = self.spec.features[camera]
        like = next(store for store in stores if store)
        rows = [stores[key.dataset][key.row] if stores[key.dataset] else torch.zeros_like(like[0]) for key in keys]
        return torch.stack(rows)

    def read_vectors(self, key: SampleKey) -> tuple[np.ndarray, bool, np.ndarray, np.ndarray]:
        """State [state_dim], whether the dataset has a state, action chunk [T, A], and which actions count [T]. Those
        of a robot with fewer dimensions are padded with zeros.
        """
        spec, dataset = self.spec, self.datasets[key.dataset]
        state, has_state = np.zeros(spec.state_dim, np.float32), bool(spec.state_dim) and STATE_KEY in dataset.features
        actions = np.zeros((spec.chunk_size, spec.action_dim), np.float32)
        action_valid = np.zeros(spec.chunk_size, bool)
        if has_state:
            own = dataset.vector(STATE_KEY)[key.row].reshape(-1)  # a state of width 1 is a scalar
            state[: len(own)] = own
        if spec.chunk_size and ACTION_KEY in dataset.features:
            end = min(key.row + spec.chunk_size, int(dataset.episode_to[dataset.episode_of(key.row)]))
            chunk = dataset.vector(ACTION_KEY)[key.row : end].reshape(end - key.row, -1)
            own, action_valid[: len(chunk)] = actions[:, : chunk.shape[1]], True
            own[: len(chunk)], own[len(chunk) :] = chunk, chunk[-1]
        return state, has_state, actions, action_valid


def sample_pairs(
    datasets: list[RobotDataset], rows_of: list[tuple[int, Rows]], spec: SampleSpec, limit: int, seed: int
) -> Iterable[RawBatch]:
    """All samples of (dataset index, rows) that have a pair, or `limit` of them drawn with the seed; in batches of 64,
    in the order in which they were recorded, which decodes fastest.
    """
    (group,) = group_rows(with_pairs(datasets, rows_of))
    drawn = shuffled(np.arange(min(limit, len(group))), len(group), (seed,))
    keys = [SampleKey(0, 0, *place) for place in group.at(np.sort(drawn))]
    samples = SampleDataset(datasets, spec, seed)
    for start in range(0, len(keys), 64):
        yield samples[keys[start : start + 64]]


def _stack(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(arrays)))


def make_loader(dataset: SampleDataset, sampler: StepSampler, num_workers: int) -> DataLoader:
    """Batches in the sampler's order. The workers do not see the signals that stop a run."""
    return make_worker_loader(dataset, num_workers, sampler=sampler, worker_init_fn=hide_worker)


@dataclass(frozen=True)
class Loaders:
    """The loaders of one process."""

    train: Callable[[int], DataLoader]  # training batches from this step on
    held_out: Callable[[], DataLoader] | None  # the same held-out batches in every call; None: nothing is held out


def make_loaders(
    datasets: list[RobotDataset],
    training: list[RowGroup],
    held_out: list[RowGroup],
    spec: SampleSpec,
    config: RunConfig,
    accelerator: Accelerator,
    state_dropout: float = 0.0,
    **augmentation: float,
) -> Loaders:
    """Loaders of a run. Held-out batches are read in the training process, without augmentation and state_dropout.

    Raises ValueError for what check_shared_memory refuses.
    """
    process = accelerator.process_index, accelerator.num_processes

    def train(first_step: int) -> DataLoader:
        steps = first_step, config.steps
        sampler = StepSampler(training, config.seed, config.batch_size, *steps, *process, config.accumulation_steps)
        samples = SampleDataset(datasets, spec, config.seed, state_dropout, **augmentation)
        return make_loader(samples, sampler, config.data.num_workers)

    def validate() -> DataLoader:
        steps = 0, max(1, config.eval_samples // config.batch_size)
        sampler = StepSampler(held_out, config.seed, config.batch_size, *steps, *process)
        return make_loader(SampleDataset(datasets, spec, config.seed), sampler, num_workers=0)

    check_shared_memory(train(0))
    for line in filter(None, (*horizon_cost(datasets, spec.horizon), unused_evaluation(config, held_out))):
        accelerator.print(line)
    return Loaders(train, validate if held_out else None)
