"""The feature cache: the output of a frozen vision tower for every frame, computed in one pass before training.

    <directory>/<dataset>/<camera>/shards/   a row: the image tokens of a frame, [tokens, hidden] (cache.py)

Training then neither decodes the frames nor runs the tower, which is most of the work of a step with a frozen trunk.
"""

import shutil
from dataclasses import asdict, dataclass
from importlib import metadata

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from smolvla_shared import data, data_blocks, data_frames
from smolvla_shared.cache import RowCache, dataset_directories
from smolvla_shared.config import StageOptions
from smolvla_shared.files import state_sha256
from smolvla_shared.hashes import dataset_fingerprint, json_sha256
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import parameters_by_part
from smolvla_shared.preprocess import prepare_images

# How a recorded frame becomes the tower's input (preprocess.py). Raise the number when that changes.
PREPROCESSING = "1: uint8 / 255, bilinear with padding on the left and top, to [-1, 1]"
TOWER = ("vision tower", "connector")  # two names in model.PARTS
FRAMES_AT_ONCE = 16
SHARD_ROWS = 256  # 31 MB of a 500M trunk's tokens in bfloat16; 3,200 files at 100 GB


@dataclass(frozen=True)
class FeatureKey:
    """Everything that determines the features of one camera of a dataset."""

    tower: str  # sha256 of the configuration and weights of vision tower and connector
    computed_in: str
    stored_in: str
    image_size: int
    # Side of the square that frames are resized to first, pixels. None: all datasets have one size.
    square_side: int | None
    camera: str
    dataset: str  # hashes.dataset_fingerprint
    versions: dict[str, str]  # of the libraries that decode and compute
    preprocessing: str = PREPROCESSING


def tower_id(core: SmolVLASharedCore) -> str:
    parts = parameters_by_part(core)
    weights = {name: parameter for part in TOWER for name, parameter in parts[part].items()}
    return json_sha256([core.config.vlm["vision_config"], core.config.vlm["scale_factor"], state_sha256(weights)])


def prepare_features(
    core: SmolVLASharedCore,
    datasets: list[data.RobotDataset],
    cameras: tuple[str, ...],
    config: StageOptions,
    accelerator: Accelerator,
) -> dict[str, tuple[RowCache | None, ...]]:
    """Fill and open the feature caches, one for each camera and dataset (SampleSpec.features). {}: no cache asked for.
    A dataset names its cache after its own camera, so runs under other names share it.

    Only missing shards are computed. Raises ValueError if the tower trains, a cache has another key, or the caches are
    too large.
    """
    options = config.data
    if options.feature_cache is None:
        return {}
    parts = parameters_by_part(core)
    if any(parameter.requires_grad for part in TOWER for parameter in parts[part].values()):
        raise ValueError(
            "--data.feature-cache keeps the vision tower's output for each frame, but here the tower trains and its "
            "output changes: pass --model.freeze-vision True, or leave the cache out"
        )
    directories = dataset_directories(options.feature_cache, [dataset.name for dataset in datasets])
    square_side = data.square_sides(datasets, cameras)
    tower = tower_id(core)
    stores: dict[str, tuple[RowCache | None, ...]] = dict.fromkeys(cameras, ())
    for directory, dataset in zip(directories, datasets, strict=True):
        fingerprint = dataset_fingerprint(dataset.root)
        for camera in cameras:
            view = dataset.views.get(camera)
            if view is None:
                stores[camera] += (None,)
                continue
            key = FeatureKey(
                tower=tower,
                computed_in=f"{core.config.torch_dtype} weights, precision {accelerator.mixed_precision}",
                stored_in=options.feature_cache_dtype,
                image_size=core.config.image_size,
                square_side=square_side.get(camera),
                camera=view,
                dataset=fingerprint,
                versions={name: metadata.version(name) for name in ("torch", "lerobot", data_frames.video_decoder())},
            )
            stores[camera] += (RowCache(directory / view, asdict(key), dataset.num_frames, SHARD_ROWS),)
    check_size([store for some in stores.values() for store in some if store], core, config, accelerator)
    core.to(accelerator.device)
    for camera in cameras:
        for store, dataset in zip(stores[camera], datasets, strict=True):
            if store:
                fill(store, core, dataset, dataset.views[camera], config, accelerator)
                store.open()
    return stores


def token_shape(core: SmolVLASharedCore) -> tuple[int, int]:
    """(tokens, hidden) of an image."""
    tokens = len(core.trunk.patch_positions) // core.config.vlm["scale_factor"] ** 2
    return tokens, core.trunk.hidden_size


def check_size(stores: list[RowCache], core: SmolVLASharedCore, config: StageOptions, accelerator) -> None:
    """Print the size of the caches. Raises ValueError if a cache has another key, or if the size exceeds
    --data.feature-cache-gb or the free disk.
    """
    options = config.data
    row_gb = np.prod(token_shape(core)) * getattr(torch, options.feature_cache_dtype).itemsize / 1e9
    size = row_gb * sum(store.num_rows for store in stores)
    missing = row_gb * sum(len(rows) for store in stores if not store.is_complete() for rows in store.missing())
    accelerator.print(
        f"feature cache {options.feature_cache}: {size:.3g} GB of {options.feature_cache_dtype}, "
        + (f"of which {missing:.3g} GB are made now" if missing else "complete")
    )
    if size > options.feature_cache_gb:
        raise ValueError(
            f"--data.feature-cache would take {size:.3g} GB, more than --data.feature-cache-gb "
            f"{options.feature_cache_gb}: allow more, take --data.feature-cache-dtype bfloat16, or fewer cameras"
        )
    directory = options.feature_cache.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if missing > free:
        raise ValueError(f"--data.feature-cache needs {missing:.3g} GB more, {existing} has {free:.3g}")


@torch.no_grad()
def fill(
    store: RowCache,
    core: SmolVLASharedCore,
    dataset: data.RobotDataset,
    camera: str,
    config: StageOptions,
    accelerator: Accelerator,
) -> None:
    """Compute the image tokens of every frame. Every process computes its share."""

    def compute(frames: list[Tensor], _: Tensor) -> Tensor:
        frames = data_frames.common_size(frames[0], store.key["square_side"])
        with accelerator.autocast(), core.trunk.own_precision():
            return core.trunk.embed_images(prepare_images(frames, core.config.image_size)[:, None])[:, 0]

    data_blocks.fill_cache(
        store,
        dataset,
        (camera,),
        pairs=False,
        row_shape=token_shape(core),
        dtype=getattr(torch, config.data.feature_cache_dtype),
        compute=compute,
        rows_at_once=FRAMES_AT_ONCE,
        num_workers=config.data.num_workers,
        accelerator=accelerator,
    )
