"""The SmolVLM trunk as a prefix encoder, and the action expert that reads its keys and values.

Both are stacks of transformers' Llama layers with a forward of our own: the prefix is encoded once, each layer's keys
and values are kept, and the expert runs on them once per head, flow draw and Euler step. The prefix never sees the
suffix, so the same code serves training and sampling. Numbers follow SmolVLA (arXiv 2506.01844).
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from smolvla_shared.attention import (
    KeysValues,
    Rotation,
    as_no_view,
    attend,
    attention_bias,
    join,
    merge_heads,
    rotate,
    rotation,
    split_heads,
)
from smolvla_shared.batch import Batch
from smolvla_shared.config import CoreConfig
from smolvla_shared.kernels import LowWeights, VisionMLP

Place = tuple[Rotation, Tensor]  # of the queries: their rotation, and an attention_bias


@dataclass
class Prefix:
    """Images, text and state as the expert reads them, and what the expert keeps for other heads and Euler steps."""

    keys_values: list[KeysValues]  # one pair per trunk layer
    mask: Tensor  # [B, P] bool: False for padding, missing cameras and a missing state
    contexts: list[KeysValues] = field(default_factory=list)  # the pairs as the expert's layers attend to them
    places: dict[tuple[int, int], tuple[Place, Place]] = field(default_factory=dict)  # {(K, T): Expert.places}
    weights: list[LowWeights] = field(default_factory=list)  # of the expert's layers


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of matrix products with x: autocast's where it is on."""
    device = x.device.type
    is_on = not x.is_meta and torch.is_autocast_enabled(device)  # which knows no meta device
    return torch.get_autocast_dtype(device) if is_on else x.dtype


def prefix_attention_mask(valid: Tensor) -> Tensor:
    """Who attends to whom in the prefix, [B, P] bool -> [B, 1, P, P] bool.

                     to   image  text   state
        from image         x x    x x .   .
             text          x x    x x .   .
             state         x x    x x .   x         (the last text token here is padding)

    Padding is hidden as a key only; nothing reads what a padding token computes.
    """
    mask = valid[:, None, None, :].repeat(1, 1, valid.shape[1], 1)
    mask[:, :, :-1, -1] = False
    return mask


def suffix_attention_mask(prefix_valid: Tensor, num_tokens: int) -> Tensor:
    """Who the suffix tokens attend to: the valid prefix, and causally themselves. [B, P] bool -> [B, 1, T, P + T] bool.

                 to   prefix   0 1 2
    from 0             x x .   x . .
         1             x x .   x x .
         2             x x .   x x x
    """
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=prefix_valid.device).tril()
    shape = (len(prefix_valid), 1, num_tokens, -1)
    return torch.cat([prefix_valid[:, None, None, :].expand(shape), causal.expand(shape)], dim=-1)


class RMSNorm(nn.RMSNorm):
    """One kernel on a GPU; its output is cast once, for all products that read it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(compute_dtype(x))


class Layer(LlamaDecoderLayer):
    """What the layers of trunk and expert share."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__(config, index)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotated(self, normed: Tensor, rotation: Rotation, *projections: nn.Module) -> tuple[Tensor, ...]:
        """Tokens [B, L, width] through these projections, as heads, rotated by their positions."""
        projected = [projection(normed) for projection in projections]
        heads = [x.shape[-1] // self.self_attn.head_dim for x in projected]
        return rotate(split_heads(torch.cat(projected, dim=-1), self.self_attn.head_dim), rotation).split(heads, dim=1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden [B, L, width] after this layer."""
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PrefixLayer(Layer):
    """A language-model layer of the trunk that also returns its keys and values."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__(config, index)
        self.is_last = index == config.num_hidden_layers - 1
        if self.is_last:
            # Only the keys and values of this layer are read. The unused modules stay, so that a SmolVLM checkpoint
            # loads strictly; they need no gradients, or DDP would wait for them.
            for unused in (self.self_attn.q_proj, self.self_attn.o_proj, self.mlp, self.post_attention_layernorm):
                unused.requires_grad_(False)

    def forward(self, parts: list[Tensor], places: list[Place]) -> tuple[list[Tensor], KeysValues]:
        """Parts [B, part, hidden] of the P tokens -> the parts after this layer, the keys and values of all P tokens.

        A part attends to itself and the parts before it: its bias is [B, 1, groups * part, tokens up to its end].
        """
        attn, new_parts, keys_values = self.self_attn, [], None
        for hidden, (turn, bias) in zip(parts, places, strict=True):
            normed = self.input_layernorm(hidden)
            key, *query = self.rotated(normed, turn, attn.k_proj, *[attn.q_proj] * (not self.is_last))
            own = key, split_heads(attn.v_proj(normed), attn.head_dim)
            keys_values = join(keys_values, own) if keys_values else own
            new_parts.append(hidden if self.is_last else self.finish(hidden, attend(*query, keys_values, bias)))
        return new_parts, keys_values


class Trunk(nn.Module):
    """SmolVLM's vision tower, connector, token embedding and first language layers: Batch fields -> Prefix."""

    def __init__(self, config: CoreConfig):
        super().__init__()
        vlm_config = SmolVLMConfig.from_dict(config.vlm)
        text = vlm_config.text_config
        text.num_hidden_layers = config.num_trunk_layers
        for part in (vlm_config, vlm_config.vision_config, text):  # transformers builds each part in its own dtype
            part.dtype = getattr(torch, config.torch_dtype)
        self.vlm = SmolVLMModel(vlm_config)
        self.vlm.text_model.layers = nn.ModuleList(PrefixLayer(text, index) for index in range(text.num_hidden_layers))
        for layer in self.vlm.vision_model.encoder.layers:
            layer.mlp.__class__ = VisionMLP  # of the same parameters
        self.vlm.to(text.dtype)  # the new layers, and the connector, which follows no config
        del self.vlm.text_model.norm  # would only act on the last layer's output, which nothing reads
        # Each patch takes the nearest of the tower's learned positions. They are found once: transformers derives them
        # from a mask in every call, which makes the host wait for the device.
        vision = vlm_config.vision_config
        side, learned_side = (size // vision.patch_size for size in (config.image_size, vision.image_size))
        nearest = torch.arange(side) * learned_side // side
        patch_positions = (nearest[:, None] * learned_side + nearest).flatten()  # [patches]
        self.register_buffer("patch_positions", patch_positions, persistent=False)
        self.hidden_size, self.head_dim = text.hidden_size, text.head_dim
        tokens = torch.tensor(config.image_special_tokens + config.image_special_tokens[:1])  # fake, global, fake image
        self.register_buffer("image_special_tokens", tokens, persistent=False)

    def own_precision(self) -> AbstractContextManager:
        """Without autocast if the weights are bfloat16: nothing needs a cast, and CUDA's autocast would cast norms."""
        is_low, device = self.vlm.dtype == torch.bfloat16, self.patch_positions.device.type
        return torch.autocast(device, enabled=False) if is_low else nullcontext()

    def train(self, mode: bool = True) -> "Trunk":
        super().train(mode)
        for layer in self.vlm.vision_model.encoder.layers:
            layer.self_attn.eval()  # has no dropout: training would only be one more variant to compile
        return self

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, N, 3, H, W] in [-1, 1] -> image tokens [B, N, tokens, hidden]."""
        vision = self.vlm.vision_model
        pixels = images.flatten(0, 1).to(vision.dtype)
        patches = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        patches = patches + vision.embeddings.position_embedding(self.patch_positions)
        needed = images.requires_grad or any(p.requires_grad for p in vision.encoder.parameters())
        trains = torch.is_grad_enabled() and needed
        with torch.set_grad_enabled(trains):  # a frozen tower is compiled once, for training and evaluation
            for layer in vision.encoder.layers:
                with LowWeights(compute_dtype(patches), layer):
                    patches = layer(patches, None)
        return self.vlm.connector(vision.post_layernorm(patches)).unflatten(0, images.shape[:2])

    def enclose_images(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Put two special tokens before each camera's image tokens [B, N, tokens, hidden] and one behind.

        Returns tokens and their mask. As in SmolVLA special tokens are not scaled, and not masked for a missing camera.
        """
        special = self.vlm.text_model.embed_tokens(self.image_special_tokens).expand(*tokens.shape[:2], -1, -1)
        return torch.cat([special[:, :, :2], tokens, special[:, :, 2:]], dim=2), F.pad(valid, (2, 1), value=True)

    def forward(self, batch: Batch, state_token: Tensor) -> Prefix:
        """The prefix of a batch, whose state is already a token [B, hidden]."""
        # Image and text tokens are scaled as in Gemma-style language models; the state token is not.
        scale = math.sqrt(self.hidden_size)
        image_tokens = batch.images if batch.images.ndim == 4 else self.embed_images(batch.images)
        image_tokens = image_tokens.to(self.vlm.dtype) * scale  # [B, N, tokens, hidden]
        image_valid = batch.image_mask[:, :, None].expand(image_tokens.shape[:3])
        if len(self.image_special_tokens):
            image_tokens, image_valid = self.enclose_images(image_tokens, image_valid)
        embedded_text = self.vlm.text_model.embed_tokens(batch.text)
        dtype = compute_dtype(image_tokens)
        image_text = torch.cat([image_tokens.flatten(1, 2), embedded_text * scale], dim=1)
        image_text = image_text.to(dtype)  # [B, P - 1, hidden]
        state = as_no_view(state_token[:, None]).to(image_text.dtype)
        valid = torch.cat([image_valid.flatten(1), batch.text_mask, batch.state_mask[:, None]], dim=1)  # [B, P]

        # If the trunk is frozen, only the state token needs gradients: as a part of its own it keeps autograd off the
        # image and text tokens. Otherwise a single part takes half the kernel calls.
        if state.requires_grad and not image_text.requires_grad:
            parts, spans = [image_text, state], [slice(-1), slice(-1, None)]
        else:
            parts, spans = [torch.cat([image_text, state], dim=1)], [slice(None)]
        mask, layers = prefix_attention_mask(valid), self.vlm.text_model.layers
        groups = layers[0].self_attn.num_key_value_groups
        biases = [attention_bias(mask[:, :, span, : span.stop], dtype, groups) for span in spans]
        positions = valid.cumsum(1) - 1  # padding does not count
        rotations = [rotation(positions[:, span], self.head_dim) for span in spans]
        places, keys_values = list(zip(rotations, biases, strict=True)), []
        for layer in layers:
            with LowWeights(dtype, layer):
                parts, layer_keys_values = layer(parts, places)
            keys_values.append(layer_keys_values)
        return Prefix(keys_values, valid)


class ExpertLayer(Layer):
    """A layer of the expert: self-attention over [prefix ; suffix], or cross-attention to the prefix alone.

    A cross-attention layer projects the trunk layer's keys and values, flattened over heads, to its own. It applies no
    RoPE to them again, and the positions of its queries start at 0.
    """

    def __init__(self, config: LlamaConfig, index: int, is_cross: bool):
        super().__init__(config, index)
        self.is_cross = is_cross
        if is_cross:
            width = config.num_key_value_heads * config.head_dim
            self.self_attn.k_proj = nn.Linear(width, width, bias=config.attention_bias)
            self.self_attn.v_proj = nn.Linear(width, width, bias=config.attention_bias)

    def context(self, prefix: KeysValues, dtype: torch.dtype) -> KeysValues:
        """The prefix's keys and values as this layer attends to them: projected if it is a cross-attention layer.

        Heads and Euler steps share it, so it is no part of `forward`, and its projections are a unit of FSDP.
        """
        attn, (keys, values) = self.self_attn, (x.to(dtype) for x in prefix)
        if self.is_cross:
            keys = split_heads(attn.k_proj(merge_heads(keys)), attn.head_dim)
            values = split_heads(attn.v_proj(merge_heads(values)), attn.head_dim)
        return keys, values

    def forward(self, hidden: Tensor, context: KeysValues, place: Place) -> Tensor:
        """Hidden [B, K, T, width] of a sample's K draws after this layer."""
        attn, (rotation, bias) = self.self_attn, place
        normed = self.input_layernorm(hidden)
        if self.is_cross:
            # A sample's draws share a prefix: they attend to it as one long sequence, without copies of the prefix.
            query = attn.q_proj(normed).unflatten(-1, (-1, attn.head_dim)).permute(0, 3, 1, 2, 4)  # [B, heads, K, T, d]
            attended = attend(rotate(query, rotation).flatten(2, 3), context, bias)
        else:
            normed = normed.flatten(0, 1)
            query, key = self.rotated(normed, rotation, attn.q_proj, attn.k_proj)
            own = key, split_heads(attn.v_proj(normed), attn.head_dim)
            of_draws = (x[:, None].expand(-1, hidden.shape[1], -1, -1, -1).flatten(0, 1) for x in context)
            attended = attend(query, join(of_draws, own), bias)
        return self.finish(hidden, attended.reshape(*hidden.shape[:3], -1))


class Expert(nn.Module):
    """The narrower transformer over the suffix tokens, with one layer per trunk layer."""

    def __init__(self, config: CoreConfig):
        super().__init__()
        text = SmolVLMConfig.from_dict(config.vlm).text_config
        text.hidden_size = int(text.hidden_size * config.expert_width_multiplier)
        text.intermediate_size = expert_mlp_width(text.hidden_size)
        text.num_hidden_layers = config.num_trunk_layers
        self.width, self.head_dim = text.hidden_size, text.head_dim
        self.layers = nn.ModuleList(
            ExpertLayer(text, index, is_cross=index % config.self_attn_every_n_layers != 0)
            for index in range(config.num_trunk_layers)
        )
        self.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)

    @property
    def context_projections(self) -> list[nn.Module]:
        """What `ExpertLayer.context` computes with."""
        cross = [layer.self_attn for layer in self.layers if layer.is_cross]
        return [projection for attn in cross for projection in (attn.k_proj, attn.v_proj)]

    def places(self, valid: Tensor, num_draws: int, num_tokens: int, dtype: torch.dtype) -> tuple[Place, Place]:
        """Where suffix tokens stand in self-attention, and in cross-attention, to a prefix [B, P]."""
        from_zero = torch.arange(num_tokens, device=valid.device)[None]  # [1, T]
        after_prefix = (valid.sum(1, keepdim=True) + from_zero).repeat_interleave(num_draws, dim=0)  # [B * K, T]
        joint = suffix_attention_mask(valid, num_tokens).repeat_interleave(num_draws, dim=0)
        bias = attention_bias(joint, dtype, self.layers[0].self_attn.num_key_value_groups)
        to_prefix = rotation(from_zero, self.head_dim), attention_bias(valid[:, None, None], dtype)
        return (rotation(after_prefix, self.head_dim), bias), to_prefix

    def forward(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """Suffix tokens [B, K, T, width] -> output [B, K, T, width]."""
        shape, dtype = tokens.shape[1:3], compute_dtype(tokens)
        if shape not in prefix.places:
            prefix.places[shape] = self.places(prefix.mask, *shape, dtype)
        if not prefix.contexts:
            pairs = zip(self.layers, prefix.keys_values, strict=True)
            with LowWeights(dtype, *self.context_projections):
                prefix.contexts = [layer.context(keys_values, dtype) for layer, keys_values in pairs]
        # The residual stream, too, has the type of the products: nothing in a layer needs a cast.
        tokens, (after_prefix, from_zero) = as_no_view(tokens).to(dtype), prefix.places[shape]
        for index, (layer, context) in enumerate(zip(self.layers, prefix.contexts, strict=True)):
            if index == len(prefix.weights):
                prefix.weights.append(LowWeights(dtype, layer))
            with prefix.weights[index]:
                tokens = layer(tokens, context, from_zero if layer.is_cross else after_prefix)
        return self.norm(tokens.to(self.norm.weight.dtype))


def expert_mlp_width(hidden: int, multiple_of: int = 256) -> int:
    """The expert's SwiGLU width: two thirds of four times the hidden width, rounded up (as in Llama and SmolVLA)."""
    return multiple_of * math.ceil(4 * int(2 * hidden / 3) / multiple_of)
