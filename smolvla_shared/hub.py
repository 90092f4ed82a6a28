"""To Hugging Face's hub: a policy, a Stage 2 artifact or a teacher, each with a card.

python -m smolvla_shared.hub push runs/s3/checkpoints/last/pretrained_model me/my_policy [--private] [--dry-run]
python -m smolvla_shared.hub card runs/s3/checkpoints/last/pretrained_model --results runs/s3/rollout/results.json
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from huggingface_hub.utils import HFValidationError, validate_repo_id

from smolvla_shared import paths
from smolvla_shared.command import parse, run_command


@dataclass(frozen=True)
class PushConfig:
    """Upload a policy, a Stage 2 artifact or a teacher to Hugging Face's hub, in one commit. Log in with `hf auth
    login` first."""

    # A policy's directory (pretrained_model), or the weights (.safetensors) of an artifact or a teacher.
    path: tyro.conf.Positional[paths.Upload]
    # The repository, such as me/my_policy; it is made if there is none.
    repo_id: tyro.conf.Positional[str]
    # Make the repository a private one.
    private: bool = False
    # List what would be uploaded, and upload nothing.
    dry_run: bool = False

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"{self.repo_id} names no repository of the hub: {error}") from error


@dataclass(frozen=True)
class CardConfig:
    """Add the results of rollout.py to a policy's card, README.md; write the card if there is none."""

    # The policy's directory (pretrained_model).
    path: tyro.conf.Positional[paths.Policy]
    # results.json files of rollout.py.
    results: tuple[paths.File, ...]


def main(arguments: list[str] | None = None) -> None:
    config = parse(
        Annotated[PushConfig, tyro.conf.subcommand("push")] | Annotated[CardConfig, tyro.conf.subcommand("card")],
        prog="python -m smolvla_shared.hub",
        args=arguments,
    )
    from smolvla_shared import hub_upload

    (hub_upload.push if isinstance(config, PushConfig) else hub_upload.card)(**vars(config))


if __name__ == "__main__":
    run_command(main)
