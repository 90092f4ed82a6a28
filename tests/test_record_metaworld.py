"""examples/record_metaworld.py: the real command records what the environment shows."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_shared.environments import make_metaworld

TASK, SIZE = "plate-slide-v3", 64


def record(server: subprocess.Popen, root: Path, *options: str) -> tuple[int, str]:
    command = ["examples/record_metaworld.py", "--root", root, "--tasks", TASK]
    command += ["--image-size", SIZE, "--episodes", 2, *options]
    return run_forked(server, command, root.with_suffix(".txt"))


@pytest.mark.slow
def test_recording(server, tmp_path):
    cameras = {"labelled": ("topview",), "video": ("topview", "corner2")}
    starts = {"labelled": 0, "video": 20}
    for kind in cameras:
        options = "--kind", kind, "--noise", "0", "--start-steps", starts[kind], "--camera", *cameras[kind]
        code, printed = record(server, tmp_path / kind, *options)
        assert code == 0, printed
    labelled, video = (LeRobotDataset(kind, root=tmp_path / kind) for kind in ("labelled", "video"))
    assert "action" in labelled.features
    assert "action" not in video.features
    assert labelled.meta.camera_keys == ["observation.image"]
    assert video.meta.camera_keys == ["observation.images.topview", "observation.images.corner2"]
    assert labelled.meta.total_episodes == video.meta.total_episodes == 2
    assert labelled.fps == 80
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["labelled", "labelled.txt", "video", "video.txt"]  # no temporary directory is left

    # The arm starts at rest, or where a random motion took it.
    moved = labelled[0]["observation.state"] - video[0]["observation.state"]
    assert moved[:3].norm() > 0.01  # metres

    # Replaying the recorded actions from the recorded seed shows the recorded pictures, and ends in success.
    env = make_metaworld(TASK, SIZE, ("topview",))
    observation, _ = env.reset(seed=1_000_000)
    item = labelled[0]
    assert item["task"] == env.task_description
    torch.testing.assert_close(item["observation.state"], torch.tensor(observation["agent_pos"]).float())
    recorded, rendered = [], []
    for index in range(labelled.meta.episodes[0]["length"]):
        item = labelled[index]
        recorded.append(item["observation.image"].permute(1, 2, 0).numpy() * 255)
        rendered.append(observation["pixels"].astype(np.float32))
        observation, _, terminated, _, info = env.step(item["action"].numpy())
    assert terminated
    assert info["is_success"]
    env.close()
    for index in range(0, len(recorded), 8):
        errors = [np.abs(recorded[index] - picture).mean() for picture in rendered]
        assert errors[index] < 8  # of 255: what the codec does to a picture of 64 pixels
        assert abs(int(np.argmin(errors)) - index) <= 3  # and it is this picture, not another of the episode


def test_an_existing_directory_and_an_unknown_task_are_refused(server, tmp_path):
    (tmp_path / "there").mkdir()
    code, printed = record(server, tmp_path / "there", "--kind", "video")
    assert code != 0
    assert "there exists: remove it or name another directory" in printed
    code, printed = record(server, tmp_path / "new", "--kind", "video", "--tasks", "slide-the-plate")
    assert code != 0
    assert "['slide-the-plate'] are no tasks of Meta-World" in printed
    code, printed = record(server, tmp_path / "new", "--kind", "video", "--camera", "top")
    assert code != 0
    assert "--camera top: name Meta-World's, each once; it has corner2, corner" in printed
    for steps in ("-5", "351"):  # Meta-World ends an episode after 500 steps, a recording takes 150
        code, printed = record(server, tmp_path / "new", "--kind", "video", "--start-steps", steps)
        assert code != 0
        assert "--start-steps must be" in printed
        assert steps in printed
    assert not (tmp_path / "new").exists()
