"""Batch: the one contract between data and model.

Shape legend, used in every comment of this package:
    B batch          N cameras       V label cameras     H, W image height and width
    L text tokens    P prefix tokens (N cameras' image tokens, then L, then 1 for the state)
    S latent slots   D latent width  (a latent action is S vectors of D; its public, flattened shape is [B, S*D];
                     with several label cameras, S counts the slots of all, one camera after the other)
    M horizon        a latent target is M latent actions in a row, M*S tokens; S stands for M*S wherever M is not named
    T action chunk   A action dims   K flow draws, (noise, time) pairs trained on one prefix pass
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from smolvla_shared.config import TeacherKind
from smolvla_shared.teacher_config import GroundedIn


@dataclass
class RawBatch:
    """What the data loader yields: recorded values as they are, and the random draws of each sample."""

    # One tensor per camera: uint8 frames [B, 3, h, w]; float32 squares in [0, 1] if the datasets' sizes differ; or
    # cached image tokens [B, tokens, hidden].
    images: list[Tensor]
    image_mask: Tensor  # [B, N] bool: False where a dataset lacks the camera; the image is then black
    tasks: list[str]  # B task texts
    state: Tensor  # [B, state_dim] float32; zeros where a dataset has none
    state_mask: Tensor  # [B] bool
    # The label cameras' frames at t, t + gap, ..., t + M gap, [B, V, M + 1, 3, h, w], of which two neighbours are a
    # pair: uint8, or float32 squares in [0, 1] of the teacher's size if sizes differ. None if there are no labels or
    # they come from a cache.
    pairs: Tensor | None
    pair_mask: Tensor  # [B, M] bool: False where the episode ends before a pair's second frame; M = 0 without labels
    actions: Tensor  # [B, T, A] float32; zeros where a dataset has none
    action_mask: Tensor  # [B, T] bool: False past the episode's end and where a dataset has no actions
    noise: dict[str, Tensor]  # by target, [B, K, tokens, width] float32
    time: dict[str, Tensor]  # by target, [B, K] float32
    # B indices of the samples' datasets in the run, and B rows within those datasets. Lists, because caches are read by
    # them on the host.
    dataset: list[int]
    row: list[int]
    keys: list[str]  # B names of the samples: dataset, episode and frame

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "RawBatch":
        """Called by DataLoader(pin_memory=True). Copies from pinned memory to a GPU do not make the host wait."""
        return map_tensors(Tensor.pin_memory, self)


class Labels(Protocol):
    """Latent actions of the samples of a batch."""

    teacher_id: str
    teacher_grounding: GroundedIn | None
    kind: TeacherKind
    # M*S, D: M latent actions in a row of S codes each, those of every label camera in turn.
    shape: tuple[int, int]
    horizon: int
    # Cameras to read frame pairs from; (): no pairs needed.
    cameras: tuple[str, ...]
    # Side of the square that pairs are resized to if their sizes differ, pixels.
    pair_size: int
    # The teacher's codes [C, D]; with the kind `quantized` every latent token is one of them.
    codebook: Tensor

    def to(self, device: torch.device) -> None:
        """Move to the batches' device."""

    def __call__(self, raw: RawBatch) -> Tensor:
        """Latent actions [B, M*S, D] float32; those where raw.pair_mask is False are meaningless."""


@dataclass
class FlowTarget:
    """What one head learns to generate, and the noise and times to learn it at.

    Latent and action targets differ only in their sizes: [S, D] or [T, A].
    """

    value: Tensor  # [B, T, A] float32, normalised, zero-padded to the head's width; NaN: unknown, does not count
    mask: Tensor  # [B, T] bool: the tokens that count in the loss
    noise: Tensor  # [B, K, T, A] float32
    time: Tensor  # [B, K] float32 in (0, 1]; 1 is noise, 0 is data


@dataclass
class Batch:
    """A model-ready batch: images and numbers are already preprocessed (preprocess.py)."""

    # Squares [B, N, 3, H, W] float32 in [-1, 1], or image tokens [B, N, tokens, hidden] from a feature cache
    images: Tensor
    image_mask: Tensor  # [B, N] bool: False hides a missing camera's tokens
    text: Tensor  # [B, L] int64 token ids, padded on the right
    text_mask: Tensor  # [B, L] bool
    state: Tensor  # [B, max_state_dim] float32, normalised, zero-padded
    state_mask: Tensor  # [B] bool: False where a dataset has no state
    targets: dict[str, FlowTarget]  # by head name, config.LATENT and config.ACTION; empty at inference

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which tokens of each target count, [B, T]."""
        return {name: target.mask for name, target in self.targets.items()}

    def __len__(self) -> int:
        return len(self.images)


def map_tensors(function: Callable[[Tensor], Tensor], value):
    """`value` with `function` applied to every tensor in it; goes into dataclasses, dictionaries and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if is_dataclass(value):
        return replace(value, **{f.name: map_tensors(function, vars(value)[f.name]) for f in fields(value)})
    return value


def to_device(value, device: torch.device):
    """`value` with every tensor in it moved to `device`. The host does not wait for pinned tensors."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)
