"""Options of a rollout that are more than a number, and what can be told of them before anything heavy is imported."""

from dataclasses import dataclass
from importlib.util import find_spec

from smolvla_shared import ranges

# Recordings use seeds from here on, rollouts use smaller ones: a policy is judged on object positions it has not seen.
FIRST_RECORDING_SEED = 1_000_000
METAWORLD_STEPS = 500  # after which Meta-World ends an episode
CAMERAS = (
    "corner2",
    "corner",
    "corner3",
    "topview",
    "behindGripper",
    "gripperPOV",
)  # Meta-World's; LeRobot's choice first
# The tasks of each type that was tested with our loop, the default first; those of Meta-World are LeRobot's.
TASKS = {
    "metaworld": ("reach-v3",),
    "pusht": ("PushT-v0",),
    "aloha": ("AlohaInsertion-v0", "AlohaTransferCube-v0"),
}
NEEDS = {  # the module of each type, and what to install for it
    "metaworld": ("metaworld", "pip install -r requirements.txt"),
    "pusht": ("gym_pusht", "pip install -r requirements.txt"),
    "aloha": ("gym_aloha", "pip install gym-aloha==0.1.5 dm_control==1.0.38 'mujoco<3.7'"),
}
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

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.task or TASKS.get(self.type, ())[:1]


def sweep_values(text: str) -> tuple[str, list[int]]:
    """n_action_steps=1,5,10 -> its name and values."""
    name, _, values = text.partition("=")
    numbers = [int(value) if value.isdecimal() else 0 for value in values.split(",")]
    if name not in SWEPT or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(f"--sweep {text}: expected {' or '.join(SWEPT)}, then = and different whole numbers: 1,5,10")
    return name, numbers


def check_environment(
    env_type: str, tasks: tuple[str, ...], max_steps: int, cameras: tuple[str, ...] = (), start_steps: int = 0
) -> None:
    """Raise ValueError for an unknown type or camera, what is not installed, and more steps than there are; for an
    unknown task, but of Meta-World, whose tasks are LeRobot's (environments.check_simulator).
    """
    if env_type not in TASKS:
        raise ValueError(f"--env.type {env_type} is not one of {', '.join(TASKS)}; lerobot-eval has more types")
    module, install = NEEDS[env_type]
    if find_spec(module) is None:
        raise ValueError(f"--env.type {env_type} needs the module {module}, which is not installed: {install}")
    unknown = [task for task in tasks if env_type != "metaworld" and task not in TASKS[env_type]]
    if unknown:
        raise ValueError(f"--env.task {' '.join(unknown)}: not of {env_type}, which has {', '.join(TASKS[env_type])}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--env.task {' '.join(tasks)} names a task twice")
    if cameras and (env_type != "metaworld" or not {*cameras} <= {*CAMERAS} or len({*cameras}) < len(cameras)):
        raise ValueError(
            f"--env.camera {' '.join(cameras)}: Meta-World alone has a choice, of {', '.join(CAMERAS)}, each once"
        )
    if start_steps < 0:
        raise ValueError(f"--env.start-steps {start_steps} must be at least 0")
    if start_steps and env_type != "metaworld":
        raise ValueError(f"--env.start-steps {start_steps}: Meta-World alone has starts of its own")
    if env_type == "metaworld" and max_steps + start_steps > METAWORLD_STEPS:
        asked = f"{max_steps} steps" + f" after {start_steps} of --env.start-steps" * (start_steps > 0)
        raise ValueError(f"{asked}: Meta-World ends every episode after {METAWORLD_STEPS}, ask for no more")


def check_seeds(seeds: range) -> None:
    """Raise ValueError for seeds that recordings use."""
    if seeds.stop > FIRST_RECORDING_SEED:
        raise ValueError(
            f"--seed {seeds.start} with {len(seeds)} episodes reaches the seeds of recordings ({FIRST_RECORDING_SEED} "
            "and up), whose object positions the policy may have been trained on: take a smaller one"
        )
