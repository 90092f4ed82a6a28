"""The processors around the LeRobot policy: names, tokens, devices, normalisation; and back to the robot's units.

A saved pipeline is self-contained: the tokenizer is in a step's state, so that loading works offline.
"""

from typing import TYPE_CHECKING, Any

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
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

from smolvla_shared.preprocess import TextTokenizer, pack_tokenizer, unpack_tokenizer
from smolvla_shared.trunk import load_trunk_tokenizer

if TYPE_CHECKING:
    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedConfig


@ProcessorStepRegistry.register("hlrp_smolvla_shared_tokenizer")
class TokenizeTask(ObservationProcessorStep):
    """Task texts -> token ids and mask, as in training. The tokenizer itself is in the step's state, so that a saved
    policy needs neither the hub nor the directory that the tokenizer came from.
    """

    def __init__(self, max_tokens: int, tokenizer: PreTrainedTokenizerFast | None = None):
        """Without a tokenizer the step waits for `load_state_dict`: this is how LeRobot builds a saved pipeline."""
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        complementary = self.transition[TransitionKey.COMPLEMENTARY_DATA]
        if "task" not in complementary:
            raise ValueError(
                f'the policy needs a "task" text, the batch has {sorted(observation)} and {sorted(complementary)}'
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
    """The pipelines before and after the policy; LeRobot's factory calls this for a policy that was not saved before.

    dataset_stats: {feature: {"mean": [A], "std": [A]}} of observation.state, if the core has a state, and action
    tokenizer:     the trunk's; by default it is loaded from where the core's trunk came from
    rename_map:    our names of observations, by those that they arrive with

    Raises ValueError for missing statistics: LeRobot's normaliser would leave such a feature as it is.
    """
    needed = [keys.OBS_STATE, keys.ACTION] if config.core.state_dim else [keys.ACTION]
    found = {key: sorted(stats) for key, stats in (dataset_stats or {}).items()}
    missing = [f"{key}.{name}" for key in needed for name in ("mean", "std") if name not in found.get(key, [])]
    if missing:
        raise ValueError(f"cannot normalise: the statistics {missing} are missing, found {found or 'none'}")
    tokenizer = tokenizer or load_trunk_tokenizer(config.core.model_name, config.core.model_revision)
    steps = make_default_policy_processor_steps(config, {key: dataset_stats[key] for key in needed})
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
