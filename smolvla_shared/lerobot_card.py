"""What a saved policy says about itself: README.md, its card on the hub, and source.json, where its weights are from.

A card is written with the policy and can then be edited. `hub card` changes nothing in it but the evaluation table.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from smolvla_shared import ranges
from smolvla_shared.config import CoreConfig
from smolvla_shared.files import (
    PROCESSORS,
    SOURCE_NAME,
    refusing,
    share,
    write_manifest,
    write_text,
    write_weights,
)
from smolvla_shared.refusals import decode_known, read_json
from smolvla_shared.teacher_config import GroundedIn

if TYPE_CHECKING:
    from smolvla_shared.lerobot_config import HLRPSmolVLASharedConfig

CARD_NAME = "README.md"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
REPO_ID = "<repo id>"  # in a card that is not on the hub yet
TABLE_BEGIN, TABLE_END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
NOT_EVALUATED = "Not evaluated yet."
TABLE_HEAD = """| task | seeds | most steps | actions of a chunk | Euler steps | success | 95% (Wilson) |
|---|---|---|---|---|---|---|"""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

CARD = """---
{front_matter}
---

# {title}

A robot policy of type `hlrp_smolvla_shared`, from [smolvla_shared](#install-and-run). A SmolVLM trunk reads the
cameras, the instruction and the state; an expert generates chunks of {chunk_size} actions by flow matching, as in
SmolVLA ([arXiv 2506.01844](https://arxiv.org/abs/2506.01844)). {story}

## Install and run

LeRobot finds this type of policy where smolvla_shared is installed, from a checkout of its source:

```bash
pip install -e smolvla_shared
hf download {repo_id} --local-dir policy
```

```bash
# in simulation: LeRobot's loop, or smolvla_shared's with a 95% interval and a contact sheet
lerobot-eval --policy.path=policy --env.type=metaworld --env.task=reach-v3
python smolvla_shared/rollout.py --policy-path policy --env.type metaworld --env.task reach-v3
# on a robot
lerobot-rollout --policy.path=policy --robot.type=<robot> --task="<instruction>" \\
    --rename_map='{{"observation.images.<camera of the robot>": "{camera}"}}'
# fine-tuned on your demonstrations
lerobot-train --policy.path=policy --dataset.repo_id=<dataset> --output_dir=outputs/finetuned
```

## Observations and actions

| feature | shape | names |
|---|---|---|
{features}

Images are [3, height, width] as recorded; the policy resizes them itself. {execution}

## Training

{training}

## Evaluation

{table_begin}
{not_evaluated}
{table_end}

## Limits

- The policy has seen the datasets above and nothing else. Another robot, camera position, scene or instruction needs
  demonstrations of its own.
- Nothing bounds its actions but the robot's or environment's own limits. Keep a hand on the stop button.
- To the policy a camera is its place in the order above, and a joint its place in the vector.

## Licence

{licence}
"""
STORY = {
    True: "The expert first learned latent actions from video without action labels (Stage 2), which a frozen teacher "
    "of LAPA's kind ([arXiv 2410.11758](https://arxiv.org/abs/2410.11758)) read from pairs of frames, then actions "
    "from labelled demonstrations (Stage 3).",
    False: "No Stage 2, which learns from video without action labels, is recorded among what it was trained from.",
}


def policy_card(config: "HLRPSmolVLASharedConfig", source: dict[str, Any], licence: str | None = None) -> str:
    """The card of a policy.

    source:  the contents of source.json
    licence: an identifier of the hub's. Default: mit
    """
    core, steps = config.core, [*history(source)]
    data = {
        "license": licence or "mit",
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "lerobot", config.type, "vision-language-action", "flow-matching"],
        "datasets": sorted({name for step in steps for name in step.get("hub_datasets", ())}) or None,
        "base_model": base_model(core),
    }
    features = {**config.input_features, **config.output_features}
    names = {"observation.state": config.state_feature_names, "action": config.action_feature_names}
    names = {key: ", ".join(of or ["not recorded"]) for key, of in names.items()}
    rows = [f"| `{key}` | {list(feature.shape)} | {names.get(key, '')} |" for key, feature in features.items()]
    execution = f"Of a chunk, {config.n_action_steps} actions are executed before the next one is generated."
    if config.fps:
        execution += f" It was trained on {config.fps:g} actions a second."
    if config.optional_cameras:
        execution += f" Cameras that may be missing: {', '.join(config.optional_cameras)}."
    if config.robot:
        execution += f" It acts with the robot {config.robot}."
    if config.robots:
        each = ", ".join(f"`robots/{name}`" for name in config.robots)
        execution += f" It was trained on several robots. Load the policy of one: {each}."
    rights = "MIT." if data["license"] == "mit" else f"{data['license']}."
    if data["base_model"]:
        rights += f" The trunk's weights come from {core.model_name}, which has a licence of its own."
    return CARD.format(
        front_matter=ModelCardData(**data).to_yaml(),
        title=source.get("run") or config.type,
        chunk_size=core.chunk_size,
        story=STORY[any("stage2" in step for step in steps)],
        repo_id=config.repo_id or REPO_ID,
        camera=core.cameras[0],
        features="\n".join(rows),
        execution=execution,
        training="\n".join(line for step in steps for line in training_lines(step)) or "Nothing is recorded.",
        table_begin=TABLE_BEGIN,
        not_evaluated=NOT_EVALUATED,
        table_end=TABLE_END,
        licence=rights,
    )


def base_model(core: CoreConfig) -> str | None:
    """The hub id of a core's trunk; None for a trunk that is not from the hub."""
    return core.model_name if HUB_ID.fullmatch(core.model_name) else None


def history(source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A policy's source, then that of the policy it started from, and so on."""
    while source:
        yield source
        source = source.get("started_from", {})


def training_lines(source: dict[str, Any]) -> list[str]:
    """What source.json records of one training, as a list."""
    lines = []
    if "trained_by" in source:
        lines.append(f"- Trained by {source['trained_by']}, with the options in `train_config.json`")
    if "global_step" in source:
        lines.append(f"- Run `{source['run']}`, step {source['global_step']:,}, weights of the {source['weights']}")
    if "datasets" in source:
        lines.append(f"- Datasets: {', '.join(f'`{name}`' for name in source['datasets'])}")
    if "actions" in source:
        lines.append(f"- Actions: {source['actions']}")
    if "stage2" in source:
        lines += stage2_lines(source["stage2"], source["stage2_artifact"])
    lines += [f"- Started from `{source[name]}`" for name in ("policy", "smolvla") if name in source]
    if "command" in source:
        lines.append(f"- Command: `{source['command']}`")
    if "versions" in source:
        lines.append(f"- With {', '.join(f'{name} {version}' for name, version in source['versions'].items())}")
    if source.get("started_from"):
        lines.append("- Before that:")
    return lines


def stage2_lines(stage2: dict[str, Any], sha256: str) -> list[str]:
    """What an artifact's manifest records of Stage 2 and of its teacher."""
    return [
        f"- Stage 2: run `{stage2['run']}`, step {stage2['global_step']:,}, artifact sha256 `{sha256}`",
        f"- Datasets of Stage 2: {', '.join(f'`{name}`' for name in stage2['datasets'])}",
        *teacher_lines(stage2["latents"]),
    ]


def teacher_lines(latents: dict[str, Any]) -> list[str]:
    """What an artifact records of the latent actions (artifact.Latents, as JSON)."""
    gaps = " or ".join(f"{gap:.3g}" for gap in (latents["frame_gap_s"], *latents["own_gaps_s"]))
    lines = [
        f"- Teacher `{latents['teacher_id'][:12]}`: {latents['teacher_kind']} latent actions of `"
        f"{'`, `'.join(latents['label_cameras'])}` over {gaps} s, {latents['horizon']} in a row",
        f"- Verdict of `teacher check` on these latent actions: {latents['health']}",
    ]
    lines += [f"  - {reason}" for reason in latents["health_reasons"]]
    if grounding := latents.get("teacher_grounding"):  # a policy from before has no such field
        lines.append(f"- The teacher was grounded in {GroundedIn(**grounding)}")
    own = {name: "`, `".join(cameras) for name, cameras in latents["own_label_cameras"].items()}
    return lines + [f"- Latent actions of `{name}` are of its `{cameras}`" for name, cameras in own.items()]


# --- the evaluation table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    type: str


@dataclass(frozen=True)
class OfTask:
    successes: ranges.CountOrNone
    episodes: ranges.Count
    wilson_95: tuple[ranges.Share, ...]

    def __post_init__(self):
        if len(self.wilson_95) != 2:
            raise ValueError(f"wilson_95 is {self.wilson_95}, it should be the two ends of an interval")


@dataclass(frozen=True)
class Results:
    """What a card reads of a results.json."""

    environment: dict[str, Any]
    by_task: dict[str, Any]
    seed: ranges.Seed
    max_steps: ranges.Count
    n_action_steps: ranges.Few
    flow_steps: ranges.Few


def add_results(card: str, results: dict[str, Any], where: str = "results.json") -> str:
    """A card with a row for each task of a results.json of rollout.py; it replaces a row of the same conditions.

    where: its name in messages

    Raises ValueError if the results are not whole, or the card has no evaluation section any more.
    """
    found = decode_known(Results, results, where)
    environment = decode_known(Environment, found.environment, f"{where}, environment").type
    by_task = {task: decode_known(OfTask, of, f"{where}, {task}") for task, of in found.by_task.items()}
    parts = re.split(f"({re.escape(TABLE_BEGIN)}\n|{re.escape(TABLE_END)})", card)
    if len(parts) != 5:
        raise ValueError(
            f"the card has no section between {TABLE_BEGIN} and {TABLE_END}: put the two lines back, or remove "
            f"{CARD_NAME} to have it written again"
        )
    rows = [line for line in parts[2].splitlines() if line.startswith("| ") and line not in TABLE_HEAD.splitlines()]
    options = f"{found.max_steps} | {found.n_action_steps} | {found.flow_steps}"
    for task, outcome in by_task.items():
        seeds = f"{found.seed} to {found.seed + outcome.episodes - 1}"
        conditions = f"| {environment} {task} | {seeds} | {options} | "
        low, high = outcome.wilson_95
        success = f"{outcome.successes} of {outcome.episodes} | {low:.0%} to {high:.0%} |"
        rows = [line for line in rows if not line.startswith(conditions)] + [conditions + success]
    parts[2] = "\n".join([TABLE_HEAD, *sorted(rows), ""])
    return "".join(parts)


# --- files ------------------------------------------------------------------------------------------------------------


def read_source(directory: Path) -> dict[str, Any]:
    """The source.json of a policy's directory; {} if there is none. Raises ValueError if it is damaged, or lacks what a
    card says of it.
    """
    path = directory / SOURCE_NAME
    source = read_json(path) if path.is_file() else {}
    with refusing(f"{path} does not say what a card needs", "copy it again, or remove it"):
        for step in history(source):
            training_lines(step)
            sorted({*step.get("hub_datasets", ())})
            if "trained_by" in step:
                step["started_from"].get("run")
    return source


def write_about(directory: Path, config: "HLRPSmolVLASharedConfig", source: dict[str, Any]) -> None:
    """Write source.json and the card into a policy's directory.

    LeRobot writes processors that only their owner can read; from here on the umask decides.
    """
    write_text(directory / SOURCE_NAME, json.dumps(source, indent=2) + "\n")
    write_text(directory / CARD_NAME, policy_card(config, source))
    for path in directory.glob(PROCESSORS):
        share(path)


class DescribedPolicy:
    """What LeRobot's policies lack: a record of where the weights are from survives LeRobot's save, and the card says
    it. A base class of the policy, in front of LeRobot's.
    """

    config: "HLRPSmolVLASharedConfig"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.source: dict[str, Any] = {}  # the contents of source.json; {}: nothing is recorded

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Called by LeRobot, with the full weights under FSDP and without in later versions."""
        save_directory = Path(save_directory)
        self.config._save_pretrained(save_directory)
        weights = self.state_dict() if state_dict is None else state_dict
        write_about(save_directory, self.config, self.source_of(write_weights(save_directory / WEIGHTS_NAME, weights)))
        write_manifest(save_directory, (CONFIG_NAME, WEIGHTS_NAME, SOURCE_NAME))  # LeRobot writes processors later

    def source_of(self, weights_sha256: str) -> dict[str, Any]:
        """What source.json says of weights: as at loading if they are the same, else that LeRobot has trained them."""
        if weights_sha256 == self.source.get("weights_sha256"):
            return self.source
        # A resumed training started from what the interrupted one did.
        started_from = self.source["started_from"] if "trained_by" in self.source else self.source
        trained_by = f"LeRobot {metadata.version('lerobot')}"
        return {"trained_by": trained_by, "started_from": started_from, "weights_sha256": weights_sha256}

    def generate_model_card(
        self,
        dataset_repo_id: str,
        model_type: str,
        license: str | None = None,
        tags: list[str] | None = None,
        cfg: Any = None,
        dataset_meta: Any = None,
    ) -> ModelCard:
        """The card that LeRobot uploads after its training. LeRobot's own asks the hub whether it is valid."""
        source = self.source_of("") | {"datasets": [dataset_repo_id], "hub_datasets": [dataset_repo_id]}
        card = ModelCard(policy_card(self.config, source, license))
        card.data.tags = sorted({*card.data.tags, *(tags or ())})
        return card
