"""The machine refuses: a full disk, no memory, a silent hub, a directory that another process writes in."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from forked import ROOT, Forked, run_forked
from helpers import make_accelerator, make_config, names_in

from smolvla_shared.cache import RowCache
from smolvla_shared.command import EXIT_MISTAKE
from smolvla_shared.locks import lock, unlock
from smolvla_shared.rollout_results import open_directory
from smolvla_shared.run_checkpoint import claim_run, damage
from smolvla_shared.teacher import main
from smolvla_shared.video import VideoConfig, claim, clip_options
from smolvla_shared.video_source import Look

SIZES = "--save-every 1 --log-every 1 --eval-samples 4 --data.num-workers 0 --val-fraction 0.2 --model.preset tiny"


@pytest.fixture
def stage2(video_dataset, laq_checkpoint) -> list[str | Path]:
    return ["train_stage2.py", *SIZES.split(), "--data.roots", video_dataset, "--laq-ckpt", laq_checkpoint]


def limited(limit: str, size: str, command: list[str | Path]) -> list[str]:
    """A script with a limit on what its process may take: RLIMIT_<limit>, bytes."""
    script, *words = map(str, command)
    code = f"import resource, runpy, sys; sys.argv = {[script, *words]}\n"
    code += f"resource.setrlimit(resource.RLIMIT_{limit}, 2 * ({size},))\n"
    return ["-c", f"{code}runpy.run_path({script!r}, run_name='__main__')"]


def said_of(output: str) -> list[str]:
    """The message at the end of what a command printed."""
    assert "Traceback" not in output, output
    lines = output.splitlines()
    start = max(number for number, line in enumerate(lines) if "error: " in line)
    return lines[start:]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of two pages: a third file of more than no bytes finds it full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_labels_on_a_full_disk_leave_no_half_file_and_go_on(
    server, small_disk, video_dataset, laq_checkpoint, tmp_path
):
    command = ["-m", "smolvla_shared.teacher", "label", "--laq-ckpt", laq_checkpoint, "--data.roots", video_dataset]
    command += ["--data.num-workers", "0", "--label-cache", small_disk / "labels"]
    code, output = run_forked(server, command, tmp_path / "output.txt")
    said = said_of(output)
    assert code == EXIT_MISTAKE and len(said) <= 4
    assert re.search(r"labels/.* cannot be written: .*No space left on device", said[0]), said
    assert re.search(r"it takes [\d,]+ bytes, /.* has [\d,]+ bytes free: make room", said[1]), said
    left = [path.name for path in small_disk.rglob("*") if path.is_file() and path.name != ".lock"]
    assert set(left) <= {"cache.json", "codebook.safetensors"}
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    code, output = run_forked(server, command, tmp_path / "output.txt")
    assert code == 0, output


def test_a_report_on_a_full_disk_is_not_there(server, small_disk, video_dataset, laq_checkpoint, tmp_path):
    command = ["-m", "smolvla_shared.teacher", "check", "--laq-ckpt", laq_checkpoint, "--data.roots", video_dataset]
    command += ["--data.num-workers", "0", "--pairs", "40", "--detailed-pairs", "8", "--out", small_disk / "check"]
    code, output = run_forked(server, command, tmp_path / "output.txt")
    said = said_of(output)
    assert code == EXIT_MISTAKE and len(said) <= 4 and "No space left on device" in said[0], said
    assert names_in(small_disk) == []


def test_a_directory_that_cannot_be_written_is_refused_at_once(small_disk, video_dataset):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ValueError, match=rf"--run-dir .* cannot be written: no permission in {small_disk}; name"):
        main(["train", "--data.roots", str(video_dataset), "--run-dir", str(small_disk / "run")])


def test_a_checkpoint_that_does_not_fit_is_gone_and_resume_goes_on(server, stage2, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output.txt"
    command = [*stage2, "--steps", "2", "--batch-size", "4", "--run-dir", run]
    code, said = run_forked(server, limited("FSIZE", "1 << 20", command), output)
    assert code == EXIT_MISTAKE
    assert said_of(said)[0].startswith("error: the checkpoint of step 1 could not be written: "), said
    assert len(said_of(said)) <= 4 and names_in(run / "checkpoints") == []
    code, said = run_forked(server, [*command, "--resume"], output)
    assert code == 0, said
    assert not damage(run / "checkpoints" / "last")


def test_without_memory_the_batch_size_is_named(server, stage2, tmp_path):
    run = tmp_path / "run"
    command = [*stage2, "--steps", "1", "--batch-size", "512", "--run-dir", run]
    more = "4096 * int(open('/proc/self/statm').read().split()[0]) + (1 << 29)"  # than the process has now
    code, output = run_forked(server, limited("AS", more, command), tmp_path / "output.txt")
    said = said_of(output)
    assert code == EXIT_MISTAKE and len(said) <= 4
    assert said[0].startswith("error: out of memory at step 1: ")
    assert "--batch-size 512 / 1): pass --accumulation-steps 2, which keeps the batch" in said[1]


def test_one_run_at_a_time_and_a_crash_leaves_no_lock(server, stage2, tmp_path):
    run = tmp_path / "run"
    command = [*stage2, "--steps", "60", "--batch-size", "4", "--run-dir", run]
    first = Forked(server, command, tmp_path / "first.txt")
    first.wait_for((run / "checkpoints" / "last").is_symlink)
    first.kill(signal.SIGSTOP)
    second = subprocess.run([sys.executable, *map(str, command), "--resume"], capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == EXIT_MISTAKE, second.stderr
    assert f"--run-dir {run}: process {first.pid} on {socket.gethostname()} is writing there now" in second.stderr
    first.kill(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    code, output = run_forked(server, [*command, "--resume"], tmp_path / "third.txt")
    assert code == 0, output


def test_a_resumed_run_is_the_run_that_began(server, stage2, video_dataset, tmp_path):
    data, run, output = tmp_path / "video", tmp_path / "run", tmp_path / "output.txt"
    shutil.copytree(video_dataset, data)
    command = [data if part == video_dataset else part for part in stage2]
    command += ["--batch-size", "4", "--run-dir", run]

    def resumed(steps: int) -> str:
        code, said = run_forked(server, [*command, "--steps", str(steps), "--resume"], output)
        assert code == EXIT_MISTAKE and len(said_of(said)) <= 4, said
        return said_of(said)[0]

    code, said = run_forked(server, [*command, "--steps", "2"], output)
    assert code == 0, said
    code, said = run_forked(server, [*command, "--steps", "2", "--resume"], tmp_path / "again.txt")
    assert code == 0 and "the run is finished, its 2 steps are done: pass a larger --steps to go on" in said
    assert resumed(1).startswith("error: --resume: 2 steps are done, --steps 1 asks for fewer: pass 2 or more")
    info = data / "meta" / "info.json"
    before = info.read_text()
    info.write_text(before + "\n")
    assert resumed(3).startswith(f"error: --resume: not what the run began with: dataset {data}")
    info.write_text(before)
    artifact = next((run / "artifacts").glob("*_artifact.json"))
    artifact.unlink()  # as after a full disk: nothing is left to train, but the artifact is to be written
    code, said = run_forked(server, [*command, "--steps", "2", "--resume"], output)
    assert code == 0 and artifact.exists(), said


HOLD = "import sys, time; from pathlib import Path; from smolvla_shared.locks import lock\n"
HOLD += "lock(Path(sys.argv[1]), 'it', 'wait'); print(flush=True); time.sleep(600)"


@pytest.fixture
def other(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process, which has tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_two_new_runs_in_one_directory(other, tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match=rf"process {other.pid} on .* is writing there now; wait for it or stop it"):
        claim_run(config, make_accelerator())
    assert not (tmp_path / "config.json").exists()
    other.kill()
    other.wait()
    claim_run(config, make_accelerator())
    assert (tmp_path / "config.json").exists()


def test_two_fills_of_one_cache(other, tmp_path):
    store = RowCache(tmp_path, {"of": "a test"}, 20, 10)
    with pytest.raises(ValueError, match=rf"process {other.pid} on .* is writing there now; wait for it"):
        store.claim()
    other.kill()
    other.wait()
    store.claim()
    lock(tmp_path, "it", "wait")  # whoever has it may take it again
    store.release()
    taken = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    assert taken.stdout.readline() == b"\n"
    taken.kill()
    taken.wait()


ASK = """
import time
from dataclasses import replace
from smolvla_shared import data
from smolvla_shared.config import DataConfig, ModelConfig
from smolvla_shared.files import find_directory
from smolvla_shared.trunk_files import load_trunk_tokenizer, load_trunk_weights, make_core_config

start = time.monotonic()
for ask in (
    lambda: find_directory("policy", "me/nothing", ("config.json",)),
    lambda: make_core_config(ModelConfig(name="me/nothing"), cameras=()),
    lambda: data.open_datasets(DataConfig(repo_ids=("me/nothing",))),
):
    try:
        ask()
    except ValueError as error:
        print(error)
# What else is loaded of a trunk whose config is in the cache.
tiny = make_core_config(ModelConfig(preset="tiny"), cameras=())
for ask in (
    lambda: load_trunk_tokenizer("me/nothing", None),
    lambda: load_trunk_weights(replace(tiny, model_name="me/nothing")),
):
    try:
        ask()
    except ValueError as error:
        print(error)
print(time.monotonic() - start)
"""


def test_two_conversions_of_one_root(tmp_path):
    config = VideoConfig(clips=(), root=tmp_path / "new")
    look = {Path("clip.mp4"): Look(seconds=1, width=64, height=48)}
    work, options = tmp_path / "new.unfinished", clip_options(config, look)
    claim(work, options)
    unlock(work)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, work], stdout=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=rf"new.unfinished, .*: process {holder.pid} on .* is writing there now; wait"):
        claim(work, options)
    holder.kill()
    holder.wait()
    claim(work, options)
    unlock(work)


def test_two_rollouts_in_one_directory(tmp_path):
    open_directory(tmp_path / "out", {"seed": 5})
    unlock(tmp_path / "out")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=rf"--out .*/out: process {holder.pid} on .* is writing there now; wait"):
        open_directory(tmp_path / "out", {"seed": 5})
    holder.kill()
    holder.wait()
    assert open_directory(tmp_path / "out", {"seed": 5}) == []
    unlock(tmp_path / "out")


PROXY = """
from smolvla_shared.config import DataConfig
from smolvla_shared.data import open_datasets
from smolvla_shared.files import find_directory
from smolvla_shared.trunk_files import load_trunk_tokenizer

for ask in (
    lambda: find_directory("policy", "me/nothing", ()),
    lambda: open_datasets(DataConfig(repo_ids=("me/nothing",))),
    lambda: load_trunk_tokenizer("me/nothing", None),
):
    try:
        ask()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("proxy", "said"), [("socks5://localhost:1", "the 'socksio' package is not installed"), ("x://y", "x://y")]
)
def test_a_proxy_that_cannot_be_used_is_said(proxy, said, tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "ALL_PROXY": proxy, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROXY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("cannot be asked by the proxy in ALL_PROXY or HTTPS_PROXY (" in x for x in lines)
    assert all(said in line and "pip install 'httpx[socks]'" in line for line in lines)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    asked = []
    with closing(socket.create_server(("localhost", 0))) as hub:
        threading.Thread(target=lambda: [asked.append(hub.accept()) for _ in range(100)], daemon=True).start()
        address = f"http://localhost:{hub.getsockname()[1]}"
        environment = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    *said, seconds = done.stdout.splitlines()
    assert len(said) == 5 and all(f"{address} does not answer within 5 s" in line for line in said), said
    assert len(asked) == 1 and float(seconds) < 60  # 5 s, on a loaded machine; without the question more than 200
