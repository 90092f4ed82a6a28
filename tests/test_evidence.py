"""examples/evidence.py: its statistics against closed forms, parts by their hashes, true actions as latents."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from evidence import ARMS, Cell, Part, Sizes  # noqa: E402
from evidence_table import Measured, compare, holm, markdown, mcnemar_exact  # noqa: E402
from relabel import executed_latents  # noqa: E402


def test_mcnemar_is_twice_the_smaller_tail_of_a_fair_coin():
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(7, 7) == 1
    assert mcnemar_exact(0, 5) == mcnemar_exact(5, 0) == 2 / 2**5
    assert mcnemar_exact(1, 9) == 2 * (1 + 10) / 2**10
    assert mcnemar_exact(2, 8) == 2 * (1 + 10 + 45) / 2**10


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 0.01 * 3, 0.03 * 2, then not below it
    assert holm([0.6, 0.5]) == [1, 1]


def test_arms_are_compared_on_equal_seeds_and_initial_states():
    def measured(arm: str, won: dict[tuple[int, int], bool]) -> Measured:
        return Measured("push", 5, arm, {1: dict.fromkeys(won, False), 2: won}, [0.5, 0.7])

    scratch = measured("scratch", {(0, state): state < 2 for state in range(10)})
    # Seed 1 has no scratch arm yet: its episodes count in the success, not in the comparison.
    other = measured("stage 2", {(0, s): s >= 1 for s in range(10)} | {(1, s): True for s in range(5)})
    rows = compare([scratch, other])
    assert [row["p"] for row in rows] == [None, mcnemar_exact(8, 1)]
    assert (rows[1]["successes"], rows[1]["episodes"], rows[1]["pairs_with_scratch"]) == (14, 15, 10)
    assert (rows[1]["only_this_arm"], rows[1]["only_scratch"], rows[1]["seeds"]) == (8, 1, [0, 1])
    assert rows[1]["success_by_step"] == {1: 0, 2: 14 / 15}
    assert "| push | 5 | stage 2 | 14 of 15 | 70% to 99% | +70 | 0.039 | 0.600 |" in markdown(rows)


def test_a_part_is_named_by_all_that_made_it():
    first, second = Part("a", "x @out"), Part("a", "y @out")
    assert first.directory != second.directory
    assert Part("b", "z @0", (first,)).directory != Part("b", "z @0", (second,)).directory
    words = Part("b", "z --data @0/d @1 --out @out", (first, second)).words(Path("/root"))
    paths = [f"/root/parts/{part.directory}/out" for part in (first, second)]
    assert words[:4] == ["z", "--data", f"{paths[0]}/d", paths[1]]


def test_arms_share_what_they_have_in_common():
    def ancestors(part: Part) -> set[str]:
        return {part.directory}.union(*map(ancestors, part.inputs))

    parts = {arm: ancestors(Cell("push", 5, arm, 0, Sizes()).rollout()) for arm in ARMS}
    names = {arm: sorted(part.rpartition("-")[0] for part in found) for arm, found in parts.items()}
    assert names["scratch"] == names["scratch, all compute"] == ["record-push-v3", "rollout", "stage3"]
    assert "teacher" not in names["true actions"]
    assert "teacher-random" in names["random teacher"]
    assert parts["stage 2"] - parts["co-training"] < parts["stage 2"]  # teacher, its labels and Stage 2 are the same
    commands = {Cell("push", 5, arm, 0, Sizes()).policy().command for arm in ARMS}
    assert len(commands) == len({c.replace("@1", "") for c in commands}) >= 5
    sizes = Sizes()
    longer = Cell(
        "push", 5, "scratch", 0, replace(sizes, stage3_steps=sizes.stage3_steps + sizes.stage2_steps)
    ).policy()
    assert f"--steps {sizes.stage2_steps + sizes.stage3_steps} " in longer.command


def test_true_actions_are_the_means_of_the_parts_of_a_gap():
    executed = np.arange(20.0).reshape(10, 2)  # action t is (2 t, 2 t + 1)
    latents = executed_latents(executed, np.array([0, 3]), gap=4, slots=2)
    np.testing.assert_array_equal(latents[0], [[1, 2], [5, 6]])
    np.testing.assert_array_equal(latents[1], [[7, 8], [11, 12]])
    with pytest.raises(ValueError, match="--slots 3 do not divide a gap of 4 frames"):
        executed_latents(executed, np.array([0]), gap=4, slots=3)
