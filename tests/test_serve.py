"""A policy drives a robot through LeRobot's own commands: the asynchronous server and client, and lerobot-rollout."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked import Forked, run_forked
from lerobot_robot_two_cameras import CAMERAS, JOINTS, TwoCamerasConfig
from test_lerobot_policy import make_core

from smolvla_shared.lerobot_files import load_config, save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.normalization import Statistics
from smolvla_shared.serve import check_robot
from smolvla_shared.trunk_files import load_trunk_tokenizer

# The recorded actions of joint i are around 10 i.
POSITIONS = Statistics(tuple(10.0 * i for i in range(6)), (0.1,) * 6)
RANGE = 10 * POSITIONS.std[0]
CHUNK = 12


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("robot") / "pretrained_model"
    cameras = tuple(f"observation.images.{name}" for name in CAMERAS)
    core = make_core(cameras, state_dim=6, action_dim=6, chunk_size=CHUNK)
    shapes = {camera: (3, *size) for camera, size in zip(cameras, CAMERAS.values())}
    tokenizer, statistics = load_trunk_tokenizer("tiny", None), {"state": POSITIONS, "action": POSITIONS}
    names = tuple(f"{joint}.pos" for joint in JOINTS)
    save_policy(
        directory,
        core.config,
        core.state_dict(),
        tokenizer,
        statistics,
        3,
        {},
        names={"state": names, "action": names},
        image_shapes=shapes,
    )
    return directory


def check_log(log: Path, least: int) -> None:
    """The robot has got at least so many actions, each joint its own."""
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(actions) >= least
    for action in actions:
        assert list(action) == [f"{joint}.pos" for joint in JOINTS]
        for position, recorded in zip(action.values(), POSITIONS.mean):
            assert math.isfinite(position) and abs(position - recorded) < RANGE
    assert len({tuple(action.values()) for action in actions}) > 1


@pytest.mark.slow
def test_lerobots_client_gets_its_actions_from_our_server(server, policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # LeRobot writes its logs where it runs
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = f"""
import os, runpy, sys
os.chdir({str(tmp_path)!r})
sys.argv = ["serve", "--host=127.0.0.1", "--port={port}", "--fps=20", "--obs_queue_timeout=0.2"]
runpy.run_module("smolvla_shared.serve", run_name="__main__")
"""
    process = Forked(server, ["-c", serve], tmp_path / "server.txt")

    def is_listening() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    log = tmp_path / "actions.jsonl"
    try:
        process.wait_for(is_listening)
        config = RobotClientConfig(
            policy_type=HLRPSmolVLASharedPolicy.name,
            pretrained_name_or_path=str(policy),
            robot=TwoCamerasConfig(log=log),
            actions_per_chunk=CHUNK,
            task="reach",
            server_address=f"127.0.0.1:{port}",
            fps=20,
        )
        client = RobotClient(config)
        assert client.start(), (tmp_path / "server.txt").read_text()
        threads = [
            threading.Thread(target=client.receive_actions),
            threading.Thread(target=client.control_loop, args=("reach",)),
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while time.monotonic() < end and not (log.is_file() and len(log.read_text().splitlines()) > 2 * CHUNK):
            time.sleep(0.05)
        client.shutdown_event.set()
        for thread in threads:
            thread.join()
        client.stop()
    finally:
        process.kill()
        process.wait()
    check_log(log, least=2 * CHUNK)  # more than one chunk


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_lerobot_rollout_drives_a_robot(server, policy, tmp_path, inference):
    command = ["-m", "lerobot.scripts.lerobot_rollout", f"--policy.path={policy}", "--policy.device=cpu"]
    command += ["--robot.discover_packages_path=lerobot_robot_two_cameras", "--robot.type=two_cameras"]
    command += [f"--robot.log={tmp_path / 'actions.jsonl'}", "--task=reach", "--duration=2", "--fps=10"]
    command += [f"--inference.type={inference}", "--return_to_initial_position=false", "--play_sounds=false"]
    code, printed = run_forked(server, command, tmp_path / "output.txt")
    assert code == 0, printed
    check_log(tmp_path / "actions.jsonl", least=4)  # more than one chunk's, of which 3 are executed


def robot_features(joints, cameras=CAMERAS):
    from lerobot.async_inference.helpers import map_robot_keys_to_lerobot_features

    class Robot:
        observation_features = {f"{joint}.pos": float for joint in joints} | {name: (8, 8, 3) for name in cameras}

    return map_robot_keys_to_lerobot_features(Robot())


def test_a_robot_with_other_joints_or_cameras_is_refused(policy):
    config = load_config(policy)
    check_robot(config, robot_features(JOINTS))
    swapped = (JOINTS[1], JOINTS[0], *JOINTS[2:])
    with pytest.raises(ValueError, match=rf"joints: this one has \['{JOINTS[1]}.pos', .* policy \['{JOINTS[0]}.pos'"):
        check_robot(config, robot_features(swapped))
    with pytest.raises(ValueError, match=r"cameras: this one has \['observation.images.other'\], the policy \["):
        check_robot(config, robot_features(JOINTS, cameras=("other",)))
    config.state_feature_names = None  # the data has no names
    check_robot(config, robot_features(swapped))


@pytest.mark.slow
def test_a_server_without_grpc_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['grpc'] = None; from smolvla_shared import serve; serve.main(serve.ServeConfig())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "pip install 'lerobot[async]'" in done.stderr
