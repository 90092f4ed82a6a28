"""The processors around the LeRobot policy: names, tokens, device, normalisation; and back to the robot's units."""

from typing import TYPE_CHECKING, Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import (
    ObservationProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils import constants as keys
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolvla_shared.preprocess import TextTokenizer
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


@ProcessorStepRegistry.register("hlrp_smolvla_shared_tokenizer")
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
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map or {}),
            steps.add_batch_dim,
            TokenizeTask(config.core.max_text_tokens, tokenizer),
            steps.to_device,
            steps.normalize,
        ],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
