"""Options of a rollout that are more than a number: the environment, and what is swept."""

from dataclasses import dataclass

from smolvla_shared import ranges

SWEPT = "n_action_steps", "flow_steps"


@dataclass(frozen=True)
class EnvironmentConfig:
    """Where a policy is rolled out."""

    # Environment: metaworld, pusht or aloha.
    type: str = "metaworld"
    # One or several tasks, such as plate-slide-v3. Default: reach-v3, PushT-v0 or AlohaInsertion-v0.
    task: tuple[str, ...] = ()
    # One or several of Meta-World's cameras, such as topview, as in the policy's data. Default: corner2.
    camera: tuple[str, ...] = ()
    # Meta-World's arm first takes up to so many steps in a random direction, and the episode begins there.
    start_steps: ranges.CountOrNone = 0

    def __post_init__(self):
        ranges.check(self, "--env.")


def sweep_values(text: str) -> tuple[str, list[int]]:
    """n_action_steps=1,5,10 -> its name and values."""
    name, _, values = text.partition("=")
    numbers = [int(value) if value.isdecimal() else 0 for value in values.split(",")]
    if name not in SWEPT or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(f"--sweep {text}: expected {' or '.join(SWEPT)}, then = and different whole numbers: 1,5,10")
    return name, numbers
