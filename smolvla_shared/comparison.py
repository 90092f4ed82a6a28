"""Success rates: Wilson's interval, McNemar's exact test, and the comparison of two results.json."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvla_shared import ranges
from smolvla_shared.refusals import decode_known, read_json, refuse_differences

# Of an environment, what a results.json leaves out where it is the default.
DEFAULTS = {"camera": "the default", "start_steps": 0}


@dataclass(frozen=True)
class Compared:
    """What a comparison reads of a results.json, beside its episodes."""

    environment: dict[str, Any]
    max_steps: ranges.Count
    successes: ranges.CountOrNone
    episodes: ranges.Count


@dataclass(frozen=True)
class Environment:
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """What a comparison reads of an episode."""

    task: str
    seed: ranges.Seed
    start: str
    success: bool


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (JASA 1927); z = 1.96 gives 95%.

    Unlike the normal approximation it holds near 0 and 1 and for few trials.
    """
    rate = successes / trials
    center = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test: p of so uneven a split of the pairs in which just one of two succeeded."""
    trials = only_first + only_second
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1)) / 2**trials
    return min(1.0, 2 * tail)


def read_results(path: Path, settings: dict[str, Any], seeds: range) -> dict[str, Any]:
    """The results.json at `path`. Raises ValueError if it cannot be compared with a rollout of these settings, seeds.

    settings: environment (type, tasks, image_size) and max_steps, as in a results.json
    """
    other = read_json(path)
    episodes = other.get("per_episode")
    if not isinstance(episodes, list) or not all(isinstance(of, dict) and "start" in of for of in episodes or [None]):
        raise ValueError(f"--compare {path} is no results.json of rollout.py with initial states: roll out again")
    for number, episode in enumerate(episodes):
        decode_known(Start, episode, f"--compare {path}, episode {number}")
    by_start(f"--compare {path}", other)
    compared = decode_known(Compared, other, f"--compare {path}")
    decode_known(Environment, compared.environment, f"--compare {path}, environment")

    def described(results: dict[str, Any]) -> dict[str, Any]:
        environment = DEFAULTS | results["environment"]
        tasks = ", ".join(sorted(environment["tasks"]))
        return environment | {"tasks": tasks, "max_steps": results["max_steps"]}

    ours, theirs = described(settings), described(other)
    refuse_differences(
        f"--compare {path}: success rates of different things",
        [(key.replace("_", " "), ours.get(key), theirs.get(key)) for key in ours | theirs],
        asked="this rollout",
        found="the other",
    )
    theirs = [episode["seed"] for episode in other["per_episode"]]
    if not set(seeds) & set(theirs):
        raise ValueError(
            f"--compare {path} has seeds {min(theirs)} to {max(theirs)}, this rollout {seeds[0]} to {seeds[-1]}: no "
            "episode would begin as another does, roll out with the same --seed"
        )
    return other


def by_start(name: str, results: dict[str, Any]) -> dict[tuple[str, str], bool]:
    """Success by task and initial state. Raises ValueError if two episodes of a task begin at the same state."""
    success = {(episode["task"], episode["start"]): episode["success"] for episode in results["per_episode"]}
    if len(success) < len(results["per_episode"]):
        raise ValueError(
            f"{name}: episodes of a task share an initial state, so that no two of them make one pair: "
            "compare with another rollout"
        )
    return success


def compare(first_name: str, first: dict[str, Any], second_name: str, second: dict[str, Any]) -> str:
    """McNemar's exact test on the initial states that two results have in common, in words.

    Raises ValueError if they have none in common.
    """
    ours, theirs = by_start(first_name, first), by_start(second_name, second)
    common = ours.keys() & theirs.keys()
    if not common:
        raise ValueError(
            f"no initial state is both in {first_name} and in {second_name}: equal seeds begin differently with other "
            "versions of the environment, see their results.json"
        )
    only_first = sum(ours[start] and not theirs[start] for start in common)
    only_second = sum(theirs[start] and not ours[start] for start in common)
    return (
        f"{first_name} {first['successes']} of {first['episodes']}, "
        f"{second_name} {second['successes']} of {second['episodes']}; of {len(common)} equal starts "
        f"{first_name} alone succeeded in {only_first}, {second_name} alone in {only_second}: "
        f"p = {mcnemar_exact(only_first, only_second):.2g} (exact McNemar)"
    )
