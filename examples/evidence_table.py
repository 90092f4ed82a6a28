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
    # R² of its actions on held-out demonstrations, of each seed and dimension; None: the dimension does not vary.
    action_r2: list[list[float | None]] = field(default_factory=list)

    def add(self, other: "Measured") -> None:
        """The policy of another seed."""
        for step, success in other.by_step.items():
            self.by_step.setdefault(step, {}).update(success)
        self.action_r2 += other.action_r2

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


def paired(won: Success, other: Success) -> dict[str, Any]:
    """What differs on the episodes that both arms have, and McNemar's exact p."""
    common = won.keys() & other.keys()
    only_this = sum(won[pair] and not other[pair] for pair in common)
    only_other = sum(other[pair] and not won[pair] for pair in common)
    found = {"pairs": len(common), "only_this_arm": only_this, "only_reference": only_other}
    return found | {"p": mcnemar_exact(only_this, only_other)}


def compare(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row for each arm, compared with each reference on equal seeds, tasks and initial states.

    p_holm is adjusted over all these comparisons; p of single tasks is not. A pair is an episode of both arms: what one
    training seed does to all its episodes is not in p.
    """
    success = {(row.setting, row.demonstrations, row.arm): row.success for row in measured}
    table = []
    for row in measured:
        won, others = row.success, {}
        for reference in REFERENCES:
            other = success.get((row.setting, row.demonstrations, reference), {})
            if row.arm != reference and won.keys() & other.keys():
                others[reference] = other
        tasks = {task: {key: won[key] for key in won if key[1] == task} for _, task, _ in won}
        table.append(
            {
                "setting": row.setting,
                "demonstrations": row.demonstrations,
                "arm": row.arm,
                "seeds": sorted({seed for seed, _, _ in won}),
                "successes": sum(won.values()),
                "episodes": len(won),
                "wilson_95": wilson_interval(sum(won.values()), len(won)),
                "against": {reference: paired(won, other) for reference, other in others.items()},
                "by_task": {
                    task: {"successes": sum(of.values()), "episodes": len(of)}
                    | {"against": {reference: paired(of, other) for reference, other in others.items()}}
                    for task, of in tasks.items()
                },
                "success_by_step": {step: float(np.mean([*at.values()])) for step, at in sorted(row.by_step.items())},
                "action_r2": float(np.mean([value for of in row.action_r2 for value in of if value is not None])),
            }
        )
    compared = [found for row in table for found in row["against"].values()]
    for found, p in zip(compared, holm([found["p"] for found in compared]), strict=True):
        found["p_holm"] = p
    return table


def difference(found: dict[str, Any], p: str) -> str:
    """In points of success on equal initial states, with a p."""
    return f"{100 * (found['only_this_arm'] - found['only_reference']) / found['pairs']:+.0f} (p {found[p]:.2g})"


def lines_of(rows: list[list[Any]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *others = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def markdown(table: list[dict[str, Any]]) -> str:
    """All tasks together: differences with Holm's p, and R² of actions on held-out demonstrations."""
    head = ["setting", "demonstrations", "arm", "seeds", "success", "95%", *(f"against {name}" for name in REFERENCES)]
    rows = [[*head, "R² of actions"]]
    for row in table:
        low, high = row["wilson_95"]
        cells = [row["setting"], row["demonstrations"], row["arm"], len(row["seeds"])]
        cells += [f"{row['successes']} of {row['episodes']}", f"{low:.0%} to {high:.0%}"]
        against = [row["against"].get(name) for name in REFERENCES]
        cells += [difference(found, "p_holm") if found else "" for found in against]
        rows.append([*cells, f"{row['action_r2']:.2f}"])
    return lines_of(rows)


def by_task(table: list[dict[str, Any]]) -> str:
    """Each task: successes, and where there is a scratch arm the difference to it, with McNemar's p, not adjusted."""
    tasks = list(dict.fromkeys(task for row in table for task in row["by_task"]))
    rows = [["setting", "demonstrations", "arm", *tasks]]
    for row in table:
        cells = [row["setting"], row["demonstrations"], row["arm"]]
        for task in tasks:
            of = row["by_task"].get(task)
            found = of and of["against"].get(REFERENCES[0])
            won = f"{of['successes']} of {of['episodes']}" if of else ""
            cells.append(f"{won}, {difference(found, 'p')}" if found else won)
        rows.append(cells)
    return lines_of(rows)


def plot(table: list[dict[str, Any]], path: Path, by_step: bool) -> None:
    """A panel for each setting with a curve, a line for each arm: success against demonstrations, or Stage 3 steps."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[str, list[dict[str, Any]]]] = {}  # rows by setting and arm
    for row in sorted(table, key=lambda row: row["demonstrations"]):
        if not by_step or len(row["success_by_step"]) > 1:
            lines.setdefault(row["setting"], {}).setdefault(row["arm"], []).append(row)
    curves = {setting: arms for setting, arms in lines.items() if by_step or max(map(len, arms.values())) > 1} or lines
    figure = Figure(figsize=(max(5 * len(curves), 5), 4), layout="constrained")
    for axes, (setting, arms) in zip(np.ravel(figure.subplots(1, max(len(curves), 1), sharey=True)), curves.items()):
        for arm, of_arm in arms.items():
            if by_step:
                for row in of_arm:
                    label = f"{arm}, {row['demonstrations']} demonstrations"
                    axes.plot(*zip(*row["success_by_step"].items(), strict=True), "o-", label=label)
            else:
                rate = np.array([row["successes"] / row["episodes"] for row in of_arm])
                bars = np.abs(np.array([row["wilson_95"] for row in of_arm]) - rate[:, None]).T
                axes.errorbar([r["demonstrations"] for r in of_arm], rate, bars, fmt="o-", capsize=3, label=arm)
        axes.set(title=setting, xlabel="Stage 3 steps" if by_step else "labelled demonstrations", ylim=(0, 1))
        axes.legend(fontsize=7)
    figure.supylabel("success rate")
    figure.savefig(path, dpi=120)
