"""Actions for video without actions: a linear map from latent actions, fitted to the labelled demonstrations.

A policy can repeat a few demonstrations without a look at the image, whatever Stage 2 has taught it. The same
demonstrations are plenty to learn what a latent action means in the robot's units, and with that map the video's latent
actions become action labels: VPT's inverse-dynamics model (arXiv 2206.11795), LAPO's action decoder (arXiv 2312.10812).

A latent action tells a motion. A velocity is decoded as it is. Of an absolute position it tells the change, so that a
policy of relative actions (relative_actions.py) can learn it, and no other.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smolvla_shared import data_values, label_probe
from smolvla_shared.batch import Labels, RawBatch, map_tensors, to_device
from smolvla_shared.data import ACTION_KEY, STATE_KEY, RobotDataset
from smolvla_shared.data_columns import MEND
from smolvla_shared.data_loader import SampleSpec, sample_pairs
from smolvla_shared.data_rows import Rows
from smolvla_shared.relative_actions import Relative
from smolvla_shared.teacher_config import in_words

MAX_PAIRS = 10_000
# Latent actions in a row that tell the action over the first one's gap: a robot lags behind its commands, so that part
# of a motion is seen in the next pair only (measured in docs/evidence.md).
WINDOW = 2
# Ridge penalties to choose from, by what they tell of parts of episodes that the fit has not seen: demonstrations are
# few. Of whole episodes it would be too much to ask, with one demonstration of each task they are unseen tasks; only
# where episodes are too short to be parted they are left out whole.
PENALTIES = 1.0, 1e-1, 1e-2
PARTS = 4
# A dimension of whose variance latent actions tell less, on such parts, stays unknown.
LEAST_R2 = 0.1


class AsIs:
    """The decoder where no actions are decoded."""

    def __call__(self, raw: RawBatch, latents: Tensor | None) -> RawBatch:
        return raw

    def __str__(self) -> str:
        return "actions as they were recorded"


@dataclass
class ActionDecoder:
    """Latent actions -> actions, for the samples of a batch that are video."""

    ridge: label_probe.Ridge  # windows of latent actions -> `motions`, [2A]
    # Smallest and largest motion of the demonstrations, [2A] each: what is decoded stays between them.
    low: Tensor
    high: Tensor
    # Whether a dimension is relative to the state at a chunk's first frame, [A] bool.
    relative: Tensor
    # Control steps of the robot that a latent action covers.
    gap: int
    # Datasets of the run from this index on are video.
    first_video: int
    # R² of each action dimension on parts of episodes that a fit has not seen; None: it is constant.
    r2: list[float | None]
    # Whose latent actions these are, in words.
    teacher: str

    def __call__(self, raw: RawBatch, latents: Tensor) -> RawBatch:
        """The batch with the decoded actions of its video, from latent actions [B, M*S, D].

        They are the first (M - 1) * gap actions of a chunk; the other steps are masked. A velocity is equal over each
        gap. A position goes on at an equal pace over each gap, from where the first action is; the video's state, or 0
        where it has none, is what a relative action is relative to. Dimensions that latent actions do not tell are NaN.
        """
        length = raw.actions.shape[1]
        windows, known = in_windows(latents, raw.pair_mask)
        paces, first = self.ridge(windows).clamp(self.low, self.high).chunk(2, dim=-1)  # [B, M - 1, A] each
        paces[..., [not tells for tells in self.tells]] = torch.nan
        steps = paces.repeat_interleave(self.gap, dim=1)[:, :length]
        width = len(self.relative)
        start = first[:, :1] + F.pad(raw.state, (0, width))[:, None, :width]
        steps = torch.where(self.relative, start + steps.cumsum(1) - steps, steps)
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
        what = "actions, and changes of those that are relative," if self.relative.any() else "actions"
        return (
            f"{what} decoded from latent actions of {self.teacher}, {self.gap} steps each: R² on unseen parts "
            f"{found}{left_out}"
        )


def in_windows(latents: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Latent actions [B, M*S, D] -> WINDOW in a row, from each on, [B, M - 1, WINDOW*S*D]; whether all are of pairs."""
    latents = latents.unflatten(1, (pair_mask.shape[1], -1)).flatten(2)
    windows = latents.unfold(1, WINDOW, 1).transpose(2, 3).flatten(2)
    return windows, pair_mask.unfold(1, WINDOW, 1).all(-1)


def motions(dataset: RobotDataset, rows: Tensor, relative: Tensor) -> Tensor:  # [n], [A] bool -> [n, 2A]
    """What latent actions may tell of the executed actions over the gap of each pair: their mean and, of a relative
    dimension, the mean change from a control step to the next. Then how far the first one is from the state, or 0.
    """
    actions = label_probe.column(dataset, label_probe.action_key(dataset))
    mean, change = (label_probe.actions_over_gap(dataset, rows, mode) / dataset.gap for mode in ("sum", "change"))
    first = torch.zeros_like(mean)
    if relative.any():
        first = (actions[rows] - label_probe.column(dataset, STATE_KEY)[rows, : len(relative)]) * relative
    return torch.cat([torch.where(relative, change, mean), first], dim=1)


def parts_of_episodes(dataset: RobotDataset, rows: Tensor, reach: int) -> Tensor:  # [n] -> [n, 3]
    """Which of an episode's PARTS equal parts the frames are in that lie `reach` before a row, at it, and after it."""
    episodes = dataset.episode_of(rows.numpy())
    start, end = (torch.from_numpy(places[episodes])[:, None] for places in (dataset.episode_from, dataset.episode_to))
    near = rows[:, None] + torch.tensor([-reach, 0, reach])
    return ((near - start) * PARTS // (end - start)).clamp(0, PARTS - 1)


def unseen_r2(
    latents: Tensor, actions: Tensor, parts: Tensor, episodes: Tensor, penalty: float
) -> list[float | None] | None:
    """R² of each action dimension, [n, F] -> [n, A], each part of the episodes predicted by a fit to the others: to
    rows (parts [n, 3]) whose latent actions share no frame with it. If there are none, each episode (episodes [n]) is
    predicted by a fit to others; None if there is only one.
    """
    predicted = torch.empty_like(actions, dtype=torch.float64)
    for part in range(PARTS):
        test, train = parts[:, 1] == part, (parts[:, 0] > part) | (parts[:, 2] < part)
        if not test.any():
            continue
        if train.sum() < 2:
            return label_probe.probe(latents, actions, episodes, penalty)
        predicted[test] = label_probe.Ridge.fit(latents[train], actions[train], penalty)(latents[test])
    return label_probe.r2(predicted, actions)


def check_horizon(decode_actions: bool, horizon: int) -> None:
    """Raise ValueError if there are fewer latent actions in a row than a decoder reads."""
    if decode_actions and horizon < WINDOW:
        raise ValueError(
            f"--decode-actions reads {WINDOW} latent actions in a row, --latent-horizon is {horizon}: pass one more "
            "than covers the chunk"
        )


def refuse(labelled: list[RobotDataset], datasets: list[RobotDataset], relative: Relative | None) -> None:
    """Raise ValueError for datasets of unequal gaps, and for demonstrations whose actions cannot be decoded."""
    seconds = {dataset.name: dataset.frame_gap_s for dataset in datasets}
    if len(set(seconds.values())) > 1:
        raise ValueError(f"--decode-actions: all datasets must have one frame gap, they have, in seconds: {seconds}")
    gaps = {dataset.name: dataset.gap for dataset in labelled}
    if len(set(gaps.values())) > 1:
        raise ValueError(f"--decode-actions: the demonstrations' frame gaps cover different numbers of steps: {gaps}")
    for dataset in labelled:
        key, width = label_probe.action_key(dataset), dataset.vector_dim(ACTION_KEY)
        data_values.refuse_vectors([dataset], key)
        if dataset.vector_dim(key) != width:
            raise ValueError(
                f"--decode-actions: {dataset.name} has {width} actions, but {dataset.vector_dim(key)} of {key}: {MEND}"
            )
        mode, reason = label_probe.action_mode(dataset)
        if mode == "change" and relative is None:
            raise ValueError(
                f"--decode-actions: the actions of {dataset.name} are absolute positions ({reason}), a latent action "
                "tells a motion: pass --relative-actions, too"
            )


def fit(
    labels: Labels | None,
    num_labelled: int,
    datasets: list[RobotDataset],
    rows: list[tuple[int, Rows]],
    seed: int,
    device: torch.device | str = "cpu",
    relative: Relative | None = None,
) -> ActionDecoder | AsIs:
    """Fit a decoder to the demonstrations, at most MAX_PAIRS of their pairs, drawn with the seed.

    labels:       of the run; None: nothing is decoded
    num_labelled: how many datasets are demonstrations; they come first
    rows:         (dataset index, training rows) of each dataset of the run
    relative:     the relative actions that the policy learns; None: actions as recorded

    Raises ValueError for datasets of unequal gaps, and for absolute positions that are not relative: an image pair
    tells how far something moved, not where to. Raises it, too, if there are fewer than WINDOW latent actions in a row,
    if the demonstrations are too short to judge a fit, or if latent actions tell no dimension.
    """
    if labels is None:
        return AsIs()
    check_horizon(True, labels.horizon)
    labelled = datasets[:num_labelled]
    refuse(labelled, datasets, relative)
    labels.to(device)
    raws = list(sample_pairs(labelled, rows[:num_labelled], SampleSpec.of_pairs(labels), MAX_PAIRS, seed))
    both = [in_windows(labels(to_device(raw, device)).cpu(), raw.pair_mask) for raw in raws]
    known, gap = torch.cat([known[:, 0] for _, known in both]), labelled[0].gap
    latents = torch.cat([windows[:, 0] for windows, _ in both])[known]
    length = f"{WINDOW} latent actions, {WINDOW * labelled[0].gap_s:.3g} s (--data.frame-gap-s)"
    if not known.any():
        raise ValueError(f"--decode-actions: no demonstration is longer than {length}: pass a smaller gap")
    places = torch.tensor([place for raw in raws for place in zip(raw.dataset, raw.row)])[known]  # by dataset
    drawn = [(dataset, places[places[:, 0] == index, 1]) for index, dataset in enumerate(labelled)]
    width = labelled[0].vector_dim(ACTION_KEY)
    is_relative = torch.tensor(relative.mask if relative else [False] * width)
    told = torch.cat([motions(dataset, of_it, is_relative) for dataset, of_it in drawn])
    parts = torch.cat([parts_of_episodes(dataset, of_it, WINDOW * gap) for dataset, of_it in drawn])
    episodes = torch.cat([torch.from_numpy(dataset.episode_of(of_it.numpy())) for dataset, of_it in drawn])
    episodes += places[:, 0] * max(len(dataset.episode_to) for dataset in labelled)
    found = {penalty: unseen_r2(latents, told[:, :width], parts, episodes, penalty) for penalty in PENALTIES}
    if None in found.values():
        raise ValueError(
            "--decode-actions: one short demonstration does not show how well its actions are decoded: record a longer "
            f"one, or several; what is decoded reads {length}"
        )
    penalty = max(PENALTIES, key=lambda penalty: sum(max(value or 0, 0) for value in found[penalty]))
    fitted = [label_probe.Ridge.fit(latents, told, penalty), told.amin(0), told.amax(0)]
    fitted = map_tensors(lambda t: t.float().to(device), fitted)
    teacher = in_words(labels.teacher_id, labels.teacher_grounding)
    decoder = ActionDecoder(*fitted, is_relative.to(device), gap, num_labelled, found[penalty], teacher)
    if not any(decoder.tells):
        raise ValueError(
            f"--decode-actions: the latent actions do not tell the actions of the demonstrations ({decoder}): look at "
            "`python -m smolvla_shared.teacher check`, or train without --decode-actions"
        )
    return decoder
