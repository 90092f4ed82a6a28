"""rollouts.py and rollout.py in real environments: episodes that depend on nothing but their seed, results that survive
a kill, LeRobot's own evaluation with the same outcome."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from forked import Forked, run_forked
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import eval_policy
from PIL import Image

from rollout import EnvironmentConfig, RolloutConfig, main, policy_configs
from smolvla_shared import rollout_results
from smolvla_shared.command import in_few_lines, is_mistake
from smolvla_shared.comparison import wilson_interval
from smolvla_shared.config import ModelConfig
from smolvla_shared.environments import make_environment, make_environments
from smolvla_shared.lerobot_files import load_config, load_saved, save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import Statistics
from smolvla_shared.rollout_results import contact_sheet, finish, on_sheet, open_directory, record
from smolvla_shared.rollouts import Episode, run_episodes
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config

TASK = "plate-slide-v3"


def write_policy(
    path: Path,
    cameras: tuple[str, ...] = ("observation.image",),
    optional_cameras: tuple[str, ...] = (),
    size: int = 64,
    action: Statistics | None = None,
) -> Path:
    """An untrained policy; its actions are noise around the mean of `action`. Default: of Meta-World, around 0."""
    action = action or Statistics((0.0,) * 4, (1.0,) * 4)
    dim = len(action.mean)
    core_config = make_core_config(ModelConfig(preset="tiny"), cameras, state_dim=dim, action_dim=dim, chunk_size=4)
    torch.manual_seed(0)
    save_policy(
        path,
        core_config,
        SmolVLASharedCore(core_config).state_dict(),
        load_trunk_tokenizer("tiny", None),
        {"state": Statistics((0.0,) * dim, (1.0,) * dim), "action": action},
        n_action_steps=4,
        source={},
        image_shapes={"observation.image": (3, size, size)},
        optional_cameras=optional_cameras,
    )
    return path


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "pretrained_model")


@pytest.fixture(scope="module")
def pusht_path(tmp_path_factory) -> Path:
    """A policy for PushT, whose environment needs no renderer and is fast."""
    action = Statistics((256.0,) * 2, (100.0,) * 2)
    return write_policy(tmp_path_factory.mktemp("pusht") / "pretrained_model", size=96, action=action)


def load(path: Path, **changes) -> tuple:
    """A policy with changes to its config, and its processors."""
    policy = HLRPSmolVLASharedPolicy.from_pretrained(path)
    policy.config = replace(policy.config, **changes)
    return policy, *make_pre_post_processors(policy.config, pretrained_path=str(path))


def run(policy_path: Path, num_envs: int, **options) -> list[tuple[Episode, list[np.ndarray]]]:
    environments = make_environments("metaworld", TASK, 64, 9, num_envs)
    arguments = (*load(policy_path), environments, TASK, "slide", range(7, 10))
    episodes = list(run_episodes(*arguments, max_steps=9, **options))
    environments.close()
    return episodes


def test_episodes_do_not_depend_on_the_number_of_environments(policy_path):
    one, two = run(policy_path, num_envs=1), run(policy_path, num_envs=2)
    assert [episode.seed for episode, _ in one] == [7, 8, 9]
    for (a, a_frames), (b, b_frames) in zip(one, two, strict=True):
        assert (a.seed, a.start, a.success, a.steps) == (b.seed, b.start, b.success, b.steps)
        # Batches of one and of two take different paths through the matrix library.
        assert a.sum_reward == pytest.approx(b.sum_reward, rel=1e-3)
        assert len(a_frames) == len(b_frames) == 10  # the start, and what each of 9 actions led to
        np.testing.assert_array_equal(a_frames[0], b_frames[0])  # the same object positions, rendered the same
        assert min(a.policy_s, a.environment_s, b.policy_s, b.environment_s) > 0
    assert len({episode.start for episode, _ in one}) == 3  # seeds do matter
    assert len({round(episode.sum_reward, 6) for episode, _ in one}) == 3


def test_a_policy_is_compiled_where_that_is_asked_for(policy_path):
    saved = load_config(policy_path)
    for asked in (False, True):
        [config] = policy_configs(RolloutConfig(policy_path=policy_path, compile=asked), saved).values()
        assert (config.compile_model, config.compile_mode) == (asked, saved.compile_mode)
    assert not saved.compile_model


def test_a_rollout_has_the_camera_and_starts_that_were_asked_for(policy_path, tmp_path, monkeypatch):
    shown = []

    def make(*arguments):
        vector = make_environments(*arguments)
        shown.append(vector.envs[0].unwrapped.camera_name)
        return vector

    monkeypatch.setattr("smolvla_shared.environments.make_environments", make)
    settings = []
    for cameras, steps in (((), 0), (("corner2",), 0), (("topview",), 0), (("topview",), 5)):
        config = RolloutConfig(
            policy_path=policy_path,
            out=tmp_path / "_".join(("out", *cameras, f"{steps}")),
            env=EnvironmentConfig(task=(TASK,), camera=cameras, start_steps=steps),
            episodes=1,
            num_envs=1,
            max_steps=2,
        )
        main(config)
        settings.append(json.loads((config.out / "results.json").read_text())["environment"])
    assert shown == ["corner2", "corner2", "topview", "topview"]
    assert settings[0] == settings[1] != settings[2] == settings[0] | {"camera": "topview"}
    assert settings[3] == settings[2] | {"start_steps": 5}


def test_a_camera_under_another_name_is_refused(policy_path):
    with pytest.raises(ValueError, match=r"observation\.image.*shows \['observation\.top'\].*--rename"):
        run(policy_path, num_envs=1, rename={"observation.image": "observation.top"})


def test_a_key_to_rename_that_the_environment_does_not_have_is_refused(policy_path):
    said = (
        r"--rename observation\.images: not of the environment, which has observation\.image, observation\.state, task"
    )
    with pytest.raises(ValueError, match=said):
        run(policy_path, num_envs=1, rename={"observation.images": "observation.image"})


def test_an_environment_may_lack_an_optional_camera(tmp_path):
    cameras = ("observation.images.wrist", "observation.image")
    episodes = run(write_policy(tmp_path / "optional", cameras, cameras[:1]), num_envs=1)
    assert [episode.steps for episode, _ in episodes] == [9, 9, 9]
    with pytest.raises(ValueError, match=r"trained on cameras .*wrist.*shows \['observation\.image'\]"):
        run(write_policy(tmp_path / "needed", cameras), num_envs=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 2])
def test_lerobots_evaluation_has_the_same_episodes(num_envs, tmp_path):
    """Success, length and return of lerobot_eval.eval_policy in metaworld_plain, as a second task of one policy."""
    drifts = Statistics((0.0, 1.0, 0.0, 0.0), (0.5, 0.5, 0.5, 1.0))  # forward, where some of the goals are
    path = write_policy(tmp_path / "pretrained_model", action=drifts)
    policy, *processors = load(path)
    environments = make_environments("metaworld", "reach-v3", 64, 32, num_envs=1)
    text = environments.call("task_description")[0]
    arguments = policy, *processors, environments, "reach-v3", text, range(7, 10)
    ours = [episode for episode, _ in run_episodes(*arguments, max_steps=32)]
    environments.close()
    assert [episode.success for episode in ours] == [True, True, False]
    assert 32 > ours[1].steps > ours[0].steps

    policy, *processors = load(path, noise_seed=7)
    policy.select_action(processors[0]({"observation.image": torch.zeros(1, 3, 64, 64), **state(1)}))  # an earlier task
    config = EnvConfig.get_choice_class("metaworld_plain")(task="reach-v3", image_size=64, episode_length=32)
    environments = config.create_envs(num_envs)["reach-v3"][0]
    identity = PolicyProcessorPipeline(steps=[])
    theirs = eval_policy(
        environments, policy, identity, identity, *processors, n_episodes=3, start_seed=7, return_episode_data=True
    )
    environments.close()
    lengths = torch.bincount(theirs["episodes"]["episode_index"]) - 1  # it counts the last observation, too
    for episode, row, length in zip(ours, theirs["per_episode"], lengths[:3].tolist(), strict=True):
        assert (episode.seed, episode.success, episode.steps) == (row["seed"], row["success"], length)
        assert episode.sum_reward == pytest.approx(row["sum_reward"], rel=1e-6 if num_envs == 1 else 1e-3)


def state(batch_size: int) -> dict:
    return {"observation.state": torch.zeros(batch_size, 4), "task": ["slide"] * batch_size}


def test_seeded_noise_counts_episodes_since_eval(policy_path):
    """Three episodes in batches of one and of three; a new count after eval(); drawn noise without a seed."""

    def actions(policy, preprocess, batch_size: int) -> torch.Tensor:
        policy.reset()
        batch = preprocess({"observation.image": torch.zeros(batch_size, 3, 64, 64), **state(batch_size)})
        return torch.stack([policy.select_action(batch) for _ in range(5)], dim=1)  # [B, 5, A], of two chunks

    policy, preprocess, _ = load(policy_path, noise_seed=4)
    together = actions(policy, preprocess, 3)
    policy.eval()
    alone = torch.cat([actions(policy, preprocess, 1) for _ in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    assert not torch.allclose(actions(policy, preprocess, 1)[0], alone[0], atol=0.1)  # the fourth
    policy, preprocess, _ = load(policy_path)
    assert not torch.allclose(actions(policy, preprocess, 1), actions(policy.eval(), preprocess, 1), atol=0.1)


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_and_pictures(tmp_path):
    def frames(grey: int) -> list[np.ndarray]:
        return [np.full((64, 64, 3), grey, np.uint8)] * 12

    episodes = [
        (Episode("b", 5, "x", True, 12, 3.0, 0.5, 1.0), frames(80)),
        (Episode("b", 6, "y", False, 12, 0.5), frames(160)),
        (Episode("a", 5, "z", False, 12, 0.5), frames(160)),
    ]
    recorded = open_directory(tmp_path / "out", {"seed": 5})
    record(tmp_path / "out", recorded, iter(episodes), fps=20, videos="failures")
    finish(tmp_path / "out", recorded, {"environment": {"tasks": ["b", "a"]}})
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["success_rate"] == 1 / 3
    assert results["wilson_95"] == pytest.approx(wilson_interval(1, 3))
    assert {task: row["successes"] for task, row in results["by_task"].items()} == {"b": 1, "a": 0}
    assert results["per_episode"] == [asdict(episode) for episode, _ in episodes]
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    assert [tuple(row) for row in sheet[[30, -1], -1]] == [rollout_results.SUCCESS_COLOR, rollout_results.FAILURE_COLOR]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == [
        "a_00005_failure.mp4",
        "b_00006_failure.mp4",
    ]
    table = rollout_results.results_table(results).splitlines()
    assert [line.split("  ")[0] for line in table] == ["task", "b", "a", "all 2 tasks"]
    assert table[-1].split()[3:10] == ["1", "of", "3", "33%", "6%", "to", "79%"]


def test_a_contact_sheet_of_many_episodes_shows_both_outcomes_of_every_task(tmp_path):
    outcomes = {"a": [False] * 45 + [True] * 5, "b": [True] * 50}
    episodes = [
        Episode(task, seed, f"{seed}", success) for task in outcomes for seed, success in enumerate(outcomes[task])
    ]
    recorded = open_directory(tmp_path / "out", {})
    record(tmp_path / "out", recorded, ((e, [np.zeros((8, 8, 3), np.uint8)]) for e in episodes), 20, "none")
    shown = on_sheet(episodes)
    counts = {(task, success): 0 for task in "ab" for success in (True, False)}
    for episode in shown:
        counts[episode.task, episode.success] += 1
    assert counts == {("a", False): 10, ("a", True): 5, ("b", True): 9, ("b", False): 0}
    assert contact_sheet(tmp_path / "out", episodes).height == 24 + 24 * 102


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("episodes.jsonl", '"seed": 6', '"seed": 5', r"episodes.jsonl, line 2 is of a, seed 5, twice: take the"),
        ("episodes.jsonl", '"seed": 6', '"seed": 4', "line 2 is of a, seed 4, but the tasks are a, b, from seed 5 on"),
        ("episodes.jsonl", '"task": "b"', '"task": "c"', "line 3 is of c, seed 5, but the tasks are a, b"),
        ("episodes.jsonl", '"seed": 6', '"seed": 6, "seed": 7', r'line 2 is not JSON \(an object has the key "seed"'),
        ("episodes.jsonl", '{"task": "b"', '"task": "b"', "line 3 is not JSON"),
        ("episodes.jsonl", '"success": true', '"success": 1', "line 2 does not hold .*\n.*success: expected tr"),
        ("episodes.jsonl", '"steps": 7', '"steps": -7', "line 3 does not hold .*\n.*steps: expected at least 0, got"),
        ("episodes.jsonl", '"sum_reward": 0.5', '"sum_reward": NaN', "sum_reward: expected a number, found nan"),
        ("settings.json", "}", "", "settings.json is not JSON"),
        ("settings.json", '"seed": 5', '"seed": 5, "seed": 5', 'an object has the key "seed" twice'),
        ("settings.json", '"seed": 5', '"seed": 6', "seed: command line 5, there 6"),
        ("strips/a_00006_success.png", "IDAT", "IDAX", "a_00006_success.png: .*take the line of a, seed 6, out"),
        ("strips/b_00005_failure.png", "PNG", "", "b_00005_failure.png: .*take the line of b, seed 5, out of epi"),
    ],
)  # fmt: skip
def test_what_was_changed_in_a_rollout_is_refused_when_it_is_resumed(name, old, new, said, tmp_path):
    settings = {"environment": {"tasks": ["a", "b"]}, "seed": 5}
    directory, frames = tmp_path / "out", [np.zeros((8, 8, 3), np.uint8)]
    episodes = [Episode("a", 5, "x"), Episode("a", 6, "y", True, 3), Episode("b", 5, "x", False, 7, 0.5)]
    recorded = open_directory(directory, settings)
    record(directory, recorded, ((episode, frames) for episode in episodes), 20, "none")
    path = directory / name
    content = path.read_bytes()
    path.write_bytes(content.replace(old.encode(), new.encode()))
    before = {other: other.read_bytes() for other in directory.rglob("*") if other.is_file()}
    with pytest.raises(ValueError, match=said) as refused:
        open_directory(directory, settings)
    assert is_mistake(refused.value) and len(in_few_lines(refused.value).splitlines()) <= 4
    assert {other: other.read_bytes() for other in directory.rglob("*") if other.is_file()} == before
    path.write_bytes(content)
    (directory / "results.json").write_text("is written again, not read")
    assert open_directory(directory, settings) == episodes


def test_a_missing_file_of_a_resumed_rollout_is_refused(tmp_path):
    directory = tmp_path / "out"
    record(
        directory, open_directory(directory, {}), [(Episode("a", 0, "x"), [np.zeros((8, 8, 3), np.uint8)])], 1, "none"
    )
    for name in ("strips/a_00000_failure.png", "episodes.jsonl", "settings.json"):
        (directory / name).unlink()
        with pytest.raises(ValueError, match=Path(name).name):
            open_directory(directory, {})


@pytest.mark.parametrize("line", [3, 50])
def test_a_line_that_is_taken_out_is_repaired_by_running_its_episode_again(line, tmp_path):
    """As the refusal says, of many episodes, of which the sheet shows some: whichever of two lines is taken out."""
    settings = {"environment": {"tasks": ["a"]}, "seed": 0}
    directory, frames = tmp_path / "out", [np.zeros((8, 8, 3), np.uint8)]
    episodes = [Episode("a", seed, f"{seed}", seed % 2 == 0) for seed in range(50)]
    record(directory, open_directory(directory, settings), ((e, frames) for e in episodes), 20, "none")
    lines = (directory / "episodes.jsonl").read_text().splitlines(keepends=True)
    lines.append(lines[3])
    (directory / "episodes.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="line 51 is of a, seed 3, twice: take the line out"):
        open_directory(directory, settings)
    (directory / "episodes.jsonl").write_text("".join(lines[:line] + lines[line + 1 :]))
    assert finish(directory, open_directory(directory, settings), settings)["episodes"] == 50
    whole = (directory / "contact_sheet.png").read_bytes()

    (directory / "episodes.jsonl").write_text("".join(lines[:3] + lines[4:50]))  # neither of the two
    recorded = open_directory(directory, settings)
    record(directory, recorded, [(episodes[3], frames)], 20, "none")
    assert open_directory(directory, settings) == recorded == [*episodes[:3], *episodes[4:], episodes[3]]
    assert finish(directory, recorded, settings)["per_episode"] == [asdict(episode) for episode in episodes]
    assert (directory / "contact_sheet.png").read_bytes() == whole


def test_a_directory_without_an_episode_is_not_left_behind(tmp_path):
    new, sweep = tmp_path / "new", tmp_path / "sweep"
    for name in (".", "flow_steps=1"):
        with pytest.raises(KeyboardInterrupt), rollout_results.removed_if_empty(new):
            open_directory(new / name, {})
            raise KeyboardInterrupt
        assert not new.exists()
    episodes = [(Episode("a", 0, "x"), [np.zeros((8, 8, 3), np.uint8)])]
    with pytest.raises(RuntimeError), rollout_results.removed_if_empty(sweep):
        record(sweep / "1", open_directory(sweep / "1", {}), episodes, 1, "none")
        open_directory(sweep / "2", {})
        raise RuntimeError
    assert len(open_directory(sweep / "1", {})) == 1
    with pytest.raises(RuntimeError), rollout_results.removed_if_empty(tmp_path / "other"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / ".lock").touch()  # of another process that has begun meanwhile
        raise RuntimeError
    assert (tmp_path / "other").exists()
    open_directory(new, {})
    with pytest.raises(RuntimeError), rollout_results.removed_if_empty(new):  # not made here
        raise RuntimeError
    assert new.exists()


class Crashing(gymnasium.Wrapper):
    """PushT, which raises, or whose process dies, in the episode of seed 3."""

    def __init__(self, how: str):
        super().__init__(make_environment("pusht", "PushT-v0", 96, 9))
        self.how = how

    def reset(self, **options):
        self.seed = options["seed"]
        return super().reset(**options)

    def step(self, action):
        if self.seed == 3 and self.how == "dies":
            os._exit(1)
        if self.seed == 3:
            raise RuntimeError("the simulator is broken")
        return super().step(action)


@pytest.mark.parametrize(("how", "num_envs"), [("raises", 1), ("raises", 2), ("dies", 2)])
def test_a_crash_in_an_environment_stops_the_run_and_is_no_failure(how, num_envs, pusht_path, tmp_path):
    factories = [lambda: Crashing(how)] * num_envs
    if num_envs == 1:
        environments = gymnasium.vector.SyncVectorEnv(factories)
    else:
        environments = gymnasium.vector.AsyncVectorEnv(factories, context="fork")
    episodes = run_episodes(*load(pusht_path), environments, "PushT-v0", "", range(6), max_steps=9)
    recorded = open_directory(tmp_path / "out", {})
    with pytest.raises((RuntimeError, EOFError, ConnectionError)):
        record(tmp_path / "out", recorded, episodes, fps=10, videos="none")
    there = [episode.seed for episode in open_directory(tmp_path / "out", {})]
    assert there == ([0, 1, 2] if num_envs == 1 else [0, 1])
    assert not (tmp_path / "out" / "results.json").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def pusht_command(policy: Path, out: Path, *options) -> list:
    command = ["rollout.py", "--policy-path", policy, "--env.type", "pusht", "--num-envs", "1", "--max-steps", "12"]
    return [*command, "--out", out, *options]


def strips(directory: Path) -> dict[str, bytes]:
    """What the camera saw of each episode, in the contact sheet: PushT has no return before something is pushed."""
    return {path.name: path.read_bytes() for path in (directory / "strips").iterdir()}


def outcomes(directory: Path) -> list[dict]:
    """The episodes of results.json without what the machine's load changes."""
    episodes = json.loads((directory / "results.json").read_text())["per_episode"]
    return [{k: v for k, v in episode.items() if k not in ("policy_s", "environment_s")} for episode in episodes]


def test_a_refused_rollout_leaves_nothing_behind_and_no_episode_is_counted_that_was_not_asked_for(pusht_path, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(pusht_path, damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-100])
    env, out = EnvironmentConfig(type="pusht"), tmp_path / "out"
    config = RolloutConfig(policy_path=pusht_path, out=out, env=env, episodes=2, num_envs=1, max_steps=2)
    wrong = [
        replace(config, policy_path=damaged),
        replace(config, rename={"observation.image": "observation.top"}),
        replace(config, rename={"observation.top": "observation.image"}, sweep="flow_steps=1,2"),
    ]
    for of_wrong, said in zip(
        wrong, ("model.safetensors", "the policy was trained on", "--rename observation.top: not")
    ):
        with pytest.raises(ValueError, match=said):
            main(of_wrong)
        assert not out.exists()
    main(config)
    with pytest.raises(ValueError, match=rf"--episodes 1: {out} has .* seed 1, .*: pass --episodes 2 or more"):
        main(replace(config, episodes=1, resume=True))
    main(replace(config, episodes=3, resume=True))
    assert [episode["seed"] for episode in outcomes(out)] == [0, 1, 2]


@pytest.mark.slow
def test_a_killed_rollout_goes_on_where_it_was(server, pusht_path, tmp_path):
    """No episode twice, none lost, and equal to a rollout that never stopped; other settings are refused."""
    printed, log = tmp_path / "printed.txt", tmp_path / "killed" / "episodes.jsonl"
    command = pusht_command(pusht_path, tmp_path / "killed", "--episodes", "8")
    process = Forked(server, command, printed)
    process.wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2)
    process.kill()
    process.wait()
    there = log.read_bytes().count(b"\n")
    assert 2 <= there < 8 and not (tmp_path / "killed" / "results.json").exists()
    with log.open("a") as file:
        file.write('{"task": "PushT-v0", "seed": ')  # as if it had been killed while it wrote

    assert run_forked(server, command, printed)[0] == 2  # the directory is there
    code, message = run_forked(server, [*command, "--resume", "--n-action-steps", "2"], printed)
    assert code == 2 and "n_action_steps: command line 2, there 4" in message
    code, message = run_forked(server, [*command, "--resume"], printed)
    assert code == 0, message
    assert f"/{8 - there} " in message  # the progress bar counts what was missing
    code, message = run_forked(server, pusht_command(pusht_path, tmp_path / "whole", "--episodes", "8"), printed)
    assert code == 0, message
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    assert strips(tmp_path / "killed") == strips(tmp_path / "whole")
    assert [episode["seed"] for episode in outcomes(tmp_path / "killed")] == list(range(8))


@pytest.mark.slow
def test_a_sweep_is_compared_with_another_rollout(server, pusht_path, tmp_path):
    printed = tmp_path / "printed.txt"
    code, message = run_forked(server, pusht_command(pusht_path, tmp_path / "a", "--episodes", "3"), printed)
    assert code == 0, message
    options = ["--sweep", "flow_steps=1,3", "--compare", tmp_path / "a" / "results.json", "--seed", "1"]
    code, message = run_forked(server, pusht_command(pusht_path, tmp_path / "b", "--episodes", "3", *options), printed)
    assert code == 0, message
    for value in (1, 3):
        results = json.loads((tmp_path / "b" / f"flow_steps={value}" / "results.json").read_text())
        assert results["flow_steps"] == value
    assert message.count("of 2 equal starts") == 2
    assert (tmp_path / "b" / "sweep.png").is_file()
    assert strips(tmp_path / "b" / "flow_steps=1") != strips(tmp_path / "b" / "flow_steps=3")
    for wrong, said in {
        ("--sweep", "flow_steps=0,1"): "expected n_action_steps or flow_steps",
        ("--sweep", "n_action_steps=1,5"): "n_action_steps 5 must be between 1 and the chunk_size",
        ("--compare", tmp_path / "a" / "results.json", "--seed", "9"): "has seeds 0 to 2, this rollout 9 to 58",
        ("--resume",): "there is no rollout at",
    }.items():
        code, message = run_forked(server, pusht_command(pusht_path, tmp_path / "c", *wrong), printed)
        assert code == 2 and said in message, message
        assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_robot_of_several_is_named(server, pusht_path, tmp_path):
    """It acts as the policy of that robot does, whose directory that is."""
    several, printed = tmp_path / "pretrained_model", tmp_path / "printed.txt"
    saved = load_saved(str(pusht_path))
    save_policy(several, saved.config.core, saved.weights, saved.tokenizer, {}, 4, {}, robots=("pusht", "arm"))
    shutil.copytree(pusht_path, several / "robots" / "pusht")
    for options, said in {
        (): "which robot? This policy was trained on pusht, arm: pass --robot <name> to rollout.py",
        ("--robot", "hand"): "there is no robot hand in",
    }.items():
        code, message = run_forked(server, pusht_command(several, tmp_path / "none", *options), printed)
        assert code == 2 and said in message, message
    for path, out, options in ((several, "a", ["--robot", "pusht"]), (pusht_path, "b", [])):
        code, message = run_forked(server, pusht_command(path, tmp_path / out, "--episodes", "2", *options), printed)
        assert code == 0, message
    assert outcomes(tmp_path / "a") == outcomes(tmp_path / "b")


@pytest.mark.slow
def test_the_command(server, policy_path, tmp_path):
    command = ["rollout.py", "--policy-path", policy_path, "--env.task", TASK, "reach-v3", "--max-steps", "6"]
    command += [
        "--episodes",
        "2",
        "--num-envs",
        "2",
        "--n-action-steps",
        "2",
        "--videos",
        "all",
        "--out",
        tmp_path / "out",
    ]
    code, printed = run_forked(server, command, tmp_path / "printed.txt")
    assert code == 0, printed
    assert printed.splitlines()[-3].startswith(f"{TASK}  0 of 2   0%    0% to 66%")
    assert printed.splitlines()[-1].startswith("all 2 tasks     0 of 4   0%    0% to 49%")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n_action_steps"] == 2
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4


def test_a_directory_without_a_policy_is_refused(server, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code, printed = run_forked(server, ["rollout.py", "--policy-path", empty], tmp_path / "printed.txt")
    assert code == 2
    assert f"{empty} holds no policy: config.json is missing (found: [])" in printed
