"""Unreduced losses and masked means; knows no model."""

from torch import Tensor


def token_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of every token, averaged over flow draws and width: [B, K, T, A] -> [B, T]."""
    return (prediction - target).square().mean(dim=(1, 3))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where mask; same shapes."""
    return (values * mask).sum()


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of the values where mask (0 if nowhere).

    `count` replaces the number of valid values when this batch is a part of a larger one, spread over accumulation
    steps or processes: the parts' results then add up to the mean over the whole.
    """
    if count is None:
        count = mask.sum()
    return masked_sum(values, mask) / count.clamp(min=1)
