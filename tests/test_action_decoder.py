"""Actions for video from latent actions: a teacher that sees the motion gives back the actions that caused it."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.processor import to_relative_actions
from test_relative_actions import MASK, NAMES, copy_with, find
from torch import Tensor

from smolvla_shared import action_decoder, data, label_probe
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import DataConfig
from smolvla_shared.data_loader import SampleDataset, SampleSpec
from smolvla_shared.data_order import SampleKey
from smolvla_shared.data_rows import Rows
from smolvla_shared.teacher_config import GroundedIn

CAMERA, GAP, CHUNK = "observation.image", 4, 10


class SeesTheMotion:
    """Labels of M latent actions in a row, of one slot: the square's displacement over each gap, mixed and scaled."""

    kind, cameras, pair_size, horizon, shape = "continuous", (), 0, 3, (3, 5)
    teacher_id, teacher_grounding = "0" * 64, GroundedIn(("demos",), 5, 0.1)

    def __init__(self, datasets: list[data.RobotDataset]):
        self.positions = [label_probe.column(dataset, data.STATE_KEY)[:, :2].float() for dataset in datasets]
        self.mix = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))

    def to(self, device: torch.device) -> None:
        pass

    def __call__(self, raw: RawBatch) -> Tensor:
        moved = []
        for index, row in zip(raw.dataset, raw.row):
            positions = self.positions[index]
            places = [positions[min(row + i * GAP, len(positions) - 1)] for i in range(4)]
            moved.append(torch.stack([b - a for a, b in pairwise(places)]) @ self.mix)
        return torch.stack(moved)


@pytest.fixture(scope="module")
def recordings(labelled_dataset) -> list[data.RobotDataset]:
    """Demonstrations, and the same recording as video."""
    return [data.open_datasets(DataConfig(roots=(labelled_dataset,), frame_gap_s=0.2))[0] for _ in range(2)]


def rows_of(datasets: list[data.RobotDataset]) -> list[tuple[int, Rows]]:
    return [(index, dataset.rows()) for index, dataset in enumerate(datasets)]


def test_video_gets_the_mean_action_of_each_gap(recordings):
    labels = SeesTheMotion(recordings)
    decode = action_decoder.fit(labels, 1, recordings, rows_of(recordings), seed=0)
    both = action_decoder.fit(labels, 2, recordings, rows_of(recordings), seed=0)  # the same demonstrations twice
    torch.testing.assert_close(both.ridge.weights[:, :2], decode.ridge.weights[:, :2], rtol=1e-3, atol=1e-4)
    assert min(decode.r2[:2]) > 0.95  # the square's velocity
    teacher = "teacher 000000000000 (grounded in 5 episodes of demos, weight 0.1)"
    assert str(decode).startswith(
        f"actions decoded from latent actions of {teacher}, 4 steps each: R² on unseen parts 1.00, 1.00, "
    )
    assert str(decode).endswith("; of video, dimension 2, 3 stays unknown")
    spec = SampleSpec(cameras=(), action_dim=4, chunk_size=CHUNK, horizon=3)
    end = int(recordings[1].episode_to[2])
    keys = [SampleKey(0, 0, *place) for place in [(0, 3), (1, 3), (1, end - 10), (1, end - 6)]]
    raw = SampleDataset(recordings, spec, seed=0)[keys]
    found = decode(raw, labels(raw))
    assert torch.equal(found.actions[0], raw.actions[0]) and torch.equal(found.action_mask[0], raw.action_mask[0])
    # Two gaps of four steps, with a third behind them, are known of a chunk of ten; one where the episode ends in
    # between; none at its end.
    assert found.action_mask[1:].sum(1).tolist() == [8, 4, 0]
    actions = label_probe.column(recordings[1], data.ACTION_KEY)[:, :2].float()
    for sample, row, gaps in [(1, 3, 2), (2, end - 10, 1)]:
        for gap in range(gaps):
            steps = slice(gap * GAP, (gap + 1) * GAP)
            decoded = found.actions[sample, steps, :2]
            assert torch.equal(decoded, decoded[:1].expand(GAP, -1))
            torch.testing.assert_close(decoded[0], actions[row:][steps].mean(0), rtol=0, atol=0.01)  # of up to 0.08
    # What the motion does not tell (the episode's number, noise) does not count on video.
    assert decode.tells == [True, True, False, False]
    assert found.actions[1:, :8, 2:].isnan().all() and not found.actions[..., :2].isnan().any()
    assert (found.actions[1:, :8, :2] <= decode.high[:2]).all() and (found.actions[1:, :8, :2] >= decode.low[:2]).all()


def test_absolute_positions_are_decoded_as_lerobots_relative_chunks(recordings, labelled_dataset, tmp_path):
    """Of a robot whose action is the next frame's position, from latent actions of another that moved alike."""
    root = copy_with(labelled_dataset, tmp_path / "absolute", NAMES)
    (labelled,) = data.open_datasets(DataConfig(roots=(root,), frame_gap_s=0.2))
    robots, datasets = find(root)[1], [labelled, recordings[1]]
    labels = SeesTheMotion(datasets)
    with pytest.raises(
        ValueError, match=r"of .* are absolute positions \(the displ.* a motion: pass --relative-actions"
    ):
        action_decoder.fit(labels, 1, datasets, rows_of(datasets), seed=0)
    decode = action_decoder.fit(labels, 1, datasets, rows_of(datasets), seed=0, relative=robots.relative)
    assert str(decode).startswith(
        "actions, and changes of those that are relative, decoded from latent actions of teacher"
    )
    spec = SampleSpec(cameras=(), state_dim=4, action_dim=4, chunk_size=CHUNK, horizon=3)
    actions, state = (label_probe.column(labelled, key).float() for key in (data.ACTION_KEY, data.STATE_KEY))
    jumps = state[:, :2].diff(n=2, dim=0).abs().amax(1)  # where the square bounces its pace changes within a gap
    rows = [row for row in range(len(jumps) - 12) if jumps[row : row + 12].amax() < 0.02]
    assert len(rows) > 4
    raw = SampleDataset(datasets, spec, seed=0)[[SampleKey(0, 0, 1, row) for row in rows]]
    for shown in (raw, replace(raw, state=torch.zeros_like(raw.state))):  # what a video without a state has
        found = decode(shown, labels(raw))
        relative = robots.relative.of(found.actions, shown.state)
        for sample, row in enumerate(rows):
            chunk = to_relative_actions(actions[row : row + CHUNK][None], state[row][None], MASK)[0]
            # Over eight steps the square goes up to 0.6.
            torch.testing.assert_close(relative[sample, :8, :2], chunk[:8, :2], rtol=0, atol=0.05)
        assert found.action_mask.sum(1).tolist() == [8] * len(rows)
        assert relative[:, :8, 3].isnan().all()  # the gripper: noise


def test_a_dimension_is_judged_by_parts_of_episodes_not_by_unseen_tasks():
    """A motion that a camera sees with another offset in each episode, and an action that is each episode's own."""
    generator = torch.Generator().manual_seed(0)
    episodes, rows = torch.arange(5).repeat_interleave(80), torch.arange(400)
    motion, noise = (torch.randn(400, 1, generator=generator) for _ in range(2))
    appearance = torch.nn.functional.one_hot(episodes).float()
    latents = torch.cat([motion + 3 * appearance @ torch.randn(5, 1, generator=generator), appearance], dim=1)
    dataset = SimpleNamespace(
        episode_from=np.arange(0, 400, 80), episode_to=np.arange(80, 401, 80), episode_of=lambda rows: rows // 80
    )
    parts = action_decoder.parts_of_episodes(dataset, rows, reach=8)
    assert parts[[0, 7, 11, 12, 19, 20, 79]].tolist() == [
        [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 1], [3, 3, 3],
    ]  # fmt: skip
    found = action_decoder.unseen_r2(latents, torch.cat([motion, noise], 1), parts, episodes, 1e-2)
    assert found[0] > 0.9 and found[1] < 0.1
    by_episode = label_probe.probe(latents, motion, episodes, 1e-2)  # what it would be told of unseen tasks
    assert by_episode[0] < found[0] - 0.2
    # Where episodes are so short that a window reaches over a whole part, they are left out whole.
    short = SimpleNamespace(
        episode_from=np.arange(0, 400, 16), episode_to=np.arange(16, 401, 16), episode_of=lambda rows: rows // 16
    )
    parts, episodes = action_decoder.parts_of_episodes(short, rows, reach=8), rows // 16
    assert parts[[5, 8, 10]].tolist() == [[0, 1, 3], [0, 2, 3], [0, 2, 3]]
    found = action_decoder.unseen_r2(motion, motion, parts, episodes, 1e-2)
    assert found == label_probe.probe(motion, motion, episodes, 1e-2) and found[0] > 0.9
    assert action_decoder.unseen_r2(motion, motion, parts, torch.zeros(400), 1e-2) is None


def test_latents_that_tell_nothing_are_refused(recordings):
    labels = SeesTheMotion(recordings)
    labels.positions = [torch.randn(positions.shape) for positions in labels.positions]
    with pytest.raises(ValueError, match=r"do not tell the actions of the demonstrations \(actions .* R² on unseen"):
        action_decoder.fit(labels, 1, recordings, rows_of(recordings), seed=0)


def test_demonstrations_that_are_too_short_are_refused(recordings):
    labels, (_, rows) = SeesTheMotion(recordings), rows_of(recordings)[0]
    length = r"2 latent actions, 0.4 s \(--data.frame-gap-s\)"
    for frames, message in [(8, f"no demonstration is longer than {length}: pass"), (13, f"one short .* {length}")]:
        short = [(0, Rows(rows.end[:1] - frames, rows.end[:1]))]
        with pytest.raises(ValueError, match=f"--decode-actions: {message}"):
            action_decoder.fit(labels, 1, recordings[:1], short, seed=0)


def test_one_latent_action_is_too_short_a_window(recordings):
    labels = SeesTheMotion(recordings)
    labels.horizon = 1
    with pytest.raises(ValueError, match="reads 2 latent actions in a row, --latent-horizon is 1: pass one more"):
        action_decoder.fit(labels, 1, recordings, rows_of(recordings), seed=0)


def test_unequal_rates_are_refused(recordings, monkeypatch):
    labels, rows = SeesTheMotion(recordings), rows_of(recordings)
    with monkeypatch.context() as patched:  # as a dataset of a mixture may have it
        patched.setattr(recordings[1], "frame_gap_s", 0.4)
        patched.setattr(recordings[1], "name", "slower")
        with pytest.raises(ValueError, match=r"all datasets must have one frame gap, they have, .*'slower': 0.4"):
            action_decoder.fit(labels, 1, recordings, rows, seed=0)
    monkeypatch.setattr(data.RobotDataset, "gap", property(lambda dataset: 2 + (dataset is recordings[1])))
    monkeypatch.setattr(recordings[1], "name", "faster")
    with pytest.raises(ValueError, match=r"frame gaps cover different numbers of steps: .*'faster': 3"):
        action_decoder.fit(labels, 2, recordings, rows, seed=0)
