"""Label health: are a teacher's latent actions worth learning? Measurements, thresholds and a verdict.

`Thresholds` lists what can go wrong and what shows it. label_check.py reads the frames and runs the teacher.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smolvla_shared import ranges
from smolvla_shared.artifact import Latents
from smolvla_shared.config import TeacherKind
from smolvla_shared.files import sealed, unseal, write_text
from smolvla_shared.label_probe import DISPLACEMENT, out_of_fold, probe
from smolvla_shared.laq_codebook import code_usage
from smolvla_shared.refusals import ADDED_LATER, decode, read_json, refuse_differences, refuse_schema
from smolvla_shared.teacher_config import GroundedIn

SCHEMA = "smolvla_shared.label_health.v2"


@dataclass(frozen=True)
class Thresholds:
    """Limits of the measurements: which fail the labels, and which only warn."""

    # Fail below: codes effectively used, mean over slots.
    perplexity: float = 1.5
    # Fail below: codes effectively used by a single slot. At 1 the slot is a constant.
    slot_perplexity: float = 1.1
    # Fail above: share of the pairs that have the most common code sequence. A target that is mostly constant can be
    # learned without looking at the frame.
    most_common_share: float = 0.5
    # Fail below: 1 - (reconstruction error with a pair's own latent) / (error with another pair's latent). At 0 the
    # latents say nothing about what happened, as with random weights.
    reconstruction_gain: float = 0.05
    # Fail below: (R² from the labels - random) / (ceiling - random), mean over the dimensions of a recorded motion.
    # random: R² from the continuous latents of random weights, which predict some motion, too. ceiling: R² of actions
    # from the true displacement; 1 for the displacement, or where none was recorded.
    gained_share: float = 0.1
    # Dimensions with less than this between random and ceiling, in R², are not judged.
    least_to_gain: float = 0.1
    # Fail above: share of the latents' variance that a shift of the whole frame explains. Above it the teacher mainly
    # encodes the camera.
    camera_share: float = 0.5
    # Fail above: cosine of the latents (past -> now) and (future -> now). These pairs share only the present frame:
    # motion makes their latents opposite, appearance makes them alike.
    leakage: float = 0.5
    # Warn above: variance of the latents of still pairs (x, x), over that of all pairs. Only appearance varies there.
    still_variance: float = 0.5
    # Warn above: share of pairs in which nothing moves. Such pairs teach to do nothing.
    static_share: float = 0.5
    # Warn above: share of frames whose episode ends before the second frame of the pair.
    invalid_share: float = 0.3
    # Warn below: the gained share of one dimension. Small motions (gripper, rotation) are missed first.
    gained_dimension: float = 0.1


THRESHOLDS = Thresholds()


# --- measurements -----------------------------------------------------------------------------------------------------


def image_shift(first: Tensor, second: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 2]
    """How far the whole frame moved, (down, right) in pixels; 0 if only a part of the frame moved.

    Phase correlation (Kuglin and Hines, 1975) finds the strongest shift. It is that of the whole frame if it brings
    more cells of the first frame closer to the second one than away from it.
    """
    height, width = first.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)  # fades the borders, which do not move

    def spectrum(frames: Tensor) -> Tensor:
        gray = frames.mean(1)
        return torch.fft.rfft2((gray - gray.mean((1, 2), keepdim=True)) * window)

    cross = spectrum(second) * spectrum(first).conj()
    correlation = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-9), s=(height, width))
    peak = correlation.flatten(1).argmax(1)
    down = (peak // width + height // 2) % height - height // 2
    right = (peak % width + width // 2) % width - width // 2
    moved = torch.stack([f.roll((y, x), (1, 2)) for f, y, x in zip(first, down.tolist(), right.tolist())])
    before, after = cell_change(first, second), cell_change(moved, second)
    is_whole = (after < before).sum(1) > (after > before).sum(1)
    return torch.stack([down, right], 1) * is_whole[:, None]


def cell_change(first: Tensor, second: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 64]
    """Mean absolute change of each of 8 x 8 cells of the frame."""
    return F.adaptive_avg_pool2d((second - first).abs().mean(1, keepdim=True), 8).flatten(1)


def shift_features(shift: Tensor) -> Tensor:  # [N, V, 2] -> [N, V * 7]
    """What latents that encode a shift could be linear in: its components, their squares and sizes."""
    y, x = shift.double().unbind(-1)
    return torch.stack([y, x, y * y, x * x, x * y, y.abs(), x.abs()], -1).flatten(1)


def explained_share(features: Tensor, targets: Tensor, episodes: Tensor) -> float | None:
    """Share of the targets' variance, over all dimensions together, that a linear fit predicts out of fold.

    None if the targets do not vary or there is only one episode.
    """
    predicted = out_of_fold(features, targets, episodes)
    total = (targets - targets.mean(0)).double().square().sum().item()
    if predicted is None or total < 1e-9 * targets.double().square().sum().item():
        return None
    return max(0.0, 1 - (predicted - targets).square().sum().item() / total)


def centred_cosine(one: Tensor, other: Tensor) -> float | None:  # [N, F]
    """Mean cosine of the rows of two sets, each set centred. None if a set does not vary or has fewer than two rows."""
    if len(one) < 2:
        return None
    centred = [rows - rows.mean(0) for rows in (one, other)]
    if any(c.norm() < 1e-5 * rows.norm() for c, rows in zip(centred, (one, other))):
        return None
    return F.cosine_similarity(*centred, dim=1).mean().item()


# A cell that changes less is still: video compression changes it as much. Share of the pixel range.
STATIC_CHANGE = 2 / 255


@dataclass
class Target:
    """A recorded motion over the gap of each pair (label_probe.py)."""

    values: Tensor  # [N, A]; NaN for datasets without it
    dimensions: tuple[str, ...]  # names of the A dimensions


@dataclass
class Observations:
    """What was observed of N samples, of M of them in detail: a pair of each of V label cameras, whose S codes together
    are a latent action. Latents are of the kind to be learned, flattened.
    """

    episodes: Tensor  # [N] int64, unique over all datasets
    indices: Tensor  # [N, S]
    latents: Tensor  # [N, S * D]
    random_latents: Tensor  # [N, S * D], of a randomly initialised teacher of the same shape
    change: Tensor  # [N], the largest change of a cell
    shift: Tensor  # [N, V, 2], of the whole frame of each label camera
    targets: dict[str, Target]  # by the name of the recorded column
    still_latents: Tensor  # [M, S * D]
    past_to_now: Tensor  # [L, S * D], of the L detailed pairs with a frame a gap before
    future_to_now: Tensor  # [L, S * D]
    own_error: Tensor  # [M * V], squared error of the second frame's reconstruction from the pair's own latent
    other_error: Tensor  # [M * V], from another pair's latent


def probe_targets(seen: Observations) -> dict[str, dict[str, Any]]:
    """R² of the dimensions of each target: from the labels, from a random teacher's continuous latents, from the labels
    of other pairs, and (`ceiling`, for actions if there is a state) from the displacement.
    """
    order = torch.randperm(len(seen.latents), generator=torch.Generator().manual_seed(0))
    moved = seen.targets.get(DISPLACEMENT)
    rows = {}
    for name, target in seen.targets.items():
        latents = probe(seen.latents, target.values, seen.episodes)
        if latents is None:
            continue
        rows[name] = {
            "dimensions": target.dimensions,
            "latents": latents,
            "random_teacher": probe(seen.random_latents, target.values, seen.episodes),
            "shuffled": probe(seen.latents, target.values[order], seen.episodes),
            "ceiling": None,
        }
        if moved and name != DISPLACEMENT:
            both = ~moved.values.isnan().any(1)
            rows[name]["ceiling"] = probe(moved.values[both], target.values[both], seen.episodes[both])
        rows[name]["gained_share"] = gained_shares(rows[name])
    return rows


def gained_shares(row: dict[str, Any]) -> list[float | None]:
    """By dimension: (latents - random_teacher) / (ceiling - random_teacher); None if the divisor is too small.

    R² below 0 count as 0.
    """
    shares = []
    ceiling = row["ceiling"] or [1.0] * len(row["latents"])
    for values in zip(row["latents"], row["random_teacher"], ceiling):
        own, random, most = (0.0 if value is None else max(0.0, value) for value in values)
        is_told = None not in values and most - random > THRESHOLDS.least_to_gain
        shares.append((own - random) / (most - random) if is_told else None)
    return shares


def measure(seen: Observations, codebook_size: int) -> dict[str, Any]:
    """All measurements, as JSON values; None is "not measured"."""
    total = (seen.latents - seen.latents.mean(0)).square().sum(1).mean()
    still = (seen.still_latents - seen.still_latents.mean(0)).square().sum(1).mean()
    return {
        "pairs": len(seen.latents),
        "episodes": len(seen.episodes.unique()),
        "codes": code_usage(seen.indices, codebook_size),
        "static_share": (seen.change < STATIC_CHANGE).double().mean().item(),
        "still_variance": (still / total).item() if total > 0 else None,
        "probe": probe_targets(seen),
        "leakage": centred_cosine(seen.past_to_now, seen.future_to_now),
        "camera_share": explained_share(shift_features(seen.shift), seen.latents, seen.episodes),
        "reconstruction": {
            "own_latent": seen.own_error.mean().item(),
            "another_pairs_latent": seen.other_error.mean().item(),
            "gain": 1 - (seen.own_error.mean() / seen.other_error.mean()).item(),
        },
    }


# --- verdict ----------------------------------------------------------------------------------------------------------


def judge(found: dict[str, Any], kind: TeacherKind) -> tuple[list[str], list[str]]:
    """Reasons to fail the labels, and warnings, in words. What was not measured gives neither."""
    failures, warnings = [], []
    codes, gain = found["codes"], found["reconstruction"]["gain"]
    mean_perplexity = float(np.mean(codes["perplexity"]))
    is_quantized = kind == "quantized"  # continuous latents do not depend on the codebook
    if is_quantized and mean_perplexity < THRESHOLDS.perplexity:
        failures.append(
            f"collapsed: a slot effectively uses {mean_perplexity:.2f} codes (at least {THRESHOLDS.perplexity}); "
            "fine-tune from a healthy teacher, lower the learning rate or replace dead codes more often"
        )
    constant = [slot for slot, value in enumerate(codes["perplexity"]) if value < THRESHOLDS.slot_perplexity]
    if is_quantized and constant and len(constant) < len(codes["perplexity"]):
        failures.append(f"slots {constant} of the latent action are constants: they use one code for nearly every pair")
    if is_quantized and codes["most_common_share"] > THRESHOLDS.most_common_share:
        failures.append(
            f"one code sequence is the label of {codes['most_common_share']:.0%} of the pairs (at most "
            f"{THRESHOLDS.most_common_share:.0%}): a constant would predict it"
        )
    if gain < THRESHOLDS.reconstruction_gain:
        failures.append(
            f"the latents tell nothing about the second frame: another pair's predict it as well (error lower by "
            f"{gain:.1%} with the pair's own, at least {THRESHOLDS.reconstruction_gain:.0%}), as with a random teacher"
        )
    for name, row in found["probe"].items():
        refused, warned = judge_probe(name, row)
        failures, warnings = failures + refused, warnings + warned
    if (share := found["camera_share"]) is not None and share > THRESHOLDS.camera_share:
        failures.append(
            f"camera motion: a shift of the whole frame explains {share:.0%} of the latents (at most "
            f"{THRESHOLDS.camera_share:.0%}); steady the video or label another camera"
        )
    if (leakage := found["leakage"]) is not None and leakage > THRESHOLDS.leakage:
        failures.append(
            f"appearance, not motion: latents towards the same frame from its past and from its future agree (cosine "
            f"{leakage:.2f}, at most {THRESHOLDS.leakage})"
        )
    if (still := found["still_variance"]) is not None and still > THRESHOLDS.still_variance:
        warnings.append(f"pairs (x, x) without motion vary {still:.0%} as much as the others: appearance leaks in")
    if found["static_share"] > THRESHOLDS.static_share:
        warnings.append(f"nothing moves in {found['static_share']:.0%} of the pairs: cut idle parts or raise the gap")
    if found["invalid_share"] > THRESHOLDS.invalid_share:
        warnings.append(f"{found['invalid_share']:.0%} of the frames have no pair within their episode: lower the gap")
    return failures, warnings


def judge_probe(name: str, row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Reasons to fail the labels, and warnings, from one target of the probe."""
    shares = dict(zip(row["dimensions"], row["gained_share"]))
    moving = [dim for dim, value in zip(row["dimensions"], row["latents"]) if value is not None]
    warnings = []
    if untold := [dim for dim in moving if shares[dim] is None]:
        warnings.append(
            f"{name}: {', '.join(untold)} cannot be judged: the ceiling is hardly above a random teacher (less than "
            f"{THRESHOLDS.least_to_gain} of R²)"
        )
    known = {dim: share for dim, share in shares.items() if share is not None}
    mean = float(np.mean(list(known.values()))) if known else None
    if mean is not None and mean < THRESHOLDS.gained_share:
        failure = (
            f"the latents tell hardly more about the {name} than a random teacher's: of what those leave to gain they "
            f"gain {mean:.0%}, mean over {', '.join(known)} (at least {THRESHOLDS.gained_share:.0%}): train the "
            "teacher longer, ground it (--grounding.roots), or try another --data.frame-gap-s"
        )
        return [failure], warnings
    if missed := [dim for dim, share in known.items() if share < THRESHOLDS.gained_dimension]:
        warnings.append(
            f"{name}: {', '.join(missed)} no better than with a random teacher (less than "
            f"{THRESHOLDS.gained_dimension:.0%} of what there is to gain)"
        )
    return [], warnings


@dataclass(frozen=True)
class Verdict:
    """The part of label_health.json that Stage 2 reads and its artifact records."""

    verdict: Literal["pass", "fail"]
    reasons: tuple[str, ...]
    # Which labels were checked.
    teacher_id: str
    teacher_kind: TeacherKind
    frame_gap_s: ranges.Positive
    cameras: tuple[str, ...]
    own_gaps_s: tuple[ranges.Positive, ...] = ()  # of a mixture, as in artifact.Latents
    teacher_grounding: GroundedIn | None = field(default=None, metadata=ADDED_LATER)


def write_report(path: Path, verdict: Verdict, found: dict[str, Any], warnings: list[str]) -> None:
    """Write label_health.json: the verdict, and the measurements and thresholds it is based on."""
    report = {"schema_version": SCHEMA} | asdict(verdict)
    report |= {"warnings": warnings, "measured": found, "thresholds": asdict(THRESHOLDS)}
    write_text(path, sealed(report))


def read_verdict(path: Path) -> Verdict:
    """The verdict of a label_health.json. Raises ValueError if the file is missing or holds something else."""
    if not path.is_file():
        raise ValueError(f"--label-health {path}: no such file; `python -m smolvla_shared.teacher check` writes it")
    report = read_json(path)
    refuse_schema(path, report, SCHEMA)
    names = {field.name for field in fields(Verdict)}
    verdict = decode(Verdict, {name: value for name, value in report.items() if name in names}, str(path))
    unseal(path, report)
    return verdict


def with_health(latents: Latents, report: Path | None, accept: bool) -> Latents:
    """The artifact's record of a run's latent actions, with the verdict of their health report if there is one.

    Raises ValueError for a report on other labels, and for a failed verdict without `accept`.
    """
    if report is None:
        return latents
    verdict = read_verdict(report)
    refuse_differences(
        "--label-health is about other labels",
        [
            ("teacher", latents.teacher_id, verdict.teacher_id),
            ("--teacher-kind", latents.teacher_kind, verdict.teacher_kind),
            ("--data.frame-gap-s", latents.frame_gap_s, verdict.frame_gap_s),
            ("frame_gap_s of other datasets", [*latents.own_gaps_s], [*verdict.own_gaps_s]),
            ("label cameras", [*latents.label_cameras], [*verdict.cameras]),
        ],
        asked="this run",
        found=report.name,
    )
    if verdict.verdict == "fail" and not accept:
        raise ValueError(
            f"{report}: these labels failed the check:\n  " + "\n  ".join(verdict.reasons) + "\nStage 2 would learn "
            "them well, and its own losses would not show that they are worth nothing: a constant, the camera or the "
            "scene instead of the motion. Stage 3 would then gain nothing over its scratch arm. Mend the teacher, or "
            "pass --accept-label-health for a control arm"
        )
    return replace(latents, health=verdict.verdict, health_reasons=verdict.reasons)


def summary(found: dict[str, Any], verdict: Verdict, warnings: list[str]) -> str:
    """The report for the terminal: figures in a table, then the verdict with its reasons."""

    def listed(values: list[float | None] | None) -> str:
        return "not measured" if values is None else " ".join("    -" if v is None else f"{v:5.2f}" for v in values)

    codes = found["codes"]
    rows = [
        ("pairs, episodes", f"{found['pairs']:,}, {found['episodes']:,}"),
        ("codes effectively used, by slot", listed(codes["perplexity"])),
        ("code sequences", f"{codes['distinct_sequences']:,}"),
        ("pairs with the most common sequence", f"{codes['most_common_share']:.0%}"),
        ("static pairs", f"{found['static_share']:.1%}"),
        ("frames without a pair", f"{found['invalid_share']:.1%}"),
        ("gain of the own latent in reconstruction", f"{found['reconstruction']['gain']:.1%}"),
        ("past/future cosine", listed([found["leakage"]])),
        ("share explained by camera motion", listed([found["camera_share"]])),
        ("variance of still pairs", listed([found["still_variance"]])),
    ]
    rows += [("teacher grounded in", str(verdict.teacher_grounding))] if verdict.teacher_grounding else []
    for name, row in found["probe"].items():
        rows += [
            (f"R² of the {name}", " ".join(f"{dim:>5.5}" for dim in row["dimensions"])),
            ("  from the labels", listed(row["latents"])),
            ("  from a random teacher's continuous latents", listed(row["random_teacher"])),
            ("  from the labels of other pairs", listed(row["shuffled"])),
            ("  ceiling: from the displacement", listed(row["ceiling"])),
            ("  gained, of what there is to gain", listed(row["gained_share"])),
        ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    lines += [f"warning: {text}" for text in warnings]
    lines += [f"label health: {verdict.verdict.upper()}", *(f"  {reason}" for reason in verdict.reasons)]
    return "\n".join(lines)
