"""What nobody can test without a GPU, tried on yours: training, sampling, compiling, several GPUs, speed, memory.

python -m smolvla_shared.gpu_check      # `make gpu-check`; meant to take ten minutes, without a network

It trains tiny models on a dataset that it records itself, and compares with the CPU's numbers. A check has passed, has
failed, or did not run, and says why. Without a GPU, what a CPU can do runs. Paste <out>/report.txt into your report.
"""

from dataclasses import dataclass
from pathlib import Path

from smolvla_shared import paths
from smolvla_shared.command import run_command


@dataclass(frozen=True)
class Options:
    """Try on this machine's GPUs what needs one. The exit code is 1 if a check has failed."""

    # New directory for report.json, report.txt, and the runs of the checks.
    out: paths.NewDirectory = Path("gpu_check")


def main(options: Options) -> None:
    from smolvla_shared import gpu_checks  # what it imports takes seconds

    gpu_checks.check(options.out)


if __name__ == "__main__":
    run_command(main, Options)
