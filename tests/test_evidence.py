"""examples/evidence.py: its statistics against closed forms, parts by their hashes, true actions as latents."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SETTING = "five tasks"
sys.path.insert(0, str(ROOT / "examples"))

from evidence import Cell, EvidenceConfig, Part, choose, gather  # noqa: E402
from evidence_settings import ARMS, SETTINGS, Sizes  # noqa: E402
from evidence_table import Measured, by_task, compare, holm, markdown  # noqa: E402
from relabel import executed_latents  # noqa: E402

from smolvla_shared.comparison import mcnemar_exact  # noqa: E402


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 0.01 * 3, 0.03 * 2, then not below it
    assert holm([0.6, 0.5]) == [1, 1]


def test_arms_are_compared_on_equal_seeds_and_initial_states():
    def measured(arm: str, won: dict[tuple[int, int], bool]) -> Measured:
        success = {(seed, "push-v3", state): success for (seed, state), success in won.items()}
        return Measured("push", 5, arm, {1: dict.fromkeys(success, False), 2: success}, [[0.5, None], [0.1, 0.3]])

    scratch = measured("scratch", {(0, state): state < 2 for state in range(10)})
    longer = measured("scratch, all compute", {(0, state): state < 4 for state in range(10)})
    # Seed 1 has no scratch arm yet: its episodes count in the success, not in the comparison.
    other = measured("stage 2", {(0, s): s >= 1 for s in range(10)} | {(1, s): True for s in range(5)})
    rows = compare([scratch, longer, other])
    first, second, third = (row["against"] for row in rows)
    assert {name: found["p"] for name, found in first.items()} == {"scratch, all compute": mcnemar_exact(0, 2)}
    assert {name: found["p"] for name, found in second.items()} == {"scratch": mcnemar_exact(2, 0)}
    p, counts = mcnemar_exact(8, 1), {"pairs": 10, "only_this_arm": 8, "only_reference": 1}
    assert third["scratch"] == counts | {"p": p, "p_holm": 4 * p}
    assert third["scratch, all compute"]["p"] == mcnemar_exact(6, 1)
    assert (rows[2]["successes"], rows[2]["episodes"], rows[2]["seeds"]) == (14, 15, [0, 1])
    assert rows[2]["success_by_step"] == {1: 0, 2: 14 / 15}
    line = "| push | 5 | stage 2 | 2 | 14 of 15 | 70% to 99% | +70 (p 0.16) | +50 (p 0.38) | 0.30 |"
    assert line in markdown(rows)
    assert "| push | 5 | stage 2 | 14 of 15, +70 (p 0.039) |" in by_task(rows)
    assert "| push | 5 | scratch | 2 of 10 |" in by_task(rows)


def test_a_task_is_compared_on_its_own_episodes():
    def measured(arm: str, won: dict[str, int]) -> Measured:
        """So many of ten episodes of each task, the last ones."""
        return Measured("s", 5, arm, {1: {(0, t, i): i >= 10 - n for t, n in won.items() for i in range(10)}}, [[0.0]])

    rows = compare([measured("scratch", {"push": 2, "pull": 5}), measured("decoded", {"push": 9, "pull": 4})])
    push, pull = rows[1]["by_task"]["push"], rows[1]["by_task"]["pull"]
    assert (push["successes"], push["episodes"]) == (9, 10)
    assert push["against"]["scratch"]["p"] == mcnemar_exact(7, 0)
    assert pull["against"]["scratch"]["p"] == mcnemar_exact(0, 1) == 1
    assert rows[1]["against"]["scratch"]["p"] == mcnemar_exact(7, 1)
    assert "| s | 5 | decoded | 9 of 10, +70 (p 0.016) | 4 of 10, -10 (p 1) |" in by_task(rows)


def test_what_is_kept_was_measured_with_the_commands_of_today():
    kept = {file.stem for file in (ROOT / "docs/evidence").glob("*-[0-9].json")}
    cells = [cell for cell in choose(EvidenceConfig(root=Path("x"))) if cell.file(Path()).stem in kept]
    assert len(cells) == len(kept) > 0
    rows = gather(cells, ROOT / "docs/evidence")  # refuses what other commands have made
    assert json.loads(json.dumps(compare(rows))) == json.loads((ROOT / "docs/evidence/table.json").read_text())


def options_of(part: Part) -> dict[str, list[str]]:
    """The values of each option of a part's command."""
    found = [group.split() for group in f" {part.command}".split(" --")[1:]]
    return {name: values for name, *values in found}


def test_the_cameras_of_a_setting_are_those_of_recordings_and_rollouts():
    for setting, cameras in (("five tasks", []), ("five tasks from above", ["topview"])):
        cell = Cell(setting, 5, "decoded", 0, Sizes())
        for option, parts in (("camera", (*cell.video(), cell.labelled())), ("env.camera", cell.rollouts())):
            for part in parts:
                assert options_of(part).get(option, []) == cameras, part.command


def test_the_starts_of_a_setting_are_those_of_video_and_rollouts():
    for setting, video, rollouts in (
        ("five tasks, two cameras", [], []),
        ("five tasks, video of other starts", ["20"], []),
        ("five tasks, other starts", ["20"], ["20"]),
    ):
        cell = Cell(setting, 5, "decoded", 0, Sizes())
        assert options_of(cell.video()[0]).get("start-steps", []) == video
        assert options_of(cell.video()[0])["noise"] == ["0.0" if video else "0.3"]
        assert "start-steps" not in options_of(cell.labelled())
        assert all(options_of(part).get("env.start-steps", []) == rollouts for part in cell.rollouts())


def test_tasks_of_video_alone_have_no_demonstration_but_video_and_rollouts():
    cell = Cell("three tasks of five", 5, "decoded", 0, Sizes())
    shown, tasks = options_of(cell.labelled()), SETTINGS["three tasks of five"].tasks
    assert (shown["tasks"], shown["episodes"]) == (["drawer-open-v3", "plate-slide-v3", "window-open-v3"], ["1"])
    assert options_of(cell.video()[0])["tasks"] == list(tasks)
    assert [options_of(part)["env.task"] for part in cell.rollouts()] == [[task] for task in tasks]
    _, held_out = cell.open_loop().inputs
    assert (options_of(held_out)["tasks"], options_of(held_out)["seed"]) == (list(tasks), ["60"])


def test_an_arm_is_what_it_is_called():
    def of(arm: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        cell = Cell(SETTING, 5, arm, 0, Sizes())
        return options_of(cell.policy()), options_of(cell.stage2())

    decodes, latents = of("decoded")
    assert decodes["latent-horizon"] == ["5"] and "decode-actions" in decodes and latents["latent-horizon"] == ["4"]
    assert "stage2-artifact" in decodes and "stage2-artifact" not in of("decoded, no stage 2")[0]
    assert of("one latent action")[1]["latent-horizon"] == ["1"]
    assert of("cross-entropy")[1]["latent-head"] == ["codes"]
    stage3, stage2 = of("stage 2, state dropout")
    assert stage2["data.state-dropout"] == ["0.5"] and "data.state-dropout" not in stage3
    changes = {"data.random-shift": ["0.05"], "data.random-hue": ["0.05"], "data.random-contrast": ["0.2"]}
    assert all(changes.items() <= stage.items() for stage in of("augmented"))
    assert not any(name.startswith("data.random") for stage in of("stage 2") for name in stage)
    for arm, name in (("decoded", "teacher"), ("decoded, random teacher", "teacher-random")):
        labels = next(part for part in Cell(SETTING, 5, arm, 0, Sizes()).policy().inputs if part.name == "labels")
        assert labels.inputs[-1].name == name


def test_a_grounded_teacher_is_grounded_in_the_demonstrations_of_its_run():
    """In all of them, of the run's seed and number: a share that is held out would leave out a task."""
    teachers = {}
    for seed, demonstrations in ((0, 5), (1, 5), (0, 10)):
        cell = Cell("three tasks of five", demonstrations, "stage 2, grounded teacher", seed, Sizes())
        *video, labels = cell.stage2().inputs
        teacher = teachers[seed, demonstrations] = labels.inputs[-1]
        assert (teacher.name, teacher.inputs) == ("teacher-grounded", (*video, cell.labelled()))
        words, (seen,) = teacher.words(Path("/root")), cell.video()
        assert words[words.index("--grounding.roots") + 1] == str(cell.labelled().out(Path("/root")))
        assert words[words.index("--data.roots") + 1] == str(seen.out(Path("/root")))
        assert options_of(teacher)["val-fraction"] == ["0"] and options_of(teacher)["steps"] == ["1500"]
    assert len({teacher.directory for teacher in teachers.values()}) == 3
    plain = replace(cell, arm="stage 2").labels(ARMS["stage 2"].labels)[0].inputs[-1]
    assert "grounding.roots" not in options_of(plain) and plain.inputs == cell.video()


def test_with_two_cameras_the_teacher_sees_both_and_the_policy_the_first():
    cell, keys = Cell("five tasks, two cameras", 5, "decoded", 0, Sizes()), ["topview", "corner2"]
    seen, both = "observation.images.topview", [f"observation.images.{camera}" for camera in keys]
    assert all(options_of(part)["camera"] == keys for part in (*cell.video(), cell.labelled()))
    shuffled, _ = cell.labels(ARMS["shuffled latents"].labels)
    for part in (cell.teacher(learns=True), shuffled):  # a cache is of the cameras that its labels have seen
        assert options_of(part)["data.label-cameras"] == both
    for part in (cell.policy(), cell.stage2(), replace(cell, arm="scratch").policy()):
        assert options_of(part)["data.cameras"] == [seen]
    for part in cell.rollouts():
        assert options_of(part)["env.camera"] == keys[:1]
        assert options_of(part)["rename"] == ["observation.image", seen]


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

    parts = {arm: set().union(*map(ancestors, Cell(SETTING, 5, arm, 0, Sizes()).rollouts())) for arm in ARMS}
    names = {arm: sorted({part.rpartition("-")[0] for part in found}) for arm, found in parts.items()}
    rollouts = sorted(f"rollout-{task}" for task in SETTINGS[SETTING].tasks)
    assert names["scratch"] == names["scratch, all compute"] == ["demonstrations", *rollouts, "stage3"]
    assert "teacher" not in names["true actions"]
    assert "teacher-random" in names["random teacher"]
    assert len(parts["stage 2"] & parts["co-training"]) == 5  # video, teacher, its labels, Stage 2; demonstrations
    commands = {Cell(SETTING, 5, arm, 0, Sizes()).policy().command for arm in ARMS}
    assert len(commands) == len({c.replace("@1", "") for c in commands}) >= 5
    sizes = Sizes()
    longer = Cell(SETTING, 5, "scratch", 0, replace(sizes, stage3_steps=sizes.stage3_steps + sizes.stage2_steps))
    assert f"--steps {sizes.stage2_steps + sizes.stage3_steps} " in longer.policy().command


def test_what_was_measured_is_not_made_again(tmp_path, monkeypatch):
    """Outcomes are kept under the hashes of all that made them; those of other commands are refused."""
    cell, made = Cell(SETTING, 25, "scratch", 2, replace(Sizes(), rollouts=10)), []

    def make(part: Part, root: Path) -> None:
        made.append(part.name)
        part.out(root).mkdir(parents=True)
        episodes = [{"seed": 2000 + i, "success": i == 0} for i in range(2)]
        (part.out(root) / "results.json").write_text(json.dumps({"per_episode": episodes}))
        (part.out(root) / "open_loop.json").write_text(json.dumps({"r2": [0.25, None]}))

    monkeypatch.setattr(Part, "make", make)
    assert cell.read(tmp_path / "cells") is None
    cell.measure(tmp_path, tmp_path / "cells")
    assert made == [*(f"rollout-{task}" for task in SETTINGS[SETTING].tasks), "open-loop"]
    cell.measure(tmp_path / "another machine", tmp_path / "cells")
    assert len(made) == 6
    success = cell.read(tmp_path / "cells").success
    assert sum(success.values()) == 5 and success[2, "plate-slide-v3", 2000]
    (row,) = compare(gather([cell], tmp_path / "cells"))
    assert (row["successes"], row["episodes"], row["seeds"], row["action_r2"]) == (5, 10, [2], 0.25)
    with pytest.raises(ValueError, match="was measured with other commands: remove it, or name other --cells"):
        replace(cell, sizes=Sizes()).read(tmp_path / "cells")


def test_true_actions_are_the_means_of_the_parts_of_a_gap():
    executed = np.arange(20.0).reshape(10, 2)  # action t is (2 t, 2 t + 1)
    latents = executed_latents(executed, np.array([0, 3]), gap=4, slots=2)
    np.testing.assert_array_equal(latents[0], [[1, 2], [5, 6]])
    np.testing.assert_array_equal(latents[1], [[7, 8], [11, 12]])
    with pytest.raises(ValueError, match="--slots 3 do not divide a gap of 4 frames"):
        executed_latents(executed, np.array([0]), gap=4, slots=3)


@pytest.mark.slow
def test_the_whole_chain_runs_and_is_made_once(tmp_path):
    """Recordings, teacher, labels, Stage 2, Stage 3 and rollouts as real commands; the second run makes nothing."""
    command = [sys.executable, str(ROOT / "examples" / "evidence.py"), "--root", str(tmp_path), "--quick"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, (
        first.stdout
        + first.stderr
        + "".join(
            log.read_text()[-3000:]
            for log in tmp_path.glob("parts/*/log.txt")
            if not (log.parent / "done.json").exists()
        )
    )
    arms = {row["arm"]: row for row in json.loads((tmp_path / "cells" / "table.json").read_text())}
    assert set(arms) == {"scratch", "continuous"} and all(row["episodes"] == 1 for row in arms.values())
    assert "| quick | 1 | continuous | 1 |" in first.stdout and "stage2-" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "stage2-" not in again.stdout and again.stdout.startswith("| setting")
