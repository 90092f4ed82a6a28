"""A model on several processes: whole on each of them (DDP), or divided among them (FSDP2).

All that FSDP needs is here; a checkpoint or an export never holds a divided tensor.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from smolvla_shared.model import SmolVLASharedCore, layers


def check_plugin(accelerator: Accelerator) -> None:
    """Raise ValueError for settings of an Accelerate configuration that `shard` does not follow."""
    if accelerator.distributed_type is not DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    refused = {
        f"fsdp_version: {plugin.fsdp_version}": plugin.fsdp_version != 2,
        "fsdp_auto_wrap_policy": plugin.auto_wrap_policy is not None,
        "fsdp_reshard_after_forward: false": plugin.reshard_after_forward is False,
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: true": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading: true": plugin.cpu_ram_efficient_loading,
    }
    if any(refused.values()):
        raise ValueError(
            f"the Accelerate configuration asks for {', '.join(name for name, found in refused.items() if found)}; "
            "the model is divided in one way only: take configs/accelerate/fsdp2_8gpu.yaml or multinode.yaml"
        )


def distribute(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Move a module to its devices; returns what a training pass calls. Optimizers are made afterwards."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(module)
    shard(module, accelerator)
    return module


def shard(core: SmolVLASharedCore, accelerator: Accelerator) -> None:
    """Divide a core's parameters over all processes (FSDP2), in place; they become DTensors.

    A unit's parameters are whole only while it computes. The units are the layers of vision tower, language model and
    expert, the token embedding, and the core itself with all the rest: heads, projections, norms. Frozen parameters
    are divided like the trained ones.

    With bfloat16 a layer's parameters travel and compute as such; the shards that the optimizer sees, and the sum of
    the gradients, are float32. The rest stays float32: the heads compute in it.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    low = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    # Inputs keep their types; autocast, which is on as well, converts what may be converted (and no rotary angle).
    of_layers = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    of_rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Resharding after every forward pass, the core's too: no weights of an evaluation live on into a training step.
    for layer in layers(core):
        fully_shard(layer, mesh=mesh, mp_policy=of_layers, reshard_after_forward=True)
    for rest in (core.trunk.vlm.text_model.embed_tokens, core):
        fully_shard(rest, mesh=mesh, mp_policy=of_rest, reshard_after_forward=True)
    register_fsdp_forward_method(core, "sample")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided, whole, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the main process, none on the others. One at a time: no device holds them all."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if accelerator.is_main_process:
            gathered[name] = value.cpu()
    return gathered


@torch.no_grad()
def scatter_(tensor: Tensor, values: Tensor) -> None:
    """Copy into `tensor`, which may be divided, its part of a whole tensor that every process has."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
