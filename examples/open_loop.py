"""How near a policy's actions are to recorded ones, on the recorded observations: no robot moves.

    python examples/open_loop.py --policy-path runs/s3/checkpoints/last/pretrained_model --roots data/held_out \
        --out runs/open_loop

The policy is loaded as a rollout loads it, and asked where a rollout would ask it: at the first frame of an episode,
and whenever it would have executed what it was asked for. `open_loop.json` and the printed table have the errors in the
robot's units, beside what two policies without a camera would have; `open_loop.png` shows both actions over time. Small
errors do not make a good policy: it never has to live with what it did. Large ones tell of cameras and units that are
mixed up before a robot moves. Take episodes that it was not trained on.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smolvla_shared import paths, ranges
from smolvla_shared.command import run_command

if TYPE_CHECKING:
    from smolvla_shared.data import RobotDataset
    from smolvla_shared.lerobot_config import HLRPSmolVLASharedConfig

PLOTTED = 3  # episodes


@dataclass(frozen=True, kw_only=True)
class OpenLoopConfig:
    """Compare a policy's actions with recorded ones."""

    # The policy: a pretrained_model directory of train_stage3.py, or a hub id.
    policy_path: paths.PolicyName
    # The robot to act as, by its name in the training data. Needed if the policy was trained on several.
    robot: str | None = None
    # Local directories of LeRobotDatasets (v3) with actions.
    roots: tuple[paths.Dataset, ...] = ()
    # Hub ids of such datasets.
    repo_ids: tuple[paths.HubDataset, ...] = ()
    # New directory for open_loop.json and open_loop.png.
    out: paths.Directory
    # Pairs of the recordings' camera key and the policy's, for cameras whose names differ.
    rename: dict[str, str] = field(default_factory=dict)
    # Episodes of each dataset, evenly among all. Default: all.
    episodes: ranges.Count | None = None
    # Actions executed of each chunk before the next one is predicted. Default: the value saved with the policy.
    n_action_steps: ranges.Few | None = None
    # Chunks that are predicted together.
    batch_size: ranges.Count = 32
    # Device that the policy runs on. Default: cuda if there is a GPU, else cpu.
    device: paths.Device | None = None

    def __post_init__(self):
        ranges.check(self, "--")
        if not self.roots and not self.repo_ids:
            raise ValueError("no recordings given: pass --roots (local directories) or --repo-ids (hub ids)")
        if self.out.exists():
            raise ValueError(f"--out {self.out} exists: name another directory")


def check_recordings(dataset: "RobotDataset", config: "HLRPSmolVLASharedConfig", rename: dict[str, str]) -> None:
    """Raise ValueError unless the policy could have been trained on these recordings."""
    from smolvla_shared.data import ACTION_KEY, STATE_KEY, vector_names
    from smolvla_shared.data_problems import refuse_cameras

    core = config.core
    found = [rename.get(camera, camera) for camera in dataset.camera_keys]
    if unknown := rename.keys() - set(dataset.camera_keys):
        raise ValueError(f"--rename {' '.join(sorted(unknown))}: {dataset.name} has the cameras {dataset.camera_keys}")
    if missing := [camera for camera in core.cameras if camera not in (*found, *config.optional_cameras)]:
        raise ValueError(
            f"the policy reads {', '.join(core.cameras)}; {dataset.name} has no {', '.join(missing)}, but "
            f"{', '.join(dataset.camera_keys)}: map them with --rename RECORDED_KEY POLICY_KEY"
        )
    if twice := {name for name in found if found.count(name) > 1 and name in core.cameras}:
        raise ValueError(f"--rename: {dataset.name} would have {', '.join(sorted(twice))} twice, as {found}")
    refuse_cameras([dataset], [own for own in dataset.camera_keys if rename.get(own, own) in core.cameras])
    learned = {
        ACTION_KEY: (core.action_dim, config.action_feature_names),
        STATE_KEY: (core.state_dim, config.state_feature_names),
    }
    for key, (width, names) in learned.items():
        if width and (own := dataset.vector_dim(key)) != width:
            raise ValueError(f"{key} has {own} dimensions in {dataset.name}, {width} in the policy: another robot's?")
        if width and names and (own := vector_names(dataset.features[key])) and [*own] != [*names]:
            raise ValueError(
                f"{key} is {', '.join(own)} in {dataset.name}, {', '.join(names)} in the policy: another robot's?"
            )
    if config.fps and abs(dataset.fps - config.fps) > 0.01 * config.fps:
        raise ValueError(
            f"the policy's actions follow each other at {config.fps:g} fps, those of {dataset.name} at "
            f"{dataset.fps:g}: take recordings of its rate"
        )


@dataclass
class Compared:
    """Chunks of a policy beside the actions that were recorded from the same frame on."""

    predicted: np.ndarray  # [N, T, A]
    recorded: np.ndarray  # [N, T, A]; past an episode's end NaN
    before: np.ndarray  # [N, A] the last action before, at an episode's start its first
    episode: np.ndarray  # [N], numbered over all datasets

    def errors(self, n_action_steps: int) -> dict[str, Any]:
        """Mean absolute errors of the executed actions, by dimension [A], of the policy and of two that see nothing;
        the share of the recorded variance that is predicted (R², None where nothing varies); and, by step of the chunk
        [T], the mean over dimensions of the squared error, in variances.
        """
        executed = self.recorded[:, :n_action_steps]
        mean, variance = np.nanmean(executed, (0, 1)), np.nanvar(executed, (0, 1))
        squared, varies = (self.predicted - self.recorded) ** 2, variance > 0
        share = np.nanmean(squared[:, :n_action_steps], (0, 1))[varies] / variance[varies]
        r2 = dict(zip(np.flatnonzero(varies).tolist(), (1 - share).tolist()))
        reached = np.isfinite(self.recorded).any((0, 2))  # steps of the chunk that are in an episode
        by_step = np.nanmean(squared[:, reached], 0)[:, varies] / variance[varies]

        def mae(guess: np.ndarray) -> list[float]:
            return np.nanmean(np.abs(guess - executed), (0, 1)).tolist()

        return {
            "mean_absolute_error": mae(self.predicted[:, :n_action_steps]),
            "of_the_mean_action": mae(mean),
            "of_holding_the_last_action": mae(self.before[:, None]),
            "r2": [r2.get(place) for place in range(len(variance))],
            "squared_error_by_step_of_chunk": by_step.mean(1).tolist() if varies.any() else [],
        }


def compare(
    config: OpenLoopConfig, policy_config: "HLRPSmolVLASharedConfig", datasets: "list[RobotDataset]"
) -> Compared:
    """The policy's chunks from every frame at which it would be asked."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils import constants as keys
    from tqdm import tqdm

    from smolvla_shared.data import ACTION_KEY, STATE_KEY
    from smolvla_shared.data_problems import evenly
    from smolvla_shared.flow import episode_noise
    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy

    policy = HLRPSmolVLASharedPolicy.from_pretrained(config.policy_path, config=policy_config)
    device = {"device_processor": {"device": policy_config.device}}
    preprocess, postprocess = make_pre_post_processors(
        policy_config, pretrained_path=config.policy_path, preprocessor_overrides=device
    )
    core, parts, count = policy_config.core, [], 0
    for dataset in datasets:
        actions = dataset.vector(ACTION_KEY).reshape(dataset.num_frames, -1)
        chosen = evenly(len(dataset.episode_to), config.episodes)
        asked = [
            (number, row)
            for number in chosen
            for row in range(dataset.episode_from[number], dataset.episode_to[number], policy_config.n_action_steps)
        ]
        for start in tqdm(range(0, len(asked), config.batch_size), desc=dataset.name, unit="batch"):
            numbers, rows = (np.array(of) for of in zip(*asked[start : start + config.batch_size]))
            first, end = dataset.episode_from[numbers], dataset.episode_to[numbers]
            seen = {
                name: dataset.read_frames(camera, rows.tolist())
                for camera in dataset.camera_keys
                if (name := config.rename.get(camera, camera)) in core.cameras
            }
            if core.state_dim:
                state = dataset.vector(STATE_KEY).reshape(dataset.num_frames, -1)[rows]
                seen[keys.OBS_STATE] = torch.from_numpy(state.astype(np.float32))
            noise = [
                episode_noise(int(n), int(step), (core.chunk_size, core.max_action_dim))
                for n, step in zip(numbers, rows - first)
            ]
            with torch.inference_mode():
                batch = preprocess(seen | {"task": [dataset.task(row) for row in rows.tolist()]})
                chunk = policy.predict_action_chunk(batch, torch.stack(noise).to(policy_config.device))
                predicted = postprocess(chunk).numpy()
            ahead = rows[:, None] + np.arange(core.chunk_size)
            recorded = actions[np.minimum(ahead, end[:, None] - 1)].astype(np.float64)
            recorded[ahead >= end[:, None]] = np.nan
            parts.append((predicted, recorded, actions[np.maximum(rows - 1, first)], count + numbers))
        count += len(dataset.episode_to)
    return Compared(*map(np.concatenate, zip(*parts)))


def table(names: list[str], errors: dict[str, Any]) -> str:
    """A line for each dimension of the action."""
    columns = ("mean_absolute_error", "of_the_mean_action", "of_holding_the_last_action", "r2")
    lines = [("action", "mean absolute error", "of the mean action", "of holding the last one", "R²")]
    for place, name in enumerate(names):
        values = [errors[column][place] for column in columns]
        lines.append((name, *("-" if value is None else f"{value:.3g}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def plot(compared: Compared, names: list[str], n_action_steps: int, path: Path) -> None:
    """A row for each dimension, a column for each of the first episodes; a dot where the policy was asked."""
    from matplotlib.figure import Figure

    shown = np.unique(compared.episode)[:PLOTTED]
    figure = Figure(figsize=(5 * len(shown), 1.8 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(shown), squeeze=False, sharex="col", sharey="row")
    for column, episode in enumerate(shown):
        chunks = np.flatnonzero(compared.episode == episode)
        both = [of[chunks, :n_action_steps] for of in (compared.recorded, compared.predicted)]
        recorded, predicted = (of.reshape(-1, len(names)) for of in both)
        length = np.isfinite(recorded[:, 0]).sum()
        for row, name in enumerate(names):
            axes[row, column].plot(recorded[:length, row], color="0.6", linewidth=3, label="recorded")
            axes[row, column].plot(predicted[:length, row], color="C0", linewidth=1, label="policy")
            asked = np.arange(0, length, n_action_steps)
            axes[row, column].plot(asked, predicted[asked, row], ".", color="C0")
            axes[row, 0].set_ylabel(name)
        axes[0, column].set_title(f"episode {episode}")
        axes[-1, column].set_xlabel("frame")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110, format="png")


def main(config: OpenLoopConfig) -> None:
    from smolvla_shared import data, data_values
    from smolvla_shared.config import DataConfig

    datasets = data.open_datasets(DataConfig(repo_ids=config.repo_ids, roots=config.roots))
    data_values.refuse_vectors(datasets, data.STATE_KEY, data.ACTION_KEY)

    from smolvla_shared.files import policy_sha256, replacing, write_text
    from smolvla_shared.lerobot_files import load_config, of_robot
    from smolvla_shared.run_processes import find_device

    config = replace(config, policy_path=str(of_robot(config.policy_path, config.robot)))
    policy_config = load_config(Path(config.policy_path))
    policy_config.device = find_device(config.device)
    if config.n_action_steps:
        policy_config = replace(policy_config, n_action_steps=config.n_action_steps)
    for dataset in datasets:
        check_recordings(dataset, policy_config, config.rename)
    steps = policy_config.n_action_steps
    compared = compare(config, policy_config, datasets)
    errors = compared.errors(steps)
    names = data.vector_names(datasets[0].features[data.ACTION_KEY])
    names = [*names] if names else [f"{place}" for place in range(policy_config.core.action_dim)]
    config.out.mkdir(parents=True)
    with replacing(config.out / "open_loop.png") as path:
        plot(compared, names, steps, path)
    number = len(np.unique(compared.episode))
    of = {"policy_sha256": policy_sha256(Path(config.policy_path)), "n_action_steps": steps, "episodes": number}
    of |= {"actions": names, "recordings": [dataset.name for dataset in datasets]}
    write_text(config.out / "open_loop.json", json.dumps(errors | of, indent=2) + "\n")
    print(f"{config.out}: {number} episodes, {steps} action(s) executed of each chunk\n{table(names, errors)}")


if __name__ == "__main__":
    run_command(main, OpenLoopConfig)
