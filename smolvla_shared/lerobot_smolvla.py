"""LeRobot's SmolVLA policies become ours, and ours theirs (lerobot_smolvla_files.py says what is left out).

python -m smolvla_shared.lerobot_smolvla import <directory or hub id> <new directory>
python -m smolvla_shared.lerobot_smolvla export <pretrained_model> <new directory>
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smolvla_shared import paths
from smolvla_shared.command import parse, run_command


def check_exported(name: str) -> None:
    if not (Path(name) / "adapter_config.json").is_file():  # a PEFT adapter has no config.json
        paths.check_model("policy", name)


SmolVLA = Annotated[str, paths.Place(lambda name, option, options: paths.check_model("SmolVLA policy", name))]
Exported = Annotated[str, paths.Place(lambda name, option, options: check_exported(name))]


@dataclass(frozen=True)
class ImportConfig:
    """Make a policy of this project from a LeRobot SmolVLA policy."""

    # The SmolVLA policy: a directory or a hub id.
    source: tyro.conf.Positional[SmolVLA]
    # The new directory.
    out: tyro.conf.Positional[paths.NewDirectory]
    # The robot whose statistics to take, if the policy has statistics of several robots.
    robot: str | None = None


def import_smolvla(config: ImportConfig) -> None:
    from smolvla_shared.files import new_directory
    from smolvla_shared.lerobot_files import save_policy
    from smolvla_shared.lerobot_smolvla_files import load_checkpoint

    with new_directory(config.out) as directory:
        checkpoint = load_checkpoint(config.source)
        save_policy(
            directory,
            checkpoint.core,
            checkpoint.weights,
            checkpoint.tokenizer,
            checkpoint.normalization(config.robot),
            checkpoint.n_action_steps,
            {"smolvla": config.source},
            image_shapes=checkpoint.image_shapes,
            optional_cameras=checkpoint.optional_cameras,
            rename_map=checkpoint.rename_map,
        )
    print(f"{config.out}: {len(checkpoint.weights)} tensors of {config.source}")
    print(f"left out, no action depends on them: {', '.join(checkpoint.unread) or 'none'}")


@dataclass(frozen=True)
class ExportConfig:
    """Make a LeRobot SmolVLA policy from a policy of this project."""

    # The policy: a pretrained_model directory, a hub id, or a PEFT adapter of one.
    source: tyro.conf.Positional[Exported]
    # The new directory.
    out: tyro.conf.Positional[paths.NewDirectory]


def export_smolvla(config: ExportConfig) -> None:
    from smolvla_shared.files import new_directory
    from smolvla_shared.lerobot_files import load_saved
    from smolvla_shared.lerobot_smolvla_files import save_checkpoint
    from smolvla_shared.trunk_files import trunk_location

    with new_directory(config.out) as directory:
        policy = load_saved(config.source)
        save_checkpoint(directory, policy)
    core = policy.config.core
    print(f"{config.out}: LeRobot reads the trunk's configuration and tokenizer from {trunk_location(core.model_name)}")
    left_out = {f"the trunk's revision {core.model_revision} (LeRobot reads the newest)": core.model_revision}
    left_out |= {"the latent head": core.latent_vector_dim}
    print(f"left out: {', '.join(what for what, is_there in left_out.items() if is_there) or 'nothing'}")


def main() -> None:
    config = parse(
        Annotated[ImportConfig, tyro.conf.subcommand("import")]
        | Annotated[ExportConfig, tyro.conf.subcommand("export")],
        prog="python -m smolvla_shared.lerobot_smolvla",
    )
    import_smolvla(config) if isinstance(config, ImportConfig) else export_smolvla(config)


if __name__ == "__main__":
    run_command(main)
