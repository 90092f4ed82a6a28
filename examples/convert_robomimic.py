"""Make a LeRobotDataset (v3) of HDF5 files in robomimic's form, which MimicGen, RoboCasa and LIBERO have, too.

python examples/convert_robomimic.py can/ph/image.hdf5 --task "put the can into the bin" --root data/can
python examples/convert_robomimic.py libero_spatial/ --root data/libero_spatial
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import tyro
from tqdm import tqdm

from smolvla_shared.command import run_command
from smolvla_shared.data import ACTION_KEY, STATE_KEY
from smolvla_shared.refusals import refuse_differences

# The state, where --state does not say it: what LeRobot's environment `libero` shows, or robomimic's policies see.
STATES = (("ee_states", "gripper_states"), ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"))
Images = Literal["stored", "flipped", "rotated"]
Observed = Literal["before", "after"]


@dataclass(frozen=True)
class ConvertConfig:
    """Make a LeRobotDataset of demonstrations in HDF5 files of robomimic, MimicGen, RoboCasa or LIBERO."""

    # Files, and folders, which are searched for files that end in .hdf5 or .h5.
    files: tyro.conf.Positional[tuple[Path, ...]]
    # Directory of the new dataset.
    root: Path
    # Task text of all demonstrations. Default: the file's own (`lang` of RoboCasa, `language_instruction` of LIBERO).
    task: str | None = None
    # Rows a second, for files that do not tell their control_freq.
    fps: int | None = None
    # Cameras, by their names in the files. Default: all whose names end in _image or _rgb.
    cameras: tuple[str, ...] = ()
    # Observations that make up the state, in this order. Default: LIBERO's ee_states and gripper_states, or
    # robomimic's robot0_eef_pos, robot0_eef_quat and robot0_gripper_qpos.
    state: tuple[str, ...] = ()
    # The dataset's pictures are those of the file as they are stored, flipped upside down, or rotated by 180 degrees.
    # Default: flipped in files that say macros_image_convention is opengl (LIBERO), else stored.
    images: Images | None = None
    # Whether a row's observation was made before or after the row's action. After: it is paired with the next row's
    # action. Default: after in files that say macros_image_convention (LIBERO's own script), else before.
    observed: Observed | None = None


@dataclass(frozen=True)
class Layout:
    """What all demonstrations of a dataset have in common."""

    cameras: dict[str, tuple[int, ...]]  # height, width
    state: dict[str, int]  # widths
    action: int
    fps: int
    images: Images
    observed: Observed

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        sizes, axes = self.cameras, ["height", "width", "channels"]
        columns = {
            camera_key(name): {"dtype": "video", "shape": (*size, 3), "names": axes} for name, size in sizes.items()
        }
        for key, parts in {STATE_KEY: self.state, ACTION_KEY: {"action": self.action}}.items():
            names = [f"{part}_{index}" for part, width in parts.items() for index in range(width)]
            columns[key] = {"dtype": "float32", "shape": (len(names),), "names": names}
        return columns


def camera_key(name: str) -> str:
    return f"observation.images.{re.sub('_(image|rgb)$', '', name)}"


def find_files(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no {path}: name HDF5 files, or folders of them")
        inside = [file for file in path.rglob("*") if file.suffix in (".hdf5", ".h5")] if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"no files in {path} end in .hdf5 or .h5")
        found += sorted(inside)
    if not found:
        raise ValueError("no files given: name HDF5 files, or folders of them")
    if broken := [file for file in found if not h5py.is_hdf5(file)]:
        raise ValueError(f"{broken[0]} is no HDF5 file, or was not downloaded to its end")
    return found


def demonstrations(file: h5py.File) -> Iterator[h5py.Group]:
    """The demonstrations of a file: demo_9 before demo_10."""
    if not len(data := file.get("data", {})):
        raise ValueError(f"{file.filename} has no demonstrations: a file of robomimic has them in its group `data`")
    for name in sorted(data, key=lambda name: re.sub("[0-9]+", lambda number: number.group().zfill(20), name)):
        yield data[name]


def json_attribute(group: h5py.Group, name: str) -> dict[str, Any]:
    """A dictionary that is stored as JSON in an attribute; an empty one if there is no such attribute."""
    return json.loads(group.attrs.get(name, "{}"))


def title(demo: h5py.Group) -> str:
    return f"{demo.file.filename}, {demo.name.rsplit('/', 1)[-1]}"


def read_fps(demo: h5py.Group, stated: int | None) -> int:
    said = json_attribute(demo.parent, "env_args").get("env_kwargs", {}).get("control_freq")
    if said is None and stated is None:
        raise ValueError(f"{demo.file.filename} does not tell its control_freq: pass --fps, the rows a second")
    if said not in (None, stated or said):
        raise ValueError(f"--fps {stated}, but {demo.file.filename} was recorded at control_freq {said}: leave it out")
    if (fps := said or stated) != int(fps):
        raise ValueError(f"{demo.file.filename} has control_freq {fps}, a dataset's rate must be a whole number")
    return int(fps)


def read_task(demo: h5py.Group, stated: str | None) -> str:
    own = json_attribute(demo, "ep_meta").get("lang")
    own = own or json_attribute(demo.parent, "problem_info").get("language_instruction")
    if stated is None and own is None:
        raise ValueError(f"{title(demo)} has no task text: pass --task, such as --task 'put the can into the bin'")
    return stated if stated is not None else own if isinstance(own, str) else " ".join(own)


def read_layout(demo: h5py.Group, config: ConvertConfig) -> Layout:
    """Raises ValueError for what is missing in a demonstration, or cannot be in a dataset."""
    observations, actions = demo.get("obs", {}), demo.get("actions")
    cameras = config.cameras or [name for name in observations if re.search("_(image|rgb)$", name)]
    if not cameras or actions is None:
        raise ValueError(
            f"{title(demo)} has no {'images' if actions is not None else 'actions'}, it has {sorted(demo)}, and in obs "
            f"{sorted(observations)}. Files with simulator states alone get images by robomimic's "
            "dataset_states_to_obs.py"
        )
    known = [names for names in STATES if all(name in observations for name in names)]
    state = config.state or (known[0] if known else ())
    if missing := [name for name in (*cameras, *state) if name not in observations]:
        raise ValueError(f"{title(demo)} has no {missing} in obs, it has {sorted(observations)}")
    if not state:
        raise ValueError(f"{title(demo)} has an unknown state: pass --state with some of {sorted(observations)}")
    for name in cameras:
        shape, dtype = observations[name].shape, observations[name].dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or shape[1] % 2 or shape[2] % 2:
            raise ValueError(
                f"{title(demo)}: {name} is {dtype} {shape}, it should be uint8 (rows, height, width, 3), with an even "
                "height and width, as H.264 needs them: name the others by --cameras"
            )
    rows = {name: len(observations[name]) for name in (*cameras, *state)} | {"actions": len(actions)}
    if len(set(rows.values())) > 1 or rows["actions"] < 2:
        raise ValueError(f"{title(demo)} should have equal numbers of rows, at least 2, it has {rows}")
    convention = demo.parent.attrs.get("macros_image_convention")
    return Layout(
        cameras={name: observations[name].shape[1:3] for name in cameras},
        state={name: int(np.prod(observations[name].shape[1:])) for name in state},
        action=int(np.prod(actions.shape[1:])),
        fps=read_fps(demo, config.fps),
        images=config.images or ("flipped" if convention == "opengl" else "stored"),
        observed=config.observed or ("before" if convention is None else "after"),
    )


def check(files: list[Path], config: ConvertConfig) -> tuple[Layout, list[tuple[Path, str]]]:
    """The layout, and (file, name) of every demonstration. Raises ValueError if one cannot be in the dataset."""
    layout, first, demos = None, "", []
    for path in files:
        with h5py.File(path) as file:
            for demo in demonstrations(file):
                found = read_layout(demo, config)
                if layout is None:
                    layout, first = found, title(demo)
                pairs = zip(asdict(found).items(), asdict(layout).values())
                refuse_differences(
                    f"{title(demo)} does not fit to {first}: convert them into datasets of their own",
                    [(name, mine, other) for (name, mine), other in pairs],
                    asked="it has",
                    found="the first has",
                )
                read_task(demo, config.task)
                demos.append((path, demo.name))
    return layout, demos


def read_rows(demo: h5py.Group, layout: Layout) -> Iterator[dict[str, np.ndarray]]:
    """What the dataset has of every row, without the task."""
    later = layout.observed == "after"
    actions, end = demo["actions"][later:].astype(np.float32), len(demo["actions"]) - later
    observations = {name: demo["obs"][name][:end] for name in (*layout.cameras, *layout.state)}
    parts = [observations[name].reshape(end, -1) for name in layout.state]
    state = np.concatenate(parts, axis=1).astype(np.float32)
    turned = {"stored": np.s_[:], "flipped": np.s_[:, ::-1], "rotated": np.s_[:, ::-1, ::-1]}[layout.images]
    images = {camera_key(name): observations[name][turned] for name in layout.cameras}
    for row in range(end):
        pictures = {key: np.ascontiguousarray(frames[row]) for key, frames in images.items()}
        yield {STATE_KEY: state[row], ACTION_KEY: actions[row].reshape(-1), **pictures}


def main(config: ConvertConfig) -> None:
    if config.root.exists():
        raise ValueError(f"--root {config.root} exists: remove it or name another directory")
    layout, demos = check(find_files(config.files), config)
    import av
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # the encoder's notes would break the progress bar
    datasets.disable_progress_bars()
    print(
        f"{len(demos)} demonstrations at {layout.fps} rows a second; cameras {layout.cameras}, state {layout.state}, "
        f"{layout.action} actions; images {layout.images}, observed {layout.observed} the row's action"
    )
    temporary = config.root.with_name(f".{config.root.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    dataset = LeRobotDataset.create(
        repo_id=config.root.name,
        fps=layout.fps,
        features=layout.features,
        root=temporary,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=20),
    )
    for path, name in tqdm(demos, desc="convert", unit="episode"):
        with h5py.File(path) as file:
            task = read_task(file[name], config.task)
            for row in read_rows(file[name], layout):
                dataset.add_frame(row | {"task": task})
        dataset.save_episode()
    dataset.finalize()
    temporary.rename(config.root)
    meta = dataset.meta
    print(f"{config.root}: {meta.total_episodes} episodes, {meta.total_frames:,} frames, {meta.total_tasks} task(s)")


if __name__ == "__main__":
    run_command(main, ConvertConfig)
