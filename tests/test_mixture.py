"""mixture.py, data_views.py: unlike datasets in one run. Each is read as it is alone, and what it lacks is masked."""

import json
import os
import re
from dataclasses import replace
from inspect import getdoc
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import tyro
from accelerate import Accelerator
from conftest import record_dataset
from helpers import equal, lerobot_dataset
from lerobot.utils import constants as keys
from test_artifact import LATENTS, save
from test_artifact import make_core as make_artifact_core
from test_initial import open_from
from test_lerobot_smolvla import run_stage

import train_stage2
import train_stage3
from smolvla_shared import data, data_rows, data_split, data_table, data_views, lerobot_policy, mixture
from smolvla_shared.artifact import load_artifact
from smolvla_shared.batch import Batch, RawBatch
from smolvla_shared.config import ACTION, DataConfig, ModelConfig, PolicyDataConfig, RunConfig
from smolvla_shared.data_loader import SampleDataset, SampleSpec
from smolvla_shared.data_order import SampleKey, StepSampler
from smolvla_shared.feature_cache import prepare_features
from smolvla_shared.label_cache import LabelConfig, label, label_stores
from smolvla_shared.label_check import check
from smolvla_shared.label_health import read_verdict
from smolvla_shared.labels import OnlineLabels, labels_pairs, open_labels
from smolvla_shared.laq_files import load_laq, save_laq, teacher_id, teachers_pairs
from smolvla_shared.lerobot_card import teacher_lines
from smolvla_shared.losses import masked_mean
from smolvla_shared.mixture import DatasetEntry, read_mixture
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import freeze
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor, resize_with_pad
from smolvla_shared.teacher_config import CheckConfig
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config
from train_stage2 import Stage2Config
from train_stage3 import Stage3Config

CAMERA, WRIST = "observation.image", "observation.images.wrist"  # as conftest's datasets call them
FRONT, HAND = "observation.images.front", "observation.images.hand"  # the policy's
POLICY = Path("checkpoints") / "last" / "pretrained_model"
ARTIFACT = Path("artifacts") / "smolvla_shared_stage2_artifact.safetensors"


def write(path: Path, text: str) -> Path:
    path.write_text(dedent(text))
    return path


@pytest.fixture
def unlike(tmp_path, video_dataset, image_dataset) -> Path:
    """The mixture of video, with one camera at 20 fps, and images, with two at 10 fps, under the policy's names."""
    return write(
        tmp_path / "unlike.yaml",
        f"""
        datasets:
          - root: {video_dataset}
            cameras: {{{FRONT}: {CAMERA}}}
            weight: 3
          - root: {image_dataset}
            cameras:
              {HAND}: {WRIST}
              {FRONT}: {CAMERA}
            label_cameras: [{WRIST}]
            frame_gap_s: 0.3
            weight: 1
        """,
    )


@pytest.fixture(scope="module")
def two_cameras(datasets) -> Path:
    """A robot as labelled_dataset's, with a second camera of another size."""
    cameras = {CAMERA: (96, 96), WRIST: (48, 64)}
    return record_dataset(datasets / "two_cameras", 20, cameras, use_videos=True, state=4, action=4)


def frame(dataset: data.RobotDataset, row: int, camera: str) -> torch.Tensor:
    """As LeRobot reads it, uint8."""
    image = lerobot_dataset(dataset, return_uint8=True)[row][camera]
    return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_mixture_that_is_no_file_is_refused(tmp_path):
    """Opening a pipe would wait until somebody writes into it."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml", "nowhere.yaml"):
        with pytest.raises(ValueError, match=f"the mixture .*{name}: no such file"):
            read_mixture(tmp_path / name)


def test_the_file_of_the_documentation_is_read(tmp_path):
    example = getdoc(mixture).split("\n\n", 1)[1]
    first, second = read_mixture(write(tmp_path / "mixture.yaml", example))
    assert first == DatasetEntry(root="data/my_video", weight=3.0, cameras={FRONT: CAMERA})
    names = {FRONT: "observation.images.exterior_1_left", "observation.images.wrist": "observation.images.wrist_left"}
    own = {"cameras": names, "frame_gap_s": 0.4, "robot": "panda"}
    assert second == DatasetEntry(repo_id="lerobot/droid_100", weight=1.0, **own)
    options = tyro.cli(DataConfig, args=["--mixture", str(tmp_path / "mixture.yaml")])
    assert options.entries == (first, second)
    (example,) = re.findall(r"```yaml\n(.*?)```", Path("docs/data.md").read_text(), re.S)
    assert len(read_mixture(write(tmp_path / "docs.yaml", example))) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("datasets: [", r"mixture.yaml is not YAML: while parsing"),
        ("- root: a", r"should hold one list, `datasets:`, it holds \[\{\"root\": \"a\"\}\]"),
        ("datasets: []", "names no dataset"),
        ("datasets: [{root: a}]\nweights: [1]", "should hold one list"),
        ("datasets: [a]", 'dataset 1 does not hold what it should:\n  the whole: expected an object, found "a"'),
        (
            "datasets: [{root: a, camera: b}]",
            "dataset 1 .*:\n  camera: unknown; there are root, repo_id, weight, cameras",
        ),
        (
            "datasets: [{weight: 1}]",
            "dataset 1: a dataset has a root or a repo_id, this one has root None, repo_id None",
        ),
        ("datasets: [{root: a, repo_id: b}]", "dataset 1: a dataset has a root or a repo_id"),
        ("datasets: [{root: a}, {root: a}]", "names a twice"),
        ("datasets: [{root: a}, {root: b, weight: 2}]", "gives a weight to b only: give one to all, or to none"),
        ("datasets: [{root: a, weight: 0}]", "weight: expected above 0, got 0"),
        ("datasets: [{root: a, weight: 1e-1}]", 'weight: expected a number, found "1e-1"'),
        ("datasets: [{root: a, frame_gap_s: -1}]", "frame_gap_s: expected above 0"),
        ("datasets: [{root: a, robot: ../b}]", "dataset 1: robot of a: a name of letters, digits"),
        ("datasets: [{root: a, cameras: {}}]", "cameras of a are empty"),
        ("datasets: [{root: a, cameras: {front: x, hand: x}}]", "cameras of a names x twice"),
        ("datasets: [{root: a, cameras: {front: x, front: y}}]", "is not YAML: front twice in one place"),
        ("datasets: [{root: a, cameras: {front: ' '}}]", "cameras of a has an empty name"),
        ("datasets: [{root: a, cameras: {'': x}}]", "cameras of a has an empty name"),
        ("a: &a [x, x]\nb: &b [*a, *a]\ndatasets: *b", r"is not YAML: \*a refers to another place: write it out"),
        ("datasets: &a [*a]", r"is not YAML: \*a refers to another place"),
        ("datasets: !!python/object/apply:os.system ['touch evil']", "is not YAML: could not determine a constructor"),
        ("datasets:\n\t- root: a", "is not YAML: while scanning for the next token"),
        ("datasets: [{root: a, cameras: [front]}]", r"cameras: expected an object, found \[\"front\"\]"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path, text, message):
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        DataConfig(mixture=path)
    assert str(path) in str(error.value)


def test_a_mixture_stands_for_the_other_options(tmp_path, unlike):
    with pytest.raises(ValueError, match=r"the mixture .*nowhere.yaml: no such file"):
        DataConfig(mixture=tmp_path / "nowhere.yaml")
    with pytest.raises(
        ValueError, match=r"--data.mixture .* takes the place of --data.roots, --data.weights: drop one"
    ):
        DataConfig(mixture=unlike, roots=("a",), weights=(1.0,))
    options = PolicyDataConfig(roots=("x",))
    stated = {"latent_loss_weight": 1.0, "laq_ckpt": Path("laq.pt"), "run_dir": tmp_path, "data": options}
    with pytest.raises(ValueError, match=r"--video-mixture .* takes the place of --video-roots: drop one"):
        Stage3Config(**stated, video_mixture=unlike, video_roots=("a",))
    assert len(Stage3Config(**stated, video_mixture=unlike).video_mixture_entries) == 2


def test_a_camera_that_a_dataset_does_not_have_is_refused(tmp_path, video_dataset):
    for entry in (f"cameras: {{{FRONT}: top}}", "label_cameras: [top]"):
        path = write(tmp_path / "mixture.yaml", f"datasets: [{{root: {video_dataset}, {entry}}}]")
        with pytest.raises(ValueError, match=rf"names top as a camera of {video_dataset}, which has {CAMERA}$"):
            data.open_datasets(DataConfig(mixture=path))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_every_row_is_read_as_from_its_dataset_alone(unlike):
    """Frames, pairs at each dataset's own gap and of its own label camera, under the policy's names."""
    datasets = data.open_datasets(DataConfig(mixture=unlike))
    _, images = datasets
    cameras, label_cameras = data_views.choose_cameras(datasets, DataConfig(mixture=unlike))
    assert (cameras, label_cameras) == ((FRONT, HAND), (FRONT,))
    assert [(d.gap, d.label_views((FRONT,))) for d in datasets] == [(10, (CAMERA,)), (3, (WRIST,))]
    spec = SampleSpec(cameras=cameras, label_cameras=label_cameras, pair_size=40)
    places = [(1, 5), (0, 3), (1, 6), (0, 150)]
    raw = SampleDataset(datasets, spec, seed=0)[[SampleKey(0, slot, *place) for slot, place in enumerate(places)]]
    assert raw.image_mask.tolist() == [[True, True], [True, False]] * 2
    for slot, (index, row) in enumerate(places):
        dataset, view = datasets[index], [CAMERA, WRIST][index]
        expected = resize_with_pad(frame(dataset, row, CAMERA)[None].float() / 255, 96)[0]
        assert torch.equal(raw.images[0][slot], expected), slot
        if dataset is images:
            assert torch.equal(raw.images[1][slot], frame(dataset, row, WRIST)), slot
        else:
            assert not raw.images[1][slot].any(), slot
        for place, at in enumerate((row, row + dataset.gap)):
            pair = frame(dataset, at, view)[None].float() / 255
            resized = torch.nn.functional.interpolate(pair, (40, 40), mode="bilinear", antialias=True)[0]
            assert torch.equal(raw.pairs[slot, 0, place], resized), (slot, place)
    # Where no sample of a batch has a camera, it is as large as elsewhere.
    alone = SampleDataset(datasets, spec, seed=0)[[SampleKey(0, 0, 0, 3)]]
    assert [image.shape for image in alone.images] == [image[:1].shape for image in raw.images]
    assert equal(alone.images[0], raw.images[0][1:2]) and not alone.image_mask[0, 1]


def test_shares_of_a_mixture_are_those_of_every_batch(unlike):
    options = DataConfig(mixture=unlike)
    datasets = data.open_datasets(options)
    rows = [(index, dataset.rows()) for index, dataset in enumerate(datasets)]
    weights = data_split.weights_of(datasets, rows, options.balance)
    sampler = StepSampler(data_split.weighted(rows, weights), 0, 8, 0, 20)
    assert all([key.dataset for key in step].count(0) == 6 for step in sampler)


def test_a_large_dataset_counts_as_the_square_root_of_its_frames(tmp_path, unlike, video_dataset, image_dataset):
    """Of those that train: here 144 and 16 of its frames."""
    options = PolicyDataConfig(roots=(video_dataset, image_dataset), balance="sqrt")
    datasets = data.open_datasets(options)
    rows = [(0, datasets[0].rows(0, 144)), (1, datasets[1].rows(0, 16))]
    groups = data_split.weighted(rows, data_split.weights_of(datasets, rows, "sqrt"))
    assert [group.share for group in groups] == [12 / 16, 4 / 16]
    sampler = StepSampler(groups, 0, 8, 0, 20)
    assert all([key.dataset for key in step].count(0) == 6 for step in sampler)
    assert data_split.weights_of(datasets, rows, "frames") == {}
    # In Stage 3 among the labelled datasets and among the video, each of which has its share of a batch.
    config = Stage3Config(run_dir=tmp_path, data=options, val_fraction=0, latent_loss_weight=1, laq_ckpt=Path("laq.pt"))
    for dataset in datasets:
        dataset.frame_gap_s = 0.1
    training, groups, _ = data_split.split_with_video([*datasets, *datasets], 2, config, 0.5)
    roots = [len(rows) ** 0.5 for _, rows in training[:2]]
    assert [group.share for group in groups[:2]] == pytest.approx([0.5 * root / sum(roots) for root in roots])
    assert [group.share for group in groups[2:]] == pytest.approx(
        [0.5 * len(g) ** 0.5 / sum(len(g) ** 0.5 for g in groups[2:]) for g in groups[2:]]
    )
    for stated in ({"roots": ("a", "b"), "weights": (1.0, 2.0)}, {"mixture": unlike}):
        with pytest.raises(ValueError, match=r"--data.balance sqrt and weights both say how much a dataset counts"):
            DataConfig(**stated, balance="sqrt")


def test_names_alone_change_nothing(tmp_path, labelled_dataset):
    """One dataset under its own names and under the policy's gives the same batch, frames sent once included."""
    path = write(tmp_path / "m.yaml", f"datasets: [{{root: {labelled_dataset}, cameras: {{{FRONT}: {CAMERA}}}}}]")
    places = [SampleKey(0, slot, 0, row) for slot, row in enumerate((3, 40, 41))]
    (plain,) = data.open_datasets(DataConfig(roots=(labelled_dataset,)))
    one = SampleDataset([plain], SampleSpec((CAMERA,), state_dim=4, label_cameras=(CAMERA,)), seed=0)[places]
    other = SampleDataset(
        data.open_datasets(DataConfig(mixture=path)), SampleSpec((FRONT,), state_dim=4, label_cameras=(FRONT,)), seed=0
    )[places]
    assert equal(vars(one), vars(other))
    assert other.images[0].data_ptr() == other.pairs.data_ptr()


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def core() -> SmolVLASharedCore:
    torch.manual_seed(0)
    dims = {"state_dim": 4, "action_dim": 4, "chunk_size": 4}
    core = SmolVLASharedCore(make_core_config(ModelConfig(preset="tiny"), (FRONT, HAND), **dims))
    freeze(core, ["vision tower", "connector"])
    return core


def to_batch(core: SmolVLASharedCore, raw: RawBatch) -> Batch:
    statistics = {"state": Statistics((0.0,) * 4, (1.0,) * 4), ACTION: Statistics((0.0,) * 4, (1.0,) * 4)}
    return Preprocessor(core.config, load_trunk_tokenizer("tiny", None), statistics)(raw)


def errors_and_gradients(core: SmolVLASharedCore, raw: RawBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = to_batch(core, raw)
    core.zero_grad()
    errors = core(batch)[ACTION]
    masked_mean(errors, batch.masks[ACTION]).backward()
    return errors.detach(), {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}


def read(datasets: list[data.RobotDataset], places: list[tuple[int, int]], **spec) -> RawBatch:
    spec = SampleSpec(**{"cameras": (FRONT, HAND)} | spec, state_dim=4, chunk_size=4, action_dim=4)
    spec = replace(spec, draws={ACTION: (4, 32)})
    return SampleDataset(datasets, spec, seed=0)[[SampleKey(0, slot, *place) for slot, place in enumerate(places)]]


@pytest.fixture(scope="module")
def robots(tmp_path_factory, labelled_dataset, two_cameras) -> Path:
    return write(
        tmp_path_factory.mktemp("robots") / "robots.yaml",
        f"""
        datasets:
          - root: {two_cameras}
            cameras: {{{FRONT}: {CAMERA}, {HAND}: {WRIST}}}
          - root: {labelled_dataset}
            cameras: {{{FRONT}: {CAMERA}}}
        """,
    )


def test_a_masked_camera_is_one_that_is_not_there(core, robots):
    """A model without it, of the same weights, has the same errors and gradients; what its image shows is not seen."""
    datasets = data.open_datasets(DataConfig(mixture=robots))
    raw = read(datasets, [(1, 3), (1, 70)])
    assert raw.image_mask.tolist() == [[True, False]] * 2
    errors, gradients = errors_and_gradients(core, raw)
    without = SmolVLASharedCore(replace(core.config, cameras=(FRONT,)))
    without.load_state_dict(core.state_dict())
    freeze(without, ["vision tower", "connector"])
    expected, expected_gradients = errors_and_gradients(without, read(datasets, [(1, 3), (1, 70)], cameras=(FRONT,)))
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    raw.images[1] = torch.randint(0, 256, raw.images[1].shape, dtype=torch.uint8)
    seen = errors_and_gradients(core, raw)
    assert torch.equal(seen[0], errors) and equal(seen[1], gradients)
    raw.image_mask[:] = True
    assert not torch.allclose(errors_and_gradients(core, raw)[0], errors, atol=1e-4)


def test_samples_of_unlike_datasets_do_not_touch_each_other(core, robots):
    datasets = data.open_datasets(DataConfig(mixture=robots))
    places = [(0, 3), (1, 3), (0, 90), (1, 70)]
    together, _ = errors_and_gradients(core, read(datasets, places))
    for slot, place in enumerate(places):
        raw = read(datasets, places[: slot + 1])  # so that it is drawn in its own slot
        alone, _ = errors_and_gradients(core, raw)
        torch.testing.assert_close(alone[slot], together[slot], rtol=1e-5, atol=1e-6)
        assert raw.dataset[slot] == place[0]


def test_a_missing_camera_has_its_place_in_a_rollout_too(core, robots):
    """With special tokens, which are not masked, the order counts: training and policy have the same."""
    special = replace(core.config, image_special_tokens=(5, 6), cameras=(HAND, FRONT))
    datasets = data.open_datasets(DataConfig(mixture=robots))
    raw = read(datasets, [(1, 3), (0, 70)], cameras=(HAND, FRONT))
    model = SmolVLASharedCore(special)
    model.load_state_dict(core.state_dict())
    batch = to_batch(model, raw)
    assert batch.image_mask.tolist() == [[True, False], [True, True]]
    observation = {
        FRONT: raw.images[1][:1],
        keys.OBS_STATE: batch.state[:1, :4],
        keys.OBS_LANGUAGE_TOKENS: batch.text[:1],
        keys.OBS_LANGUAGE_ATTENTION_MASK: batch.text_mask[:1],
    }
    rolled_out = lerobot_policy.to_batch(observation, special, optional_cameras=(HAND,))
    assert torch.equal(rolled_out.images, batch.images[:1])
    assert torch.equal(rolled_out.image_mask, batch.image_mask[:1])
    prefix, other = model.encode(batch), model.encode(rolled_out)
    torch.testing.assert_close(other.keys_values[-1][0], prefix.keys_values[-1][0][:1], rtol=1e-4, atol=1e-5)


# --- caches -----------------------------------------------------------------------------------------------------------


def test_cached_features_are_those_of_the_dataset_under_any_name(tmp_path, core, robots, two_cameras):
    """A camera that a dataset lacks has no cache; the others are shared with runs under the datasets' own names."""
    options = {"num_workers": 0, "feature_cache": tmp_path / "features", "feature_cache_dtype": "float32"}
    config = Stage3Config(run_dir=tmp_path / "run", data=PolicyDataConfig(mixture=robots, **options))
    datasets, accelerator = data.open_datasets(config.data), Accelerator(cpu=True)
    features = prepare_features(core, datasets, (FRONT, HAND), config, accelerator)
    assert [store is None for store in features[HAND]] == [False, True]
    places = [(1, 3), (0, 70), (0, 4)]
    cached, _ = errors_and_gradients(core, read(datasets, places, features=features))
    expected, _ = errors_and_gradients(core, read(datasets, places))
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-5)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}
    plain = replace(config, data=PolicyDataConfig(roots=(two_cameras,), **options))
    prepare_features(core, data.open_datasets(plain.data), (CAMERA, WRIST), plain, accelerator)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")} == shards


def test_labels_are_kept_under_the_datasets_own_names(tmp_path, unlike, video_dataset, image_dataset, laq_checkpoint):
    """Of each dataset's own label camera and gap; the labels of one dataset alone serve a mixture."""
    cache = {"laq_ckpt": laq_checkpoint, "label_cache": tmp_path / "labels"}
    of_one, of_all = DataConfig(roots=(video_dataset,), num_workers=0), DataConfig(mixture=unlike, num_workers=0)
    label(LabelConfig(**cache, data=of_one), data_views.open_video(of_one))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").rglob("*")}
    label(LabelConfig(**cache, data=of_all), data_views.open_video(of_all))
    assert all(path.stat().st_mtime_ns == at for path, at in written.items() if path.is_file())
    config = Stage2Config(
        run_dir=tmp_path, data=PolicyDataConfig(mixture=unlike), labels="cache", label_cache=cache["label_cache"]
    )
    options = labels_pairs(config, config.data)
    assert (options.label_cameras, options.frame_gap_s) == ((FRONT,), 0.5)
    datasets = data.open_datasets(options)
    stores = label_stores(cache["label_cache"], datasets, None, "quantized", (FRONT,))
    assert [(store.key["cameras"], store.key["frame_gap_s"]) for store in stores] == [((CAMERA,), 0.5), ((WRIST,), 0.3)]
    # The cached labels are those that the teacher gives in the run.
    cached = open_labels(config, datasets, (FRONT,))
    online = open_labels(
        replace(config, labels="online", label_cache=None, laq_ckpt=laq_checkpoint), datasets, (FRONT,)
    )
    spec = SampleSpec((FRONT, HAND), label_cameras=(FRONT,), pair_size=online.pair_size)
    raw = SampleDataset(datasets, spec, seed=0)[[SampleKey(0, slot, slot % 2, 30 + slot) for slot in range(8)]]
    assert raw.pair_mask.any()
    known = raw.pair_mask[:, 0]
    assert torch.equal(cached(raw)[known], online(raw)[known])


def test_other_pairs_of_a_dataset_than_the_teachers_are_refused(tmp_path, unlike, laq_checkpoint):
    def teacher(**source) -> Path:
        save_laq(load_laq(laq_checkpoint), tmp_path / "laq.safetensors", source)
        return tmp_path / "laq.safetensors"

    options, known = DataConfig(mixture=unlike), {"frame_gap_s": 0.5, "label_cameras": [CAMERA]}
    images = options.entries[1].name
    with pytest.raises(ValueError, match="trained on other pairs") as error:
        teachers_pairs(teacher(**known), options)
    assert f"\n  frame_gap_s of {images}: command line 0.3, teacher 0.5\n" in str(error.value)
    assert f"\n  label_cameras of {images}: command line {WRIST}, teacher {FRONT}\n" in str(error.value)
    accepted = teachers_pairs(teacher(**known), options, accept_other=True)
    # It was trained on the camera that the mixture calls front.
    assert (accepted.frame_gap_s, accepted.label_cameras) == (0.5, (FRONT,))
    datasets = data.open_datasets(options)
    source = data_views.pairs_source(datasets, (FRONT,))
    assert source == {
        "frame_gap_s": 0.5,
        "label_cameras": [FRONT],
        "of_mixture": {"frame_gap_s": [0.3], "label_cameras": [WRIST]},
    }
    assert teachers_pairs(teacher(**source), options).frame_gap_s == 0.5


# --- what it starts from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, mapped, chosen, label_cameras",
    [
        (("image_0",), (FRONT, HAND), (FRONT, HAND), (FRONT,)),
        ((FRONT, HAND), (HAND, FRONT), (FRONT, HAND), (FRONT,)),
        ((FRONT, HAND), (HAND, "side", FRONT), (FRONT, HAND, "side"), (FRONT,)),
        (("image_0", HAND), (HAND, FRONT), (FRONT, HAND), (FRONT,)),
        # Nothing takes the label camera's place: it is asked for, and refused where no dataset has it.
        ((FRONT, HAND), (HAND,), (HAND,), (FRONT,)),
    ],
)
def test_names_of_a_mixture_take_the_places_of_the_artifacts(tmp_path, own, mapped, chosen, label_cameras):
    cameras = ", ".join(f"{name}: {name}_recorded" for name in mapped)
    path = write(tmp_path / "mixture.yaml", f"datasets: [{{root: a, cameras: {{{cameras}}}}}]")
    latents = replace(LATENTS, label_cameras=own[:1])
    initial = open_from(save(tmp_path, make_artifact_core(cameras=own), latents))
    options = initial.data_options(DataConfig(mixture=path), with_latents=False)
    assert options.cameras == chosen
    stated = DataConfig(mixture=path, cameras=(HAND,))
    assert initial.data_options(stated, with_latents=False).cameras == (HAND,)
    # The label camera goes with its place.
    assert initial.data_options(DataConfig(mixture=path), with_latents=True).label_cameras == label_cameras


def test_a_camera_that_some_lack_is_refused_unless_the_user_names_it(tmp_path, video_dataset, two_cameras):
    """The artifact's own names are nobody's choice: what today's data lacks is not masked in silence."""
    initial = open_from(save(tmp_path, make_artifact_core(cameras=(CAMERA, WRIST)), LATENTS))
    options = PolicyDataConfig(roots=(two_cameras, video_dataset))
    config = Stage3Config(run_dir=tmp_path / "run", data=options)
    datasets = data.open_datasets(options)
    with pytest.raises(ValueError, match="every dataset must have every camera, or you name them"):
        initial.choose_views(config, datasets, with_latents=False)
    named = replace(config, data=replace(options, cameras=(CAMERA, WRIST)))
    assert initial.choose_views(named, datasets, with_latents=False)[1:] == ((CAMERA, WRIST), ())
    assert data_views.may_be_missing(datasets, (CAMERA, WRIST)) == (WRIST,)
    with pytest.raises(ValueError, match=f"no camera is in all labelled datasets: {WRIST} is not in {video_dataset}"):
        data_views.may_be_missing(datasets, (WRIST,))


def test_labelled_datasets_of_different_rates_are_refused(labelled_dataset, image_dataset, video_dataset):
    both = DataConfig(roots=(labelled_dataset, image_dataset))
    said = f"{labelled_dataset}: 20, {image_dataset}: 10 actions a second"
    with pytest.raises(ValueError, match=f"labelled datasets have different rates, .*: {said}"):
        data_views.open_recordings(both, None, False)
    # Video of another rate has no actions to differ.
    labelled, all_of_them = data_views.open_recordings(
        DataConfig(roots=(labelled_dataset,)), DataConfig(roots=(image_dataset,)), True
    )
    assert [dataset.fps for dataset in all_of_them] == [20, 10] and len(labelled) == 1


def test_every_dataset_has_as_many_label_cameras_as_the_run(tmp_path, image_dataset, video_dataset):
    entry = f"{{root: {image_dataset}, label_cameras: [{WRIST}, {CAMERA}]}}"
    one, two = (write(tmp_path / f"{n}.yaml", f"datasets: [{entry}, {{root: {video_dataset}}}]") for n in "ab")
    datasets = data.open_datasets(DataConfig(mixture=one))
    with pytest.raises(
        ValueError, match=f"the run has 1 label cameras .*{image_dataset} 2, {video_dataset} 1: name as"
    ):
        data_views.choose_cameras(datasets, DataConfig(mixture=one))
    write(two, f"datasets: [{entry}]")
    options = DataConfig(mixture=two, label_cameras=(CAMERA, WRIST))
    assert data_views.choose_cameras(datasets[:1], options)[1] == (CAMERA, WRIST)
    assert datasets[0].label_views((CAMERA, WRIST)) == (WRIST, CAMERA)
    for names, said in (("[]", "are empty"), (f"[{WRIST}, {WRIST}]", f"names {WRIST} twice")):
        write(one, f"datasets: [{{root: {image_dataset}, label_cameras: {names}}}]")
        with pytest.raises(ValueError, match=f"label_cameras of .* {said}"):
            DataConfig(mixture=one)
    with pytest.raises(ValueError, match=r"--data\.label-cameras names top twice"):
        DataConfig(roots=(image_dataset,), label_cameras=("top", "top"))


def test_the_table_shows_every_dataset_beside_the_artifact(unlike):
    datasets = data.open_datasets(DataConfig(mixture=unlike))
    table = data_views.camera_table(datasets, (FRONT, HAND), start=("image_0",))
    rows = [re.split(r"  +", line) for line in table.splitlines()]
    assert rows == [
        ["camera of the policy", FRONT, HAND],
        ["starts as", "image_0", "new"],
        [datasets[0].name, CAMERA, "- (masked)"],
        [datasets[1].name, CAMERA, WRIST],
    ]
    (line,) = data_views.camera_table(datasets, (FRONT,)).splitlines()[3:]
    assert line == f"{datasets[1].name}: the policy does not see {WRIST} (name it with --data.cameras)"


def columns_of(table: str) -> dict[str, list[str]]:
    """The cells of a table, by the title of their column."""
    titles, *rows = (re.split(r"  +", line.strip()) for line in table.splitlines())
    return dict(zip(titles, zip(*rows, strict=True), strict=True))


def test_the_table_says_what_the_samples_of_a_run_are(unlike):
    """Shares and epochs are counted over all samples of the run: of weights, and of frames that count the same."""
    options = DataConfig(mixture=unlike)
    datasets = data.open_datasets(options)
    config = RunConfig(run_dir=Path("x"), data=options, steps=50, batch_size=8, val_fraction=0.25)
    training, _ = data_split.split_datasets(datasets, config.val_fraction, config.seed)
    training = data.with_pairs(datasets, training)
    for groups in (data_split.balanced(datasets, training, "frames"), data_split.weighted(training)):
        said = data_table.describe(datasets, groups, config, (FRONT, HAND), (FRONT,))
        assert said.startswith("50 steps of 8 samples:\n") and "\ncamera of the policy  " in said
        shown = columns_of(data_table.data_table(datasets, groups, config, (FRONT, HAND), (FRONT,)))
        assert [*shown] == "dataset episodes frames hours fps cameras share epochs pairs".split()
        keys = [key for step in StepSampler(groups, config.seed, 8, 0, 50) for key in step]
        for index, dataset in enumerate(datasets):
            taken = sum(key.dataset == index for key in keys)
            # The episodes that are not held out, each without the frames of its end, which have no pair.
            lengths = [end - start for start, end in zip(training[index][1].start, training[index][1].end)]
            assert shown["frames"][index] == str(sum(lengths))
            assert float(shown["share"][index].removesuffix("%")) == pytest.approx(100 * taken / len(keys), abs=3)
            assert float(shown["epochs"][index]) == pytest.approx(taken / sum(lengths), rel=0.1)
            assert float(shown["hours"][index]) == pytest.approx(sum(lengths) / dataset.fps / 3600, rel=0.01)
        assert shown["episodes"] == ("6 of 8", "6 of 8") and shown["fps"] == ("20", "10")
        assert shown["cameras"] == ("1 of 2", "2") and shown["pairs"] == (f"{CAMERA}, 0.5 s", f"{WRIST}, 0.3 s")
    assert len({line.index("episodes") + 8 for line in said.splitlines() if "episodes" in line}) == 1
    lines = data_table.data_table(datasets, groups, config).splitlines()
    assert len({len(line) for line in lines}) == 1  # numbers end where their titles do


def test_the_table_names_a_dataset_that_is_not_read(video_dataset, image_dataset):
    """One whose episodes are too short for the gap, beside one of 2.0 to 2.7 s."""
    datasets = data.open_datasets(DataConfig(roots=(video_dataset, image_dataset), frame_gap_s=2.0))
    paired = data.with_pairs(datasets, [(index, dataset.rows()) for index, dataset in enumerate(datasets)])
    titles, first, second, last = data_table.data_table(datasets, data_rows.group_rows(paired)).splitlines()
    assert titles.split() == "dataset episodes frames hours fps".split()
    assert (first.split()[1:5], second.split()[1]) == (["0", "of", "8", "0"], "7")
    assert last == f"{video_dataset}: no episode is longer than its frame gap of 2 s, none is read"


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stage_2_trains_on_unlike_datasets_and_goes_on_only_with_the_same(tmp_path, unlike, laq_checkpoint, capsys):
    options = ["--data.mixture", unlike, "--model.preset", "tiny", "--laq-ckpt", laq_checkpoint, "--batch-size", "4"]
    run_stage(train_stage2, tmp_path / "s2", *options)
    printed = capsys.readouterr().out
    assert re.search(rf"^camera of the policy +{FRONT} +{HAND}$", printed, re.M)
    assert re.search(rf" +{CAMERA} +- \(masked\)$", printed, re.M)
    assert re.search(rf" +{CAMERA} +{WRIST}$", printed, re.M)
    assert re.search(rf" +1 of 2 +75\.0% +[\d.]+ +{CAMERA}, 0.5 s$", printed, re.M)
    assert re.search(rf" +2 +25\.0% +[\d.]+ +{WRIST}, 0.3 s$", printed, re.M)
    manifest = json.loads((tmp_path / "s2" / ARTIFACT).with_suffix(".json").read_text())
    assert (manifest["core"]["cameras"], manifest["latents"]["label_cameras"]) == ([FRONT, HAND], [FRONT])
    assert (manifest["latents"]["frame_gap_s"], manifest["latents"]["own_gaps_s"]) == (0.5, [0.3])
    (own,) = [entry for entry in read_mixture(unlike) if entry.label_cameras]
    assert manifest["latents"]["own_label_cameras"] == {own.name: [WRIST]}
    assert f"- Latent actions of `{own.name}` are of its `{WRIST}`" in "\n".join(teacher_lines(manifest["latents"]))
    assert "on observation.images.front, 0.5 or 0.3 s apart" in printed
    run_stage(train_stage2, tmp_path / "s2", *options, "--steps", "2", "--resume")
    unlike.write_text(unlike.read_text().replace("weight: 3", "weight: 2"))
    with pytest.raises(ValueError, match=r"--resume would be another run.*\n  --data.mixture-entries: was "):
        run_stage(train_stage2, tmp_path / "s2", *options, "--steps", "3", "--resume")


def test_other_pairs_of_a_video_dataset_are_refused_in_stage_3(
    tmp_path, labelled_dataset, image_dataset, laq_checkpoint
):
    """By the teacher, unless they are accepted; and by an artifact, whose latent head has not learned them."""
    teacher = tmp_path / "laq.safetensors"
    save_laq(load_laq(laq_checkpoint), teacher, {"frame_gap_s": 0.5, "label_cameras": [CAMERA]})
    video = f"datasets: [{{root: {image_dataset}, frame_gap_s: 0.3, label_cameras: [{WRIST}]}}]"
    options = ["--laq-ckpt", teacher, "--latent-loss-weight", "0.5", "--data.roots", labelled_dataset]
    options += ["--video-mixture", write(tmp_path / "video.yaml", video), "--chunk-size", "4", "--n-action-steps", "2"]
    with pytest.raises(ValueError, match="trained on other pairs") as error:
        run_stage(train_stage3, tmp_path / "s3", *options, "--model.preset", "tiny")
    assert f"\n  frame_gap_s of {image_dataset}: command line 0.3, teacher 0.5\n" in str(error.value)
    assert f"\n  label_cameras of {image_dataset}: command line {WRIST}, teacher {CAMERA}\n" in str(error.value)
    latents = replace(LATENTS, teacher_id=teacher_id(load_laq(teacher)), label_cameras=(CAMERA,), frame_gap_s=0.5)
    artifact = save(tmp_path / "s2", make_artifact_core(cameras=(CAMERA,)), latents)
    options += ["--stage2-artifact", artifact, "--accept-other-pairs"]
    with pytest.raises(
        ValueError, match=r"has learned other .*:\n  --data.frame-gap-s: command line 0.3, artifact 0.5"
    ):
        run_stage(train_stage3, tmp_path / "s3", *options)
    assert not (tmp_path / "s3").exists()


@pytest.mark.slow
def test_what_is_recorded_of_the_pairs_is_what_was_used(tmp_path, video_dataset, image_dataset, laq_checkpoint, capsys):
    """Every dataset has its own gap: the default of the run is nobody's."""
    entries = [f"{{root: {video_dataset}, frame_gap_s: 0.4}}", f"{{root: {image_dataset}, frame_gap_s: 0.2}}"]
    path = write(tmp_path / "own.yaml", f"datasets: [{', '.join(entries)}]")
    data_options = PolicyDataConfig(mixture=path, cameras=(CAMERA,), num_workers=0)
    options = CheckConfig(
        laq_ckpt=laq_checkpoint, data=data_options, out=tmp_path / "check", pairs=64, detailed_pairs=32
    )
    with pytest.raises(SystemExit):
        check(options, data_views.open_video(data_options))
    verdict = read_verdict(report := tmp_path / "check" / "label_health.json")
    assert (verdict.frame_gap_s, verdict.own_gaps_s) == (0.2, (0.4,))
    options = ["--data.mixture", path, "--data.cameras", CAMERA, "--model.preset", "tiny", "--laq-ckpt", laq_checkpoint]
    health = ["--label-health", report, "--accept-label-health"]
    run_stage(train_stage2, tmp_path / "s2", *options, *health)
    assert "0.2 or 0.4 s apart" in capsys.readouterr().out
    latents = load_artifact(tmp_path / "s2" / ARTIFACT).manifest.latents
    assert (latents.frame_gap_s, latents.own_gaps_s, latents.health) == (0.2, (0.4,), verdict.verdict)
    path.write_text(path.read_text().replace("0.4", "0.5"))
    with pytest.raises(
        ValueError, match=r"other labels:\n  frame_gap_s of other datasets: this run \[0.5\], label_health"
    ):
        run_stage(train_stage2, tmp_path / "s3", *options, *health)
    # The latent head has learned pairs of both gaps, and of no other.
    initial = open_from(tmp_path / "s2" / ARTIFACT)
    with pytest.raises(
        ValueError, match=r"has learned other latent actions:\n  --data.frame-gap-s: command line 0.5, art"
    ):
        initial.latent_dims(
            teacher := OnlineLabels(load_laq(laq_checkpoint), "quantized", (CAMERA,)),
            DataConfig(mixture=path),
            (CAMERA,),
        )
    path.write_text(path.read_text().replace("0.5", "0.4"))
    assert initial.latent_dims(teacher, DataConfig(mixture=path), (CAMERA,))["code_seq_len"] == 4


@pytest.mark.slow
def test_a_robot_with_two_cameras_starts_from_video_of_one(tmp_path, robots, video_dataset, laq_checkpoint, capsys):
    """Beside another robot, which lacks the second, and co-trained on the video, whose camera has another name."""
    options = ["--laq-ckpt", laq_checkpoint, "--model.preset", "tiny", "--data.roots", video_dataset]
    run_stage(train_stage2, tmp_path / "s2", *options)
    video = write(tmp_path / "video.yaml", f"datasets: [{{root: {video_dataset}, cameras: {{{FRONT}: {CAMERA}}}}}]")
    options = ["--stage2-artifact", tmp_path / "s2" / ARTIFACT, "--laq-ckpt", laq_checkpoint, "--chunk-size", "4"]
    options += ["--n-action-steps", "2", "--latent-loss-weight", "0.1", "--data.mixture", robots]
    run_stage(train_stage3, tmp_path / "s3", *options, "--video-mixture", video)
    printed = capsys.readouterr().out
    assert f"cameras {FRONT} as {CAMERA}, {HAND} as one more; freshly initialised: action head" in printed
    assert re.search(rf"^starts as +{CAMERA} +new$", printed, re.M)
    assert re.search(rf"^{video_dataset} +{CAMERA} +- \(masked\)$", printed, re.M)
    config = json.loads((tmp_path / "s3" / POLICY / "config.json").read_text())
    assert (config["core"]["cameras"], config["optional_cameras"]) == ([FRONT, HAND], [HAND])
    shapes = {name: of["shape"] for name, of in config["input_features"].items() if of["type"] == "VISUAL"}
    assert shapes == {FRONT: [3, 96, 96], HAND: [3, 48, 64]}
    assert config["fps"] == 20
    with pytest.raises(ValueError, match="every dataset must have the label cameras, but not"):
        run_stage(train_stage3, tmp_path / "s4", *options, "--video-roots", video_dataset)
    assert not (tmp_path / "s4").exists()
