"""gpu_check.py on a CPU: what can run passes, what cannot says why, and what is wrong is called so."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import make_core

from smolvla_shared import gpu_checks
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import LATENT
from smolvla_shared.lerobot_files import save_policy
from smolvla_shared.normalization import Statistics
from smolvla_shared.trunk_files import load_trunk_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
def test_without_a_gpu_what_a_cpu_can_do_passes(server, tmp_path):
    call = "import os, pathlib, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; from smolvla_shared import gpu_check; "
    call += f"gpu_check.main(gpu_check.Options(pathlib.Path({str(tmp_path / 'out')!r})))"
    code, printed = run_forked(server, ["-c", call], tmp_path / "printed.txt")
    assert code == 0, printed
    results = {result["check"]: result for result in json.loads((tmp_path / "out" / "report.json").read_text())}
    passed = ["environment", "the CPU's numbers", *(f"{s} in bfloat16" for s in (*gpu_checks.STAGES, "sampling"))]
    assert [name for name, result in results.items() if result["state"] == "passed"] == passed
    assert {result["state"] for result in results.values()} == {"passed", "did not run"}
    for name, result in results.items():
        assert name in passed or (not result["found"] and "GPU(s), there are 0" in result["why"])
    for name in passed[2:]:
        assert 1e-4 < results[name]["found"]["apart"] < 0.05  # it did compute in another precision
    assert "6 passed, 0 failed, 15 did not run" in (tmp_path / "out" / "report.txt").read_text()


def test_a_check_that_fails_is_called_failed(tmp_path, monkeypatch, capsys):
    def far(machine: gpu_checks.Machine):
        return gpu_checks.within(0.3, 0.05)

    monkeypatch.setattr(
        gpu_checks, "CHECKS", {"far": far, "two GPUs": lambda m: m.needs_gpus(99), "fine": lambda m: {}}
    )
    with pytest.raises(SystemExit, match="True"):
        gpu_checks.check(tmp_path / "out")
    found = [(result["state"], result["why"]) for result in json.loads((tmp_path / "out/report.json").read_text())]
    why = f"needs 99 GPU(s), there are {torch.cuda.device_count()}"
    assert found == [("failed", "ValueError: 30.00% apart, more than 5%"), ("did not run", why), ("passed", "")]


def test_numbers_that_are_apart_or_not_finite_fail():
    lines = [{"step": 1, "loss/a": 2.0, "grad_norm": 4.0, "time/data": 1.0}]
    assert gpu_checks.apart([lines[0] | {"loss/a": 2.1, "grad_norm": 3.6, "time/data": 9.0}], lines) == pytest.approx(
        0.1
    )
    with pytest.raises(ValueError, match="apart"):
        gpu_checks.within(gpu_checks.apart([lines[0] | {"loss/a": math.nan}], lines), 0.05)


def test_a_compiled_sampler_is_compared_and_timed(tmp_path, monkeypatch):
    """What a GPU is asked, here of a tiny policy on the CPU that is traced and not compiled."""
    import gpu

    core = make_core(latent_vector_dim=0, code_seq_len=0, action_dim=4, chunk_size=8)
    tokenizer, plain = load_trunk_tokenizer("tiny", None), Statistics((0.0,) * 4, (1.0,) * 4)
    statistics = {"state": plain, "action": plain}
    save_policy(tmp_path / "policy", core.config, core.state_dict(), tokenizer, statistics, 4, {})
    compile, compiled = torch.compile, []

    def traced(function, mode=None, **options):
        compiled.append(mode)
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    share, seconds = gpu.compiled_sampler(tmp_path / "policy", torch.device("cpu"))
    assert share < 1e-5 and compiled.count("max-autotune") == 1  # the others are layers, which train
    assert seconds.keys() == {f"{name}, {what}" for name in ("plain", "compiled") for what in ("load", "chunk")}
    assert min(seconds.values()) > 0


def test_another_activation_would_be_noticed():
    """On a CPU the operator's is the exact GELU."""
    import gpu
    from gpu_counts import AsOnGPU

    assert gpu.activation_apart(gpu_checks.CPU) == 0
    with AsOnGPU():
        assert gpu.activation_apart(gpu_checks.CPU) > 5 * gpu_checks.SAME_PRODUCT


def test_kernels_are_counted_and_both_models_train():
    """What a GPU is asked at the 500M shape, here of tiny models on the CPU."""
    import gpu

    core, present = make_core(), torch.ones(2, 1, dtype=torch.bool)
    shape = 2, 1, core.config.code_seq_len, core.config.latent_dim
    target = FlowTarget(
        torch.zeros(shape)[:, 0], torch.ones(shape[::2], dtype=torch.bool), torch.zeros(shape), torch.ones(2, 1)
    )
    text = torch.arange(12).view(2, 6)
    state = torch.zeros(2, core.config.max_state_dim)
    batch = Batch(torch.zeros(2, 1, 3, 64, 64), present, text, text < 11, state, present[:, 0], {LATENT: target})
    found = gpu.attention_kernels(core, batch)
    assert found.keys() == {"float32", "bfloat16"}
    attending = len(core.trunk.vlm.vision_model.encoder.layers) + len(core.trunk.vlm.text_model.layers)
    assert all(sum(kernels.values()) >= attending for kernels in found.values())
    rates = gpu.samples_a_second(torch.device("cpu"), (2,), quick=True)
    assert rates.keys() == {"LeRobot, B = 2", "ours, B = 2"} and min(rates.values()) > 0
