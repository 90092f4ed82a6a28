"""To Hugging Face's hub: a policy, a Stage 2 artifact or a teacher, each with a card.

python -m smolvla_shared.hub push runs/s3/checkpoints/last/pretrained_model me/my_policy [--private] [--dry-run]
python -m smolvla_shared.hub card runs/s3/checkpoints/last/pretrained_model --results runs/s3/rollout/results.json
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id

from smolvla_shared.artifact import ARTIFACT_NAME, load_artifact
from smolvla_shared.artifact import SCHEMA as ARTIFACT_SCHEMA
from smolvla_shared.command import parse, run_command
from smolvla_shared.files import MANIFEST_NAME, PROCESSORS, SOURCE_NAME, policy_sha256, write_text
from smolvla_shared.laq_files import load_laq, read_manifest
from smolvla_shared.lerobot_card import (
    CARD_NAME,
    REPO_ID,
    WEIGHTS_NAME,
    add_results,
    base_model,
    policy_card,
    read_source,
    teacher_lines,
    training_lines,
)
from smolvla_shared.lerobot_files import load_saved
from smolvla_shared.refusals import read_json

TEACHER_FILE = "laq.safetensors"
CARD = """---
{front_matter}
---

# {title}

{what}

```bash
hf download {repo_id} --local-dir downloaded
{command}
```

{about}

## Licence

MIT.
"""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: files by their name there, and the text of the card."""

    files: dict[str, Path]
    card: str


def open_upload(path: Path) -> Upload:
    """A directory or a weights file to upload, read and verified as by the command that it is made for.

    Raises ValueError if it is no policy, artifact or teacher, or is damaged.
    """
    if (path / "config.json").is_file():
        return open_policy(path)
    names = [f"{ARTIFACT_NAME}.safetensors", TEACHER_FILE]
    weights = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if weights is None:
        found = sorted(file.name for file in path.iterdir()) if path.is_dir() else "no such file or directory"
        raise ValueError(
            f"{path} holds no policy (config.json), artifact ({names[0]}) or teacher ({names[1]}), found: {found}; a "
            "run has them in checkpoints/last/pretrained_model and artifacts"
        )
    manifest = weights.with_suffix(".json")
    is_artifact = manifest.is_file() and read_json(manifest).get("schema_version") == ARTIFACT_SCHEMA
    return open_artifact(weights) if is_artifact else open_teacher(weights)


def open_policy(directory: Path) -> Upload:
    config = load_saved(str(directory)).config
    source = read_source(directory)
    names = ["config.json", WEIGHTS_NAME, SOURCE_NAME, MANIFEST_NAME, "train_config.json"]
    files = [directory / name for name in names] + [*directory.glob(PROCESSORS)]
    card = directory / CARD_NAME
    return Upload(
        {path.name: path for path in files if path.is_file()},
        card.read_text() if card.is_file() else policy_card(config, source),
    )


def open_artifact(weights: Path) -> Upload:
    manifest = load_artifact(weights).manifest
    files = [weights, weights.with_suffix(".json"), weights.with_suffix(".tokenizer.json")]
    return Upload(
        {path.name: path for path in files},
        plain_card(
            f"{manifest.source.run}, a Stage 2 artifact",
            "A SmolVLM trunk and a flow-matching expert that have learned latent actions from video without action "
            "labels, for Stage 3 of smolvla_shared, which teaches them actions from a few demonstrations.",
            f"python train_stage3.py --stage2-artifact downloaded/{weights.name} --data.repo-ids <data> --run-dir s3",
            [
                *training_lines(vars(manifest.source)),
                *teacher_lines(vars(manifest.latents)),
                f"- Cameras: {', '.join(manifest.core.cameras)}; state of {manifest.core.state_dim} dimensions",
                f"- sha256 of the weights: `{manifest.weights.sha256}`",
            ],
            base_model(manifest.core),
        ),
    )


def open_teacher(weights: Path) -> Upload:
    if weights.suffix != ".safetensors":
        raise ValueError(f"{weights}: expected a .safetensors file of this package with its .json beside it")
    load_laq(weights)
    manifest, source = read_manifest(weights), read_manifest(weights).source
    pairs = [f"- Pairs of `{source['label_camera']}`, {source['frame_gap_s']:.3g} s apart"] if source else []
    grounded = ["- Grounded in a few labelled episodes"] if source.get("grounding") else []
    return Upload(
        {path.name: path for path in (weights, weights.with_suffix(".json"))},
        plain_card(
            f"{source.get('run', weights.stem)}, a LAQ teacher",
            "An inverse-dynamics VQ model of LAPA's kind ([arXiv 2410.11758](https://arxiv.org/abs/2410.11758)). It "
            "reads a latent action from two frames of a video, without action labels, for Stage 2 of smolvla_shared. "
            "Check what it reads from your video before you train on it: `python -m smolvla_shared.teacher check`.",
            f"python train_stage2.py --laq-ckpt downloaded/{weights.name} --data.repo-ids <data> --run-dir s2",
            [
                *training_lines(source),
                *pairs,
                *grounded,
                f"- Latent actions of {manifest.config.code_seq_len} codes out of {manifest.config.codebook_size}, "
                f"{manifest.config.quant_dim} dimensions each, for frames of {manifest.config.image_size} pixels",
                f"- Id of the teacher, which labels and artifacts record: `{manifest.teacher_id}`",
            ],
        ),
    )


def plain_card(title: str, what: str, command: str, about: list[str], trunk: str | None = None) -> str:
    data: dict[str, Any] = {"license": "mit", "library_name": "smolvla_shared", "pipeline_tag": "robotics"}
    data |= {"tags": ["robotics", "latent-actions"], "base_model": trunk}
    return CARD.format(
        front_matter=ModelCardData(**data).to_yaml(),
        title=title,
        what=what,
        repo_id=REPO_ID,
        command=command,
        about="\n".join(about),
    )


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PushConfig:
    """Upload a policy, a Stage 2 artifact or a teacher to Hugging Face's hub, in one commit. Log in with `hf auth
    login` first."""

    # A policy's directory (pretrained_model), or the weights (.safetensors) of an artifact or a teacher.
    path: tyro.conf.Positional[Path]
    # The repository, such as me/my_policy; it is made if there is none.
    repo_id: tyro.conf.Positional[str]
    # Make the repository a private one.
    private: bool = False
    # List what would be uploaded, and upload nothing.
    dry_run: bool = False


def push(config: PushConfig) -> None:
    validate_repo_id(config.repo_id)
    upload = open_upload(config.path)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / CARD_NAME).write_text(upload.card.replace(REPO_ID, config.repo_id))
        for name, path in upload.files.items():
            (folder / name).symlink_to(path.resolve())
        print(f"{config.repo_id}{' (dry run, nothing is uploaded)' if config.dry_run else ''}:")
        for path in sorted(folder.iterdir()):
            print(f"{path.stat().st_size:>14,} bytes  {path.name}")
        if config.dry_run:
            print(upload.card.replace(REPO_ID, config.repo_id))
            return
        api = HfApi()
        url = api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        api.upload_folder(repo_id=config.repo_id, folder_path=folder, commit_message=f"Upload {config.path.name}")
    print(f"uploaded: {url}")


@dataclass(frozen=True)
class CardConfig:
    """Add the results of rollout.py to a policy's card, README.md; write the card if there is none."""

    # The policy's directory (pretrained_model).
    path: tyro.conf.Positional[Path]
    # results.json files of rollout.py.
    results: tuple[Path, ...]


def card(config: CardConfig) -> None:
    text, sha256 = open_policy(config.path).card, policy_sha256(config.path)
    for path in config.results:
        results = read_json(path)
        if (evaluated := results.get("policy_sha256")) != sha256:
            raise ValueError(
                f"{path} is about the policy with sha256 {evaluated}, {config.path} has {sha256}: roll this one out "
                "with rollout.py"
            )
        text = add_results(text, results)
    write_text(config.path / CARD_NAME, text)
    print(f"{config.path / CARD_NAME}: results of {len(config.results)} rollouts")


def main(arguments: list[str] | None = None) -> None:
    config = parse(
        Annotated[PushConfig, tyro.conf.subcommand("push")] | Annotated[CardConfig, tyro.conf.subcommand("card")],
        prog="python -m smolvla_shared.hub",
        args=arguments,
    )
    push(config) if isinstance(config, PushConfig) else card(config)


if __name__ == "__main__":
    run_command(main)
