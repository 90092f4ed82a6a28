"""Record scripted-expert demonstrations in Meta-World as a LeRobotDataset (v3) with video.

    python examples/record_metaworld.py --kind video --root data/video --tasks window-open-v3 door-open-v3 --episodes 25
    python examples/record_metaworld.py --kind labelled --root data/labelled --tasks plate-slide-v3 --episodes 30

Recordings and rollouts use the same environment (smolvla_shared.environments.make_metaworld), but never the same seeds:
a policy is judged on object positions that were not recorded.
"""

import multiprocessing
import shutil
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES
from tqdm import tqdm

from smolvla_shared import ranges
from smolvla_shared.command import run_command
from smolvla_shared.data import ACTION_KEY, EXECUTED_ACTION_KEY
from smolvla_shared.environments import make_metaworld, metaworld_tasks, render_headless
from smolvla_shared.rollout_options import CAMERAS, FIRST_RECORDING_SEED, METAWORLD_STEPS

SEEDS_PER_RECORDING = 10_000_000
FPS = 80  # Meta-World's control rate
MAX_STEPS = 150
ATTEMPTS = 20  # tries, each with a seed of its own, to get a successful demonstration


@dataclass(frozen=True)
class RecordConfig:
    """Record demonstrations of one or several tasks."""

    # `labelled`: image, state, action and executed action, successful episodes only. `video`: image and state, no
    # action column.
    kind: Literal["video", "labelled"]
    # Directory of the new dataset.
    root: Path
    # Meta-World tasks, such as plate-slide-v3.
    tasks: tuple[str, ...]
    # Episodes of each task.
    episodes: int
    # Seed of object positions and disturbances.
    seed: int = 0
    # Side of the recorded image, pixels.
    image_size: int = 96
    # Meta-World's cameras: corner2, corner, corner3, topview, behindGripper or gripperPOV. One is recorded as
    # observation.image, several as observation.images.<camera>. Roll out with those that the policy sees.
    camera: tuple[str, ...] = ("corner2",)
    # Standard deviation of the disturbances that are added to the expert's action (of [-1, 1]) for half of the time.
    # The recorded `action` is the expert's, so a policy learns to recover (DART, arXiv 1703.09327). The column
    # `executed_action` holds what the arm was told to do, and so what the video shows.
    noise: float = 0.3
    # The arm first takes up to so many steps in a random direction, and the episode begins there: other people's video
    # does not start where the demonstrations do (rollout.py --env.start-steps).
    start_steps: Annotated[int, ranges.Range(ge=0, le=METAWORLD_STEPS - MAX_STEPS)] = 0
    # Processes that simulate and render.
    num_workers: int = 2

    def __post_init__(self):
        ranges.check(self, "--")


@dataclass(frozen=True)
class Job:
    task: str
    seed: int  # the first of ATTEMPTS seeds
    image_size: int
    camera: tuple[str, ...]
    noise: float
    start_steps: int
    must_succeed: bool


@lru_cache(maxsize=1)
def environment(task: str, image_size: int, cameras: tuple[str, ...], start_steps: int) -> gymnasium.Env:
    """The process's environment, kept while the task is the same: building one takes longer than an episode.

    Only one at a time: gymnasium's renderer draws into the context that was created last, even another environment's.
    """
    warnings.filterwarnings("ignore", category=UserWarning)  # Meta-World's experts warn at every start
    return make_metaworld(task, image_size, cameras, start_steps)


def image_keys(cameras: tuple[str, ...]) -> list[str]:
    """The dataset's names of what these cameras show, as a rollout calls it."""
    return [f"{OBS_IMAGES}.{camera}" for camera in cameras] if len(cameras) > 1 else [OBS_IMAGE]


def several(pixels: np.ndarray | dict[str, np.ndarray]) -> list[np.ndarray]:
    return [*pixels.values()] if isinstance(pixels, dict) else [pixels]


def attempt(job: Job, seed: int) -> tuple[list[dict[str, Any]], bool]:
    """One episode of the disturbed expert: the dataset's rows, and whether the episode succeeded."""
    env = environment(job.task, job.image_size, job.camera, job.start_steps)
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    expert, text = env.unwrapped.expert_policy, env.unwrapped.task_description
    frames, disturbance = [], np.zeros(4)
    for step in range(MAX_STEPS):
        if step % 10 == 0:  # a disturbance lasts for 10 steps
            disturbance = rng.normal(0, job.noise, 4) * rng.integers(2)
        full_state = env.unwrapped._env.unwrapped._get_obs()  # the expert also sees where the objects are
        action = np.clip(expert.get_action(full_state), -1, 1).astype(np.float32)
        executed = np.clip(action + disturbance, -1, 1).astype(np.float32)
        frames.append(
            {
                "observation.state": observation["agent_pos"].astype(np.float32),
                ACTION_KEY: action,
                EXECUTED_ACTION_KEY: executed,
                "task": text,
            }
            | dict(zip(image_keys(job.camera), several(observation["pixels"]), strict=True))
        )
        observation, _, terminated, _, info = env.step(executed)
        if terminated:
            return frames, info["is_success"]
    return frames, False


def demonstrate(job: Job) -> list[dict[str, Any]]:
    """The rows of the first episode or, if it must succeed, of the first successful one."""
    for seed in range(job.seed, job.seed + ATTEMPTS):
        frames, success = attempt(job, seed)
        if success or not job.must_succeed:
            return frames
    raise RuntimeError(f"the expert failed {job.task} {ATTEMPTS} times in a row from seed {job.seed}: lower --noise")


def features(config: RecordConfig) -> dict[str, dict[str, Any]]:
    size, names = config.image_size, ["x", "y", "z", "gripper"]
    image = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    result = {key: image for key in image_keys(config.camera)}
    result |= {"observation.state": {"dtype": "float32", "shape": (4,), "names": names}}
    actions = (ACTION_KEY, EXECUTED_ACTION_KEY) if config.kind == "labelled" else ()
    return result | {key: {"dtype": "float32", "shape": (4,), "names": names} for key in actions}


def main(config: RecordConfig) -> None:
    if config.root.exists():
        raise ValueError(f"--root {config.root} exists: remove it or name another directory")
    if unknown := [task for task in config.tasks if task not in metaworld_tasks()]:
        raise ValueError(f"--tasks {unknown} are no tasks of Meta-World; it has {', '.join(metaworld_tasks())}")
    if not {*config.camera} <= {*CAMERAS} or len({*config.camera}) < len(config.camera):
        raise ValueError(
            f"--camera {' '.join(config.camera)}: name Meta-World's, each once; it has {', '.join(CAMERAS)}"
        )
    import av
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # the encoder's notes would break the progress bar
    datasets.disable_progress_bars()
    # Each (kind, --seed) has its own range of seeds, and each episode in it has ATTEMPTS of its own.
    start = FIRST_RECORDING_SEED + SEEDS_PER_RECORDING * (2 * config.seed + (config.kind == "video"))
    options = {name: getattr(config, name) for name in ("image_size", "camera", "noise", "start_steps")}
    options["must_succeed"] = config.kind == "labelled"
    tasks = [task for task in config.tasks for _ in range(config.episodes)]
    jobs = [Job(task, start + ATTEMPTS * index, **options) for index, task in enumerate(tasks)]
    columns = features(config)
    temporary = config.root.with_name(f".{config.root.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    dataset = LeRobotDataset.create(
        repo_id=f"metaworld/{config.root.name}",
        fps=FPS,
        features=columns,
        root=temporary,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=20),
    )
    num_frames = 0
    # A rendering context does not survive a fork; imports do.
    multiprocessing.set_forkserver_preload(["smolvla_shared.environments", "lerobot.envs.metaworld"])
    with multiprocessing.get_context("forkserver").Pool(config.num_workers) as pool:
        for frames in tqdm(pool.imap(demonstrate, jobs), total=len(jobs), desc=f"record {config.kind}", unit="episode"):
            for frame in frames:
                dataset.add_frame({key: value for key, value in frame.items() if key in columns or key == "task"})
            dataset.save_episode()
            num_frames += len(frames)
    dataset.finalize()
    temporary.rename(config.root)
    print(
        f"{config.root}: {len(jobs)} episodes of {len(config.tasks)} task(s), {num_frames} frames at {FPS} fps, "
        + ("with actions" if config.kind == "labelled" else "no actions")
    )


if __name__ == "__main__":
    render_headless()  # before any process imports mujoco
    run_command(main, RecordConfig)
