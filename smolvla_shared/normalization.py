"""Statistics of a vector feature and what they make of its values, as LeRobot's normaliser does."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from smolvla_shared.config import NormalizationMode

EPS = 1e-8  # added to standard deviations; LeRobot's normaliser uses the same
LEAST_STD = 0.1  # of a latent action's dimension, as a share of the largest standard deviation


@lru_cache
def _copied_once(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    """A tensor that is copied to the device once: each copy makes the host wait for the device."""
    return torch.tensor(values, device=device)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of every dimension; `mode` names the normalisation: to mean 0 and deviation 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: Literal["mean_std"] = "mean_std"

    READ = "mean", "std"  # the two statistics that normalise

    def __post_init__(self):
        for name in self.names():
            object.__setattr__(self, name, tuple(getattr(self, name)))  # from lists
        widths = {name: len(values) for name, values in self.named().items()}
        if len({*widths.values()}) > 1:
            raise ValueError(f"statistics of one vector must have one width, found {widths}: write or copy them again")
        if negative := [value for value in self.std if value < 0]:
            raise ValueError(f"std must be at least 0, found {negative}: write or copy the statistics again")

    @classmethod
    def of(cls, values: Tensor) -> "Statistics":
        """Mean and standard deviation over the rows of [M, A]."""
        values = values.double()
        return Statistics(values.mean(0).tolist(), values.std(0, correction=0).tolist())

    def with_floor(self) -> "Statistics":
        """A standard deviation is at least LEAST_STD of the largest one: a dimension of a code that almost no pair has
        would otherwise become a target of hundreds, and that of a constant dimension's rounding a target at all.
        """
        floor = LEAST_STD * max(self.std)
        return replace(self, std=tuple(max(std, floor) for std in self.std))

    @classmethod
    def names(cls) -> list[str]:
        """The names of the statistics, which are LeRobot's."""
        return [field.name for field in fields(cls) if field.name != "mode"]

    def named(self) -> dict[str, tuple[float, ...]]:
        return {name: getattr(self, name) for name in self.names()}

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The two statistics of READ, [A] each."""
        first, second = (_copied_once(getattr(self, name), device) for name in self.READ)
        return first, second

    def normalize(self, values: Tensor) -> Tensor:
        return self.normalized(values.float(), *self.tensors(values.device))

    @staticmethod
    def normalized(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (values - mean) / (std + EPS)

    def unnormalize(self, values: Tensor) -> Tensor:
        # LeRobot's unnormaliser leaves EPS out; at 1e-8 of a unit of normalised value it changes nothing.
        mean, std = self.tensors(values.device)
        return values * std + mean


@dataclass(frozen=True, kw_only=True)
class Quantiles(Statistics):
    """Also the quantiles 0.01 and 0.99 of every dimension, which become -1 and 1. An outlier moves neither, and is not
    clipped.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mode: Literal["quantiles"] = "quantiles"

    READ = "q01", "q99"

    def __post_init__(self):
        super().__post_init__()
        if crossed := [pair for pair in zip(self.q01, self.q99, strict=True) if pair[0] > pair[1]]:
            raise ValueError(f"q01 must be at most q99, found {crossed}: write or copy the statistics again")

    @staticmethod
    def normalized(values: Tensor, q01: Tensor, q99: Tensor) -> Tensor:
        return 2 * (values - q01) / between(q01, q99) - 1

    def unnormalize(self, values: Tensor) -> Tensor:
        q01, q99 = self.tensors(values.device)
        return (values + 1) * between(q01, q99) / 2 + q01


def between(q01: Tensor, q99: Tensor) -> Tensor:
    """The distance of two quantiles. Equal ones, which statistics of others may have, count as EPS, as in LeRobot."""
    return (q99 - q01).masked_fill(q99 == q01, EPS)


KINDS: dict[NormalizationMode, type[Statistics]] = {kind.mode: kind for kind in (Statistics, Quantiles)}


def of_mode(mode: NormalizationMode, found: dict[str, list[float]]) -> Statistics:
    """The statistics of a mode, from these by their names. Raises ValueError if some are missing."""
    names = KINDS[mode].names()
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"statistics of the mode {mode} are {', '.join(names)}, missing: {', '.join(missing)}")
    return KINDS[mode](**{name: found[name] for name in names})
