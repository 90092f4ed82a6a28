"""The command that looks at datasets before anything trains on them: a report in words, a picture of each, a verdict.

    python -m smolvla_shared.data_check data/my_video somebody/demos

It decodes frames, which no script does before its first step. The exit code is 1 if something is wrong.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from smolvla_shared import paths, ranges
from smolvla_shared.command import parse, run_command
from smolvla_shared.config import CoreConfig


@dataclass(frozen=True)
class DataCheckConfig:
    """Look at datasets before training on them: everything that is wrong with them, and a picture of each. The exit
    code is 1 if something is wrong."""

    # Directories and hub ids of LeRobotDatasets (v3).
    datasets: tyro.conf.Positional[tuple[str, ...]]
    # Directory for report.txt and a picture of each dataset. Those of an earlier check are overwritten.
    out: paths.Directory = Path("data_check")
    # Episodes of each dataset of which frames are decoded: the first, the last, and some between; evenly among all.
    episodes: ranges.Count = 100
    # Decode every frame of every video or image column, too: it finds what is damaged in between.
    every_frame: bool = False
    # Hub id, directory or preset of the trunk whose tokenizer will read the tasks. It is only loaded for long ones.
    tokenizer: paths.Trunk = "smolvlm2-500m"
    # So many tokens of a task are read.
    max_text_tokens: ranges.Few = CoreConfig.max_text_tokens

    def __post_init__(self):
        if not self.datasets:
            raise ValueError("no dataset given: pass directories or hub ids of LeRobotDatasets")
        ranges.check(self, "--")
        ranges.refuse_twice("the command line", self.datasets)
        for name in self.datasets:
            if not Path(name).is_dir() and not ("/" in name and paths.HUB_ID.fullmatch(name)):
                raise ValueError(f"there is no directory {name}: pass a LeRobotDataset's directory or its hub id")
            if Path(name).is_dir():
                paths.check_dataset(Path(name))


def main(arguments: list[str] | None = None) -> int:
    config = parse(DataCheckConfig, prog="python -m smolvla_shared.data_check", args=arguments)

    from smolvla_shared import data_report  # what it imports takes seconds

    return data_report.check(config)


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
