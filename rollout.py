"""Roll out a trained policy in an environment and measure its success rate.

python rollout.py --policy-path runs/s3/checkpoints/last/pretrained_model --env.type metaworld --env.task reach-v3
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smolvla_shared import paths, ranges
from smolvla_shared.command import run_command
from smolvla_shared.rollout_options import (
    CAMERAS,
    SWEPT,
    EnvironmentConfig,
    check_environment,
    check_seeds,
    sweep_values,
)

if TYPE_CHECKING:
    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedConfig


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Success rates with their 95% Wilson intervals, a contact sheet, and (by option) videos."""

    # The policy: a pretrained_model directory of train_stage3.py, or a hub id. The hub's needs --out.
    policy_path: paths.PolicyName
    # The robot to act with, by its name in the training data. Needed if the policy was trained on several.
    robot: str | None = None
    # New directory for results.json, contact_sheet.png and videos. Default: beside the policy's directory.
    out: paths.Directory | None = None
    # The environment.
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    # Episodes to run of each task; with 50 the 95% interval is at most 27 points wide.
    episodes: ranges.Count = 50
    # Environments that run side by side, in a process each; the results do not depend on it.
    num_envs: ranges.Processes = 2
    # Seed of the first episode; episode i uses seed + i for object positions and the policy's noise.
    seed: ranges.Seed = 0
    # Environment steps after which an episode counts as failed.
    max_steps: ranges.Count = 500
    # Actions executed of each chunk before the next chunk is predicted. Default: the value saved with the policy.
    n_action_steps: ranges.Few | None = None
    # Euler steps that generate a chunk. Default: the value saved with the policy.
    flow_steps: ranges.Few | None = None
    # Roll out once for each value of one of the two: n_action_steps=1,5,10 or flow_steps=1,2,5,10.
    sweep: str | None = None
    # results.json of another rollout, to compare with on equal initial states.
    compare: paths.File | None = None
    # Pairs of environment key and policy key, for observations whose names differ.
    rename: dict[str, str] = field(default_factory=dict)
    # Which episodes to write a video of.
    videos: Literal["all", "failures", "none"] = "none"
    # Go on with the rollout in --out. --episodes may have grown; --num-envs, --videos and --device may differ.
    resume: bool = False
    # Compile the policy's sampler, at its start and for each further number of environments: minutes. Actions change by
    # rounding.
    compile: bool = False
    # Device that the policy runs on. Default: cuda if there is a GPU, else cpu.
    device: paths.Device | None = None

    def __post_init__(self):
        ranges.check(self, "--")
        env = self.env
        check_environment(env.type, env.tasks, self.max_steps, env.camera, env.start_steps)
        check_seeds(self.seeds)
        swept = sweep_values(self.sweep)[0] if self.sweep else None
        if swept and (value := getattr(self, swept)) is not None:
            raise ValueError(f"--sweep {self.sweep} and --{swept.replace('_', '-')} {value}: give one of the two")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


def check_options(config: RolloutConfig) -> Path:
    """The directory to write. Raises ValueError for what can be told before anything is loaded."""
    more = f"_and_{len(config.env.task) - 1}_more" if len(config.env.task) > 1 else ""
    name = f"rollout_{config.env.task[0] if config.env.task else config.env.type}{more}_seed{config.seed}"
    name += f"_{config.robot}" if config.robot else ""
    out = config.out or Path(config.policy_path).parent / name
    if out.exists() and not config.resume:
        raise ValueError(f"--out {out} exists: pass --resume to go on with it, or another directory")
    if config.resume and not out.exists():
        raise ValueError(f"--resume: there is no rollout at {out}; start without --resume")
    return out


def policy_configs(config: RolloutConfig, saved: "HLRPSmolVLASharedConfig") -> dict[str, "HLRPSmolVLASharedConfig"]:
    """The policy's config, by subdirectory of --out: one, or one for each value of --sweep."""

    def changed(values: dict[str, int | None]) -> "HLRPSmolVLASharedConfig":
        given = {name: value for name, value in values.items() if value is not None}
        core = replace(saved.core, flow_steps=given.pop("flow_steps", saved.core.flow_steps))
        return replace(saved, core=core, compile_model=saved.compile_model or config.compile, **given)

    asked = {name: getattr(config, name) for name in SWEPT}
    if not config.sweep:
        return {".": changed(asked)}
    name, values = sweep_values(config.sweep)
    return {f"{name}={value}": changed(asked | {name: value}) for value in values}


def roll_out(
    config: RolloutConfig, policy_config: "HLRPSmolVLASharedConfig", out: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """All episodes that `out` does not have yet, and then its results."""
    from lerobot.envs.configs import EnvConfig
    from lerobot.policies.factory import make_pre_post_processors

    from smolvla_shared import environments, rollout_results, rollouts
    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
    from smolvla_shared.run import versions

    episodes = rollout_results.open_directory(out, settings)
    rollout_results.refuse_fewer(out, episodes, config.seeds)
    policy = HLRPSmolVLASharedPolicy.from_pretrained(config.policy_path, config=policy_config)
    preprocess, postprocess = make_pre_post_processors(
        policy.config,
        pretrained_path=config.policy_path,
        preprocessor_overrides={
            "device_processor": {"device": policy.config.device},
            "rename_observations_processor": {"rename_map": config.rename},
        },
    )
    env_type, fps = config.env.type, EnvConfig.get_choice_class(config.env.type)().fps
    for task in settings["environment"]["tasks"]:
        there = {episode.seed for episode in episodes if episode.task == task}
        seeds = [seed for seed in config.seeds if seed not in there]
        if not seeds:
            continue
        size = settings["environment"]["image_size"], config.max_steps, config.num_envs
        vector = environments.make_environments(env_type, task, *size, config.env.camera, config.env.start_steps)
        text = environments.task_text(env_type, task)
        run = rollouts.run_episodes(
            policy, preprocess, postprocess, vector, task, text, seeds, config.max_steps, config.rename
        )
        rollout_results.record(out, episodes, run, fps, config.videos)
        vector.close()
    provenance = {"policy_path": config.policy_path, **settings, "versions": versions()}
    return rollout_results.finish(out, episodes, provenance)


def main(config: RolloutConfig) -> None:
    out = check_options(config)

    import torch

    from smolvla_shared import comparison, environments, rollout_results
    from smolvla_shared.files import policy_sha256
    from smolvla_shared.lerobot_files import load_config, of_robot
    from smolvla_shared.run_processes import find_device, use_tf32

    config = replace(config, policy_path=str(of_robot(config.policy_path, config.robot)))
    environments.render_headless()
    environments.check_simulator(config.env.type, config.env.tasks)
    saved = load_config(Path(config.policy_path))
    saved.device = find_device(config.device)
    use_tf32(torch.device(saved.device))
    if said := environments.compare_rates(config.env.type, saved.fps):
        print(said)
    # The environment renders the size of the images that the policy was trained on.
    image_size = next(f.shape[-1] for f in saved.input_features.values() if len(f.shape) == 3)
    camera = "" if config.env.camera == CAMERAS[:1] else " ".join(config.env.camera)
    more = {"camera": camera, "start_steps": config.env.start_steps}  # where they are the default, as if not there
    shown = {"type": config.env.type, "tasks": list(config.env.tasks), "image_size": image_size}
    settings = {
        "policy_sha256": policy_sha256(Path(config.policy_path)),
        "environment": shown | {name: value for name, value in more.items() if value},
        "seed": config.seed,
        "max_steps": config.max_steps,
        "rename": config.rename,
    }
    other = comparison.read_results(config.compare, settings, config.seeds) if config.compare else None
    variants, rows = policy_configs(config, saved), {}
    with rollout_results.removed_if_empty(out):
        for name, policy_config in variants.items():
            chunks = {"n_action_steps": policy_config.n_action_steps, "flow_steps": policy_config.core.flow_steps}
            results = rows[name] = roll_out(config, policy_config, out / name, settings | chunks)
            print(f"results and contact sheet: {out / name}\n{rollout_results.results_table(results)}")
            if other:
                print(comparison.compare(str(out / name), results, str(config.compare.parent), other))
    if config.sweep:
        option = config.sweep.partition("=")[0]
        print(rollout_results.table(option, rows))
        rollout_results.plot_sweep(
            option, {int(n.partition("=")[2]): row for n, row in rows.items()}, out / "sweep.png"
        )


if __name__ == "__main__":
    run_command(main, RolloutConfig)
