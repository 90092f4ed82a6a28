"""Options that no command can mean are refused when they are parsed; docs/mistakes.md is the list of what is said.

PYTHONPATH=. python tests/test_mistakes.py > docs/mistakes.md
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import rollout
import train_stage2
import train_stage3
from smolvla_shared.command import EXIT_MISTAKE, NO_STREAMING, in_few_lines, is_mistake, parse
from smolvla_shared.data_check import DataCheckConfig
from smolvla_shared.gpu_check import Options
from smolvla_shared.hub import CardConfig, PushConfig
from smolvla_shared.lerobot_smolvla import ExportConfig, ImportConfig
from smolvla_shared.serve import ServeConfig
from smolvla_shared.teacher_config import CheckConfig, LabelConfig, TeacherConfig
from smolvla_shared.video import VideoConfig

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "mistakes.md"
TEACHER = "python -m smolvla_shared.teacher"
DATA = "--data.roots video"
# {command: (its options, what it needs, the mistakes)}
COMMANDS: dict[str, tuple[Any, str, str]] = {
    "train_stage2.py": (
        train_stage2.Stage2Config,
        f"--laq-ckpt laq.safetensors {DATA} --run-dir run",
        """--steps 0
        --batch-size 0
        --accumulation-steps 0
        --flow-draws 0
        --seed -1
        --save-every 0
        --log-every 0
        --eval-every 0
        --eval-samples 0
        --eval-samples -5
        --keep -1
        --val-fraction 1
        --val-fraction -0.1
        --val-fraction nan
        --ema-decay nan
        --ema-decay 1.0
        --ema-decay 1.5
        --ema-decay -0.5
        --optim.lr 0
        --optim.lr -1e-3
        --optim.lr nan
        --optim.lr inf
        --optim.warmup-steps -1
        --optim.final-lr-share -1
        --optim.final-lr-share 2
        --optim.betas 0.9 1
        --optim.betas -0.1 0.95
        --optim.weight-decay -1
        --optim.max-grad-norm 1e-30
        --optim.max-grad-norm nan
        --data.num-workers -1
        --data.frame-gap-s 0
        --data.frame-gap-s -0.5
        --data.frame-gap-s nan
        --data.frame-gap-s inf
        --data.random-shift 3
        --data.random-shift -0.1
        --data.random-brightness 1
        --data.random-contrast -0.2
        --data.random-saturation 1.5
        --data.random-hue 0.6
        --data.random-sharpness nan
        --data.feature-cache-gb -1
        --data.feature-cache-gb 5
        --data.feature-cache-dtype float32
        --data.feature-cache features --data.random-shift 0.1
        --data.feature-cache features --data.random-hue 0.05
        --data.cameras top top
        --data.roots video video
        --data.mixture mixture.yaml
        --data.weights 2 --data.balance sqrt
        --data.episodes 0 5 --data.max-episodes 3
        --data.episodes 5 0 5
        --data.episodes -1
        --latent-horizon 0
        --laq-code-seq-len 0
        --laq-image-size -1
        --labels cache
        --label-cache labels
        --latent-head codes --teacher-kind continuous
        --accept-label-health
        --model.preset tiny --model.name my/trunk
        --data.roots nowhere
        --data.roots run_before
        --data.repo-ids ./video
        --data.repo-ids demos
        --laq-ckpt nowhere.safetensors
        --laq-ckpt video
        --laq-ckpt alone.safetensors
        --labels cache --label-cache nowhere
        --label-health nowhere.json
        --init-from nowhere.safetensors
        --init-from ./nowhere
        --init-from video
        --model.name ./nowhere
        --data.feature-cache laq.safetensors
        --run-dir run_before
        --run-dir laq.safetensors/run
        --run-dir nowhere --resume
        --stps 3
        --data.streaming
        --optim.warmup-step 3
        --lr 1e-3
        --laq-checkpoint laq.safetensors
        --rundir run
        --wumba 3
        -steps 3
        \u2013-steps 3
        --steps
        --steps many
        --optim.lr big
        --optim.betas 0.9
        --labels none
        --resume yes
        --mode.preset tiny
        --eval-every 5 --val-fraction 0
        --eval-samples 5 --val-fraction 0
        --optim.warmup-steps 5000 --steps 100
        --model.preset tiny --model.revision main
        --model.name policy --model.revision main
        --model.freeze-vision False
        --model.freeze-trunk True --model.freeze-vision False
        --data.state-dropout 0.5 --model.no-use-state
        --data.state-dropout 1
        --steps 9999999999999
        --data.num-workers 2000
        --optim.lr 1e30
        --run-dir pipe
        --run-dir dangling
        --run-dir video/run
        --data.feature-cache video/features
        --run-dir ~/run
        --data.repo-ids me/-x
        --init-from pipe
        --model.name dangling
        --label-health pipe
        --laq-ckpt pipe.safetensors
        --data.feature-cache dangling""",
    ),
    "train_stage3.py": (
        train_stage3.Stage3Config,
        "--data.roots demos --run-dir run",
        """--chunk-size 0
        --chunk-size 5000 --n-action-steps 10
        --n-action-steps 0
        --n-action-steps 60
        --latent-loss-weight -1
        --latent-loss-weight nan
        --latent-loss-weight 0.1
        --video-share 0
        --video-share 1
        --video-share 0.3
        --teacher-kind continuous
        --laq-image-size 128
        --accept-other-pairs
        --accept-other-pairs --labels cache --label-cache labels --latent-loss-weight 1
        --laq-image-size 128 --labels cache --label-cache labels --latent-loss-weight 1
        --laq-code-seq-len 4 --labels cache --label-cache labels --latent-loss-weight 1
        --data.label-cameras top
        --latent-head codes
        --latent-horizon 2
        --laq-ckpt laq.safetensors
        --video-roots video
        --video-roots video --video-mixture video.yaml
        --decode-actions --laq-ckpt laq.safetensors
        --stage2-artifact x.safetensors --init-from y
        --stage2-artifact nowhere.safetensors
        --stage2-artifact video
        --video-roots nowhere --latent-loss-weight 0.1 --laq-ckpt laq.safetensors
        --data.frame-gap-s 0.1
        --decode-actions --video-roots demos --laq-ckpt laq.safetensors
        --decode-actions --video-roots demos --laq-ckpt laq.safetensors --latent-horizon 1
        --vdeo-roots video""",
    ),
    f"{TEACHER} train": (
        TeacherConfig,
        f"{DATA} --run-dir run",
        """--laq.dim 0
        --laq.dim 1000000000
        --laq.quant-dim 0
        --laq.codebook-size 1
        --laq.codebook-size 1000000000
        --laq.spatial-depth -1
        --laq.spatial-depth 0
        --laq.spatial-depth 1000000000
        --laq.temporal-depth -1
        --laq.patch-size 0
        --laq.image-size 60
        --laq.dim 33
        --laq.heads 0
        --laq.code-seq-len 5
        --replace-every 0
        --dead-below -1
        --dead-below 50
        --settle-share 5
        --collapse-below nan
        --collapse-below -1
        --optim.warmup-steps -1
        --grounding.share 0.5
        --grounding.episodes 3
        --grounding.roots demos --grounding.share 1
        --grounding.roots demos --grounding.weight 0
        --grounding.roots demos --grounding.episodes -1
        --grounding.roots nowhere
        --init-from nowhere.pt""",
    ),
    f"{TEACHER} label": (
        LabelConfig,
        f"--laq-ckpt laq.safetensors {DATA} --label-cache labels",
        """--batch-size 0
        --batch-size -3
        --label-cache laq.safetensors
        --label-cache demos/labels""",
    ),
    f"{TEACHER} check": (
        CheckConfig,
        f"--laq-ckpt laq.safetensors {DATA} --out check",
        """--pairs 1
        --detailed-pairs 0
        --seed -1
        --out run_before
        --out video/check""",
    ),
    "rollout.py": (
        rollout.RolloutConfig,
        "",
        """--policy-path nowhere
        --policy-path me/policy
        --policy policy
        --policy-path policy --task reach-v3
        --policy-path policy --episode=3
        --policy-path policy --out dangling
        --policy-path policy --out pipe
        --policy-path policy --flow-steps 1000000
        --policy-path policy --num-envs 5000
        --policy-path policy --env.type metaword
        --policy-path policy --env.type pusht --env.task reach-v3
        --policy-path policy --env.task reach-v3 reach-v3
        --policy-path policy --env.camera top
        --policy-path policy --env.type pusht --env.start-steps 5
        --policy-path policy --env.start-steps 20
        --policy-path policy --seed 999999
        --policy-path policy --sweep flow_steps=0,1
        --policy-path policy --sweep flow_steps=1,2 --flow-steps 5
        --policy-path policy --compare pipe
        --policy-path policy --compare nowhere.json
        --policy-path policy --device tpu
        --policy-path policy --device cuda:first
        --policy-path policy --device cpu:1""",
    ),
    "python -m smolvla_shared.hub push": (
        PushConfig,
        "",
        """nowhere me/my_policy
        policy my//policy
        policy me/my_policy --dryrun""",
    ),
    "python -m smolvla_shared.hub card": (
        CardConfig,
        "",
        """video --results results.json
        policy --results nowhere.json""",
    ),
    "python -m smolvla_shared.data_check": (
        DataCheckConfig,
        "",
        """somebody/demos --episodes 0
        somebody/demos --max-text-tokens 0
        somebody/demos --out dangling
        somebody/demos --out video
        somebody/demos --tokenizer pipe
        somebody/-demos
        nowhere/at/all""",
    ),
    "python -m smolvla_shared.serve": (
        ServeConfig,
        "",
        """--port 0
        --port 65536
        --fps 0
        --inference-latency -1
        --obs-queue-timeout nan""",
    ),
    "python -m smolvla_shared.video": (
        VideoConfig,
        "clips",
        """--root dangling
        --root pipe
        --root new --crf 99
        --root new --size 1000000
        --root new --num-workers 5000
        --root new --fps 1000000000
        --root new --max-episode-s nan
        --root new --max-episode-s inf
        --root new --min-episode-s -3
        --root new --min-motion nan
        --root new --scene-threshold -5
        --root new --max-gop -1
        --root new --camera a/b
        --root new --camera action
        --root new --task {folder:d}
        --root new --task {file}""",
    ),
    "python -m smolvla_shared.gpu_check": (Options, "", "--out video"),
    "python -m smolvla_shared.lerobot_smolvla import": (
        ImportConfig,
        "",
        """./nowhere new
        video new
        policy video""",
    ),
    "python -m smolvla_shared.lerobot_smolvla export": (
        ExportConfig,
        "",
        """./nowhere new
        policy video""",
    ),
}
# What there is where the commands run: so a mistake about one path is about that path.
FILES = """video/meta/info.json demos/meta/info.json laq.safetensors laq.json alone.safetensors results.json
run_before/config.json policy/config.json labels/video/cache.json""".split()
PIPES = "pipe", "pipe.safetensors"  # whoever opens one waits until somebody writes
MISTAKES = [(command, mistake.strip()) for command, (_, _, of) in COMMANDS.items() for mistake in of.splitlines()]
HEAD = """# Options and paths that are refused

What a command says, and does not run with, before it loads anything. Every line ends the command with exit code 2. The
list is written by `tests/test_mistakes.py`, which tries every line. What is wrong with files and data is in
[errors.md](errors.md).

| command | options | message |
|---|---|---|
"""


@lru_cache
def message(command: str, mistake: str) -> str:
    options, needed, _ = COMMANDS[command]
    # What the mistake states takes the place of what is needed.
    stated = {word for word in mistake.split() if word.startswith("--")}
    positional, *groups = needed.split("--")
    given = " ".join([positional, *[f"--{group}" for group in groups if f"--{group.split()[0]}" not in stated]])
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        for name in FILES:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
        for name in PIPES:
            os.mkfifo(name)
        os.symlink("nowhere", "dangling")
        with pytest.raises(ValueError) as refused:
            parse(options, prog=command, args=f"{given} {mistake}".split())
    assert is_mistake(refused.value)
    return in_few_lines(refused.value).replace(directory, "<here>")


def rows() -> Iterator[str]:
    for command, mistake in MISTAKES:
        said = message(command, mistake).removeprefix("error: ").replace("\n", " ").replace("|", "\\|")
        yield f"| `{command}` | `{mistake}` | {said} |\n"


def test_the_document_says_what_the_commands_say():
    assert DOCUMENT.read_text().splitlines() == (HEAD + "".join(rows())).splitlines()
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("command", "mistake"), MISTAKES)
def test_a_message_names_the_option_and_fits_four_lines(command, mistake):
    said = message(command, mistake)
    names = [word.partition("=")[0].removeprefix("--").removeprefix("laq.") for word in mistake.split()]
    assert any(name in said or name.replace("-", "_") in said for name in names), said
    assert said.startswith("error: ") and len(said.splitlines()) <= 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--run-dir x --data.roots y --optim.warmup-step 3", "--optim.warmup-step: did you mean --optim.warmup-steps"),
        ("--stps 3 --lr=1", "--stps: did you mean --steps\nunknown option --lr: did you mean --optim.lr"),
        ("--data.root y", "--data.root: did you mean --data.roots"),
        ("--dataset.streaming=true", f"--dataset.streaming: {NO_STREAMING}"),
        ("--no-resum", "--no-resum: did you mean --no-resume"),
        ("--optim.lr -1 --qqqq", "--qqqq: there is none of a similar name, --help lists all"),
    ],
)
def test_an_unknown_option_is_said_with_the_nearest(words, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    with pytest.raises(ValueError, match="^unknown option " + re.escape(said) + "$"):
        parse(train_stage3.Stage3Config, args=words.split())
    assert os.environ["COLUMNS"] == "30"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run-dir", ""], "--run-dir has an empty value, is a variable of the shell not set"),
        (["--run-dir="], "--run-dir has an empty value"),
        (["--data.cameras", "top", " "], "--data.cameras has an empty value"),
        (["", "--run-dir", "x"], "the command line has an empty value"),
        (
            ["--run-dir", "a\nb", "--data.repo-ids", "a/b"],
            r"--run-dir 'a\\nb' has '\\n' in its name: name another path",
        ),
        (["--run-dir", "a\udcff", "--data.repo-ids", "a/b"], r"--run-dir 'a\\udcff' has '\\udcff' in its name"),
        (["--run-dir", "x", "--data.repo-ids", "a\nb"], "--data.repo-ids a\nb is no hub id"),
    ],
)
def test_a_value_that_a_shell_or_an_editor_has_spoilt_is_refused(words, said):
    with pytest.raises(ValueError, match="^" + said):
        parse(train_stage3.Stage3Config, args=words)


def test_a_task_text_may_be_empty():
    assert parse(VideoConfig, args=["clips", "--root", "new", "--task", ""]).task == ""


def test_an_option_that_is_given_twice_is_said(capsys, monkeypatch):
    words = "--data.repo-ids a/b --run-dir x --steps 5 --optim.lr=1e-3 --steps 6 --optim.lr 1e-4".split()
    assert parse(train_stage3.Stage3Config, args=words).steps == 6
    assert capsys.readouterr().err == "given twice, the last one counts: --steps, --optim.lr\n"
    monkeypatch.setenv("RANK", "1")  # of a launched run, in which the first process says it
    parse(train_stage3.Stage3Config, args=words)
    assert capsys.readouterr().err == ""


def test_help_is_no_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(train_stage2.Stage2Config, args=["--help"])
    assert stopped.value.code == 0 and "--optim.lr" in capsys.readouterr().out


SCRIPT = """
import sys
from smolvla_shared.command import run_command

def throw(error):
    (_ for _ in ()).throw(error)

def deep():
    {body}

def main():
    deep()

run_command(main)
"""


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("raise ValueError('the file x is missing: copy it')", 2, "error: the file x is missing: copy it"),
        ("raise ValueError('\\n'.join(map(str, range(9))))", 2, "8"),
        ("int('many')", 1, "ValueError: invalid literal for int() with base 10: 'many'"),
        ("[].index(3)", 1, "ValueError: 3 is not in list"),
        ("raise KeyError('a bug')", 1, "KeyError: 'a bug'"),
        ("raise FloatingPointError('loss or gradients are not finite')", 2, "error: loss or gradients are not finite"),
        ("throw(FloatingPointError('of numpy'))", 1, "FloatingPointError: of numpy"),
        ("raise OSError(28, 'No space left on device', 'run/x')", 2, None),
        ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C"),
        # As libraries raise them: not by a statement of ours.
        ("throw(RuntimeError('I/O error: No space left on device (os error 28)'))", 2, "Make room, or name"),
        ("throw(PermissionError(13, 'Permission denied', 'run/x'))", 2, "Name a directory that is yours, or change"),
        ("throw(OSError(36, 'File name too long', 5000 * 'x'))", 2, "Give a file or directory a name of at most 255"),
        ("throw(OSError(12, 'Cannot allocate memory'))", 2, "Less is held at once with a smaller --batch-size"),
        ("throw(OSError(24, 'Too many open files', 'run/x'))", 2, "Raise the limit (ulimit -n 65536), or pass fewer"),
        ("throw(BlockingIOError(11, 'Resource temporarily unavailable'))", 2, "Pass fewer (--data.num-workers 0), or"),
        ("throw(OSError(5, 'Input/output error', 'run/x'))", 2, "Look at it (dmesg), or name a directory on another"),
        ("throw(NotADirectoryError(20, 'Not a directory', 'run/x'))", 2, "Move it away, or name another directory"),
        ("throw(BrokenPipeError(32, 'of a process'))", 1, "BrokenPipeError: [Errno 32] of a process"),
        (
            "throw(RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'))",
            2,
            "Pass a smaller --data.num-workers",
        ),
        ("throw(MemoryError())", 2, "Less is held at once with a smaller --batch-size"),
    ],
)
def test_a_mistake_ends_in_few_lines_and_a_bug_in_its_traceback(tmp_path, body, code, last):
    (tmp_path / "script.py").write_text(SCRIPT.format(body=body))
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    lines = done.stderr.splitlines()
    assert done.returncode == code
    assert lines[-1].startswith(last or "error: [Errno 28] No space left on device: 'run/x'")
    assert ("Traceback" in done.stderr) == (code == 1) and (code == 1 or len(lines) <= 4)


@pytest.mark.parametrize(
    "body", ["print('x', flush=True)", "print('x')", "print('x'); sys.exit(1)", "print('x' * 10**6)"]
)
def test_output_that_nobody_reads_is_no_bug(tmp_path, body):
    (tmp_path / "script.py").write_text(SCRIPT.format(body=body))
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    os.close(writes)
    assert done.returncode == EXIT_MISTAKE
    assert done.stderr.startswith("error: nobody reads the output any more") and len(done.stderr.splitlines()) == 1


HEAVY = "torch", "transformers", "lerobot", "accelerate", "datasets"
# Runs a command as `python` does, and tells in its exit code whether anything heavy was imported.
RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    (runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    sys.exit(10 * stop.code + any(name in sys.modules for name in {HEAVY}))
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train_stage2.py --data.roots video", "Missing from train_stage2.py: --run-dir PATH\nFor full helptext, run"),
        ("smolvla_shared.teacher trian", "Unrecognized options: trian\nAvailable subcommands: train, label, check"),
        ("examples/relabel.py --kind x", "invalid choice 'x' for argument '--kind'. Expected one of ('executed',"),
        (f"train_stage2.py --laq-ckpt q.pt {DATA} --run-dir y --ema-decay nan", "--ema-decay must be at least 0 and"),
        ("train_stage2.py --data.roots nowhere --run-dir y --laq-ckpt q.pt", "no LeRobotDataset at nowhere: meta/info"),
        ("train_stage2.py --data.repo-ids a/b --run-dir y --laq-ckpt q.pt", "--laq-ckpt q.pt: no such file; pass LAPA"),
        ("train_stage2.py --data.repo-ids a/b --run-dir tests --laq-ckpt q.pt", "--run-dir tests exists: pass"),
        ("train_stage3.py --data.repo-ids a/b --run-dir y --stage2-artifact z.safetensors", "no Stage 2 artifact z"),
        ("train_stage3.py --data.repo-ids a/b --run-dir y --init-from ./z", "no policy ./z: there is no such"),
        ("smolvla_shared.teacher train --data.roots nowhere --run-dir y", "no LeRobotDataset at nowhere: meta/info"),
        ("smolvla_shared.teacher label --data.repo-ids a/b --laq-ckpt q.pt --label-cache c", "--laq-ckpt q.pt: no"),
        ("smolvla_shared.teacher check --data.repo-ids a/b --laq-ckpt q.pt --out tests", "--laq-ckpt q.pt: no"),
        ("smolvla_shared.hub push nowhere me/policy", "nowhere holds no policy (config.json), artifact (smolvla_sh"),
        ("smolvla_shared.serve --port 0", "--port must be at least 1 and below 65,536, got 0"),
        ("smolvla_shared.serve --host 192.0.2.1", "--host 192.0.2.1 --port 8080 cannot be served (Cannot assign"),
        ("smolvla_shared.gpu_check --out tests", "--out tests exists: name a new directory"),
        ("smolvla_shared.lerobot_smolvla import ./nowhere new", "no SmolVLA policy ./nowhere: there is no such dir"),
        ("smolvla_shared.lerobot_smolvla export tests new", "no policy in tests: config.json is missing, found ["),
        ("rollout.py --policy-path me/policy", "--policy-path me/policy is no directory here; if it is a hub id, name"),
        ("rollout.py --policy-path smolvla_shared/assets/tiny_vlm --device gpu", "--device 'gpu' is no device: pass"),
        ("rollout.py --policy-path me/policy --env.type x", "--env.type x is not one of metaworld, pusht, aloha;"),
        ("rollout.py --policy-path me/policy --env.camera x", "--env.camera x: Meta-World alone has a choice, of"),
        ("rollout.py --policy-path nowhere", "nowhere holds no policy: config.json is missing (found: no such dire"),
    ],
)  # fmt: skip
def test_options_and_paths_are_refused_before_anything_heavy_is_imported(command, said):
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    imports_heavy = command.startswith("examples/")  # they are read as a whole, and start as they please
    assert done.returncode == 10 * EXIT_MISTAKE + imports_heavy, done.stderr
    assert done.stderr.startswith(f"error: {said}") and len(done.stderr.splitlines()) <= 4, done.stderr


COMMAND_NAMES = ["train_stage2.py", "train_stage3.py", "rollout.py", "smolvla_shared.teacher", "smolvla_shared.video"]
COMMAND_NAMES += [f"smolvla_shared.{name}" for name in "hub data_check serve gpu_check lerobot_smolvla".split()]


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_help_is_there_before_anything_heavy_is_imported(command):
    done = subprocess.run(
        [sys.executable, "-c", RUN, command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "") and "usage: " in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "take it out, and pass --accumulation-steps"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "take it out, and pass --model.compile"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "take it out, and pass configs/accelerate/fsdp2_8gpu.yaml"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "or pass --mixed_precision bf16 to accelerate launch"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "leave --precision out, or pass --mixed_precision no to accelerate"),
    ],
)
def test_what_accelerate_would_do_beside_a_run_is_refused_before_anything_heavy_is_imported(
    name, value, said, laq_checkpoint, tmp_path
):
    """By every command that trains, or labels. The precision of labels is that of the configuration."""
    teacher, run = f"--laq-ckpt {laq_checkpoint}", f"--run-dir {tmp_path / 'run'} --precision no"
    commands = [f"train_stage2.py {teacher} {run}", f"train_stage3.py {run}", f"smolvla_shared.teacher train {run}"]
    commands += [f"smolvla_shared.teacher label {teacher} --label-cache {tmp_path / 'run'}"] * (value != "bf16")
    for command in commands:
        words = f"{command} --data.repo-ids a/b".split()
        environment = {"PYTHONPATH": str(ROOT), name: value}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.returncode == 10 * EXIT_MISTAKE, done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr and len(done.stderr.splitlines()) <= 4
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_device_that_is_not_here_stops_a_rollout_before_it_begins(tmp_path):
    from test_wrong_inputs import write_policy

    write_policy(tmp_path / "policy")
    words = f"rollout.py --policy-path {tmp_path / 'policy'} --device cuda:99 --out {tmp_path / 'out'}".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == EXIT_MISTAKE, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --device cuda:99 is not here: pass one of cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def changed_rate(dataset: Path, directory: Path) -> Path:
    """A copy of a dataset that says another rate."""
    shutil.copytree(dataset, directory)
    path = directory / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 7}))
    return directory


def with_names(dataset: Path, directory: Path, names: str) -> Path:
    """A copy of a dataset that names the dimensions of its state, a letter each."""
    shutil.copytree(dataset, directory)
    path = directory / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.state"]["names"] = [*names]
    path.write_text(json.dumps(info))
    return directory


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "train_stage2.py {s2} --data.cameras top",
            "every dataset must have every camera, or you name them; asked for",
        ),
        (
            "train_stage2.py --run-dir {new} {teacher} --data.repo-ids {hub} --data.cameras top",
            "every dataset must have every camera, or you name them; asked for",
        ),
        ("train_stage2.py {s2} --data.label-cameras top", "every dataset must have the label cameras, but not {video}"),
        ("train_stage2.py {s2} --data.frame-gap-s 0.07", "--data.frame-gap-s 0.07 is not a whole number of frames of"),
        ("train_stage2.py {s2} --data.frame-gap-s 60", "no episode is longer than --data.frame-gap-s, "),
        ("train_stage2.py {s2} --val-fraction 0.99", "{video} has 8 episode(s), too few to hold out a share of 0.99"),
        ("train_stage2.py {s2} --data.max-episodes 90", "--data.max-episodes 90: {video} has"),
        (
            "train_stage2.py {s2} --data.episodes 3 8 90",
            "--data.episodes 3 8 90: {video} has the episodes 0 to 7, not 8, 90: leave these out",
        ),
        ("train_stage3.py --run-dir {new} --data.roots {video}", "{video} has no 'action' column, it has ["),
        (
            "train_stage3.py --run-dir {new} --data.roots {demos} --data.cameras top",
            "every dataset must have every cam",
        ),
        (
            "train_stage3.py --run-dir {new} --data.roots {joints} {poses}",
            "{joints} and {poses} count as one robot's, but name the numbers of observation.state differently: a, b, "
            "c, d, and x, y, z, w. Give each a `robot` of its own",
        ),
        ("train_stage3.py --run-dir {new} --data.roots {edited}", "{edited} cannot be trained on: "),
        ("smolvla_shared.teacher train --run-dir {new} --data.roots {edited}", "{edited} cannot be trained on: "),
        ("smolvla_shared.teacher train --run-dir {new} --data.roots {video} --data.cameras top", "every dataset must"),
        ("smolvla_shared.teacher label --label-cache {new} {teacher} --data.roots {edited}", "{edited} cannot be trai"),
        ("smolvla_shared.teacher check --out {new} {teacher} --data.roots {video} --data.cameras top", "every datas"),
    ],
)
def test_what_the_data_tells_is_refused_before_anything_heavy_is_imported(
    command, said, video_dataset, labelled_dataset, laq_checkpoint, tmp_path
):
    places = {"video": video_dataset, "demos": labelled_dataset, "new": tmp_path / "new"}
    places |= {"edited": changed_rate(labelled_dataset, tmp_path / "edited"), "teacher": f"--laq-ckpt {laq_checkpoint}"}
    places |= {n: with_names(labelled_dataset, tmp_path / n, m) for n, m in (("joints", "abcd"), ("poses", "xyzw"))}
    places["hub"] = "/".join(video_dataset.parts[-2:])  # it is where a download would be
    places["s2"] = "--run-dir {new} --data.roots {video} {teacher}".format_map(places)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.format_map(places).split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_LEROBOT_HOME": str(video_dataset.parent.parent)},
    )
    assert done.returncode == 10 * EXIT_MISTAKE, done.stderr
    assert done.stderr.startswith(f"error: {said.format_map(places)}") and len(done.stderr.splitlines()) <= 4
    assert not (tmp_path / "new").exists()


if __name__ == "__main__":
    print(HEAD + "".join(rows()), end="")
