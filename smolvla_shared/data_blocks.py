"""Every frame of a dataset, once and in order: what fills a cache, or looks at frame pairs, reads blocks of rows."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from smolvla_shared.cache import RowCache
from smolvla_shared.data import RobotDataset
from smolvla_shared.data_loader import make_worker_loader


class FrameBlocks(Dataset):
    """Reads the frames of one camera at several offsets from each row of a block, every frame once and in order.

    blocks:  rows of one dataset that lie in one episode, for each block
    offsets: frames from a row, such as (0, gap) for pairs
    """

    def __init__(self, dataset: RobotDataset, camera: str, blocks: list[np.ndarray], offsets: tuple[int, ...]):
        self.dataset, self.camera, self.blocks, self.offsets = dataset, camera, blocks, np.array(offsets)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frames [F, 3, h, w] uint8; which of them each row wants, [n, offsets]; whether the episode has it, likewise.

        Where it has not, the row's own frame stands in.
        """
        rows = self.blocks[index]
        episode = self.dataset.episode_of(rows[0])
        wanted = rows[:, None] + self.offsets
        valid = (wanted >= self.dataset.episode_from[episode]) & (wanted < self.dataset.episode_to[episode])
        frames, place = np.unique(np.where(valid, wanted, rows[:, None]), return_inverse=True)
        pictures = self.dataset.read_frames(self.camera, frames.tolist())
        return pictures, torch.from_numpy(place.reshape(wanted.shape)), torch.from_numpy(valid)


def episode_blocks(dataset: RobotDataset, rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Sorted rows in blocks of at most `size`, none of which spans two episodes."""
    episodes = np.searchsorted(dataset.episode_to, rows, side="right")
    by_episode = np.split(rows, np.flatnonzero(np.diff(episodes)) + 1) if len(rows) else []
    return [block[start : start + size] for block in by_episode for start in range(0, len(block), size)]


def block_loader(blocks: FrameBlocks, num_workers: int) -> DataLoader:
    """The blocks in their order, one at a time."""
    return make_worker_loader(blocks, num_workers)


def fill_cache(
    store: RowCache,
    dataset: RobotDataset,
    camera: str,
    offsets: tuple[int, ...],
    blocks_of: Callable[[range], list[np.ndarray]],
    empty: Callable[[int], dict[str, np.ndarray]],
    compute: Callable[[Tensor, Tensor], dict[str, np.ndarray]],
    num_workers: int,
    accelerator: Accelerator,
) -> None:
    """Fill a dataset's cache from a camera's frames; every process does its share of the shards.

    blocks_of: the rows of a shard that are computed, in blocks as FrameBlocks takes them
    empty:     arrays for so many rows; what is not computed stays as it is here
    compute:   frames and places of a block, as FrameBlocks gives them, on the device -> its rows of every array
    """
    if accelerator.is_main_process:
        store.claim()
    accelerator.wait_for_everyone()
    if store.is_complete():  # another run filled it meanwhile
        return
    missing = {rows.start for rows in store.missing()}
    mine = store.shards()[accelerator.process_index :: accelerator.num_processes]
    plan = [(rows, blocks_of(rows)) for rows in mine if rows.start in missing]
    blocks = FrameBlocks(dataset, camera, [block for _, parts in plan for block in parts], offsets)
    batches = iter(block_loader(blocks, num_workers))
    progress = tqdm(
        initial=dataset.num_frames - sum(len(rows) for rows, _ in plan) * accelerator.num_processes,
        total=dataset.num_frames,
        desc=f"{store.directory.parent.name}/{store.directory.name}",
        unit="frame",
        disable=not accelerator.is_main_process,
    )
    for rows, parts in plan:
        arrays = empty(len(rows))
        for block in parts:
            frames, places, _ = next(batches)
            for name, values in compute(frames.to(accelerator.device), places.to(accelerator.device)).items():
                arrays[name][block - rows.start] = values
        store.write(rows, arrays)
        progress.update(len(rows) * accelerator.num_processes)
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        store.finish()
    accelerator.wait_for_everyone()
