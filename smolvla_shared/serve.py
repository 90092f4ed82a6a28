"""LeRobot's asynchronous policy server (lerobot.async_inference), which also serves the policies of this project.

python -m smolvla_shared.serve --host=127.0.0.1 --port=8080 --fps=30

The options are LeRobot's, and so is the client, on the robot's machine. LeRobot's own server takes a fixed list of
policy types. As there, whoever reaches the port can run code on the server: pass a --host that only robots reach.
"""

import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from smolvla_shared import ranges
from smolvla_shared.command import run_command
from smolvla_shared.refusals import refuse_differences

if TYPE_CHECKING:
    from smolvla_shared.lerobot_config import HLRPSmolVLASharedConfig


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve policies to robots, by LeRobot's asynchronous policy server. A robot's client names the policy."""

    # Address that robots connect to.
    host: str = "localhost"
    # Port of it.
    port: ranges.Port = 8080
    # Actions that a robot executes in a second.
    fps: ranges.Count = 30
    # The least time between two chunks, seconds.
    inference_latency: ranges.NotNegative = 1 / 30
    # Time that the server waits for an observation before it asks again, seconds.
    obs_queue_timeout: ranges.NotNegative = 2.0

    def __post_init__(self):
        ranges.check(self, "--")

    def check_address(self) -> None:
        """Raise ValueError for an address that nobody can serve at."""
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()  # two may bind, one may listen
        except (OSError, UnicodeError) as error:  # no address at all
            raise ValueError(
                f"--host {self.host[:60]} --port {self.port} cannot be served ({getattr(error, 'strerror', error)}): "
                "pass an address of this machine, and a port that is free"
            ) from error


def check_robot(config: "HLRPSmolVLASharedConfig", features: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError if a robot with these observations has other cameras or joints than the policy was trained on.

    Cameras of other names would never be found, and joints in another order would get each other's actions.
    """
    from smolvla_shared.lerobot_config import feature_names

    cameras = {key for key, feature in features.items() if feature["dtype"] in ("image", "video")}
    needed = {*config.core.cameras} - {*config.optional_cameras}
    rows = [] if needed <= cameras else [("cameras", sorted(cameras), sorted(needed))]
    joints = feature_names(features).get("state")
    if config.core.state_dim and config.state_feature_names and joints:
        rows.append(("joints", list(joints), list(config.state_feature_names)))
    title = "the policy was trained on another robot"
    refuse_differences(title, rows, "this one has", "the policy", "name and order cameras and joints as in its data")


def main(config: ServeConfig) -> None:
    config.check_address()

    # Says what to install where gRPC is missing; makes a directory `logs` where it runs.
    from lerobot.async_inference import policy_server
    from lerobot.async_inference.configs import PolicyServerConfig

    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy

    class Server(policy_server.PolicyServer):
        """Refuses a robot that one of our policies does not know, before it moves."""

        def SendPolicyInstructions(self, request, context):
            answer = super().SendPolicyInstructions(request, context)
            if isinstance(self.policy, HLRPSmolVLASharedPolicy):
                check_robot(self.policy.config, self.lerobot_features)
            return answer

    policy_server.SUPPORTED_POLICIES.append(HLRPSmolVLASharedPolicy.name)
    policy_server.PolicyServer = Server
    policy_server.serve(PolicyServerConfig(**asdict(config)))


if __name__ == "__main__":
    run_command(main, ServeConfig)
