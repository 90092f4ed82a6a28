"""Errors on held-out samples."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from smolvla_shared import losses
from smolvla_shared.batch import Labels, RawBatch, to_device
from smolvla_shared.config import ACTION, LATENT
from smolvla_shared.laq import LAQ, pixel_error
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.preprocess import Preprocessor, nearest_codes, normalize_codebook, unit_range


@torch.no_grad()
def held_out_errors(
    core: SmolVLASharedCore,
    batches: Iterable[RawBatch],
    preprocessor: Preprocessor,
    accelerator: Accelerator,
    labels: Labels | None = None,
    executed: int = 0,
) -> dict[str, float]:
    """Errors on held-out samples, of each target, in normalised units.

    val/{target}                the loss: of flow matching, or a code's cross-entropy
    val/{target}_error          the mean squared error of the predicted mean
    val/{target}_error_of_mean  the mean squared error of always predicting the training mean

    The predicted mean is a sample of one Euler step: at t = 1 the input is pure noise, and the best velocity is
    noise - E[target | observation]. With several latent actions in a row also val/latent_error_1, _2, ..., the error of
    each. With quantized labels also

    val/latent_code_accuracy                how often the code nearest to the predicted mean is the teacher's
    val/latent_code_accuracy_of_majority    how often each slot's most common held-out code is the teacher's

    labels: of a core that has a latent head; another's, which --decode-actions reads, are not asked for any
    executed: actions of a chunk that a rollout executes; then also

    val/executed_action_error   their mean absolute error over all dimensions, generated as in a rollout, in the robot's
                                units (of relative actions: the same differences)
    """
    totals: dict[str, Tensor] = {}

    def add(key: str, values: Tensor, mask: Tensor) -> None:
        totals[key] = totals.get(key, 0) + torch.stack([losses.masked_sum(values, mask), mask.sum()])

    codes = counts = None
    if labels and LATENT not in preprocessor.statistics:
        labels = None
    if labels and labels.kind == "quantized":
        codes = normalize_codebook(labels.codebook, labels.shape[0], preprocessor.statistics[LATENT])  # [S, C, D]
        counts = torch.zeros(codes.shape[:2], device=accelerator.device)  # of each slot's codes
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
                    f"{name}_error": (mean - truth).square().nanmean(-1),  # NaN: not a dimension of the robot
                    f"{name}_error_of_mean": truth.square().nanmean(-1),
                }
                if name == LATENT and codes is not None:
                    code = nearest_codes(truth, codes)  # [B, S]
                    tokens["latent_code_accuracy"] = (nearest_codes(mean, codes) == code).float()
                    counts += (F.one_hot(code, counts.shape[1]) * target.mask[..., None]).sum(0)
                for key, values in tokens.items():
                    add(key, values, target.mask)
                if name == ACTION and executed:
                    error = core.sample(batch, name, target.noise[:, 0])[..., : raw.actions.shape[-1]] - truth
                    error = preprocessor.in_units(name, error, raw.dataset).abs().nanmean(-1)
                    add("executed_action_error", error[:, :executed], target.mask[:, :executed])
                if name == LATENT and labels and labels.horizon > 1:
                    in_a_row = (of.chunk(labels.horizon, dim=1) for of in (tokens["latent_error"], target.mask))
                    for place, of_one in enumerate(zip(*in_a_row), start=1):
                        add(f"latent_error_{place}", *of_one)
    reduced = {key: accelerator.reduce(total, "sum").tolist() for key, total in totals.items()}
    if counts is not None:
        counts = accelerator.reduce(counts, "sum")
        reduced["latent_code_accuracy_of_majority"] = counts.amax(1).sum().item(), counts.sum().item()
    return {f"val/{key}": total / max(count, 1) for key, (total, count) in reduced.items()}


def repeat_error(laq: LAQ, batches: Iterable[RawBatch]) -> float:
    """Mean squared pixel error of repeating the first frame, as the teacher sees frames.

    Raises ValueError if nothing moves.
    """
    pairs = [laq.resize(unit_range(raw.pairs.flatten(0, 1))).unbind(1) for raw in batches]
    error = torch.cat([pixel_error(first, second) for first, second in pairs]).mean().item()
    if error == 0:
        raise ValueError("the frames of every pair are equal: try a larger --data.frame-gap-s, or another camera")
    return error


@torch.no_grad()
def reconstruction_errors(laq: LAQ, batches: Iterable[RawBatch], accelerator: Accelerator) -> dict[str, float]:
    """Held-out pixel errors of the second frame: reconstructed from its codes, and by repeating the first frame."""
    sums = torch.zeros(3, device=accelerator.device)
    for raw in batches:
        frames = laq.resize(unit_range(raw.pairs.flatten(0, 1).to(accelerator.device)))
        mask = raw.pair_mask[:, 0].to(accelerator.device).repeat_interleave(raw.pairs.shape[1])
        predicted = laq.reconstruct(frames)
        errors = [pixel_error(image, frames[:, 1]) * mask for image in (predicted, frames[:, 0])]
        sums += torch.stack([errors[0].sum(), errors[1].sum(), mask.sum()])
    error, of_first_frame, count = accelerator.reduce(sums, "sum").tolist()
    count = max(count, 1)
    return {"val/reconstruction": error / count, "val/reconstruction_of_first_frame": of_first_frame / count}
