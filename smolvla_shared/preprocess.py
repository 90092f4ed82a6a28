"""From recorded values to what the model reads; the same functions serve training and inference.

Images -> [-1, 1] padded squares, text -> tokens, vectors -> normalised and zero-padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolvla_shared.batch import Batch, FlowTarget, RawBatch, to_device
from smolvla_shared.config import ACTION, LATENT, CoreConfig
from smolvla_shared.normalization import Statistics

# Latent targets are clipped here, standard deviations: a rare latent must not outweigh a batch.
MAX_LATENT = 5.0
TEXT_MULTIPLE = 16  # texts are padded to a multiple of it: a GPU plans, and --model.compile compiles, for few lengths


def unit_range(frames: Tensor) -> Tensor:
    """Frames [..., h, w], uint8 in [0, 255] or float in [0, 1] -> float32 in [0, 1], contiguous.

    Decoded frames have their channels innermost in memory; layout and type change here in one pass.
    """
    frames, is_uint8 = frames.to(torch.float32, memory_format=torch.contiguous_format), frames.dtype == torch.uint8
    return frames / 255 if is_uint8 else frames


def resize_with_pad(images: Tensor, size: int) -> Tensor:
    """Bilinear resize that keeps the aspect ratio, then zeros on the left and top, as in SmolVLA:
    [B, 3, h, w] -> [B, 3, size, size], both float32 in [0, 1].
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    ratio = max(height, width) / size
    new_height, new_width = int(height / ratio), int(width / ratio)
    images = F.interpolate(images, size=(new_height, new_width), mode="bilinear", align_corners=False)
    return F.pad(images, (size - new_width, 0, size - new_height, 0))


def stretch(frames: Tensor, size: int) -> Tensor:
    """Bilinear resize to a square, aspect ratio not kept: [..., 3, h, w] float in [0, 1] -> [..., 3, size, size].

    For the teacher's frames; antialiased, as is the PIL resize of LAPA's own pipeline.
    """
    if frames.shape[-2:] == (size, size):
        return frames
    batch = frames.shape[:-3]
    resized = F.interpolate(frames.flatten(0, -4), (size, size), mode="bilinear", antialias=True)
    return resized.unflatten(0, batch)


def prepare_images(images: Tensor, size: int) -> Tensor:
    """Frames [B, 3, h, w], uint8 in [0, 255] or float in [0, 1] -> the model's float32 squares in [-1, 1]."""
    return resize_with_pad(unit_range(images), size) * 2 - 1


def stack_cameras(images: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Prepared images [B, 3, H, W] per camera, None for a missing camera -> images [B, N, 3, H, W], mask [B, N].

    A missing camera becomes a black image (-1) whose tokens are masked.
    """
    present = next(image for image in images if image is not None)
    blank = torch.full_like(present, -1.0)
    stacked = torch.stack([blank if image is None else image for image in images], dim=1)
    mask = [torch.full((len(present),), image is not None, device=present.device) for image in images]
    return stacked, torch.stack(mask, dim=1)


def pad_width(values: Tensor, width: int) -> Tensor:
    """Zeros on the right of the last dimension, up to `width`."""
    return F.pad(values, (0, width - values.shape[-1]))


def normalize_latents(latents: Tensor, statistics: Statistics) -> Tensor:
    """Latent actions [B, S, D] with the statistics of their S * D dimensions -> targets, clipped at MAX_LATENT."""
    normalized = statistics.normalize(latents.flatten(1)).view(latents.shape)
    return normalized.clamp(-MAX_LATENT, MAX_LATENT)


def normalize_codebook(codebook: Tensor, code_seq_len: int, statistics: Statistics) -> Tensor:
    """A teacher's codes [C, D] as targets: for each slot, whose statistics are its own, [S, C, D]."""
    sequences = codebook[:, None].expand(-1, code_seq_len, -1)  # [C, S, D]: sequence c has code c in every slot
    return normalize_latents(sequences, statistics).transpose(0, 1)


def nearest_codes(latents: Tensor, codes: Tensor) -> Tensor:
    """The code of each slot [B, S] that is nearest to the latents [B, S, D], of normalize_codebook's [S, C, D]."""
    return (latents[:, :, None] - codes).square().sum(-1).argmin(-1)


class TextTokenizer:
    """Task strings -> token ids and mask, as SmolVLA wants them: one newline at the end, padded on the right."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def __call__(self, tasks: list[str]) -> tuple[Tensor, Tensor]:
        """Tasks of a batch -> ids [B, L] int64, mask [B, L] bool; L is the longest task's, rounded up."""
        encoded = self.tokenizer(
            [task if task.endswith("\n") else task + "\n" for task in tasks],
            padding="longest",
            pad_to_multiple_of=None if self.max_tokens % TEXT_MULTIPLE else TEXT_MULTIPLE,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()


class Preprocessor:
    """RawBatch -> Batch, on the raw batch's device.

    statistics: of "state", "action" and "latent", as far as the batches carry them
    """

    def __init__(self, config: CoreConfig, tokenizer: PreTrainedTokenizerFast, statistics: dict[str, Statistics]):
        self.config = config
        self.tokenize = TextTokenizer(tokenizer, config.max_text_tokens)
        self.statistics = statistics

    def normalize(self, name: str, values: Tensor, dataset: list[int]) -> Tensor:
        """State or actions of samples of these datasets. With several robots: robot_preprocessor.py."""
        return self.statistics[name].normalize(values)

    def in_units(self, name: str, differences: Tensor, dataset: list[int]) -> Tensor:
        """Differences of normalised states or actions [B, T, A], in the robot's units."""
        zero = torch.zeros_like(differences)
        return differences / (self.normalize(name, zero + 1, dataset) - self.normalize(name, zero, dataset))

    def __call__(self, raw: RawBatch, latents: Tensor | None = None) -> Batch:
        """The Batch has a target for each entry of raw.noise; `latents` [B, S, D] are the latent target's values."""
        config, device = self.config, raw.state.device
        # Image tokens [B, tokens, hidden] of a feature cache need no preparation.
        images = [i if i.ndim == 3 else prepare_images(i, config.image_size) for i in raw.images]
        images, image_mask = torch.stack(images, dim=1), raw.image_mask
        if config.image_special_tokens:
            # The special tokens of a missing camera are not masked: it comes behind the others, as in a rollout.
            order = image_mask.int().argsort(dim=1, descending=True, stable=True)
            images, image_mask = images[torch.arange(len(raw))[:, None], order], image_mask.gather(1, order)
        text, text_mask = to_device(list(self.tokenize(raw.tasks)), device)
        state, state_mask = torch.zeros(len(raw), config.max_state_dim, device=device), raw.state_mask
        if config.state_dim:
            # A sample without a state gets zeros, the mean state, and adds nothing even where it is not masked.
            normalized = self.normalize("state", raw.state, raw.dataset) * raw.state_mask[:, None]
            state = pad_width(normalized, config.max_state_dim)
        values, masks = {}, {}
        if LATENT in raw.noise:
            assert latents is not None
            values[LATENT] = normalize_latents(latents, self.statistics[LATENT])
            slots = latents.shape[1] // raw.pair_mask.shape[1]
            masks[LATENT] = raw.pair_mask.repeat_interleave(slots, dim=1)
        if ACTION in raw.noise:
            values[ACTION] = pad_width(self.normalize(ACTION, raw.actions, raw.dataset), config.max_action_dim)
            masks[ACTION] = raw.action_mask
        targets = {name: FlowTarget(values[name], masks[name], raw.noise[name], raw.time[name]) for name in values}
        return Batch(images, image_mask, text, text_mask, state, state_mask, targets)
