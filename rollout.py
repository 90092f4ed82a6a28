"""Roll out a trained policy in an environment and measure its success rate.

python rollout.py --policy-path runs/s3/checkpoints/last/pretrained_model --env.type metaworld --env.task reach-v3
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro


@dataclass(frozen=True)
class EnvironmentConfig:
    # LeRobot environment: metaworld or pusht.
    type: str = "metaworld"
    # Meta-World task, such as plate-slide-v3; ignored for pusht.
    task: str = "reach-v3"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Success rate with its 95% Wilson interval, a contact sheet, and (by flag) a video of each episode."""

    # The policy: a pretrained_model directory of train_stage3.py.
    policy_path: Path
    # New directory for results.json, contact_sheet.png and videos. Default: beside the policy.
    out: Path | None = None
    # The environment.
    env: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    # Episodes to run; with 50 the 95% interval is at most 27 points wide.
    episodes: int = 50
    # Environments that run side by side (Meta-World: one process each); the results do not depend on it.
    num_envs: int = 2
    # Seed of the first episode; episode i uses seed + i for object positions and the policy's noise.
    seed: int = 0
    # Environment steps after which an episode counts as failed.
    max_steps: int = 500
    # Actions executed of each chunk before the next chunk is predicted. Default: the value saved with the policy.
    n_action_steps: int | None = None
    # Pairs of environment key and policy key, for observations whose names differ.
    rename: dict[str, str] = field(default_factory=dict)
    # Write a video of each episode.
    videos: bool = False
    # Device that the policy runs on. Default: cuda if there is a GPU, else cpu.
    device: str | None = None


def main(config: RolloutConfig) -> None:
    if not (config.policy_path / "config.json").is_file():
        found = sorted(p.name for p in config.policy_path.iterdir()) if config.policy_path.is_dir() else "no directory"
        raise ValueError(f"--policy-path {config.policy_path} holds no policy: config.json is missing (found: {found})")
    out = config.out or config.policy_path.parent / f"rollout_{config.env.task}_seed{config.seed}"
    if out.exists():
        raise ValueError(f"--out {out} exists: name another directory")

    import torch
    from lerobot.envs.configs import EnvConfig
    from lerobot.policies.factory import make_pre_post_processors

    from smolvla_shared import rollouts
    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
    from smolvla_shared.run import versions
    from smolvla_shared.run_processes import use_tf32

    rollouts.render_headless()
    seeds = range(config.seed, config.seed + config.episodes)
    rollouts.check_environment(config.env.type, config.env.task, seeds)
    policy = HLRPSmolVLASharedPolicy.from_pretrained(config.policy_path)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    use_tf32(torch.device(device))
    policy.config.device = device
    policy.to(device)
    if config.n_action_steps is not None:
        policy.config = replace(policy.config, n_action_steps=config.n_action_steps)
    preprocess, postprocess = make_pre_post_processors(
        policy.config,
        pretrained_path=str(config.policy_path),
        preprocessor_overrides={
            "device_processor": {"device": device},
            "rename_observations_processor": {"rename_map": config.rename},
        },
    )
    # The environment renders the size of the images that the policy was trained on.
    image_size = next(f.shape[-1] for f in policy.config.input_features.values() if len(f.shape) == 3)
    environments = rollouts.make_environments(config.env.type, config.env.task, image_size, config.num_envs)
    task = rollouts.task_text(config.env.type, config.env.task)
    episodes = rollouts.run_episodes(
        policy, preprocess, postprocess, environments, task, seeds, config.max_steps, config.rename
    )
    provenance = {
        "policy_path": str(config.policy_path),
        "environment": {"type": config.env.type, "task": config.env.task, "image_size": image_size},
        "seed": config.seed,
        "max_steps": config.max_steps,
        "n_action_steps": policy.config.n_action_steps,
        "versions": versions(),
    }
    fps = EnvConfig.get_choice_class(config.env.type)().fps
    results = rollouts.write_results(episodes, out, fps, config.videos, provenance)
    environments.close()
    low, high = results["wilson_95"]
    print(f"results, contact sheet{' and videos' if config.videos else ''}: {out}")
    print(
        f"{config.env.task}: {results['successes']} of {config.episodes} episodes succeeded, "
        f"{results['success_rate']:.0%} (95% interval {low:.0%} to {high:.0%})"
    )


if __name__ == "__main__":
    main(tyro.cli(RolloutConfig))
