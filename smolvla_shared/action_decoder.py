"""Actions for video without actions: a linear map from latent actions, fitted to the labelled demonstrations.

A policy can repeat a few demonstrations without a look at the image, whatever Stage 2 has taught it. The same
demonstrations are plenty to learn what a latent action means in the robot's units, and with that map the video's latent
actions become action labels: VPT's inverse-dynamics model (arXiv 2206.11795), LAPO's action decoder (arXiv 2312.10812).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvla_shared import label_probe
from smolvla_shared.batch import Labels, RawBatch, map_tensors, to_device
from smolvla_shared.data import RobotDataset
from smolvla_shared.data_loader import SampleSpec, sample_pairs
from smolvla_shared.data_rows import Rows

MAX_PAIRS = 10_000
# Latent actions in a row that tell the action over the first one's gap: a robot lags behind its commands, so that part
# of a motion is seen in the next pair only (measured in docs/evidence.md).
WINDOW = 2
# Ridge penalties to choose from, by what they tell of parts of episodes that the fit has not seen: demonstrations are
# few. Of whole episodes it would be too much to ask: with one demonstration of each task they are unseen tasks.
PENALTIES = 1e-2, 1e-1, 1.0
PARTS = 4
# A dimension of whose variance latent actions tell less, on such parts, stays unknown.
LEAST_R2 = 0.1


class AsIs:
    """The decoder where no actions are decoded."""

    def __call__(self, raw: RawBatch, latents: Tensor | None) -> RawBatch:
        return raw

    def __str__(self) -> str:
        return "actions as they were recorded"


AS_IS = AsIs()


@dataclass
class ActionDecoder:
    """Latent actions -> actions, for the samples of a batch that are video."""

    ridge: label_probe.Ridge
    # Smallest and largest action of the demonstrations, [A] each: what is decoded stays between them.
    low: Tensor
    high: Tensor
    # Control steps of the robot that a latent action covers.
    gap: int
    # Datasets of the run from this index on are video.
    first_video: int
    # R² of each action dimension on parts of episodes that a fit has not seen; None: it is constant, or too little is
    # left of the episodes to tell.
    r2: list[float | None]

    def __call__(self, raw: RawBatch, latents: Tensor) -> RawBatch:
        """The batch with the decoded actions of its video, from latent actions [B, M*S, D].

        They are the first (M - 1) * gap actions of a chunk, equal over each gap; the other steps are masked. Dimensions
        that latent actions do not tell are NaN.
        """
        length = raw.actions.shape[1]
        windows, known = in_windows(latents, raw.pair_mask)
        means = self.ridge(windows).clamp(self.low, self.high)  # [B, M - 1, A]
        means[..., [not tells for tells in self.tells]] = torch.nan
        steps = means.repeat_interleave(self.gap, dim=1)[:, :length]
        known = known.repeat_interleave(self.gap, dim=1)[:, :length]
        rest = length - steps.shape[1]
        is_video = torch.tensor([index >= self.first_video for index in raw.dataset], device=raw.actions.device)
        actions = torch.where(is_video[:, None, None], F.pad(steps, (0, 0, 0, rest)).to(raw.actions), raw.actions)
        mask = torch.where(is_video[:, None], F.pad(known, (0, rest)), raw.action_mask)
        return replace(raw, actions=actions, action_mask=mask)

    @property
    def tells(self) -> list[bool]:
        """Whether latent actions tell each dimension, as far as that is known."""
        return [value is None or value >= LEAST_R2 for value in self.r2]

    def __str__(self) -> str:
        found = ", ".join("-" if value is None else f"{value:.2f}" for value in self.r2)
        unknown = [f"{place}" for place, tells in enumerate(self.tells) if not tells]
        left_out = f"; of video, dimension {', '.join(unknown)} stays unknown" if unknown else ""
        return f"actions decoded from latent actions, {self.gap} steps each: R² on unseen parts {found}{left_out}"


def in_windows(latents: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Latent actions [B, M*S, D] -> WINDOW in a row, from each on, [B, M - 1, WINDOW*S*D]; whether all are of pairs."""
    latents = latents.unflatten(1, (pair_mask.shape[1], -1)).flatten(2)
    windows = latents.unfold(1, WINDOW, 1).transpose(2, 3).flatten(2)
    return windows, pair_mask.unfold(1, WINDOW, 1).all(-1)


def parts_of_episodes(dataset: RobotDataset, rows: Tensor, reach: int) -> Tensor:  # [n] -> [n, 3]
    """Which of an episode's PARTS equal parts the frames are in that lie `reach` before a row, at it, and after it."""
    episodes = dataset.episode_of(rows.numpy())
    start, end = (torch.from_numpy(places[episodes])[:, None] for places in (dataset.episode_from, dataset.episode_to))
    near = rows[:, None] + torch.tensor([-reach, 0, reach])
    return ((near - start) * PARTS // (end - start)).clamp(0, PARTS - 1)


def unseen_r2(latents: Tensor, actions: Tensor, parts: Tensor, penalty: float) -> list[float | None]:
    """R² of each action dimension, [n, F] -> [n, A], each part of the episodes predicted by a fit to the others: to
    rows (parts [n, 3]) whose latent actions share no frame with it.
    """
    predicted = torch.empty_like(actions, dtype=torch.float64)
    for part in range(PARTS):
        test, train = parts[:, 1] == part, (parts != part).all(1)
        if test.any() and train.sum() < 2:
            return [None] * actions.shape[1]
        predicted[test] = label_probe.Ridge.fit(latents[train], actions[train], penalty)(latents[test])
    return label_probe.r2(predicted, actions)


def check_horizon(decode_actions: bool, horizon: int) -> None:
    """Raise ValueError if there are fewer latent actions in a row than a decoder reads."""
    if decode_actions and horizon < WINDOW:
        raise ValueError(
            f"--decode-actions reads {WINDOW} latent actions in a row, --latent-horizon is {horizon}: pass one more "
            "than covers the chunk"
        )


def fit(
    labels: Labels,
    num_labelled: int,
    datasets: list[RobotDataset],
    rows: list[tuple[int, Rows]],
    seed: int,
    device: torch.device | str = "cpu",
) -> ActionDecoder:
    """Fit a decoder to the demonstrations, at most MAX_PAIRS of their pairs, drawn with the seed.

    num_labelled: how many datasets are demonstrations; they come first
    rows:         (dataset index, training rows) of each dataset of the run

    The target is the mean executed action over the gap. Raises ValueError for datasets of unequal gaps, and for
    absolute positions: an image pair tells how far something moved, not where to. Raises it, too, if there are fewer
    than WINDOW latent actions in a row, or if they tell no dimension.
    """
    check_horizon(True, labels.horizon)
    seconds = {dataset.name: dataset.frame_gap_s for dataset in datasets}
    if len(set(seconds.values())) > 1:
        raise ValueError(f"--decode-actions: all datasets must have one frame gap, they have, in seconds: {seconds}")
    labelled = datasets[:num_labelled]
    gaps = {dataset.name: dataset.gap for dataset in labelled}
    if len(set(gaps.values())) > 1:
        raise ValueError(f"--decode-actions: the demonstrations' frame gaps cover different numbers of steps: {gaps}")
    for dataset in labelled:
        mode, reason = label_probe.action_mode(dataset)
        if mode == "change":
            raise ValueError(
                f"--decode-actions: the actions of {dataset.name} are absolute positions ({reason}), a latent action "
                "tells a motion: record velocities or relative actions, or train without --decode-actions"
            )
    labels.to(device)
    raws = list(sample_pairs(labelled, rows[:num_labelled], SampleSpec.of_pairs(labels), MAX_PAIRS, seed))
    both = [in_windows(labels(to_device(raw, device)).cpu(), raw.pair_mask) for raw in raws]
    known, gap = torch.cat([known[:, 0] for _, known in both]), labelled[0].gap
    latents = torch.cat([windows[:, 0] for windows, _ in both])[known]
    places = torch.tensor([place for raw in raws for place in zip(raw.dataset, raw.row)])[known]  # by dataset
    drawn = [(dataset, places[places[:, 0] == index, 1]) for index, dataset in enumerate(labelled)]
    actions = torch.cat([label_probe.actions_over_gap(dataset, of_it, "sum") for dataset, of_it in drawn]) / gap
    parts = torch.cat([parts_of_episodes(dataset, of_it, WINDOW * gap) for dataset, of_it in drawn])
    by_penalty = {penalty: unseen_r2(latents, actions, parts, penalty) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda penalty: sum(max(value or 0, 0) for value in by_penalty[penalty]))
    r2 = by_penalty[penalty]
    fitted = [label_probe.Ridge.fit(latents, actions, penalty), actions.amin(0), actions.amax(0)]
    decoder = ActionDecoder(*map_tensors(lambda t: t.float().to(device), fitted), gap, len(labelled), r2)
    if not any(decoder.tells):
        raise ValueError(
            f"--decode-actions: the latent actions do not tell the actions of the demonstrations ({decoder}): look at "
            "`python -m smolvla_shared.teacher check`, or train without --decode-actions"
        )
    return decoder
