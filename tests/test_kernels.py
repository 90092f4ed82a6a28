"""kernels.py: weights cast as one are those of separate casts, an activation within a product is that of two steps."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from smolvla_shared.kernels import LowWeights, VisionMLP

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from gpu_counts import AsOnGPU, Counter


def test_weights_are_low_within_the_context_alone():
    module = nn.ModuleDict({"a": nn.Linear(4, 3), "norm": nn.RMSNorm(4), "layer_norm": nn.LayerNorm(4)})
    module["low"] = nn.Linear(4, 3, dtype=torch.bfloat16)
    own, expected = dict(module.named_parameters()), module["a"].weight.bfloat16()
    low = LowWeights(torch.bfloat16, module)
    with pytest.raises(ZeroDivisionError), low:
        found = module["a"].weight
        dtypes = {name: part.weight.dtype for name, part in module.items()}
        raise ZeroDivisionError
    assert torch.equal(found, expected)
    assert dtypes.pop("layer_norm") == torch.float32  # autocast computes these in float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert all(parameter is own[name] for name, parameter in module.named_parameters())
    assert not LowWeights(torch.float32, module["a"]).slots


def test_gradients_come_back_in_one_kernel_and_only_to_what_was_used():
    used, unused, frozen = (nn.Linear(4, 4, bias=False) for _ in range(3))
    frozen.requires_grad_(False)
    x = torch.arange(8).view(2, 4).bfloat16()  # whole numbers: their sums are exact
    with Counter() as forward, LowWeights(torch.bfloat16, used, unused, frozen):
        y = used(x) + frozen(x)
    with Counter() as backward:
        y.sum().backward()
    assert (forward.casts, backward.casts) == (1, 1)
    assert used.weight.grad.dtype == torch.float32 and torch.equal(used.weight.grad, x.float().sum(0).expand(4, 4))
    assert unused.weight.grad is None and frozen.weight.grad is None


def make_mlp(activation: str = "gelu_pytorch_tanh") -> VisionMLP:
    config = SmolVLMVisionConfig(hidden_size=16, intermediate_size=32, hidden_act=activation)
    torch.manual_seed(0)
    return VisionMLP(config)


@torch.no_grad()
def test_a_product_with_its_activation_equals_two_steps():
    mlp, x = make_mlp(), torch.randn(2, 5, 16)
    with AsOnGPU(), Counter() as counter:
        found = mlp(x)
    # On a CPU the operator takes the exact GELU, on CUDA the approximation (gpu_check compares that one).
    torch.testing.assert_close(found, mlp.fc2(F.gelu(mlp.fc1(x))))
    assert counter.kernels == 2
    plain = mlp(x)
    torch.testing.assert_close(plain, mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))
    assert not torch.equal(plain, found)


def test_what_a_product_cannot_take_within_it_stays_two_steps():
    x = torch.randn(2, 5, 16)
    trained, other, adapted = make_mlp(), make_mlp("silu"), make_mlp()
    adapted.fc1 = nn.Sequential(adapted.fc1, nn.Dropout(0.0))
    for mlp, grad in ((trained, True), (other, False), (adapted, False)):
        with torch.set_grad_enabled(grad):
            expected = mlp(x)
            with AsOnGPU():
                assert torch.equal(mlp(x), expected)
