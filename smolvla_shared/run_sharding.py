"""A model on several processes: a full copy on each (DDP), or sharded over them (FSDP2).

Everything about FSDP is here; checkpoints and exports hold full tensors only.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import layers


def check_plugin(accelerator: Accelerator) -> None:
    """Raise ValueError for settings of the Accelerate configuration that `shard` would ignore."""
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
            "the model is sharded in one way only: take configs/accelerate/fsdp2_8gpu.yaml or fsdp2_multinode.yaml"
        )


def distribute(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Move a module to its devices. Returns what a training pass calls; make optimizers afterwards."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(module)
    shard(module, accelerator)
    module.forward = accelerator.autocast()(module.forward)  # prepare_model does this for the others
    return module


def shard(core: SmolVLASharedCore, accelerator: Accelerator) -> None:
    """Shard a core's parameters over all processes (FSDP2), in place; they become DTensors.

    A unit's full parameters exist only while the unit computes. Units are the layers of vision tower, language model
    and expert, what projects the prefix for the expert's cross-attention layers, the token embedding, and the core with
    the rest: heads, projections, norms; frozen ones are included.

    In bfloat16 (--precision) the layers are gathered and compute in bfloat16; the optimizer's shards and the sum of the
    gradients are float32. The other units are always float32.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    low = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    # Inputs keep their types: autocast is on, too, and converts all but what must stay float32, such as rotary angles.
    of_layers = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    of_rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Also the core reshards after every forward pass: a training step must not use full weights of an evaluation.
    contexts = core.expert.context_projections  # run before the layers
    for unit in [*[contexts] * bool(contexts), *layers(core)]:
        fully_shard(unit, mesh=mesh, mp_policy=of_layers, reshard_after_forward=True)
    for rest in (core.trunk.vlm.text_model.embed_tokens, core):
        fully_shard(rest, mesh=mesh, mp_policy=of_rest, reshard_after_forward=True)
    register_fsdp_forward_method(core, "sample")


def full(tensor: Tensor) -> Tensor:
    """The full tensor of a tensor that may be sharded; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Full tensors on the CPU of the main process; {} on the others. Gathered one by one, to fit a device's memory."""
    gathered = {}
    for name, tensor in tensors.items():
        value = full(tensor.detach())
        if accelerator.is_main_process:
            gathered[name] = value.cpu()
    return gathered


@torch.no_grad()
def scatter_(tensor: Tensor, values: Tensor) -> None:
    """Copy a full tensor, which every process has, into `tensor`, which may be sharded."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
