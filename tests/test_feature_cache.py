"""feature_cache.py: training from cached image tokens is training from the frames, and other towers are refused."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from smolvla_shared import data, data_loader, data_order, data_rows
from smolvla_shared import feature_cache as features_module
from smolvla_shared.batch import Batch, RawBatch
from smolvla_shared.cache import RowCache
from smolvla_shared.config import ACTION, ModelConfig, PolicyDataConfig
from smolvla_shared.feature_cache import prepare_features
from smolvla_shared.losses import masked_mean
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import freeze
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config
from train_stage3 import Stage3Config

CAMERA = "observation.image"
STATISTICS = {ACTION: Statistics((0.0,) * 2, (1.0,) * 2)}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def core() -> SmolVLASharedCore:
    torch.manual_seed(0)
    core = SmolVLASharedCore(make_core_config(ModelConfig(preset="tiny"), (CAMERA,), action_dim=2, chunk_size=4))
    freeze(core, ["vision tower", "connector"])
    return core


def run_config(directory: Path, *roots: Path, **options) -> Stage3Config:
    options = {"roots": roots, "num_workers": 0, "feature_cache": directory / "features"} | options
    return Stage3Config(run_dir=directory / "run", data=PolicyDataConfig(**options))


def read(datasets, features: dict, places: list[tuple[int, int]]) -> RawBatch:
    spec = data_loader.SampleSpec((CAMERA,), chunk_size=4, action_dim=2, draws={ACTION: (4, 32)}, features=features)
    dataset = data_loader.SampleDataset(datasets, spec, seed=0)
    return dataset[[data_order.SampleKey(0, slot, *place) for slot, place in enumerate(places)]]


def train_once(core: SmolVLASharedCore, raw: RawBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its gradients."""
    batch: Batch = Preprocessor(core.config, load_trunk_tokenizer("tiny", None), STATISTICS)(raw)
    core.zero_grad()
    loss = masked_mean(core(batch)[ACTION], batch.masks[ACTION])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("mixed", [False, True])
def test_training_from_the_cache_is_training_from_the_frames(
    tmp_path, core, accelerator, image_dataset, video_dataset, monkeypatch, dtype, tolerance, mixed
):
    roots = (image_dataset, video_dataset) if mixed else (image_dataset,)  # of different sizes
    config = run_config(tmp_path, *roots, cameras=(CAMERA,), feature_cache_dtype=dtype)
    datasets = data.open_datasets(config.data)
    features = prepare_features(core, datasets, (CAMERA,), config, accelerator)
    places = [(0, 0), (0, 25), (0, datasets[0].num_frames - 1)] + [(1, 7)] * mixed
    expected_loss, expected = train_once(core, read(datasets, {}, places))

    def fail(*_) -> None:
        raise AssertionError("a frame was decoded, or went through the tower")

    monkeypatch.setattr(data.RobotDataset, "read_frames", fail)
    monkeypatch.setattr(core.trunk, "embed_images", fail)
    raw = read(datasets, features, places)
    assert raw.images[0].shape == (len(places), 16, 128)
    assert raw.images[0].dtype == getattr(torch, dtype)
    loss, grads = train_once(core, raw)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-7, name


def test_features_reach_the_workers_of_a_loader(tmp_path, core, accelerator, image_dataset):
    config = run_config(tmp_path, image_dataset)
    datasets = data.open_datasets(config.data)
    features = prepare_features(core, datasets, (CAMERA,), config, accelerator)
    spec = data_loader.SampleSpec((CAMERA,), features=features)
    dataset = data_loader.SampleDataset(datasets, spec, seed=0)
    sampler = data_order.StepSampler(data_rows.group_rows([(0, datasets[0].rows(0, 20))]), 0, 4, 0, 2)
    batches = [list(data_loader.make_loader(dataset, sampler, num_workers)) for num_workers in (0, 1)]
    for here, there in zip(*batches):
        assert torch.equal(here.images[0], there.images[0])


def test_a_filling_that_was_killed_goes_on(tmp_path, core, accelerator, image_dataset, monkeypatch):
    config = run_config(tmp_path, image_dataset, feature_cache_dtype="float32")
    datasets = data.open_datasets(config.data)
    monkeypatch.setattr(features_module, "SHARD_ROWS", 50)
    write, written = RowCache.write, []

    def die_at_the_third(self, rows, values) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(rows)
        write(self, rows, values)

    monkeypatch.setattr(RowCache, "write", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_features(core, datasets, (CAMERA,), config, accelerator)
    monkeypatch.setattr(RowCache, "write", lambda self, rows, values: written.append(rows) or write(self, rows, values))
    features = prepare_features(core, datasets, (CAMERA,), config, accelerator)
    assert written == [range(start, min(start + 50, 188)) for start in (0, 50, 100, 150)]
    whole = run_config(tmp_path / "whole", image_dataset, feature_cache_dtype="float32")
    expected = prepare_features(core, datasets, (CAMERA,), whole, accelerator)
    for row in range(188):
        assert torch.equal(features[CAMERA][0][row], expected[CAMERA][0][row])
    monkeypatch.setattr(RowCache, "write", None)  # nothing is computed again
    assert prepare_features(core, datasets, (CAMERA,), config, accelerator) == features


def test_another_tower_precision_or_storage_is_refused(tmp_path, core, accelerator, image_dataset, monkeypatch):
    config = run_config(tmp_path, image_dataset)
    datasets = data.open_datasets(config.data)
    prepare_features(core, datasets, (CAMERA,), config, accelerator)
    torch.manual_seed(1)
    other = SmolVLASharedCore(core.config)
    other.load_state_dict(core.state_dict())
    freeze(other, ["vision tower", "connector"])
    prepare_features(other, datasets, (CAMERA,), config, accelerator)  # the same weights: the same features
    other.expert.norm.weight.data += 1
    prepare_features(other, datasets, (CAMERA,), config, accelerator)  # no part of the tower
    other.trunk.vlm.connector.modality_projection.proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"made for something else.*\n  tower: asked for .*, found"):
        prepare_features(other, datasets, (CAMERA,), config, accelerator)
    with monkeypatch.context() as changed:
        changed.setattr(Accelerator, "mixed_precision", "bf16")
        with pytest.raises(ValueError, match=r"\n  computed_in: asked for .*precision bf16, found .*precision no"):
            prepare_features(core, datasets, (CAMERA,), config, accelerator)
    in_float32 = run_config(tmp_path, image_dataset, feature_cache_dtype="float32")
    with pytest.raises(ValueError, match=r"\n  stored_in: asked for float32, found bfloat16"):
        prepare_features(core, datasets, (CAMERA,), in_float32, accelerator)


def test_what_would_make_the_features_wrong_is_refused(tmp_path, core, accelerator, image_dataset):
    with pytest.raises(ValueError, match=r"--data\.feature-cache.*--data\.random-shift 0\.1.*drop one"):
        run_config(tmp_path, image_dataset, random_shift=0.1)
    with pytest.raises(ValueError, match=r"but --data\.random-brightness 0\.2, --data\.random-hue 0\.1 would train"):
        run_config(tmp_path, image_dataset, random_hue=0.1, random_brightness=0.2)
    config = run_config(tmp_path, image_dataset)
    trained = SmolVLASharedCore(core.config)
    freeze(trained, ["vision tower"])
    with pytest.raises(ValueError, match=r"the tower trains.*--model\.freeze-vision True"):
        prepare_features(trained, data.open_datasets(config.data), (CAMERA,), config, accelerator)
    assert not config.data.feature_cache.exists()


def test_the_size_is_announced_and_bounded(tmp_path, core, accelerator, image_dataset, capsys, monkeypatch):
    config = run_config(tmp_path, image_dataset, feature_cache_gb=1e-4)
    datasets = data.open_datasets(config.data)
    size = 188 * 16 * 128 * 2 / 1e9  # 0.00077 GB
    with pytest.raises(ValueError, match=r"would take 0\.00077 GB, more than --data\.feature-cache-gb 0\.0001"):
        prepare_features(core, datasets, (CAMERA,), config, accelerator)
    assert not config.data.feature_cache.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": size * 0.5e9}))
    config = run_config(tmp_path, image_dataset)
    with pytest.raises(ValueError, match=rf"needs 0\.00077 GB more, {re.escape(str(tmp_path))} has 0\.000385"):
        prepare_features(core, datasets, (CAMERA,), config, accelerator)
    monkeypatch.undo()
    capsys.readouterr()
    prepare_features(core, datasets, (CAMERA,), config, accelerator)
    assert "0.00077 GB of bfloat16, of which 0.00077 GB are made now" in capsys.readouterr().out
    (shard,) = config.data.feature_cache.glob(f"*--images/{CAMERA}/shards/*")
    assert size * 1e9 < shard.stat().st_size < 1.001 * size * 1e9
    prepare_features(core, datasets, (CAMERA,), config, accelerator)
    assert "0.00077 GB of bfloat16, complete" in capsys.readouterr().out
