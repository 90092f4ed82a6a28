"""Errors on held-out samples."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from smolvla_shared import losses
from smolvla_shared.batch import Labels, RawBatch, to_device
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.preprocess import Preprocessor


@torch.no_grad()
def held_out_errors(
    core: SmolVLASharedCore,
    batches: Iterable[RawBatch],
    preprocessor: Preprocessor,
    accelerator: Accelerator,
    labels: Labels | None = None,
) -> dict[str, float]:
    """Errors on held-out samples, of each target, in normalised units.

    val/{target}                the flow-matching loss
    val/{target}_error          the mean squared error of the predicted mean
    val/{target}_error_of_mean  the mean squared error of always predicting the training mean

    The predicted mean is a sample of one Euler step: at t = 1 the input is pure noise, and the best velocity is
    noise - E[target | observation].
    """
    totals: dict[str, Tensor] = {}
    for raw in batches:
        raw = to_device(raw, accelerator.device)
        batch = preprocessor(raw, labels(raw) if labels else None)
        with accelerator.autocast():
            errors = core(batch)
            for name, target in batch.targets.items():
                mean = core.sample(batch, name, target.noise[:, 0], num_steps=1)
                truth = target.value[..., : mean.shape[-1]]
                tokens = {
                    name: errors[name],
                    f"{name}_error": (mean - truth).square().mean(-1),
                    f"{name}_error_of_mean": truth.square().mean(-1),
                }
                for key, values in tokens.items():
                    part = torch.stack([losses.masked_sum(values, target.mask), target.mask.sum()])
                    totals[key] = totals.get(key, 0) + part
    reduced = {key: accelerator.reduce(total, "sum").tolist() for key, total in totals.items()}
    return {f"val/{key}": total / max(count, 1) for key, (total, count) in reduced.items()}
