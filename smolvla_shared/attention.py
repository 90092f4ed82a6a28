"""Attention as trunk and expert compute it: rotary positions, grouped queries, a mask as a bias."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROPE_WAVELENGTH = 10_000  # SmolVLA's, in trunk and expert; the language model's own rope_theta is not used

KeysValues = tuple[Tensor, Tensor]  # [B, key/value heads, tokens, head_dim] each, keys after RoPE
Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, [B, 1, tokens, head_dim] each


def rotation(positions: Tensor, head_dim: int) -> Rotation:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of positions [B, L]."""
    exponent = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2 / head_dim)
    angle = positions[:, None, :, None] / ROPE_WAVELENGTH**exponent  # [B, 1, L, head_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class Rotate(torch.autograd.Function):
    """Three kernels forward and backward. In bfloat16 the last one rounds its float32 result.

    It has no second derivative, and no forward-mode one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        partners = x.roll(x.shape[-1] // 2, dims=-1) * sin
        return torch.addcmul(partners, x, cos, out=x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        of_partners = (gradient * sin).roll(gradient.shape[-1] // 2, dims=-1)
        return torch.addcmul(of_partners, gradient, cos, out=gradient.new_empty(gradient.shape)), None, None


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply a float32 rotation to x [B, heads, L, head_dim], whose first and second half form the pairs."""
    if torch.compiler.is_compiling():  # which fuses the formula, but gets Rotate's gradient wrong (PyTorch 2.11)
        cos, sin = rotation
        return torch.addcmul(x.roll(x.shape[-1] // 2, dims=-1) * sin, x, cos).to(x.dtype)
    return Rotate.apply(x, *rotation)


def attention_bias(mask: Tensor, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """What attention adds to its scores: 0 where a mask [B, 1, L, keys] is True, else -inf; [B, 1, groups * L, keys].

    In memory its rows start at multiples of 8: GPU kernels would copy other ones, in every layer.
    """
    padded = F.pad(mask, (0, -mask.shape[-1] % 8)).repeat(1, 1, groups, 1)
    return torch.zeros_like(padded, dtype=dtype).masked_fill_(~padded, -math.inf)[..., : mask.shape[-1]]


def attend(query: Tensor, keys_values: KeysValues, bias: Tensor) -> Tensor:
    """Grouped-query attention of [B, heads, L, d] -> [B, L, heads * d]; bias broadcasts to [B, 1, groups * L, keys].

    Queries that share a head of keys become further rows: fast GPU kernels take a bias, but no groups.
    """
    groups = query.shape[1] // keys_values[0].shape[1]
    rows = query.unflatten(1, (-1, groups)).flatten(2, 3)
    attended = F.scaled_dot_product_attention(rows, *keys_values, attn_mask=bias).unflatten(2, (groups, -1))
    return attended.permute(0, 3, 1, 2, 4).flatten(2)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, L, heads * d] -> [B, heads, L, d]


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, heads, L, d] -> [B, L, heads * d]


def join(earlier: Iterable[Tensor], later: KeysValues) -> KeysValues:
    keys, values = (torch.cat(pair, dim=2) for pair in zip(earlier, later, strict=True))
    return keys, values


def as_no_view(x: Tensor) -> Tensor:
    """x, with nothing to show that it is a view: a compiled layer would have a variant for views."""
    return torch.ops.aten._unsafe_view(x, x.shape)
