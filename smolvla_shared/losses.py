"""Unreduced losses and masked means: plain functions that know no model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from smolvla_shared.batch import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator


def token_error(prediction: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Squared error of every token, averaged over flow draws and known dimensions.

    [B, K, T, A] twice, and [B, T, A] bool -> [B, T]; 0 where no dimension is known.
    """
    error = (prediction - target).square().mean(1)
    return (error * known).sum(-1) / known.sum(-1).clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where mask; same shapes."""
    return (values * mask).sum()


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of the values where mask; 0 if the mask is False everywhere.

    If this batch is one part of a larger one (accumulation steps, processes), pass the larger batch's number of valid
    values as `count`: the parts' results then add up to the larger batch's mean.
    """
    if count is None:
        count = mask.sum()
    return masked_sum(values, mask) / count.clamp(min=1)


def valid_tokens(batches: Sequence[Batch], accelerator: "Accelerator") -> dict[str, Tensor]:
    """Valid tokens of each target in a step, summed over its batches (accumulation steps) and all processes."""
    counts = {name: sum(batch.masks[name].sum() for batch in batches) for name in batches[0].masks}
    return {name: accelerator.reduce(count.float(), "sum") for name, count in counts.items()}
