"""Simulated environments: Meta-World without shadows, PushT and Aloha, each with a hash of where an episode begins.

Importing this module registers `metaworld_plain`, so that `lerobot-eval --env.type=metaworld_plain` shows a policy what
rollout.py and examples/record_metaworld.py show it. An environment is fixed by (type, task, image size, maximal steps,
cameras, start steps).
"""

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE

from smolvla_shared.rollout_options import CAMERAS, METAWORLD_STEPS, check_environment

# Of MuJoCo, and what each needs.
RENDERERS = {
    "glfw": "a display",
    "egl": "a GPU's driver, or apt-get install libegl1",
    "osmesa": "apt-get install libosmesa6",
}


def render_headless() -> None:
    """Choose a renderer that needs no display, unless MUJOCO_GL names one. Call it before mujoco is imported."""
    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl" if Path("/dev/nvidia0").exists() else "osmesa"


def check_renderer() -> None:
    """Raise ValueError if MUJOCO_GL names no renderer, or one that lacks its library."""
    render_headless()
    name = os.environ.get("MUJOCO_GL", "glfw")
    if name not in RENDERERS:
        said = ", ".join(f"{renderer} ({needs})" for renderer, needs in RENDERERS.items())
        raise ValueError(f"MUJOCO_GL is {name!r} in the environment: unset it, or set it to one of {said}")
    try:
        import mujoco  # noqa: F401  loads the library
    except (AttributeError, ImportError, OSError) as error:  # PyOpenGL's None has no functions
        raise ValueError(
            f"MUJOCO_GL={name} cannot draw, a library is missing ({error}): it needs {RENDERERS[name]}; or set "
            "MUJOCO_GL to another renderer"
        ) from error


def metaworld_tasks() -> list[str]:
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    return sorted(TASK_DESCRIPTIONS)


def task_text(env_type: str, task: str) -> str:
    """The task in words, as in recordings; "" for PushT and Aloha."""
    if env_type != "metaworld":
        return ""
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    return TASK_DESCRIPTIONS[task]


def check_simulator(env_type: str, tasks: tuple[str, ...]) -> None:
    """Raise ValueError for what is no task of Meta-World, and for a renderer that is none or not installed;
    rollout_options.check_environment checks everything else.
    """
    if env_type != "pusht":
        check_renderer()
    if env_type == "metaworld" and (unknown := [task for task in tasks if task not in metaworld_tasks()]):
        raise ValueError(f"--env.task {' '.join(unknown)}: not of {env_type}, which has {', '.join(metaworld_tasks())}")


# --- one environment --------------------------------------------------------------------------------------------------


class RandomStart(gymnasium.Wrapper):
    """Episodes begin where up to `steps` steps in one random direction took the arm, by the seed of the reset."""

    def __init__(self, env: gymnasium.Env, steps: int):
        super().__init__(env)
        self.steps = steps

    def reset(self, *, seed: int | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, **options)
        rng = np.random.default_rng(seed)
        motion = rng.uniform(-1, 1, self.action_space.shape).astype(np.float32)
        for _ in range(rng.integers(self.steps + 1)):
            observation, _, terminated, *_ = self.env.step(motion)
            if terminated:  # the motion solved the task: this episode begins at rest
                return self.env.reset(seed=seed, **options)
        return observation, info


class SeveralCameras(gymnasium.ObservationWrapper):
    """Meta-World as several cameras show it: pixels are {camera: [h, w, 3]}. LeRobot renders the first."""

    def __init__(self, env: gymnasium.Env, cameras: tuple[str, ...]):
        super().__init__(env)
        self.cameras, model = cameras, env.unwrapped._env.model
        self.ids = [model.camera(camera).id for camera in cameras]
        model.cam_pos[model.camera("corner2").id] = 0.75, 0.075, 0.7  # where LeRobot puts it
        spaces = env.observation_space.spaces
        pixels = gymnasium.spaces.Dict({camera: spaces["pixels"] for camera in cameras})
        self.observation_space = gymnasium.spaces.Dict(spaces | {"pixels": pixels})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        images, sim = [observation["pixels"]], self.unwrapped._env
        for camera, number in zip(self.cameras[1:], self.ids[1:]):
            sim.mujoco_renderer.camera_id = number
            image = sim.render()
            images.append((np.flip(image, (0, 1)) if camera == "corner2" else image).copy())  # as LeRobot turns it
        sim.mujoco_renderer.camera_id = self.ids[0]
        return observation | {"pixels": dict(zip(self.cameras, images, strict=True))}


def make_metaworld(task: str, image_size: int, cameras: tuple[str, ...] = (), start_steps: int = 0) -> gymnasium.Env:
    """LeRobot's Meta-World environment, rendered at `image_size` without shadows and reflections (slow on a CPU).

    LeRobot's commands always render 480 x 480 of corner2, the default. Recordings and rollouts both build their
    environments here, so that a policy sees the images that it was trained on. One camera's image is
    `observation.image`, those of several are `observation.images.<camera>`. start_steps: of RandomStart.
    """
    from lerobot.envs.metaworld import MetaworldEnv

    size = {"observation_width": image_size, "observation_height": image_size}
    env = MetaworldEnv(task, camera_name=(cameras or CAMERAS)[0], obs_type="pixels_agent_pos", **size)
    env._ensure_env()  # builds the physics; the renderer reads the settings below at the first frame
    model, renderer = env._env.model, env._env.mujoco_renderer
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 4
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    renderer.width = renderer.height = image_size
    env = RandomStart(env, start_steps) if start_steps else env
    return SeveralCameras(env, cameras) if len(cameras) > 1 else env


def metaworld_physics(env: gymnasium.Env) -> list[Any]:
    """Meta-World places objects by joints, by bodies of the model, or by both; goals may be nothing but numbers."""
    sim = env.unwrapped._env.unwrapped
    model, data = sim.model, sim.data
    placed = [model.body_pos, model.body_quat, model.site_pos, sim._target_pos]
    return [data.qpos, data.qvel, data.mocap_pos, data.mocap_quat, *placed]


def pusht_physics(env: gymnasium.Env) -> list[Any]:
    bodies = env.unwrapped.agent, env.unwrapped.block
    moving = [[*body.position, body.angle, *body.velocity, body.angular_velocity] for body in bodies]
    return [*moving, env.unwrapped.goal_pose]


def aloha_physics(env: gymnasium.Env) -> list[Any]:
    physics = env.unwrapped._env.physics
    return [physics.get_state(), physics.data.mocap_pos, physics.data.mocap_quat]


PHYSICS: dict[str, Callable[[gymnasium.Env], list[Any]]] = {
    "metaworld": metaworld_physics,
    "pusht": pusht_physics,
    "aloha": aloha_physics,
}


class Checked(gymnasium.Wrapper):
    """Says at reset where the episode begins, and stops where MuJoCo would begin the episode anew without a word."""

    def __init__(self, env: gymnasium.Env, env_type: str):
        super().__init__(env)
        self.env_type = env_type

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """info["start"]: sha256 of the state of the physics; pictures do not count.

        Values are rounded to 1e-6, so that the last bits of another processor do not make another start.
        """
        observation, info = self.env.reset(**options)
        state = np.concatenate([np.ravel(part) for part in PHYSICS[self.env_type](self.env)])
        state = np.round(state.astype(np.float64), 6) + 0.0  # no -0.0
        return observation, info | {"start": hashlib.sha256(state.tobytes()).hexdigest()}

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        outcome = self.env.step(action)
        if self.env_type == "metaworld":  # dm_control raises by itself
            from mujoco import mjtWarning

            warnings = self.env.unwrapped._env.unwrapped.data.warning
            kinds = mjtWarning.mjWARN_BADQPOS, mjtWarning.mjWARN_BADQVEL, mjtWarning.mjWARN_BADQACC
            if any(warnings[kind].number for kind in kinds):
                raise RuntimeError(f"the simulation became unstable at action {action}, and MuJoCo reset it")
        return outcome


def make_environment(
    env_type: str, task: str, image_size: int, max_steps: int, cameras: tuple[str, ...] = (), start_steps: int = 0
) -> gymnasium.Env:
    """image_size, cameras and start_steps are Meta-World's alone; PushT shows 96 x 96 pixels, Aloha 480 x 640."""
    from lerobot.envs.utils import FreezeAfterEpisodeEnd

    if env_type == "metaworld":
        env = make_metaworld(task, image_size, cameras, start_steps)
        env.unwrapped._max_episode_steps = max_steps  # LeRobot's loop asks for it
    else:
        config = EnvConfig.get_choice_class(env_type)(task=task, episode_length=max_steps)
        __import__(config.package_name)  # registers the environment, also in a worker process
        env = gymnasium.make(config.gym_id, disable_env_checker=config.disable_env_checker, **config.gym_kwargs)
    # An environment whose episode is over costs nothing while others go on.
    return FreezeAfterEpisodeEnd(Checked(env, env_type))


# --- several ----------------------------------------------------------------------------------------------------------


def make_environments(
    env_type: str,
    task: str,
    image_size: int,
    max_steps: int,
    num_envs: int,
    cameras: tuple[str, ...] = (),
    start_steps: int = 0,
) -> gymnasium.vector.VectorEnv:
    """Vectorised environments: one in this process, or each in a process of its own.

    gymnasium's renderer draws into the context that was created last, even another environment's, so that two of
    Meta-World do not share a process.
    """
    factories = [partial(make_environment, env_type, task, image_size, max_steps, cameras, start_steps)] * num_envs
    if num_envs == 1:
        return gymnasium.vector.SyncVectorEnv(factories)
    preload_workers()
    return gymnasium.vector.AsyncVectorEnv(factories, context="forkserver")


def compare_rates(env_type: str, fps: float | None) -> str:
    """A line on the rate of an environment and that of a policy's training data; "" where they agree.

    It is not refused: an environment's rate is what LeRobot's config of it says, for videos, too.
    """
    own = EnvConfig.get_choice_class(env_type)().fps
    if fps is None:
        return "the policy does not record the rate of its training data, so it was not compared with the environment's"
    if abs(fps - own) <= 0.1 * own:
        return ""
    return (
        f"WARNING: the policy was trained on {fps:g} actions a second, {env_type} takes {own:g}: every motion is "
        f"{own / fps:.3g} times as fast as in the demonstrations"
    )


def preload_workers() -> None:
    """A rendering context does not survive a fork; imports do."""
    multiprocessing.set_forkserver_preload([__name__, "lerobot.envs.metaworld"])


@EnvConfig.register_subclass("metaworld_plain")
@dataclass
class MetaworldPlainConfig(EnvConfig):
    """Our Meta-World environment for LeRobot's commands."""

    task: str = "reach-v3"  # or several, with commas
    fps: int = 80
    episode_length: int = METAWORLD_STEPS
    # Side of the images that the policy was trained on, pixels.
    image_size: int | None = None
    # Meta-World's camera that the policy was trained on, or several, with commas. Default: corner2.
    camera: str | None = None
    # As rollout.py --env.start-steps.
    start_steps: int = 0

    def __post_init__(self):
        side = self.image_size or 0
        several = self.cameras if len(self.cameras) > 1 else ()
        images = {f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in several} or {"pixels": OBS_IMAGE}
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
        } | {name: PolicyFeature(FeatureType.VISUAL, (side, side, 3)) for name in images}
        self.features_map = {"action": ACTION, "agent_pos": OBS_STATE} | images

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.camera.split(",")) if self.camera else ()

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """{task: {0: environments}}. Two or more of a task run in a process each, whatever use_async_envs says."""
        from lerobot.envs.utils import _LazyAsyncVectorEnv

        if self.image_size is None:
            raise ValueError(
                "--env.image_size is missing: the side, in pixels, of the images that the policy was trained on, as in "
                "its config.json under input_features"
            )
        render_headless()
        tasks = tuple(self.task.split(","))
        check_environment("metaworld", tasks, self.episode_length, self.cameras, self.start_steps)
        check_simulator("metaworld", tasks)
        options = {"image_size": self.image_size, "max_steps": self.episode_length}
        options |= {"cameras": self.cameras, "start_steps": self.start_steps}
        if n_envs == 1:
            return {task: {0: make_environments("metaworld", task, **options, num_envs=1)} for task in tasks}
        preload_workers()
        return {  # the processes of a task start when its turn comes
            task: {0: _LazyAsyncVectorEnv([partial(make_environment, "metaworld", task, **options)] * n_envs)}
            for task in tasks
        }
