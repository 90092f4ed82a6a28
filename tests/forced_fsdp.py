"""Runs our scripts under FSDP2 on CPUs, and takes notes of what it did. What test_run_sharding.py launches.

    torchrun --nproc-per-node 2 tests/forced_fsdp.py CONFIG NOTES JOBS

CONFIG is one of configs/accelerate, and counts as if `accelerate launch` had read it. JOBS is a JSON file,
{name: [script, arguments...]}; NOTES/<name><process>.json is what a process found. What a job compiles is traced and
sharded as ever, but run by PyTorch ("eager"), because compiling takes minutes.
"""

import functools
import importlib
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
import tyro
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import DTensor

from smolvla_shared import run
from smolvla_shared.batch import Batch
from smolvla_shared.command import leave_processes
from smolvla_shared.model import SmolVLASharedCore

sys.path.insert(0, str(Path(__file__).parent.parent))


def use_config(path: str) -> None:
    """Put into the environment what `accelerate launch` puts there."""
    args = launch_command_parser().parse_args(["--config-file", path, "script.py"])
    os.environ.update(prepare_multi_gpu_env(_validate_launch_command(args)[0]))
    del os.environ["ACCELERATE_MIXED_PRECISION"]  # each job says its own


def force_fsdp() -> None:
    """Accelerate turns FSDP into plain data parallel on a CPU. PyTorch's FSDP2 does run there."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as Accelerate does on GPUs

    AcceleratorState.__init__ = init


def autocast_layer_norm() -> None:
    """On a GPU autocast gives LayerNorm all its arguments in float32; on a CPU it refuses two types."""
    original = nn.functional.layer_norm

    def layer_norm(x, shape, weight, bias, eps=1e-5):
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = x.float(), weight.float(), bias.float()
        return original(x, shape, weight, bias, eps)

    nn.functional.layer_norm = layer_norm


def probe(core: SmolVLASharedCore) -> Tensor:
    """What a core generates in two Euler steps from a fixed observation and noise."""
    name = "action" if core.config.action_dim else "latent"
    head, generator = core.head(name), torch.Generator().manual_seed(0)
    images, state, noise = (
        torch.randn(2, *shape, generator=generator)
        for shape in ((1, 3, 64, 64), (core.config.max_state_dim,), (head.num_tokens, head.token_dim))
    )
    present, text = torch.ones(2, 1, dtype=torch.bool), torch.arange(10).view(2, 5)
    batch = Batch(images, present, text, text < 9, state, present[:, 0], targets={})
    return core.sample(batch, name, noise, num_steps=2)


def local_bytes(tensors: list[Tensor]) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class Notes:
    """What FSDP did in a run: parameters gathered and gradients reduced, their types, and the bytes kept here."""

    def __init__(self):
        self.clear()
        gather, reduce, save = param_group.foreach_all_gather, param_group.foreach_reduce, run.save_checkpoint

        def foreach_all_gather(params, *args):
            self.gathered.update(param._param_fqn for param in params)
            self.gathered_as |= {param._param_fqn: str(param.param_dtype or param.orig_dtype) for param in params}
            return gather(params, *args)

        def foreach_reduce(params, gradients, group, stream, comm, orig_dtype, reduce_dtype, *args):
            self.reduced.update(param._param_fqn for param in params)
            self.types["reduced"].add(str(reduce_dtype or gradients[0].dtype))
            return reduce(params, gradients, group, stream, comm, orig_dtype, reduce_dtype, *args)

        def save_checkpoint(config, state, accelerator, *args):
            self.measure(state)
            with accelerator.autocast():
                self.generated = probe(state.module).tolist()
            save(config, state, accelerator, *args)

        param_group.foreach_all_gather, param_group.foreach_reduce = foreach_all_gather, foreach_reduce
        run.save_checkpoint = save_checkpoint
        forward = nn.Linear.forward

        def checked_forward(module: nn.Linear, x: Tensor) -> Tensor:
            assert not isinstance(module.weight, DTensor), "a layer computes with sharded weights"
            return forward(module, x)

        nn.Linear.forward = checked_forward

    def clear(self) -> None:
        self.gathered, self.reduced = Counter(), Counter()  # parameters' names
        self.gathered_as = {}
        self.types = defaultdict(set)  # of what, str(dtype)
        self.bytes, self.generated = {}, []

    def measure(self, state) -> None:
        parameters = list(state.module.parameters())
        moments = [tensor for of_parameter in state.optimizer.state.values() for tensor in of_parameter.values()]
        assert all(isinstance(tensor, DTensor) for tensor in [*parameters, *state.ema.values()])
        self.types["kept"] |= {str(tensor.dtype) for tensor in [*parameters, *moments]}
        groups = {"parameters": parameters, "optimizer": moments, "ema": list(state.ema.values())}
        self.bytes = {name: local_bytes(tensors) for name, tensors in groups.items()}

    def take(self) -> dict:
        types = {what: sorted(found) for what, found in self.types.items()}
        taken = {"gathered": self.gathered, "gathered_as": self.gathered_as, "reduced": self.reduced}
        taken |= {"types": types, "bytes": self.bytes, "generated": self.generated}
        self.clear()
        return taken


def main(config: str, notes_dir: Path, jobs: dict[str, list[str]]) -> None:
    use_config(config)
    force_fsdp()
    autocast_layer_norm()
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")
    notes = Notes()
    for name, (script, *arguments) in jobs.items():
        module = importlib.import_module(script)
        config_class = {"train_stage2": "Stage2Config", "train_stage3": "Stage3Config"}[script]
        module.main(tyro.cli(getattr(module, config_class), args=arguments))
        rank = torch.distributed.get_rank()
        (notes_dir / f"{name}{rank}.json").write_text(json.dumps(notes.take()))
        torch.distributed.barrier()  # the next job reads what the first process has written
        AcceleratorState._reset_state()
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
