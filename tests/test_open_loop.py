"""examples/open_loop.py: the actions of LeRobot's own loop over LeRobotDataset, errors by hand, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lerobot_dataset
from lerobot.policies.factory import make_pre_post_processors

from examples import open_loop
from examples.open_loop import Compared, OpenLoopConfig
from smolvla_shared import data
from smolvla_shared.config import DataConfig, ModelConfig
from smolvla_shared.flow import episode_noise
from smolvla_shared.lerobot_files import load_config, save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import Statistics
from smolvla_shared.relative_actions import Relative
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config

CAMERA, T, EXECUTED = "observation.image", 4, 3
RELATIVE = Relative(T, ("gripper",), (True, True, True, False))


def write_policy(path: Path, relative: Relative | None = None, fps: float = 20.0, camera: str = CAMERA) -> Path:
    core = make_core_config(ModelConfig(preset="tiny"), (camera,), state_dim=4, action_dim=4, chunk_size=T)
    torch.manual_seed(0)
    weights, tokenizer = SmolVLASharedCore(core).state_dict(), load_trunk_tokenizer("tiny", None)
    statistics = dict.fromkeys(("state", "action"), Statistics((0.5, 0.4, 3.0, 0.0), (0.2, 0.3, 2.0, 1.0)))
    names = {"action": ("x", "y", "episode", "gripper"), "state": ("x", "y", "episode", "lamp")}
    save_policy(path, core, weights, tokenizer, statistics, EXECUTED, {}, names=names, fps=fps, relative=relative)
    return path


@pytest.mark.parametrize("relative", [None, RELATIVE])
def test_actions_are_those_of_lerobots_loop(labelled_dataset, tmp_path, relative):
    """Frame by frame with select_action, on what LeRobotDataset reads."""
    path = write_policy(tmp_path / "policy", relative)
    options = OpenLoopConfig(policy_path=str(path), roots=(labelled_dataset,), out=tmp_path / "out", batch_size=5)
    datasets = data.open_datasets(DataConfig(roots=(labelled_dataset,)))
    compared = open_loop.compare(options, load_config(path), datasets)

    policy = HLRPSmolVLASharedPolicy.from_pretrained(path)
    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=str(path))
    recorded = lerobot_dataset(datasets[0])
    for episode in (0, 7):
        chunks, found = compared.episode == episode, []
        rows = range(datasets[0].episode_from[episode], datasets[0].episode_to[episode])
        policy.reset()
        for step, row in enumerate(rows):
            seen = {key: recorded[row][key][None] for key in (CAMERA, "observation.state")}
            noise = episode_noise(episode, step, (T, 32))[None]
            batch = preprocess(seen | {"task": [recorded[row]["task"]]})
            found.append(postprocess(policy.select_action(batch, noise))[0])
        expected, executed = torch.stack(found).numpy(), compared.predicted[chunks, :EXECUTED].reshape(-1, 4)
        np.testing.assert_allclose(executed[: len(rows)], expected, rtol=1e-3, atol=1e-3)
        actions = np.stack([recorded[row]["action"].numpy() for row in rows])
        theirs = compared.recorded[chunks, :EXECUTED].reshape(-1, 4)
        np.testing.assert_array_equal(theirs[: len(rows)], actions)
        assert np.isnan(theirs[len(rows) :]).all()
        np.testing.assert_array_equal(compared.before[chunks][:2], actions[[0, EXECUTED - 1]])


def test_errors_are_those_of_the_executed_actions():
    nan = float("nan")
    # Two chunks of three steps and one dimension, two of them executed; the second chunk passes an episode's end.
    recorded = np.array([[[0.0], [2.0], [4.0]], [[4.0], [nan], [nan]]])
    predicted = np.array([[[1.0], [2.0], [9.0]], [[2.0], [5.0], [5.0]]])
    errors = Compared(predicted, recorded, np.array([[0.0], [2.0]]), np.array([0, 0])).errors(2)
    # Executed were 0, 2 and 4: their mean is 2, their variance 8 / 3.
    assert errors["mean_absolute_error"] == [1.0]
    assert errors["of_the_mean_action"] == pytest.approx([4 / 3])
    assert errors["of_holding_the_last_action"] == pytest.approx([4 / 3])
    assert errors["r2"] == pytest.approx([1 - (5 / 3) / (8 / 3)])
    assert errors["squared_error_by_step_of_chunk"] == pytest.approx([2.5 / (8 / 3), 0, 25 / (8 / 3)])
    still = Compared(predicted, np.zeros_like(recorded), np.zeros((2, 1)), np.array([0, 0])).errors(2)
    assert still["r2"] == [None] and still["squared_error_by_step_of_chunk"] == []


def test_the_command_writes_what_it_prints(labelled_dataset, tmp_path, capsys):
    path, out = write_policy(tmp_path / "policy", camera="observation.images.front"), tmp_path / "out"
    names = {CAMERA: "observation.images.front"}
    options = {"roots": (labelled_dataset,), "out": out, "rename": names, "episodes": 3, "n_action_steps": 1}
    open_loop.main(OpenLoopConfig(policy_path=str(path), **options))
    found, printed = json.loads((out / "open_loop.json").read_text()), capsys.readouterr().out
    assert (found["episodes"], found["n_action_steps"], found["actions"]) == (3, 1, ["0", "1", "2", "3"])
    assert f"{found['mean_absolute_error'][0]:.3g}" in printed and "3 episodes, 1 action(s) executed" in printed
    assert len(found["squared_error_by_step_of_chunk"]) == T
    assert (out / "open_loop.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="out exists: name another directory"):
        OpenLoopConfig(policy_path=str(path), **options)


def test_other_recordings_are_refused(labelled_dataset, video_dataset, image_dataset, tmp_path):

    swapped, two_cameras = Path(shutil.copytree(labelled_dataset, tmp_path / "swapped")), image_dataset
    info = json.loads((swapped / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["y", "x", "episode", "gripper"]
    (swapped / "meta/info.json").write_text(json.dumps(info))

    def refused(message: str, root: Path, fps: float = 20.0, **options) -> None:
        path = tmp_path / f"policy at {fps:g}"
        path = path if path.exists() else write_policy(path, fps=fps)
        with pytest.raises(ValueError, match=message):
            open_loop.main(OpenLoopConfig(policy_path=str(path), roots=(root,), out=tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    refused("action has 0 dimensions in .*, 4 in the policy", video_dataset)
    refused("action has 2 dimensions in .*, 4 in the policy", image_dataset, 10.0)
    refused("the policy's actions follow each other at 30 fps, those of .* at 20", labelled_dataset, 30.0)
    refused("has no observation.image, but observation.image: map them", labelled_dataset, rename={CAMERA: "front"})
    refused("would have observation.image twice", two_cameras, 10.0, rename={"observation.images.wrist": CAMERA})
    refused("action is y, x, episode, gripper in .*, x, y, episode, gripper in the policy", swapped)
    refused("--rename front: .* has the cameras", labelled_dataset, rename={"front": CAMERA})
    refused("there is no robot so100 in", labelled_dataset, robot="so100")
    with pytest.raises(ValueError, match="no recordings given: pass --roots"):
        OpenLoopConfig(policy_path="x", out=tmp_path / "out")
