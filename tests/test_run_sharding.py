"""sharding.py: two FSDP2 processes train what one plain process trains, with half of its memory each, and files tell
no difference. The processes are real and run on the CPU; tests/forced_fsdp.py says how."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from forced_fsdp import probe
from forked import run_forked
from torch import Tensor

import train_stage2
import train_stage3
from smolvla_shared import run_sharding, teacher
from smolvla_shared.artifact import load_artifact
from smolvla_shared.config import DataConfig
from smolvla_shared.model import SmolVLASharedCore

ARTIFACT = Path("artifacts") / "smolvla_shared_stage2_artifact.safetensors"
PROCESSES = 2
# Accumulation, an EMA that is evaluated halfway, a checkpoint to resume from. Vision is frozen.
SIZES = "--steps 20 --save-every 15 --eval-every 10 --log-every 1 --batch-size 4 --accumulation-steps 2".split()
SIZES += "--eval-samples 4 --val-fraction 0.2 --data.num-workers 0".split()
SIZES += "--optim.lr 1e-3 --optim.warmup-steps 2 --ema-decay 0.9".split()


def run_plainly(script: str, *arguments: str) -> None:
    """A job in this very process."""
    module, config_class = {
        "train_stage2": (train_stage2, train_stage2.Stage2Config),
        "train_stage3": (train_stage3, train_stage3.Stage3Config),
    }[script]
    AcceleratorState._reset_state(reset_partial_state=True)
    module.main(tyro.cli(config_class, args=arguments))
    AcceleratorState._reset_state(reset_partial_state=True)


def cut(run_dir: Path, step: int, target: Path) -> Path:
    """A copy of a run as it was after the checkpoint at `step`."""
    shutil.copytree(run_dir, target, symlinks=True)
    shutil.rmtree(target / "artifacts")
    shutil.rmtree(target / "checkpoints" / "000020")
    (target / "checkpoints" / "last").unlink()
    (target / "checkpoints" / "last").symlink_to(f"{step:06d}")
    return target


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory, video_dataset, labelled_dataset, laq_checkpoint) -> Path:
    """plain/ and sharded/, with the same runs each: s2, s3 from its artifact, s2 resumed from the *other* side's
    checkpoint, s2 in bfloat16, also with a frozen trunk, and s2 compiled (in sharded/ alone). In sharded/ also what
    each process noted."""
    runs = tmp_path_factory.mktemp("runs")

    def stage2(run_dir: Path, *options: str) -> list[str]:
        data = ["--data.roots", str(video_dataset), "--laq-ckpt", str(laq_checkpoint)]
        model = ["--model.preset", "tiny", "--model.freeze-vision", "True"]
        return ["train_stage2", *SIZES, *data, *model, *options, "--run-dir", str(run_dir)]

    def stage3(side: Path) -> list[str]:
        data = ["--data.roots", str(labelled_dataset), "--stage2-artifact", str(side / "s2" / ARTIFACT)]
        model = ["--model.freeze-trunk", "True", "--chunk-size", "6", "--n-action-steps", "3"]
        return ["train_stage3", *SIZES, *data, *model, "--run-dir", str(side / "s3")]

    short = ["--steps", "4"]
    bf16 = [*short, "--precision", "bf16"]
    frozen = [*bf16, "--model.freeze-trunk", "True"]
    plain, sharded = runs / "plain", runs / "sharded"
    run_plainly(*stage2(plain / "s2"))
    run_plainly(*stage3(plain))
    run_plainly(*stage2(plain / "bf16", *bf16))
    run_plainly(*stage2(plain / "frozen", *frozen))
    run_plainly(*stage2(plain / "compiled", *short))  # but it is not
    jobs = {
        "s2": stage2(sharded / "s2"),
        "s3": stage3(sharded),
        "bf16": stage2(sharded / "bf16", *bf16),
        "frozen": stage2(sharded / "frozen", *frozen),
        "compiled": stage2(sharded / "compiled", *short, "--model.compile"),
        "resumed": stage2(cut(plain / "s2", 15, sharded / "resumed"), "--resume"),
    }
    (sharded / "jobs.json").write_text(json.dumps(jobs))
    command = ["tests/forced_fsdp.py", "configs/accelerate/fsdp2_8gpu.yaml", sharded, sharded / "jobs.json"]
    code, printed = run_forked(server, command, runs / "printed.txt", PROCESSES)
    assert code == 0, printed
    run_plainly(*stage2(cut(sharded / "s2", 15, plain / "resumed"), "--resume"))
    return runs


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def record_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last" / "training_state" / "state.pt", weights_only=True)


def notes_of(runs: Path, name: str) -> list[dict]:
    return [json.loads((runs / "sharded" / f"{name}{process}.json").read_text()) for process in range(PROCESSES)]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Adam divides by the gradient's size: where that is all rounding, so is the step. As a whole weights agree.

    Found were 5e-7 to 1.5e-5 of their size after 20 steps.
    """
    assert {key: (t.shape, t.dtype) for key, t in found.items()} == {
        key: (t.shape, t.dtype) for key, t in expected.items()
    }
    apart, size = (
        sum(t.double().square().sum() for t in tensors) ** 0.5
        for tensors in ([found[key] - expected[key] for key in expected], expected.values())
    )
    assert apart < 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, steps, tolerance",
    [("s2", 20, 1e-4), ("s3", 20, 1e-4), ("bf16", 4, 1e-2), ("frozen", 4, 1e-2), ("compiled", 4, 1e-4)],
)
def test_metrics_equal_those_of_one_plain_process(runs, name, steps, tolerance):
    """Losses, gradient norms and held-out errors, in every step; the latter come from core.sample and the EMA."""
    plain, sharded = metrics_of(runs / "plain" / name), metrics_of(runs / "sharded" / name)
    assert len(plain) == len(sharded) == steps
    assert any(key.endswith("_error") for key in plain[-1])
    for one, other in zip(plain, sharded):
        assert one.keys() == other.keys()
        for key in one:
            if not key.startswith("time/"):
                assert other[key] == pytest.approx(one[key], abs=tolerance, rel=tolerance), (one["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2", "s3"])
def test_each_process_keeps_half(runs, name):
    plain = record_of(runs / "plain" / name)
    moments = [tensor for state in plain["optimizer"]["state"].values() for tensor in state.values()]
    parts = {"parameters": plain["model"].values(), "optimizer": moments, "ema": plain["ema"].values()}
    size = {key: sum(tensor.numel() * tensor.element_size() for tensor in tensors) for key, tensors in parts.items()}
    for notes in notes_of(runs, name):
        assert notes["bytes"].keys() == size.keys()
        for key in size:
            assert 0.45 * size[key] < notes["bytes"][key] <= 0.55 * size[key]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2", "s3", "bf16", "frozen"])
def test_sharding_fires(runs, name):
    """Every parameter was gathered to compute; the gradients of those that train, and of no others, were reduced."""
    record = record_of(runs / "plain" / name)
    parameters, trained = set(record["model"]), set(record["ema"])
    assert trained < parameters
    for notes in notes_of(runs, name):
        assert set(notes["gathered"]) == parameters
        assert set(notes["reduced"]) == trained
        steps = len(metrics_of(runs / "plain" / name))
        assert set(notes["reduced"].values()) == {2 * steps}  # in each pass: no process holds full gradients
        assert min(notes["gathered"].values()) >= 2 * steps  # in both of a step's forward passes


@pytest.mark.slow
def test_bfloat16_is_for_layers_and_nothing_is_summed_or_kept_in_it(runs):
    for notes in notes_of(runs, "bf16"):
        assert (notes["types"]["reduced"], notes["types"]["kept"]) == (["torch.float32"], ["torch.float32"])
        for name, dtype in notes["gathered_as"].items():
            assert dtype == ("torch.bfloat16" if ".layers." in name else "torch.float32"), name


@pytest.mark.slow
def test_a_frozen_trunk_is_kept_in_bfloat16_and_what_trains_in_float32(runs):
    record = record_of(runs / "sharded" / "frozen")
    for name, tensor in record["model"].items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("trunk.vlm.") else torch.float32), name
    assert {tensor.dtype for tensor in record["ema"].values()} == {torch.float32}
    for notes in notes_of(runs, "frozen"):
        assert notes["types"]["reduced"] == ["torch.float32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2", "s3"])
def test_a_checkpoint_of_shards_is_one_of_a_plain_process(runs, name):
    """The same names, shapes and types; and a plain core with its weights generates what the sharded core did."""
    plain, sharded = record_of(runs / "plain" / name), record_of(runs / "sharded" / name)
    for part in ("model", "ema"):
        assert_near(sharded[part], plain[part])
    assert plain["optimizer"]["state"].keys() == sharded["optimizer"]["state"].keys()
    for key, state in plain["optimizer"]["state"].items():
        torch.testing.assert_close(sharded["optimizer"]["state"][key], state, atol=1e-4, rtol=0, msg=key)

    core = plain_core(runs / "sharded" / name, name)
    core.load_state_dict(sharded["model"])
    for notes in notes_of(runs, name):
        torch.testing.assert_close(torch.tensor(notes["generated"]), probe(core), atol=1e-5, rtol=0)


def plain_core(run_dir: Path, name: str) -> SmolVLASharedCore:
    """A core of a run's shape, with the weights that it published."""
    if name == "s2":
        artifact = load_artifact(run_dir / ARTIFACT)
        core = SmolVLASharedCore(artifact.manifest.core)
        core.load_state_dict(artifact.state_dict)
        return core
    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy

    return HLRPSmolVLASharedPolicy.from_pretrained(run_dir / "checkpoints" / "last" / "pretrained_model").model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2", "s3"])
def test_what_is_published_are_the_gathered_ema_weights(runs, name):
    record = record_of(runs / "sharded" / name)
    published = plain_core(runs / "sharded" / name, name).state_dict()
    for key, value in (record["model"] | record["ema"]).items():
        assert torch.equal(published[key], value), key
    assert any(not torch.equal(published[key], record["model"][key]) for key in record["ema"])


@pytest.mark.slow
def test_the_artifact_says_what_has_changed_and_which_weights_it_holds(runs):
    plain, sharded = (load_artifact(runs / side / "s2" / ARTIFACT).manifest for side in ("plain", "sharded"))
    assert sharded.source == plain.source
    assert sharded.source.changed_parts == ("language layers", "expert", "state projection", "latent head")
    assert sharded.source.weights == "EMA, decay 0.9"
    checkpoint = runs / "sharded" / "s3" / "checkpoints" / "000015"
    source = json.loads((checkpoint / "pretrained_model" / "source.json").read_text())
    assert (source["run"], source["global_step"], source["weights"]) == ("s3", 15, "EMA, decay 0.9")
    assert source["stage2_artifact"] == sharded.weights.sha256


@pytest.mark.slow
@pytest.mark.parametrize("side", ["plain", "sharded"])
def test_a_checkpoint_is_resumed_on_the_other_side(runs, side):
    """From two FSDP processes to a plain one, and back; 5 more steps are those of the run that never stopped."""
    plain, resumed = runs / "plain" / "s2", runs / side / "resumed"
    metrics = metrics_of(resumed)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    for one, other in zip(metrics_of(plain), metrics):
        for key in ("loss/latent", "grad_norm"):
            assert other[key] == pytest.approx(one[key], abs=1e-4)
    one, other = record_of(plain), record_of(resumed)
    for part in ("model", "ema"):
        assert_near(other[part], one[part])
    assert load_artifact(resumed / ARTIFACT).manifest.source.changed_parts[-1] == "latent head"


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("fsdp_version", 1, "fsdp_version: 1"),
        ("auto_wrap_policy", "transformer_based_wrap", "fsdp_auto_wrap_policy"),
        ("reshard_after_forward", False, "fsdp_reshard_after_forward: false"),
        ("cpu_offload", True, "fsdp_offload_params: true"),
        ("activation_checkpointing", True, "fsdp_activation_checkpointing: true"),
        ("cpu_ram_efficient_loading", True, "fsdp_cpu_ram_efficient_loading: true"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(monkeypatch, setting, value, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # a plugin leaves its own value there
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | {setting: value})
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=rf"asks for {message}; .*configs/accelerate/fsdp2_8gpu.yaml"):
        run_sharding.check_plugin(accelerator)


def test_a_teacher_is_not_sharded(monkeypatch, tmp_path, video_dataset):
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    config = teacher.TeacherConfig(run_dir=tmp_path / "run", data=DataConfig(roots=(video_dataset,)))
    with pytest.raises(ValueError, match=r"not sharded: use configs/accelerate/ddp_8gpu\.yaml"):
        teacher.train_teacher(config)
    assert not config.run_dir.exists()
