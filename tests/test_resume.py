"""The real commands, killed, stopped and resumed: each ends as the one that never stopped, to the bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import Forked
from helpers import equal, metrics_of
from safetensors.torch import load_file

from smolvla_shared.run_checkpoint import STATE_FILE, damage
from smolvla_shared.run_signals import EXIT_STOPPED, STOPPED_FILE

pytestmark = pytest.mark.slow

STEPS = 18
# Lines of metrics.jsonl that span checkpoints, evaluations between them.
SIZES = f"--steps {STEPS} --save-every 4 --eval-every 7 --log-every 3 --keep 3 --batch-size 4 --eval-samples 4".split()
SIZES += "--ema-decay 0.9 --accumulation-steps 2 --data.num-workers 0 --val-fraction 0.2".split()
SIZES += "--optim.warmup-steps 3".split()
TINY_LAQ = "--laq.dim 32 --laq.quant-dim 8 --laq.image-size 64 --laq.patch-size 8 --laq.spatial-depth 1".split()
TINY_LAQ += "--laq.temporal-depth 1 --laq.dim-head 16 --laq.heads 2 --optim.lr 5e-3 --replace-every 5".split()
ARTIFACT = Path("artifacts") / "smolvla_shared_stage2_artifact.safetensors"


@pytest.fixture(scope="module")
def commands(video_dataset, labelled_dataset, laq_checkpoint) -> dict[str, list[str | Path]]:
    video, labelled = ["--data.roots", video_dataset], ["--data.roots", labelled_dataset]
    tiny = ["--model.preset", "tiny", "--data.random-shift", "0.1"]
    stage3 = ["--chunk-size", "6", "--n-action-steps", "3"]
    return {
        "teacher": ["-m", "smolvla_shared.teacher", "train", *SIZES, *TINY_LAQ, *video],
        "stage2": ["train_stage2.py", *SIZES, *tiny, *video, "--laq-ckpt", laq_checkpoint],
        "stage3": ["train_stage3.py", *SIZES, *tiny, *labelled, *stage3],
    }


@pytest.fixture(scope="module")
def whole(server, commands, tmp_path_factory) -> Callable[[str], Path]:
    """The run of a command that nothing happens to."""
    directory = tmp_path_factory.mktemp("whole")

    @cache
    def run(name: str) -> Path:
        child = Forked(server, [*commands[name], "--run-dir", directory / name], directory / f"{name}.txt")
        assert child.wait() == 0, child.output.read_text()
        return directory / name

    return run


def assert_same_run(found: Path, expected: Path, stopped_at: Iterable[int] = ()) -> None:
    """Weights, optimizer, EMA, what is exported, and metrics but for the time they took."""
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == ["000012", "000016", "000018", "last"]
    for step in ("000012", "000016", "000018"):
        assert not damage(found / "checkpoints" / step)
        one, other = (
            torch.load(run / "checkpoints" / step / STATE_FILE, weights_only=True) for run in (found, expected)
        )
        assert one.keys() == {"step", "model", "optimizer", "ema"}
        for key in one:
            assert equal(one[key], other[key]), (step, key)
    assert len(one["ema"]) > 0
    exported = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert exported
    for name in exported:
        assert equal(load_file(found / name), load_file(expected / name)), name
    metrics = {line["step"]: line for line in metrics_of(expected)}
    assert list(metrics) == [3, 4, 6, 7, 8, 9, 12, 14, 15, 16, 18]
    lines = {line["step"]: line for line in metrics_of(found)}
    # The checkpoint of a signal ends a line of its own: the next line is then the mean of fewer steps.
    assert lines.keys() == metrics.keys() | set(stopped_at)
    cut = {min(step for step in metrics if step > at) for at in stopped_at if at not in metrics}
    assert {step: line for step, line in lines.items() if step in metrics.keys() - cut} == {
        step: line for step, line in metrics.items() if step not in cut
    }


@pytest.mark.parametrize("name, kills", [("teacher", 7), ("stage2", 5), ("stage3", 8)])
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(server, commands, whole, tmp_path, name, kills):
    """SIGKILL at random moments: while the command starts, in its steps, and while a checkpoint is written."""
    rng = random.Random(name)
    run_dir, output = tmp_path / name, tmp_path / "output.txt"
    checkpoints = run_dir / "checkpoints"
    aims = [["writing", "steps", "writing", "start"][number % 4] for number in range(kills)]
    seen: Counter[str] = Counter()
    for aim in aims:
        resume = ["--resume"] if (run_dir / "config.json").exists() else []
        output.write_text("")
        child = Forked(server, [*commands[name], "--run-dir", run_dir, *resume], output)
        if aim == "start":
            time.sleep(rng.uniform(0, 1))
        elif aim == "steps":
            child.wait_for(lambda: re.search(r"\d+/18 \[.*step", output.read_text()))
            time.sleep(rng.uniform(0, 1))
        elif aim == "writing":
            child.wait_for(lambda: any(checkpoints.glob(".0*.tmp")))
            time.sleep(rng.uniform(0, 0.05))
        child.kill()
        assert child.wait() == -signal.SIGKILL, f"{aim}: over before it was killed\n{output.read_text()}"
        seen[aim] += 1
        seen["left half-written"] += any(checkpoints.glob(".0*.tmp"))
        # Whatever happened, `last` names a whole checkpoint, or there is none yet.
        assert not (checkpoints / "last").is_symlink() or not damage(checkpoints / "last")  # a dangling link is damage
    assert seen["left half-written"] >= 2, seen
    child = Forked(server, [*commands[name], "--run-dir", run_dir, "--resume"], output)
    assert child.wait() == 0, output.read_text()
    assert_same_run(run_dir, whole(name))


def test_signals_to_the_whole_process_group_save_and_the_run_goes_on(server, commands, whole, tmp_path):
    """As Ctrl-C and SLURM send them: to the loader's workers as well, without which no step can be finished."""
    run_dir, output = tmp_path / "teacher", tmp_path / "output.txt"
    command = [*commands["teacher"], "--run-dir", run_dir]
    stopped_at = []
    # The last of an option counts.
    for number, workers in [(signal.SIGTERM, "1"), (signal.SIGINT, "0"), (signal.SIGUSR1, "0")]:
        resume = ["--resume"] if run_dir.exists() else []
        output.write_text("")
        child = Forked(server, [*command, "--data.num-workers", workers, *resume], output)
        child.wait_for(lambda: re.search(r" [1-9]\d*/18 \[.*step", output.read_text()))
        os.killpg(child.pid, number)
        assert child.wait() == EXIT_STOPPED, output.read_text()
        stopped = json.loads((run_dir / STOPPED_FILE).read_text())
        assert stopped["received"] == number.name
        stopped_at.append(stopped["step"])
        assert stopped["step"] == torch.load(run_dir / "checkpoints" / "last" / STATE_FILE)["step"] < 12
    child = Forked(server, [*command, "--resume"], output)
    assert child.wait() == 0, output.read_text()
    assert not (run_dir / STOPPED_FILE).exists()
    assert_same_run(run_dir, whole("teacher"), stopped_at)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a small disk")
def test_a_full_disk_stops_the_command_and_leaves_the_last_checkpoint(server, commands, whole, tmp_path):
    disk, output = tmp_path / "disk", tmp_path / "output.txt"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], check=True)
    try:
        command = [*commands["teacher"], "--run-dir", disk / "teacher"]
        child = Forked(server, command, output)
        child.wait_for((disk / "teacher" / "checkpoints" / "last").exists)
        room = shutil.disk_usage(disk).free - 100_000
        (disk / "other").write_bytes(bytes(room))
        assert child.wait() == 2, output.read_text()
        last = (disk / "teacher" / "checkpoints" / "last").readlink().name
        error = output.read_text().splitlines()[-1]
        assert re.search(rf"^error: the checkpoint of step \d+ could not be .* {last} is still the last one", error)
        assert {p.name for p in (disk / "teacher" / "checkpoints").iterdir() if not p.name.isdigit()} == {"last"}
        (disk / "other").unlink()
        assert Forked(server, [*command, "--resume"], output).wait() == 0
        assert_same_run(disk / "teacher", whole("teacher"))
    finally:
        subprocess.run(["umount", disk], check=True)
