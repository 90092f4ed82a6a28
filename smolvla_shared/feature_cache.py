"""The feature cache: what a frozen vision tower makes of every frame, computed in one pass before training.

    <directory>/<dataset>/<camera>/tokens.npy   [frames, tokens, hidden]; bfloat16 is kept as int16 (cache.py)

Training then neither decodes the frames nor runs the tower, which is most of the work of a step with a frozen trunk.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from smolvla_shared import data, data_blocks
from smolvla_shared.artifact import fingerprints
from smolvla_shared.cache import RowCache, dataset_fingerprint
from smolvla_shared.config import StageOptions
from smolvla_shared.label_cache import label_directories
from smolvla_shared.model import SmolVLASharedCore, parameters_by_part
from smolvla_shared.preprocess import prepare_images

# How a recorded frame becomes what the tower sees (preprocess.py); raised when that changes.
PREPROCESSING = "1: uint8 / 255, bilinear with padding on the left and top, to [-1, 1]"
TOWER = ("vision tower", "connector")  # of model.PARTS
FRAMES_AT_ONCE = 16
SHARD_ROWS = 256  # what a kill loses at most, a process


@dataclass(frozen=True)
class FeatureKey:
    """All that decides about the features of a camera of a dataset."""

    tower: str  # sha256 of the configuration and weights of vision tower and connector
    computed_in: str
    stored_in: str
    image_size: int
    # Side of the square that frames become first where the datasets' sizes differ; None where they do not.
    square_side: int | None
    camera: str
    dataset: str  # cache.dataset_fingerprint
    versions: dict[str, str]  # of the libraries that decode and compute
    preprocessing: str = PREPROCESSING


def tower_id(core: SmolVLASharedCore) -> str:
    parts = parameters_by_part(core)
    hashes = fingerprints({name: parameter.detach() for part in TOWER for name, parameter in parts[part].items()})
    about = {part: hashes[part] for part in TOWER}
    about |= {name: core.config.vlm[name] for name in ("vision_config", "scale_factor")}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def prepare_features(
    core: SmolVLASharedCore,
    datasets: list[data.RobotDataset],
    cameras: tuple[str, ...],
    config: StageOptions,
    accelerator: Accelerator,
) -> dict[str, tuple[Path, ...]]:
    """For SampleSpec.features: each camera's file of image tokens for every dataset, filled where frames are missing;
    nothing without --data.feature-cache. A run that was killed meanwhile goes on where it stopped.

    Raises ValueError for a tower that trains, a cache of something else, and one that is too large.
    """
    options = config.data
    if options.feature_cache is None:
        return {}
    parts = parameters_by_part(core)
    if any(parameter.requires_grad for part in TOWER for parameter in parts[part].values()):
        raise ValueError(
            "--data.feature-cache keeps what the vision tower makes of a frame, but here the tower trains and its "
            "features change: pass --model.freeze-vision True, or leave the cache out"
        )
    directories = label_directories(options.feature_cache, [dataset.name for dataset in datasets])
    square_side = data.square_sides(datasets, cameras)
    tower = tower_id(core)
    stores = {
        (camera, index): feature_store(directories[index] / camera, dataset, camera, tower, square_side, core, config)
        for camera in cameras
        for index, dataset in enumerate(datasets)
    }
    unfinished = {place: store for place, store in stores.items() if not store.is_complete()}
    check_size(stores, unfinished, core, config, accelerator)
    core.to(accelerator.device)
    for (camera, index), store in unfinished.items():
        fill(store, core, datasets[index], camera, square_side, config, accelerator)
    for store in stores.values():
        store.open()
    return {
        camera: tuple(stores[camera, index].directory / "tokens.npy" for index in range(len(datasets)))
        for camera in cameras
    }


def feature_store(
    directory: Path,
    dataset: data.RobotDataset,
    camera: str,
    tower: str,
    square_side: dict[str, int],
    core: SmolVLASharedCore,
    config: StageOptions,
) -> RowCache:
    key = FeatureKey(
        tower=tower,
        computed_in=f"{core.config.torch_dtype} weights, precision {config.precision}",
        stored_in=config.data.feature_cache_dtype,
        image_size=core.config.image_size,
        square_side=square_side.get(camera),
        camera=camera,
        dataset=dataset_fingerprint(dataset.lerobot.root),
        versions={name: metadata.version(name) for name in ("torch", "lerobot", data.video_decoder())},
    )
    return RowCache(directory, asdict(key), dataset.num_frames, SHARD_ROWS)


def token_shape(core: SmolVLASharedCore) -> tuple[int, int]:
    """Tokens of an image and their width."""
    tokens = len(core.trunk.patch_positions) // core.config.vlm["scale_factor"] ** 2
    return tokens, core.trunk.hidden_size


def check_size(stores: dict, unfinished: dict, core: SmolVLASharedCore, config: StageOptions, accelerator) -> None:
    """Announce what the cache takes. Raises ValueError where that is more than allowed, or than the disk has."""
    options = config.data
    frame_bytes = np.prod(token_shape(core)) * getattr(torch, options.feature_cache_dtype).itemsize
    size, missing = (sum(s.num_rows for s in some.values()) * frame_bytes / 1e9 for some in (stores, unfinished))
    accelerator.print(
        f"feature cache {options.feature_cache}: {size:.3g} GB of {options.feature_cache_dtype}"
        + (f", of which {missing:.3g} GB are made now; that takes twice as much meanwhile" if missing else ", complete")
    )
    if size > options.feature_cache_gb:
        raise ValueError(
            f"--data.feature-cache would take {size:.3g} GB, more than --data.feature-cache-gb "
            f"{options.feature_cache_gb}: allow more, take --data.feature-cache-dtype bfloat16, or fewer cameras"
        )
    existing = next(
        path for path in (options.feature_cache, *options.feature_cache.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free / 1e9
    if 2 * missing > free:
        raise ValueError(
            f"--data.feature-cache needs {2 * missing:.3g} GB while it is filled, {existing} has {free:.3g}"
        )


@torch.no_grad()
def fill(
    store: RowCache,
    core: SmolVLASharedCore,
    dataset: data.RobotDataset,
    camera: str,
    square_side: dict[str, int],
    config: StageOptions,
    accelerator: Accelerator,
) -> None:
    """Compute the image tokens of every frame; every process does its share."""
    dtype = getattr(torch, config.data.feature_cache_dtype)
    stored = np.int16 if dtype == torch.bfloat16 else np.float32

    def compute(frames: Tensor, _: Tensor) -> dict[str, np.ndarray]:
        frames = data.common_size(frames, square_side.get(camera))
        with accelerator.autocast():
            tokens = core.trunk.embed_images(prepare_images(frames, core.config.image_size)[:, None])[:, 0]
        tokens = tokens.to(dtype)
        return {"tokens": (tokens.view(torch.int16) if stored is np.int16 else tokens).numpy(force=True)}

    data_blocks.fill_cache(
        store,
        dataset,
        camera,
        offsets=(0,),
        blocks_of=lambda rows: data_blocks.episode_blocks(dataset, np.array(rows), FRAMES_AT_ONCE),
        empty=lambda num_rows: {"tokens": np.zeros((num_rows, *token_shape(core)), stored)},
        compute=compute,
        num_workers=config.data.num_workers,
        accelerator=accelerator,
    )
