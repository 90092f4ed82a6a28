"""Real commands in real processes, without paying for their imports each time.

A server process imports what the commands import and forks a child for each of them; the child runs the script as
`python script.py ...` would. What happens to the child, SIGKILL included, happens to nobody else.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Forked:
    """A child of the server: the command that it runs, and how it ended.

    processes: if more than one, these run the command on the CPU, and the child is their launcher
    """

    def __init__(self, server: subprocess.Popen, command: list[str | Path], output: Path, processes: int = 1):
        self.server, self.output = server, output
        request = {"command": [str(part) for part in command], "output": str(output), "processes": processes}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = json.loads(server.stdout.readline())["pid"]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"

    def wait_for(self, condition: Callable[[], Any], timeout: float = 300.0) -> None:
        """Until the condition holds or the process has ended."""
        end = time.monotonic() + timeout
        while self.is_running() and not condition():
            assert time.monotonic() < end, f"waited {timeout} s; {self.output.read_text()}"
            time.sleep(0.0005)

    def wait(self) -> int:
        """Its exit code; the negative signal's number where one ended it."""
        self.server.stdin.write("wait\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())["code"]


def run_forked(
    server: subprocess.Popen, command: list[str | Path], output: Path, processes: int = 1
) -> tuple[int, str]:
    """The exit code of `python <command>` and what it printed, which is appended to the file `output`, too."""
    before = output.stat().st_size if output.exists() else 0
    code = Forked(server, command, output, processes).wait()
    return code, output.read_bytes()[before:].decode()


def start_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def run_command(command: list[str], output: str, processes: int) -> None:
    """What a child does: `python <command>`, with its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.setpgid(0, 0)  # a process group, as a shell or a scheduler gives it
    if processes == 1:
        run_python(command)
    else:
        launch(command, processes)


def run_python(command: list[str]) -> None:
    if command[0] == "-c":
        exec(command[1], {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def launch(command: list[str], processes: int) -> None:
    """As `torchrun --standalone --nproc-per-node <processes> <command>`, whose own processes would import all again."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["ACCELERATE_USE_CPU"] = "true"
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    options = {"start_method": "fork", "max_restarts": 0, "monitor_interval": 0.1}
    elastic_launch(LaunchConfig(1, 1, processes, **place, **options), run_one_of_several)(command)


def run_one_of_several(command: list[str]) -> None:
    try:
        run_python(command)
    except Exception:
        traceback.print_exc()  # the launcher tells of the first process only, which may be one that missed another
        raise


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    # All that takes long; the commands import some of it only when they come to it.
    for name in "lerobot.envs.metaworld lerobot.policies.factory matplotlib.backends.backend_agg torchcodec".split():
        importlib.import_module(name)
    for name in "feature_cache grounding initial label_check rollout_results run".split():
        importlib.import_module(f"smolvla_shared.{name}")

    pid = 0
    for line in sys.stdin:
        if line == "wait\n":
            print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)
            continue
        pid = os.fork()
        if not pid:
            run_command(**json.loads(line))
            sys.exit()
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    serve()
