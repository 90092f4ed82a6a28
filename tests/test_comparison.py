"""comparison.py: intervals against published values, McNemar against closed forms, what is compared and what not."""

import json
from pathlib import Path

import pytest

from smolvla_shared.comparison import compare, mcnemar_exact, read_results, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3; and the two ends.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_is_twice_the_smaller_tail_of_a_fair_coin():
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(7, 7) == 1
    assert mcnemar_exact(0, 5) == mcnemar_exact(5, 0) == 2 / 2**5
    assert mcnemar_exact(1, 9) == 2 * (1 + 10) / 2**10
    assert mcnemar_exact(2, 8) == 2 * (1 + 10 + 45) / 2**10


def results(won: list[bool], first_seed: int = 0, **changes) -> dict:
    """A results.json of one task, whose episode of seed s begins at the state `s<s>`."""
    episodes = [
        {"task": "push-v3", "seed": seed, "start": f"s{seed}", "success": success}
        for seed, success in enumerate(won, first_seed)
    ]
    environment = {"type": "metaworld", "tasks": ["push-v3"], "image_size": 64}
    counts = {"successes": sum(won), "episodes": len(won)}
    return {"environment": environment, "max_steps": 100, **counts, "per_episode": episodes, **changes}


def test_two_policies_are_compared_on_equal_starts():
    first, second = (
        results([True] * 6 + [False] * 4),
        results([True] + [False] * 4 + [True] + [False] * 2, first_seed=2),
    )
    # Equal starts 2 to 9: A won 2 to 5, B won 2 and 7.
    assert compare("A", first, "B", second) == (
        "A 6 of 10, B 2 of 8; of 8 equal starts A alone succeeded in 3, B alone in 1: p = 0.62 (exact McNemar)"
    )


def test_results_without_a_common_start_or_with_one_start_twice_are_refused():
    first, second = results([True, False]), results([True, False])
    for episode in second["per_episode"]:
        episode["start"] += " of another version"
    with pytest.raises(ValueError, match="no initial state is both in A and in B"):
        compare("A", first, "B", second)
    second["per_episode"][0]["start"] = second["per_episode"][1]["start"]
    with pytest.raises(ValueError, match="B: episodes of a task share an initial state"):
        compare("A", first, "B", second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 200}, "max steps: this rollout 100, the other 200"),
        ({"tasks": ["push-v3", "reach-v3"]}, "tasks: this rollout push-v3, the other push-v3, reach-v3"),
        ({"type": "pusht"}, "type: this rollout metaworld, the other pusht"),
        ({"image_size": 96}, "image size: this rollout 64, the other 96"),
        ({"per_episode": [{"seed": 0, "success": True}]}, "no results.json of rollout.py with initial states"),
        ({"per_episode": {}}, "no results.json of rollout.py with initial states"),
        ({"per_episode": [{"task": "push-v3", "start": "s0", "success": True}]}, "episode 0 does .*\n  seed: missing"),
        (
            {"per_episode": [{"task": "p", "seed": 0, "start": "s0", "success": 1}]},
            "success: expected true or f",
        ),
        (
            {"per_episode": [{"task": "p", "seed": seed, "start": "s0", "success": True} for seed in (0, 1)]},
            "--compare .*results.json: episodes of a task share an initial state",
        ),
        ({"max_steps": "100"}, 'results.json does not hold .*\n  max_steps: expected a whole number, found "100"'),
        ({"episodes": 0}, "episodes: expected at least 1, got 0"),
        ({"environment": None}, "environment: expected an object, found null"),
        ({"tasks": "push-v3"}, 'environment does not hold .*\n  tasks: expected a list, found "push-v3"'),
    ],
)
def test_rollouts_of_different_things_are_refused(tmp_path: Path, change, message):
    other = results([True, False])
    (other if set(change) & set(other) else other["environment"]).update(change)
    (tmp_path / "results.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json", results([]), range(2))


@pytest.mark.parametrize(
    ("more", "default", "other"),
    [({"camera": "topview"}, "the default", "topview"), ({"start_steps": 5}, "0", "5")],
)
def test_a_default_differs_from_what_is_no_default_on_either_side(tmp_path: Path, more, default, other):
    """A results.json says camera and start_steps only where they are not the default."""
    plain, special = results([True, False]), results([True, False])
    special["environment"] |= more
    (option,) = more
    for name, content in (("plain", plain), ("special", special)):
        (tmp_path / name).write_text(json.dumps(content))
        assert read_results(tmp_path / name, content, range(2)) == content
    option = option.replace("_", " ")
    with pytest.raises(ValueError, match=f"{option}: this rollout {default}, the other {other}"):
        read_results(tmp_path / "special", plain, range(2))
    with pytest.raises(ValueError, match=f"{option}: this rollout {other}, the other {default}"):
        read_results(tmp_path / "plain", special, range(2))


def test_rollouts_of_other_seeds_are_refused(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(results([True, False])))
    assert read_results(tmp_path / "results.json", results([]), range(1, 5))["episodes"] == 2
    with pytest.raises(ValueError, match="has seeds 0 to 1, this rollout 2 to 4"):
        read_results(tmp_path / "results.json", results([]), range(2, 5))
