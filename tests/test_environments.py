"""environments.py: real environments, where their episodes begin, what is refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import env_to_policy_features, preprocess_observation

from smolvla_shared.environments import (
    check_simulator,
    compare_rates,
    make_environment,
    make_environments,
    make_metaworld,
    render_headless,
)
from smolvla_shared.rollout_options import CAMERAS, check_environment, check_seeds

TASK = "plate-slide-v3"
ROOT = Path(__file__).parent.parent


def test_the_expert_succeeds_and_doing_nothing_fails():
    """The environment itself: seeds fix the object positions, success is reported, pictures have the size asked for."""
    env = make_metaworld(TASK, 64)

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


def test_a_start_is_the_state_of_the_physics():
    """Equal for a seed whatever came before and however it is rendered; other for another place of the object."""

    def start(env, seed: int) -> str:
        return env.reset(seed=seed, options={"lerobot_new_rollout": True})[1]["start"]

    env = make_environment("metaworld", TASK, image_size=64, max_steps=10)
    first, second = start(env, 3), start(env, 4)
    for _ in range(3):
        env.step(np.full(4, 0.5, np.float32))
    assert start(env, 3) == first != second
    model = env.unwrapped._env.unwrapped.model
    reset = env.unwrapped.reset

    def moved(**options):
        outcome = reset(**options)
        model.body_pos[-1] += 0.001
        return outcome

    env.unwrapped.reset = moved
    assert start(env, 3) not in (first, second)
    env.close()
    env = make_environment("metaworld", TASK, image_size=32, max_steps=10)
    assert start(env, 3) == first
    env.close()


def test_a_simulation_that_mujoco_begins_anew_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it runs
    env = make_environment("metaworld", TASK, image_size=32, max_steps=10)
    env.reset(seed=0)
    env.step(np.zeros(4, np.float32))
    env.unwrapped._env.unwrapped.data.qvel[0] = np.nan
    with pytest.raises(RuntimeError, match="the simulation became unstable"):
        env.step(np.zeros(4, np.float32))
    env.close()


@pytest.mark.parametrize(
    ("env_type", "tasks", "max_steps", "cameras", "message"),
    [
        ("metaword", (TASK,), 9, (), "--env.type metaword is not one of metaworld, pusht, aloha"),
        (
            "metaworld",
            (TASK, "slide-the-plate"),
            9,
            (),
            "--env.task slide-the-plate: not of metaworld.*plate-slide",
        ),
        ("metaworld", (TASK, TASK), 9, (), "names a task twice"),
        ("metaworld", (TASK,), 501, (), "501 steps: Meta-World ends every episode after 500"),
        ("pusht", (TASK,), 9, (), "not of pusht, which has PushT-v0"),
        ("metaworld", (TASK,), 9, ("top",), "--env.camera top: Meta-World alone has a choice, of corner2.*topview"),
        ("pusht", ("PushT-v0",), 9, ("topview",), "--env.camera topview: Meta-World alone has a choice"),
        ("metaworld", (TASK,), 9, ("topview", "topview"), "--env.camera topview topview: .* each once"),
    ],
)
def test_unknown_environments_are_refused(env_type, tasks, max_steps, cameras, message):
    with pytest.raises(ValueError, match=message):
        check_environment(env_type, tasks, max_steps, cameras)
        check_simulator(env_type, tasks)


def test_starts_that_an_environment_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"--env\.start-steps 5: Meta-World alone has starts of its own"):
        check_environment("pusht", ("PushT-v0",), 9, start_steps=5)
    with pytest.raises(ValueError, match=r"--env\.start-steps -5 must be at least 0"):  # as LeRobot's commands pass it
        EnvConfig.get_choice_class("metaworld_plain")(image_size=32, start_steps=-5).create_envs(1)
    with pytest.raises(ValueError, match=r"490 steps after 20 of --env\.start-steps: Meta-World ends .* after 500"):
        check_environment("metaworld", (TASK,), 490, start_steps=20)


def test_a_camera_shows_what_mujoco_renders_from_it():
    for camera in ("topview", "gripperPOV"):
        env = make_metaworld(TASK, 64, (camera,))
        picture = env.reset(seed=3)[0]["pixels"].astype(np.float32)
        sim = env._env.unwrapped
        with mujoco.Renderer(sim.model, 64, 64) as renderer:
            errors = {}
            for other in CAMERAS:
                renderer.update_scene(sim.data, camera=other)
                errors[other] = np.abs(renderer.render() - picture).mean()
        assert min(errors, key=errors.get) == camera, errors
        assert errors[camera] < 3, errors  # of 255: the number of samples of a pixel differs
        env.close()


def test_the_rate_of_the_demonstrations_is_compared_with_the_environments():
    assert [compare_rates(*rates) for rates in (("metaworld", 80), ("pusht", 10), ("aloha", 50), ("pusht", 10.5))] == [
        ""
    ] * 4
    assert "trained on 30 actions a second, pusht takes 10: every motion is 0.333 times" in compare_rates("pusht", 30)
    assert "does not record the rate" in compare_rates("pusht", None)


def test_seeds_of_recordings_are_refused():
    check_seeds(range(999_998, 1_000_000))
    with pytest.raises(ValueError, match="the seeds of recordings"):
        check_seeds(range(999_999, 1_000_001))


def test_a_renderer_that_mujoco_has_not_is_refused(monkeypatch):
    for name in ("wumba", "disable", "EGL"):
        monkeypatch.setenv("MUJOCO_GL", name)
        with pytest.raises(ValueError, match=rf"MUJOCO_GL is '{name}' in the environment: unset it, or set it to"):
            check_simulator("metaworld", (TASK,))
    check_simulator("pusht", ("PushT-v0",))


# A process that finds no library of this name.
WITHOUT = """
import ctypes, ctypes.util, sys
name, find, load = sys.argv[1], ctypes.util.find_library, ctypes.CDLL.__init__

def init(self, file, *more, **options):
    if name.lower() in str(file).lower():
        raise OSError(f"{file}: cannot open shared object file")
    load(self, file, *more, **options)

ctypes.CDLL.__init__, ctypes.util.find_library = init, lambda other: None if other == name else find(other)
from smolvla_shared.environments import check_simulator
try:
    check_simulator("metaworld", ("reach-v3",))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "library", "fix"), [("osmesa", "OSMesa", "libosmesa6"), ("egl", "EGL", "libegl1"), ("egl", "nothing", "")]
)
def test_a_renderer_without_its_library_is_refused(name, library, fix):
    environment = os.environ | {"MUJOCO_GL": name, "PYTHONPATH": str(ROOT)}
    environment.pop("PYOPENGL_PLATFORM", None)  # which MuJoCo sets for its children, too
    done = subprocess.run([sys.executable, "-c", WITHOUT, library], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = f"MUJOCO_GL={name} cannot draw, a library is missing ("
    assert (done.stdout.startswith(said) and fix in done.stdout) if fix else done.stdout == ""


@pytest.mark.skipif(find_spec("gym_aloha") is not None, reason="gym-aloha is installed")
def test_an_environment_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match=r"module gym_aloha, which is not installed: pip install gym-aloha==0\.1\.5"):
        check_environment("aloha", ("AlohaInsertion-v0",), 9)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gym_aloha") is None, reason="needs gym-aloha, which requirements.txt leaves out")
def test_aloha():
    render_headless()
    environments = make_environments("aloha", "AlohaInsertion-v0", 64, 2, num_envs=1)
    starts = [environments.reset(seed=[seed])[1]["start"][0] for seed in (1, 2, 1)]
    observation, _, _, _, info = environments.step(np.zeros((1, 14), np.float32))
    assert starts[0] == starts[2] != starts[1]
    assert observation["pixels"]["top"].shape == (1, 480, 640, 3)
    assert not info["is_success"][0]
    environments.close()


def test_a_random_start_is_that_of_its_seed_and_moves_the_arm():
    """The arm is where the same motion takes it from rest, the object where it is without one."""
    rest, moved = make_metaworld(TASK, 32), make_metaworld(TASK, 32, start_steps=20)
    for seed, steps in ((5, 20), (10, 17)):
        found = [moved.reset(seed=seed)[0] for _ in range(2)]
        assert np.array_equal(found[0]["agent_pos"], found[1]["agent_pos"])
        at_rest, _ = rest.reset(seed=seed)
        rng = np.random.default_rng(seed)
        motion = rng.uniform(-1, 1, 4).astype(np.float32)
        assert rng.integers(21) == steps
        for _ in range(steps):
            expected, *_ = rest.step(motion)
        np.testing.assert_allclose(found[0]["agent_pos"], expected["agent_pos"], atol=1e-6)
        assert np.linalg.norm(found[0]["agent_pos"][:3] - at_rest["agent_pos"][:3]) > 0.02  # metres
        goals = [env.unwrapped._env.unwrapped._target_pos for env in (rest, moved)]
        np.testing.assert_allclose(*goals)
    rest.close()
    moved.close()


def test_several_cameras_show_what_each_shows_alone():
    cameras, pictures = ("topview", "corner2", "gripperPOV"), {}
    for chosen in (cameras, *[(camera,) for camera in cameras]):  # one after the other: they share a context
        env = make_metaworld(TASK, 32, chosen)
        env.reset(seed=3)
        shown = [env.step(np.full(4, 0.5, np.float32))[0]["pixels"] for _ in range(3)]
        pictures |= {chosen: shown}
        if len(chosen) > 1:
            assert env.observation_space["pixels"].contains(shown[0])
        env.close()
    for camera in cameras:
        for both, alone in zip(pictures[cameras], pictures[camera,], strict=True):
            assert np.array_equal(both[camera], alone), camera
    assert not np.array_equal(pictures["topview",][0], pictures["corner2",][0])


def test_lerobots_commands_show_several_cameras():
    images = {"observation.images.topview", "observation.images.corner2"}
    config = EnvConfig.get_choice_class("metaworld_plain")(image_size=32, camera="topview,corner2")
    [[environments]] = [of.values() for of in config.create_envs(1).values()]
    observation, _ = environments.reset(seed=[0])
    environments.close()
    assert set(env_to_policy_features(config)) == {"action", "observation.state", *images}
    assert set(preprocess_observation(observation)) == {"observation.state", *images}


def test_lerobots_commands_choose_the_camera():
    config = EnvConfig.get_choice_class("metaworld_plain")
    for camera, expected in ((None, "corner2"), ("topview", "topview")):
        [[environments]] = [of.values() for of in config(image_size=32, camera=camera).create_envs(1).values()]
        assert environments.envs[0].unwrapped.camera_name == expected
        environments.close()
    with pytest.raises(ValueError, match=r"--env\.camera top: Meta-World alone has a choice"):
        config(image_size=32, camera="top").create_envs(1)


def test_lerobots_commands_must_name_the_image_size_and_known_tasks():
    config = EnvConfig.get_choice_class("metaworld_plain")
    with pytest.raises(ValueError, match=r"--env\.image_size is missing"):
        config().create_envs(1)
    with pytest.raises(ValueError, match=r"--env\.task sweep-v4: not of metaworld"):
        config(image_size=64, task="reach-v3,sweep-v4").create_envs(1)
