"""Statistics, table and plots of examples/evidence.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolvla_shared.comparison import mcnemar_exact, wilson_interval

# The arms that every other is compared with: equal Stage 3 steps, and equal steps in all.
REFERENCES = "scratch", "scratch, all compute"
Success = dict[tuple[int, str, int], bool]  # by (training seed, task, initial state)


@dataclass
class Measured:
    """What the seeds of an arm gave, at one setting and number of demonstrations."""

    setting: str
    demonstrations: int
    arm: str
    by_step: dict[int, Success] = field(default_factory=dict)  # Stage 3 step

    @property
    def success(self) -> Success:
        """At the last step."""
        return self.by_step[max(self.by_step)]


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of the p values of a family of comparisons, in their order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row for each arm, compared with each reference on equal seeds, tasks and initial states.

    p is adjusted over all comparisons. A pair is an episode of both arms: what one training seed does to all its
    episodes is not in p.
    """
    success = {(row.setting, row.demonstrations, row.arm): row.success for row in measured}
    table = []
    for row in measured:
        won = row.success
        against = {}
        for reference in REFERENCES:
            other = success.get((row.setting, row.demonstrations, reference), {})
            if row.arm != reference and (common := won.keys() & other.keys()):
                only_this = sum(won[pair] and not other[pair] for pair in common)
                only_other = sum(other[pair] and not won[pair] for pair in common)
                found = {"pairs": len(common), "only_this_arm": only_this, "only_reference": only_other}
                against[reference] = found | {"p": mcnemar_exact(only_this, only_other)}
        tasks = {task: [won[key] for key in won if key[1] == task] for _, task, _ in won}
        table.append(
            {
                "setting": row.setting,
                "demonstrations": row.demonstrations,
                "arm": row.arm,
                "seeds": sorted({seed for seed, _, _ in won}),
                "successes": sum(won.values()),
                "episodes": len(won),
                "wilson_95": wilson_interval(sum(won.values()), len(won)),
                "against": against,
                "success_by_task": {task: float(np.mean(values)) for task, values in tasks.items()},
                "success_by_step": {step: float(np.mean([*at.values()])) for step, at in sorted(row.by_step.items())},
            }
        )
    compared = [found for row in table for found in row["against"].values()]
    for found, p in zip(compared, holm([found["p"] for found in compared]), strict=True):
        found["p_holm"] = p
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """Differences are in points of success on equal initial states, with Holm's p."""

    def difference(found: dict[str, Any] | None) -> str:
        if found is None:
            return ""
        points = 100 * (found["only_this_arm"] - found["only_reference"]) / found["pairs"]
        return f"{points:+.0f} (p {found['p_holm']:.2g})"

    head = ["setting", "demonstrations", "arm", "seeds", "success", "95%", *(f"against {name}" for name in REFERENCES)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table:
        low, high = row["wilson_95"]
        cells = [row["setting"], row["demonstrations"], row["arm"], len(row["seeds"])]
        cells += [f"{row['successes']} of {row['episodes']}", f"{low:.0%} to {high:.0%}"]
        cells += [difference(row["against"].get(name)) for name in REFERENCES]
        lines.append(f"| {' | '.join(map(str, cells))} |")
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
