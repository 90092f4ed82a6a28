"""data.py: samples equal what LeRobotDataset itself reads, and their order is a function of the step alone."""

import math
import os
import pickle
import shutil
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils import constants

from smolvla_shared import data, data_columns, data_frames, data_loader, data_order, data_split, data_views, robots
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import ACTION, DataConfig, ModelConfig, PolicyDataConfig, RunConfig
from smolvla_shared.data import RobotDataset
from smolvla_shared.data_columns import Columns
from smolvla_shared.data_loader import SampleDataset, SampleSpec
from smolvla_shared.data_order import SampleKey, StepSampler
from smolvla_shared.data_rows import RowGroup, Rows, group_rows, shuffled
from smolvla_shared.mixture import DatasetEntry
from smolvla_shared.preprocess import resize_with_pad
from smolvla_shared.robots import Robots
from smolvla_shared.trunk_files import make_core_config
from train_stage3 import Stage3Config

CAMERA, WRIST = "observation.image", "observation.images.wrist"
AUGMENTED = {"random_shift": 0.1, "random_contrast": 0.2, "random_hue": 0.05}
SPEC = SampleSpec(cameras=(CAMERA,), state_dim=4, label_cameras=(CAMERA,), draws={"latent": (4, 8)}, num_draws=2)


def open_datasets(*roots: Path, **options) -> list[RobotDataset]:
    return data.open_datasets(DataConfig(roots=roots, **options))


@pytest.fixture(scope="module")
def video(video_dataset) -> RobotDataset:
    return open_datasets(video_dataset)[0]


@pytest.fixture(scope="module")
def labelled(labelled_dataset) -> RobotDataset:
    return open_datasets(labelled_dataset)[0]


@pytest.fixture(scope="module")
def images(image_dataset) -> RobotDataset:
    return open_datasets(image_dataset)[0]


lerobot_dataset = partial(helpers.lerobot_dataset, return_uint8=True)


def in_bytes(image: torch.Tensor) -> torch.Tensor:
    """LeRobotDataset gives recorded images, unlike video, as floats."""
    return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)


def all_frames(dataset: RobotDataset, index: int = 0) -> list[tuple[int, Rows]]:
    return [(index, dataset.rows())]


def assert_equal(one: RawBatch, other: RawBatch) -> None:
    """Equal to the bit, field by field."""

    def check(where: str, a, b) -> None:
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, where
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                check(f"{where}.{key}", a[key], b[key])
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for index, (x, y) in enumerate(zip(a, b)):
                check(f"{where}[{index}]", x, y)
        else:
            assert a == b, where

    for field in fields(RawBatch):
        check(field.name, getattr(one, field.name), getattr(other, field.name))


def join(batches: list[RawBatch]) -> RawBatch:
    """Several batches as one."""

    def cat(values):
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        if isinstance(values[0], dict):
            return {key: cat([value[key] for value in values]) for key in values[0]}
        return [item for value in values for item in value]

    joined = {field.name: cat([getattr(batch, field.name) for batch in batches]) for field in fields(RawBatch)}
    return RawBatch(**joined | {"images": [cat(list(images)) for images in zip(*(b.images for b in batches))]})


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labelled", "images"])
def test_a_sample_is_what_lerobot_reads(name, request):
    dataset = request.getfixturevalue(name)
    chunk_size, cameras = 6, tuple(dataset.camera_keys)
    deltas = {"action": [i / dataset.fps for i in range(chunk_size)], CAMERA: [0, dataset.gap / dataset.fps]}
    expected_dataset = lerobot_dataset(dataset, delta_timestamps=deltas)
    spec = SampleSpec(
        cameras=cameras,
        state_dim=dataset.vector_dim("observation.state"),
        chunk_size=chunk_size,
        action_dim=dataset.vector_dim("action"),
        label_cameras=(CAMERA,),
    )
    samples = SampleDataset([dataset], spec, seed=0)
    ends = [int(end) for end in dataset.episode_to]
    frames = [0, 7, ends[2] - 1, ends[2], ends[4] - dataset.gap, ends[4] - dataset.gap - 1, dataset.num_frames - 1]
    for frame in frames:
        raw, expected = samples[[SampleKey(step=3, slot=1, dataset=0, row=frame)]], expected_dataset[frame]
        assert torch.equal(raw.images[0][0], in_bytes(expected[CAMERA][0])), frame
        if WRIST in cameras:
            assert torch.equal(raw.images[1][0], in_bytes(expected[WRIST])), frame
        assert raw.pair_mask.tolist() == [[not expected[f"{CAMERA}_is_pad"][1]]], frame
        if raw.pair_mask:
            assert torch.equal(raw.pairs[0, 0], in_bytes(expected[CAMERA])), frame
        assert raw.tasks == [expected["task"]]
        assert torch.equal(raw.action_mask[0], ~expected["action_is_pad"])
        assert torch.equal(raw.actions[0], expected["action"])
        if spec.state_dim:
            assert torch.equal(raw.state[0], expected["observation.state"])
        assert raw.state_mask.tolist() == [bool(spec.state_dim)]
    valid = samples[[SampleKey(0, 0, 0, frame) for frame in frames]].pair_mask[:, 0].tolist()
    assert sorted(set(valid)) == [False, True]  # both kinds were among them


def test_latent_actions_in_a_row_read_a_frame_more_than_their_number(video):
    """The frames at t, t + gap, ...; where the episode ends, the last of them before it stands in, and is masked."""
    samples = SampleDataset([video], SampleSpec(cameras=(), label_cameras=(CAMERA,), horizon=3), seed=0)
    (start, end), last = (int(of[7]) for of in (video.episode_from, video.episode_to)), video.num_frames - 1
    assert (end - start, end - 1) == (27, last)  # 2 gaps of 10 frames fit into it
    raw = samples[[SampleKey(0, 0, 0, row) for row in (start, start + 7, last)]]
    assert raw.pair_mask.tolist() == [[True, True, False], [True, False, False], [False, False, False]]
    recorded = lerobot_dataset(video)
    rows = [[start, start + 10, start + 20, start + 20], [start + 7, *[start + 17] * 3], [last] * 4]
    for (frames,), expected in zip(raw.pairs, rows):
        assert torch.equal(frames, torch.stack([in_bytes(recorded[row][CAMERA]) for row in expected]))


def test_pairs_are_a_time_apart_whatever_the_frame_rate(video, images):
    assert (video.fps, video.gap) == (20, 10)
    assert (images.fps, images.gap) == (10, 5)


def test_a_pair_cut_by_the_episodes_end_is_masked_and_not_clamped(video):
    spec = SampleSpec(cameras=(), label_cameras=(CAMERA,))
    dataset, start, end = SampleDataset([video], spec, seed=0), int(video.episode_from[5]), int(video.episode_to[5])
    raw = dataset[[SampleKey(0, 0, 0, frame) for frame in range(start, end)]]
    assert raw.pair_mask[:, 0].tolist() == [True] * (end - start - 10) + [False] * 10
    last = lerobot_dataset(video)[end - 1][CAMERA]
    for (pair,) in raw.pairs[-10:-1]:
        assert torch.equal(pair[0], pair[1])  # the frame itself: nobody can take it for a motion
        assert not torch.equal(pair[1], last)
    assert data.valid_pair_share([video], [(0, video.rows(start, end))]) == 1 - 10 / (end - start)


def test_samples_say_where_they_come_from(video):
    dataset = SampleDataset([video], SPEC, seed=0)
    assert dataset[[SampleKey(0, 0, 0, int(video.episode_from[3]) + 4)]].keys == [f"{video.name} episode 3 frame 4"]


def test_the_cameras_come_in_the_order_asked_for(images):
    dataset = SampleDataset([images], SampleSpec(cameras=(WRIST, CAMERA)), seed=0)
    assert [tuple(image.shape) for image in dataset[[SampleKey(0, 0, 0, 3)]].images] == [(1, 3, 32, 40), (1, 3, 48, 64)]


def test_the_policy_sees_whole_frames_although_pairs_of_unlike_cameras_are_resized(images):
    spec, keys = SampleSpec(cameras=(WRIST, CAMERA)), [SampleKey(0, 0, 0, 3)]
    labelled = replace(spec, label_cameras=(CAMERA, WRIST), horizon=1, pair_size=16)
    alone, beside = (SampleDataset([images], one, seed=0)[keys] for one in (spec, labelled))
    assert beside.pairs.shape == (1, 2, 2, 3, 16, 16)
    assert all(map(torch.equal, alone.images, beside.images))


def test_one_dimensional_vectors_and_channels_first(tmp_path):
    """Both are found in recordings: LeRobot stores a vector of width 1 as a scalar, and takes shapes in two orders."""
    features = {
        CAMERA: {"dtype": "video", "shape": (3, 32, 64), "names": ["channels", "height", "width"]},
        "observation.state": {"dtype": "float32", "shape": (1,), "names": None},
        "action": {"dtype": "float32", "shape": (1,), "names": None},
    }
    h264 = RGBEncoderConfig(vcodec="h264")  # as in conftest.py
    recorded = LeRobotDataset.create("thin", fps=10, features=features, root=tmp_path / "thin", rgb_encoder=h264)
    for index in range(8):
        picture = np.zeros((3, 32, 64), np.uint8)
        picture[0, :, 32:] = 255  # the right half is red
        vector = np.array([index], np.float32)
        recorded.add_frame({CAMERA: picture, "observation.state": vector, "action": 10 * vector, "task": "move"})
    recorded.save_episode()
    recorded.finalize()
    (dataset,) = open_datasets(tmp_path / "thin")
    samples = SampleDataset([dataset], SampleSpec((CAMERA,), state_dim=1, chunk_size=3, action_dim=1), 0)
    raw = samples[[SampleKey(0, 0, 0, 6)]]
    assert (raw.state.tolist(), raw.actions.tolist()) == ([[6]], [[[60], [70], [70]]])
    assert raw.action_mask.tolist() == [[True, True, False]]
    (image,) = raw.images[0]
    assert torch.equal(image, lerobot_dataset(dataset)[6][CAMERA])
    assert image.shape == (3, 32, 64)
    assert image[0, :, 40:].float().mean() > 200


def test_a_mixture_of_rates_sizes_and_columns(video, images):
    """Images become squares of the largest side, pairs the teacher's; vectors that a dataset lacks are masked out."""
    spec = replace(SPEC, chunk_size=4, action_dim=2, pair_size=40)
    dataset = SampleDataset([video, images], spec, seed=0)
    batch = dataset[[SampleKey(0, slot, slot % 2, 2 + slot) for slot in range(4)]]
    assert batch.images[0].shape == (4, 3, 96, 96)
    assert batch.pairs.shape == (4, 1, 2, 3, 40, 40)
    assert (batch.dataset, batch.row) == ([0, 1, 0, 1], [2, 3, 4, 5])
    assert batch.state_mask.tolist() == [True, False, True, False]
    assert batch.action_mask.any(1).tolist() == [False, True, False, True]
    assert not batch.state[1].any()
    assert not batch.actions[0].any()
    for slot, dataset in enumerate([video, images] * 2):
        reference = lerobot_dataset(dataset)
        for index, frame in enumerate((2 + slot, 2 + slot + dataset.gap)):
            picture = in_bytes(reference[frame][CAMERA])[None].float() / 255
            expected = F.interpolate(picture, (40, 40), mode="bilinear", antialias=True)[0]
            assert torch.equal(batch.pairs[slot, 0, index], expected), (slot, index)
        picture = in_bytes(reference[2 + slot][CAMERA])[None].float() / 255
        assert torch.equal(batch.images[0][slot], resize_with_pad(picture, 96)[0])


def test_a_frame_looks_the_same_whichever_others_are_in_its_batch(video, images):
    dataset = SampleDataset([video, images], replace(SPEC, pair_size=40), seed=0)
    keys = [SampleKey(0, 0, 0, 11), SampleKey(0, 1, 1, 12)]
    assert_equal(join([dataset[[key]] for key in keys]), dataset[keys])


def deviations(values):
    """Standard deviations; 1 where nothing varies, as in the last dimension of these states."""
    found = values.std(0)
    return np.where(found > 1e-6, found, 1)


def test_statistics_are_those_of_the_frames(video, labelled):
    for key, datasets in {"observation.state": [video, labelled], "action": [video, labelled]}.items():
        found = robots.vector_statistics(datasets, key)
        rows = [lerobot_dataset(s).hf_dataset.with_format("numpy")[key][:] for s in datasets if key in s.features]
        values = np.concatenate(rows).astype(np.float64)
        assert np.allclose(found.mean, values.mean(0), atol=1e-5)
        assert np.allclose(found.std, deviations(values), atol=1e-5)


def test_the_split_is_by_whole_episodes(video):
    train, held_out = (rows.numpy() for rows in data_split.split_episodes(video, 0.25, seed=0))
    episodes = [set(np.searchsorted(video.episode_to, frames, side="right")) for frames in (train, held_out)]
    assert (len(episodes[0]), len(episodes[1])) == (6, 2)
    assert sorted([*train, *held_out]) == list(range(video.num_frames))
    assert not episodes[0] & episodes[1]
    again = data_split.split_episodes(video, 0.25, seed=0)
    assert [x.numpy().tolist() for x in again] == [train.tolist(), held_out.tolist()]
    assert len({tuple(data_split.split_episodes(video, 0.25, seed)[1].numpy()) for seed in range(5)}) > 1
    assert len(data_split.split_episodes(video, 0.0, seed=0)[1]) == 0
    assert len(data_split.split_episodes(video, 0.01, seed=0)[1]) > 0  # a share above 0 is at least an episode


@pytest.mark.parametrize("episodes, held_out", [(1, 0), (3, 0), (19, 0), (20, 1), (50, 2), (300, 15)])
def test_nothing_is_held_out_of_a_few_demonstrations_unless_asked_for(episodes, held_out):
    ends = 10 * np.arange(1, episodes + 1)
    few = SimpleNamespace(name="few", episode_from=ends - 10, episode_to=ends)
    share = RunConfig(run_dir="run", data=DataConfig(roots=("few",))).val_fraction
    train, held = data_split.split_episodes(few, share, seed=0)
    assert (len(train), len(held)) == (10 * (episodes - held_out), 10 * held_out)
    if episodes > 1:
        assert len(data_split.split_episodes(few, 0.05, seed=0)[1]) == 10 * max(1, held_out)


# --- order ------------------------------------------------------------------------------------------------------------


def one_range(stop: int) -> Rows:
    return Rows(np.array([0]), np.array([stop]))


def groups_of(*sizes: int, shares: tuple[float, ...] = (1.0,)) -> list[RowGroup]:
    """Groups of frames that can be told apart: group g is dataset g."""
    return [
        group for g, (n, share) in enumerate(zip(sizes, shares)) for group in group_rows([(g, one_range(n))], share)
    ]


def keys_of(groups, first_step, last_step, seed=0, batch_size=8, **options) -> list[list[SampleKey]]:
    return list(StepSampler(groups, seed, batch_size, first_step, last_step, **options))


def flat(passes: list[list[SampleKey]]) -> list[SampleKey]:
    return [key for keys in passes for key in keys]


def orders(size: int, epochs: int) -> np.ndarray:  # [epochs, size]
    return np.stack([shuffled(np.arange(size), size, (0, 0, epoch)) for epoch in range(epochs)])


def test_an_order_has_every_place_once():
    for size in (*range(1, 70), 1000, 4096, 4097, 65_537):
        assert sorted(shuffled(np.arange(size), size, (size, 1))) == list(range(size)), size
    places = np.array([5, 0, 5, 69])  # any of them, on their own
    assert np.array_equal(shuffled(places, 70, (3,)), shuffled(np.arange(70), 70, (3,))[places])
    assert not np.array_equal(shuffled(places, 70, (3,)), shuffled(places, 70, (4,)))


def unevenness(counts: np.ndarray) -> float:
    """Pearson's chi-square of counts that should be equal, in standard deviations from its mean."""
    freedom = counts.size - 1
    return (((counts - counts.mean()) ** 2).sum() / counts.mean() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_few_rows_come_equally_often(size):
    counts = Counter(map(tuple, orders(size, 1200).tolist()))
    assert len(counts) == math.factorial(size)
    assert unevenness(np.array(list(counts.values()))) < 4


def test_an_order_of_many_rows_looks_random():
    """Where a row comes tells neither its number nor its neighbour's, nor where it comes in the next epoch."""
    found, size = orders(10_000, 12), 10_000
    numbers = np.tile(np.arange(size), (12, 1))
    for one, other in [(numbers, found), (found[:, 1:], found[:, :-1]), (found[1:], found[:-1])]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / one.size**0.5
        counts, *_ = np.histogram2d(one.ravel(), other.ravel(), bins=20)
        assert abs(unevenness(counts)) < 4


def test_a_hundred_million_frames_take_no_memory_of_their_own():
    ends = 250 * np.arange(1, 400_001)
    tracemalloc.start()
    groups = group_rows([(0, Rows(ends - 250, ends))])
    passes = keys_of(groups, 3_000_000, 3_000_002, batch_size=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(groups[0]) == 100_000_000
    assert len({key.row for key in flat(passes)}) == 128
    assert peak < 64 * 400_000  # bytes: some numbers an episode


def test_every_frame_once_an_epoch():
    frames = [key.row for key in flat(keys_of(groups_of(30), 0, 15))]  # 120 samples, 4 epochs, none ends with a step
    epochs = [frames[start : start + 30] for start in range(0, 120, 30)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in epochs}) == 4  # a new order each time
    assert epochs[0] != sorted(epochs[0])


def test_every_frame_once_an_epoch_when_a_step_spans_several():
    frames = [key.row for key in flat(keys_of(groups_of(3), 0, 3))]
    assert [sorted(frames[start : start + 3]) for start in range(0, 24, 3)] == [[0, 1, 2]] * 8


def test_every_group_goes_through_its_own_frames():
    keys = flat(keys_of(groups_of(30, 7, shares=(0.75, 0.25)), 0, 20))
    big, small = ([key.row for key in keys if key.dataset == dataset] for dataset in (0, 1))
    assert sorted(big[:30]) == list(range(30))
    assert sorted(small[:7]) == sorted(small[7:14]) == list(range(7))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.75, 0.25), (0.625, 0.25, 0.125)])
def test_shares_hold_in_every_batch_and_are_spread_over_its_blocks(shares):
    groups = groups_of(*[50] * len(shares), shares=shares)
    for step in keys_of(groups, 0, 10, batch_size=64):
        counts = Counter(key.dataset for key in step)
        assert [counts[group] for group in range(len(shares))] == [64 * share for share in shares]
    for block in keys_of(groups, 0, 1, batch_size=64, accumulation_steps=4):  # 16 slots each
        counts = Counter(key.dataset for key in block)
        assert all(abs(counts[group] - 16 * share) <= 1.5 for group, share in enumerate(shares)), counts


def test_a_run_from_step_k_goes_on_as_the_run_to_it():
    groups = groups_of(30, 7, shares=(0.75, 0.25))
    whole = keys_of(groups, 0, 12)
    assert keys_of(groups, 5, 12) == whole[5:]
    assert [key.step for key in flat(whole)] == [step for step in range(12) for _ in range(8)]
    assert [key.slot for key in flat(whole)] == list(range(8)) * 12


def test_the_seed_decides_the_order():
    assert keys_of(groups_of(30), 0, 4) == keys_of(groups_of(30), 0, 4)
    assert keys_of(groups_of(30), 0, 4) != keys_of(groups_of(30), 0, 4, seed=1)


@pytest.mark.parametrize("num_processes, accumulation_steps", [(2, 2), (1, 4), (4, 1), (8, 1)])
def test_the_slots_of_a_step_are_dealt_to_processes_and_passes(num_processes, accumulation_steps):
    groups, steps = groups_of(30, 7, shares=(0.75, 0.25)), 6
    options = {"num_processes": num_processes, "accumulation_steps": accumulation_steps}
    samplers = [StepSampler(groups, 0, 8, 0, steps, process=process, **options) for process in range(num_processes)]
    passes = [list(sampler) for sampler in samplers]
    assert [len(p) for p in passes] == [len(s) for s in samplers] == [steps * accumulation_steps] * num_processes
    dealt = [keys for of_all_processes in zip(*passes) for keys in of_all_processes]
    assert flat(dealt) == flat(keys_of(groups, 0, steps))


# --- randomness -------------------------------------------------------------------------------------------------------


def test_each_target_has_its_own_distribution_of_times(video):
    """The means of Beta(6, 1) and Beta(1.5, 1) are 6 / 7 and 0.6."""
    time_beta = make_core_config(ModelConfig(preset="tiny"), (CAMERA,)).time_beta
    spec = replace(SPEC, num_draws=2000, draws={"latent": (1, 1), "action": (1, 1)}, time_beta=time_beta)
    time = SampleDataset([video], spec, 0)[[SampleKey(0, 0, 0, 9)]].time
    assert {name: times.mean().item() for name, times in time.items()} == pytest.approx(
        {"latent": 0.001 + 0.999 * 6 / 7, "action": 0.001 + 0.999 * 0.6}, abs=0.02
    )


def test_draws_are_a_function_of_seed_step_and_slot(video):
    def draw(seed: int, step: int, slot: int, frame: int = 9, augmentation: dict[str, float] = AUGMENTED):
        return SampleDataset([video], SPEC, seed, **augmentation)[[SampleKey(step, slot, 0, frame)]]

    base = draw(0, 4, 2)
    assert base.noise["latent"].shape == (1, 2, 4, 8)
    assert base.time["latent"].shape == (1, 2)
    assert_equal(base, draw(0, 4, 2))
    assert torch.equal(base.noise["latent"], draw(0, 4, 2, frame=12).noise["latent"])  # whatever is read
    for other in (draw(1, 4, 2), draw(0, 5, 2), draw(0, 4, 3)):
        assert not torch.equal(base.noise["latent"], other.noise["latent"])
        assert not torch.equal(base.time["latent"], other.time["latent"])
        assert not torch.equal(base.images[0], other.images[0])  # augmented otherwise
        assert torch.equal(base.pairs, other.pairs)  # the teacher's frames are as recorded
    plain = draw(0, 4, 2, augmentation={})
    assert torch.equal(plain.images[0], base.pairs[:, 0, 0])
    assert torch.equal(plain.noise["latent"], base.noise["latent"])  # augmentation has random numbers of its own


def test_a_batch_decoded_together_is_its_samples(video, images):
    """Frames of several episodes, out of order and repeated, of two datasets."""
    dataset = SampleDataset([video, images], replace(SPEC, pair_size=40), seed=0, **AUGMENTED)
    places = [(0, 150), (1, 60), (0, 3), (0, 150), (1, 0), (0, 19), (0, 20)]
    keys = [data_order.SampleKey(0, slot, *place) for slot, place in enumerate(places)]
    together = dataset[keys]
    assert_equal(join([dataset[[key]] for key in keys]), together)


def test_where_frames_lie_changes_nothing(video):
    """In one file or in several, whose frames are merged: here of two datasets, the frames of one in turn."""
    places = [150, 3, 19, 20, 150]
    one, two = SampleDataset([video], SPEC, seed=0), SampleDataset([video, video], SPEC, seed=0)
    whole = one[[SampleKey(0, slot, 0, frame) for slot, frame in enumerate(places)]]
    merged = two[[SampleKey(0, slot, slot % 2, frame) for slot, frame in enumerate(places)]]
    assert_equal(replace(merged, dataset=whole.dataset), whole)
    for raw in (whole, merged):  # decoded once, sent once: the first frames of the pairs are the images
        assert raw.images[0].data_ptr() == raw.pairs.data_ptr()


def test_a_video_that_is_not_of_its_data_is_refused(tmp_path):
    """Recorded at 8 frames a second, and its dataset says 10: less than half a frame is no matter, past the end is."""
    path = tmp_path / "slow.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(8):
            picture = np.full((48, 64, 3), 30 * shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames = data_frames.decode(path, np.array([0.1, 0.31, 0.0, 0.9]), fps=10)
    assert [round(frame.float().mean().item() / 30) for frame in frames] == [1, 2, 0, 7]
    with pytest.raises(ValueError, match=r"frame for 1\.100 s is 0\.225 s away.* \(8 fps, dataset 10 fps\)"):
        data_frames.decode(path, np.array([0.1, 1.1]), fps=10)


def test_a_decoder_without_its_libraries_does_not_blame_the_video(video_dataset, monkeypatch):
    class Broken:
        def find_spec(self, name: str, *about) -> None:
            if name.startswith("torchcodec"):
                raise RuntimeError("\nCould not load libtorchcodec. Likely causes:\n 1. FFmpeg is not installed")

    for name in [name for name in sys.modules if name.startswith("torchcodec")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(data_frames, "video_decoder", lambda: "torchcodec")
    data_frames._open_video.cache_clear()
    path = next(video_dataset.glob("videos/*/*/*.mp4"))
    with pytest.raises(ValueError, match=r"^torchcodec cannot be loaded \(Could not load .*\): install FFmpeg's lib"):
        data_frames.decode(path, np.array([0.1]), fps=20)


@pytest.mark.slow
def test_worker_processes_change_nothing(video, images):
    groups = groups_of(60, 60, shares=(0.5, 0.5))
    dataset = SampleDataset([video, images], replace(SPEC, pair_size=40), seed=0, **AUGMENTED)
    here, there = (
        list(data_loader.make_loader(dataset, StepSampler(groups, 0, 4, 0, 3), num_workers=workers))
        for workers in (0, 2)
    )
    assert len(here) == len(there) == 3
    for one, other in zip(here, there):
        assert_equal(one, other)


def test_two_processes_read_what_one_reads(video, images):
    """Batches of one sample, so that each holds frames of a single size."""
    dataset = SampleDataset([video, images], replace(SPEC, pair_size=40), seed=0, **AUGMENTED)
    groups = groups_of(60, 60, shares=(0.5, 0.5))
    whole = list(data_loader.make_loader(dataset, StepSampler(groups, 0, 4, 0, 2), num_workers=0))
    shards = [
        data_loader.make_loader(dataset, StepSampler(groups, 0, 4, 0, 2, p, 2, 2), num_workers=0) for p in range(2)
    ]
    passes = [batch for pair in zip(*shards) for batch in pair]  # 2 steps x 2 passes x 2 processes
    for step in range(2):
        assert_equal(join(passes[4 * step : 4 * step + 4]), whole[step])


def test_held_out_batches_are_the_same_every_time(video, tmp_path):
    config = RunConfig(
        run_dir=tmp_path, data=DataConfig(roots=("x",), num_workers=0), steps=1, batch_size=4, eval_samples=8
    )
    train, held_out = data_split.split_datasets([video], 0.05, seed=0)
    groups = group_rows(train), group_rows(held_out)
    loaders = data_loader.make_loaders([video], *groups, SPEC, config, Accelerator(cpu=True), **AUGMENTED)
    first, second = list(loaders.held_out()), list(loaders.held_out())
    assert len(first) == 2
    for one, other in zip(first, second):
        assert_equal(one, other)
        assert torch.equal(one.images[0], one.pairs[:, 0, 0])  # not augmented
    (augmented,) = loaders.train(0)
    assert not torch.equal(augmented.images[0], augmented.pairs[:, 0, 0])
    names = {
        f"{video.name} episode {e}" for e in np.searchsorted(video.episode_to, held_out[0][1].numpy(), side="right")
    }
    assert {key.rsplit(" frame ", 1)[0] for batch in first for key in batch.keys} <= names
    assert data_loader.make_loaders([video], groups[0], [], SPEC, config, Accelerator(cpu=True)).held_out is None


# --- opening ----------------------------------------------------------------------------------------------------------


def test_columns_are_what_the_parquet_files_hold(tmp_path):
    """Whatever their types, over files of several row groups; the files may differ in type, the first decides."""
    rng, paths, tables = np.random.default_rng(0), [], []
    for number, rows in enumerate((7, 1, 30)):
        vectors = rng.normal(size=(rows, 3))
        types = pa.list_(pa.float32(), 3), pa.list_(pa.float32())
        columns = {
            "videos/a/number": pa.array(rng.integers(9, size=rows)),
            "bool": pa.array(rng.integers(2, size=rows) > 0),
            "vector": pa.array(vectors.tolist(), types[number % 2]),
            "one": pa.array(vectors[:, :1].tolist(), pa.list_(pa.float64())),
            "text": pa.array(["not read"] * rows),
        }
        paths.append(tmp_path / f"{number}.parquet")
        tables.append(pa.table(columns))
        pq.write_table(tables[-1], paths[-1], row_group_size=4)
    columns = {"vector": list, "videos/a/number": int, "bool": list, "one": float}
    found = Columns(paths, columns, 38)
    for name in columns:
        expected = np.array([value for table in tables for value in table[name].to_pylist()]).squeeze()
        assert np.array_equal(found[name], expected.astype(found[name].dtype)), name
    kinds = [(found[name].shape, str(found[name].dtype)) for name in columns]
    assert kinds == [((38, 3), "float32"), ((38,), "int64"), ((38,), "bool"), ((38,), "float64")]
    with pytest.raises(ValueError, match=r"holds 38 rows, meta/info.json says 39: the dataset is not complete"):
        Columns(paths, columns, 39)
    pq.write_table(tables[0].slice(0, 6), paths[0])  # another file of the same name
    assert len(Columns(paths, columns, 37)["bool"]) == 37


def test_columns_are_written_once(tmp_path, monkeypatch):
    """Processes that open a dataset together wait for the first; what a killed one left does not matter."""
    path, calls = tmp_path / "0.parquet", []
    pq.write_table(pa.table({"a": range(9)}), path)

    write = data_columns.write_columns

    def slowly(directory: Path, *arguments) -> int:
        calls.append(directory)
        time.sleep(0.2)
        return write(directory, *arguments)

    monkeypatch.setattr(data_columns, "write_columns", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Columns([path], {"a": int}, 9), range(4)))
    assert len(calls) == 1
    assert {columns.directory for columns in found} == {found[0].directory}
    assert not found[0].directory.with_suffix(".part").exists()


def test_what_a_loader_worker_gets_is_small(video, images):
    for dataset in (video, images):
        dataset.task(3)
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 20_000
        copy = pickle.loads(pickled)
        keys = [SampleKey(0, 0, 0, 11)]
        spec = SampleSpec((CAMERA,), state_dim=dataset.vector_dim("observation.state"))
        assert_equal(SampleDataset([copy], spec, 0)[keys], SampleDataset([dataset], spec, 0)[keys])


@pytest.fixture
def lerobot_home(tmp_path, monkeypatch):
    """LeRobot's home, an empty one, and what this process has downloaded into its cache of the hub: revisions."""
    assert data.HF_LEROBOT_HOME == constants.HF_LEROBOT_HOME
    assert data.HF_LEROBOT_HOME / "hub" == constants.HF_LEROBOT_HUB_CACHE
    home, downloads = tmp_path / "home", []
    monkeypatch.setattr(data, "HF_LEROBOT_HOME", home)
    for place in ("lerobot.utils.constants", "lerobot.datasets.dataset_metadata", "lerobot.datasets.lerobot_dataset"):
        monkeypatch.setattr(f"{place}.HF_LEROBOT_HUB_CACHE", home / "hub")
    for place in ("lerobot.utils.constants", "lerobot.datasets.dataset_metadata"):
        monkeypatch.setattr(f"{place}.HF_LEROBOT_HOME", home)
    for place in ("utils", "dataset_metadata"):
        monkeypatch.setattr(f"lerobot.datasets.{place}.get_safe_version", lambda repo_id, version: version)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return home, downloads


def downloaded(home: Path, dataset: Path) -> Path:
    """somebody/video as the hub's client keeps a version of it: files that link to contents, and the version's name."""
    cache = home / "hub" / "datasets--somebody--video"
    snapshot = cache / "snapshots" / ("ab" * 20)
    for number, path in enumerate(path for path in sorted(dataset.rglob("*")) if path.is_file()):
        link, blob = snapshot / path.relative_to(dataset), cache / "blobs" / str(number)
        for parent in (link.parent, blob.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "v3.0").write_text(snapshot.name)
    return snapshot


def test_a_dataset_of_the_hub_is_downloaded_once(video_dataset, lerobot_home, monkeypatch):
    """What is missing of it, in the version that LeRobot chooses, into the directory where LeRobot looks for it."""
    home, downloads = lerobot_home

    def download(repo_id: str, *, repo_type: str, revision: str, cache_dir: Path, local_files_only=False) -> str:
        if local_files_only:
            return snapshot_download(
                repo_id, repo_type=repo_type, revision=revision, cache_dir=cache_dir, local_files_only=True
            )
        downloads.append((repo_id, repo_type, revision, cache_dir))
        return str(downloaded(home, video_dataset))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for _ in range(2):
        (dataset,) = data.open_datasets(DataConfig(repo_ids=("somebody/video",)))
        assert (dataset.name, dataset.num_frames) == ("somebody/video", sum(range(20, 28)))
        assert downloads == [("somebody/video", "dataset", "v3.0", home / "hub")]
    shutil.rmtree(dataset.root / "videos")
    (again,) = data.open_datasets(DataConfig(repo_ids=("somebody/video",)))
    theirs = LeRobotDataset("somebody/video", return_uint8=True)
    assert torch.equal(again.read_frames(CAMERA, [3])[0], theirs[3][CAMERA])
    assert len(downloads) == 2 and again.root == theirs.root


def test_a_dataset_is_where_lerobot_has_it(video_dataset, images, image_dataset, lerobot_home):
    """Its own directory comes before a version of the hub, and that before what an older LeRobot has downloaded."""
    (home, _), entry = lerobot_home, DatasetEntry(repo_id="somebody/video")
    own = home / "somebody" / "video"
    assert data.place(entry) == own  # where neither is
    snapshot = downloaded(home, image_dataset)
    assert data.place(entry) == snapshot
    (dataset,) = data.open_datasets(DataConfig(repo_ids=("somebody/video",)))
    assert torch.equal(dataset.read_frames(CAMERA, [5]), images.read_frames(CAMERA, [5]))
    shutil.copytree(video_dataset, own)
    old = own / ".cache" / "huggingface" / "download"
    for is_old, found in ((False, own), (True, snapshot)):
        if is_old:
            old.mkdir(parents=True)
        assert data.place(entry) == LeRobotDataset("somebody/video").root == found
    shutil.rmtree(home / "hub")
    assert data.place(entry) == own


def test_a_name_in_lerobots_code_is_no_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LEROBOT_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"HF_LEROBOT_HUB_CACHE is set to .*: unset it, and set HF_LEROBOT_HOME"):
        data.open_datasets(DataConfig(repo_ids=("somebody/video",)))


# --- few episodes -----------------------------------------------------------------------------------------------------


def test_few_episodes_are_among_more_and_the_held_out_ones_stay(labelled, video, tmp_path):
    (_, whole), episodes = data_split.split_episodes(labelled, 0.2, 0), {}
    for number in (1, 3, 6):
        rows, held_out = data_split.split_episodes(labelled, 0.2, 0, number)
        assert held_out.numpy().tolist() == whole.numpy().tolist()
        episodes[number] = set(labelled.episode_of(rows.numpy()).tolist())
        assert len(episodes[number]) == number
    assert episodes[1] < episodes[3] < episodes[6]
    assert episodes[6] | set(labelled.episode_of(held_out.start).tolist()) == set(range(8))
    with pytest.raises(ValueError, match=r"max-episodes 7: .* has 6 episode\(s\) to train on, and 2 held out"):
        data_split.split_episodes(labelled, 0.2, 0, 7)
    with pytest.raises(ValueError, match="max-episodes must be at least 1, got 0"):
        PolicyDataConfig(roots=("x",), max_episodes=0)
    # Of the labelled datasets, not of video.
    options = PolicyDataConfig(roots=("x",), max_episodes=2)
    options = Stage3Config(run_dir=tmp_path, data=options, steps=1, val_fraction=0.2)
    training, groups, _ = data_split.split_with_video([labelled, video], 1, options, 0.5)
    assert [len(rows.start) for _, rows in training] == [2, 6]
    assert [len(group.rows.start) for group in groups] == [2, 6]


def test_only_the_named_episodes_are_read(labelled, video, tmp_path):
    """For training or held out. What LeRobot says of each row tells its episode."""
    of_row = lerobot_dataset(labelled).hf_dataset.with_format("numpy")["episode_index"][:]
    for val_fraction, num_val in ((0, 0), (0.05, 1), (0.5, 2)):
        rows = data_split.split_episodes(labelled, val_fraction, 0, episodes=(7, 0, 5, 2))
        training, held_out = ({*of_row[part.numpy()].tolist()} for part in rows)
        assert training | held_out == {0, 2, 5, 7} and not training & held_out
        assert len(held_out) == num_val
        assert sum(map(len, rows)) == np.isin(of_row, [0, 2, 5, 7]).sum()  # all of their rows
    named = data_split.split_episodes(labelled, 0.2, 3, episodes=tuple(range(8)))
    for ours, others in zip(named, data_split.split_episodes(labelled, 0.2, 3), strict=True):
        assert ours.numpy().tolist() == others.numpy().tolist()  # all of them by name are all of them
    with pytest.raises(
        ValueError, match=rf"--data.episodes 1 8: {labelled.name} has the episodes 0 to 7, not 8: leave"
    ):
        data_split.split_episodes(labelled, 0.2, 0, episodes=(1, 8))
    with pytest.raises(ValueError, match=r"has 1 episode\(s\) of --data.episodes, too few .* name more, or pass --val"):
        data_split.split_episodes(labelled, 0.2, 0, episodes=(5,))
    # Of the labelled datasets, not of video. Statistics are those of these rows, too.
    options = PolicyDataConfig(roots=("x",), episodes=(5, 0))
    options = Stage3Config(run_dir=tmp_path, data=options, steps=1, val_fraction=0)
    training, groups, _ = data_split.split_with_video([labelled, video], 1, options, 0.5)
    assert [len(rows.start) for _, rows in training] == [len(group.rows.start) for group in groups] == [2, 8]
    found = robots.Robots.find([labelled], [ACTION]).statistics([labelled], training[:1])
    values = lerobot_dataset(labelled).hf_dataset.with_format("numpy")["action"][:][np.isin(of_row, [0, 5])]
    assert np.allclose(found[ACTION].mean, values.astype(np.float64).mean(0))


def test_statistics_of_few_episodes_are_those_of_their_frames(labelled, video):
    rows = [(0, labelled.rows(20, 41)), (1, video.rows(0, 20))]
    found = robots.vector_statistics([labelled, video], "observation.state", rows)
    vectors = [lerobot_dataset(d).hf_dataset.with_format("numpy")["observation.state"][:] for d in (labelled, video)]
    values = np.concatenate([vectors[0][20:41], vectors[1][:20]]).astype(np.float64)
    assert np.allclose(found.mean, values.mean(0)) and np.allclose(found.std, deviations(values))
    assert len(robots.vector_statistics([labelled, video], "action", rows).mean) == 4


def test_weights_share_out_every_batch(video, labelled):
    """Whatever the datasets' sizes; without weights every frame counts the same."""
    rows = [(0, video.rows(0, 20)), (1, labelled.rows())]
    sampler = StepSampler(data_split.weighted(rows, {0: 3.0, 1: 1.0}), 0, 8, 0, 50)
    taken = [[key.dataset for key in keys] for keys in sampler]
    assert all(of_step.count(0) == 6 and of_step.count(1) == 2 for of_step in taken)
    (group,) = data_split.weighted(rows)
    assert len(group) == 20 + labelled.num_frames
    mixed = data_split.mix(rows[:1], rows[1:], 0.25, weights={0: 2.0})
    assert [group.share for group in mixed] == [0.75, 0.25]
    with pytest.raises(ValueError, match=r"--data.weights \(1.0,\): pass a number for each of 2 dataset"):
        PolicyDataConfig(roots=("x", "y"), weights=(1.0,))
    for wrong in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"--data.weights must be above 0.*, got {wrong}"):
            PolicyDataConfig(roots=("x", "y"), weights=(1.0, wrong))


def test_the_state_of_a_share_of_the_samples_is_hidden(labelled):
    """Nothing else of a sample changes, and which samples these are follows from (seed, step, slot)."""
    spec = replace(SPEC, cameras=(), label_cameras=(), horizon=0)
    keys = [SampleKey(step, slot, 0, slot) for step in range(10) for slot in range(16)]
    whole = SampleDataset([labelled], spec, seed=0)[keys]
    hidden = SampleDataset([labelled], spec, seed=0, state_dropout=0.25)[keys]
    assert whole.state_mask.all() and 0.1 < (~hidden.state_mask).float().mean() < 0.4
    assert torch.equal(
        SampleDataset([labelled], spec, seed=0, state_dropout=0.25)[keys[7:9]].state_mask, hidden.state_mask[7:9]
    )
    assert_equal(replace(hidden, state_mask=whole.state_mask), whole)
    with pytest.raises(ValueError, match=r"--data.state-dropout must be at least 0 and at most 1, got 1.5"):
        PolicyDataConfig(roots=("x",), state_dropout=1.5)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no LeRobotDataset at .*nowhere.*no such directory"):
        open_datasets(tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match=r"meta/info.json is missing \(found: \['pictures'\]\)"):
        open_datasets(tmp_path)
    with pytest.raises(ValueError, match=r"no LeRobotDataset at .*nobody/nothing"):
        data.open_datasets(DataConfig(repo_ids=("nobody/nothing",)))


@pytest.mark.parametrize("missing", ["data", "videos", "meta/episodes", "meta/tasks.parquet"])
def test_a_dataset_of_which_a_part_is_missing_is_refused(video_dataset, tmp_path, missing):
    shutil.copytree(video_dataset, tmp_path / "copy")
    path = tmp_path / "copy" / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match=rf"the LeRobotDataset at .*copy is not complete, missing: .*copy/{missing}"):
        open_datasets(tmp_path / "copy")


def test_cameras_are_those_that_all_datasets_have(video, images):
    """Unless the user names one that some lack, which is then masked there."""
    assert data_views.choose_cameras([images], DataConfig(roots=("x",))) == ((CAMERA, WRIST), (CAMERA,))
    assert data_views.choose_cameras([video, images], DataConfig(roots=("x",))) == ((CAMERA,), (CAMERA,))
    chosen = data_views.choose_cameras([images], DataConfig(roots=("x",), cameras=(WRIST,), label_cameras=(CAMERA,)))
    assert chosen == ((WRIST,), (CAMERA,))
    both = DataConfig(roots=("x",), cameras=(WRIST, CAMERA), label_cameras=(CAMERA,))
    assert data_views.choose_cameras([video, images], both) == ((WRIST, CAMERA), (CAMERA,))
    for options, named, message in [
        ({"cameras": (CAMERA, WRIST)}, False, "or you name them"),  # not the user's, but those of a model to start from
        ({"cameras": ("observation.images.top",)}, True, "or you name them"),
        ({"label_cameras": (WRIST,)}, True, f"every dataset must have the label cameras, but not {video.name};"),
        ({"cameras": (WRIST, CAMERA)}, True, f"the label cameras, but not {video.name};"),
        ({"cameras": (WRIST,), "label_cameras": (CAMERA,)}, True, f"^{video.name} would show the policy nothing"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            data_views.choose_cameras([video, images], DataConfig(roots=("x",), **options), named)
        (asked,) = options.get("label_cameras") or options["cameras"][-1:]
        for words in (asked, f"{video.name}: {CAMERA}", f"{images.name}: {CAMERA}, {WRIST}", "Pass --data."):
            assert words in str(error.value)
    # Where no pairs are read, nobody needs the label camera.
    assert data_views.choose_cameras([video, images], both, with_pairs=False) == ((WRIST, CAMERA), ())


@pytest.mark.parametrize("gap, near", [(0.02, "0.05, 0.1"), (0.09, "0.05, 0.1")])
def test_a_gap_that_is_no_whole_number_of_frames_is_refused(video_dataset, gap, near):
    with pytest.raises(ValueError, match=rf"frame-gap-s {gap} is not a whole .* at 20 fps: take one near {near}"):
        _ = open_datasets(video_dataset, frame_gap_s=gap)[0].gap


def test_different_widths_are_refused(video, labelled, images):
    with pytest.raises(ValueError, match=rf"have action of different widths.*{labelled.name}': 4.*{images.name}': 2"):
        Robots.find([video, labelled, images], [ACTION])
    assert Robots.find([video, labelled], [ACTION]).dims == {"state_dim": 4, "action_dim": 4}
    assert Robots.find([video, images], []).dims == {"state_dim": 4}
    assert Robots.find([video, images], [], use_state=False).dims == {"state_dim": 0}
    assert Robots.find([video], [ACTION]).dims["action_dim"] == 0


def test_too_few_episodes_to_hold_one_out_are_refused(video):
    with pytest.raises(ValueError, match=r"has 8 episode\(s\), too few to hold out a share of 0.99"):
        data_split.split_episodes(video, 0.99, seed=0)


def test_a_share_that_gets_no_sample_is_refused():
    with pytest.raises(ValueError, match=r"--batch-size 8 is too small for shares of \[0.95, 0.05\].*\[8, 0\]"):
        keys_of(groups_of(30, 30, shares=(0.95, 0.05)), 0, 1)


def test_frames_without_a_pair_are_left_out(video, images):
    """Neither does a dataset remain of which no frame has one."""
    everything = [(0, video.rows()), (1, images.rows(0, 3))]
    found = data.with_pairs([video, images], everything)
    last = [end - 1 - back for end in video.episode_to for back in range(video.gap)]
    assert [index for index, _ in found] == ([0, 1] if 3 + images.gap <= images.episode_to[0] else [0])
    assert found[0][1].numpy().tolist() == sorted(set(range(video.num_frames)) - set(last))
    short = (0, video.rows(int(video.episode_to[0]) - video.gap, int(video.episode_to[0])))
    long = (1, video.rows())
    assert [index for index, _ in data.with_pairs([video, video], [short, long])] == [1]
    # As held-out episodes that are too short: without a word nothing would be evaluated.
    with pytest.raises(ValueError, match=rf"or --val-fraction 0 if these are the held-out .* \({video.gap} frames\)"):
        data.with_pairs([video], [short])


def test_video_without_a_single_whole_pair_is_refused(video_dataset):
    (dataset,) = datasets = open_datasets(video_dataset, frame_gap_s=5)
    with pytest.raises(ValueError, match=r"no episode is longer than --data.frame-gap-s.*5 s"):
        data.valid_pair_share(datasets, all_frames(dataset))
