"""LeRobot's asynchronous policy server (lerobot.async_inference), which also serves the policies of this project.

python -m smolvla_shared.serve --host=127.0.0.1 --port=8080 --fps=30

The options are LeRobot's, and so is the client, on the robot's machine. LeRobot's own server takes a fixed list of
policy types. As there, whoever reaches the port can run code on the server: pass a --host that only robots reach.
"""

from smolvla_shared.command import run_command


def main() -> None:
    # Says what to install where gRPC is missing; makes a directory `logs` where it runs.
    from lerobot.async_inference import policy_server

    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy

    policy_server.SUPPORTED_POLICIES.append(HLRPSmolVLASharedPolicy.name)
    policy_server.serve()


if __name__ == "__main__":
    run_command(main)
