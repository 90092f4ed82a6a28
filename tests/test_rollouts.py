"""rollouts.py: intervals against published values, rollouts in the real environment, results that do not depend on
how many environments run side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked
from lerobot.policies.factory import make_pre_post_processors
from PIL import Image

from smolvla_shared import rollouts
from smolvla_shared.config import ModelConfig
from smolvla_shared.lerobot_files import save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.preprocess import Statistics
from smolvla_shared.rollouts import Episode, wilson_interval
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config

TASK = "plate-slide-v3"


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


def write_policy(path: Path, cameras: tuple[str, ...], optional_cameras: tuple[str, ...] = ()) -> Path:
    """An untrained policy for 64-pixel pictures of Meta-World."""
    core_config = make_core_config(ModelConfig(preset="tiny"), cameras, state_dim=4, action_dim=4, chunk_size=4)
    torch.manual_seed(0)
    ones = Statistics((0.0,) * 4, (1.0,) * 4)
    save_policy(
        path,
        core_config,
        SmolVLASharedCore(core_config).state_dict(),
        load_trunk_tokenizer("tiny", None),
        {"state": ones, "action": ones},
        n_action_steps=4,
        source={},
        image_shapes={"observation.image": (3, 64, 64)},
        optional_cameras=optional_cameras,
    )
    return path


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "pretrained_model", ("observation.image",))


def run(policy_path: Path, num_envs: int, **options) -> list[tuple[Episode, list[np.ndarray]]]:
    policy = HLRPSmolVLASharedPolicy.from_pretrained(policy_path)
    processors = make_pre_post_processors(policy.config, pretrained_path=str(policy_path))
    environments = rollouts.make_environments("metaworld", TASK, 64, num_envs)
    episodes = list(
        rollouts.run_episodes(policy, *processors, environments, "slide", range(7, 10), max_steps=9, **options)
    )
    environments.close()
    return episodes


def test_episodes_do_not_depend_on_the_number_of_environments(policy_path):
    one, two = run(policy_path, num_envs=1), run(policy_path, num_envs=2)
    assert [episode.seed for episode, _ in one] == [7, 8, 9]
    for (a, a_frames), (b, b_frames) in zip(one, two, strict=True):
        assert (a.seed, a.success, a.steps) == (b.seed, b.success, b.steps)
        # Batches of one and of two take different paths through the matrix library.
        assert a.reward == pytest.approx(b.reward, rel=1e-3)
        assert len(a_frames) == len(b_frames) == 10  # the start, and what each of 9 actions led to
        np.testing.assert_array_equal(a_frames[0], b_frames[0])  # the same object positions, rendered the same
    assert len({round(episode.reward, 6) for episode, _ in one}) == 3  # seeds do matter


def test_a_camera_under_another_name_is_refused(policy_path):
    with pytest.raises(ValueError, match=r"observation\.image.*shows \['observation\.top'\].*--rename"):
        run(policy_path, num_envs=1, rename={"observation.image": "observation.top"})


def test_an_environment_may_lack_an_optional_camera(tmp_path):
    cameras = ("observation.images.wrist", "observation.image")
    episodes = run(write_policy(tmp_path / "optional", cameras, cameras[:1]), num_envs=1)
    assert [episode.steps for episode, _ in episodes] == [9, 9, 9]
    with pytest.raises(ValueError, match=r"trained on cameras .*wrist.*shows \['observation\.image'\]"):
        run(write_policy(tmp_path / "needed", cameras), num_envs=1)


def test_the_expert_succeeds_and_doing_nothing_fails():
    """The environment itself: seeds fix the object positions, success is reported, pictures have the size asked for."""
    env = rollouts.make_metaworld(TASK, 64)

    def episode(act) -> tuple[bool, np.ndarray]:
        observation, _ = env.reset(seed=3)
        first = observation["pixels"]
        for _ in range(100):
            _, _, terminated, _, info = env.step(act())
            if terminated:
                return info["is_success"], first
        return False, first

    def expert_action() -> np.ndarray:
        return np.clip(env.expert_policy.get_action(env._env.unwrapped._get_obs()), -1, 1).astype(np.float32)

    success, picture = episode(expert_action)
    nothing, same_picture = episode(lambda: np.zeros(4, np.float32))
    assert success
    assert not nothing
    assert picture.shape == (64, 64, 3)
    np.testing.assert_array_equal(picture, same_picture)
    env.close()


@pytest.mark.parametrize(
    ("env_type", "task", "seeds", "message"),
    [
        ("metaword", TASK, range(5), "metaworld"),
        ("metaworld", "slide-the-plate", range(5), "plate-slide-v3"),
        ("metaworld", TASK, range(999_999, 1_000_001), "the seeds of recordings"),
    ],
)
def test_unknown_environments_and_training_seeds_are_refused(env_type, task, seeds, message):
    with pytest.raises(ValueError, match=message):
        rollouts.check_environment(env_type, task, seeds)


def test_results_and_pictures(tmp_path):
    def frames(grey: int) -> list[np.ndarray]:
        return [np.full((64, 64, 3), grey, np.uint8)] * 12

    episodes = [(Episode(5, True, 12, 3.0), frames(80)), (Episode(6, False, 12, 0.5), frames(160))]
    rollouts.write_results(iter(episodes), tmp_path / "out", fps=20, with_videos=True, provenance={"seed": 5})
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["success_rate"] == 0.5
    assert results["wilson_95"] == pytest.approx(wilson_interval(1, 2))
    assert results["per_episode"][1] == {"seed": 6, "success": False, "steps": 12, "reward": 0.5}
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    assert tuple(sheet[1, -1]) == rollouts.SUCCESS_COLOR
    assert tuple(sheet[-1, -1]) == rollouts.FAILURE_COLOR
    videos = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert videos == ["episode_00005_success.mp4", "episode_00006_failure.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_environment_without_task_text(num_envs, tmp_path):
    """PushT: another state and action width, no task in words, rewards instead of an early end."""
    core_config = make_core_config(
        ModelConfig(preset="tiny"), ("observation.image",), state_dim=2, action_dim=2, chunk_size=4
    )
    torch.manual_seed(0)
    pixels = Statistics((256.0,) * 2, (100.0,) * 2)
    tokenizer, shapes = load_trunk_tokenizer("tiny", None), {"observation.image": (3, 96, 96)}
    statistics = {"state": pixels, "action": pixels}
    weights = SmolVLASharedCore(core_config).state_dict()
    save_policy(tmp_path, core_config, weights, tokenizer, statistics, n_action_steps=4, source={}, image_shapes=shapes)
    policy = HLRPSmolVLASharedPolicy.from_pretrained(tmp_path)
    processors = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path))
    environments = rollouts.make_environments("pusht", "", 96, num_envs)
    episodes = list(rollouts.run_episodes(policy, *processors, environments, "", range(2), max_steps=5))
    environments.close()
    assert [(episode.steps, episode.success) for episode, _ in episodes] == [(5, False)] * 2
    assert episodes[0][1][0].shape == (96, 96, 3)


@pytest.mark.slow
def test_the_command(server, policy_path, tmp_path):
    command = ["rollout.py", "--policy-path", policy_path, "--env.task", TASK, "--max-steps", "6", "--episodes", "2"]
    command += ["--num-envs", "2", "--n-action-steps", "2", "--videos", "--out", tmp_path / "out"]
    code, printed = run_forked(server, command, tmp_path / "printed.txt")
    assert code == 0, printed
    assert printed.splitlines()[-1].startswith(f"{TASK}: 0 of 2 episodes succeeded, 0% (95% interval 0% to 66%)")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n_action_steps"] == 2
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    code, printed = run_forked(server, command, tmp_path / "printed.txt")
    assert code == 1
    assert "exists: name another directory" in printed


def test_a_directory_without_a_policy_is_refused(server, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code, printed = run_forked(server, ["rollout.py", "--policy-path", empty], tmp_path / "printed.txt")
    assert code == 1
    assert f"{empty} holds no policy: config.json is missing (found: [])" in printed
