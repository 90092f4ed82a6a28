"""Does video pay? Arms with and without Stage 2, on equal demonstrations, steps and initial states.

    python examples/evidence.py --root runs/evidence                          # everything; goes on where it was stopped
    python examples/evidence.py --root runs/evidence --only '*/5/scratch/*' '*/5/stage 2/*'
    python examples/evidence.py --root runs/quick --quick                     # one task, two arms, a few steps

Every part (a recording, a teacher, labels, a training run, a rollout) is one of the project's commands. Its directory
is named by a hash of the command and of the parts that it reads: `parts/<name>-<hash>` with log.txt, done.json and what
the command wrote. A part that is complete is skipped. The outcome of each policy's episodes is kept in
`--cells`/<policy>.json under the same hashes: a policy that is there is not made again, so the table may be made on
several machines. What is complete of it is in `--cells`/table.json, demonstrations.png and steps.png, and is printed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from evidence_settings import (
    ARMS,
    CURVE_ARMS,
    CURVE_DEMONSTRATIONS,
    DEMONSTRATIONS,
    GAP_S,
    HELD_OUT_SEED,
    HORIZON,
    IMAGE_SIZE,
    QUICK,
    QUICK_SETTING,
    ROLLOUT_SEEDS,
    SEEDS,
    SETTINGS,
    STAGE3,
    STAGES,
    VIDEO_SEED,
    Arm,
    Labels,
    Setting,
    Sizes,
)
from evidence_table import Measured, by_task, compare, markdown, plot
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES

from smolvla_shared.command import run_command

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """One run of one of the project's commands."""

    name: str
    # Words with a space between them. @out is what it writes, @0, @1, ... what its inputs have written.
    command: str
    inputs: tuple["Part", ...] = ()

    @cached_property
    def directory(self) -> str:
        made_of = [self.command, [part.directory for part in self.inputs]]
        return f"{self.name}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}"

    def out(self, root: Path) -> Path:
        return root / "parts" / self.directory / "out"

    def is_complete(self, root: Path) -> bool:
        return (self.out(root).parent / "done.json").exists()

    def words(self, root: Path) -> list[str]:
        """The command with the paths of its inputs."""
        paths = {"out": self.out(root)} | {f"{i}": part.out(root) for i, part in enumerate(self.inputs)}
        return [re.sub(r"^@(\w+)", lambda found: f"{paths[found[1]]}", word) for word in self.command.split()]

    def make(self, root: Path) -> None:
        """Run what is missing. Raises subprocess.CalledProcessError where a command fails; log.txt says why."""
        if self.is_complete(root):
            return
        for part in self.inputs:
            part.make(root)
        out, command = self.out(root), [sys.executable, *self.words(root)]
        rollout = (out / "settings.json").is_file()
        if rollout or (out.exists() and "--run-dir" in command):  # a rollout or training run that was stopped goes on
            command.append("--resume")
        elif "label" not in command:  # the label command goes on by itself
            shutil.rmtree(out, ignore_errors=True)
        print(f"{time.strftime('%H:%M')} {self.directory}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with (out.parent / "log.txt").open("a") as log:
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment())
        done = {"command": command, "minutes": round((time.monotonic() - start) / 60, 2), "commit": commit()}
        (out.parent / "done.json").write_text(json.dumps(done, indent=2) + "\n")


def environment() -> dict[str, str]:
    """Offline, without a display, and with the package of this repository before an installed one."""
    paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = {"HF_HUB_OFFLINE": "1", "MUJOCO_GL": "osmesa"} | os.environ
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def places(first: int, count: int) -> str:
    """`count` inputs of a command, from the given one on."""
    return " ".join(f"@{place}" for place in range(first, first + count))


@dataclass(frozen=True)
class Cell:
    """One policy of the table."""

    setting: str
    demonstrations: int
    arm: str
    seed: int
    sizes: Sizes

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.demonstrations}/{self.arm}/{self.seed}"

    @property
    def where(self) -> Setting:
        return SETTINGS.get(self.setting, QUICK_SETTING)

    @property
    def how(self) -> Arm:
        return ARMS[self.arm]

    def record(
        self, name: str, episodes: int, seed: int, noise: float, start_steps: int = 0, without: tuple[str, ...] = ()
    ) -> Part:
        """`episodes` of all tasks together, an equal number of each; then `without` some of the tasks."""
        tasks = [task for task in self.where.tasks if task not in without]
        command = f"examples/record_metaworld.py --kind labelled --root @out --tasks {' '.join(tasks)}"
        command += f" --episodes {episodes // len(self.where.tasks)} --seed {seed} --noise {noise}"
        command += f" --camera {' '.join(self.where.cameras)}" if self.where.cameras else ""
        command += f" --start-steps {start_steps}" if start_steps else ""
        return Part(name, f"{command} --image-size {IMAGE_SIZE} --num-workers 1")

    def video(self) -> tuple[Part, ...]:
        """Recorded with actions, which Stage 2 does not read: the arms `true actions` and `all labels` do."""
        noise, start = self.where.video_noise, self.where.video_start
        return (self.record("video", self.sizes.video_episodes, VIDEO_SEED, noise, start),)

    def labelled(self) -> Part:
        where = self.where
        return self.record("demonstrations", self.demonstrations, self.seed, where.noise, without=where.video_only)

    def training(self, steps: int, holds_out: bool = True) -> str:
        options = f"--run-dir @out --seed {self.seed} --steps {steps} --batch-size {self.sizes.batch_size}"
        options += f" --eval-every {steps}" if holds_out else " --val-fraction 0"
        return f"{options} --optim.warmup-steps {max(1, min(50, steps // 6))} --data.num-workers 1"

    def stage(self, steps: int, holds_out: bool = True) -> str:
        """Options of Stage 2 and Stage 3."""
        options = f"{STAGES} {self.where.options}{self.where.sees}"
        options += f" {self.how.of_both}" if self.how.of_both else ""
        return f"{self.training(steps, holds_out)} --flow-draws {self.sizes.flow_draws} {options}"

    def teacher(self, learns: bool, grounded: bool = False) -> Part:
        """A teacher of the video, also grounded in the demonstrations; or one that keeps its random weights."""
        data = video = self.video()
        # A share that is held out of the video is held out of the demonstrations, too, which are too few for that.
        training = self.training(self.sizes.teacher_steps if learns else 1, holds_out=not grounded)
        training += "" if learns else " --optim.lr 1e-12"
        command = f"-m smolvla_shared.teacher train {training} --data.frame-gap-s {GAP_S}{self.where.teacher_sees}"
        command += f" --data.roots {places(0, len(video))}"
        if grounded:
            data, command = (*video, self.labelled()), f"{command} --grounding.roots @{len(video)}"
        name = "teacher-grounded" if grounded else "teacher" if learns else "teacher-random"
        return Part(name, command, data)

    def labels(self, wanted: Labels, in_stage3: bool = False) -> tuple[Part, str]:
        """Labels of the video, for Stage 3 also of the demonstrations, and the options that read them."""
        data = (*self.video(), self.labelled()) if in_stage3 else self.video()
        pairs, latents = f"--data.frame-gap-s {wanted.gap_s}", f"--teacher-kind {wanted.kind}"
        to = f"--label-cache @out {pairs} --data.roots {places(0, len(data))}"
        if wanted.source == "executed":
            part = Part("labels-executed", f"examples/relabel.py --kind executed {to} --slots {HORIZON}", data)
        elif wanted.source == "shuffled":
            source = self.labels(replace(wanted, source="teacher"))[0]
            options = f"--source-cache @{len(data)} --seed {self.seed}{self.where.teacher_sees}"
            part = Part("labels-shuffled", f"examples/relabel.py --kind shuffled {to} {options}", (*data, source))
        else:
            checkpoint = f"@{len(data)}/checkpoints/last/pretrained_model/laq.safetensors"
            command = f"-m smolvla_shared.teacher label --laq-ckpt {checkpoint} {to} {latents}"
            teacher = self.teacher(wanted.source != "random teacher", wanted.source == "grounded teacher")
            part = Part("labels", command, (*data, teacher))
        return part, f"{pairs} {latents} --latent-horizon {wanted.horizon} --labels cache --label-cache"

    def stage2(self) -> Part:
        video, (labels, options) = self.video(), self.labels(self.how.labels)
        command = f"train_stage2.py {self.stage(self.sizes.stage2_steps)} --model.preset tiny {self.how.options}"
        roots = f"--data.roots {places(0, len(video))} {options} @{len(video)}"
        return Part("stage2", f"{command} {roots}", (*video, labels))

    def policy(self) -> Part:
        """Stage 3 of this arm."""
        sizes, how, inputs = self.sizes, self.how, (self.labelled(),)
        steps = sizes.stage3_steps + (sizes.stage2_steps if how.has_all_compute else 0)
        inputs += self.video() if how.has_all_labels else ()
        # Too few demonstrations to hold one out.
        command = f"train_stage3.py {self.stage(steps, holds_out=False)} {STAGE3} --save-every {max(1, steps // 3)}"
        command += f" --data.roots {places(0, len(inputs))}"
        if how.stage3:
            # The decoder reads one latent action more than it decodes.
            labels, options = self.labels(replace(how.labels, horizon=HORIZON + how.decodes), in_stage3=True)
            video = self.video()
            command += f" {how.stage3} {options} @1 --video-roots {places(2, len(video))}"
            inputs += labels, *video
        if not how.labels or not how.stage2:
            return Part("stage3", f"{command} --model.preset tiny", inputs)
        artifact = f"@{len(inputs)}/artifacts/smolvla_shared_stage2_artifact.safetensors"
        return Part("stage3", f"{command} --stage2-artifact {artifact}", (*inputs, self.stage2()))

    def rollouts(self, step: int | None = None) -> tuple[Part, ...]:
        """Episodes of the policy, or of its checkpoint of a step, in each task."""
        checkpoint = f"@0/checkpoints/{'last' if step is None else f'{step:06d}'}/pretrained_model"
        command = f"rollout.py --policy-path {checkpoint} --out @out --num-envs 1 --max-steps {self.where.max_steps}"
        command += f" --episodes {self.sizes.rollouts // len(self.where.tasks)} --seed {self.seed * ROLLOUT_SEEDS}"
        command += f" --env.camera {self.where.cameras[0]}" if self.where.cameras else ""
        command += f" --rename {OBS_IMAGE} {OBS_IMAGES}.{self.where.cameras[0]}" if self.where.sees else ""
        command += f" --env.start-steps {self.where.start}" if self.where.start else ""
        policy = (self.policy(),)
        return tuple(Part(f"rollout-{task}", f"{command} --env.task {task}", policy) for task in self.where.tasks)

    def open_loop(self) -> Part:
        """The policy's actions beside an expert's, where rollouts begin."""
        held_out = self.record("held-out", self.sizes.held_out_episodes, HELD_OUT_SEED, 0.0, self.where.start)
        command = "examples/open_loop.py --policy-path @0/checkpoints/last/pretrained_model --roots @1 --out @out"
        return Part("open-loop", command, (self.policy(), held_out))

    def curve(self) -> dict[int, tuple[Part, ...]]:
        """Rollouts by Stage 3 step; of the last step alone, unless the arm has a curve."""
        steps, has_curve = self.sizes.stage3_steps, (self.arm, self.demonstrations)
        if has_curve not in [(arm, CURVE_DEMONSTRATIONS) for arm in CURVE_ARMS] or steps < 3:
            return {steps: self.rollouts()}
        return {step: self.rollouts(step) for step in (steps // 3, 2 * (steps // 3))} | {steps: self.rollouts()}

    def measure(self, root: Path, cells: Path) -> None:
        """Make what is missing, and keep the outcomes."""
        if self.read(cells):
            return
        by_step = {}
        for step, parts in self.curve().items():
            by_step[step] = {}
            for task, part in zip(self.where.tasks, parts, strict=True):
                part.make(root)
                results = json.loads((part.out(root) / "results.json").read_text())
                by_step[step][task] = {episode["seed"]: episode["success"] for episode in results["per_episode"]}
        (open_loop := self.open_loop()).make(root)
        r2 = json.loads((open_loop.out(root) / "open_loop.json").read_text())["r2"]
        kept = {"name": self.name, "made_of": self.made_of, "commit": commit(), "success": by_step, "action_r2": r2}
        cells.mkdir(parents=True, exist_ok=True)
        self.file(cells).write_text(json.dumps(kept) + "\n")

    def read(self, cells: Path) -> Measured | None:
        """What was kept of this policy; None: it is not measured yet."""
        if not self.file(cells).is_file():
            return None
        kept = json.loads(self.file(cells).read_text())
        if kept["made_of"] != self.made_of:
            raise ValueError(f"{self.file(cells)} was measured with other commands: remove it, or name other --cells")
        by_step = {
            int(step): {
                (self.seed, task, int(state)): won for task, states in tasks.items() for state, won in states.items()
            }
            for step, tasks in kept["success"].items()
        }
        return Measured(self.setting, self.demonstrations, self.arm, by_step, [kept["action_r2"]])

    def file(self, cells: Path) -> Path:
        return cells / f"{re.sub('[^a-z0-9]+', '-', self.name)}.json"

    @property
    def made_of(self) -> list[str]:
        parts = [part for parts in self.curve().values() for part in parts]
        return [part.directory for part in (*parts, self.open_loop())]


def gather(cells: list[Cell], directory: Path) -> list[Measured]:
    """What the measured cells gave, over their seeds."""
    rows: dict[tuple[str, int, str], Measured] = {}
    for cell in cells:
        if found := cell.read(directory):
            row = rows.setdefault((cell.setting, cell.demonstrations, cell.arm), found)
            if row is not found:
                row.add(found)
    return list(rows.values())


@dataclass(frozen=True)
class EvidenceConfig:
    """Make the table of arms with and without Stage 2."""

    # Directory of all parts.
    root: Path
    # Directory of the outcomes and of the table. Default: cells in --root.
    cells: Path | None = None
    # Only policies whose name <setting>/<demonstrations>/<arm>/<seed> matches one of these patterns.
    only: tuple[str, ...] = ("*",)
    # One task, two arms and a few steps: whether everything runs.
    quick: bool = False
    # Print the results of what is complete, run nothing.
    report: bool = False


def choose(config: EvidenceConfig) -> Iterator[Cell]:
    """All seeds of a cell's arm come last: a table with one seed everywhere is there first."""
    sizes = QUICK if config.quick else Sizes()
    # A teacher of a few steps may give every pair the same code, never the same latent.
    arms = ("scratch", "continuous") if config.quick else tuple(ARMS)
    settings = ["quick"] if config.quick else list(SETTINGS)
    for seed in SEEDS[:1] if config.quick else SEEDS:
        for setting in settings:
            for demonstrations in (1,) if config.quick else DEMONSTRATIONS:
                for arm in arms:
                    cell = Cell(setting, demonstrations, arm, seed, sizes)
                    if any(fnmatch(cell.name, pattern) for pattern in config.only):
                        yield cell


def main(config: EvidenceConfig) -> None:
    config, cells = replace(config, root=config.root.absolute()), list(choose(config))
    directory = config.cells or config.root / "cells"
    if not cells:
        raise ValueError(f"--only {config.only} matches none of <{'|'.join(SETTINGS)}>/<N>/<{'|'.join(ARMS)}>/<seed>")
    for cell in cells:
        if not config.report:
            cell.measure(config.root, directory)
    table = compare(gather(cells, directory))
    if table:
        (directory / "table.json").write_text(json.dumps(table, indent=2) + "\n")
        plot(table, directory / "demonstrations.png", by_step=False)
        plot(table, directory / "steps.png", by_step=True)
    print(markdown(table), by_task(table), sep="\n\n")


if __name__ == "__main__":
    run_command(main, EvidenceConfig)
