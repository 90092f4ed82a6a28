"""SmolVLASharedCore: one prefix pass, then one pass of the shared expert for each head."""

import os
import shutil
from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from smolvla_shared import flow, losses
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import ACTION, LATENT, PRESETS, CoreConfig, ModelConfig
from smolvla_shared.trunk import Expert, Prefix, Trunk, load_trunk_config

# What is frozen, counted and reported as one part, and the prefix of its parameters' names.
PARTS = {
    "vision tower": "trunk.vlm.vision_model.",
    "connector": "trunk.vlm.connector.",
    "language layers": "trunk.vlm.text_model.",
    "expert": "expert.",
    "state projection": "state_proj.",
    "latent head": "latent_head.",
    "action head": "action_head.",
}


class FlowHead(nn.Module):
    """Noisy tokens and time -> expert tokens, and expert tokens -> velocity; always float32.

    There are two instances: the latent head (S tokens of D) and the action head (T tokens of A, zero-padded).
    """

    def __init__(self, num_tokens: int, token_dim: int, real_dim: int, width: int, periods: tuple[float, float]):
        super().__init__()
        self.num_tokens, self.token_dim, self.real_dim = num_tokens, token_dim, real_dim
        self.periods = periods
        self.in_proj = nn.Linear(token_dim, width)
        self.time_mlp_in = nn.Linear(2 * width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, token_dim)

    def embed(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Noisy tokens [B, K, T, A] at times [B, K] -> expert tokens [B, K, T, width]."""
        with torch.autocast(x_t.device.type, enabled=False):
            tokens = self.in_proj(x_t)
            time = flow.time_embedding(time, tokens.shape[-1], *self.periods)[:, :, None].expand_as(tokens)
            return self.time_mlp_out(F.silu(self.time_mlp_in(torch.cat([tokens, time], dim=-1))))

    def velocity(self, hidden: Tensor) -> Tensor:
        """Expert output [B, K, T, width] -> velocity [B, K, T, A]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out_proj(hidden.float())


class SmolVLASharedCore(nn.Module):
    """The shared policy: SmolVLM prefix, expert, and a flow-matching head each for latent and real actions.

    A head exists if the config has its dimensions. `core(batch)` is the only training entry: DDP and FSDP act in
    `__call__`.
    """

    def __init__(self, config: CoreConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.expert = Expert(config)
        self.state_proj = nn.Linear(config.max_state_dim, self.trunk.hidden_size)
        width, periods = self.expert.width, (config.min_period, config.max_period)
        if config.latent_vector_dim:
            self.latent_head = FlowHead(config.code_seq_len, config.latent_dim, config.latent_dim, width, periods)
        if config.action_dim:
            self.action_head = FlowHead(config.chunk_size, config.max_action_dim, config.action_dim, width, periods)

    def head(self, name: str) -> FlowHead:
        return self.get_submodule(f"{name}_head")

    def encode(self, batch: Batch) -> Prefix:
        """The one pass over images, text and state."""
        state_token = self.state_proj(batch.state)
        return self.trunk(batch.images, batch.image_mask, batch.text, batch.text_mask, state_token, batch.state_mask)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The flow-matching error of every target token: {head: [B, T]}, averaged over draws and real dimensions.

        batch.masks says which tokens count; the caller applies the masks and averages (losses.masked_mean).
        """
        prefix = self.encode(batch)
        return {name: self.flow_error(self.head(name), target, prefix) for name, target in batch.targets.items()}

    def flow_error(self, head: FlowHead, target: FlowTarget, prefix: Prefix) -> Tensor:
        value = target.value[:, None].expand_as(target.noise)  # [B, K, T, A]
        x_t, u_t = flow.interpolate(value, target.noise, target.time)
        hidden, _ = self.expert(head.embed(x_t, target.time), prefix)
        v_t = head.velocity(hidden)
        # A loss on the padded action dimensions would only teach the head to output their noise.
        return losses.token_error(v_t[..., : head.real_dim], u_t[..., : head.real_dim])  # [B, T]

    @torch.no_grad()
    def sample(self, batch: Batch, name: str, noise: Tensor, num_steps: int | None = None) -> Tensor:
        """Generate one head's tokens from noise [B, T, A] by Euler integration: [B, T, real A], still normalised."""
        head = self.head(name)
        prefix = self.encode(batch)
        contexts = None

        def velocity(x_t: Tensor, time: Tensor) -> Tensor:
            nonlocal contexts
            hidden, contexts = self.expert(head.embed(x_t[:, None], time[:, None]), prefix, contexts)
            return head.velocity(hidden)[:, 0]

        return flow.euler_sample(velocity, noise, num_steps or self.config.flow_steps)[..., : head.real_dim]


def make_core_config(model: ModelConfig, cameras: tuple[str, ...], **dims) -> CoreConfig:
    """The CoreConfig of the --model options. dims: CoreConfig's data-dependent fields (state_dim, ...)."""
    name = model.stated_name or PRESETS["smolvlm2-500m"]
    vlm = load_trunk_config(name, model.revision)
    return CoreConfig(
        model_name=name,
        model_revision=model.revision,
        vlm=vlm,
        cameras=cameras,
        image_size=vlm["vision_config"]["image_size"],
        num_trunk_layers=min(CoreConfig.num_trunk_layers, vlm["text_config"]["num_hidden_layers"]),
        **dims,
    )


def layers(core: SmolVLASharedCore) -> list[GradientCheckpointingLayer]:
    """The transformer layers of vision tower, trunk and expert: checkpointed, compiled and sharded one by one."""
    vlm = core.trunk.vlm
    return [*vlm.vision_model.encoder.layers, *vlm.text_model.layers, *core.expert.layers]


def configure_layers(core: SmolVLASharedCore, model: ModelConfig) -> None:
    """Checkpoint and compile every layer as the --model options say; parameters keep their names and values.

    Raises ValueError if --model.compile finds no C++ compiler.
    """
    if model.activation_checkpointing:
        for layer in layers(core):
            layer.gradient_checkpointing = True
            # Without dropout there is no random state to keep.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if model.compile:
        compiler = os.environ.get("CXX", "g++")
        if not shutil.which(compiler):
            raise ValueError(
                f"--model.compile needs a C++ compiler, there is no {compiler}: install one (apt-get install g++), "
                "name yours in the environment variable CXX, or leave --model.compile out"
            )
        # Layers of one class share their compiled variants: one per head, in training and in sampling. These are more
        # than the 8 variants after which PyTorch runs uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for layer in layers(core):
            layer.compile()


def parameters_by_part(core: SmolVLASharedCore) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part that this core has: {part: {name: parameter}}."""
    named = dict(core.named_parameters())
    parts = {part: {n: p for n, p in named.items() if n.startswith(prefix)} for part, prefix in PARTS.items()}
    assert sum(len(parameters) for parameters in parts.values()) == len(named)
    return {part: parameters for part, parameters in parts.items() if parameters}


def freeze(core: SmolVLASharedCore, parts: list[str]) -> None:
    """Switch off the gradients of these parts. Raises ValueError for a part that this core does not have."""
    by_part = parameters_by_part(core)
    for part in parts:
        if part not in by_part:
            raise ValueError(f"cannot freeze {part!r}: this model has {', '.join(by_part)}")
        for parameter in by_part[part].values():
            parameter.requires_grad_(False)


def frozen_parts(model: ModelConfig, core: CoreConfig, targets: Collection[str]) -> list[str]:
    """The parts that do not train: those that --model.freeze-* freezes, and heads without a target."""
    freeze_trunk = core.has_pretrained_trunk if model.freeze_trunk is None else model.freeze_trunk
    freeze_vision = core.has_pretrained_trunk if model.freeze_vision is None else model.freeze_vision
    parts = ["vision tower", "connector"] if freeze_vision or freeze_trunk else []
    parts += ["language layers"] if freeze_trunk else []
    parts += ["state projection"] if model.freeze_state_projection else []
    heads = {LATENT: core.latent_vector_dim, ACTION: core.action_dim}
    return parts + [f"{name} head" for name, width in heads.items() if width and name not in targets]


def prepare_to_train(core: SmolVLASharedCore, model: ModelConfig, targets: Collection[str]) -> None:
    """Freeze, checkpoint and compile as the --model options say, for training on these targets."""
    freeze(core, frozen_parts(model, core.config, targets))
    configure_layers(core, model)


def parameter_table(core: SmolVLASharedCore) -> str:
    """Trained and frozen parameters of each part, for the first lines of a run."""
    rows = [f"{'parameters':<18}{'trained':>14}{'frozen':>14}"]
    total = [0, 0]
    for part, parameters in parameters_by_part(core).items():
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        frozen = sum(p.numel() for p in parameters.values()) - trained
        total = [total[0] + trained, total[1] + frozen]
        rows.append(f"{part:<18}{trained:>14,}{frozen:>14,}")
    return "\n".join([*rows, f"{'total':<18}{total[0]:>14,}{total[1]:>14,}"])
