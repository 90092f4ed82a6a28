"""LAQ, the teacher: S codes of a small codebook for what happened between two frames.

The inverse-dynamics VQ model of LAPA (arXiv 2410.11758) with noise substitution in place of a straight-through estimate
(NSVQ, Vali and Backstrom, IEEE Access 2022). Module names match LAPA's released checkpoints.

    frames [B, 2, 3, H, W] -> patch tokens -> spatial, then temporal transformer -> small CNN -> S slots of each frame
    slots of the second frame - slots of the first = latent [B, S, D] -> nearest codes: indices, vectors [B, S, D]
    patch tokens of the first frame, cross-attending to the S vectors -> pixels of the second frame

Letters beyond batch.py's legend: E token width, h x w patches of a frame, F frames, C codes, M heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from smolvla_shared.batch import RawBatch
from smolvla_shared.laq_config import FIRST_CONV, SECOND_CONV, LAQConfig
from smolvla_shared.laq_layers import Patchify, RelativePositionBias, Transformer, Unpatchify
from smolvla_shared.preprocess import stretch, unit_range

# Factor on frame differences before they are embedded: most are a few percent of the pixel range.
CHANGE_SCALE = 4.0
# The decoder's output 1 moves a pixel by this share of half the image's side: objects move little within a gap.
FLOW_SCALE = 0.1
# Newest pairs whose latents are kept, for placing codes.
RECENT_PAIRS = 512


class LatentActions(NamedTuple):
    """What `LAQ.encode` returns for B frame pairs."""

    indices: Tensor  # [B, S] int64, codes
    vectors: Tensor  # [B, S, D] float32, the codes' rows of the codebook
    continuous: Tensor  # [B, S, D] float32, the latent before quantisation


@dataclass
class PairBatch:
    """Frame pairs to train a LAQ on."""

    frames: Tensor  # [B, 2, 3, H, W] uint8, or float in [0, 1]
    mask: Tensor  # [B] bool: False where the episode ends before the second frame
    noise: Tensor  # [B, S, D] float32, standard normal, from the data loader
    actions: Tensor | None = None  # [B, A] float32, standardised; NaN for pairs of video. None: no grounding

    @classmethod
    def of(cls, raw: RawBatch, noise: Tensor, actions: Tensor | None) -> "PairBatch":  # [B, V*S, D], [B, A]
        """The pairs of every label camera, B * V."""
        number = raw.pairs.shape[1]
        noise, mask = noise.unflatten(1, (number, -1)).flatten(0, 1), raw.pair_mask[:, 0].repeat_interleave(number)
        actions = None if actions is None else actions.repeat_interleave(number, 0)
        return cls(raw.pairs.flatten(0, 1), mask, noise, actions)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which pairs count in each loss, [B] bool."""
        masks = {"reconstruction": self.mask}
        return masks if self.actions is None else masks | {"grounding": self.mask & ~self.actions.isnan().any(1)}

    def __len__(self) -> int:
        return len(self.frames)


class LAQ(nn.Module):
    """The inverse-dynamics VQ model; see the top of this file."""

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.config = config
        pixels = 3 * config.patch_size**2
        self.spatial_rel_pos_bias = RelativePositionBias(config.dim, config.heads)
        self.to_patch_emb_first_frame = nn.Sequential(  # of both frames, in spite of LAPA's name
            Patchify(config.patch_size),
            nn.LayerNorm(pixels),
            nn.Linear(pixels, config.dim),
            nn.LayerNorm(config.dim),
        )
        if config.sees_change:
            self.to_change_emb = nn.Sequential(Patchify(config.patch_size), nn.Linear(pixels, config.dim, bias=False))
        self.enc_spatial_transformer = Transformer(config, config.spatial_depth)
        self.enc_temporal_transformer = Transformer(config, config.temporal_depth)
        self.vq = NSVQ(config)
        self.dec_spatial_transformer = Transformer(config, config.spatial_depth, cross_attention=True)
        channels = 5 if config.moves_pixels else 3  # RGB, and where each pixel comes from: (x, y)
        to_patches = nn.Linear(config.dim, channels * config.patch_size**2)
        self.to_pixels_first_frame = nn.Sequential(to_patches, Unpatchify(config.patch_size, channels))
        # The error of repeating the first frame, on average over the training video: the unit of the loss. Private.
        self.register_buffer("_repeat_error", torch.ones(()))
        if config.predicts_change:  # so that a fresh teacher repeats the first frame
            nn.init.zeros_(self.to_pixels_first_frame[0].weight)
            nn.init.zeros_(self.to_pixels_first_frame[0].bias)

    def ground(self, action_dim: int) -> None:
        """Add a linear head from a latent action to an action. It is private: published weights do not include it."""
        self._grounding = nn.Linear(self.config.latent_vector_dim, action_dim)

    def encode(self, frames: Tensor) -> LatentActions:  # [B, 2, 3, H, W]
        """Latent actions of frame pairs. Frames are float in [0, 1], of any size."""
        tokens = self._embed(self.resize(frames))
        latent = self._latent(tokens, self._position_bias())
        indices = self.vq.nearest(latent)
        return LatentActions(indices, self.vq.codebooks[indices], latent)

    def reconstruct(self, frames: Tensor, latents: Tensor | None = None) -> Tensor:  # [B, 2, 3, H, W], [B, S, D]
        """Predict the second frames, [B, 3, image_size, image_size], from the first frames and latent actions.

        latents: None: the pairs' own codes. Those of other pairs show whether equal latents mean equal motions.
                 Continuous latents work, too: NSVQ trains the decoder on vectors as far from the codes
        """
        if latents is None:
            latents = self.encode(frames).vectors
        first = self.resize(frames[:, :1])
        return self._decode(self._embed(first), latents, self._position_bias(), first)

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """Errors of each pair, [B]; the caller masks and averages. The only training entry.

        reconstruction: mean squared pixel error of the second frame; with predicts_change, in units of the training
                        video's mean error of repeating the first frame
        grounding:      mean squared error of the standardised actions, if the batch has actions

        In training mode the codes and latents of valid pairs are also recorded (NSVQ.note).
        """
        frames = self.resize(unit_range(batch.frames))
        bias = self._position_bias()
        tokens = self._embed(frames)  # [B, 2, h, w, E]
        latent = self._latent(tokens, bias)
        indices = self.vq.nearest(latent)
        if self.training:
            self.vq.note(latent, indices, batch.mask)
        vectors = self.vq.substitute(latent, indices, batch.noise)
        # As in LAPA the decoder does not train the embedding: motion must come through the codes.
        predicted = self._decode(tokens[:, :1].detach(), vectors, bias, frames[:, :1])
        errors = {"reconstruction": pixel_error(predicted.float(), frames[:, 1])}
        if self.config.predicts_change:
            errors["reconstruction"] /= self._repeat_error
        if batch.actions is not None:
            error = self._grounding(vectors.flatten(1)) - batch.actions.nan_to_num()
            errors["grounding"] = error.square().mean(1)
        return errors

    def resize(self, frames: Tensor) -> Tensor:  # [B, F, 3, H, W]
        """Frames resized to what the model sees, [B, F, 3, image_size, image_size]."""
        return stretch(frames, self.config.image_size)

    def _embed(self, frames: Tensor) -> Tensor:  # [B, F, 3, image_size, image_size] -> [B, F, h, w, E]
        tokens = self.to_patch_emb_first_frame(frames)
        if self.config.sees_change:
            tokens = tokens + self.to_change_emb(CHANGE_SCALE * (frames - frames[:, :1]))
        return tokens

    def _position_bias(self) -> Tensor:  # [M, h * w, h * w]
        return self.spatial_rel_pos_bias(self.config.grid)

    def _latent(self, tokens: Tensor, bias: Tensor) -> Tensor:  # [B, 2, h, w, E] -> [B, S, D]
        shape = tokens.shape[:-1]
        batch, _, h, w = shape
        tokens = tokens.flatten(0, 1).flatten(1, 2)  # [B * 2, h * w, E]
        tokens = self.enc_spatial_transformer(tokens, shape, bias=bias)
        tokens = tokens.view(batch, 2, h * w, -1).transpose(1, 2).flatten(0, 1)  # [B * h * w, 2, E]
        tokens = self.enc_temporal_transformer(tokens, shape)
        tokens = tokens.view(batch, h, w, 2, -1).permute(0, 3, 1, 2, 4)  # [B, 2, h, w, E]
        return self.vq.latents(tokens)

    def _decode(self, tokens: Tensor, vectors: Tensor, bias: Tensor, first: Tensor) -> Tensor:
        # [B, 1, h, w, E], [B, S, D], [M, h * w, h * w], [B, 1, 3, H, W] -> [B, 3, H, W]
        shape = tokens.shape[:-1]
        tokens = self.dec_spatial_transformer(
            tokens.flatten(1, 3), shape, bias=bias, context=self.vq.project_codes(vectors)
        )
        pixels, first = self.to_pixels_first_frame(tokens.view(*shape, -1))[:, 0], first[:, 0]
        if self.config.moves_pixels:
            pixels, flow = pixels.split((3, 2), dim=1)
            first = move_pixels(first, flow * FLOW_SCALE)
        return first + pixels if self.config.predicts_change else pixels


def pixel_error(one: Tensor, other: Tensor) -> Tensor:  # [B, 3, H, W] -> [B]
    return (one - other).square().mean(dim=(1, 2, 3))


def move_pixels(image: Tensor, flow: Tensor) -> Tensor:  # [B, 3, H, W], [B, 2, H, W] -> [B, 3, H, W]
    """Each pixel from where its flow (x, y) points to, in shares of half the image's side; the border is repeated.

    The backward warp of optical flow and spatial transformers (Jaderberg et al., arXiv 1506.02025). Zero flow returns
    the image, up to rounding.
    """
    identity = torch.eye(2, 3, device=image.device).expand(len(image), -1, -1)
    grid = F.affine_grid(identity, list(image.shape), align_corners=False)  # [B, H, W, 2] in [-1, 1]
    grid = grid + flow.permute(0, 2, 3, 1).float()
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


class NSVQ(nn.Module):
    """Tokens of two frames -> S latents -> codes. In training, noise takes the place of the quantisation error."""

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(config.codebook_size, config.quant_dim))
        self.project_in = nn.Linear(config.dim, config.quant_dim)
        self.project_out = nn.Linear(config.quant_dim, config.dim)
        convs = [
            nn.Conv2d(config.quant_dim, config.quant_dim, kernel, stride=stride, padding=padding)
            for kernel, stride, padding in filter(None, (FIRST_CONV, SECOND_CONV[config.code_seq_len]))
        ]
        self.cnn_encoder = nn.Sequential(convs[0]) if len(convs) == 1 else nn.Sequential(convs[0], nn.ReLU(), convs[1])
        # For place_codes, over the valid training pairs of all processes: how often each code was used since the
        # trainer last cleared the counts, and the newest latents (NaN: none yet). Training checkpoints hold both, so
        # that a resumed run places the same codes. Their names are private: published weights do not hold them.
        self.register_buffer("_usage", torch.zeros(config.code_seq_len, config.codebook_size, dtype=torch.int64))
        self.register_buffer("_recent", torch.full((RECENT_PAIRS, config.code_seq_len, config.quant_dim), torch.nan))

    def latents(self, tokens: Tensor) -> Tensor:  # [B, 2, h, w, E] -> [B, S, D]
        grid = self.project_in(tokens).flatten(0, 1).permute(0, 3, 1, 2)  # [B * 2, D, h, w]
        slots = self.cnn_encoder(grid).flatten(2).transpose(1, 2).unflatten(0, (-1, 2))  # [B, 2, S, D]
        return (slots[:, 1] - slots[:, 0]).float()

    def nearest(self, latent: Tensor) -> Tensor:  # [B, S, D] -> [B, S]
        difference = latent.detach()[:, :, None] - self.codebooks.detach()  # [B, S, C, D]
        return difference.square().sum(-1).argmin(-1)

    def substitute(self, latent: Tensor, indices: Tensor, noise: Tensor) -> Tensor:  # [B, S, D], [B, S], [B, S, D]
        """NSVQ: x_q = x + |x - c| * v / |v|, v ~ N(0, I).

        x_q is as far from the latent x as the code c is, in a random direction. The codebook learns through |x - c|.
        """
        error = (latent - self.codebooks[indices]).norm(dim=-1, keepdim=True)
        return latent + error * noise / noise.norm(dim=-1, keepdim=True)

    def project_codes(self, vectors: Tensor) -> Tensor:  # [B, S, D] -> [B, S, E]
        # The memory of [S, D] is read as [D, S] and then transposed, which mixes slots and dimensions if S > 1. LAPA's
        # weights were trained with this.
        batch, slots, width = vectors.shape
        return self.project_out(vectors.reshape(batch, width, slots).transpose(1, 2))

    @torch.no_grad()
    def note(self, latent: Tensor, indices: Tensor, mask: Tensor) -> None:  # [B, S, D], [B, S], [B]
        """Count the uses of the codes, and keep the latents of the valid pairs."""
        counts = (F.one_hot(indices, len(self.codebooks)) * mask[:, None, None]).sum(0)  # [S, C]
        latent = latent.masked_fill(~mask[:, None, None], torch.nan)
        # Gathered, so that all processes place the same codes. Placing codes by one process's own pairs makes runs on
        # many devices collapse where a run on one device does not.
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            parts = [torch.empty_like(latent) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, latent.contiguous())
            latent = torch.cat(parts)
        self._usage += counts
        self._recent.copy_(torch.cat([self._recent, latent])[-RECENT_PAIRS:])

    @property
    def recent(self) -> Tensor:  # [N, D]
        """The newest latents, on the CPU. All slots together, because they share the codebook."""
        latents = self._recent.flatten(0, 1).cpu()
        return latents[~latents.isnan().any(1)]
