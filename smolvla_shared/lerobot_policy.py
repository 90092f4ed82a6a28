"""The LeRobot policy `hlrp_smolvla_shared` around a `SmolVLASharedCore`. LeRobot's commands find its config, the policy
and its processors by their names in this module.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils import constants as keys
from torch import Tensor, nn

from smolvla_shared import flow, losses
from smolvla_shared.batch import Batch, FlowTarget, map_tensors
from smolvla_shared.config import ACTION, CoreConfig
from smolvla_shared.initial import open_initial
from smolvla_shared.lerobot_card import DescribedPolicy, read_source
from smolvla_shared.lerobot_config import FEATURES, HLRPSmolVLASharedConfig, input_features
from smolvla_shared.lerobot_files import POLICY_TYPE, find_policy, load_config, load_weights
from smolvla_shared.lerobot_processor import make_hlrp_smolvla_shared_pre_post_processors  # noqa: F401
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import frozen_parts, prepare_to_train
from smolvla_shared.preprocess import TEXT_MULTIPLE, pad_width, prepare_images, stack_cameras

CUDA_GRAPH_MODES = "max-autotune", "reduce-overhead"  # of torch.compile

ACTION_IS_PAD = "action_is_pad"  # LeRobot's key, [B, T] bool: True past the episode's end


def check_has(batch: dict[str, Any], needed: list[str]) -> None:
    missing = [key for key in needed if key not in batch]
    if missing:
        raise ValueError(
            f"the policy needs {needed}, but {missing} is missing from the batch, which has {sorted(batch)}: "
            "pass it, or map your names with --rename_map; cameras that may be missing go into optional_cameras"
        )


def check_thread(config: HLRPSmolVLASharedConfig) -> None:
    """Raise ValueError where a compiled policy would use CUDA graphs in a thread. PyTorch keeps what belongs to them in
    the thread that has imported them, and fails in others (torch/_inductor/cudagraph_trees.py: get_obj).
    """
    has_graphs = torch.device(config.device).type == "cuda" and config.compile_mode in CUDA_GRAPH_MODES
    if has_graphs and threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"a policy compiled with compile_mode {config.compile_mode} runs as a CUDA graph, which PyTorch cannot use "
            f"in the thread {threading.current_thread().name}, such as a policy server's: set compile_mode to "
            "max-autotune-no-cudagraphs in its config.json, or compile_model to false, and remove manifest.json"
        )


def _without_time(observation: Tensor, ndim: int) -> Tensor:
    """An observation without the time dimension of 1 that some of LeRobot's datasets and robots give."""
    return observation[:, 0] if observation.ndim == ndim + 1 and observation.shape[1] == 1 else observation


def to_batch(observation: dict[str, Tensor], core: CoreConfig, optional_cameras: tuple[str, ...] = ()) -> Batch:
    """A preprocessed LeRobot batch -> the core's Batch, without targets.

    Images are [B, 3, h, w] in [0, 1] or uint8, the state [B, state_dim] is normalised, the text is tokenised; images
    and state may have a time dimension of 1 behind B. Missing optional cameras become masked images behind the others,
    as in SmolVLA: their special tokens are not masked.
    Raises ValueError for any other missing camera, state or text.
    """
    present = [key for key in core.cameras if key in observation or key not in optional_cameras]
    state_keys = [keys.OBS_STATE] if core.state_dim else []
    check_has(observation, [*present, *state_keys, keys.OBS_LANGUAGE_TOKENS, keys.OBS_LANGUAGE_ATTENTION_MASK])
    prepared = [prepare_images(_without_time(observation[key], ndim=4), core.image_size) for key in present]
    images, image_mask = stack_cameras(prepared + [None] * (len(core.cameras) - len(present)))
    state = torch.zeros(len(images), core.max_state_dim, device=images.device)
    if core.state_dim:
        found = _without_time(observation[keys.OBS_STATE], ndim=2)
        if found.shape != (len(images), core.state_dim):
            raise ValueError(
                f"{keys.OBS_STATE} is {list(found.shape)}, the model expects [{len(images)}, {core.state_dim}]"
            )
        state = pad_width(found.float(), core.max_state_dim)
    return Batch(
        images=images,
        image_mask=image_mask,
        text=observation[keys.OBS_LANGUAGE_TOKENS],
        text_mask=observation[keys.OBS_LANGUAGE_ATTENTION_MASK],
        state=state,
        state_mask=torch.full((len(images),), core.state_dim > 0, device=images.device),
        targets={},
    )


class HLRPSmolVLASharedPolicy(DescribedPolicy, PreTrainedPolicy):
    """Executes the first `n_action_steps` of each of the core's action chunks. LeRobot's own loop can train it."""

    config_class = HLRPSmolVLASharedConfig
    name = POLICY_TYPE
    _action_queue_attrs = ("queue",)  # what LeRobot (after 0.6.1) empties when the instruction changes

    def __init__(self, config: HLRPSmolVLASharedConfig, dataset_stats: Any = None, dataset_meta: Any = None):
        """A policy with the config's core at random weights; without a core, a fresh policy for the config's features.

        LeRobot's factory passes dataset_stats and dataset_meta to every policy; both are unused.
        """
        super().__init__(config)
        config.refuse_several()
        if config.core is None:
            self.model = self._build()
        else:
            config.input_features = config.input_features or input_features(config.core, {})
            config.validate_features()
            if "language layers" not in frozen_parts(config.starting_model, config.core, {ACTION}):
                config.core = replace(config.core, torch_dtype="float32")  # as is all that trains
            self.model = SmolVLASharedCore(config.core)
            prepare_to_train(self.model, config.starting_model, {ACTION})
        self.init_rtc_processor()
        self.first_episode = self.num_episodes = 0  # the first of the episodes that run now, and how many run
        self.reset()

    @cached_property
    def compiled_sample(self) -> Callable[..., Tensor]:
        options = {"mode": self.config.compile_mode, "fullgraph": True, "dynamic": False}
        return torch.compile(self.model.sample, **options)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: it compiles for itself, the compiled function is bound to the weights of this one."""
        return {name: value for name, value in self.__dict__.items() if name != "compiled_sample"}

    def _build(self) -> SmolVLASharedCore:
        """A fresh core for the config's features, as train_stage3.py makes it. The config then has this core.

        Raises ValueError where the features lack cameras or actions, or the starting weights do not fit.
        """
        config = self.config
        if not (config.image_features and config.action_feature):
            raise ValueError(
                f"a fresh {self.name} needs the cameras and the actions of a dataset, got the features "
                f"{sorted(config.input_features or {})} and {sorted(config.output_features or {})}: train it with "
                "lerobot-train on a dataset that has both, or load a trained one with --policy.path"
            )
        artifact = Path(config.stage2_artifact) if config.stage2_artifact else None
        initial = open_initial(config.starting_model, artifact)
        # Its own cameras where the dataset has them all; else the dataset's take their places, in order.
        own, found = initial.core.cameras, tuple(config.image_features)
        state = config.robot_state_feature if config.use_state else None
        dims = {"chunk_size": config.num_actions, "action_dim": config.action_feature.shape[0]}
        dims |= {"state_dim": state.shape[0] if state else 0}
        dims |= {"flow_steps": config.num_steps} if config.num_steps else {}
        core = initial.build(config.starting_model, own if own and set(own) <= set(found) else found, {ACTION}, **dims)
        logging.info(initial.describe(core))
        modes = {kind: mode.value.lower() for kind, mode in config.normalization_mapping.items()}
        for name in FEATURES.keys() & initial.statistics.keys():
            if (own := initial.statistics[name].mode) != modes[name.upper()]:
                logging.warning(
                    f"{initial.name} has learned with its {name} normalised by {own}, here it is by "
                    f"{modes[name.upper()]}: --policy.normalization_mapping can keep it"
                )
        self.source = initial.provenance
        config.stage2_artifact = config.init_from = config.vlm_model_name = config.chunk_size = config.num_steps = None
        config.core = core.config
        shapes = {key: feature.shape for key, feature in config.image_features.items()}
        config.input_features = input_features(core.config, shapes)  # without those that it does not read
        config._tokenizer = initial.tokenizer  # for the processors, which LeRobot makes from the config alone
        return core

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: HLRPSmolVLASharedConfig | None = None,
        strict: bool = True,
        cli_overrides: list[str] | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "HLRPSmolVLASharedPolicy":
        """A policy from a local directory or, if there is none of this name, from the hub. Loading is always strict.

        cli_overrides: such as ["--n_action_steps=5"], where no config is given
        kwargs:        for the constructor; resume_download and proxies, which the hub's client no longer takes, are
                       ignored

        Raises ValueError if a file is missing or the weights are not exactly those of the config's model.
        """
        if not strict:
            logging.warning(f"{cls.name}: strict=False makes no difference, missing weights are always an error")
        hub = {"force_download": force_download, "token": token, "cache_dir": cache_dir, "revision": revision}
        directory = find_policy(pretrained_name_or_path, **hub, local_files_only=local_files_only)
        config = config or load_config(directory, cli_overrides)
        if config.use_peft and config.pretrained_path not in (None, Path(pretrained_name_or_path)):
            # LeRobot loads an adapter's base, and builds the adapter's processors next.
            hub["revision"] = config.pretrained_revision
            find_policy(config.pretrained_path, **hub, local_files_only=local_files_only)
        weights = load_weights(directory, config.core)  # before a model of the size that a file states takes memory
        kwargs = {name: value for name, value in kwargs.items() if name not in ("resume_download", "proxies")}
        policy = cls(config, **kwargs)
        policy.model.load_state_dict(weights)
        policy.source = read_source(directory)
        policy = policy.to(config.device).eval()
        if config.compile_model:
            policy._warm_up()
        return policy

    def get_optim_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """LoRA on the expert's attention and on what is the robot's: state projection and action head."""
        head = r"action_head\.(in_proj|out_proj|time_mlp_in|time_mlp_out)"
        return {"target_modules": rf"model\.(expert\..*\.(q|v)_proj|state_proj|{head})"}

    def reset(self) -> None:
        """Forget the actions not yet executed. LeRobot calls this when an episode begins."""
        self.queue: deque[Tensor] = deque()  # actions [B, A]
        self.origin: Tensor | None = None  # action 0 relative to the state that they are relative to, normalised [B, A]
        self.is_first_observation = True
        self.step = 0
        self.first_episode, self.num_episodes = self.first_episode + self.num_episodes, 0

    def train(self, mode: bool = True) -> "HLRPSmolVLASharedPolicy":
        """As of every module; episodes are counted anew. LeRobot calls eval() before the first one of each task."""
        self.first_episode = self.num_episodes = 0
        return super().train(mode)

    # --- training -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: dict[str, Tensor],
        reduction: str = "mean",
        noise: Tensor | None = None,  # [B, T, max_action_dim]
        time: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, dict[str, float]]:
        """The flow-matching loss of the normalised action chunks batch["action"] [B, T, A]: a scalar, or [B] for
        reduction "none". Actions marked in batch["action_is_pad"] (default: none) and padded dimensions do not count.
        """
        core = self.config.core
        check_has(batch, [keys.ACTION])
        data, actions = to_batch(batch, core, self.config.optional_cameras), batch[keys.ACTION]
        if actions.shape[1:] != (core.chunk_size, core.action_dim):
            raise ValueError(
                f"{keys.ACTION} is {list(actions.shape)}, the model expects [B, {core.chunk_size}, {core.action_dim}]"
            )
        value = pad_width(actions.float(), core.max_action_dim)
        is_pad = batch.get(ACTION_IS_PAD)
        mask = torch.ones_like(value[..., 0], dtype=torch.bool) if is_pad is None else ~is_pad
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

    # --- acting -------------------------------------------------------------------------------------------------------

    def supports_rtc(self) -> bool:
        return True

    def init_rtc_processor(self) -> None:
        """LeRobot calls this after it has set `config.rtc_config`. Raises ValueError if the policy is compiled."""
        if self.rtc_enabled and self.config.compile_model:
            raise ValueError(
                "real-time chunking takes gradients in each Euler step, which a compiled sampler has not: leave "
                "--policy.compile_model out, or real-time chunking"
            )
        self.rtc_processor = RTCProcessor(self.config.rtc_config) if self.config.rtc_config else None

    @property
    def rtc_enabled(self) -> bool:
        return self.config.rtc_config is not None and self.config.rtc_config.enabled

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """A chunk of normalised actions [B, T, A], generated from noise [B, T, max_action_dim] (default: drawn).

        With real-time chunking (rtc_config) LeRobot's processor guides it towards what is left of the last chunk:

        inference_delay:      actions of it that are executed before this chunk is there
        prev_chunk_left_over: normalised actions [B, T', A] not yet executed; None: there is no last chunk
        execution_horizon:    actions over which the guidance fades out

        Raises ValueError for images that are not in [0, 1] at the first observation after `reset`, and for a chunk that
        is not finite.
        """
        core = self.config.core
        if self.is_first_observation:
            self._check_images(batch)
            self.is_first_observation = False
        data = to_batch(batch, core, self.config.optional_cameras)
        if noise is None:
            noise = torch.randn(len(data), core.chunk_size, core.max_action_dim, device=data.images.device)
        guide = None
        if self.rtc_enabled:

            def guide(velocity: flow.Velocity, x_t: Tensor, time: Tensor) -> Tensor:
                return self.rtc_processor.denoise_step(
                    x_t=x_t,
                    prev_chunk_left_over=prev_chunk_left_over,
                    inference_delay=inference_delay,
                    time=time[0].item(),
                    original_denoise_step_partial=lambda x_t: velocity(x_t, time),
                    execution_horizon=execution_horizon,
                )

        if self.config.compile_model:
            check_thread(self.config)
            # Called in inference mode, as LeRobot's commands do, or with tensors made in it, it would be another graph.
            with torch.inference_mode(False), torch.no_grad():
                data, noise = map_tensors(lambda t: t.clone() if t.is_inference() else t, [data, noise])
                chunk = self.compiled_sample(data, ACTION, noise)
            chunk = chunk.clone()  # the next one overwrites a CUDA graph's output
        else:
            chunk = self.model.sample(data, ACTION, noise, guide=guide)
        if not chunk.isfinite().all():
            state = batch.get(keys.OBS_STATE)
            raise ValueError(
                f"the policy gave actions that are not finite; the normalised state is {state}: check the observation "
                "and the statistics of the policy's normaliser"
            )
        return chunk

    def blank_observation(self) -> dict[str, Tensor]:
        """One preprocessed observation of zeros, with a short text."""
        features = {key: feature.shape for key, feature in self.config.input_features.items()}
        seen = {key: torch.zeros(1, *shape, device=self.config.device) for key, shape in features.items()}
        text = torch.zeros(1, TEXT_MULTIPLE, dtype=torch.int64, device=self.config.device)
        return seen | {keys.OBS_LANGUAGE_TOKENS: text, keys.OBS_LANGUAGE_ATTENTION_MASK: text == 0}

    def _warm_up(self) -> None:
        """Compile now what the first step of an episode would wait for."""
        core, device = self.config.core, self.config.device
        noise = torch.zeros(1, core.chunk_size, core.max_action_dim, device=device)
        with torch.autocast(torch.device(device).type, enabled=self.config.use_amp):
            self.predict_action_chunk(self.blank_observation(), noise)
        self.reset()

    def _check_images(self, batch: dict[str, Tensor]) -> None:
        for camera in self.config.core.cameras:
            image = batch.get(camera)
            if image is not None and image.is_floating_point() and not (image.min() >= 0 and image.max() <= 1):
                raise ValueError(
                    f"{camera} has values from {image.min().item():.3g} to {image.max().item():.3g}: images are uint8, "
                    "or floats in [0, 1]"
                )

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The next normalised action [B, A]. Generates a chunk when n_action_steps of the last one are executed.

        Raises ValueError with real-time chunking, whose chunks overlap: use `predict_action_chunk`.
        """
        if self.rtc_enabled:
            raise ValueError("select_action cannot do real-time chunking: use predict_action_chunk")
        if not self.queue:
            noise = self.seeded_noise(batch) if noise is None else noise
            chunk = self.predict_action_chunk(batch, noise)
            self.queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
            self.origin = batch.get(keys.ACTION)
        self.step += 1
        action = self.queue.popleft()
        # What was relative to the state that the chunk saw becomes relative to this one, to which LeRobot adds it.
        return action + (batch[keys.ACTION] - self.origin) if self.config.relative_actions else action

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
