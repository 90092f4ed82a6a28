"""The frames of a dataset, once and in order, in blocks of rows: to fill a cache, or to check frame pairs."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from smolvla_shared.batch import to_device
from smolvla_shared.cache import RowCache
from smolvla_shared.data import RobotDataset
from smolvla_shared.run_processes import check_shared_memory, make_worker_loader


class FrameBlocks(Dataset):
    """Frames of some cameras at several offsets from each row of a block. Each frame is read once, in order.

    blocks:  for each block its rows, all in one episode
    offsets: distances from a row in frames, such as (0, gap) for pairs
    """

    def __init__(
        self, dataset: RobotDataset, cameras: tuple[str, ...], blocks: list[np.ndarray], offsets: tuple[int, ...]
    ):
        self.dataset, self.cameras, self.blocks, self.offsets = dataset, cameras, blocks, np.array(offsets)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each camera's frames [F, 3, h, w] uint8; the index of each row's frames among the F, [n, offsets]; whether
        the episode has that frame, [n, offsets] bool. Where it has not, the index is that of the row's own frame.
        """
        rows = self.blocks[index]
        episode = self.dataset.episode_of(rows[0])
        wanted = rows[:, None] + self.offsets
        valid = (wanted >= self.dataset.episode_from[episode]) & (wanted < self.dataset.episode_to[episode])
        frames, place = np.unique(np.where(valid, wanted, rows[:, None]), return_inverse=True)
        images = [self.dataset.read_frames(camera, frames.tolist()) for camera in self.cameras]
        return images, torch.from_numpy(place.reshape(wanted.shape)), torch.from_numpy(valid)


def episode_blocks(dataset: RobotDataset, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Sorted rows in blocks of at most `size` rows. No block spans two episodes."""
    episodes = dataset.episode_of(rows)
    by_episode = np.split(rows, np.flatnonzero(np.diff(episodes)) + 1) if len(rows) else []
    return [block[start : start + size] for block in by_episode for start in range(0, len(block), size)]


def deal_missing(store: RowCache, accelerator: Accelerator) -> list[range]:
    """Claim a cache; the shards that are missing from it, in the same list on every process.

    The list is the main process's: others may look when somebody has written a shard already.
    """
    found = [None]
    if accelerator.is_main_process:
        store.claim()
        found = [store.missing()]
    return broadcast_object_list(found)[0]


def fill_cache(
    store: RowCache,
    dataset: RobotDataset,
    cameras: tuple[str, ...],
    pairs: bool,
    row_shape: tuple[int, ...],
    dtype: torch.dtype,
    compute: Callable[[list[Tensor], Tensor], Tensor],
    rows_at_once: int,
    num_workers: int,
    accelerator: Accelerator,
) -> None:
    """Fill a dataset's cache from some cameras' frames. Every process fills an equal share of the missing shards.

    pairs:   True: a row is computed from its frame and the frame a gap later, and is 0 if the episode ends before that.
             False: a row is computed from its frame alone
    compute: (each camera's frames, indices) of up to `rows_at_once` rows (FrameBlocks), on the device -> their values
    """
    missing = deal_missing(store, accelerator)
    plan = []
    for shard in missing[accelerator.process_index :: accelerator.num_processes]:
        rows = dataset.rows(shard.start, shard.stop)
        rows = dataset.rows_with_pairs(rows) if pairs else rows
        plan.append((shard, episode_blocks(dataset, rows.numpy(), rows_at_once)))
    offsets = (0, dataset.gap) if pairs else (0,)
    blocks = FrameBlocks(dataset, cameras, [block for _, parts in plan for block in parts], offsets)
    loader = make_worker_loader(blocks, num_workers)
    if any(parts for _, parts in plan):  # shards may be missing that have no pair at all
        check_shared_memory(loader)
    accelerator.wait_for_everyone()  # no worker takes memory while a process still checks how much is free
    batches = iter(loader)
    progress = tqdm(
        initial=dataset.num_frames - sum(map(len, missing)),
        total=dataset.num_frames,
        desc=f"{store.directory.parent.name}/{store.directory.name}",
        unit="frame",
        disable=not (accelerator.is_main_process and plan),
    )
    for shard, parts in plan:
        values = torch.zeros(len(shard), *row_shape, dtype=dtype)
        for block in parts:
            frames, places, _ = next(batches)
            computed = compute(*to_device([frames, places], accelerator.device))
            values[torch.from_numpy(block - shard.start)] = computed.to("cpu", dtype)
        store.write(shard, values)
        progress.update(len(shard) * accelerator.num_processes)
    progress.close()
    accelerator.wait_for_everyone()
    store.release()
