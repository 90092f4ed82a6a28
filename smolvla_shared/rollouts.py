"""The loop of a rollout: episodes of a policy in vectorised environments.

An episode is a function of (policy, environment, seed) alone: the seed decides object positions and the policy's noise,
however many environments run side by side. No exception is caught: a crash stops the rollout.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from smolvla_shared import ranges
from smolvla_shared.flow import episode_noise
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy


@dataclass
class Episode:
    """The outcome of one episode."""

    task: str
    seed: ranges.Seed
    start: str  # hash of the initial state of the physics
    success: bool = False
    steps: ranges.CountOrNone = 0
    sum_reward: float = 0.0  # the return, under LeRobot's name
    # Seconds; of a step that several episodes take together, each counts an equal share.
    policy_s: ranges.NotNegative = 0.0
    environment_s: ranges.NotNegative = 0.0

    @property
    def outcome(self) -> str:
        return "success" if self.success else "failure"


def first_image(observation: dict[str, Any], index: int) -> np.ndarray:
    pixels = observation["pixels"]
    return (next(iter(pixels.values())) if isinstance(pixels, dict) else pixels)[index].copy()


def success_flags(info: dict[str, Any], num_envs: int) -> np.ndarray:
    """Success of each environment, [num_envs] bool. LeRobot reports it in info or, at an episode's end, final_info."""
    missing = np.zeros(num_envs)
    flags = [np.asarray(of.get("is_success", missing), bool) for of in (info, info.get("final_info", {}))]
    return flags[0] | flags[1]


def check_cameras(policy: HLRPSmolVLASharedPolicy, observation: dict[str, Any], rename: dict[str, str]) -> None:
    """Raise ValueError unless the environment shows the policy's cameras, except optional ones, and no others; and for
    a key to rename that the environment does not have.
    """
    if unknown := [key for key in rename if key not in observation]:
        raise ValueError(f"--rename {' '.join(unknown)}: not of the environment, which has {', '.join(observation)}")
    found = [rename.get(key, key) for key in observation if "image" in key]
    wanted = list(policy.config.core.cameras)
    if set(found) | set(policy.config.optional_cameras) != set(wanted):
        raise ValueError(
            f"the policy was trained on cameras {wanted}, the environment shows {found}: "
            "map them with --rename ENVIRONMENT_KEY POLICY_KEY"
        )


def begin(
    environments: gymnasium.vector.VectorEnv, task: str, seeds: Sequence[int]
) -> tuple[list[Episode], dict[str, Any]]:
    """Reset to the episodes of these seeds. Environments without a seed repeat the last episode, to be dropped."""
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    start = time.perf_counter()
    filled = [*seeds, *[seeds[-1]] * (environments.num_envs - len(seeds))]
    observation, info = environments.reset(seed=filled, options={NEW_ROLLOUT_OPTION: True})
    share = (time.perf_counter() - start) / len(seeds)
    starts = [str(state) for state in info["start"]]
    return [Episode(task, seed, state, environment_s=share) for seed, state in zip(seeds, starts)], observation


@torch.inference_mode()
def run_episodes(
    policy: HLRPSmolVLASharedPolicy,
    preprocess: Callable[[dict[str, Any]], dict[str, Any]],
    postprocess: Callable[[torch.Tensor], torch.Tensor],
    environments: gymnasium.vector.VectorEnv,
    task: str,
    text: str,
    seeds: Sequence[int],
    max_steps: int,
    rename: dict[str, str] | None = None,
) -> Iterator[tuple[Episode, list[np.ndarray]]]:
    """Run one episode per seed, as many at a time as there are environments.

    Yields each episode with its frames, [h, w, 3] uint8 of the first camera, from the start to after the last action.

    preprocess, postprocess: the policy's processors: observations in, actions in the environment's units out
    environments:            of environments.make_environments
    task, text:              the task's name, for the record, and the instruction, in words
    max_steps:               environment steps after which an episode counts as failed

    Raises ValueError if the environment's cameras are not the policy's.
    """
    from lerobot.envs.utils import preprocess_observation

    core, num_envs = policy.config.core, environments.num_envs
    space = environments.single_action_space
    num_run = num_successes = 0
    bar = tqdm(total=len(seeds), desc=task, unit="episode", dynamic_ncols=True)
    for first in range(0, len(seeds), num_envs):
        episodes, observation = begin(environments, task, seeds[first : first + num_envs])
        frames = [[first_image(observation, i)] for i in range(len(episodes))]
        noise_seeds = [episode.seed for episode in episodes] + [0] * (num_envs - len(episodes))
        policy.reset()
        running = np.arange(num_envs) < len(episodes)
        for step in range(max_steps):
            began = time.perf_counter()
            batch = preprocess_observation(observation) | {"task": [text] * num_envs}
            if first == step == 0:
                check_cameras(policy, batch, rename or {})
            noise = [episode_noise(seed, step, (core.chunk_size, core.max_action_dim)) for seed in noise_seeds]
            noise = torch.stack(noise).to(policy.config.device)
            actions = postprocess(policy.select_action(preprocess(batch), noise=noise)).numpy()
            acted = time.perf_counter()
            observation, rewards, terminated, truncated, info = environments.step(
                np.clip(actions, space.low, space.high)
            )
            stepped = time.perf_counter()
            success = success_flags(info, num_envs)
            for i in np.flatnonzero(running):
                episode = episodes[i]
                episode.steps, episode.sum_reward = step + 1, episode.sum_reward + float(rewards[i])
                episode.success = bool(success[i])
                episode.policy_s += (acted - began) / running.sum()
                episode.environment_s += (stepped - acted) / running.sum()
                frames[i].append(first_image(observation, i))
            running &= ~(success | terminated | truncated)
            if not running.any():
                break
        for episode, episode_frames in zip(episodes, frames):
            num_run, num_successes = num_run + 1, num_successes + episode.success
            bar.update()
            bar.set_postfix_str(f"success {num_successes}/{num_run}")
            yield episode, episode_frames
    bar.close()
