"""What decides the speed on a GPU and can be counted without one: kernels, casts, bytes, graphs. Nothing is timed.

python benchmarks/gpu_counts.py    # the table in docs/performance.md, two minutes

Kernels and casts are those of real steps of both models, of tiny widths at the 500M depth, on a CPU: how many there are
depends on the depth alone. An operator that writes memory counts as one kernel. As on a GPU, RMSNorm counts as one
kernel forward and one backward, and the cast of a layer's weights as one. autocast follows the CPU's lists, which
differ from CUDA's in LayerNorm. Bytes are counted at the 500M shape on fake tensors. The optimizer is left out.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare_smolvla import draw, make_lerobot, make_ours, observe, our_batch, our_loss, write_trunk  # beside this file
from memory import TRUNK, allocate, make_batch, make_core, trunk_core_config
from memory import Options as Pass
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolvla_shared.config import ACTION, LATENT
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import compile_layers

SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")  # the host waits for the device
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "attention")


def size_of(tensor: Tensor) -> int:
    """Bytes of memory that a kernel reads or writes; an expanded dimension is read once."""
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(lengths).numel() * tensor.element_size()


class Counter(TorchDispatchMode):
    """Counts the operators within this context."""

    def __init__(self):
        super().__init__()
        self.kernels = self.casts = self.syncs = self.elementwise_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.syncs += name.startswith(SYNCS)
        memory = {x.untyped_storage()._cdata for x in read}
        is_view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in memory for x in written)
        if is_view or name.startswith("empty") or name == "new_empty":
            return out
        self.kernels += 1
        self.casts += name in ("_to_copy", "copy_", "_foreach_copy_") and len({x.dtype for x in [*read, *written]}) > 1
        if not any(product in name for product in PRODUCTS):
            self.elementwise_bytes += sum(map(size_of, read + written))
        return out


class _Norm(torch.autograd.Function):
    """RMSNorm in as many operators as CUDA has kernels for it; only shapes and types are right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = torch.addcmul(x, gradient, weight)
        return gradient, gradient[(0,) * (gradient.ndim - 1)] if weight.requires_grad else None


class AsOnGPU(TorchFunctionMode):
    """What is done otherwise on a GPU: norms are one kernel, and kernels.VisionMLP has its activation in a product."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.is_cuda.__get__:
            return True
        return _Norm.apply(args[0], kwargs["weight"]) if func is nn.functional.rms_norm else func(*args, **kwargs)


def count(run: Callable[[], Tensor], precision: str) -> Counter:
    """Count a run and, if gradients are wanted, its backward pass, which is outside of autocast as in training."""
    with AsOnGPU(), Counter() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            result = run()
        if result.requires_grad:
            result.backward()
    return counter


def write_deep_trunk(directory: Path) -> None:
    """A SmolVLM of tiny widths at the 500M depth, as both models load it."""
    write_trunk(directory, quick=True)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"] = 16, 12
    (directory / "config.json").write_text(json.dumps(config))


def loss_of(core: SmolVLASharedCore, **options: Any) -> Callable[[], Tensor]:
    """The loss of a step of ours, on fresh gradients and without the optimizer."""
    batch = our_batch(core, observe(2, core.config.image_size), **options)
    return lambda: our_loss(core, batch)


def our_counts(trunk: Path, precision: str) -> dict[str, Counter]:
    def core(frozen: bool = True) -> SmolVLASharedCore:
        fresh = make_ours(trunk)
        if frozen and precision == "bf16":  # as initial.py builds it
            fresh.trunk.to(torch.bfloat16)
        return fresh if frozen else fresh.requires_grad_(True)

    trained = core()
    noise, batch = draw(trained, ACTION, 1, 1)[0][:, 0], our_batch(trained, observe(1, trained.config.image_size))
    runs = {
        "training step, frozen trunk": loss_of(core()),
        "training step, all trains": loss_of(core(frozen=False)),
        "training step from the feature cache": loss_of(core(), cached=True),
        "training step on both heads": loss_of(core(), heads=(ACTION, LATENT)),
        "action chunk, 10 Euler steps": partial(trained.sample, batch, ACTION, noise, 10),
    }
    return {name: count(run, precision) for name, run in runs.items()}


def lerobot_counts(trunk: Path, precision: str) -> dict[str, Counter]:
    policy = make_lerobot(trunk)
    if precision == "bf16":  # as it loads a trunk; its expert and projections are float32
        policy.model.vlm_with_expert.vlm.to(torch.bfloat16)
    observation = observe(2, policy.config.resize_imgs_with_padding[0])
    runs = {
        "training step, frozen trunk": lambda: policy(observation)[0],
        "action chunk, 10 Euler steps": partial(policy.predict_action_chunk, observe(1, 64)),
    }
    return {name: count(run, "no") for name, run in runs.items()}


def count_graphs(trunk: Path) -> int:
    """Compiled graphs of a bf16 run on both heads: three lengths of text, evaluation, samples of three batch sizes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    core = make_ours(trunk)
    core.trunk.to(torch.bfloat16)  # as initial.py builds it
    core.forward, core.sample = (torch.autocast("cpu", torch.bfloat16)(run) for run in (core.forward, core.sample))
    compile_layers(core, backend="eager")
    for length in (16, 32, 48):
        batch = our_batch(core, observe(4, core.config.image_size), heads=(ACTION, LATENT))
        tokens = torch.ones(4, length, dtype=torch.int64)
        batch = replace(batch, text=tokens, text_mask=tokens > 0)
        our_loss(core, batch).backward()
        with torch.no_grad():
            our_loss(core.eval(), batch)
            core.train()
    for size in (4, 2, 1):
        batch = our_batch(core, observe(size, core.config.image_size))
        core.sample(batch, ACTION, draw(core, ACTION, size, 1)[0][:, 0], 2)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_bytes() -> dict[str, float]:
    """GB at the 500M shape in bf16, 64 samples of two pictures and a frozen trunk."""
    config = replace(trunk_core_config("SmolVLM2-500M", cameras=2), torch_dtype="bfloat16")
    core = make_core(config, TRUNK)
    saved = {}
    with FakeTensorMode():
        allocate(core, layers_in_bf16=False)
        batch = make_batch(core.config, Pass(samples=64))
        known = {p.untyped_storage()._cdata for p in core.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: saved.update({x.untyped_storage()._cdata: x.untyped_storage()}) or x, lambda x: x
            ),
            AsOnGPU(),
            Counter() as step,
        ):
            with torch.autocast("cpu", torch.bfloat16):
                loss = core(batch)[ACTION].mean()
            loss.backward()
        patches = torch.empty(128, 1024, 768, dtype=core.trunk.vlm.dtype)
        with torch.no_grad(), AsOnGPU(), Counter() as layer:
            core.trunk.vlm.vision_model.encoder.layers[0](patches, None)
    return {
        "element-wise, a vision layer of 128 pictures": layer.elementwise_bytes / 1e9,
        "element-wise, the whole step": step.elementwise_bytes / 1e9,
        "saved for the backward pass": sum(s.nbytes() for key, s in saved.items() if key not in known) / 1e9,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        trunk = Path(directory)
        write_deep_trunk(trunk)
        theirs, ours = ({p: of(trunk, p) for p in ("no", "bf16")} for of in (lerobot_counts, our_counts))
        graphs = count_graphs(trunk)
    columns = [("no", "kernels"), ("bf16", "kernels"), ("bf16", "casts"), ("bf16", "syncs")]
    print("| LeRobot; ours | kernels, float32 | kernels, bf16 | casts, bf16 | host syncs |\n|---|---|---|---|---|")
    for name in ours["no"]:
        cells = [[of[p].get(name) for of in (theirs, ours)] for p, _ in columns]
        pairs = [[f"{getattr(c, what):,}" if c else "" for c in pair] for pair, (_, what) in zip(cells, columns)]
        print(f"| {name} | " + " | ".join("; ".join(pair) for pair in pairs) + " |")
    print(f"\ncompiled graphs: {graphs}")
    for name, gigabytes in count_bytes().items():
        print(f"GB {name}: {gigabytes:.1f}")


if __name__ == "__main__":
    main()
