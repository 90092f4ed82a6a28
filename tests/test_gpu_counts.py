"""benchmarks/gpu_counts.py: its counter, and the counts that our model must keep."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from gpu_counts import AsOnGPU, Counter, count_bytes, count_graphs, our_counts, write_deep_trunk

# Kernels and casts of a step in bfloat16, a little more than in docs/performance.md.
BUDGETS = {
    "training step, frozen trunk": (2_150, 45),
    "training step, all trains": (2_500, 240),
    "training step from the feature cache": (2_000, 45),
    "training step on both heads": (3_200, 50),
    "action chunk, 10 Euler steps": (3_750, 60),
}


def test_kernels_casts_syncs_and_bytes_are_counted():
    x, row = torch.zeros(4, 6), torch.zeros(6)
    with Counter() as counter:
        x.view(6, 4).T.unsqueeze(0)[0, 1:]  # views
        torch.empty(3)
        x.add_(1)
        x + row.expand(4, 6)  # the row is read once
        x.bfloat16()
        x @ x.T  # a product is not element-wise
        row[0].item()
    assert (counter.kernels, counter.casts, counter.syncs) == (4, 1, 1)
    assert counter.elementwise_bytes == (96 + 96) + (96 + 24 + 96) + (96 + 48)


def test_a_norm_counts_as_one_kernel_forward_and_one_backward():
    x, norm = torch.randn(3, 8, requires_grad=True), torch.nn.RMSNorm(8)
    gradient = torch.ones(3, 8)
    with AsOnGPU(), Counter() as forward:
        y = norm(x)
    with Counter() as backward:
        torch.autograd.grad(y, [x, norm.weight], gradient)
    assert (forward.kernels, backward.kernels) == (1, 1)


def test_a_run_compiles_few_graphs(tmp_path):
    """A layer of vision; of the trunk and each kind of the expert, with and without gradients. All for one sample."""
    write_deep_trunk(tmp_path)
    assert count_graphs(tmp_path) == (1 + 3 * 2) + 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_step_keeps_its_budget_and_never_waits_for_the_device(tmp_path):
    write_deep_trunk(tmp_path)
    counts = our_counts(tmp_path, "bf16")
    assert {name: counter.syncs for name, counter in counts.items()} == dict.fromkeys(BUDGETS, 0)
    for name, (kernels, casts) in BUDGETS.items():
        found = counts[name].kernels, counts[name].casts
        assert 0.95 * kernels < found[0] <= kernels and found[1] <= casts, f"{name}: {found}"


def test_a_step_keeps_its_budget_of_bytes():
    found = count_bytes()
    budgets = {"element-wise, a vision layer of 128 pictures": 2.1, "element-wise, the whole step": 53}
    budgets["saved for the backward pass"] = 2.3
    assert found.keys() == budgets.keys()
    for name, gigabytes in budgets.items():
        assert 0.9 * gigabytes < found[name] <= gigabytes, f"{name}: {found[name]}"
