"""Masked means against numbers worked out by hand."""

import pytest
import torch

from smolvla_shared.losses import masked_mean, masked_sum, token_error

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0], [3.0, 5.0, 7.0]])
MASK = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)


def test_masked_sum_and_mean_by_hand():
    assert masked_sum(VALUES, MASK).item() == 1 + 2 + 32 + 3 + 7
    assert masked_mean(VALUES, MASK).item() == 45 / 5


def test_masked_values_get_no_gradient():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert torch.equal(values.grad, MASK / 5)


def test_parts_with_the_global_count_add_up_to_the_whole():
    whole = VALUES.clone().requires_grad_()
    masked_mean(whole, MASK).backward()
    split = VALUES.clone().requires_grad_()
    parts = [masked_mean(split[rows], MASK[rows], count=MASK.sum()) for rows in (slice(0, 1), slice(1, 4))]
    for part in parts:
        part.backward()  # as accumulation does
    assert sum(part.item() for part in parts) == pytest.approx(9)
    assert [part.item() for part in parts] == pytest.approx([3 / 5, 42 / 5])
    torch.testing.assert_close(split.grad, whole.grad)


def test_nothing_valid_gives_zero_and_a_finite_gradient():
    values = VALUES.clone().requires_grad_()
    loss = masked_mean(values, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(values.grad, torch.zeros_like(VALUES))


def test_token_error_averages_over_draws_and_width_only():
    prediction = torch.zeros(1, 2, 3, 2)  # [B, K, T, A]
    target = torch.tensor([[[[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]], [[1.0, 1.0], [0.0, 4.0], [0.0, 0.0]]]])
    known = torch.ones(1, 3, 2, dtype=torch.bool)
    assert torch.equal(token_error(prediction, target, known), torch.tensor([[12 / 4, 16 / 4, 8 / 4]]))
    known = torch.tensor([[[True, False], [False, True], [False, False]]])
    assert torch.equal(token_error(prediction, target, known), torch.tensor([[2 / 2, 16 / 2, 0]]))
