"""Flow matching (Lipman et al., arXiv 2210.02747) in the convention of pi0 and SmolVLA (arXiv 2506.01844).

Time runs from t = 1, pure noise, to t = 0, data; the network predicts the velocity u = noise - target.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], time [B]) -> velocity [B, ...]
Guide = Callable[[Velocity, Tensor, Tensor], Tensor]  # (velocity, x_t, time) -> the velocity in its place


def training_time[Array: (np.ndarray, Tensor)](drawn: Array) -> Array:
    """Draws of a Beta distribution in [0, 1] -> training times in [0.001, 1]: never 0."""
    return 0.999 * drawn + 0.001


def draw_noise_and_time(
    rng: np.random.Generator, num_draws: int, shape: tuple[int, int], alpha: float, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Noise [K, *shape] and times [K] of one sample, float32; the times follow Beta(alpha, beta)."""
    noise = rng.standard_normal((num_draws, *shape), dtype=np.float32)
    return noise, training_time(rng.beta(alpha, beta, num_draws)).astype(np.float32)


def episode_noise(seed: int, step: int, shape: tuple[int, int]) -> Tensor:
    """The noise [T, A] that a policy generates the chunk of this step of an episode from."""
    return torch.from_numpy(np.random.default_rng([seed, step]).standard_normal(shape, dtype=np.float32))


def interpolate(target: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t on the straight path from data to noise, and the path's velocity u_t.

    target and noise are [..., T, A], time is [...].
    """
    t = time[..., None, None]
    x_t = t * noise + (1 - t) * target
    u_t = noise - target
    return x_t, u_t


def time_embedding(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sine-cosine embedding of times [...] -> [..., width] float32, with geometrically spaced periods.

    Computed in float64: at the shortest period of 4e-3, float32 phases would differ between implementations.
    """
    device = "cpu" if time.device.type == "mps" else time.device  # Apple's GPUs have no float64
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=device)
    period = min_period * (max_period / min_period) ** fraction
    phase = 2 * math.pi * time.to(device).double()[..., None] / period
    return torch.cat([phase.sin(), phase.cos()], dim=-1).float().to(time.device)


def euler_sample(velocity: Velocity, noise: Tensor, num_steps: int, guide: Guide | None = None) -> Tensor:
    """Integrate dx = velocity(x, t) dt from t = 1 (x = noise [B, ...]) to t = 0 in equal steps; times are [B]."""
    x_t = noise
    for step in range(num_steps):
        time = torch.full(noise.shape[:1], 1 - step / num_steps, device=noise.device)
        v_t = guide(velocity, x_t, time) if guide else velocity(x_t, time)
        x_t = x_t - v_t / num_steps
    return x_t
