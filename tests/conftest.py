"""What all tests run in: no network, empty caches, rendering without a screen, one thread a process."""

import os
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

NO_NETWORK = str(Path(__file__).parent / "no_network")
EMPTY_CACHE = tempfile.TemporaryDirectory(prefix="hf_home_")  # removed at exit

# Set before torch, transformers, lerobot or mujoco are imported; the processes that tests start inherit it.
os.environ |= {
    "PYTHONPATH": os.pathsep.join([NO_NETWORK, *filter(None, [os.environ.get("PYTHONPATH")])]),
    "HF_HOME": EMPTY_CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
os.environ.setdefault("MUJOCO_GL", "osmesa")

runpy.run_path(f"{NO_NETWORK}/sitecustomize.py")  # not an import: Ubuntu's Python has imported one of that name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: if one came last, the other workers would wait for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen]:
    """Runs the project's commands; see forked.py."""
    from forked import start_server

    with start_server() as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="session")
def tiny_vlm() -> Path:
    """Directory of the preset `tiny`: a SmolVLM's configuration and tokenizer."""
    return Path(str(files("smolvla_shared") / "assets" / "tiny_vlm"))


def record_dataset(root: Path, fps: int, cameras: dict[str, tuple[int, int]], use_videos: bool, **dims: int) -> Path:
    """Record a LeRobotDataset of 8 episodes of 20 to 27 frames: a bright square moves over each camera's picture.

    cameras: (height, width) by key
    dims:    width of the vector features by name, state and action. The state begins with the square's position, the
             action with its velocity, which changes within an episode; both as shares of the picture
    """
    import numpy as np
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = {"state": "observation.state", "action": "action"}
    features = {
        key: {
            "dtype": "video" if use_videos else "image",
            "shape": (*size, 3),
            "names": ["height", "width", "channels"],
        }
        for key, size in cameras.items()
    }
    features |= {names[name]: {"dtype": "float32", "shape": (dim,), "names": None} for name, dim in dims.items()}
    dataset = LeRobotDataset.create(
        repo_id=root.name,
        fps=fps,
        features=features,
        root=root,
        use_videos=use_videos,
        # LeRobot's default, SVT-AV1, makes the whole process a real-time one when root runs it.
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
    )
    rng = np.random.default_rng(0)
    for episode in range(8):
        position, velocity = rng.uniform(0.2, 0.8, 2), rng.uniform(-0.05, 0.05, 2)
        for _ in range(20 + episode):
            # The action is what leads to the next frame.
            velocity = np.where((position + velocity < 0.1) | (position + velocity > 0.9), -velocity, velocity)
            velocity = np.clip(velocity + rng.normal(0, 0.01, 2), -0.08, 0.08)
            vectors = {
                "state": np.array([*position, episode, 1.0]),
                "action": np.array([*velocity, episode, rng.normal()]),
            }
            frame = {names[name]: vectors[name][:dim].astype(np.float32) for name, dim in dims.items()}
            for index, (key, (height, width)) in enumerate(cameras.items()):
                picture = np.full((height, width, 3), 40 * (index + 1), np.uint8)
                y, x = (position * (height, width)).astype(int)
                picture[max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = (250, 200, 25 * episode)
                frame[key] = picture
            dataset.add_frame(frame | {"task": ["push the square", "pull the square"][episode % 2]})
            position = np.clip(position + velocity, 0.1, 0.9)
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def video_dataset(datasets) -> Path:
    """Video without actions, one camera of 96 x 96 pixels at 20 fps, state 4."""
    return record_dataset(datasets / "video", 20, {"observation.image": (96, 96)}, use_videos=True, state=4)


@pytest.fixture(scope="session")
def labelled_dataset(datasets) -> Path:
    """As video_dataset, with an action column of 4 dimensions."""
    return record_dataset(
        datasets / "labelled", 20, {"observation.image": (96, 96)}, use_videos=True, state=4, action=4
    )


@pytest.fixture(scope="session")
def image_dataset(datasets) -> Path:
    """Images, two cameras of different sizes at 10 fps, no state, actions of 2 dimensions."""
    cameras = {"observation.image": (48, 64), "observation.images.wrist": (32, 40)}
    return record_dataset(datasets / "images", 10, cameras, use_videos=False, action=2)


@pytest.fixture(scope="session")
def laq_checkpoint(tmp_path_factory) -> Path:
    """A teacher with random weights: 4 codes of 8 dimensions out of 8, for frames of 64 pixels.

    Its codes are latents of a square that moves, so that the recorded pairs do not all get the same one.
    """
    import torch

    from smolvla_shared.laq import LAQ, LAQConfig
    from smolvla_shared.laq_files import save_laq

    torch.manual_seed(0)
    sizes = {"dim": 32, "quant_dim": 8, "codebook_size": 8, "image_size": 64, "patch_size": 8}
    laq = LAQ(LAQConfig(**sizes, spatial_depth=1, temporal_depth=1, dim_head=16, heads=2, code_seq_len=4))
    frames = torch.full((2, 2, 3, 64, 64), 0.16)
    for frame, (y, x) in zip(frames.flatten(0, 1), [(8, 8), (40, 20), (30, 50), (28, 10)], strict=True):
        frame[:2, y : y + 11, x : x + 11] = 0.9
    laq.vq.codebooks.data = laq.encode(frames).continuous.flatten(0, 1).detach().clone()
    path = tmp_path_factory.mktemp("teacher") / "laq.safetensors"
    save_laq(laq, path)
    return path
