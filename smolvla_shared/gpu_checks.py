"""The checks of gpu_check.py, each of which has passed, has failed, or did not run, and says why."""

import gc
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate.state import AcceleratorState

from smolvla_shared.launch import IN_WORDS
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.run import versions
from smolvla_shared.run_processes import use_tf32
from smolvla_shared.teacher import train_teacher
from smolvla_shared.teacher_config import TeacherConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
STAGES = "teacher", "stage2", "stage3"
STEPS = "--steps 3 --batch-size 8 --log-every 1 --save-every 3 --eval-every 3 --eval-samples 8 --val-fraction 0.25"
# How far losses and gradient norms of three steps, and sampled actions, may be from those of float32 on the CPU, as a
# share of them. TF32 keeps 11 significant bits, bfloat16 8.
TOLERANCE = {"no": 0.01, "bf16": 0.05}
SAME_PRODUCT = 1e-5  # how far float32 products with and without their activation may be apart; another GELU is more
MEMORY_TOLERANCE = 0.15  # what a step may take beyond the table of docs/scaling.md, as a share of it


class DidNotRunError(Exception):
    """A check that this machine cannot run, and why."""


def module(directory: str, name: str) -> Any:
    sys.path.insert(0, str(ROOT / directory))  # of the repository, not of the package
    return importlib.import_module(name)


@dataclass
class Result:
    check: str
    state: str = "passed"  # or "failed", "did not run"
    why: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)


def apart(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """The largest difference of losses and gradient norms, as a share of the expected value."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    compared = [key for key in expected[0] if key.startswith("loss/") or key == "grad_norm"]
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, expected, strict=True) for key in compared)


def within(share: float, tolerance: float) -> dict[str, float]:
    """What a check found: how far two numbers are apart. Raises ValueError if that is too far."""
    if not share <= tolerance:  # also for NaN
        raise ValueError(f"{share:.2%} apart, more than {tolerance:.0%}")
    return {"apart": share, "tolerance": tolerance}


@dataclass
class Machine:
    """The device to check, and the runs of this check so far."""

    out: Path
    device: torch.device

    @cached_property
    def dataset(self) -> Path:
        module("benchmarks", "loader").record(self.out / "dataset", quick=True, gop=2)
        return self.out / "dataset"

    def needs_gpus(self, number: int, otherwise: str = "") -> None:
        if (there := torch.cuda.device_count()) < number:
            raise DidNotRunError(f"needs {number} GPU(s), there are {there}" + otherwise)

    def has_another_answer(self, precision: str) -> None:
        if precision == "no":
            self.needs_gpus(1, ": the CPU would be compared with itself")

    def command(self, stage: str, run_dir: Path, *options: str) -> list[str]:
        """The options of a training command; Stage 2 and 3 start from what the CPU made."""
        workers = "2" if self.device.type == "cuda" else "0"  # they take longer to start than the CPU to train
        args = [*STEPS.split(), "--data.roots", str(self.dataset), "--data.num-workers", workers, *options]
        if stage == "stage2":
            args += ["--laq-ckpt", str(self.on_cpu("teacher") / "checkpoints/last/pretrained_model/laq.safetensors")]
            args += ["--model.preset", "tiny"]
        if stage == "stage3":
            artifact = self.on_cpu("stage2") / "artifacts/smolvla_shared_stage2_artifact.safetensors"
            args += ["--stage2-artifact", str(artifact), "--chunk-size", "8", "--n-action-steps", "4"]
        return [*args, "--run-dir", str(run_dir)]

    def train(self, stage: str, device: torch.device, precision: str, *options: str, name: str = "") -> Path:
        """Train three steps in this process, unless an earlier check has. Returns the run's directory."""
        run_dir = self.out / "runs" / (name or f"{stage}_{device.type}_{precision}")
        if (run_dir / "checkpoints" / "last").exists() and "--resume" not in options:
            return run_dir
        if stage == "teacher":
            config_class, main = TeacherConfig, train_teacher
        else:
            script = module("", f"train_{stage}")
            config_class, main = getattr(script, f"{stage.capitalize()}Config"), script.main
        args = self.command(stage, run_dir, "--precision", precision, *options)
        torch.set_float32_matmul_precision("highest")  # a run on a GPU sets TF32 itself
        os.environ["ACCELERATE_USE_CPU"] = str(device.type == "cpu")
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            main(tyro.cli(config_class, args=args))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return run_dir

    def on_cpu(self, stage: str) -> Path:
        return self.train(stage, CPU, "no")

    def lines(self, run_dir: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- the checks: each returns what it found -------------------------------------------------------------------------


def environment(machine: Machine) -> dict[str, Any]:
    shared = shutil.disk_usage("/dev/shm")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    found = {"commit": commit, "python": platform.python_version(), "system": platform.platform(), **versions()}
    compilers = [name for name in ("g++", "gcc", "clang") if shutil.which(name)]
    return found | {"cores": os.cpu_count(), "shm_gb": shared.total / 1e9, "compilers": compilers}


def gpus(machine: Machine) -> dict[str, Any]:
    machine.needs_gpus(1)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = {"nvidia_smi": subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()}
    return found | {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}


def attention(machine: Machine) -> dict[str, Any]:
    """Which kernels compute the attention of the 500M model."""
    machine.needs_gpus(1, ": the CPU's kernels tell nothing of them")
    gpu = module("benchmarks", "gpu")
    return gpu.attention_kernels(*gpu.big_core(machine.device, "expert"))


def activation(machine: Machine) -> dict[str, Any]:
    """The vision tower's activation within a product (kernels.py) against one of its own, in float32."""
    machine.needs_gpus(1, ": a CPU has no such product")
    torch.set_float32_matmul_precision("highest")
    return within(module("benchmarks", "gpu").activation_apart(machine.device), SAME_PRODUCT)


def reference(machine: Machine) -> dict[str, Any]:
    """Three steps of each stage in float32 on the CPU: the numbers that the others are compared with."""
    return {stage: machine.lines(machine.on_cpu(stage))[-1]["grad_norm"] for stage in STAGES}


def training(stage: str, precision: str, machine: Machine) -> dict[str, Any]:
    """Three steps of a stage against float32 on the CPU."""
    machine.has_another_answer(precision)
    expected = machine.lines(machine.on_cpu(stage))
    found = machine.lines(machine.train(stage, machine.device, precision))
    return within(apart(found, expected), TOLERANCE[precision])


def resuming(machine: Machine) -> dict[str, Any]:
    """A fourth step after --resume, against the CPU's."""
    machine.needs_gpus(1, ": the tests resume on a CPU")
    runs = []
    for device in (CPU, machine.device):
        machine.train("stage3", device, "no")
        runs.append(machine.lines(machine.train("stage3", device, "no", "--resume", "--steps", "4")))
    return within(apart(runs[1][3:], runs[0][3:]), TOLERANCE["no"])


def sampling(precision: str, machine: Machine) -> dict[str, Any]:
    """Action chunks of ten Euler steps with the same noise, against float32 on the CPU."""
    machine.has_another_answer(precision)
    policy = HLRPSmolVLASharedPolicy.from_pretrained(machine.on_cpu("stage3") / "checkpoints/last/pretrained_model")
    sample = partial(module("benchmarks", "gpu").sample, policy.model)
    torch.set_float32_matmul_precision("highest")
    expected = sample(CPU, low=False)
    use_tf32(machine.device)
    found = sample(machine.device, low=precision == "bf16")
    return within(((found - expected).norm() / expected.norm()).item(), TOLERANCE[precision])


def compiled_sampler(machine: Machine) -> dict[str, Any]:
    """A chunk of a compiled policy against the plain one's; seconds to load and compile it, and of a chunk."""
    machine.needs_gpus(1, ": the tests trace a sampler on a CPU")
    use_tf32(machine.device)
    policy = machine.on_cpu("stage3") / "checkpoints/last/pretrained_model"
    share, seconds = module("benchmarks", "gpu").compiled_sampler(policy, machine.device)
    return within(share, TOLERANCE["no"]) | seconds


def compiling(machine: Machine) -> dict[str, Any]:
    """Three compiled steps of Stage 3 against those without --model.compile."""
    machine.needs_gpus(1, ": the tests compile on a CPU")
    plain = machine.lines(machine.train("stage3", machine.device, "bf16"))
    compiled = machine.train("stage3", machine.device, "bf16", "--model.compile", name="stage3_compiled")
    return within(apart(machine.lines(compiled), plain), TOLERANCE["bf16"])


def several(name: str, machine: Machine) -> dict[str, Any]:
    """Three steps of Stage 3 on two GPUs, through accelerate launch, against those on one."""
    machine.needs_gpus(2)
    run_dir = machine.out / "runs" / name
    launch = ["-m", "accelerate.commands.launch", "--config-file", str(ROOT / "configs/accelerate" / f"{name}.yaml")]
    args = machine.command("stage3", run_dir)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    command = [sys.executable, *launch, "--num_processes", "2", str(ROOT / "train_stage3.py"), *args]
    with (machine.out / f"{name}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"exit code {code}: see {log.name}")
    plain = machine.lines(machine.train("stage3", machine.device, "bf16"))
    return within(apart(machine.lines(run_dir), plain), TOLERANCE["bf16"])


def speed(machine: Machine) -> dict[str, Any]:
    """Samples a second beside LeRobot's SmolVLA, at the 500M shape."""
    machine.needs_gpus(1, ": python benchmarks/compare_smolvla.py measures a CPU")
    return module("benchmarks", "gpu").samples_a_second(machine.device, (8, 64))


def memory(trains: str, machine: Machine) -> dict[str, Any]:
    """GB of a training step, against docs/scaling.md."""
    machine.needs_gpus(1)
    found = module("benchmarks", "gpu").step_gb(machine.device, trains)
    measured, table = found.values()
    if measured > (1 + MEMORY_TOLERANCE) * table:
        raise ValueError(f"a step takes {measured:.1f} GB, docs/scaling.md says {table:.1f}")
    return found


CHECKS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "environment": environment,
    "GPUs and driver": gpus,
    "attention kernels": attention,
    "activation in a product": activation,
    "the CPU's numbers": reference,
    **{f"{s} in {IN_WORDS[p]}": partial(training, s, p) for s in STAGES for p in IN_WORDS},
    "resuming": resuming,
    **{f"sampling in {IN_WORDS[p]}": partial(sampling, p) for p in IN_WORDS},
    "compiled sampler": compiled_sampler,
    "--model.compile": compiling,
    **{f"two GPUs, {name}": partial(several, name) for name in ("ddp_8gpu", "fsdp2_8gpu")},
    "samples a second": speed,
    **{f"memory, {trains} trains": partial(memory, trains) for trains in ("expert", "all")},
}


def run_check(name: str, machine: Machine) -> Result:
    result, start = Result(name), time.perf_counter()
    try:
        result.found = CHECKS[name](machine)
    except DidNotRunError as reason:
        result.state, result.why = "did not run", str(reason)
    except Exception as error:  # the next checks still tell something
        traceback.print_exc()
        result.state, result.why = "failed", f"{type(error).__name__}: {error}"
    result.seconds = round(time.perf_counter() - start, 1)
    gc.collect()
    torch.cuda.empty_cache()
    return result


def in_words(results: list[Result]) -> str:
    lines = []
    for result in results:
        values = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in result.found.items()}
        found = ", ".join(f"{key} {value}" for key, value in values.items())
        lines.append(f"{result.state:<12} {result.check:<24} {result.seconds:6.1f} s  {result.why or found}")
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "did not run"))
    return "\n".join([*lines, f"{len(results)} checks: {counts}"])


def check(out: Path) -> None:
    """All checks, in a new directory. Exits with code 1 if one has failed."""
    out.mkdir(parents=True)
    machine = Machine(out.absolute(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    results = []
    for name in CHECKS:
        print(f"--- {name}", flush=True)
        results.append(run_check(name, machine))
    (out / "report.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    (out / "report.txt").write_text(in_words(results) + "\n")
    print(in_words(results), f"paste {out / 'report.txt'} into your report", sep="\n")
    raise SystemExit(any(result.state == "failed" for result in results))
