"""Layers of a LAQ. Module names match LAPA's released checkpoints; shape letters are those of laq.py."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from smolvla_shared.laq_config import LAQConfig

# Scale of the attention's logits. Cosines alone, in [-1, 1], would make the softmax nearly uniform.
ATTENTION_SCALE = 8.0
# Learned keys and values that cross-attention adds to the context's.
CROSS_ATTENTION_NULLS = 2


class Transformer(nn.Module):
    """Layers of convolution (position encoding), attention and feed-forward, then a bias-free LayerNorm."""

    def __init__(self, config: "LAQConfig", depth: int, cross_attention: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config, cross_attention) for _ in range(depth))
        self.norm_out = BiasFreeLayerNorm(config.dim)

    def forward(
        self,
        tokens: Tensor,  # [N, n, E], N sequences of n tokens
        shape: tuple[int, int, int, int],  # (B, F, h, w) of the video; N * n = B * F * h * w
        bias: Tensor | None = None,  # [M, n, n], added to the self-attention's logits
        context: Tensor | None = None,  # [N, S, E], for cross-attention
    ) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, shape, bias, context)
        return self.norm_out(tokens)


class TransformerLayer(nn.ModuleList):
    """One layer. A list, because LAPA numbers the parts; number 2 is missing without cross-attention."""

    def __init__(self, config: "LAQConfig", cross_attention: bool):
        super().__init__([PositionConvolution(config.dim), Attention(config)])
        self.add_module("2", Attention(config, nulls=CROSS_ATTENTION_NULLS) if cross_attention else None)
        self.add_module("3", feed_forward(config.dim))

    def forward(self, x: Tensor, shape: tuple, bias: Tensor | None, context: Tensor | None) -> Tensor:
        position, self_attention, cross_attention, feed_forward = self
        x = x + position(x, shape)
        x = x + self_attention(x, bias=bias)
        if cross_attention is not None:
            x = x + cross_attention(x, context=context)
        return x + feed_forward(x)


class PositionConvolution(nn.Module):
    """Position encoding (PEG, arXiv 2102.10882): a depthwise 3 x 3 x 3 convolution, causal in time.

    The tokens' memory is read as (B, F, h, w), even in the temporal transformer, whose tokens are in the order
    (B, h, w, F). LAPA's weights were trained with this.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, kernel_size=3, groups=dim)

    def forward(self, tokens: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        dim = tokens.shape[-1]
        video = tokens.reshape(*shape, dim).permute(0, 1, 4, 2, 3)  # [B, F, E, h, w]
        # The kernel's time taps are (two frames ago, previous frame, this frame). With at most two frames the first tap
        # meets only padding, and two 2D convolutions are several times faster than the 3D one.
        _, previous, this = self.dsconv.weight.unbind(2)  # each [E, 1, 3, 3]
        out = F.conv2d(video.flatten(0, 1), this, self.dsconv.bias, padding=1, groups=dim).unflatten(0, shape[:2])
        if shape[1] == 2:
            from_first = F.conv2d(video[:, 0], previous, padding=1, groups=dim)
            out = torch.stack([out[:, 0], out[:, 1] + from_first], dim=1)
        return out.permute(0, 1, 3, 4, 2).reshape(tokens.shape)


class Attention(nn.Module):
    """Cosine-similarity attention, to itself or to `context` and learned keys and values."""

    def __init__(self, config: "LAQConfig", nulls: int = 0):
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm = BiasFreeLayerNorm(config.dim)
        self.context_norm = BiasFreeLayerNorm(config.dim)
        self.null_kv = nn.Parameter(torch.randn(config.heads, 2 * nulls, config.dim_head))  # key, value, key, value
        self.q_scale = nn.Parameter(torch.ones(config.dim_head))
        self.k_scale = nn.Parameter(torch.ones(config.dim_head))
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim, bias=False)
        # Self-attention uses neither, but LAPA's files hold both. DDP would wait for their gradients.
        if nulls == 0:
            self.context_norm.requires_grad_(False)
            self.null_kv.requires_grad_(False)

    def forward(self, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        # As in LAPA, self-attention takes keys and values from the tokens before the norm.
        keys_from = x if context is None else self.context_norm(context)
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, M, n, dim_head]
        k, v = self.to_kv(keys_from).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if context is not None:
            null_k, null_v = self.null_kv.unflatten(1, (-1, 2)).unbind(2)  # each [M, 2, dim_head]
            k = torch.cat([null_k.expand(len(k), -1, -1, -1), k], dim=2)
            v = torch.cat([null_v.expand(len(v), -1, -1, -1), v], dim=2)
        q = F.normalize(q, dim=-1) * (self.q_scale * self.k_scale)  # k_scale here, too: only q @ k matters
        k = F.normalize(k, dim=-1)
        bias = None if bias is None else bias[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=ATTENTION_SCALE)
        return self.to_out(out.transpose(1, 2).flatten(2))


class BiasFreeLayerNorm(nn.Module):
    """LayerNorm with a learned scale. The shift `beta` stays zero; LAPA's files hold it."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class GatedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def feed_forward(dim: int) -> nn.Sequential:
    inner = int(4 * (2 / 3) * dim)
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        GatedGELU(),
        nn.Identity(),  # the place of LAPA's dropout
        nn.Linear(inner, dim, bias=False),
    )


class RelativePositionBias(nn.Module):
    """Attention bias of each head: an MLP of the signed log offset of two patches (Swin v2, arXiv 2111.09883)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.net = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1)),
                nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1)),
                nn.Linear(dim, heads),
            ]
        )

    def forward(self, grid: int) -> Tensor:  # [M, h * w, h * w]
        device = self.net[2].weight.device
        # The (2 grid - 1)^2 different offsets, instead of the grid^4 pairs of patches.
        offset = torch.arange(1 - grid, grid, device=device)
        offsets = torch.cartesian_prod(offset, offset).float()
        x = offsets.sign() * offsets.abs().log1p()
        for layer in self.net:
            x = layer(x)
        row, column = torch.cartesian_prod(*[torch.arange(grid, device=device)] * 2).unbind(1)  # each [h * w]
        row = row[:, None] - row + grid - 1  # [h * w, h * w], counted from 0
        column = column[:, None] - column + grid - 1
        return F.embedding(row * (2 * grid - 1) + column, x).permute(2, 0, 1)


class Patchify(nn.Module):
    """[B, F, 3, H, W] -> [B, F, h, w, 3 * p * p]."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, frames: Tensor) -> Tensor:
        p = self.patch_size
        patches = frames.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # [B, F, C, h, p, w, p]
        return patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


class Unpatchify(nn.Module):
    """[B, F, h, w, channels * p * p] -> [B, F, channels, H, W]."""

    def __init__(self, patch_size: int, channels: int = 3):
        super().__init__()
        self.patch_size, self.channels = patch_size, channels

    def forward(self, patches: Tensor) -> Tensor:
        p = self.patch_size
        frames = patches.unflatten(-1, (self.channels, p, p)).permute(0, 1, 4, 2, 5, 3, 6)  # [B, F, 3, h, p, w, p]
        return frames.flatten(5, 6).flatten(3, 4)
