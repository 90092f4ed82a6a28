"""A batch of several robots: each sample is normalised with the statistics of its robot. And of relative actions."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smolvla_shared.batch import Batch, RawBatch, to_device
from smolvla_shared.config import ACTION, LATENT, CoreConfig
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor, pad_width
from smolvla_shared.relative_actions import Relative
from smolvla_shared.robots import Robots


class RobotsPreprocessor(Preprocessor):
    """A Preprocessor that normalises state and actions of each sample with the statistics of its robot."""

    def __init__(self, config: CoreConfig, tokenizer: Any, statistics: dict[str, Statistics], robots: Robots):
        super().__init__(config, tokenizer, statistics)
        self.tables = {name: tables(robots, statistics, name, config) for name in robots.widths}
        (self.kind,) = {type(of) for name, of in statistics.items() if name != LATENT}  # a run has one mode

    def of_samples(self, name: str, dataset: list[int], device: torch.device) -> list[Tensor]:
        """The two statistics that normalise, and whether a dimension is the robot's, of samples of these datasets:
        [B, A] each.
        """
        self.tables = to_device(self.tables, device)  # copied once
        index = torch.tensor(dataset, device=device)
        return [of[index] for of in self.tables[name]]

    def normalize(self, name: str, values: Tensor, dataset: list[int]) -> Tensor:
        """State [B, A] or actions [B, T, A]; the padding stays 0."""
        first, second, own = self.of_samples(name, dataset, values.device)
        if values.ndim == 3:
            first, second, own = first[:, None], second[:, None], own[:, None]
        return self.kind.normalized(values.float(), first, second).where(own, 0)

    def __call__(self, raw: RawBatch, latents: Tensor | None = None) -> Batch:
        batch = super().__call__(raw, latents)
        if ACTION in batch.targets:
            # What is not the robot's is NaN, unknown to the loss. As in a policy of that robot alone it has no noise,
            # unless the model is one whose padding is noisy.
            target, config = batch.targets[ACTION], self.config
            *_, own = self.of_samples(ACTION, raw.dataset, target.value.device)
            value = target.value[..., : config.action_dim].where(own[:, None], torch.nan)
            value = pad_width(value, config.max_action_dim)
            noise = target.noise
            if not config.noisy_padding:
                noise = noise * pad_width(own, config.max_action_dim)[:, None, None]
            batch.targets[ACTION] = replace(target, value=value, noise=noise)
        return batch


class RelativePreprocessor(Preprocessor):
    """A Preprocessor whose actions are relative to the state."""

    def __init__(self, config: CoreConfig, tokenizer: Any, statistics: dict[str, Statistics], relative: Relative):
        super().__init__(config, tokenizer, statistics)
        self.relative = relative

    def __call__(self, raw: RawBatch, latents: Tensor | None = None) -> Batch:
        if ACTION in raw.noise:
            raw = replace(raw, actions=self.relative.of(raw.actions, raw.state))
        return super().__call__(raw, latents)


def tables(
    robots: Robots, statistics: dict[str, Statistics], name: str, config: CoreConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """What normalises, of the robot of each dataset, and which dimensions it has: [datasets, A] each.

    A dataset without a robot, whose samples do not count, has all of them.
    """
    shape = len(robots.of_dataset), {"state": config.state_dim, ACTION: config.action_dim}[name]
    first, second, own = torch.zeros(shape), torch.ones(shape), torch.ones(shape, dtype=torch.bool)
    for index, robot in enumerate(robots.of_dataset):
        if width := robots.widths[name].get(robot):
            of = statistics[robots.key(name, robot)]
            first[index, :width], second[index, :width] = of.tensors()
            own[index, width:] = False
    return first, second, own


def make_preprocessor(
    config: CoreConfig, tokenizer: Any, statistics: dict[str, Statistics], robots: Robots
) -> Preprocessor:
    """statistics: those of `Robots.statistics`, and of "latent" """
    if robots.relative:
        return RelativePreprocessor(config, tokenizer, statistics, robots.relative)
    if len(robots.names) < 2:
        return Preprocessor(config, tokenizer, statistics)
    return RobotsPreprocessor(config, tokenizer, statistics, robots)
