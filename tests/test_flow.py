"""Flow matching against closed-form answers and LeRobot's functions."""

import itertools
import math

import numpy as np
import pytest
import torch
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

from smolvla_shared.flow import draw_noise_and_time, euler_sample, interpolate, time_embedding


def test_euler_on_a_constant_velocity_is_exact():
    noise = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    # With halves and eighths float arithmetic is exact too, so that equality may be asked for.
    noise, velocity = (noise * 8).round() / 8, torch.full((3, 16, 4), -2.5)
    assert torch.equal(euler_sample(lambda x, t: velocity, noise, num_steps=8), noise + 2.5)
    torch.testing.assert_close(euler_sample(lambda x, t: velocity, noise, num_steps=10), noise + 2.5)


def test_euler_of_the_straight_path_lands_on_its_target():
    # The velocity that leads every point to one target, (x - target) / t, is constant along the path.
    noise, target = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    sample = euler_sample(lambda x, t: (x - target) / t[:, None, None], noise, num_steps=7)
    torch.testing.assert_close(sample, target, rtol=0, atol=1e-5)


def test_euler_converges_on_a_linear_equation():
    noise = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    exact = noise * math.exp(-1)  # dx/dt = x from t = 1 to t = 0
    errors = []
    for steps in (10, 20, 40, 80):
        sample = euler_sample(lambda x, t: x, noise, steps)
        torch.testing.assert_close(sample, noise * (1 - 1 / steps) ** steps)
        errors.append((sample - exact).abs().max().item())
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2, 2, 2], rel=0.1)  # a method of first order


def test_euler_passes_the_time_at_the_start_of_each_step():
    times = []
    euler_sample(lambda x, t: times.append(t) or torch.zeros_like(x), torch.zeros(3, 2), num_steps=4)
    torch.testing.assert_close(torch.stack(times), torch.tensor([1.0, 0.75, 0.5, 0.25])[:, None].expand(4, 3))


def test_interpolate_goes_straight_from_data_to_noise():
    target, noise = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))  # [B, K, T, A] each
    at = {t: interpolate(target, noise, torch.full((3, 2), t)) for t in (0.0, 0.25, 1.0)}
    assert torch.equal(at[0.0][0], target)
    assert torch.equal(at[1.0][0], noise)
    velocity = at[0.25][1]
    torch.testing.assert_close(at[0.25][0], target + 0.25 * velocity)
    torch.testing.assert_close(velocity, at[1.0][0] - at[0.0][0])


def test_each_draw_has_its_own_time():
    x_t, _ = interpolate(torch.zeros(2, 3, 4, 1), torch.ones(2, 3, 4, 1), torch.arange(6.0).view(2, 3))
    assert torch.equal(x_t, torch.arange(6.0).view(2, 3, 1, 1).expand(2, 3, 4, 1))


@pytest.mark.parametrize("width", [96, 720])
def test_time_embedding_is_lerobots(width):
    time = torch.tensor([0.001, 0.0011, 0.1, 0.6, 0.999, 1.0])
    expected = create_sinusoidal_pos_embedding(time, width, 4e-3, 4.0, device=torch.device("cpu"))
    embedding = time_embedding(time.view(2, 3), width, 4e-3, 4.0)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.view(6, width), expected.float(), rtol=0, atol=1e-6)


def test_drawn_times_follow_the_beta_distribution():
    _, time = draw_noise_and_time(np.random.default_rng(0), 20_000, (1, 1), alpha=1.5, beta=1.0)
    assert (time.shape, time.dtype) == ((20_000,), np.float32)
    assert time.min() > 0.001 and time.max() <= 1
    assert time.mean() == pytest.approx(0.999 * 0.6 + 0.001, abs=0.006)  # three standard errors
    # Beta(1.5, 1) has the distribution function x ** 1.5; 1.95 / sqrt(n) bounds the difference in 999 of 1000 cases.
    drawn = np.sort((time - 0.001) / 0.999)
    difference = np.abs(drawn**1.5 - np.arange(1, 20_001) / 20_000).max()
    assert difference < 1.95 / math.sqrt(20_000)


def test_drawn_noise_is_standard_normal():
    noise, _ = draw_noise_and_time(np.random.default_rng(0), 100, (16, 4), alpha=1.5, beta=1.0)
    assert (noise.shape, noise.dtype) == ((100, 16, 4), np.float32)
    assert noise.mean() == pytest.approx(0, abs=0.04) and noise.std() == pytest.approx(1, abs=0.03)


def test_draws_are_functions_of_the_seed():
    def draw(seed):
        return draw_noise_and_time(np.random.default_rng(seed), 3, (16, 4), alpha=1.5, beta=1.0)

    (noise, time), (same_noise, same_time), (other_noise, other_time) = draw([0, 7]), draw([0, 7]), draw([0, 8])
    assert np.array_equal(noise, same_noise) and np.array_equal(time, same_time)
    assert not np.isclose(noise, other_noise).any() and not np.isclose(time, other_time).any()
    assert len(np.unique(time)) == 3  # the draws of a sample differ
