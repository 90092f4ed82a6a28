"""Online labels are LAQ's own; teacher.py: statistics are those of the pairs, and a short training learns."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from helpers import lerobot_dataset, set_vectors

from smolvla_shared import data, data_loader, data_order, data_rows, data_split
from smolvla_shared.command import is_mistake
from smolvla_shared.config import DataConfig
from smolvla_shared.files import public_state, sealed
from smolvla_shared.grounding import Grounding
from smolvla_shared.label_check import unseen_rows
from smolvla_shared.labels import OnlineLabels, latent_statistics
from smolvla_shared.laq import LAQ, LAQConfig, PairBatch
from smolvla_shared.laq_files import load_laq, save_laq, teacher_id, teachers_grounding, teachers_pairs
from smolvla_shared.preprocess import unit_range
from smolvla_shared.teacher import main, train_teacher
from smolvla_shared.teacher_config import GroundedIn, GroundingConfig, TeacherConfig, TeacherOptim

CAMERA = "observation.image"
SMALL = LAQConfig(
    dim=32,
    quant_dim=8,
    codebook_size=8,
    image_size=64,
    patch_size=8,
    spatial_depth=1,
    temporal_depth=1,
    dim_head=16,
    heads=2,
    code_seq_len=4,
    predicts_change=True,
    sees_change=True,
)


@pytest.fixture
def laq(laq_checkpoint) -> LAQ:
    return load_laq(laq_checkpoint)


@pytest.fixture(scope="module")
def dataset(video_dataset) -> data.RobotDataset:
    return data.open_datasets(DataConfig(roots=(video_dataset,)))[0]


@pytest.fixture(scope="module")
def image_source(image_dataset) -> data.RobotDataset:
    return data.open_datasets(DataConfig(roots=(image_dataset,)))[0]


def make_config(run_dir: Path, *roots: Path, **options) -> TeacherConfig:
    defaults = {
        "steps": 80,
        "batch_size": 8,
        "log_every": 5,
        "eval_every": 20,
        "save_every": 40,
        "eval_samples": 16,
        "optim": TeacherOptim(lr=2e-3, warmup_steps=min(5, options.get("steps", 80))),
        "replace_every": 20,
        "laq": SMALL,
    }
    data_config = DataConfig(roots=roots, num_workers=0)
    return TeacherConfig(run_dir=run_dir, data=data_config, val_fraction=0.2, **defaults | options)


@pytest.mark.parametrize("kind", ["quantized", "continuous"])
def test_online_labels_are_what_laq_encodes(laq, dataset, image_source, kind):
    """Also in a mixture of sizes: a label does not depend on what else is in it."""
    labels = OnlineLabels(laq, kind, (CAMERA,))
    assert (labels.kind, labels.shape, labels.teacher_id) == (kind, (4, 8), teacher_id(laq))
    spec = data_loader.SampleSpec(cameras=(), label_cameras=labels.cameras, pair_size=labels.pair_size)
    for datasets in [dataset], [dataset, image_source]:
        samples = data_loader.SampleDataset(datasets, spec, seed=0)
        raw = samples[[data_order.SampleKey(0, slot, slot % len(datasets), 3 + slot) for slot in range(4)]]
        found = labels(raw)
        assert not found.requires_grad
        for slot in range(0, 4, len(datasets)):  # the video's
            frames = [lerobot_dataset(dataset)[3 + slot + gap][CAMERA] for gap in (0, dataset.gap)]
            latents = laq.encode(torch.stack(frames)[None])
            expected = latents.vectors if kind == "quantized" else latents.continuous
            torch.testing.assert_close(found[slot : slot + 1], expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_valid_pairs(laq, dataset):
    frames = np.arange(8, 72)  # of four episodes, in part without a pair
    found = latent_statistics(OnlineLabels(laq, "quantized", (CAMERA,)), [dataset], [(0, dataset.rows(8, 72))], seed=0)
    ends = dataset.episode_to[np.searchsorted(dataset.episode_to, frames, side="right")]
    valid = frames[frames + dataset.gap < ends]
    assert 0 < len(valid) < len(frames)
    recorded = lerobot_dataset(dataset)
    pairs = torch.stack([torch.stack([recorded[f][CAMERA], recorded[f + dataset.gap][CAMERA]]) for f in valid.tolist()])
    vectors = laq.encode(pairs).vectors.flatten(1).double()
    assert np.allclose(found.mean, vectors.mean(0), atol=1e-6)
    std = vectors.std(0, correction=0)
    assert np.allclose(found.std, std.clamp(min=0.1 * std.max()), atol=1e-6)


def test_a_dimension_without_variance_gets_a_floor(laq, dataset):
    with torch.no_grad():
        laq.vq.codebooks[:, 3] = 0.25
    found = latent_statistics(OnlineLabels(laq, "quantized", (CAMERA,)), [dataset], [(0, dataset.rows())], 0)
    constant = [3, 11, 19, 27]  # in each of the four slots
    assert [found.mean[i] for i in constant] == [0.25] * 4
    assert [found.std[i] for i in constant] == [0.1 * max(found.std)] * 4


def test_a_collapsed_teacher_is_refused(laq, dataset):
    with torch.no_grad():
        laq.vq.codebooks[:] = laq.vq.codebooks[0].clone()
    with pytest.raises(ValueError, match="same latent action: its codebook has collapsed, or the pairs do not move"):
        latent_statistics(OnlineLabels(laq, "quantized", (CAMERA,)), [dataset], [(0, dataset.rows())], 0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, video_dataset) -> Path:
    """A short training."""
    run_dir = tmp_path_factory.mktemp("teacher_run") / "laq"
    train_teacher(make_config(run_dir, video_dataset))
    return run_dir


def test_a_short_training_learns(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    errors = [line["val/reconstruction"] for line in lines if "val/reconstruction" in line]
    assert len(errors) == 4
    assert errors[-1] < 0.9 * lines[-1]["val/reconstruction_of_first_frame"]
    assert (
        lines[-1]["loss/reconstruction"] < 0.9 * lines[0]["loss/reconstruction"] < 1.1
    )  # 1: repeating the first frame
    copies = {
        line["val/reconstruction_of_first_frame"] for line in lines if "val/reconstruction_of_first_frame" in line
    }
    assert len(copies) == 1  # the same held-out pairs every time
    usage = [line for line in lines if "usage/perplexity" in line]
    assert [line["step"] for line in usage] == [20, 40, 60, 80]
    for line in usage:
        assert 1 <= line["usage/lowest_slot_perplexity"] <= line["usage/perplexity"] <= SMALL.codebook_size
    assert usage[-1]["usage/replaced_codes"] == 0  # settled in the last fifth


def test_a_sample_is_named_if_one_of_its_two_views_has_an_error_that_is_not_finite(
    tmp_path, image_dataset, monkeypatch
):
    """The errors are of every view: of the second sample those of place 2 and 3."""
    forward = LAQ.forward

    def broken(laq: LAQ, batch: PairBatch) -> dict[str, torch.Tensor]:
        errors = forward(laq, batch)
        errors["reconstruction"][3] = torch.nan
        return errors

    monkeypatch.setattr(LAQ, "forward", broken)
    config = make_config(tmp_path / "laq", image_dataset, laq=SMALL)
    config = replace(config, data=replace(config.data, label_cameras=(CAMERA, "observation.images.wrist")))
    with pytest.raises(FloatingPointError) as refused:
        train_teacher(config)
    (batch,) = torch.load(tmp_path / "laq" / "not_finite" / "process0.pt")["batches"]
    assert f"not finite at step 1: the errors of these samples: {batch['keys'][1]}. The" in str(refused.value)
    assert is_mistake(refused.value)


def test_a_teacher_of_two_cameras_trains_on_the_pairs_of_both(tmp_path, image_dataset, laq):
    """Its losses are those of the pairs of either camera, and both are the cameras of its labels."""
    cameras = (CAMERA, "observation.images.wrist")
    (dataset,) = data.open_datasets(DataConfig(roots=(image_dataset,)))
    spec = data_loader.SampleSpec((), label_cameras=cameras, pair_size=64, draws={"nsvq": (8, 8)})
    keys = [data_order.SampleKey(0, slot, 0, row) for slot, row in enumerate((3, 9, int(dataset.episode_to[0]) - 2))]
    raw = data_loader.SampleDataset([dataset], spec, seed=0)[keys]
    actions = torch.randn(3, 2)
    batch = PairBatch.of(raw, raw.noise["nsvq"][:, 0], actions)
    assert batch.mask.tolist() == [True, True, True, True, False, False]
    assert torch.equal(batch.actions, torch.stack([a for a in actions for _ in cameras]))
    found = laq(replace(batch, actions=None))["reconstruction"]
    for place, camera in enumerate(cameras):
        alone = data_loader.SampleDataset([dataset], replace(spec, label_cameras=(camera,)), seed=0)[keys]
        pairs = alone.pairs[:, 0] if place else laq.resize(alone.pairs[:, 0].float() / 255)
        noise = raw.noise["nsvq"][:, 0].unflatten(1, (2, 4))[:, place]
        one = PairBatch(pairs if pairs.is_floating_point() else pairs.float() / 255, alone.pair_mask[:, 0], noise)
        torch.testing.assert_close(found[place::2], laq(one)["reconstruction"], rtol=1e-4, atol=1e-6)
    options = {"steps": 4, "eval_every": 4, "save_every": 4, "replace_every": 4, "laq": replace(SMALL)}
    config = make_config(tmp_path / "laq", image_dataset, **options)
    train_teacher(replace(config, data=replace(config.data, label_cameras=cameras)))
    path = tmp_path / "laq" / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors"
    plain = DataConfig(roots=(image_dataset,))
    assert teachers_pairs(path, plain).label_cameras == cameras
    assert teachers_pairs(path, replace(plain, label_cameras=cameras[1:])).label_cameras == cameras[1:]
    with pytest.raises(ValueError, match=r"--data\.label-cameras: command line top, teacher observation.image obs"):
        teachers_pairs(path, replace(plain, label_cameras=("top",)))
    save_laq(laq, tmp_path / "older.safetensors", {"frame_gap_s": 0.5, "label_camera": "observation.image"})
    older, said = (
        tmp_path / "older.safetensors",
        r"older\.json names one label_camera, observation\.image, where .* train",
    )
    with pytest.raises(ValueError, match=said):
        teachers_pairs(older, plain)
    with pytest.raises(ValueError, match=said):
        load_laq(older)


def test_its_checkpoints_are_loadable_teachers(run_dir, video_dataset):
    ids = []
    for step in ("000040", "000080"):
        path = run_dir / "checkpoints" / step / "pretrained_model" / "laq.safetensors"
        teacher = load_laq(path)
        assert teacher.config == SMALL
        manifest = json.loads(path.with_suffix(".json").read_text())
        source = manifest["source"]
        assert (source["run"], source["global_step"], source["weights"]) == ("laq", int(step), "last step")
        assert source["datasets"] == [str(video_dataset)]
        assert (source["frame_gap_s"], source["label_cameras"]) == (0.5, [CAMERA])
        state = torch.load(run_dir / "checkpoints" / step / "training_state" / "state.pt", weights_only=True)["model"]
        published = public_state(teacher.state_dict())
        assert all(torch.equal(value, state[key]) for key, value in published.items())
        assert "vq._usage" in state  # a resumed run replaces the same dead codes
        ids.append(teacher_id(teacher))
    assert ids[0] != ids[1]


def test_held_out_errors_are_of_the_exported_teacher(run_dir, video_dataset):
    """The logged errors again, from the file and from frames that LeRobot reads."""
    teacher = load_laq(run_dir / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors")
    config = make_config(run_dir, video_dataset)
    datasets = data.open_datasets(config.data)
    _, held_out = data_split.split_datasets(datasets, config.val_fraction, config.seed)
    sampler = data_order.StepSampler(data_rows.group_rows(data.with_pairs(datasets, held_out)), config.seed, 8, 0, 2)
    keys = [key for keys in sampler for key in keys]
    dataset, errors, copies = datasets[0], [], []
    recorded = lerobot_dataset(dataset)
    for key in keys:
        end = dataset.episode_to[np.searchsorted(dataset.episode_to, key.row, side="right")]
        if key.row + dataset.gap < end:
            frames = torch.stack([recorded[f][CAMERA] for f in (key.row, key.row + dataset.gap)])[None]
            frames = teacher.resize(frames)
            errors.append((teacher.reconstruct(frames)[0] - frames[0, 1]).square().mean().item())
            copies.append((frames[0, 0] - frames[0, 1]).square().mean().item())
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/reconstruction"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert last["val/reconstruction_of_first_frame"] == pytest.approx(np.mean(copies), rel=1e-4)


def test_frames_of_several_sizes_have_the_range_that_laq_expects(tmp_path, video_dataset, image_dataset, monkeypatch):
    forward, seen = LAQ.forward, []

    def spy(laq: LAQ, batch: PairBatch) -> dict[str, torch.Tensor]:
        seen.append(batch.frames)
        return forward(laq, batch)

    monkeypatch.setattr(LAQ, "forward", spy)
    for name, roots in {"one": [video_dataset], "two": [video_dataset, image_dataset]}.items():
        train_teacher(make_config(tmp_path / name, *roots, steps=1))
        frames = seen.pop()
        assert frames.shape == (8, 2, 3, *{"one": (96, 96), "two": (64, 64)}[name])
        assert frames.dtype == {"one": torch.uint8, "two": torch.float32}[name]
        assert 200 / 255 < unit_range(frames).max() <= 1  # what LAQ makes of them: the square is bright


def test_fine_tuning_starts_from_the_given_teacher(tmp_path, video_dataset, run_dir):
    """With a learning rate of nothing it is the given one; its shape needs no --laq options."""
    given = run_dir / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors"
    config = make_config(
        tmp_path / "more", video_dataset, laq=TeacherConfig.laq, init_from=given, steps=2, settle_share=1.0
    )
    train_teacher(replace(config, optim=TeacherOptim(lr=1e-12, warmup_steps=1)))
    tuned = load_laq(tmp_path / "more" / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors")
    assert tuned.config == SMALL
    for key, value in public_state(load_laq(given).state_dict()).items():
        torch.testing.assert_close(tuned.state_dict()[key], value, rtol=0, atol=1e-8)
    wrong = replace(config, run_dir=tmp_path / "wrong", laq=replace(SMALL, quant_dim=24))
    with pytest.raises(
        ValueError, match="brings its own shape, leave these out:\n  quant_dim: command line 24, file 8"
    ):
        train_teacher(wrong)


def test_a_collapse_is_said_aloud(tmp_path, video_dataset, laq, capsys):
    """A codebook of which one code is near, and that nothing replaces, is one."""
    with torch.no_grad():
        laq.vq.codebooks[1:] = laq.vq.codebooks[0] + 100
    save_laq(laq, tmp_path / "laq.safetensors")
    said = {}
    for name, limit in {"usual": TeacherConfig.collapse_below, "never": 0.9}.items():
        options = {"replace_every": 2, "settle_share": 1.0, "collapse_below": limit, "laq": TeacherConfig.laq}
        options["init_from"] = tmp_path / "laq.safetensors"
        config = make_config(tmp_path / name, video_dataset, steps=8, save_every=8, **options)
        train_teacher(config)
        printed = capsys.readouterr()
        said[name] = (printed.out + printed.err).count("the codebook has collapsed. If it does not recover, fine-tune")
    assert said == {"usual": 1, "never": 0}
    last = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    slots = [last[f"usage/perplexity_of_slot_{slot}"] for slot in range(4)]
    assert last["usage/perplexity"] == pytest.approx(np.mean(slots))
    assert last["usage/lowest_slot_perplexity"] == pytest.approx(min(slots))


def test_grounding_learns_the_actions_of_some_episodes(tmp_path, video_dataset, labelled_dataset):
    grounding = GroundingConfig(roots=(labelled_dataset,), episodes=5, weight=1.0, share=0.5)
    config = make_config(tmp_path / "run", video_dataset, grounding=grounding)
    train_teacher(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    errors = [line["loss/grounding"] for line in lines]
    assert np.mean(errors[-3:]) < 0.8 * np.mean(errors[:3])

    path = config.run_dir / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors"
    assert load_laq(path).config == SMALL  # without the head
    state = torch.load(config.run_dir / "checkpoints" / "last" / "training_state" / "state.pt", weights_only=True)
    assert "_grounding.weight" in state["model"]
    recorded = json.loads(path.with_suffix(".json").read_text())["source"]["grounding"]
    labelled = data.open_datasets(DataConfig(roots=(labelled_dataset,)))[0]
    _, held_out = data_split.split_episodes(labelled, config.val_fraction, config.seed)
    unused = {labelled.episode_of(row) for row in held_out.numpy()} | set(range(5, len(labelled.episode_from)))
    (used,) = recorded["datasets"].values()
    assert set(used["episodes"]) == set(range(len(labelled.episode_from))) - unused
    assert used["actions"].startswith("action, sum over the gap")
    assert recorded["weight"] == 1.0
    assert teachers_grounding(path) == GroundedIn((labelled.name,), len(used["episodes"]), 1.0)
    # `teacher check` leaves them out.
    rows = unseen_rows(labelled, {used["fingerprint"]: used["episodes"]})
    assert {labelled.episode_of(row) for row in rows.numpy()} == unused


def test_grounding_on_actions_of_two_kinds_is_refused(tmp_path, labelled_dataset, image_dataset):
    """Of other widths, or absolute positions beside velocities: they would be pooled under one mean."""
    positions = shutil.copytree(labelled_dataset, tmp_path / "positions")
    (labelled,) = data.open_datasets(DataConfig(roots=(labelled_dataset,)))
    # A position whose change, not whose sum, the displacement of the state is.
    set_vectors(positions, {"action": np.array(labelled.vector("observation.state"), np.float32)})
    for other, said in ((image_dataset, "2 dimensions, their"), (positions, "4 dimensions, their change over the gap")):
        datasets = data.open_datasets(DataConfig(roots=(labelled_dataset, other)))
        named = GroundingConfig(roots=(labelled_dataset, other))
        with pytest.raises(ValueError, match="--grounding: one head cannot learn actions of two kinds") as refused:
            Grounding(datasets, 0, named, val_fraction=0.2, seed=0)
        lines = str(refused.value).splitlines()
        assert lines[1].startswith(f"  {labelled_dataset}: 4 dimensions, their sum over the gap (")
        assert lines[2].startswith(f"  {other}: {said}") and is_mistake(refused.value)
    twice = data.open_datasets(DataConfig(roots=(labelled_dataset,))) * 2
    assert Grounding(twice, 0, GroundingConfig(roots=(labelled_dataset,)), val_fraction=0.2, seed=0).action_dim == 4


def test_the_actions_of_a_grounded_pair(video_dataset, labelled_dataset):
    options = DataConfig(roots=(video_dataset, labelled_dataset), frame_gap_s=0.2)
    video, labelled = data.open_datasets(options)
    grounding = Grounding([labelled], 1, GroundingConfig(roots=(labelled_dataset,)), val_fraction=0.2, seed=0)
    ((index, rows),) = grounding.rows
    assert index == 1
    actions = np.array(lerobot_dataset(labelled).hf_dataset["action"], np.float64)
    pairs = labelled.rows_with_pairs(rows).numpy()
    sums = np.stack([actions[row : row + 4].sum(0) for row in pairs])
    row = int(pairs[7])
    raw = SimpleNamespace(dataset=[0, 1, 1], row=[row, row, int(labelled.episode_to[0]) - 1], pairs=torch.zeros(3))
    found = grounding(raw)
    assert np.allclose(found[1], (sums[7] - sums.mean(0)) / sums.std(0), atol=1e-4)
    assert found[[0, 2]].isnan().all()  # video, and a frame whose pair the episode's end cuts
    with pytest.raises(ValueError, match=r"--grounding: .* has no actions"):
        Grounding([video], 0, GroundingConfig(roots=(video_dataset,)), val_fraction=0.2, seed=0)


def test_the_teachers_own_pairs_are_the_default(run_dir, video_dataset, tmp_path):
    """Frame gap and camera of its training; others only where they are asked for. LAPA's files have none."""
    path = run_dir / "checkpoints" / "last" / "pretrained_model" / "laq.safetensors"
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest.pop("manifest_sha256")
    manifest["source"] |= {"frame_gap_s": 0.2, "label_cameras": [CAMERA]}
    other = tmp_path / "laq.safetensors"
    other.with_suffix(".json").write_text(sealed(manifest))
    other.touch()
    lapas = tmp_path / "laq_openx.pt"
    lapas.touch()
    options = DataConfig(roots=(video_dataset,))
    found = teachers_pairs(other, options)
    assert (found.frame_gap_s, found.gap_s, found.label_cameras) == (0.2, 0.2, (CAMERA,))
    assert teachers_pairs(other, found) == found
    stated = replace(options, frame_gap_s=0.5)
    with pytest.raises(
        ValueError,
        match=r"trained on other pairs:\n  --data.frame-gap-s: command line 0.5, teacher 0.2\n.*--accept-other",
    ):
        teachers_pairs(other, stated)
    assert teachers_pairs(other, stated, accept_other=True) == replace(stated, label_cameras=(CAMERA,))
    assert teachers_pairs(lapas, options) == options
    assert (options.frame_gap_s, options.gap_s) == (None, 0.5)


def test_wrong_inputs_leave_no_run_directory(tmp_path, video_dataset):
    config = make_config(tmp_path / "run", video_dataset)
    gap = replace(config, data=replace(config.data, frame_gap_s=5))
    with pytest.raises(ValueError, match=r"no episode is longer than --data.frame-gap-s"):
        train_teacher(gap)
    batch = replace(config, data=replace(config.data, cameras=("observation.images.top",)))
    with pytest.raises(ValueError, match="every dataset must have every camera"):
        train_teacher(batch)
    assert not config.run_dir.exists()


def test_an_unknown_command_names_the_known_ones():
    with pytest.raises(ValueError, match="Unrecognized options: trian\nAvailable subcommands: train, label, check"):
        main(["trian"])


@pytest.mark.parametrize("option", ["random-shift", "feature-cache"])
def test_a_teacher_has_no_options_of_the_policys_data(tmp_path, video_dataset, capsys, option):
    arguments = ["--run-dir", str(tmp_path / "run"), "--data.roots", str(video_dataset)]
    assert tyro.cli(TeacherConfig, args=arguments).data.roots == (video_dataset,)
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(TeacherConfig, args=[*arguments, f"--data.{option}", "0.1"])
    assert stopped.value.code == 2 and f"--data.{option}" in capsys.readouterr().err
