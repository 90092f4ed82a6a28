"""Memory of a training step on each GPU, for every configuration in configs/accelerate; needs no GPU.

python benchmarks/memory.py                                  # the table in docs/scaling.md, a minute
python benchmarks/memory.py --samples 32 --cameras 3         # another forward pass

Nothing is allocated: the models live on the meta device and in FakeTensorMode, which knows shapes, types and lifetimes.
Counted on each GPU: weights, in float32 but for a frozen trunk; gradients and AdamW's two moments of trained weights;
the peak of the tensors in a forward and backward pass of --samples samples in bfloat16; FSDP2's gathered units. Not
counted: CUDA's context and libraries (about 1 GB), fragmentation, and an online teacher (1.4 GB for LAPA's).
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SmolVLMConfig

from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import ACTION, CoreConfig, ModelConfig
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import configure_layers, freeze, layers

# The trunks' shapes on the hub, where they differ from transformers' defaults.
TRUNKS: dict[str, dict[str, Any]] = {
    "SmolVLM2-500M": {
        "scale_factor": 4,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
    },
    "SmolVLM2-2.2B": {
        "scale_factor": 3,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 64,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    },
}
VISION = ["vision tower", "connector"]
TRUNK = [*VISION, "language layers"]
# (names, processes that share the model, sharded) of the files in configs/accelerate. DDP takes what one GPU takes: its
# gradients live in its buckets (run_processes.py).
CONFIGURATIONS = (
    ("gpu_bf16, ddp_8gpu", 1, False),
    ("fsdp2_8gpu", 8, True),
    ("fsdp2_multinode, 16 GPUs", 16, True),
)


@dataclass(frozen=True)
class Options:
    """Memory of a training step on each GPU."""

    # Samples in a forward pass on a GPU: --batch-size / (processes * --accumulation-steps).
    samples: int = 8
    # Images of a sample.
    cameras: int = 2
    # Text tokens of a sample.
    text_tokens: int = 24


def make_core(config: CoreConfig, frozen: list[str], checkpointing: bool = False) -> SmolVLASharedCore:
    """A core on the meta device."""
    with torch.device("meta"):
        core = SmolVLASharedCore(config)
    freeze(core, frozen)
    configure_layers(core, ModelConfig(activation_checkpointing=checkpointing))
    return core


def trunk_core_config(trunk: str, cameras: int) -> CoreConfig:
    vlm = SmolVLMConfig(**TRUNKS[trunk]).to_dict()
    names = tuple(f"observation.images.{index}" for index in range(cameras))
    side = vlm["vision_config"]["image_size"]
    return CoreConfig(trunk, None, vlm, names, side, state_dim=6, action_dim=6, chunk_size=50)


def state_bytes(core: nn.Module, num_processes: int = 1) -> dict[str, float]:
    """Bytes that each of the processes that share the model keeps from step to step."""
    parameters = list(core.parameters())
    trained = [p for p in parameters if p.requires_grad]
    size = {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": sum(2 * p.numel() * p.element_size() for p in trained),
    }
    return {name: value / num_processes for name, value in size.items()}


class PeakBytes(TorchDispatchMode):
    """Within this context: the peak of the bytes that are allocated in it, without the `known` tensors."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._allocate(tensor.untyped_storage())
        return out

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def allocate(core: SmolVLASharedCore, layers_in_bf16: bool) -> None:
    """Give a core of the meta device weights and gradients on the CPU, which FakeTensorMode makes fake."""
    of_layers = {id(p) for layer in layers(core) for p in layer.parameters()} if layers_in_bf16 else set()
    for module in core.modules():
        for name, p in module._parameters.items():
            if p is not None:
                dtype = torch.bfloat16 if id(p) in of_layers and p.dim() > 1 else p.dtype
                fake = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
                fake.grad = torch.empty_like(fake) if p.requires_grad else None
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def activation_bytes(core: SmolVLASharedCore, options: Options, sharded: bool) -> int:
    """The peak of a forward and backward pass in bfloat16, without weights, gradients and the batch.

    autocast keeps a bfloat16 copy of each trained weight. If the model is sharded, FSDP2 gathers the layers' weights in
    bfloat16, and there is no copy.
    """
    with FakeTensorMode():
        allocate(core, layers_in_bf16=sharded)
        batch = make_batch(core.config, options)
        known = [*core.parameters(), *core.buffers(), *(p.grad for p in core.parameters() if p.requires_grad)]
        with PeakBytes([*known, *tensors_of(batch)]) as tracker:
            forward_and_backward(core, batch)
    return tracker.peak


def tensors_of(batch: Batch) -> list[Tensor]:
    values = [*vars(batch).values(), *vars(batch.targets[ACTION]).values()]
    return [value for value in values if isinstance(value, Tensor)]


def make_batch(config: CoreConfig, options: Options) -> Batch:
    size, tokens = options.samples, (config.chunk_size, config.max_action_dim)

    def true(*shape: int) -> Tensor:
        return torch.ones(size, *shape, dtype=torch.bool)

    value, noise, time = torch.zeros(size, *tokens), torch.zeros(size, 1, *tokens), torch.zeros(size, 1)
    return Batch(
        torch.zeros(size, options.cameras, 3, config.image_size, config.image_size),
        true(options.cameras),
        torch.zeros(size, options.text_tokens, dtype=torch.int64),
        true(options.text_tokens),
        torch.zeros(size, config.max_state_dim),
        true(),
        {ACTION: FlowTarget(value, true(config.chunk_size), noise, time)},
    )


def forward_and_backward(core: SmolVLASharedCore, batch: Batch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = core(batch)[ACTION].mean()
    loss.backward()


def unit_bytes(core: SmolVLASharedCore) -> int:
    """FSDP2's gathered units: two layers in bfloat16 (one computes, one arrives) with a float32 gradient to sum, and
    what is in no layer, as it is stored.
    """
    in_layers = [sum(p.numel() for p in layer.parameters()) for layer in layers(core)]
    of_layers = {id(p) for layer in layers(core) for p in layer.parameters()}
    rest = sum(p.nbytes for p in core.parameters() if id(p) not in of_layers)
    return 2 * 2 * max(in_layers) + 4 * max(in_layers) + rest


def main(options: Options) -> None:
    print(f"GB a GPU; {options.samples} samples in a forward pass, {options.cameras} images each\n")
    print("| trunk | trains | configuration | weights | gradients | optimizer ", end="")
    print("| activations; with checkpointing | units | total; with checkpointing |")
    print("|---|---|---|---|---|---|---|---|---|")
    for trunk in TRUNKS:
        config = trunk_core_config(trunk, options.cameras)
        for trains, frozen in (("expert", TRUNK), ("all", [])):
            # A frozen trunk is stored in bfloat16 (initial.py).
            config = replace(config, torch_dtype="bfloat16" if frozen else "float32")
            core = make_core(config, frozen)
            units = unit_bytes(core)
            peaks = {
                sharded: [activation_bytes(make_core(config, frozen, kept), options, sharded) for kept in (False, True)]
                for sharded in (False, True)
            }
            for name, number, sharded in CONFIGURATIONS:
                state = state_bytes(core, number)
                extra = units if sharded else 0
                activations = "; ".join(f"{peak / 1e9:.1f}" for peak in peaks[sharded])
                totals = "; ".join(f"{(sum(state.values()) + peak + extra) / 1e9:.1f}" for peak in peaks[sharded])
                cells = [f"{value / 1e9:.1f}" for value in state.values()] + [activations, f"{extra / 1e9:.1f}", totals]
                print(f"| {trunk} | {trains} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
