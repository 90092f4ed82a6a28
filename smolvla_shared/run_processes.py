"""The processes of a command: the Accelerator, its precision, how long processes wait, the memory they share, and the
way of a batch to the device.
"""

import math
import multiprocessing
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smolvla_shared.batch import map_tensors, to_device
from smolvla_shared.launch import IN_WORDS, refuse_settings, stated_precision

# How long processes wait for one that works alone, on a large checkpoint or on the last shard of a cache. After NCCL's
# own 10 minutes the others would end the run.
TIMEOUT = timedelta(hours=2)
SHARED_MEMORY = Path("/dev/shm")  # where a loader's workers put what they have read


def find_device(name: str | None = None) -> str:
    """A device's name; default: cuda if there is a GPU, else cpu. Raises ValueError for one that is not there."""
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    there += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name and name not in there:
        raise ValueError(f"--device {name} is not here: pass one of {', '.join(there)}")
    return name or ("cuda" if "cuda" in there else "cpu")


def make_accelerator(precision: str | None = None, **options: Any) -> Accelerator:
    """The Accelerator of a command, in the precision that `stated_precision` finds; options: the Accelerator's own.

    Raises ValueError for what `stated_precision` and `refuse_settings` refuse.
    """
    refuse_settings()
    ddp = DistributedDataParallelKwargs(
        # Buffers are constants, or equal on all processes (NSVQ.note).
        broadcast_buffers=False,
        # Gradients live in the buckets in which they are summed. Otherwise each would exist twice.
        gradient_as_bucket_view=True,
    )
    accelerator = Accelerator(
        mixed_precision=stated_precision(precision)[0],
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT), ddp],
        **options,
    )
    use_tf32(accelerator.device)
    return accelerator


def describe_precision(option: str | None, device: torch.device) -> str:
    """The device and the precision of a run, in words."""
    precision, source = stated_precision(option)
    line = f"device: {device.type}; precision: {IN_WORDS[precision]}, from {source}"
    if device.type == "cpu" and precision == "bf16":
        line += ". No GPU was found: is there one (nvidia-smi), and is torch built for it (torch.version.cuda)?"
    if precision == "no" and device.type == "cuda":
        line += ". A GPU computes faster in bfloat16: --precision bf16, or configs/accelerate/gpu_bf16.yaml"
    return line


def use_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, which keeps 11 significant bits, and choose among its convolutions
    by trying them. lerobot-train and lerobot-eval do the same.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
        torch.backends.cudnn.benchmark = True


def make_worker_loader(dataset: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """Batches as the dataset makes them. Workers are forked from a clean server process that has imported
    data_loader once: video decoders do not survive a fork of the training process.
    """
    if num_workers:
        multiprocessing.set_forkserver_preload(["smolvla_shared.data_loader"])
        options |= {"multiprocessing_context": "forkserver", "prefetch_factor": 4}
    return DataLoader(
        dataset, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available(), **options
    )


class Transfer:
    """Moves batches to the device. A GPU copies them on a stream of their own: the host is ahead of it, so that a batch
    arrives while the step before is still computed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__[B](self, batch: B) -> B:
        if self.stream is None:
            return to_device(batch, self.device)
        with torch.cuda.stream(self.stream):
            batch = to_device(batch, self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)

        def keep(tensor: Tensor) -> Tensor:
            tensor.record_stream(computing)  # else its memory could take a later batch while a step still reads it
            return tensor

        return map_tensors(keep, batch)


def num_bytes(batch: Any) -> int:
    """What the tensors of a batch take in shared memory. Views of the same frames count once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    map_tensors(note, list(batch) if isinstance(batch, tuple) else batch)
    return sum(storages.values())


def check_shared_memory(loader: DataLoader) -> None:
    """Raise ValueError if the batches that such loaders read ahead, in all processes of this machine, do not fit
    into /dev/shm. Call it before any process starts its workers.
    """
    if not loader.num_workers:
        return
    if not SHARED_MEMORY.is_dir():
        if sys.platform != "linux":
            return
        raise ValueError(
            f"there is no {SHARED_MEMORY}, by which loader processes hand over what they have read: pass "
            "--data.num-workers 0, or mount one (mount -t tmpfs tmpfs /dev/shm)"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each has such a loader
    size = num_bytes(loader.dataset[next(iter(loader.sampler))])
    of_worker, free = loader.prefetch_factor * size * processes, shutil.disk_usage(SHARED_MEMORY).free
    need = loader.num_workers * of_worker + size * processes  # and the batch that is in use
    if need > free:
        raise ValueError(
            f"the {loader.num_workers} loader processes of each of {processes} training process(es) read "
            f"{loader.prefetch_factor} batches of {size / 1e6:,.3g} MB ahead: {need / 1e9:,.3g} GB of {SHARED_MEMORY}, "
            f"which has {free / 1e9:,.3g} GB free. Without room they die of a bus error. Pass --data.num-workers "
            f"{max(0, int((free - size * processes) // of_worker))}, or give a container more: docker run "
            f"--shm-size={math.ceil(1.2 * need / 1e9)}g, or --ipc=host"
        )
