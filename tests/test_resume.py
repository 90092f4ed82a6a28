"""The real commands, killed, stopped and resumed: each ends as the one that never stopped, to the bit."""

import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import Forked, start_server
from safetensors.torch import load_file
from test_training import equal, metrics_of

from smolvla_shared.checkpoint import STATE_FILE, damage

pytestmark = pytest.mark.slow

STEPS = 18
# Lines of metrics.jsonl that span checkpoints, evaluations between them.
SIZES = f"--steps {STEPS} --save-every 4 --eval-every 7 --log-every 3 --keep 3 --batch-size 4 --eval-samples 4".split()
SIZES += "--ema-decay 0.9 --accumulation-steps 2 --data.num-workers 0 --data.val-fraction 0.2".split()
SIZES += "--data.random-shift 0.1 --optim.warmup-steps 3".split()
TINY_LAQ = "--laq.dim 32 --laq.quant-dim 8 --laq.image-size 64 --laq.patch-size 8 --laq.spatial-depth 1".split()
TINY_LAQ += "--laq.temporal-depth 1 --laq.dim-head 16 --laq.heads 2 --optim.lr 5e-3 --replace-every 5".split()
ARTIFACT = Path("artifacts") / "smolvla_shared_stage2_artifact.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    with start_server() as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def commands(video_dataset, labelled_dataset, laq_checkpoint) -> dict[str, list[str | Path]]:
    video, labelled = ["--data.roots", video_dataset], ["--data.roots", labelled_dataset]
    tiny = ["--model.preset", "tiny"]
    stage3 = ["--chunk-size", "6", "--n-action-steps", "3", "--latent-loss-weight", "0.1"]
    return {
        "teacher": ["-m", "smolvla_shared.teacher", "train", *SIZES, *TINY_LAQ, *video],
        "stage2": ["train_stage2.py", *SIZES, *tiny, *video, "--laq-ckpt", laq_checkpoint],
        "stage3": ["train_stage3.py", *SIZES, *tiny, *labelled, *stage3, "--laq-ckpt", laq_checkpoint],
    }


@pytest.fixture(scope="module")
def whole(server, commands, tmp_path_factory) -> dict[str, Path]:
    """The runs that nothing happens to."""
    directory = tmp_path_factory.mktemp("whole")
    for name, command in commands.items():
        child = Forked(server, [*command, "--run-dir", directory / name], directory / f"{name}.txt")
        assert child.wait() == 0, child.output.read_text()
    return {name: directory / name for name in commands}


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights, optimizer, running average, what is exported, and metrics but for the time they took."""
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == ["000012", "000016", "000018", "last"]
    for step in ("000012", "000016", "000018"):
        assert not damage(found / "checkpoints" / step)
        one, other = (
            torch.load(run / "checkpoints" / step / STATE_FILE, weights_only=True) for run in (found, expected)
        )
        assert one.keys() == {"step", "model", "optimizer", "ema", "window"}
        for key in one:
            assert equal(one[key], other[key]), (step, key)
    assert len(one["ema"]) > 0
    exported = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert exported
    for name in exported:
        assert equal(load_file(found / name), load_file(expected / name)), name
    metrics = metrics_of(expected)
    assert [line["step"] for line in metrics] == [3, 6, 7, 9, 12, 14, 15, 18]
    assert metrics_of(found) == metrics


@pytest.mark.parametrize("name, kills", [("teacher", 7), ("stage2", 6), ("stage3", 7)])
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
            time.sleep(rng.uniform(0, 2))
        elif aim == "steps":
            child.wait_for(lambda: re.search(r"\d+/18 \[.*step", output.read_text()))
            time.sleep(rng.uniform(0, 1))
        elif aim == "writing":
            child.wait_for(lambda: any(checkpoints.glob(".0*.tmp")))
            time.sleep(rng.uniform(0, 0.05))
        child.kill()
        assert child.wait() == -signal.SIGKILL, f"{aim}: it was over before it was killed"
        seen[aim] += 1
        seen["left half-written"] += any(checkpoints.glob(".0*.tmp"))
        # Whatever happened, `last` names a whole checkpoint, or there is none yet.
        assert not damage(checkpoints / "last") if (checkpoints / "last").exists() else True
    assert seen["left half-written"] >= 2, seen
    child = Forked(server, [*commands[name], "--run-dir", run_dir, "--resume"], output)
    assert child.wait() == 0, output.read_text()
    assert_same_run(run_dir, whole[name])
