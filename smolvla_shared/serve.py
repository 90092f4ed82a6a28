"""LeRobot's asynchronous policy server (lerobot.async_inference), which also serves the policies of this project.

python -m smolvla_shared.serve --host=127.0.0.1 --port=8080 --fps=30

The options are LeRobot's, and so is the client, on the robot's machine. LeRobot's own server takes a fixed list of
policy types. As there, whoever reaches the port can run code on the server: pass a --host that only robots reach.
"""

from typing import Any

from smolvla_shared.command import run_command
from smolvla_shared.lerobot_config import HLRPSmolVLASharedConfig, feature_names
from smolvla_shared.refusals import refuse_differences


def check_robot(config: HLRPSmolVLASharedConfig, features: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError if a robot with these observations has other cameras or joints than the policy was trained on.

    Cameras of other names would never be found, and joints in another order would get each other's actions.
    """
    cameras = {key for key, feature in features.items() if feature["dtype"] in ("image", "video")}
    needed = {*config.core.cameras} - {*config.optional_cameras}
    rows = [] if needed <= cameras else [("cameras", sorted(cameras), sorted(needed))]
    joints = feature_names(features).get("state")
    if config.core.state_dim and config.state_feature_names and joints:
        rows.append(("joints", list(joints), list(config.state_feature_names)))
    title = "the policy was trained on another robot"
    refuse_differences(title, rows, "this one has", "the policy", "name and order cameras and joints as in its data")


def main() -> None:
    # Says what to install where gRPC is missing; makes a directory `logs` where it runs.
    from lerobot.async_inference import policy_server

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
    policy_server.serve()


if __name__ == "__main__":
    run_command(main)
