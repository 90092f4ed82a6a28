"""The processes of a command: the Accelerator, in which precision it computes, and how long processes wait."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

# How long processes wait for one that works alone, on a large checkpoint or on the last shard of a cache. After NCCL's
# own 10 minutes the others would end the run.
TIMEOUT = timedelta(hours=2)
IN_WORDS = {"no": "float32", "bf16": "bfloat16"}


def make_accelerator(precision: str | None = None, **options: Any) -> Accelerator:
    """The Accelerator of a command, in the precision that `stated_precision` finds; options: the Accelerator's own.

    Raises ValueError for what `stated_precision` refuses.
    """
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


def stated_precision(option: str | None) -> tuple[str, str]:
    """The precision of a run, "no" (float32) or "bf16", and who stated it.

    option: --precision; None: not given

    Raises ValueError if the Accelerate configuration asks for bf16 and --precision for float32, or if the former asks
    for anything else. Its "no" is no contradiction: `accelerate launch` also says "no" where nobody has said anything.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if configured not in (None, *IN_WORDS):
        raise ValueError(
            f"the Accelerate configuration asks for mixed_precision {configured}, but runs compute in float32 (no) or "
            "bf16: change it there, or pass --mixed_precision bf16 to accelerate launch"
        )
    if (option, configured) == ("no", "bf16"):
        raise ValueError(
            "--precision no, but the Accelerate configuration asks for mixed_precision bf16: leave --precision out, or "
            "pass --mixed_precision no to accelerate launch"
        )
    if option:
        return option, "--precision"
    return (configured, "the Accelerate configuration") if configured else ("no", "the default")


def describe_precision(option: str | None, device: torch.device) -> str:
    """The precision of a run, in words."""
    precision, source = stated_precision(option)
    line = f"precision: {IN_WORDS[precision]}, from {source}"
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
