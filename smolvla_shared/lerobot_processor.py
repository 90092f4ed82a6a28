"""The processors around the LeRobot policy: names, tokens, device, normalisation; and back to the robot's units."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    ObservationProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RelativeActionsProcessorStep,
    RenameObservationsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils import constants as keys
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolvla_shared import ranges
from smolvla_shared.files import read_weights
from smolvla_shared.normalization import EPS
from smolvla_shared.preprocess import TextTokenizer
from smolvla_shared.refusals import decode, decode_known, read_json, refuse_differences, shown
from smolvla_shared.trunk_files import load_trunk_tokenizer, pack_tokenizer, unpack_tokenizer

if TYPE_CHECKING:
    from smolvla_shared.lerobot_config import HLRPSmolVLASharedConfig

# The statistics that each mode of LeRobot's normaliser reads.
STATISTICS = {
    NormalizationMode.IDENTITY: (),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
TOKENIZER_STEP = "hlrp_smolvla_shared_tokenizer"
RELATIVE_STEP = "hlrp_smolvla_shared_relative_actions"
NORMALIZERS = "normalizer_processor", "unnormalizer_processor"
# The registered names of a saved policy's steps; True: the step has a state, in a file.
STEPS = {
    keys.POLICY_PREPROCESSOR_DEFAULT_NAME: {
        "rename_observations_processor": False,
        "to_batch_processor": False,
        TOKENIZER_STEP: True,
        "device_processor": False,
        "normalizer_processor": True,
    },
    keys.POLICY_POSTPROCESSOR_DEFAULT_NAME: {"unnormalizer_processor": True, "device_processor": False},
}
# Those of a policy of relative actions, each behind one of the others.
RELATIVE_STEPS = {
    keys.POLICY_PREPROCESSOR_DEFAULT_NAME: ("to_batch_processor", RELATIVE_STEP),
    keys.POLICY_POSTPROCESSOR_DEFAULT_NAME: ("unnormalizer_processor", "absolute_actions_processor"),
}


@ProcessorStepRegistry.register(TOKENIZER_STEP)
class TokenizeTask(ObservationProcessorStep):
    """Task texts -> token ids and mask, as in training. The tokenizer is in the step's state: a saved policy loads
    offline.
    """

    def __init__(self, max_tokens: int, tokenizer: PreTrainedTokenizerFast | None = None):
        """LeRobot builds a saved step without a tokenizer; `load_state_dict` then brings the tokenizer."""
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        complementary = self.transition[TransitionKey.COMPLEMENTARY_DATA]
        if complementary.get("task") is None:
            raise ValueError(
                'the policy needs a "task" text (--task, or the key of a batch), the batch has '
                f"{sorted(observation)} and {sorted(complementary)}, task {complementary.get('task')}"
            )
        text, mask = TextTokenizer(self.tokenizer, self.max_tokens)(complementary["task"])
        return observation | {keys.OBS_LANGUAGE_TOKENS: text, keys.OBS_LANGUAGE_ATTENTION_MASK: mask}

    def get_config(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def state_dict(self) -> dict[str, Tensor]:
        return {"tokenizer": torch.frombuffer(bytearray(pack_tokenizer(self.tokenizer), "utf-8"), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tokenizer = unpack_tokenizer(bytes(state["tokenizer"].numpy()).decode("utf-8"))

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        language = PolicyFeature(FeatureType.LANGUAGE, (self.max_tokens,))
        added = {keys.OBS_LANGUAGE_TOKENS: language, keys.OBS_LANGUAGE_ATTENTION_MASK: language}
        return features | {PipelineFeatureType.OBSERVATION: features[PipelineFeatureType.OBSERVATION] | added}


@ProcessorStepRegistry.register(RELATIVE_STEP)
@dataclass
class RelativeActions(RelativeActionsProcessorStep):
    """LeRobot's step, and for a rollout the origin: behind the normaliser, the action 0 tells the policy where the
    state lies in the model's units.

    LeRobot's second step adds the state of the newest observation. A chunk is relative to that of its first one:
    `HLRPSmolVLASharedPolicy.select_action` makes up for what the state has moved since.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        if transition.get(TransitionKey.ACTION) is None:
            state = transition[TransitionKey.OBSERVATION].get(keys.OBS_STATE)
            if state is None:
                raise ValueError(f"relative actions need {keys.OBS_STATE}, which is missing: pass it, or map its name")
            origin = torch.zeros(*state.shape[:-1], len(self.action_names), device=state.device)
            transition = {**transition, TransitionKey.ACTION: origin}
        return super().__call__(transition)


def make_hlrp_smolvla_shared_pre_post_processors(
    config: "HLRPSmolVLASharedConfig",
    dataset_stats: dict[str, dict[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    rename_map: dict[str, str] | None = None,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The pipelines before and after the policy. LeRobot's factory calls this for a policy without saved processors.

    dataset_stats: {feature: {"mean": [A], "std": [A]}} of action and, if the core has a state, observation.state; or
                   what else the config's normalization_mapping reads
    tokenizer:     the trunk's; default: the one that a fresh policy was built with, or loaded from where the core's
                   trunk came from
    rename_map:    {name of an observation as it arrives: our name}

    Raises ValueError for missing statistics: LeRobot's normaliser would leave such a feature unnormalised.
    """
    modes = {keys.OBS_STATE: config.normalization_mapping["STATE"]} if config.core.state_dim else {}
    modes |= {keys.ACTION: config.normalization_mapping["ACTION"]}
    dataset_stats = dataset_stats or {}
    found = {key: sorted(stats) for key, stats in dataset_stats.items()}
    missing = [f"{key}.{of}" for key, mode in modes.items() for of in STATISTICS[mode] if of not in found.get(key, [])]
    if missing:
        raise ValueError(f"cannot normalise: the statistics {missing} are missing, found {found or 'none'}")
    tokenizer = tokenizer or getattr(config, "_tokenizer", None)
    tokenizer = tokenizer or load_trunk_tokenizer(config.core.model_name, config.core.model_revision)
    stats = {key: dataset_stats[key] for key in modes if key in dataset_stats}
    steps = make_default_policy_processor_steps(config, stats)
    before, after = [], []
    if config.relative_actions:
        # Without names every dimension is relative, whatever its name.
        names = config.action_feature_names or tuple(f"{dim}" for dim in range(config.core.action_dim))
        before = [RelativeActions(True, [*config.absolute_actions], [*names])]
        after = [AbsoluteActionsProcessorStep(True, before[0])]
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map or {}),
            steps.add_batch_dim,
            *before,
            TokenizeTask(config.core.max_text_tokens, tokenizer),
            steps.to_device,
            steps.normalize,
        ],
        output_steps=[steps.unnormalize, *after, steps.to_cpu],
    )


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a saved processor, {"registry_name", "config", "state_file" if it has one}; nothing of it is run.

    LeRobot imports and calls what a step's `class` entry names, and reads a state file wherever it is. Raises
    ValueError for a step that is not named in LeRobot's registry, and for a state outside of the directory.
    """
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path}: steps should be a list of objects, it is {shown(steps)}")
    for step in steps:
        if step.keys() - {"registry_name", "config", "state_file"} or not isinstance(step.get("registry_name"), str):
            raise ValueError(f"{path}: a step should have a registry_name, config and state_file, it is {shown(step)}")
        if not isinstance(step.get("config"), dict):
            raise ValueError(f"{path}: the config of {step['registry_name']} should be an object, step {shown(step)}")
        file = step.get("state_file")
        if file is not None and (not isinstance(file, str) or Path(file).name != file):
            raise ValueError(
                f"{path}: the state file of {step['registry_name']} is {shown(file)}, not a file beside it"
            )
    return steps


@dataclass(frozen=True)
class Renames:
    """The config of a saved step: what it is for each kind of step is LeRobot's."""

    rename_map: dict[str, str]


@dataclass(frozen=True)
class Tokens:
    max_tokens: ranges.Few


@dataclass(frozen=True)
class Normalizes:
    eps: float
    features: dict[str, Any]
    norm_map: dict[str, str]


def check_config(path: Path, step: dict[str, Any], described: dict[str, Any]) -> None:
    """Raise ValueError for a config of a step that the policy's own config.json, `described`, contradicts."""
    where, core = f"{path}, {step['registry_name']}", described.get("core")
    core = core if isinstance(core, dict) else {}
    if step["registry_name"] == "rename_observations_processor":
        decode(Renames, step["config"], where)
    elif step["registry_name"] == TOKENIZER_STEP:
        found = decode(Tokens, step["config"], where).max_tokens
        rows = [("max_tokens", found, core.get("max_text_tokens"))]
        refuse_differences(where, rows, "the step has", "config.json", fix="Copy the directory again")
    elif step["registry_name"] in NORMALIZERS:
        found = decode_known(Normalizes, step["config"], where)
        mapping, read = described.get("normalization_mapping"), [keys.ACTION]
        if core.get("state_dim") and step["registry_name"] == NORMALIZERS[0]:
            read.append(keys.OBS_STATE)
        rows = [("eps", found.eps, EPS), *((f"features.{key}", key in found.features, True) for key in read)]
        rows += [
            (kind, found.norm_map.get(kind), mapping.get(kind) if isinstance(mapping, dict) else None)
            for kind in ("STATE", "ACTION")
        ]
        refuse_differences(where, rows, "the step has", "the policy", fix="Copy the directory again")


def check_processors(directory: Path) -> None:
    """Check the processors of a policy's directory before LeRobot builds them. A directory may have none.

    Raises ValueError for other steps than `make_hlrp_smolvla_shared_pre_post_processors` makes, in another order, for
    a config of a step that contradicts the policy's, for a state that is missing, and for statistics that are missing,
    not finite, negative, or of another width than the policy's vectors.
    """
    for name, expected in STEPS.items():
        path = directory / f"{name}.json"
        if not path.exists():
            continue
        steps = read_steps(path)
        found = [(step["registry_name"], bool(step.get("state_file"))) for step in steps]
        is_relative = any(step == RELATIVE_STEPS[name][1] for step, _ in found)
        wanted = [*expected.items()]
        if is_relative:
            before, step = RELATIVE_STEPS[name]
            wanted.insert([*expected].index(before) + 1, (step, False))
        if found != wanted:
            raise ValueError(
                f"{path} has the steps {found} (name, whether it has a state), expected {wanted}: copy the directory "
                "again"
            )
        described = read_json(directory / "config.json")
        core = described.get("core")
        widths = {of: core.get(f"{of}_dim") for of in ("state", "action")} if isinstance(core, dict) else {}
        for step in steps:
            if file := step.get("state_file"):
                _check_state(directory / file, step, widths)
            check_config(path, step, described)


def _check_state(path: Path, step: dict[str, Any], widths: dict[str, Any]) -> None:
    """widths: of "state" and "action", in config.json"""
    state = read_weights(path)
    if step["registry_name"] == TOKENIZER_STEP:
        if [*state] != ["tokenizer"] or state["tokenizer"].dtype != torch.uint8 or state["tokenizer"].ndim != 1:
            raise ValueError(f"{path} should hold the bytes of a tokenizer, it holds {sorted(state)}")
        try:
            unpack_tokenizer(bytes(state["tokenizer"].numpy()).decode("utf-8"))
        except Exception as error:  # of tokenizers' own kinds
            raise ValueError(f"{path} holds no tokenizer ({error}): copy the file again") from error
        return
    norm_map, problems = step["config"].get("norm_map"), []
    for kind, feature in (("STATE", keys.OBS_STATE), ("ACTION", keys.ACTION)):
        mode = norm_map.get(kind) if isinstance(norm_map, dict) else None
        if mode not in [known.value for known in STATISTICS]:
            problems.append(f"norm_map gives {kind} {mode!r}")
            continue
        needed = {f"{feature}.{of}" for of in STATISTICS[NormalizationMode(mode)]}
        width = widths.get(kind.lower())
        is_read = feature == keys.ACTION or (width and step["registry_name"] == NORMALIZERS[0])
        if is_read or any(name.startswith(f"{feature}.") for name in state):
            problems += [f"{name} is missing" for name in sorted(needed - state.keys())]
        read = {name: state[name] for name in sorted(needed & state.keys())}
        if len({values.shape for values in read.values()}) > 1 or any(values.ndim != 1 for values in read.values()):
            problems.append(
                f"{', '.join(f'{name} {[*values.shape]}' for name, values in read.items())} differ in width"
            )
        if is_read and (other := [name for name, values in read.items() if values.shape != (width,)]):
            problems.append(f"{', '.join(other)} should have {width} numbers, as the policy's {kind.lower()}")
        low, high = (read.get(f"{feature}.{of}") for of in ("q01", "q99"))
        if low is not None and high is not None and low.shape == high.shape and (low > high).any():
            problems.append(f"{feature}.q01 is above q99: {low.tolist()}, {high.tolist()}")
        for name, values in read.items():  # LeRobot's also hold statistics that nothing reads, such as of images
            if not (values.is_floating_point() and values.isfinite().all()):
                problems.append(f"{name} is not finite numbers: {values.flatten()[:8].tolist()} {values.dtype}")
            elif name.endswith(".std") and (values < 0).any():
                problems.append(f"{name} is negative: {values.tolist()}")
    if problems:
        raise ValueError(f"{path} cannot normalise: {'; '.join(problems)}. Copy the file again")
