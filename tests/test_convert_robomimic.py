"""examples/convert_robomimic.py: every picture, state and action of HDF5 files that the test writes, at its row."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from forked import run_forked
from helpers import bars, names_in, read_bars
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_shared import data
from smolvla_shared.config import DataConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from convert_robomimic import ConvertConfig, main

LENGTHS = {"demo_10": 9, "demo_0": 12, "demo_2": 7}  # in the order in which they are written
ROBOMIMIC = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
LIBERO = {"ee_states": 6, "gripper_states": 2}
WORDS = {"language_instruction": "open the drawer"}


def write(
    path: Path,
    cameras: dict[str, tuple[int, int]],
    state: dict[str, int],
    attributes: dict,
    stored: Callable[[np.ndarray], np.ndarray] = lambda pictures: pictures,
    demo_attributes: dict | None = None,
    control_freq: float | None = 20,
    lengths: dict[str, int] = LENGTHS,
) -> dict[str, dict[str, np.ndarray]]:
    """A file in robomimic's form; returns what is in it. Pictures tell 20 times the number of their demonstration, in
    natural order, plus their row; those of a second camera tell 100 more.
    """
    rng, written = np.random.default_rng(len(path.name)), {}
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        kwargs = {} if control_freq is None else {"control_freq": control_freq}
        group.attrs["env_args"] = json.dumps({"env_name": "Test", "env_kwargs": kwargs})
        for name, value in attributes.items():
            group.attrs[name] = value
        file.create_dataset("mask/train", data=np.array([b"demo_0"]))
        for name, length in lengths.items():
            demo = group.create_group(name)
            number = sorted(lengths, key=lambda key: int(key.split("_")[1])).index(name)
            values = {key: rng.normal(size=(length, width)) for key, width in state.items()}
            values |= {"actions": rng.normal(size=(length, 7)), "object": rng.normal(size=(length, 14))}
            for place, (camera, (height, width)) in enumerate(cameras.items()):
                numbers = 20 * number + 100 * place + np.arange(length)
                pictures = np.stack([stored(bars(number, width, height)) for number in numbers])
                demo.create_dataset(f"obs/{camera}", data=pictures, compression="gzip")
            for key, value in values.items():
                demo.create_dataset(key if key == "actions" else f"obs/{key}", data=value)
            demo.create_dataset("next_obs/agentview_image", data=np.zeros((length, 8, 8, 3), np.uint8))
            for key, value in (demo_attributes or {}).items():
                demo.attrs[key] = value
            written[name] = values
    return written


def rows_of(root: Path) -> list[dict[str, np.ndarray]]:
    """Every row as LeRobot reads it, with pictures [h, w, 3] uint8."""
    dataset = LeRobotDataset(root.name, root=root)
    rows = [dataset[index] for index in range(len(dataset))]
    for row in rows:
        for key in dataset.meta.video_keys:
            row[key] = (row[key].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return rows


def test_every_picture_state_and_action_of_a_robomimic_file(tmp_path):
    cameras = {"agentview_image": (84, 84), "robot0_eye_in_hand_image": (48, 64)}
    written = write(tmp_path / "image.hdf5", cameras, ROBOMIMIC, {})
    main(ConvertConfig((tmp_path / "image.hdf5",), tmp_path / "out", task="lift the cube"))
    rows = iter(rows_of(tmp_path / "out"))
    for number, name in enumerate(("demo_0", "demo_2", "demo_10")):
        for row in range(LENGTHS[name]):
            found, values = next(rows), written[name]
            assert read_bars(found["observation.images.agentview"]) == 20 * number + row
            assert read_bars(found["observation.images.robot0_eye_in_hand"]) == 20 * number + 100 + row
            state = np.concatenate([values[key][row] for key in ROBOMIMIC]).astype(np.float32)
            assert np.array_equal(found["observation.state"], state)
            assert np.array_equal(found["action"], values["actions"][row].astype(np.float32))
            assert (found["episode_index"], found["frame_index"]) == (number, row)
            assert found["timestamp"] == pytest.approx(row / 20)
            assert found["task"] == "lift the cube"
    assert next(rows, None) is None
    assert names_in(tmp_path) == ["image.hdf5", "out"]  # no temporary directory is left
    (dataset,) = data.open_datasets(DataConfig(roots=(tmp_path / "out",)))  # training reads it
    assert dataset.fps == 20 and dataset.features["action"]["shape"] == (7,)


@pytest.mark.parametrize("images", [None, "stored", "rotated"])
def test_a_libero_file_is_upright_and_an_action_follows_its_observation(tmp_path, images):
    """LIBERO's script stores what OpenGL renders, from the bottom row up, and observes after each action."""
    turns = {None: lambda p: p[::-1], "stored": lambda p: p, "rotated": lambda p: p[::-1, ::-1]}
    attributes = {"macros_image_convention": "opengl", "problem_info": json.dumps(WORDS)}
    (tmp_path / "files").mkdir()
    for name in ("a.hdf5", "b.hdf5"):
        attributes["problem_info"] = json.dumps({"language_instruction": f"open drawer {name[0]}"})
        written = write(tmp_path / "files" / name, {"agentview_rgb": (64, 64)}, LIBERO, attributes, turns[images])
    main(ConvertConfig((tmp_path / "files",), tmp_path / "out", images=images))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 2 * sum(length - 1 for length in LENGTHS.values())
    assert [row["task"] for row in rows] == ["open drawer a"] * (len(rows) // 2) + ["open drawer b"] * (len(rows) // 2)
    rows = iter(rows[len(rows) // 2 :])
    for number, name in enumerate(("demo_0", "demo_2", "demo_10")):
        for row in range(LENGTHS[name] - 1):
            found, values = next(rows), written[name]
            assert read_bars(found["observation.images.agentview"]) == 20 * number + row
            state = np.concatenate([values[key][row] for key in LIBERO]).astype(np.float32)
            assert np.array_equal(found["observation.state"], state)
            assert np.array_equal(found["action"], values["actions"][row + 1].astype(np.float32))


def test_what_a_file_says_gives_way_to_what_is_stated(tmp_path):
    """A LIBERO file that was made anew: upright, observed before each action; RoboCasa's text; chosen columns."""
    cameras = {"agentview_rgb": (64, 64), "eye_in_hand_rgb": (64, 64)}
    attributes = {"macros_image_convention": "opengl", "problem_info": json.dumps(WORDS)}
    own = {"ep_meta": json.dumps({"lang": "close the door"})}
    path, lengths = tmp_path / "a.h5", {"demo_1": 5}
    written = write(path, cameras, LIBERO, attributes, demo_attributes=own, control_freq=None, lengths=lengths)
    options = {"images": "stored", "observed": "before", "cameras": ("eye_in_hand_rgb",), "state": ("object",)}
    main(ConvertConfig((tmp_path,), tmp_path / "out", fps=10, **options))
    rows = rows_of(tmp_path / "out")
    assert [read_bars(row["observation.images.eye_in_hand"]) for row in rows] == [100, 101, 102, 103, 104]
    assert np.array_equal([row["observation.state"] for row in rows], written["demo_1"]["object"].astype(np.float32))
    assert np.array_equal([row["action"] for row in rows], written["demo_1"]["actions"].astype(np.float32))
    assert {row["task"] for row in rows} == {"close the door"} and rows[1]["timestamp"] == pytest.approx(0.1)
    assert "observation.images.agentview" not in rows[0]


CAMERAS = {"agentview_image": (16, 24)}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"cameras": {}}, {}, r"demo_0 has no images, .*dataset_states_to_obs"),
        ({"attributes": {}}, {}, r"demo_0 has no task text: pass --task"),
        ({"control_freq": None}, {}, r"does not tell its control_freq: pass --fps"),
        ({"control_freq": 12.5}, {}, r"control_freq 12\.5, a dataset's rate must be a whole number"),
        ({}, {"fps": 10}, r"--fps 10, but .*control_freq 20"),
        ({"state": {"joints": 7}}, {}, r"unknown state: pass --state with some of .*'joints', 'object'"),
        ({}, {"state": ("joints",)}, r"has no \['joints'\] in obs, it has \['agentview_image'"),
        ({}, {"cameras": ("front_image",)}, r"has no \['front_image'\] in obs"),
        ({"cameras": {"agentview_image": (15, 24)}}, {}, r"uint8 \(12, 15, 24, 3\), .*an even height"),
        ({}, {"cameras": ("object",)}, r"object is float64 \(12, 14\)"),
        ({"lengths": {"demo_0": 1}}, {}, r"at least 2, it has .*'actions': 1"),
        ({"lengths": {}}, {}, r"has no demonstrations: a file of robomimic has them in its group `data`"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, options, message):
    base = {"cameras": CAMERAS, "state": ROBOMIMIC, "attributes": {"problem_info": json.dumps(WORDS)}}
    write(tmp_path / "a.hdf5", **base | changes)
    with pytest.raises(ValueError, match=message):
        main(ConvertConfig((tmp_path / "a.hdf5",), tmp_path / "out", **options))
    assert names_in(tmp_path) == ["a.hdf5"]


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    write(tmp_path / "a.hdf5", CAMERAS, ROBOMIMIC, {})
    write(tmp_path / "b.hdf5", {"agentview_image": (24, 24)}, ROBOMIMIC, {}, control_freq=10)
    with pytest.raises(ValueError, match=r"b\.hdf5, demo_0 does not fit to .*a\.hdf5, demo_0") as refused:
        main(ConvertConfig((tmp_path,), tmp_path / "out", task=""))
    assert "cameras: it has {'agentview_image': (24, 24)}, the first has {'agentview_image': (16, 24)}" in str(
        refused.value
    )
    assert "fps: it has 10, the first has 20" in str(refused.value)


def test_the_command_refuses_files_that_are_not_there_or_not_hdf5(server, tmp_path):
    (tmp_path / "a.hdf5").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    for files, message in {
        "a.hdf5": "is no HDF5 file, or was not downloaded to its end",
        "empty": "no files in .*empty end in .hdf5 or .h5",
        "b.hdf5": "there is no .*b.hdf5",
    }.items():
        with pytest.raises(ValueError, match=message):
            main(ConvertConfig((tmp_path / files,), tmp_path / "out"))
    with pytest.raises(ValueError, match="no files given"):
        main(ConvertConfig((), tmp_path / "out"))
    write(tmp_path / "a.hdf5", CAMERAS, ROBOMIMIC, {})
    command = ["examples/convert_robomimic.py", tmp_path / "a.hdf5", "--task", "x", "--root"]
    code, printed = run_forked(server, [*command, tmp_path / "empty"], tmp_path / "out.txt")
    assert code == 2 and "empty exists: remove it or name another directory" in printed
    assert len(printed.splitlines()) == 1
    code, printed = run_forked(server, [*command, tmp_path / "out"], tmp_path / "out.txt")
    assert code == 0 and f"{tmp_path / 'out'}: 3 episodes, 28 frames, 1 task(s)" in printed
    assert "images stored, observed before the row's action" in printed
