"""benchmarks/memory.py: its arithmetic is what a real, tiny training step takes."""

import json

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from benchmarks.memory import (
    TRUNKS,
    Options,
    PeakBytes,
    activation_bytes,
    forward_and_backward,
    make_batch,
    make_core,
    state_bytes,
    trunk_core_config,
)
from smolvla_shared.config import CoreConfig, ModelConfig
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import configure_layers, freeze
from smolvla_shared.trunk_files import make_core_config

OPTIONS = Options(samples=4, cameras=2, text_tokens=6)
FROZEN = ["vision tower", "connector"]


@pytest.fixture
def config() -> CoreConfig:
    cameras = ("observation.images.top", "observation.images.wrist")
    return make_core_config(ModelConfig(preset="tiny"), cameras, state_dim=4, action_dim=4, chunk_size=6)


def real_core(config: CoreConfig, checkpointing: bool = False) -> SmolVLASharedCore:
    core = SmolVLASharedCore(config)
    freeze(core, FROZEN)
    configure_layers(core, ModelConfig(activation_checkpointing=checkpointing))
    return core


def size_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_gradients_and_optimizer_are_those_of_a_real_step(config):
    core = real_core(config)
    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    forward_and_backward(core, make_batch(config, OPTIONS))
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    gradients = [parameter.grad for parameter in core.parameters() if parameter.grad is not None]
    expected = {
        "weights": size_of(core.parameters()),
        "gradients": size_of(gradients),
        "optimizer": size_of(moments),
    }
    assert 0 < expected["gradients"] < expected["weights"]
    assert state_bytes(make_core(config, FROZEN)) == expected
    assert state_bytes(make_core(config, FROZEN), 2) == {name: size / 2 for name, size in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_pass_is_the_profilers(config, checkpointing, tmp_path):
    """PyTorch's profiler counts every allocation of a real pass; what a kernel needs within itself comes on top."""
    core, batch = real_core(config, checkpointing), make_batch(config, OPTIONS)
    for parameter in core.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with torch.profiler.profile(profile_memory=True) as profiler:
        forward_and_backward(core, batch)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    live = peak = 0
    for event in events:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    found = activation_bytes(make_core(config, FROZEN, checkpointing), OPTIONS, sharded=False)
    assert found == pytest.approx(peak, rel=0.1)


def test_peak_bytes_knows_when_tensors_die():
    with FakeTensorMode():
        kept = torch.empty(10)
        with PeakBytes([kept]) as tracker:
            a = torch.empty(1000)
            b = a + 1
            a.add_(b)  # in place: nothing new
            view = b[:5]
            del a
            kept.add_(1)
            c = torch.empty(500)
            del b, view, c
    assert (tracker.peak, tracker.live) == (8000, 0)


def test_the_shapes_are_those_of_the_trunks():
    """LeRobot's SmolVLA has 450,046,176 parameters; its output layer and one more norm we do not keep. The hub says
    507M and 2.25B parameters of the whole trunks."""
    core = make_core(trunk_core_config("SmolVLM2-500M", cameras=1), [])
    assert sum(p.numel() for p in core.parameters()) == 450_046_176 - 49280 * 960 - 960
    for trunk, millions in (("SmolVLM2-500M", 507), ("SmolVLM2-2.2B", 2247)):
        with torch.device("meta"):
            vlm = SmolVLMForConditionalGeneration(SmolVLMConfig(**TRUNKS[trunk], tie_word_embeddings=False))
        assert round(sum(p.numel() for p in vlm.parameters()) / 1e6) == millions
