"""Stopping on SIGTERM, SIGINT and SIGUSR1: the step is finished, saved, and the process exits with code 75."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator

from smolvla_shared.files import write_text
from smolvla_shared.run_processes import TIMEOUT

# What schedulers send before they take the machine away (SIGUSR1 with `#SBATCH --signal=USR1@120`), and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h, "try again": the run is saved and --resume continues it. A finished run exits with 0.
EXIT_STOPPED = 75
# In the run directory of a stopped run until --resume, because `accelerate launch` turns every exit code into 1.
STOPPED_FILE = "stopped.json"


class StopSignals:
    """Within this context the signals only set a flag, which `wanted()` reads after every step.

    All processes stop after the same step, whichever of them got the signal: their flags are summed in the background,
    in host memory, and read one step later. Neither host nor device waits, and the run stops at most two steps after
    the signal. A second SIGINT stops at once.
    """

    def __init__(self, num_processes: int):
        self.received: signal.Signals | None = None
        self.num_processes = num_processes
        self.started: list[multiprocessing.process.BaseProcess] = []  # processes that do not see the signals

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        if self.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.flag, self.pending = torch.zeros(1), None
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.started:
            process.kill()  # Python would end them by SIGTERM, which they do not see, and wait for ever
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = signal.Signals(number)
        again = "; again to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{self.received.name}: finishing the step and saving{again}\n".encode())

    def wanted(self) -> bool:
        """Whether to stop after this step; all processes call it once a step and get the same answer."""
        if self.num_processes == 1:
            return self.received is not None
        if self.pending:
            self.pending.wait()
        wanted = self.flag.numpy()[0] > 0
        self.flag = torch.tensor([float(self.received is not None)])
        self.pending = dist.all_reduce(self.flag, group=self.group, async_op=True)
        return bool(wanted)

    def exit(self, run_dir: Path, step: int, accelerator: Accelerator) -> NoReturn:
        """Exit with EXIT_STOPPED; the run has been saved."""
        received = self.received.name if self.received else "a signal to another process"
        if accelerator.is_main_process:
            write_text(run_dir / STOPPED_FILE, json.dumps({"step": step, "received": received}) + "\n")
        accelerator.print(f"stopped by {received}, saved at step {step}; --resume goes on (exit code {EXIT_STOPPED})")
        raise SystemExit(EXIT_STOPPED)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Processes that are started within this context never see the signals.

        Ctrl-C and SLURM signal all processes of a group, but finishing the step needs the loader's workers.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # new processes inherit the mask
        resource_tracker.ensure_running()  # starts a process, too, and unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        before = set(multiprocessing.active_children())
        try:
            yield
        finally:
            self.started += set(multiprocessing.active_children()) - before
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def hide_worker(worker: int) -> None:
    """A DataLoader's worker_init_fn, for workers that inherit no mask: their fork server started before
    `StopSignals.hidden`, to fill a cache.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
