"""A robot for tests: six joints that go where they are told, two cameras that see the first two of them, a log.

As a plugin of LeRobot's commands, without being installed:

    PYTHONPATH=tests lerobot-rollout --policy.path=<policy> --policy.device=cpu --task="reach" --duration=2 --fps=10 \
        --robot.discover_packages_path=lerobot_robot_two_cameras --robot.type=two_cameras --robot.log=actions.jsonl \
        --inference.type=sync --return_to_initial_position=false --play_sounds=false

(--inference.type=rtc for real-time chunking.) Its cameras are observation.images.top and observation.images.wrist, its
state and action the six joints in the order of JOINTS, or of --robot.joints.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
CAMERAS = {"top": (48, 64), "wrist": (40, 40)}  # (height, width)


@RobotConfig.register_subclass("two_cameras")
@dataclass(kw_only=True)
class TwoCamerasConfig(RobotConfig):
    # Every action is a line of this file: {joint: position}, in the order in which they came.
    log: Path
    joints: list[str] = field(default_factory=lambda: list(JOINTS))


class TwoCameras(Robot):
    config_class = TwoCamerasConfig
    name = "two_cameras"

    def __init__(self, config: TwoCamerasConfig):
        super().__init__(config)
        self.config = config
        self.connected = False
        self.position = {f"{joint}.pos": 0.0 for joint in config.joints}

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(self.position, float)

    @property
    def observation_features(self) -> dict:
        return self.action_features | {name: (*size, 3) for name, size in CAMERAS.items()}

    @property
    def is_connected(self) -> bool:
        return self.connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def disconnect(self) -> None:
        self.connected = False

    def get_observation(self) -> dict:
        return self.position | {name: self.picture(*size) for name, size in CAMERAS.items()}

    def picture(self, height: int, width: int) -> np.ndarray:
        """A bright square on grey, where the first two joints are."""
        picture = np.full((height, width, 3), 80, np.uint8)
        x, y, *_ = (int(position) % 30 for position in self.position.values())
        picture[y : y + 8, x : x + 8] = (250, 200, 60)
        return picture

    def send_action(self, action: dict) -> dict:
        assert list(action) == list(self.position), f"told {list(action)}, has {list(self.position)}"
        self.position = {joint: float(position) for joint, position in action.items()}
        with self.config.log.open("a") as log:
            log.write(json.dumps(self.position) + "\n")
        return action
