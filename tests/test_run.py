"""run.py: a step is what its formula says however it is split, and a resumed run is the run it goes on with."""

import importlib
import math
import os
import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from forked import run_forked
from helpers import (
    Points,
    Regression,
    equal,
    make_accelerator,
    make_config,
    make_core,
    metrics_of,
    points,
    train,
    train_points,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smolvla_shared import data, data_loader, data_rows, data_split, robots, run
from smolvla_shared.batch import Batch, FlowTarget, RawBatch
from smolvla_shared.config import LATENT, DataConfig, OptimConfig, RunConfig
from smolvla_shared.evaluate import held_out_errors
from smolvla_shared.labels import OnlineLabels
from smolvla_shared.laq_files import load_laq
from smolvla_shared.losses import masked_mean
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import freeze
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor
from smolvla_shared.run_optimizer import FiniteGradients, learning_rate
from smolvla_shared.teacher_config import TeacherOptim
from smolvla_shared.trunk_files import load_trunk_tokenizer

# --- a module small enough to train by hand ---------------------------------------------------------------------------


def train_by_hand(config: RunConfig) -> tuple[Regression, list[dict[str, float]]]:
    """The same run as a plain loop, without accumulation, processes or checkpoints."""
    module = Regression()
    trained = [p for p in module.parameters() if p.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=optim.betas, weight_decay=optim.weight_decay)
    average, log = [p.detach().clone() for p in trained], []
    for step in range(config.steps):
        batch = points(step)
        errors = module(batch)
        a, b = (errors[name][batch.masks[name]].mean() for name in ("a", "b"))
        optimizer.zero_grad()
        (a + 0.3 * b).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        progress = max(0.0, (step - optim.warmup_steps) / (config.steps - optim.warmup_steps))
        low = optim.lr * optim.final_lr_share
        cosine = low + (optim.lr - low) * (1 + math.cos(math.pi * progress)) / 2
        rate = min((step + 1) / optim.warmup_steps * optim.lr, cosine)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * p.detach() for old, p in zip(average, trained)]
        log.append({"step": step + 1, "loss/a": a.item(), "loss/b": b.item(), "lr": rate, "grad_norm": norm.item()})
    if config.ema_decay:
        for parameter, value in zip(trained, average):
            parameter.data = value
    return module, log


def assert_close(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_a_run_is_the_plain_loop(tmp_path, accumulation_steps, ema_decay):
    """Masked means over all accumulation steps, loss weights, clipping, schedule and EMA, 6 steps."""
    config = make_config(tmp_path / "run", steps=6, accumulation_steps=accumulation_steps, ema_decay=ema_decay)
    found = train_points(config)
    expected, log = train_by_hand(config)
    assert_close(found, expected)
    assert torch.equal(found.frozen.weight, Regression().frozen.weight)
    assert not torch.allclose(found.heads["a"].weight, Regression().heads["a"].weight, atol=1e-3)
    for line, by_hand in zip(metrics_of(config.run_dir), log, strict=True):
        for key, value in by_hand.items():
            assert line[key] == pytest.approx(value, abs=1e-5), key
        assert line["samples"] == 8 * line["step"]
    norms = [line["grad_norm"] for line in log]
    assert min(norms) < config.optim.max_grad_norm < max(norms)  # clipping happened, and not always


def test_metrics_are_means_since_the_last_line(tmp_path):
    train_points(make_config(tmp_path / "each", steps=7))
    train_points(make_config(tmp_path / "third", steps=7, log_every=3), after_step=lambda step: {f"usage/{step}": step})
    each, third = metrics_of(tmp_path / "each"), metrics_of(tmp_path / "third")
    assert [line["step"] for line in third] == [3, 6, 7]
    for line, steps in zip(third, ([0, 1, 2], [3, 4, 5], [6])):
        assert line["loss/a"] == pytest.approx(sum(each[step]["loss/a"] for step in steps) / len(steps))
        assert [key for key in line if key.startswith("usage/")] == [f"usage/{step + 1}" for step in steps]


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_the_learning_rate_is_linear_then_a_cosine(warmup_steps):
    config = OptimConfig(lr=2e-3, warmup_steps=warmup_steps, final_lr_share=0.1)
    num_steps = 25
    found = [learning_rate(step, num_steps, config) for step in range(num_steps + 1)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps - warmup_steps, eta_min=2e-4)
    assert found[:warmup_steps] == pytest.approx([2e-3 * (step + 1) / 5 for step in range(warmup_steps)])
    for rate in found[warmup_steps:]:
        assert rate == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert found[-1] == pytest.approx(2e-4)


def test_the_warm_up_is_at_most_a_tenth_of_a_run_unless_stated():
    def peak(steps: int, warmup_steps: int | None) -> int:
        config = OptimConfig(lr=1.0, warmup_steps=warmup_steps)
        return [learning_rate(step, steps, config) for step in range(steps)].index(1.0)

    assert [peak(steps, None) for steps in (20, 600, 20_000)] == [1, 59, 499]
    assert peak(600, 300) == peak(300, 300) == 299


def test_the_warm_up_of_a_teacher_is_at_most_a_tenth_of_its_run_unless_stated():
    def rates(steps: int, **options: int) -> list[float]:
        config = TeacherOptim(lr=1.0, **options)
        return [learning_rate(step, steps, config) for step in range(steps)]

    assert [rates(steps).index(1.0) for steps in (10, 200, 20_000)] == [0, 19, 49]
    assert rates(200, warmup_steps=50).index(1.0) == 49


# --- several processes ------------------------------------------------------------------------------------------------


def run_as_one_of_two(directory: Path) -> None:
    """What each process of test_two_processes_equal_one does; the EMA is the main process's alone."""
    accelerator = make_accelerator()
    assert accelerator.num_processes == 2
    config = make_config(directory / "points", steps=5, accumulation_steps=2, ema_decay=0.9)
    module = train_points(config, accelerator)
    if accelerator.is_main_process:
        torch.save(module.state_dict(), directory / "points0.pt")
    core = train_tiny_core(directory / "core", accelerator, accumulation_steps=2)
    torch.save(core.state_dict(), directory / f"core{accelerator.process_index}.pt")

    def signal_the_second(step: int) -> dict[str, float]:
        if step == 20 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {}

    with pytest.raises(SystemExit, match="75"):
        train_tiny_core(directory / "cut", accelerator, after_step=signal_the_second)


def tiny_batches(accelerator: Accelerator, accumulation_steps: int, first_step: int) -> Iterator[Batch]:
    """The passes of one process of 8 samples a step. Latents are valid for 0 to 4 of a sample's slots, in every third
    step only for the first sample: one process has nothing to learn from then."""
    size = 8 // (accelerator.num_processes * accumulation_steps)
    step = first_step
    while True:
        generator = torch.Generator().manual_seed(step)
        normal = [torch.randn(8, *shape, generator=generator) for shape in ((1, 3, 64, 64), (32,), (4, 8), (1, 4, 8))]
        pictures, state, value, noise = normal
        mask = torch.arange(4) < torch.randint(0, 5, (8, 1), generator=generator)
        if step % 3 == 0:
            mask = torch.arange(8)[:, None].expand(8, 4) < 1
        text = torch.randint(0, 50, (8, 6), generator=generator)
        time = torch.rand(8, 1, generator=generator)
        for number in range(accumulation_steps):
            start = (number * accelerator.num_processes + accelerator.process_index) * size
            part = slice(start, start + size)
            target = FlowTarget(value[part], mask[part], noise[part], time[part])
            here = torch.ones(size, 6, dtype=torch.bool)
            yield Batch(pictures[part], here[:, :1], text[part], here, state[part], here[:, 0], {LATENT: target})
        step += 1


def train_tiny_core(run_dir: Path, accelerator: Accelerator, resume_from: Path | None = None, **options):
    """50 steps of the real model."""
    after_step = options.pop("after_step", lambda step: {})
    optim = OptimConfig(lr=1e-4, warmup_steps=10)
    config = make_config(run_dir, **{"steps": 50, "optim": optim, "resume": resume_from is not None} | options)
    core = make_core()

    def batches(first_step: int) -> Iterator[Batch]:
        return tiny_batches(accelerator, config.accumulation_steps, first_step)

    train(config, accelerator, core, batches, after_step=after_step, resume_from=resume_from)
    return core


@pytest.mark.slow
def test_two_processes_equal_one(server, tmp_path):
    call = f"import pathlib, test_run; test_run.run_as_one_of_two(pathlib.Path({str(tmp_path)!r}))"
    code, printed = run_forked(server, ["-c", call], tmp_path / "printed.txt", processes=2)
    assert code == 0, printed
    single = make_accelerator()
    one = {
        "points": train_points(make_config(tmp_path / "one", steps=5, ema_decay=0.9), single).state_dict(),
        "core": train_tiny_core(tmp_path / "one_core", single).state_dict(),
    }
    found = {name: torch.load(tmp_path / f"{name}0.pt") for name in one}
    assert equal(dict(found["core"]), dict(torch.load(tmp_path / "core1.pt")))
    for key, expected in one["points"].items():
        torch.testing.assert_close(found["points"][key], expected, atol=1e-6, rtol=0, msg=key)
    assert_same_losses(tmp_path / "points", tmp_path / "one")
    assert_same_losses(tmp_path / "core", tmp_path / "one_core")
    # Four passes of two samples each are a batch of eight.
    train_tiny_core(tmp_path / "accumulated", single, accumulation_steps=4)
    assert_same_losses(tmp_path / "accumulated", tmp_path / "one_core")
    # Both processes stopped after the same step, though only one got the signal, and one process can go on.
    last = tmp_path / "cut" / "checkpoints" / "last"
    assert last.readlink() in (Path("000021"), Path("000022"))
    train_tiny_core(tmp_path / "cut", single, resume_from=last.resolve())
    assert_same_losses(tmp_path / "cut", tmp_path / "one_core")


def assert_same_losses(run_dir: Path, reference: Path) -> None:
    """Of every step within 1e-5, and everything else that is logged within what rounding makes of it."""
    lines, expected = metrics_of(run_dir), metrics_of(reference)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected):
        for key in line:
            tolerance = 1e-5 if key.startswith("loss/") else 1e-4 * max(1, abs(other[key]))
            assert line[key] == pytest.approx(other[key], abs=tolerance, rel=0), (line["step"], key)


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_the_ema_is_exported_and_training_goes_on_from_the_weights(tmp_path):
    config = make_config(tmp_path / "run", steps=4, save_every=2, ema_decay=0.9)
    exported = {}

    def export(directory: Path, weights: dict[str, Tensor], step: int) -> None:
        exported[step] = weights["heads.a.weight"].clone()

    returned = train_points(config, export=export)
    assert list(exported) == [2, 4]
    for step, weights in exported.items():
        record = torch.load(config.run_dir / "checkpoints" / f"{step:06d}" / "training_state" / "state.pt")
        assert torch.equal(record["ema"]["heads.a.weight"], weights)
        assert not torch.allclose(record["model"]["heads.a.weight"], weights, atol=1e-4)
    assert torch.equal(returned.heads["a"].weight, exported[4])


class Breaks(Regression):
    """In the fourth step the error of sample 5 is not finite, or the gradient of all."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def forward(self, batch: Points) -> dict[str, Tensor]:
        errors = super().forward(batch)
        if "step 3 slot 5" in batch.keys:
            if self.what == "loss":
                errors["a"][batch.keys.index("step 3 slot 5"), 0] = math.nan  # and the gradient is finite
            else:
                weight = self.heads["a"].weight
                errors["a"] = errors["a"] + (weight - weight.detach()).sum().sqrt()  # 0, but its slope is not finite
        return errors


@pytest.mark.parametrize("checks_every_step", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_told_and_never_applied(tmp_path, monkeypatch, what, checks_every_step):
    """On a CPU at once. On a GPU, where asking would stall it, at the next line of the log, with the same outcome."""

    class Gradients(FiniteGradients):
        def __init__(self, *args):
            super().__init__(*args)
            self.checks_every_step = checks_every_step

    monkeypatch.setattr(run, "FiniteGradients", Gradients)
    config = make_config(
        tmp_path / "run", steps=9, save_every=2 if checks_every_step else 7, log_every=6, accumulation_steps=2
    )
    steps_taken = []

    def after_step(step: int) -> dict[str, float]:
        steps_taken.append({name: value.clone() for name, value in module.state_dict().items()})
        return {}

    module = Breaks(what)
    samples = (
        "step 3 slot 5. The batch" if what == "loss" else "step 3 slot 0; step 3 slot 1; .*step 3 slot 7. The batch"
    )
    with pytest.raises(FloatingPointError, match=rf"not finite at step 4: .*: {samples} .*torch.load\('.*process0.pt'"):
        train_points(config, module=module, after_step=after_step)
    assert len(steps_taken) == (4 if checks_every_step else 6)
    assert not torch.equal(steps_taken[1]["heads.a.weight"], steps_taken[2]["heads.a.weight"])
    for later in steps_taken[3:]:
        assert equal(later, steps_taken[2])
    assert not (config.run_dir / "checkpoints" / "000004").exists()
    broken = torch.load(config.run_dir / "not_finite" / "process0.pt", weights_only=True)
    assert broken["step"] == 4
    assert equal(dict(broken["weights"]), steps_taken[2])
    again = Breaks(what)
    again.load_state_dict(broken["weights"])
    batches = [Points(**batch) for batch in broken["batches"]]
    assert [key for batch in batches for key in batch.keys] == points(3).keys
    loss = sum(masked_mean(again(batch)["a"], batch.masks["a"]) for batch in batches)
    loss.backward()
    assert not (loss.isfinite() and again.heads["a"].weight.grad.isfinite().all())
    # The checkpoint of step 2 ended a line; the next would have been that of step 4 or 6.
    assert [line["step"] for line in metrics_of(config.run_dir)] == ([2] if checks_every_step else [])


# --- the real model on recorded video ---------------------------------------------------------------------------------


class Stop(Exception):
    pass


def train_core(
    run_dir: Path,
    video: Path,
    laq_checkpoint: Path,
    resume: bool = False,
    stop_after: int | None = None,
    device: str = "cpu",
    **options,
) -> SmolVLASharedCore:
    """Six steps of Stage 2 on real video, with augmentation, EMA and held-out evaluation."""
    config = make_config(
        run_dir,
        data=DataConfig(roots=(video,), num_workers=0),
        resume=resume,
        val_fraction=0.2,
        **{"steps": 6, "batch_size": 4, "accumulation_steps": 2, "ema_decay": 0.9, "eval_samples": 4} | options,
    )
    accelerator = make_accelerator()
    datasets = data.open_datasets(config.data)
    groups = [
        data_rows.group_rows(frames) for frames in data_split.split_datasets(datasets, config.val_fraction, config.seed)
    ]
    camera = "observation.image"
    labels = OnlineLabels(load_laq(laq_checkpoint), "quantized", (camera,))
    labels.laq.to(device)
    core = make_core().to(device)
    freeze(core, ["vision tower", "connector"])
    spec = data_loader.SampleSpec((camera,), state_dim=4, label_cameras=(camera,), draws={LATENT: (4, 8)})
    loaders = data_loader.make_loaders(datasets, *groups, spec, config, accelerator, random_shift=0.1)
    statistics = {
        LATENT: Statistics((0.0,) * 32, (1.0,) * 32),
        "state": robots.vector_statistics(datasets, data.STATE_KEY),
    }
    preprocessor = Preprocessor(core.config, load_trunk_tokenizer("tiny", None), statistics)

    def prepare(raw) -> Batch:
        return preprocessor(raw, labels(raw))

    def stop(step: int) -> dict[str, float]:
        if step == stop_after:
            raise Stop
        return {}

    def evaluate() -> dict[str, float]:
        return held_out_errors(core, loaders.held_out(), preprocessor, accelerator, labels)

    resume_from = (run_dir / "checkpoints" / "last").resolve() if resume else None
    train(
        config,
        accelerator,
        core,
        loaders.train,
        prepare=prepare,
        evaluate=evaluate if config.eval_every < 100 else None,
        after_step=stop,
        resume_from=resume_from,
    )
    return core


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(tmp_path, video_dataset, laq_checkpoint):
    """Weights, EMA, optimizer and metrics, to the bit; stopped a step after the checkpoint."""
    options = {"save_every": 3, "eval_every": 2, "log_every": 2}
    whole = train_core(tmp_path / "whole", video_dataset, laq_checkpoint, **options)
    with pytest.raises(Stop):
        train_core(tmp_path / "cut", video_dataset, laq_checkpoint, stop_after=5, **options)
    assert (tmp_path / "cut" / "checkpoints" / "last").readlink() == Path("000003")
    assert [line["step"] for line in metrics_of(tmp_path / "cut")] == [2, 3, 4]
    resumed = train_core(tmp_path / "cut", video_dataset, laq_checkpoint, resume=True, **options)
    assert equal(dict(whole.state_dict()), dict(resumed.state_dict()))
    records = [
        torch.load(tmp_path / run / "checkpoints" / "last" / "training_state" / "state.pt", weights_only=True)
        for run in ("whole", "cut")
    ]
    assert records[0].keys() == {"step", "model", "optimizer", "ema"}
    assert records[0]["step"] == 6
    for key, value in records[0].items():
        assert equal(value, records[1][key]), key
    metrics = metrics_of(tmp_path / "whole")
    assert [line["step"] for line in metrics] == [2, 3, 4, 6]  # a checkpoint ends a line
    assert {"loss/latent", "val/latent", "val/latent_error", "val/latent_error_of_mean"} <= metrics[0].keys()
    assert metrics == metrics_of(tmp_path / "cut")


def test_evaluation_leaves_no_trace_in_training(tmp_path, video_dataset, laq_checkpoint):
    often = train_core(tmp_path / "often", video_dataset, laq_checkpoint, steps=3, eval_every=1)
    never = train_core(tmp_path / "never", video_dataset, laq_checkpoint, steps=3)
    assert equal(dict(often.state_dict()), dict(never.state_dict()))
    start = make_core().state_dict()
    changed = [key for key, value in often.state_dict().items() if not torch.equal(value, start[key])]
    assert any(key.startswith("trunk.vlm.text_model.") for key in changed)
    assert not any(key.startswith(("trunk.vlm.vision_model.", "trunk.vlm.connector.")) for key in changed)


def test_a_batch_of_a_step_that_is_not_finite_can_be_loaded(tmp_path, video_dataset, laq_checkpoint):
    """As the README does. A learning rate beyond all measure: the first step ruins the weights, the second shows it."""
    ruinous = OptimConfig(warmup_steps=0)
    object.__setattr__(ruinous, "lr", 1e30)  # which options refuse
    names = re.escape(f"{video_dataset} episode ")
    with pytest.raises(FloatingPointError, match=rf"not finite at step 2: .*{names}\d frame \d+; {names}"):
        train_core(tmp_path, video_dataset, laq_checkpoint, optim=ruinous)
    broken = torch.load(tmp_path / "not_finite" / "process0.pt")
    core = make_core()
    core.load_state_dict(broken["weights"])
    assert len(broken["batches"]) == 2  # accumulation steps
    for batch in broken["batches"]:
        raw = RawBatch(**batch)
        assert len(raw) == 2
        assert raw.pairs.shape == (2, 1, 2, 3, 96, 96)
        assert all(key.startswith(str(video_dataset)) for key in raw.keys)


class BlockingCopies(TorchFunctionMode):
    """Notes every copy from the host to another device that the host waits for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.device.type != "cpu":
            is_copy = function is Tensor.to and args[0].device.type == "cpu" and not kwargs.get("non_blocking")
            if is_copy or function in (torch.tensor, torch.as_tensor):
                package = str(Path(run.__file__).parent)
                self.found += [line for line in traceback.format_stack() if package in line][-1:]
        return result


def test_between_two_log_steps_the_host_never_waits_for_the_device(
    tmp_path, video_dataset, laq_checkpoint, monkeypatch
):
    """On the device `meta` tensors have no values: whoever reads one (.item(), .cpu(), bool(), nonzero) raises."""
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know the device
    fused = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(
        fused, "_get_fused_kernels_supported_devices", lambda: ["meta"]
    )  # has them, but does not say so
    options = {"save_every": 100, "log_every": 100}
    run = partial(train_core, video=video_dataset, laq_checkpoint=laq_checkpoint, device="meta", **options)
    with pytest.raises(Stop):
        run(tmp_path / "warm", stop_after=1)  # what is copied once need not be counted
    with BlockingCopies() as copies, pytest.raises(Stop):
        run(tmp_path / "run", stop_after=3)
    # Not of the training: a trunk's config.json is tried out on the device `meta`.
    found = [line for line in copies.found if "in load_trunk_config" not in line]
    assert not found, "".join(found)


def test_the_accuracy_of_codes_is_that_of_the_predicted_mean():
    """Beside the share that always naming the most common code would get right."""
    core = make_core().eval()
    generator = torch.Generator().manual_seed(0)
    statistics = Statistics(tuple(torch.randn(32, generator=generator).tolist()), (2.0,) * 32)
    codebook = torch.randn(8, 8, generator=generator)
    codes = (codebook[:, None].expand(-1, 4, -1) - torch.tensor(statistics.mean).view(4, 8)) / 2  # [C, S, D]
    truth = torch.randint(0, 3, (5, 4), generator=generator)
    mask = torch.tensor([True, True, False, True, True])[:, None].expand(5, 4)
    value = codes[truth, torch.arange(4)]
    target = FlowTarget(value, mask, torch.randn(5, 1, 4, 8, generator=generator), torch.rand(5, 1))
    present, text = torch.ones(5, 1, dtype=torch.bool), torch.arange(5).expand(5, 5)
    images, state = torch.randn(5, 1, 3, 64, 64, generator=generator), torch.randn(5, 32, generator=generator)
    batch = Batch(images, present, text, text >= 0, state, present[:, 0], {LATENT: target})

    class Prepared:
        """Labels and preprocessor of a batch that is prepared already."""

        kind, shape, horizon, codebook, statistics = "quantized", (4, 8), 2, None, None

        def __call__(self, raw: Batch, latents: Batch | None = None) -> Batch:
            return raw

    prepared = Prepared()
    prepared.codebook, prepared.statistics = codebook, {LATENT: statistics}
    found = held_out_errors(core, [batch], prepared, make_accelerator(), prepared)
    mean = core.sample(batch, LATENT, target.noise[:, 0], num_steps=1)
    guess = torch.stack([(mean[:, slot, None] - codes[:, slot]).norm(dim=-1).argmin(-1) for slot in range(4)], dim=1)
    assert found["val/latent_code_accuracy"] == pytest.approx((guess == truth)[mask].float().mean().item())
    most = sum(truth[mask[:, 0], slot].bincount().max().item() for slot in range(4))
    assert found["val/latent_code_accuracy_of_majority"] == pytest.approx(most / 16)
    errors = (mean - value).square().mean(-1)[mask[:, 0]]  # two latent actions in a row, of two slots each
    assert found["val/latent_error_1"] == pytest.approx(errors[:, :2].mean().item(), rel=1e-5)
    assert found["val/latent_error_2"] == pytest.approx(errors[:, 2:].mean().item(), rel=1e-5)


def test_held_out_errors_are_what_they_say():
    core = make_core(action_dim=3, chunk_size=6).eval()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (3, 2):  # of two batches, so that a mean of means would differ

        def normal(*shape: int, size: int = size) -> Tensor:
            return torch.randn(size, *shape, generator=generator)

        value = normal(6, 3)
        mask = torch.rand(size, 6, generator=generator) < 0.6
        targets = {
            "latent": FlowTarget(normal(4, 8), mask[:, :4], normal(2, 4, 8), normal(2).sigmoid()),
            "action": FlowTarget(nn.functional.pad(value, (0, 29)), mask, normal(2, 6, 32), normal(2).sigmoid()),
        }
        present = torch.ones(size, 1, dtype=torch.bool)
        text = torch.arange(5).expand(size, 5)
        batches.append(Batch(normal(1, 3, 64, 64), present, text, text >= 0, normal(32), present[:, 0], targets))
    before = {key: value.clone() for key, value in core.state_dict().items()}
    found = held_out_errors(core, batches, lambda raw, latents: raw, make_accelerator())
    assert equal(before, dict(core.state_dict()))
    assert found.keys() == {f"val/{t}{kind}" for t in ("latent", "action") for kind in ("", "_error", "_error_of_mean")}
    for name, width in (("latent", 8), ("action", 3)):
        tokens = [
            batch.targets[name].value[row, token, :width]
            for batch in batches
            for row, token in batch.targets[name].mask.nonzero().tolist()
        ]
        of_mean = sum((token**2).mean().item() for token in tokens) / len(tokens)
        assert found[f"val/{name}_error_of_mean"] == pytest.approx(of_mean, rel=1e-5)

        def loss(change, name: str = name) -> float:
            """The flow-matching error of all tokens after a change of the target's draws."""
            errors, masks = [], []
            for batch in batches:
                changed = replace(batch, targets={name: change(batch.targets[name])})
                errors.append(core(changed)[name].flatten())
                masks.append(batch.targets[name].mask.flatten())
            return masked_mean(torch.cat(errors), torch.cat(masks)).item()

        assert found[f"val/{name}"] == pytest.approx(loss(lambda target: target), rel=1e-5)
        # At t = 1 the velocity's error is that of the predicted mean: (noise - mean) - (noise - target).
        at_one = loss(lambda target: replace(target, noise=target.noise[:, :1], time=torch.ones(len(target.noise), 1)))
        assert found[f"val/{name}_error"] == pytest.approx(at_one, rel=1e-4)
