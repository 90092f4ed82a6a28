"""The optimizer of a run: AdamW, its schedule, gradient clipping, and what happens to gradients that are not finite."""

import math

import torch
from torch import Tensor, nn

from smolvla_shared.config import OptimConfig
from smolvla_shared.run_sharding import full


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW. On a CPU, too, it takes a fraction of the time of PyTorch's default."""
    options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    return torch.optim.AdamW(parameters, **options, fused=True)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from the peak down to its final share; `step` counts from 0."""
    by_default = min(config.most_warmup_steps, num_steps // 10)
    warmup_steps = by_default if config.warmup_steps is None else config.warmup_steps
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def clip_gradients(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to the norm `max_norm` at most; returns their norm before.

    The same numbers as torch.nn.utils.clip_grad_norm_: the gradients times min(1, max_norm / norm). The fused AdamW
    applies the factor while it reads the gradients (grad_scale, meant for float16), so no pass over all of them is
    spent on it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = full(torch.nn.utils.get_total_norm(gradients))
    optimizer.grad_scale = (norm.float() / max_norm).clamp(min=1)
    return norm


class FiniteGradients:
    """Keeps gradients that are not finite out of the weights, and remembers the first step that had them.

    Asking the device in every step would make each step wait for the last one. Therefore the first bad step is kept on
    the device, and from it on the fused AdamW skips its updates (found_inf): the weights stay those before that step
    until the host reads it. All processes see the same gradient norm, so they stop together.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.checks_every_step = device.type == "cpu"  # on a GPU reading the norm would stall the stream
        self.first_bad = torch.full((), math.inf, device=device)
        self.bad_samples: Tensor | None = None  # of the first bad step, in the order in which they were read
        optimizer.found_inf = self.skip = torch.zeros((), device=device)

    def watch(self, step: int, grad_norm: Tensor, bad_samples: Tensor) -> None:
        """Note the gradient norm of a step, and which of its samples have an error that is not finite ([B] bool)."""
        is_first = ~grad_norm.isfinite() & self.first_bad.isinf()
        if self.bad_samples is None:
            self.bad_samples = torch.zeros_like(bad_samples)
        self.bad_samples = torch.where(is_first, bad_samples, self.bad_samples)
        self.first_bad = torch.where(is_first, float(step), self.first_bad)
        self.skip.copy_(self.first_bad.isfinite())

    def bad_step(self, must_know: bool) -> int | None:
        """The first bad step, counted from 1. None if there is none, or if asking is costly and nobody must know."""
        if not (self.checks_every_step or must_know):
            return None
        step = self.first_bad.item()
        return int(step) if math.isfinite(step) else None
