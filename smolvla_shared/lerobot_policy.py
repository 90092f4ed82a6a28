"""The LeRobot policy `hlrp_smolvla_shared`: config, policy and processors around a `SmolVLASharedCore`.

LeRobot's commands (lerobot-eval, lerobot-train --policy.path) find the three by their names in this module. A saved
policy loads offline: the trunk's config is in config.json, the tokenizer in the preprocessor's state.
"""

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.configs.policies import PreTrainedConfig
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils import constants as keys
from lerobot.utils.device_utils import auto_select_torch_device
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from smolvla_shared import flow, losses
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import ACTION, WARMUP_STEPS, CoreConfig, OptimConfig, RunConfig
from smolvla_shared.files import check_weights, find_directory, write_text, write_weights
from smolvla_shared.lerobot_processor import make_hlrp_smolvla_shared_pre_post_processors
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.preprocess import Statistics, pad_width, prepare_images, stack_cameras

ACTION_IS_PAD = "action_is_pad"  # LeRobot's key, [B, T] bool: True past the episode's end
WEIGHTS_NAME = "model.safetensors"
SOURCE_NAME = "source.json"
CORE_PREFIX = "model."  # of the core's weights in WEIGHTS_NAME: the policy holds the core as `self.model`
FEATURES = {"state": keys.OBS_STATE, ACTION: keys.ACTION}  # LeRobot's feature of each statistics' name


# --- config -----------------------------------------------------------------------------------------------------------


def input_features(core: CoreConfig, image_shapes: dict[str, tuple[int, ...]]) -> dict[str, PolicyFeature]:
    """What the policy observes. image_shapes: (3, height, width) by camera; default: the model's square."""
    square = (3, core.image_size, core.image_size)
    features = {key: PolicyFeature(FeatureType.VISUAL, image_shapes.get(key, square)) for key in core.cameras}
    if core.state_dim:
        features[keys.OBS_STATE] = PolicyFeature(FeatureType.STATE, (core.state_dim,))
    return features


def output_features(core: CoreConfig) -> dict[str, PolicyFeature]:
    return {keys.ACTION: PolicyFeature(FeatureType.ACTION, (core.action_dim,))}


@PreTrainedConfig.register_subclass("hlrp_smolvla_shared")
@dataclass
class HLRPSmolVLASharedConfig(PreTrainedConfig):
    """LeRobot's view of a core: the core's config, and how its action chunks are executed."""

    # The model; rebuilds it offline.
    core: CoreConfig = field(kw_only=True)
    # Actions executed of each chunk before the next chunk is generated.
    n_action_steps: int = 10
    # Cameras that an observation may lack; their tokens are then masked. All other cameras are required.
    optional_cameras: tuple[str, ...] = ()
    # select_action's noise is a function of this seed + the episode's number since eval(), and of the step since
    # reset(): lerobot-eval with --seed and this one equal acts as rollout.py. None: drawn anew.
    noise_seed: int | None = None
    # How each kind of feature is normalised, as in training.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    push_to_hub: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.core.action_dim:
            raise ValueError("this core has no action head (action_dim 0), it cannot act: run train_stage3.py on it")
        if not 1 <= self.n_action_steps <= self.core.chunk_size:
            raise ValueError(
                f"n_action_steps {self.n_action_steps} must be between 1 and the chunk_size of the model, "
                f"{self.core.chunk_size}"
            )
        if not set(self.optional_cameras) < set(self.core.cameras):
            raise ValueError(
                f"optional_cameras {list(self.optional_cameras)} must be some, not all, of the model's cameras "
                f"{list(self.core.cameras)}"
            )
        self.input_features = self.input_features or input_features(self.core, {})
        self.output_features = self.output_features or output_features(self.core)

    def validate_features(self) -> None:
        """Raise ValueError if the features, which LeRobot sets from a dataset or environment, do not fit the core."""

        def describe(inputs: dict[str, PolicyFeature], outputs: dict[str, PolicyFeature]) -> dict[str, Any]:
            cameras = {key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL}
            return {
                "cameras": sorted(cameras | set(self.optional_cameras)),
                "state": list(inputs[keys.OBS_STATE].shape) if keys.OBS_STATE in inputs else None,
                "action": list(outputs[keys.ACTION].shape) if keys.ACTION in outputs else None,
            }

        model = describe(input_features(self.core, {}), output_features(self.core))
        found = describe(self.input_features, self.output_features)
        if model != found:
            raise ValueError(
                f"the model was built for {model}, the dataset or environment has {found}: use one that fits, or map "
                "its names with --rename_map"
            )

    @property
    def observation_delta_indices(self) -> None:
        return None  # only the present observation, without a time dimension

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.core.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        optim = OptimConfig()
        return AdamWConfig(
            lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, grad_clip_norm=optim.max_grad_norm
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        optim = OptimConfig()
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=optim.lr,
            decay_lr=optim.lr * optim.final_lr_share,
            num_warmup_steps=WARMUP_STEPS,
            num_decay_steps=RunConfig.steps,
        )


# --- policy -----------------------------------------------------------------------------------------------------------


def check_has(batch: dict[str, Any], needed: list[str]) -> None:
    missing = [key for key in needed if key not in batch]
    if missing:
        raise ValueError(
            f"the policy needs {needed}, but {missing} is missing from the batch, which has {sorted(batch)}: "
            "pass it, or map your names with --rename_map; cameras that may be missing go into optional_cameras"
        )


def to_batch(observation: dict[str, Tensor], core: CoreConfig, optional_cameras: tuple[str, ...] = ()) -> Batch:
    """A preprocessed LeRobot batch -> the core's Batch, without targets.

    Images are [B, 3, h, w] in [0, 1] or uint8, the state [B, state_dim] is normalised, the text is tokenised. Missing
    optional cameras become masked images behind the others, as in SmolVLA: their special tokens are not masked.
    Raises ValueError for any other missing camera, state or text.
    """
    present = [key for key in core.cameras if key in observation or key not in optional_cameras]
    state_keys = [keys.OBS_STATE] if core.state_dim else []
    check_has(observation, [*present, *state_keys, keys.OBS_LANGUAGE_TOKENS, keys.OBS_LANGUAGE_ATTENTION_MASK])
    prepared = [prepare_images(observation[key], core.image_size) for key in present]
    images, image_mask = stack_cameras(prepared + [None] * (len(core.cameras) - len(present)))
    state = torch.zeros(len(images), core.max_state_dim, device=images.device)
    if core.state_dim:
        if observation[keys.OBS_STATE].shape != (len(images), core.state_dim):
            raise ValueError(
                f"{keys.OBS_STATE} is {list(observation[keys.OBS_STATE].shape)}, the model expects "
                f"[{len(images)}, {core.state_dim}]"
            )
        state = pad_width(observation[keys.OBS_STATE], core.max_state_dim)
    return Batch(
        images=images,
        image_mask=image_mask,
        text=observation[keys.OBS_LANGUAGE_TOKENS],
        text_mask=observation[keys.OBS_LANGUAGE_ATTENTION_MASK],
        state=state,
        state_mask=torch.full((len(images),), core.state_dim > 0, device=images.device),
        targets={},
    )


class HLRPSmolVLASharedPolicy(PreTrainedPolicy):
    """Executes the first `n_action_steps` of each of the core's action chunks. LeRobot's own loop can train it."""

    config_class = HLRPSmolVLASharedConfig
    name = "hlrp_smolvla_shared"

    def __init__(self, config: HLRPSmolVLASharedConfig, dataset_stats: Any = None, dataset_meta: Any = None):
        """LeRobot's factory passes dataset_stats and dataset_meta to every policy; both are unused."""
        super().__init__(config)
        config.validate_features()
        self.model = SmolVLASharedCore(config.core)
        self.first_episode = self.num_episodes = 0  # the first of the episodes that run now, and how many run
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: HLRPSmolVLASharedConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "HLRPSmolVLASharedPolicy":
        """A policy from a local directory or, if there is none of this name, from the hub.

        Raises ValueError if a file is missing or the weights are not exactly those of the config's model.
        """
        directory = find_directory("policy", pretrained_name_or_path, ("config.json", WEIGHTS_NAME), revision)
        config = config or PreTrainedConfig.from_pretrained(directory)
        if not isinstance(config, cls.config_class):
            raise ValueError(f"{directory} holds a policy of type {config.type}, expected {cls.name}")
        policy = cls(config, **kwargs)
        found = load_file(directory / WEIGHTS_NAME)
        check_weights(str(directory), expected=policy.state_dict(), found=found)
        policy.load_state_dict(found)
        return policy.to(config.device).eval()

    def get_optim_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def reset(self) -> None:
        """Forget the actions not yet executed. LeRobot calls this when an episode begins."""
        self.queue: deque[Tensor] = deque()  # actions [B, A]
        self.step = 0
        self.first_episode, self.num_episodes = self.first_episode + self.num_episodes, 0

    def train(self, mode: bool = True) -> "HLRPSmolVLASharedPolicy":
        """As of every module; episodes are counted anew. LeRobot calls eval() before the first one of each task."""
        self.first_episode = self.num_episodes = 0
        return super().train(mode)

    def forward(
        self,
        batch: dict[str, Tensor],
        reduction: str = "mean",
        noise: Tensor | None = None,  # [B, T, max_action_dim]
        time: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, dict[str, float]]:
        """The flow-matching loss of the normalised action chunks batch["action"] [B, T, A]: a scalar, or [B] for
        reduction "none". Actions marked in batch["action_is_pad"] and padded dimensions do not count.
        """
        core = self.config.core
        check_has(batch, [keys.ACTION, ACTION_IS_PAD])
        data, actions = to_batch(batch, core, self.config.optional_cameras), batch[keys.ACTION]
        if actions.shape[1:] != (core.chunk_size, core.action_dim):
            raise ValueError(
                f"{keys.ACTION} is {list(actions.shape)}, the model expects [B, {core.chunk_size}, {core.action_dim}]"
            )
        value, mask = pad_width(actions, core.max_action_dim), ~batch[ACTION_IS_PAD]
        if noise is None:
            noise = torch.randn_like(value)
        if time is None:
            beta = torch.distributions.Beta(core.time_beta_alpha, core.time_beta_beta)
            time = flow.training_time(beta.sample((len(value),)).to(value.device))
        data.targets = {ACTION: FlowTarget(value, mask, noise[:, None], time[:, None])}
        errors = self.model(data)[ACTION]  # [B, T]
        if reduction == "none":
            loss = (errors * mask).sum(1) / mask.sum(1).clamp(min=1)
        else:
            loss = losses.masked_mean(errors, mask)
        return loss, {"loss": loss.mean().item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """A chunk of normalised actions [B, T, A], generated from noise [B, T, max_action_dim] (default: drawn)."""
        core = self.config.core
        data = to_batch(batch, core, self.config.optional_cameras)
        if noise is None:
            noise = torch.randn(len(data), core.chunk_size, core.max_action_dim, device=data.images.device)
        return self.model.sample(data, ACTION, noise)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The next normalised action [B, A]. Generates a chunk when n_action_steps of the last one are executed."""
        if not self.queue:
            noise = self.seeded_noise(batch) if noise is None else noise
            chunk = self.predict_action_chunk(batch, noise)
            self.queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        self.step += 1
        return self.queue.popleft()

    def seeded_noise(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Noise [B, T, max_action_dim] of config.noise_seed for the episodes that run now; None without a seed."""
        check_has(batch, [keys.OBS_LANGUAGE_TOKENS])
        text, core, seed = batch[keys.OBS_LANGUAGE_TOKENS], self.config.core, self.config.noise_seed
        self.num_episodes = len(text)
        if seed is None:
            return None
        first, shape = seed + self.first_episode, (core.chunk_size, core.max_action_dim)
        noise = [flow.episode_noise(first + i, self.step, shape) for i in range(len(text))]
        return torch.stack(noise).to(text.device)


# --- files -----------------------------------------------------------------------------------------------------------


def save_policy(
    directory: Path,
    core: CoreConfig,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    statistics: dict[str, Statistics],
    n_action_steps: int,
    source: dict[str, Any],
    image_shapes: dict[str, tuple[int, ...]] | None = None,
    optional_cameras: tuple[str, ...] = (),
    rename_map: dict[str, str] | None = None,
) -> None:
    """Write a core as a LeRobot policy: config, weights and processors; and source.json.

    weights:          the core's state_dict
    statistics:       of "action" and, if the core has a state, "state"
    source:           where the weights are from: JSON, for people
    image_shapes:     (3, height, width) of each camera as recorded, to which LeRobot's policy server stretches the
                      images that it receives. Default: the model's squares
    optional_cameras: cameras that an observation may lack
    rename_map:       {name of an observation as it arrives: our name}
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = HLRPSmolVLASharedConfig(
        core=core,
        n_action_steps=n_action_steps,
        optional_cameras=optional_cameras,
        input_features=input_features(core, image_shapes or {}),
        device=auto_select_torch_device().type,
    )
    config.save_pretrained(directory)
    write_weights(directory / WEIGHTS_NAME, {CORE_PREFIX + key: value for key, value in weights.items()})
    write_text(directory / SOURCE_NAME, json.dumps(source, indent=2) + "\n")
    stats = lerobot_stats(statistics)
    for processor in make_hlrp_smolvla_shared_pre_post_processors(config, stats, tokenizer, rename_map):
        processor.save_pretrained(directory)


def lerobot_stats(statistics: dict[str, Statistics]) -> dict[str, dict[str, Tensor]]:
    """Statistics of state and action as LeRobot's processors take them: {feature: {"mean": [A], "std": [A]}}."""
    return {
        feature: dict(zip(("mean", "std"), statistics[name].tensors(), strict=True))
        for name, feature in FEATURES.items()
        if name in statistics
    }


@dataclass(frozen=True)
class SavedPolicy:
    """A saved policy, in the core's terms."""

    config: HLRPSmolVLASharedConfig
    weights: dict[str, Tensor]  # the core's state_dict
    tokenizer: PreTrainedTokenizerFast
    statistics: dict[str, Statistics]  # of "action" and, if the core has a state, "state"
    rename_map: dict[str, str]  # {name of an observation as it arrives: our name}


def load_saved(name: str) -> SavedPolicy:
    """Read a policy back from its directory or hub id. Raises ValueError as HLRPSmolVLASharedPolicy.from_pretrained."""
    from lerobot.policies.factory import make_pre_post_processors

    policy = HLRPSmolVLASharedPolicy.from_pretrained(name)
    preprocessor, _ = make_pre_post_processors(policy.config, name)
    rename, _, tokenize, _, normalize = preprocessor.steps
    statistics = {
        name: Statistics(*(torch.as_tensor(normalize.stats[feature][of]).tolist() for of in ("mean", "std")))
        for name, feature in FEATURES.items()
        if feature in normalize.stats
    }
    return SavedPolicy(policy.config, policy.model.state_dict(), tokenize.tokenizer, statistics, rename.rename_map)
