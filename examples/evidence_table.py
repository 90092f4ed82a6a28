"""Statistics, table and plots of examples/evidence.py."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolvla_shared.rollouts import wilson_interval


@dataclass
class Measured:
    """What the seeds of an arm gave, at one setting and number of demonstrations."""

    setting: str
    demonstrations: int
    arm: str
    # Success by Stage 3 step, then by (seed, initial state).
    by_step: dict[int, dict[tuple[int, int], bool]] = field(default_factory=dict)
    # Of the seeds, mean squared error of normalised actions.
    held_out_errors: list[float] = field(default_factory=list)

    @property
    def success(self) -> dict[tuple[int, int], bool]:
        """At the last step."""
        return self.by_step[max(self.by_step)]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test: p of so uneven a split of the pairs in which just one of two succeeded."""
    trials = only_first + only_second
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1)) / 2**trials
    return min(1.0, 2 * tail)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of the p values of a family of comparisons, in their order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row for each arm, compared with scratch on equal seeds and initial states; p adjusted over all comparisons.

    A pair is an episode of both arms: what one training seed does to all its episodes is not in p.
    """
    scratch = {(row.setting, row.demonstrations): row.success for row in measured if row.arm == "scratch"}
    table = []
    for row in measured:
        won, other = row.success, scratch.get((row.setting, row.demonstrations), {})
        common = won.keys() & other.keys()
        only_this = sum(won[pair] and not other[pair] for pair in common)
        only_scratch = sum(other[pair] and not won[pair] for pair in common)
        table.append(
            {
                "setting": row.setting,
                "demonstrations": row.demonstrations,
                "arm": row.arm,
                "seeds": sorted({seed for seed, _ in won}),
                "successes": sum(won.values()),
                "episodes": len(won),
                "wilson_95": wilson_interval(sum(won.values()), len(won)),
                "pairs_with_scratch": len(common),
                "only_this_arm": only_this,
                "only_scratch": only_scratch,
                "p": mcnemar_exact(only_this, only_scratch) if common and row.arm != "scratch" else None,
                "held_out_action_error": float(np.mean(row.held_out_errors)),
                "success_by_step": {step: float(np.mean([*at.values()])) for step, at in sorted(row.by_step.items())},
            }
        )
    compared = [row for row in table if row["p"] is not None]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row["p_holm"] = p
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """Differences are in points of success on the pairs with scratch; p is Holm's."""
    lines = ["| setting | demonstrations | arm | success | 95% | against scratch | p | held-out action error |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in table:
        low, high = row["wilson_95"]
        difference = 100 * (row["only_this_arm"] - row["only_scratch"]) / max(1, row["pairs_with_scratch"])
        against, p = (f"{difference:+.0f}", f"{row['p_holm']:.2g}") if row["p"] is not None else ("", "")
        lines.append(
            f"| {row['setting']} | {row['demonstrations']} | {row['arm']} | {row['successes']} of {row['episodes']} "
            f"| {low:.0%} to {high:.0%} | {against} | {p} | {row['held_out_action_error']:.3f} |"
        )
    return "\n".join(lines)


def plot(table: list[dict[str, Any]], path: Path, by_step: bool) -> None:
    """A panel for each setting, a line for each arm: success against demonstrations, or against Stage 3 steps."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(row["setting"] for row in table))
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for axes, setting in zip(np.ravel(figure.subplots(1, len(settings), sharey=True)), settings, strict=True):
        rows = [row for row in table if row["setting"] == setting]
        for arm in dict.fromkeys(row["arm"] for row in rows):
            of_arm = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["demonstrations"])
            if by_step:
                for row in of_arm:
                    if len(row["success_by_step"]) > 1:
                        label = f"{arm}, {row['demonstrations']} demonstrations"
                        axes.plot(*zip(*row["success_by_step"].items(), strict=True), "o-", label=label)
            else:
                rate = np.array([row["successes"] / row["episodes"] for row in of_arm])
                bars = np.abs(np.array([row["wilson_95"] for row in of_arm]) - rate[:, None]).T
                axes.errorbar([r["demonstrations"] for r in of_arm], rate, bars, fmt="o-", capsize=3, label=arm)
        axes.set(title=setting, xlabel="Stage 3 steps" if by_step else "labelled demonstrations", ylim=(0, 1))
        axes.legend(fontsize=7) if axes.get_legend_handles_labels()[0] else None
    figure.supylabel("success rate")
    figure.savefig(path, dpi=120)
