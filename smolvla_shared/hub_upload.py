"""What goes to the hub: a policy, a Stage 2 artifact or a teacher, read, verified and with its card."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from huggingface_hub import HfApi, ModelCardData

from smolvla_shared.artifact import SCHEMA as ARTIFACT_SCHEMA
from smolvla_shared.artifact import load_artifact
from smolvla_shared.files import (
    MANIFEST_NAME,
    PROCESSORS,
    SOURCE_NAME,
    hub_or_cache,
    policy_sha256,
    refusing,
    write_text,
)
from smolvla_shared.laq_files import load_laq, read_manifest, teachers_grounding
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
from smolvla_shared.lerobot_files import find_policy, load_config, load_saved
from smolvla_shared.paths import ROBOTS, check_upload
from smolvla_shared.refusals import read_json

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
    """What goes to the hub: files by their path there, and the text of the card."""

    files: dict[str, Path]
    card: str


def open_upload(path: Path) -> Upload:
    """A directory or a weights file to upload, read and verified as by the command that it is made for.

    Raises ValueError if it is no policy, artifact or teacher, or is damaged.
    """
    weights = check_upload(path)
    if weights.is_dir():
        return open_policy(path)
    manifest = weights.with_suffix(".json")
    is_artifact = manifest.is_file() and read_json(manifest).get("schema_version") == ARTIFACT_SCHEMA
    return open_artifact(weights) if is_artifact else open_teacher(weights)


def open_policy(directory: Path) -> Upload:
    config = load_config(find_policy(directory), several=True)
    of_robots = [directory / ROBOTS / robot for robot in config.robots]
    for policy in of_robots or [directory]:
        load_saved(str(policy))
    names = ["config.json", WEIGHTS_NAME, SOURCE_NAME, MANIFEST_NAME, "train_config.json"]
    files = [folder / name for folder in (directory, *of_robots) for name in names]
    files += [path for folder in (directory, *of_robots) for path in folder.glob(PROCESSORS)]
    card = directory / CARD_NAME
    with refusing(f"{card} is no text in UTF-8", "save it as UTF-8, or remove it to have it written again"):
        text = card.read_text(encoding="utf-8") if card.is_file() else policy_card(config, read_source(directory))
    return Upload({path.relative_to(directory).as_posix(): path for path in files if path.is_file()}, text)


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
                *teacher_lines(asdict(manifest.latents)),
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
    pairs = (
        [f"- Pairs of `{'`, `'.join(source['label_cameras'])}`, {source['frame_gap_s']:.3g} s apart"] if source else []
    )
    grounding = teachers_grounding(weights)
    grounded = [f"- Grounded in {grounding}"] if grounding else []
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


def push(path: Path, repo_id: str, private: bool, dry_run: bool) -> None:
    upload = open_upload(path)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / CARD_NAME).write_text(upload.card.replace(REPO_ID, repo_id))
        for name, file in upload.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(file.resolve())
        print(f"{repo_id}{' (dry run, nothing is uploaded)' if dry_run else ''}:")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>14,} bytes  {file.relative_to(folder)}")
        if dry_run:
            print(upload.card.replace(REPO_ID, repo_id))
            return
        api = HfApi()
        try:
            with hub_or_cache() as problem:
                url = api.create_repo(repo_id, private=private or None, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {path.name}")
        except (OSError, httpx.HTTPError) as error:
            raise ValueError(
                f"{repo_id} is not uploaded: {problem or error}\nThe repository must be yours to write: run `hf auth "
                "login` with a token that may write, then this command again"
            ) from error
    print(f"uploaded: {url}")


def card(path: Path, results: tuple[Path, ...]) -> None:
    text, sha256 = open_policy(path).card, policy_sha256(path)
    for file in results:
        found = read_json(file)
        if (evaluated := found.get("policy_sha256")) != sha256:
            raise ValueError(
                f"{file} is about the policy with sha256 {evaluated}, {path} has {sha256}: roll this one out "
                "with rollout.py"
            )
        text = add_results(text, found, f"{file}")
    write_text(path / CARD_NAME, text)
    print(f"{path / CARD_NAME}: results of {len(results)} rollouts")
