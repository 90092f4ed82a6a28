"""The LeRobot config `hlrp_smolvla_shared`: the model, how its chunks are executed, what lerobot-train starts from."""

from dataclasses import dataclass, field, replace
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.configs.policies import PreTrainedConfig
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils import constants as keys
from lerobot.utils.feature_utils import dataset_to_policy_features

from smolvla_shared.config import ACTION, PRESETS, WARMUP_STEPS, CoreConfig, ModelConfig, OptimConfig, RunConfig
from smolvla_shared.data import vector_names

FEATURES = {"state": keys.OBS_STATE, ACTION: keys.ACTION}  # LeRobot's feature of each statistics' name
OPTIM = OptimConfig()


def input_features(core: CoreConfig, image_shapes: dict[str, tuple[int, ...]]) -> dict[str, PolicyFeature]:
    """What the policy observes. image_shapes: (3, height, width) by camera; default: the model's square."""
    square = (3, core.image_size, core.image_size)
    features = {key: PolicyFeature(FeatureType.VISUAL, image_shapes.get(key, square)) for key in core.cameras}
    if core.state_dim:
        features[keys.OBS_STATE] = PolicyFeature(FeatureType.STATE, (core.state_dim,))
    return features


def output_features(core: CoreConfig) -> dict[str, PolicyFeature]:
    return {keys.ACTION: PolicyFeature(FeatureType.ACTION, (core.action_dim,))}


def feature_names(features: dict[str, dict[str, Any]]) -> dict[str, tuple[str, ...] | None]:
    """The names of the dimensions of "state" and "action" in a dataset with these features; None: it has none."""
    return {name: vector_names(features[key]) for name, key in FEATURES.items() if key in features}


def lerobot_modes(modes: dict[str, str]) -> dict[str, NormalizationMode]:
    """LeRobot's normalization_mapping of our modes (config.NormalizationMode) of "state" and "action"."""
    of = {name: NormalizationMode(modes.get(name, "mean_std").upper()) for name in FEATURES}
    return {"VISUAL": NormalizationMode.IDENTITY, "STATE": of["state"], "ACTION": of[ACTION]}


@PreTrainedConfig.register_subclass("hlrp_smolvla_shared")
@dataclass
class HLRPSmolVLASharedConfig(PreTrainedConfig):
    """LeRobot's view of a core: the core's config, and how its action chunks are executed.

    Without a core it describes a fresh policy, which LeRobot builds for a dataset: see `starting_model`.
    """

    # The model; rebuilds it offline. None: the policy builds it for the dataset that it is made for.
    core: CoreConfig | None = None
    # Actions in a chunk, and Euler steps that generate it. Default: the core's, or those of CoreConfig. Stated values
    # move into the core and are None afterwards.
    chunk_size: int | None = None
    num_steps: int | None = None
    # Actions executed of each chunk before the next chunk is generated.
    n_action_steps: int = 10
    # Cameras that an observation may lack; their tokens are then masked. All other cameras are required.
    optional_cameras: tuple[str, ...] = ()
    # select_action's noise is a function of this seed + the episode's number since eval(), and of the step since
    # reset(): lerobot-eval with --seed and this one equal acts as rollout.py. None: drawn anew.
    noise_seed: int | None = None
    # Actions a second in the training data; None: not recorded.
    fps: float | None = None
    # Names of the dimensions, in order, where the training data names them.
    action_feature_names: tuple[str, ...] | None = None
    state_feature_names: tuple[str, ...] | None = None
    # The robot that it acts with, where the training data names it.
    robot: str | None = None
    # Robots that one model was trained on. Each is a policy in the directory robots/<name>, with widths and statistics
    # of its own; this one, which has none, cannot act.
    robots: tuple[str, ...] = ()
    # How each kind of feature is normalised, as in training.
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=lambda: lerobot_modes({}))
    # Whether the actions that the model gives are relative to the state of the observation that it saw; those with one
    # of these texts in their names are not. LeRobot's processor steps add the state.
    relative_actions: bool = False
    absolute_actions: tuple[str, ...] = ()
    # Real-time chunking (arXiv 2506.07339); lerobot-rollout --inference.type=rtc sets it.
    rtc_config: RTCConfig | None = None
    push_to_hub: bool = False
    # Compile the sampler as one graph for each shape of an observation, the first at load, and the layers that train.
    # On a GPU the modes max-autotune and reduce-overhead run it as one CUDA graph. As in LeRobot's SmolVLA.
    compile_model: bool = False
    compile_mode: str = "max-autotune"

    # A fresh policy starts from one of these; None: from the trunk. A policy that has a core refuses them.
    # Weights file of a Stage 2 artifact: training is Stage 3 in LeRobot's own loop.
    stage2_artifact: str | None = None
    # SmolVLA policy of LeRobot's or policy of this project, by directory or hub id; or a Stage 2 artifact.
    init_from: str | None = None
    # The trunk's hub id or directory, or `tiny`. Default: that of the above, else SmolVLM2-500M.
    vlm_model_name: str | None = None
    # Whether a fresh policy reads the dataset's state.
    use_state: bool = True

    # What training leaves as it is. Default: the trunk, if it is pretrained.
    freeze_vision_encoder: bool | None = None
    train_expert_only: bool | None = None  # freezes the whole trunk
    train_state_proj: bool = True

    optimizer_lr: float = OPTIM.lr
    optimizer_betas: tuple[float, float] = OPTIM.betas
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = OPTIM.weight_decay
    optimizer_grad_clip_norm: float = OPTIM.max_grad_norm
    scheduler_warmup_steps: int = WARMUP_STEPS
    scheduler_decay_steps: int = RunConfig.steps
    scheduler_decay_lr: float = OPTIM.lr * OPTIM.final_lr_share

    def __post_init__(self):
        super().__post_init__()
        if self.core:
            self._take_core()
        if not 1 <= self.n_action_steps <= self.num_actions:
            raise ValueError(
                f"n_action_steps {self.n_action_steps} must be between 1 and the chunk_size of the model, "
                f"{self.num_actions}"
            )

    def _take_core(self) -> None:
        """Move stated options into the core. Raises ValueError for what a policy with a core cannot have."""
        stated = {"chunk_size": self.chunk_size, "flow_steps": self.num_steps}
        self.core = replace(self.core, **{name: value for name, value in stated.items() if value is not None})
        self.chunk_size = self.num_steps = None
        self.output_features = self.output_features or output_features(self.core)
        if self.input_features is not None:  # None: LeRobot's way to ask for those of the dataset
            self.input_features = self.input_features or input_features(self.core, {})
        if not self.core.action_dim:
            raise ValueError("this core has no action head (action_dim 0), it cannot act: run train_stage3.py on it")
        if start := [n for n in ("stage2_artifact", "init_from", "vlm_model_name") if getattr(self, n) is not None]:
            raise ValueError(
                f"this policy has weights already, {', '.join(start)} would give it others: start a fresh one with "
                "--policy.type=hlrp_smolvla_shared instead of --policy.path"
            )
        if self.optional_cameras and not set(self.optional_cameras) < set(self.core.cameras):
            raise ValueError(
                f"optional_cameras {list(self.optional_cameras)} must be some, not all, of the model's cameras "
                f"{list(self.core.cameras)}"
            )

    def refuse_several(self) -> None:
        """Raise ValueError if it is open which robot the policy acts with."""
        if self.robots:
            raise ValueError(
                f"which robot? This policy was trained on {', '.join(self.robots)}: pass --robot <name> to rollout.py, "
                f"and elsewhere one of them, robots/{self.robots[0]} in the policy's directory or repository"
            )

    @property
    def num_actions(self) -> int:
        """Actions in a chunk."""
        return self.core.chunk_size if self.core else self.chunk_size or CoreConfig.chunk_size

    @property
    def starting_model(self) -> ModelConfig:
        """What a fresh policy starts from and what of it is frozen, as the options of train_stage3.py say it."""
        preset = self.vlm_model_name if self.vlm_model_name in PRESETS else None
        return ModelConfig(
            preset=preset,
            name=None if preset else self.vlm_model_name,
            init_from=self.init_from,
            freeze_vision=self.freeze_vision_encoder,
            freeze_trunk=self.train_expert_only,
            freeze_state_projection=not self.train_state_proj,
            use_state=self.use_state,
            compile=self.compile_model,
        )

    def set_dataset_feature_metadata(self, features: dict[str, dict[str, Any]]) -> None:
        """Fit the policy to a dataset with these features. LeRobot calls this before it trains a policy on it.

        State and action may have other widths than before: the weights are padded. Cameras are the policy's own unless
        the config has no input features (--policy.input_features=null): then the dataset's cameras take the places of
        the policy's, in order.

        Raises ValueError for relative actions, of which the statistics of a dataset are not.
        """
        if self.relative_actions:
            raise ValueError(
                "lerobot-train would normalise relative actions by the dataset's statistics of absolute ones: use "
                "train_stage3.py --relative-actions, with --init-from for a policy that goes on"
            )
        found = dataset_to_policy_features(features)
        # LeRobot does not say at which rate its dataset is, and of which robot.
        names, self.fps, self.robot = feature_names(features), None, None
        self.action_feature_names, self.state_feature_names = names.get(ACTION), names.get("state")
        if keys.OBS_STATE in (self.input_features or {}) and keys.OBS_STATE in found:
            self.input_features[keys.OBS_STATE] = found[keys.OBS_STATE]
        if self.core is None:
            return
        cameras = tuple(self.image_features)
        if cameras != self.core.cameras:
            self.optional_cameras = tuple(camera for camera in self.optional_cameras if camera in cameras)
        state, has_state = found.get(keys.OBS_STATE), self.core.state_dim > 0
        dims = {"state_dim": state.shape[0]} if has_state and state else {}
        dims |= {"action_dim": found[keys.ACTION].shape[0]} if keys.ACTION in found else {}
        self.core = replace(self.core, cameras=cameras or self.core.cameras, **dims)

    def validate_features(self) -> None:
        """Raise ValueError if the features, which LeRobot sets from a dataset or environment, do not fit the core."""

        def describe(inputs: dict[str, PolicyFeature], outputs: dict[str, PolicyFeature]) -> dict[str, Any]:
            cameras = {key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL}
            has_state = keys.OBS_STATE in inputs and self.core.state_dim
            return {
                "cameras": sorted(cameras | set(self.optional_cameras)),
                "state": list(inputs[keys.OBS_STATE].shape) if has_state else None,
                "action": list(outputs[keys.ACTION].shape) if keys.ACTION in outputs else None,
            }

        model = describe(input_features(self.core, {}), output_features(self.core))
        found = describe(self.input_features, self.output_features)
        if model != found:
            raise ValueError(
                f"the model was built for {model}, the dataset or environment has {found}: use one that fits, map its "
                "names with --rename_map, or train on it with --policy.input_features=null"
            )

    @property
    def observation_delta_indices(self) -> None:
        return None  # only the present observation, without a time dimension

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.num_actions))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )


# LeRobot looks for the policy and its processors in the module that this class names.
HLRPSmolVLASharedConfig.__module__ = "smolvla_shared.lerobot_policy"
