"""Rollouts in vectorised environments: statistics, videos, a contact sheet.

An episode is a function of (policy, environment, seed) alone: the seed decides object positions and the policy's noise,
however many environments run side by side. No exception is caught: a crash stops the rollout.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy

SUCCESS_COLOR, FAILURE_COLOR = (40, 160, 60), (200, 50, 40)
SHEET_COLUMNS = 8  # frames of an episode in the contact sheet
ENVIRONMENTS = ("metaworld", "pusht")  # the types that were tested with this loop
# Recordings use seeds from here on, rollouts use smaller ones: a policy is judged on object positions it has not seen.
FIRST_RECORDING_SEED = 1_000_000


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (JASA 1927); z = 1.96 gives 95%.

    Unlike the normal approximation it holds near 0 and 1 and for few trials.
    """
    rate = successes / trials
    center = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def render_headless() -> None:
    """Choose a renderer that needs no display, unless MUJOCO_GL names one. Call it before mujoco is imported."""
    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl" if Path("/dev/nvidia0").exists() else "osmesa"


def make_metaworld(task: str, image_size: int) -> gymnasium.Env:
    """LeRobot's Meta-World environment, rendered at `image_size` without shadows and reflections (slow on a CPU).

    LeRobot always renders 480 x 480. Recordings and rollouts both build their environments here, so that a policy sees
    the images that it was trained on.
    """
    from lerobot.envs.metaworld import MetaworldEnv

    env = MetaworldEnv(task, obs_type="pixels_agent_pos", observation_width=image_size, observation_height=image_size)
    env._ensure_env()  # builds the physics; the renderer reads the settings below at the first frame
    model, renderer = env._env.model, env._env.mujoco_renderer
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 4
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    renderer.width = renderer.height = image_size
    return env


def metaworld_tasks() -> list[str]:
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    return sorted(TASK_DESCRIPTIONS)


def task_text(env_type: str, task: str) -> str:
    """The task in words, as in recordings; "" for PushT."""
    if env_type != "metaworld":
        return ""
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    return TASK_DESCRIPTIONS[task]


def check_environment(env_type: str, task: str, seeds: range) -> None:
    """Raise ValueError for an unknown type or task, and for seeds that recordings use."""
    if env_type not in ENVIRONMENTS:
        raise ValueError(f"--env.type {env_type} is not one of {', '.join(ENVIRONMENTS)}; lerobot-eval has more types")
    if env_type == "metaworld" and task not in metaworld_tasks():
        raise ValueError(f"--env.task {task} is no task of Meta-World; it has {', '.join(metaworld_tasks())}")
    if seeds.stop > FIRST_RECORDING_SEED:
        raise ValueError(
            f"--seed {seeds.start} with {len(seeds)} episodes reaches the seeds of recordings ({FIRST_RECORDING_SEED} "
            "and up), whose object positions the policy may have been trained on: take a smaller one"
        )


def make_environments(env_type: str, task: str, image_size: int, num_envs: int) -> gymnasium.vector.VectorEnv:
    """Vectorised environments. Two or more of Meta-World run in a process each."""
    from lerobot.envs.configs import EnvConfig
    from lerobot.envs.factory import make_env

    if env_type == "pusht":
        # In one process: LeRobot's worker processes do not import gym_pusht.
        return make_env(EnvConfig.get_choice_class(env_type)(), n_envs=num_envs, use_async_envs=False)[env_type][0]
    factories = [partial(make_metaworld, task, image_size)] * num_envs
    if num_envs == 1:
        return gymnasium.vector.SyncVectorEnv(factories)
    # A rendering context does not survive a fork; imports do.
    multiprocessing.set_forkserver_preload([__name__, "lerobot.envs.metaworld"])
    return gymnasium.vector.AsyncVectorEnv(factories, context="forkserver")


@dataclass
class Episode:
    """The outcome of one episode."""

    seed: int
    success: bool = False
    steps: int = 0
    reward: float = 0.0  # sum over the steps

    @property
    def outcome(self) -> str:
        return "success" if self.success else "failure"


def episode_noise(seed: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that an action chunk is generated from at this step of the episode."""
    return torch.from_numpy(np.random.default_rng([seed, step]).standard_normal(shape, dtype=np.float32))


def first_image(observation: dict[str, Any], index: int) -> np.ndarray:
    pixels = observation["pixels"]
    return (next(iter(pixels.values())) if isinstance(pixels, dict) else pixels)[index].copy()


def success_flags(info: dict[str, Any], num_envs: int) -> np.ndarray:
    """Success of each environment, [num_envs] bool. LeRobot reports it in info or, at an episode's end, final_info."""
    missing = np.zeros(num_envs)
    flags = [np.asarray(of.get("is_success", missing), bool) for of in (info, info.get("final_info", {}))]
    return flags[0] | flags[1]


def check_cameras(policy: HLRPSmolVLASharedPolicy, observation: dict[str, Any], rename: dict[str, str]) -> None:
    """Raise ValueError unless the environment shows the policy's cameras, except optional ones, and no others."""
    found = [rename.get(key, key) for key in observation if "image" in key]
    wanted = list(policy.config.core.cameras)
    if set(found) | set(policy.config.optional_cameras) != set(wanted):
        raise ValueError(
            f"the policy was trained on cameras {wanted}, the environment shows {found}: "
            "map them with --rename ENVIRONMENT_KEY POLICY_KEY"
        )


@torch.no_grad()
def run_episodes(
    policy: HLRPSmolVLASharedPolicy,
    preprocess: Callable[[dict[str, Any]], dict[str, Any]],
    postprocess: Callable[[torch.Tensor], torch.Tensor],
    environments: gymnasium.vector.VectorEnv,
    task: str,
    seeds: range,
    max_steps: int,
    rename: dict[str, str] | None = None,
) -> Iterator[tuple[Episode, list[np.ndarray]]]:
    """Run one episode per seed, as many at a time as there are environments.

    Yields each episode with its frames, [h, w, 3] uint8 of the first camera, from the start to after the last action.

    preprocess, postprocess: the policy's processors: observations in, actions in the environment's units out
    task:                    the instruction, in words
    max_steps:               environment steps after which an episode counts as failed

    Raises ValueError if the environment's cameras are not the policy's.
    """
    from lerobot.envs.utils import preprocess_observation

    core = policy.config.core
    num_envs = environments.num_envs
    num_run = num_successes = 0
    bar = tqdm(total=len(seeds), desc="rollout", unit="episode", dynamic_ncols=True)
    for first in range(0, len(seeds), num_envs):
        # The last round may have more environments than seeds; the extra episodes are dropped.
        round_episodes = [Episode(seeds.start + first + i) for i in range(num_envs)]
        observation, _ = environments.reset(seed=[episode.seed for episode in round_episodes])
        frames = [[first_image(observation, i)] for i in range(num_envs)]
        policy.reset()
        running = np.array([first + i < len(seeds) for i in range(num_envs)])
        for step in range(max_steps):
            batch = preprocess_observation(observation) | {"task": [task] * num_envs}
            if first == step == 0:
                check_cameras(policy, batch, rename or {})
            noise = [episode_noise(e.seed, step, (core.chunk_size, core.max_action_dim)) for e in round_episodes]
            noise = torch.stack(noise).to(policy.config.device)
            actions = postprocess(policy.select_action(preprocess(batch), noise=noise)).numpy()
            space = environments.single_action_space
            actions = np.clip(actions, space.low, space.high)
            observation, rewards, terminated, truncated, info = environments.step(actions)
            success = success_flags(info, num_envs)
            for i in np.flatnonzero(running):
                episode = round_episodes[i]
                episode.steps, episode.reward = step + 1, episode.reward + float(rewards[i])
                episode.success = bool(success[i])
                frames[i].append(first_image(observation, i))
            running &= ~(success | terminated | truncated)
            if not running.any():
                break
        for episode, episode_frames in list(zip(round_episodes, frames, strict=True))[: len(seeds) - first]:
            num_run, num_successes = num_run + 1, num_successes + episode.success
            bar.update()
            bar.set_postfix_str(f"success {num_successes}/{num_run}")
            yield episode, episode_frames
    bar.close()


def film_strip(episode: Episode, frames: list[np.ndarray], tile: int = 96) -> Image.Image:
    """A row of the contact sheet, time from left to right. Colour and text show success or failure."""
    border, label = 3, 110
    color = SUCCESS_COLOR if episode.success else FAILURE_COLOR
    strip = Image.new("RGB", (label + SHEET_COLUMNS * (tile + 2 * border), tile + 2 * border), "white")
    draw = ImageDraw.Draw(strip)
    text = f"seed {episode.seed}\n{episode.outcome}\n{episode.steps} steps"
    draw.text((6, tile // 2 - 12), text, fill=color)
    draw.rectangle((label, 0, strip.width, strip.height), fill=color)
    for column, index in enumerate(np.linspace(0, len(frames) - 1, SHEET_COLUMNS).round().astype(int)):
        image = Image.fromarray(frames[index]).resize((tile, tile))
        strip.paste(image, (label + column * (tile + 2 * border) + border, border))
    return strip


def write_results(
    episodes: Iterable[tuple[Episode, list[np.ndarray]]],
    directory: Path,
    fps: int,
    with_videos: bool,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write results.json, contact_sheet.png and, if asked, a video per episode, named by seed and outcome.

    An episode's frames are dropped once they are written. Returns the contents of results.json.
    """
    from lerobot.utils.io_utils import write_video

    directory.mkdir(parents=True)
    rows, strips = [], []
    for episode, frames in episodes:
        rows.append(episode)
        strips.append(film_strip(episode, frames))
        if with_videos:
            # Small frames are enlarged without smoothing: the video shows what the policy saw.
            scale = max(1, 288 // frames[0].shape[0])
            large = [frame.repeat(scale, axis=0).repeat(scale, axis=1) for frame in frames]
            write_video(directory / f"episode_{episode.seed:05d}_{episode.outcome}.mp4", large, fps)
    successes = sum(episode.success for episode in rows)
    results = {
        "success_rate": successes / len(rows),
        "successes": successes,
        "episodes": len(rows),
        "wilson_95": wilson_interval(successes, len(rows)),
        **provenance,
        "per_episode": [asdict(episode) for episode in rows],
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
    for row, strip in enumerate(strips):
        sheet.paste(strip, (0, row * strip.height))
    sheet.save(directory / "contact_sheet.png")
    return results
