"""The same numbers in fewer GPU kernels: a layer's weights cast as one, an activation within a matrix product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionMLP


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tensors of one type in another. A GPU casts as many as a layer has in one kernel."""
    out = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(out, tensors)
    return out


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)  # a tensor that nothing has used gets no gradient
        return cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = [needs and gradient is not None for needs, gradient in zip(ctx.needs_input_grad[1:], gradients)]
        found = iter(cast([gradient for gradient, is_needed in zip(gradients, needed) if is_needed], ctx.dtype))
        return None, *(next(found) if is_needed else None for is_needed in needed)


class LowWeights:
    """Within this context the linear layers and RMS norms of these modules have weights of type `dtype`.

    autocast would cast each weight by itself, and each gradient back, to the same numbers. They are cast when this
    object is made, so make it right before its first use: autograd casts the gradients when it gets back to that point,
    and DDP sums those of a layer while it computes those of the layers before.

    Left to others are the weights of a graph that is being compiled, and sharded ones, which FSDP casts.
    """

    def __init__(self, dtype: torch.dtype, *modules: nn.Module):
        self.slots: list[tuple[dict[str, Tensor], str]] = []
        if not torch.compiler.is_compiling():
            parts = [part for module in modules for part in module.modules()]
            owners = [part._parameters for part in parts if isinstance(part, (nn.Linear, nn.RMSNorm))]
            self.slots = [(own, name) for own in owners for name, p in own.items() if self.casts(p, dtype)]
        self.full = [own[name] for own, name in self.slots]
        self.low = _Cast.apply(dtype, *self.full) if self.slots else ()

    @staticmethod
    def casts(parameter: Tensor | None, dtype: torch.dtype) -> bool:
        return parameter is not None and parameter.dtype != dtype and not isinstance(parameter, DTensor)

    def _set(self, tensors: Sequence[Tensor]) -> None:
        for (own, name), tensor in zip(self.slots, tensors, strict=True):
            own[name] = tensor

    def __enter__(self) -> None:
        self._set(self.low)

    def __exit__(self, *_: object) -> None:
        self._set(self.full)


class VisionMLP(SmolVLMVisionMLP):
    """A vision layer's MLP. Without gradients, CUDA's product of fc1 also adds the bias and takes the activation: its
    output, four times as wide as the layer, is written once instead of written, read and written.
    """

    def forward(self, hidden: Tensor) -> Tensor:  # [B, L, width] -> [B, L, width]
        fc1, rows = self.fc1, hidden.flatten(0, 1)
        # This GELU is the tanh approximation on CUDA, and the exact one on a CPU. An adapter's fc1 is no plain product.
        fuses = hidden.is_cuda and not torch.is_grad_enabled() and self.config.hidden_act == "gelu_pytorch_tanh"
        if not fuses or type(fc1) is not nn.Linear or hidden.dtype != fc1.weight.dtype:
            return super().forward(hidden)
        return self.fc2(torch._addmm_activation(fc1.bias, rows, fc1.weight.T, use_gelu=True)).view(hidden.shape)
