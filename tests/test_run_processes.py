"""run_processes.py: precision is stated once, and what it sets reaches processes, their groups and models."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import run_forked
from helpers import Regression, make_accelerator, make_config, passes

from smolvla_shared import data, data_blocks, data_loader, data_rows, run, run_processes
from smolvla_shared.cache import RowCache
from smolvla_shared.config import DataConfig
from smolvla_shared.run_processes import TIMEOUT, Transfer, describe_precision, stated_precision

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"


@pytest.mark.parametrize(
    "option, configured, expected",
    [
        (None, None, ("no", "the default")),
        (None, "no", ("no", "the Accelerate configuration")),
        (None, "bf16", ("bf16", "the Accelerate configuration")),
        ("bf16", None, ("bf16", "--precision")),
        ("bf16", "bf16", ("bf16", "--precision")),
        ("bf16", "no", ("bf16", "--precision")),
        ("no", None, ("no", "--precision")),
        ("no", "bf16", "--precision no, but the Accelerate configuration asks for mixed_precision bf16"),
        (None, "fp16", r"asks for mixed_precision fp16, but runs compute in float32 \(no\) or bf16"),
    ],
)
def test_precision_is_stated_once(monkeypatch, option, configured, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if configured:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    if isinstance(expected, tuple):
        assert stated_precision(option) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            stated_precision(option)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--accumulation-steps"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--model.compile"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "fsdp2_8gpu.yaml"),
    ],
)
def test_what_accelerate_would_do_beside_a_run_is_refused(name, value, instead, monkeypatch):
    monkeypatch.setenv(name, {"4": "1", "INDUCTOR": "NO", "true": "False"}[value])  # as accelerate launch sets them
    run_processes.refuse_settings()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is {value}, by the .*: take it out, and pass .*{instead}"):
        run_processes.make_accelerator(cpu=True)


def test_a_device_that_is_not_there_is_refused():
    assert run_processes.find_device("cpu") == "cpu"
    for name in ("tpu", "cuda:99", "cpu:7", "\n"):
        with pytest.raises(ValueError, match=r"is not here: pass one of cpu"):
            run_processes.find_device(name)


def test_a_run_in_float32_on_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert describe_precision(None, cpu) == "device: cpu; precision: float32, from the default"
    assert describe_precision("bf16", gpu) == "device: cuda; precision: bfloat16, from --precision"
    assert "device: cpu; precision: bfloat16, from --precision. No GPU was found: " in describe_precision("bf16", cpu)
    assert "float32, from the default. A GPU computes faster in bfloat16: --precision bf16" in describe_precision(
        None, gpu
    )


def test_only_a_gpu_gets_tf32(monkeypatch):
    for module, name in ((torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32")):
        monkeypatch.setattr(module, name, False)
    before = torch.get_float32_matmul_precision()
    run_processes.use_tf32(torch.device("cpu"))
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == (before, False)
    try:
        run_processes.use_tf32(torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_precision_comes_from_the_file_that_accelerate_launch_reads(tmp_path):
    """The configuration's bf16 reaches the run, its first lines and its config.json."""
    config = tmp_path / "cpu_bf16.yaml"
    config.write_text((CONFIGS / "cpu.yaml").read_text().replace("mixed_precision: 'no'", "mixed_precision: bf16"))
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom smolvla_shared import run, run_checkpoint\n"
        "from smolvla_shared.config import DataConfig, RunConfig\n"
        f"config = RunConfig(run_dir=Path({str(tmp_path / 'run')!r}), data=DataConfig(roots=(Path('x'),)))\n"
        "accelerator, _ = run.start_run(config)\n"
        "run_checkpoint.claim_run(config, accelerator)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config-file", config, script]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "device: cpu; precision: bfloat16, from the Accelerate configuration. No GPU was found" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "bf16"


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch):
    """Also where neither command states one and the Accelerate configuration has changed."""
    config = make_config(tmp_path / "run")
    config.run_dir.rmdir()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, _ = run.start_run(config)
    run.claim_run(config, accelerator)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = make_config(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="--precision: was no, now bf16"):
        run.start_run(resumed)
    AcceleratorState._reset_state(reset_partial_state=True)


# --- shared memory ----------------------------------------------------------------------------------------------------


def test_workers_that_would_fill_the_shared_memory_are_refused(monkeypatch, video_dataset, tmp_path):
    [dataset] = data.open_datasets(DataConfig(roots=(video_dataset,)))
    blocks = data_blocks.FrameBlocks(dataset, ("observation.image",), [np.arange(10)] * 3, (0,))
    loader = run_processes.make_worker_loader(blocks, num_workers=4)
    of_batch = 10 * (3 * 96 * 96 + 8 + 1)  # frames, their places, and whether they exist
    need = 2 * (4 * 4 + 1) * of_batch  # two processes: four batches for each of four workers, and the one in use
    free = need
    monkeypatch.setattr(run_processes.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run_processes.check_shared_memory(loader)
    free = need - 1
    fix = r"0\.0094 GB of /dev/shm, .*Pass --data\.num-workers 3, .*docker run --shm-size=1g, or --ipc=host"
    with pytest.raises(ValueError, match=fix):
        run_processes.check_shared_memory(loader)
    free = 0
    run_processes.check_shared_memory(run_processes.make_worker_loader(blocks, num_workers=0))
    monkeypatch.setattr(run_processes, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(run_processes.sys, "platform", "linux")
    with pytest.raises(ValueError, match=r"there is no .*/shm, by which .* pass --data\.num-workers 0, or mount one"):
        run_processes.check_shared_memory(loader)
    groups = data_rows.group_rows([(0, dataset.rows(0, 20))])
    spec = data_loader.SampleSpec(("observation.image",))
    config = make_config(tmp_path / "run", data=DataConfig(roots=("x",), num_workers=1))
    with pytest.raises(ValueError, match=r"--data\.num-workers 0"):
        data_loader.make_loaders([dataset], groups, [], spec, config, make_accelerator())


def test_views_of_the_same_frames_count_once():
    frames = torch.zeros(4, 10)
    assert run_processes.num_bytes([frames[:2], {"a": frames[1:]}, torch.zeros(3)]) == 160 + 12


# --- several processes ------------------------------------------------------------------------------------------------


def run_as_one_of_two(directory: Path, video: Path) -> None:
    """What each process of test_what_is_set_reaches_two_processes does."""
    accelerator = make_accelerator()
    rank, held = accelerator.process_index, []
    config = make_config(directory / "run", steps=60, log_every=3)
    with run.Run(config, accelerator, Regression()) as training:
        for batches in training.steps(lambda step: passes(step, rank, 2)):
            for batch in training.passes(batches):
                errors = training.core(batch)
                training.backward(errors["a"].mean() + errors["b"].mean())
                training.record({}, errors, batch.masks)
            training.update()
            held.append(len(training.recorder.clock.marks))
        held.append(len(training.recorder.clock.marks))
    groups = [dist.group.WORLD, training.signals.group]
    found = {
        "timeouts": [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups],
        "broadcast_buffers": training.core.broadcast_buffers,
        "bucket_view": training.core.gradient_as_bucket_view,
        "marks": (max(held), held[-1]),
        "shards": fill(directory / "cache", video, accelerator),
    }
    (directory / f"found{rank}.json").write_text(json.dumps(found))


def fill(directory: Path, video: Path, accelerator: Accelerator) -> list[int]:
    """Fill a cache of 19 shards, of which those with an even number are there. Which shards did this process write?"""
    [dataset] = data.open_datasets(DataConfig(roots=(video,)))
    store = RowCache(directory, {"a": 1}, dataset.num_frames, 10)
    if accelerator.is_main_process:
        store.claim()
        for rows in store.shards()[::2]:
            store.write(rows, torch.zeros(len(rows), 1))
    accelerator.wait_for_everyone()
    written, write = [], RowCache.write
    RowCache.write = lambda self, rows, values: written.append(rows.start // 10) or write(self, rows, values)
    options = {"pairs": False, "row_shape": (1,), "dtype": torch.float32, "rows_at_once": 10, "num_workers": 0}
    compute = lambda frames, _: frames[0].float().mean((1, 2, 3))[:, None]  # noqa: E731
    data_blocks.fill_cache(store, dataset, ("observation.image",), compute=compute, accelerator=accelerator, **options)
    assert store.is_complete()
    return written


@pytest.mark.slow
def test_what_is_set_reaches_two_processes(server, tmp_path, video_dataset):
    paths = f"pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(video_dataset)!r})"
    call = f"import pathlib, test_run_processes; test_run_processes.run_as_one_of_two({paths})"
    code, printed = run_forked(server, ["-c", call], tmp_path / "printed.txt", processes=2)
    assert code == 0, printed
    for rank in range(2):
        found = json.loads((tmp_path / f"found{rank}.json").read_text())
        assert found["timeouts"] == [TIMEOUT.total_seconds()] * 2  # of the Accelerator's group and of the stop signals'
        assert (found["broadcast_buffers"], found["bucket_view"]) == (False, True)
        most, last = found["marks"]
        assert last <= 2 < most < 30  # those of three steps at most, whatever the run's length
        assert found["shards"] == [1, 3, 5, 7, 9, 11, 13, 15, 17][rank::2]  # 5 and 4 of the missing, not 9 and 0


def test_a_gpu_copies_batches_beside_its_computing(monkeypatch):
    """In which order streams are used: a step waits for its copies, and their memory is kept while it reads them."""
    done = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream):
        done.append(f"on {stream.name}")
        yield
        done.append(f"off {stream.name}")

    def to_device(value: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        done.append(f"to {device}")
        return {key: tensor.clone() for key, tensor in value.items()}

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, s: done.append(f"{tensor.item()} for {s.name}"))
    monkeypatch.setattr(run_processes, "to_device", to_device)
    moved = Transfer(torch.device("cuda", 1))({"a": torch.tensor(3), "b": torch.tensor(4)})
    assert (moved["a"].item(), moved["b"].item()) == (3, 4)
    copying = ["on copies", "to cuda:1", "off copies"]
    assert done == [*copying, "steps waits for copies", "3 for steps", "4 for steps"]
    done.clear()
    Transfer(torch.device("cpu"))({"a": torch.tensor(3)})
    assert done == ["to cpu"]
