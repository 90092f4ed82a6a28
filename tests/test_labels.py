"""labels.py and `teacher label`: the cache holds what the teacher says, and training from it is the same training."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ROOT, Forked, run_forked
from helpers import make_accelerator
from safetensors.torch import load_file

from smolvla_shared import data, data_blocks, data_loader, data_order, data_split, data_views, label_cache, label_check
from smolvla_shared import labels as labels_module
from smolvla_shared.batch import RawBatch
from smolvla_shared.cache import MANIFEST, RowCache, dataset_directories
from smolvla_shared.config import LATENT, DataConfig, PolicyDataConfig, StageOptions
from smolvla_shared.label_cache import CODEBOOK, label_stores, write_codebook
from smolvla_shared.label_health import read_verdict
from smolvla_shared.labels import OnlineLabels, labels_pairs, latent_statistics, open_labels
from smolvla_shared.laq import LAQ
from smolvla_shared.laq_files import load_laq, save_laq
from smolvla_shared.teacher_config import CheckConfig, GroundedIn, LabelConfig

CAMERA = "observation.image"


@pytest.fixture(scope="module")
def laq(laq_checkpoint) -> LAQ:
    return load_laq(laq_checkpoint)


def label_config(cache: Path, laq_checkpoint: Path, *roots: Path, **options) -> LabelConfig:
    dataset = DataConfig(roots=roots, num_workers=0)
    return LabelConfig(
        **{"label_cache": cache, "laq_ckpt": laq_checkpoint, "data": dataset, "batch_size": 16} | options
    )


def label(config: LabelConfig) -> None:
    """As the command."""
    label_cache.label(config, data_views.open_video(config.data))


@pytest.fixture(scope="module", params=["quantized", "continuous"])
def cache(request, tmp_path_factory, laq_checkpoint, video_dataset, image_dataset) -> tuple[str, Path]:
    """The kind, and the labels of two datasets of different rates and sizes."""
    directory = tmp_path_factory.mktemp("labels")
    label(label_config(directory, laq_checkpoint, video_dataset, image_dataset, teacher_kind=request.param))
    return request.param, directory


def files(directory: Path) -> dict[str, bytes]:
    """Every file of a cache, by name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def latent_config(tmp_path: Path, *roots: Path, **options) -> StageOptions:
    return StageOptions(**{"data": PolicyDataConfig(roots=roots, num_workers=0)} | options)


def raw_batch(datasets, labels, places: list[tuple[int, int]]) -> RawBatch:
    spec = data_loader.SampleSpec(
        cameras=(),
        label_cameras=labels.cameras,
        pair_size=labels.pair_size,
        horizon=labels.horizon,
        draws={LATENT: labels.shape},
    )
    dataset = data_loader.SampleDataset(datasets, spec, seed=0)
    return dataset[[data_order.SampleKey(0, slot, *place) for slot, place in enumerate(places)]]


def test_cached_labels_are_the_online_ones_to_the_bit(cache, tmp_path, laq_checkpoint, video_dataset, image_dataset):
    kind, directory = cache
    config = latent_config(tmp_path, video_dataset, image_dataset, teacher_kind=kind, laq_ckpt=laq_checkpoint)
    datasets = data.open_datasets(config.data)
    online = open_labels(config, datasets, (CAMERA,))
    cached = open_labels(replace(config, labels="cache", label_cache=directory), datasets, (CAMERA,))
    assert isinstance(online, OnlineLabels)
    assert (cached.teacher_id, cached.kind, cached.shape) == (online.teacher_id, kind, online.shape)
    assert (cached.cameras, cached.pair_size) == ((), 0)  # no pair is read, no second frame decoded
    # Batches as the command has made them: blocks of 16 rows of one episode.
    compared = 0
    for index, dataset in enumerate(datasets):
        for block in data_blocks.episode_blocks(dataset, dataset.rows_with_pairs(dataset.rows()).numpy(), 16):
            places = [(index, int(row)) for row in block]
            raw, without_pairs = raw_batch(datasets, online, places), raw_batch(datasets, cached, places)
            assert without_pairs.pairs is None
            assert torch.equal(raw.pair_mask, without_pairs.pair_mask)
            assert torch.equal(online(raw), cached(without_pairs))
            compared += len(block)
    assert compared > 150
    frames = data_split.split_datasets(datasets, 0.05, 0)[0]
    assert latent_statistics(cached, datasets, frames, 0).mean == pytest.approx(
        latent_statistics(online, datasets, frames, 0).mean, abs=1e-6
    )


def test_latent_actions_in_a_row_are_those_of_the_rows_a_gap_apart(cache, laq_checkpoint, video_dataset, image_dataset):
    """Online and cached alike; where the episode ends they are masked. Each has the statistics of a single one."""
    kind, directory = cache
    config = latent_config(directory, video_dataset, image_dataset, teacher_kind=kind, laq_ckpt=laq_checkpoint)
    datasets = data.open_datasets(config.data)
    online, one = open_labels(config, datasets, (CAMERA,), horizon=2), open_labels(config, datasets, (CAMERA,))
    cached = open_labels(replace(config, labels="cache", label_cache=directory), datasets, (CAMERA,), horizon=2)
    assert cached.shape == online.shape == (8, 8)
    for index, dataset in enumerate(datasets):
        places = [(index, row) for row in range(dataset.num_frames) if dataset.episode_of(row) == 6]
        raw = raw_batch(datasets, online, places)
        assert raw.pair_mask.sum(0).tolist() == [len(places) - dataset.gap, len(places) - 2 * dataset.gap]
        valid, single = raw.pair_mask.repeat_interleave(4, dim=1), one(raw_batch(datasets, one, places))
        expected = torch.cat([single, single.roll(-dataset.gap, 0)], dim=1)
        for found in (online(raw), cached(raw_batch(datasets, cached, places))):
            torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-5)
    frames = data_split.split_datasets(datasets, 0.05, 0)[0]
    found, of_one = (latent_statistics(labels, datasets, frames, 0) for labels in (cached, one))
    assert len(found.mean) == 64 and found.mean[:32] == found.mean[32:] and found.std[:32] == found.std[32:]
    assert np.allclose(found.mean[:32], of_one.mean, atol=0.3 * max(of_one.std))  # over other pairs: those in a row
    sampled = latent_statistics(online, datasets, frames, 0)  # all, of so few
    assert found.mean == pytest.approx(sampled.mean, abs=1e-6) and found.std == pytest.approx(sampled.std, abs=1e-6)


@pytest.mark.parametrize("kind", ["quantized", "continuous"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_statistics_of_a_cache_are_those_of_every_target(
    kind, horizon, tmp_path, video_dataset, image_dataset, monkeypatch
):
    """Against a plain loop. What is not a training target is far from all that is, or not a number."""
    monkeypatch.setattr(label_cache, "SHARD_ROWS", 7)
    monkeypatch.setattr(labels_module, "STATISTICS_PAIRS", 10)  # that is for labels that are no cache
    config = latent_config(tmp_path, video_dataset, image_dataset, labels="cache", label_cache=tmp_path / "labels")
    config = replace(config, teacher_kind=kind, data=replace(config.data, frame_gap_s=0.3))
    datasets, rng = data.open_datasets(config.data), np.random.default_rng(0)
    training, _ = data_split.split_datasets(datasets, 0.3, seed=0)
    codebook = torch.from_numpy(rng.normal(size=(6, 5)) + 100).float()
    codebook[5] = 1e9
    expected, stores = [], label_stores(config.label_cache, datasets, "a" * 64, kind, (CAMERA,))
    for (_, rows), dataset, store in zip(training, datasets, stores, strict=True):
        ends, gap = dataset.episode_to[dataset.episode_of(np.arange(dataset.num_frames))], dataset.gap
        assert gap > 1 and len(store.shards()) > 10
        codes = torch.from_numpy(rng.integers(5, size=(dataset.num_frames, 2)))
        latents = torch.from_numpy(rng.normal(size=(dataset.num_frames, 2, 5)) + 100).float()
        vectors = codebook[codes] if kind == "quantized" else latents
        targets = [[row + i * gap for i in range(horizon) if row + (i + 1) * gap < ends[row]] for row in rows.numpy()]
        assert {len(of) for of in targets} == {*range(horizon + 1)}
        expected += [vectors[place].flatten().double().numpy() for of in targets for place in of]
        others = np.setdiff1d(np.arange(dataset.num_frames), np.concatenate(targets).astype(int))
        codes[others], latents[others] = 5, torch.nan
        store.claim()
        write_codebook(store, codebook)
        for shard in store.shards():
            store.write(shard, (codes.int() if kind == "quantized" else latents)[shard.start : shard.stop])
    found = latent_statistics(open_labels(config, datasets, (CAMERA,), horizon), datasets, training, seed=0)
    mean, std = np.mean(expected, axis=0), np.std(expected, axis=0)
    assert len(expected) > 100 and len(found.mean) == len(found.std) == horizon * 10
    np.testing.assert_allclose(found.mean, np.tile(mean, horizon), rtol=1e-13)
    np.testing.assert_allclose(found.std, np.tile(np.maximum(std, 0.1 * std.max()), horizon), rtol=1e-10)


def test_a_cache_of_equal_latents_is_refused(tmp_path, video_dataset):
    config = latent_config(tmp_path, video_dataset, labels="cache", label_cache=tmp_path, teacher_kind="continuous")
    datasets = data.open_datasets(config.data)
    (store,) = label_stores(config.label_cache, datasets, "a" * 64, "continuous", (CAMERA,))
    store.claim()
    write_codebook(store, torch.zeros(1, 3))
    for shard in store.shards():
        store.write(shard, torch.full((len(shard), 1, 3), 0.1))  # whose mean is not 0.1 in every precision
    with pytest.raises(ValueError, match="the teacher gives every pair the same latent action"):
        latent_statistics(open_labels(config, datasets, (CAMERA,)), datasets, [(0, datasets[0].rows())], seed=0)


def test_several_label_cameras_give_the_codes_of_each(tmp_path, laq_checkpoint, image_dataset):
    """Online and cached, one or two in a row, they are those of each camera alone, side by side."""
    wrist, cache = "observation.images.wrist", tmp_path / "both"
    pairs = DataConfig(roots=(image_dataset,), label_cameras=(CAMERA, wrist), num_workers=0)
    for kind in ("quantized", "continuous"):
        label(label_config(cache / kind, laq_checkpoint, image_dataset, data=pairs, teacher_kind=kind))
        config = latent_config(tmp_path, image_dataset, laq_ckpt=laq_checkpoint, teacher_kind=kind)
        datasets = data.open_datasets(config.data)
        by_cache = replace(config, labels="cache", label_cache=cache / kind)
        assert labels_pairs(replace(by_cache, laq_ckpt=None), config.data).label_cameras == (CAMERA, wrist)
        for horizon in (1, 2):
            online = open_labels(config, datasets, (CAMERA, wrist), horizon)
            cached = open_labels(by_cache, datasets, (CAMERA, wrist), horizon)
            assert online.shape == cached.shape == (horizon * 8, 8)
            places = [(0, row) for row in range(0, datasets[0].num_frames, 3)]
            raw = raw_batch(datasets, online, places)
            assert raw.pairs.shape[:3] == (len(places), 2, horizon + 1)
            single = [open_labels(config, datasets, (camera,), horizon) for camera in (CAMERA, wrist)]
            each = [one(raw_batch(datasets, one, places)).unflatten(1, (horizon, -1)) for one in single]
            expected, valid = torch.cat(each, dim=2), raw.pair_mask
            for found in (online(raw), cached(raw_batch(datasets, cached, places))):
                found = found.unflatten(1, (horizon, -1))
                torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cameras"):  # the labels are of both
        open_labels(by_cache, datasets, (CAMERA,))


def test_what_a_cache_consists_of(cache, laq, video_dataset, image_dataset):
    kind, directory = cache
    for root in (video_dataset, image_dataset):
        (name,) = dataset_directories(directory, [str(root)])
        assert set(files(name)) == {MANIFEST, CODEBOOK, "shards/000000.safetensors"}
        assert torch.equal(load_file(name / CODEBOOK)["codebook"], laq.vq.codebooks)
        key = json.loads((name / MANIFEST).read_text())["key"]
        assert key["teacher_kind"] == kind
        assert {"torch", "lerobot"} < key["versions"].keys()
        (dataset,) = data.open_datasets(DataConfig(roots=(root,)))
        rows = load_file(name / "shards" / "000000.safetensors")["rows"]
        assert rows.shape == (dataset.num_frames, 4) + ((8,) if kind == "continuous" else ())
        assert rows.dtype == (torch.float32 if kind == "continuous" else torch.int32)
        pairs = dataset.rows_with_pairs(dataset.rows()).numpy()
        without = np.setdiff1d(np.arange(dataset.num_frames), pairs)
        assert 0 < len(without) == len(dataset.episode_from) * dataset.gap
        assert not rows[without].any()
        assert rows[pairs].any()


def test_a_dataset_that_is_labelled_is_not_labelled_again(cache, laq_checkpoint, video_dataset, capsys):
    kind, directory = cache
    (there,) = dataset_directories(directory, [str(video_dataset)])
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    label(label_config(directory, laq_checkpoint, video_dataset, teacher_kind=kind))
    assert "were labelled" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before


def test_a_gap_between_two_frames_stays_the_one_that_was_asked_for(
    tmp_path, laq_checkpoint, video_dataset, image_dataset
):
    """0.19 s are 4 frames of one dataset, 2 of the other, 0.2 s apart. A run that asks the labels is told 0.19."""
    roots = video_dataset, image_dataset
    asked = DataConfig(roots=roots, num_workers=0, frame_gap_s=0.19)
    label(label_config(tmp_path / "labels", laq_checkpoint, *roots, data=asked))
    config = latent_config(tmp_path, *roots, labels="cache", label_cache=tmp_path / "labels")
    options = labels_pairs(config, config.data)
    assert options.frame_gap_s == 0.19
    open_labels(config, data.open_datasets(options), (CAMERA,))


def test_what_the_teacher_was_grounded_in_travels_with_its_labels(tmp_path, laq, laq_checkpoint, video_dataset, capsys):
    """From laq.json into the cache, online labels and the check's report. Without grounding a cache has no such field,
    so that those from before there was one are read."""
    used = {"demos": {"fingerprint": "x", "episodes": [0, 2], "actions": "action"}}
    used["others"] = used["demos"] | {"episodes": [1]}
    grounded = tmp_path / "grounded.safetensors"
    save_laq(laq, grounded, extra={"grounding": {"weight": 0.1, "share": 0.25, "datasets": used}})
    expected = GroundedIn(("demos", "others"), 3, 0.1)
    for teacher, grounding in ((grounded, expected), (laq_checkpoint, None)):
        cache, config = tmp_path / f"{grounding}", latent_config(tmp_path, video_dataset, laq_ckpt=teacher)
        label(label_config(cache, teacher, video_dataset))
        (manifest,) = cache.glob(f"*/{MANIFEST}")
        assert ("teacher_grounding" in json.loads(manifest.read_text())["key"]) == (grounding is not None)
        by_cache = replace(config, labels="cache", label_cache=cache)
        datasets = data.open_datasets(config.data)
        for options in (config, by_cache, replace(by_cache, laq_ckpt=None)):
            assert open_labels(options, datasets, (CAMERA,)).teacher_grounding == grounding
        other = replace(by_cache, laq_ckpt=laq_checkpoint if grounding else grounded)  # of the same weights
        with pytest.raises(ValueError, match=r"made for something else(.|\n)*teacher_grounding: asked for"):
            open_labels(other, datasets, (CAMERA,))
        check = CheckConfig(laq_ckpt=teacher, out=tmp_path / "check" / f"{grounding}", data=config.data, pairs=60)
        with pytest.raises(SystemExit):
            label_check.check(check, datasets)
        assert read_verdict(check.out / "label_health.json").teacher_grounding == grounding
        printed = [line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines() if "grounded in" in line]
        assert printed == [str(expected)] * (grounding is not None)


def test_any_other_key_is_a_miss_with_both_sides(cache, tmp_path, laq, video_dataset):
    kind, directory = cache
    other = LAQ(laq.config)
    save_laq(other, tmp_path / "other.safetensors")
    config = latent_config(tmp_path, video_dataset, teacher_kind=kind, labels="cache", label_cache=directory)
    open_labels(config, data.open_datasets(config.data), (CAMERA,))  # without --laq-ckpt: whoever's labels these are
    gap = replace(config, data=replace(config.data, frame_gap_s=0.25))
    for wrong, line in [
        (gap, "  frame_gap_s: asked for 0.25, found 0.5"),
        (replace(config, laq_ckpt=tmp_path / "other.safetensors"), "  teacher_id: asked for"),
        (
            replace(config, teacher_kind="continuous" if kind == "quantized" else "quantized"),
            f"  teacher_kind: asked for {'continuous' if kind == 'quantized' else 'quantized'}, found {kind}",
        ),
    ]:
        with pytest.raises(ValueError, match="was made for something else") as error:
            open_labels(wrong, data.open_datasets(wrong.data), (CAMERA,))
        (difference,) = str(error.value).splitlines()[1:]
        assert difference.startswith(line)


def test_what_a_user_can_get_wrong(tmp_path, laq_checkpoint, video_dataset, labelled_dataset):
    config = latent_config(tmp_path, video_dataset, labels="cache", label_cache=tmp_path / "none")
    with pytest.raises(ValueError, match=r"there are no labels at .*none/.*; make them with `python -m smolvla_shared"):
        open_labels(config, data.open_datasets(config.data), (CAMERA,))
    with pytest.raises(ValueError, match="--labels cache and --label-cache <directory> belong together"):
        latent_config(tmp_path, video_dataset, labels="cache")
    late = label_config(tmp_path / "cache", laq_checkpoint, video_dataset)
    with pytest.raises(ValueError, match=r"no episode is longer than --data.frame-gap-s"):
        label(replace(late, data=replace(late.data, frame_gap_s=3)))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_cache_whose_missing_shards_have_no_pair_is_filled(num_workers, video_dataset, tmp_path):
    """The last rows of an episode have none: there is nothing to read, and nothing to compute."""
    (dataset,) = data.open_datasets(DataConfig(roots=(video_dataset,), frame_gap_s=0.5))
    assert dataset.gap == 10
    store = RowCache(tmp_path / "cache", {"of": "a test"}, dataset.num_frames, 8)
    store.claim()
    *others, last = store.shards()
    assert not len(dataset.rows_with_pairs(dataset.rows(last.start, last.stop)))
    for rows in others:
        store.write(rows, torch.ones(len(rows), 2))

    def compute(frames: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no row is left to compute")

    of_rows = {"pairs": True, "row_shape": (2,), "dtype": torch.float32, "compute": compute, "rows_at_once": 4}
    options = {"num_workers": num_workers, "accelerator": make_accelerator()}
    data_blocks.fill_cache(store, dataset, (CAMERA,), **of_rows, **options)
    store.open()
    assert [store[row].sum().item() for row in (0, last.start - 1, last.start, last.stop - 1)] == [2, 2, 0, 0]


# --- the real command -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(tmp_path, monkeypatch) -> Path:
    """`python -m smolvla_shared.teacher` with shards that the small datasets fill several of, as a script."""
    monkeypatch.setattr(label_cache, "SHARD_ROWS", 32)
    script = tmp_path / "teacher.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from smolvla_shared import label_cache\n"
        "label_cache.SHARD_ROWS = 32\n"
        "if __name__ == '__main__':\n"
        "    runpy.run_module('smolvla_shared.teacher', run_name='__main__')\n"
    )
    return script


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_stopped(
    server, small_shards, tmp_path, laq_checkpoint, video_dataset, labelled_dataset, image_dataset
):
    """Killed in the middle of its work again and again, it ends with the labels of one that was not."""
    roots = [video_dataset, labelled_dataset, image_dataset]
    command = [small_shards, "label", "--laq-ckpt", laq_checkpoint, "--data.roots", *roots]
    command += ["--data.num-workers", "0", "--batch-size", "4", "--teacher-kind", "continuous"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with_worker = [*command, "--label-cache", whole, "--data.num-workers", "1"]  # the last of an option counts
    assert Forked(server, with_worker, tmp_path / "whole.txt").wait() == 0

    written: dict[Path, int] = {}  # what each kill found finished, and when it was written
    kills = 0
    for number in range(1, 6):
        child = Forked(server, [*command, "--label-cache", killed], tmp_path / "killed.txt")
        child.wait_for(lambda number=number: len(list(killed.glob("*/shards/*.safetensors"))) >= 3 * number)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
        for path, when in written.items():
            assert path.stat().st_mtime_ns == when, f"{path} was made again"
        written |= {path: path.stat().st_mtime_ns for path in killed.glob("*/shards/*.safetensors")}
    assert kills >= 3
    assert Forked(server, [*command, "--label-cache", killed], tmp_path / "killed.txt").wait() == 0
    # A kill in the middle of writing leaves a file of another name and the file of its lock, which nobody reads.
    left = {name for name in files(killed) if name.endswith((".tmp", ".part", ".lock"))}
    assert {name: content for name, content in files(killed).items() if name not in left} == files(whole)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(
    server, small_shards, tmp_path, laq_checkpoint, video_dataset, labelled_dataset
):
    roots = (video_dataset, labelled_dataset)
    label(label_config(tmp_path / "one", laq_checkpoint, *roots))
    command = [small_shards, "label", "--laq-ckpt", laq_checkpoint, "--data.roots", *roots]
    command += ["--label-cache", tmp_path / "two", "--batch-size", "16", "--data.num-workers", "1"]
    code, printed = run_forked(server, command, tmp_path / "printed.txt", processes=2)
    assert code == 0, printed
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow
def test_training_from_the_cache_is_training_online(server, tmp_path, laq_checkpoint, video_dataset, labelled_dataset):
    """Stage 2, and Stage 3 that co-trains: losses and held-out errors are the same, and no teacher is needed."""
    label(label_config(tmp_path / "labels", laq_checkpoint, video_dataset, labelled_dataset))
    sizes = "--steps 6 --batch-size 4 --log-every 1 --eval-every 3 --eval-samples 8 --data.num-workers 0".split()
    sizes += "--val-fraction 0.2 --model.preset tiny --optim.lr 1e-3 --optim.warmup-steps 1".split()
    commands = {
        "stage2": ["train_stage2.py", *sizes, "--data.roots", video_dataset],
        "stage3": ["train_stage3.py", *sizes, "--data.roots", labelled_dataset, "--video-roots", video_dataset],
    }
    commands["stage3"] += ["--chunk-size", "6", "--n-action-steps", "3", "--latent-loss-weight", "0.5"]
    for name, command in commands.items():
        lines = {}
        for labels, where in {
            "online": ["--laq-ckpt", laq_checkpoint],
            "cache": ["--labels", "cache", "--label-cache", tmp_path / "labels"],
        }.items():
            run_dir = tmp_path / f"{name}_{labels}"
            child = Forked(server, [*command, *where, "--run-dir", run_dir], tmp_path / "out.txt")
            assert child.wait() == 0, child.output.read_text()
            lines[labels] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        for online, cached in zip(lines["online"], lines["cache"], strict=True):
            assert online.keys() == cached.keys()
            for key in online:
                if not key.startswith("time/"):
                    assert cached[key] == pytest.approx(online[key], rel=1e-5), (name, key)
        assert any("val/latent" in line for line in lines["cache"])


@pytest.mark.slow
def test_stage_2_heeds_the_verdict(server, tmp_path, laq_checkpoint, video_dataset):
    """A random teacher's labels are refused, unless that is what is wanted: then the artifact says so."""
    check = ["-m", "smolvla_shared.teacher", "check", "--laq-ckpt", laq_checkpoint, "--data.roots", video_dataset]
    check += ["--data.num-workers", "0", "--pairs", "100", "--out", tmp_path / "check"]
    assert Forked(server, check, tmp_path / "check.txt").wait() == 1
    assert "label health: FAIL" in (tmp_path / "check.txt").read_text()
    report = tmp_path / "check" / "label_health.json"
    train = ["train_stage2.py", "--steps", "1", "--batch-size", "2", "--data.num-workers", "0", "--eval-samples", "2"]
    train += ["--model.preset", "tiny", "--laq-ckpt", laq_checkpoint, "--data.roots", video_dataset]
    train += ["--run-dir", tmp_path / "run", "--label-health", report]
    assert Forked(server, train, tmp_path / "refused.txt").wait() == 2
    refused = (tmp_path / "refused.txt").read_text()
    assert "these labels failed the check" in refused
    assert "the latents tell nothing about the second frame" in refused
    assert not (tmp_path / "run").exists()
    assert Forked(server, [*train, "--data.frame-gap-s", "0.25"], tmp_path / "other.txt").wait() == 2
    assert "--data.frame-gap-s: this run 0.25, label_health.json 0.5" in (tmp_path / "other.txt").read_text()
    accepted = Forked(server, [*train, "--accept-label-health"], tmp_path / "accepted.txt")
    assert accepted.wait() == 0, accepted.output.read_text()
    manifest = json.loads((tmp_path / "run" / "artifacts" / "smolvla_shared_stage2_artifact.json").read_text())
    assert manifest["latents"]["health"] == "fail"
    assert manifest["latents"]["health_reasons"] == json.loads(report.read_text())["reasons"]
