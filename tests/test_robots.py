"""robots.py: several robots in one run. A sample is what it is in a run of its robot alone, and so is a policy."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import record_dataset
from helpers import lerobot_dataset
from test_initial import open_from
from test_lerobot_smolvla import run_stage

import train_stage2
import train_stage3
from examples import imagine
from smolvla_shared import data, data_rows, data_table, data_views, mixture
from smolvla_shared.artifact import load_artifact
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import ACTION, LATENT, DataConfig, ModelConfig, PolicyDataConfig
from smolvla_shared.data import ACTION_KEY, STATE_KEY
from smolvla_shared.data_loader import SampleDataset, SampleSpec
from smolvla_shared.data_order import SampleKey
from smolvla_shared.evaluate import held_out_errors
from smolvla_shared.lerobot_files import load_saved, of_robot
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.losses import masked_mean
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import freeze
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor
from smolvla_shared.robot_preprocessor import make_preprocessor
from smolvla_shared.robots import Robots
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config

CAMERA = "observation.image"
POLICY = Path("checkpoints") / "last" / "pretrained_model"
ARTIFACT = Path("artifacts") / "smolvla_shared_stage2_artifact.safetensors"


@pytest.fixture(scope="session")
def narrow(datasets) -> Path:
    """A robot with fewer joints than that of labelled_dataset, in other units, at its rate."""
    root = record_dataset(datasets / "narrow", 20, {CAMERA: (96, 96)}, use_videos=True, state=3, action=2)
    (path,) = root.glob("data/*/*.parquet")
    table, stats = pq.read_table(path), json.loads((root / "meta" / "stats.json").read_text())
    for key, factor, shift in ((STATE_KEY, 10, 1.0), (ACTION_KEY, 3, 0.5)):
        place = table.schema.get_field_index(key)
        values = [[factor * value + shift for value in row] for row in table[key].to_pylist()]
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
        for name in ("mean", "min", "max"):
            stats[key][name] = [factor * value + shift for value in stats[key][name]]
        stats[key]["std"] = [factor * value for value in stats[key]["std"]]
    pq.write_table(table, path)
    (root / "meta" / "stats.json").write_text(json.dumps(stats))
    return root


@pytest.fixture(scope="session")
def stateless(datasets) -> Path:
    return record_dataset(datasets / "stateless", 20, {CAMERA: (96, 96)}, use_videos=True)


def write(path: Path, *entries: str) -> Path:
    path.write_text("datasets:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
    return path


@pytest.fixture
def two_robots(tmp_path, labelled_dataset, narrow) -> Path:
    return write(tmp_path / "two.yaml", f"root: {labelled_dataset}, robot: wide", f"root: {narrow}, robot: so100")


def lerobots_statistics(root: Path, key: str) -> Statistics:
    """meta/stats.json; a dimension that never changes gets the deviation 1."""
    of = json.loads((root / "meta" / "stats.json").read_text())[key]
    still = np.isclose(of["min"], of["max"])
    return Statistics(of["mean"], np.where(still, 1, of["std"]).tolist())


def all_rows(datasets: list[data.RobotDataset]) -> list:
    return [(index, dataset.rows()) for index, dataset in enumerate(datasets)]


def close(found: Statistics, expected: Statistics) -> bool:
    return np.allclose(found.mean, expected.mean, atol=1e-5) and np.allclose(found.std, expected.std, atol=1e-5)


# --- statistics and widths --------------------------------------------------------------------------------------------


def test_the_statistics_of_a_robot_are_lerobots_of_its_dataset(two_robots, labelled_dataset, narrow):
    datasets = data.open_datasets(DataConfig(mixture=two_robots))
    robots = Robots.find(datasets, [ACTION])
    assert (robots.names, robots.acting) == (["wide", "so100"], ["wide", "so100"])
    assert robots.dims == {"state_dim": 4, "action_dim": 4}
    statistics = robots.statistics(datasets, all_rows(datasets))
    assert set(statistics) == {"state of wide", "state of so100", "action of wide", "action of so100"}
    for robot, root in (("wide", labelled_dataset), ("so100", narrow)):
        for name, key in (("state", STATE_KEY), (ACTION, ACTION_KEY)):
            assert close(robots.statistics_of(robot, statistics)[name], lerobots_statistics(root, key)), (robot, name)
    ours, others = statistics["action of so100"], statistics["action of wide"]
    assert not np.allclose(ours.std, others.std[:2], rtol=0.5)  # other units


def test_datasets_of_one_robot_share_their_statistics(tmp_path, labelled_dataset, narrow, video_dataset):
    """video_dataset has a state of the same width, and no actions."""
    entries = [f"root: {labelled_dataset}, robot: a", f"root: {narrow}, robot: b", f"root: {video_dataset}, robot: a"]
    datasets = data.open_datasets(DataConfig(mixture=write(tmp_path / "m.yaml", *entries)))
    robots = Robots.find(datasets, [])
    statistics = robots.statistics(datasets, all_rows(datasets))
    rows = [lerobot_dataset(d).hf_dataset.with_format("numpy")[STATE_KEY][:] for d in (datasets[0], datasets[2])]
    both = np.concatenate(rows).astype(np.float64)
    assert np.allclose(statistics["state of a"].mean, both.mean(0), atol=1e-5)
    # In Stage 3 they are those of the demonstrations, and of the video of a robot that has none.
    for dataset in datasets[1:]:
        dataset.hide_actions()
    robots = Robots.find(datasets, [ACTION], num_labelled=1)
    assert robots.acting == ["a"] and robots.dims["action_dim"] == 4
    statistics = robots.statistics(datasets, all_rows(datasets), 1)
    assert close(statistics["state of a"], lerobots_statistics(labelled_dataset, STATE_KEY))
    assert close(statistics["state of b"], lerobots_statistics(narrow, STATE_KEY))


def test_a_run_that_names_no_robot_or_one_has_one_set_of_statistics(tmp_path, labelled_dataset, stateless):
    for robot in ("", ", robot: panda"):
        path = write(tmp_path / "m.yaml", f"root: {labelled_dataset}{robot}", f"root: {stateless}")
        datasets = data.open_datasets(DataConfig(mixture=path))
        robots = Robots.find(datasets, [ACTION], of_one_robot="--decode-actions")
        assert len(robots.names) == 1 and robots.dims == {"state_dim": 4, "action_dim": 4}
        assert robots.statistics(datasets, all_rows(datasets)).keys() == {"state", ACTION}


def test_what_is_open_is_refused(tmp_path, labelled_dataset, narrow, two_robots):
    def find(*entries: str, **options) -> Robots:
        return Robots.find(data.open_datasets(DataConfig(mixture=write(tmp_path / "m.yaml", *entries))), [], **options)

    wide, other = f"root: {labelled_dataset}", f"root: {narrow}"
    with pytest.raises(ValueError, match=f"state and actions are those of {narrow}.*robots of {labelled_dataset} have"):
        find(f"{wide}, robot: a", other)
    assert find(f"{wide}, robot: a", other, use_state=False).names == []  # nothing is read of either
    with pytest.raises(
        ValueError, match=r"datasets have observation.state of different widths.*name the robot of each"
    ):
        find(wide, other)
    with pytest.raises(ValueError, match=r"the datasets of the robot a have observation.state of different widths"):
        find(f"{wide}, robot: a", f"{other}, robot: a")
    with pytest.raises(ValueError, match=r"robot of x: a name of letters, digits, and \. _ - within, got '\.\./y'"):
        mixture.DatasetEntry(root="x", robot="../y")
    several = data.open_datasets(DataConfig(mixture=two_robots))
    with pytest.raises(ValueError, match=r"--decode-actions is of one robot, the datasets are of wide, so100"):
        Robots.find(several, [ACTION], of_one_robot="--decode-actions")


def test_the_table_names_the_robots(two_robots):
    datasets = data.open_datasets(DataConfig(mixture=two_robots))
    lines = data_table.data_table(datasets, data_rows.group_rows(all_rows(datasets))).splitlines()
    assert [line.split()[-1] for line in lines] == ["robot", "wide", "so100"]


def test_different_robots_without_names_are_said(labelled_dataset, narrow, stateless, two_robots):
    def said(options: DataConfig, *types: str | None) -> list[str]:
        datasets = data.open_datasets(options)
        for dataset, robot_type in zip(datasets, types, strict=True):
            dataset.info = replace(dataset.info, robot_type=robot_type)
        return data_views.unnamed_robots(datasets)

    options = DataConfig(roots=(labelled_dataset, narrow, stateless))
    assert said(options, "panda", "panda", "so100") == []  # the last has nothing to share
    assert said(options, "panda", None, None) == []
    (line,) = said(options, "panda", "so100", None)
    assert f"({labelled_dataset} panda, {narrow} so100)" in line
    assert said(DataConfig(mixture=two_robots), "panda", "so100") == []


JOINTS, POSE = ["shoulder", "elbow", "wrist", "gripper"], ["x", "y", "z", "gripper"]


def with_names(root: Path, directory: Path, **names: list[str] | dict | None) -> Path:
    """A copy of a dataset whose state and action have these names in meta/info.json."""
    path = Path(shutil.copytree(root, directory)) / "meta" / "info.json"
    info = json.loads(path.read_text())
    for name, of in names.items():
        info["features"][{"state": STATE_KEY, "action": ACTION_KEY}[name]]["names"] = of
    path.write_text(json.dumps(info))
    return directory


def test_datasets_of_one_robot_with_other_names_are_refused(tmp_path, labelled_dataset):
    """Whatever they differ in: words, their order, or the case of a letter."""
    angles = with_names(labelled_dataset, tmp_path / "angles", state=JOINTS, action=JOINTS)
    swapped, upper = [JOINTS[1], JOINTS[0], *JOINTS[2:]], ["Shoulder", *JOINTS[1:]]
    for number, other in enumerate((POSE, swapped, upper)):
        for feature, key in (("state", STATE_KEY), ("action", ACTION_KEY)):
            names = {"state": JOINTS, "action": JOINTS, feature: other}
            poses = with_names(labelled_dataset, tmp_path / f"poses {number} {feature}", **names)
            datasets = data.open_datasets(DataConfig(roots=(angles, poses)))
            said = f"{angles} and {poses} count as one robot's, but name the numbers of {key} differently: "
            said += f"{', '.join(JOINTS)}, and {', '.join(other)}. Give each a `robot` of its own in --data.mixture"
            with pytest.raises(ValueError, match=re.escape(said)):
                Robots.find(datasets, [ACTION])
            if feature == "action":  # Stage 2 does not read them
                assert Robots.find(datasets, [LATENT]).names == [None]
                continue
            with pytest.raises(ValueError, match=re.escape(said)):
                Robots.find(datasets, [LATENT])
            assert Robots.find(datasets, [ACTION], use_state=False).dims["action_dim"] == 4
    entries = [f"root: {root}, robot: {robot}" for root, robot in ((angles, "a"), (poses, "b"))]
    assert Robots.find(data.open_datasets(DataConfig(mixture=write(tmp_path / "m.yaml", *entries))), [ACTION]).names
    entries[1] = entries[1].replace("robot: b", "robot: a")
    with pytest.raises(ValueError, match="are of the robot a, but name the numbers of action differently"):
        Robots.find(data.open_datasets(DataConfig(mixture=write(tmp_path / "m.yaml", *entries))), [ACTION])


def test_names_that_say_nothing_or_the_same_are_accepted(tmp_path, labelled_dataset, video_dataset):
    """No names, one for the whole vector, and the same names in another form."""
    angles = with_names(labelled_dataset, tmp_path / "angles", state=JOINTS, action=JOINTS)
    groups = {"arm": JOINTS[:3], "hand": JOINTS[3:]}
    grouped = with_names(labelled_dataset, tmp_path / "grouped", state=groups, action=groups)
    whole = with_names(labelled_dataset, tmp_path / "whole", state=["motors"], action=["motors"])
    datasets = data.open_datasets(DataConfig(roots=(angles, grouped, whole, labelled_dataset, video_dataset)))
    assert Robots.find(datasets, [ACTION]).dims == {"state_dim": 4, "action_dim": 4}


def test_the_actions_of_video_are_not_read_and_may_have_other_names(tmp_path, labelled_dataset):
    angles = with_names(labelled_dataset, tmp_path / "angles", state=JOINTS, action=JOINTS)
    poses = with_names(labelled_dataset, tmp_path / "poses", state=JOINTS, action=POSE)
    found = data_views.open_recordings(DataConfig(roots=(angles,)), DataConfig(roots=(poses,)), False)
    assert Robots.find(found[1], [ACTION], num_labelled=1).acting == [None]
    with pytest.raises(ValueError, match=f"{angles} and {poses} count as one robot's, but name the numbers of action"):
        Robots.find(data_views.open_recordings(DataConfig(roots=(angles, poses)), None, False)[1], [ACTION])


# --- samples ----------------------------------------------------------------------------------------------------------


def make_core(noisy_padding: bool = False) -> SmolVLASharedCore:
    torch.manual_seed(0)
    dims = {"state_dim": 4, "action_dim": 4, "chunk_size": 4, "noisy_padding": noisy_padding}
    core = SmolVLASharedCore(replace(make_core_config(ModelConfig(preset="tiny"), (CAMERA,)), **dims))
    freeze(core, ["vision tower", "connector"])
    return core


def read(datasets: list[data.RobotDataset], keys_: list[SampleKey], state_dim: int, action_dim: int) -> RawBatch:
    spec = SampleSpec((CAMERA,), state_dim, chunk_size=4, action_dim=action_dim, draws={ACTION: (4, 32)})
    return SampleDataset(datasets, spec, seed=0)[keys_]


def alone(core: SmolVLASharedCore, dataset: data.RobotDataset, sample: SampleKey) -> tuple:
    """A run of this dataset, by what was there before there were several robots: core, preprocessor, raw batch."""
    widths = {"state_dim": dataset.vector_dim(STATE_KEY), "action_dim": dataset.vector_dim(ACTION_KEY)}
    own = SmolVLASharedCore(replace(core.config, **widths))
    own.load_state_dict(core.state_dict())
    freeze(own, ["vision tower", "connector"])
    root = Path(dataset.root)
    statistics = {"state": lerobots_statistics(root, STATE_KEY), ACTION: lerobots_statistics(root, ACTION_KEY)}
    preprocess = Preprocessor(own.config, load_trunk_tokenizer("tiny", None), statistics)
    return own, preprocess, read([dataset], [replace(sample, dataset=0)], **widths)


PLACES = [(0, 3), (1, 3), (1, 18), (0, 90)]  # (dataset, row): the third chunk ends with its episode


@pytest.mark.parametrize("noisy_padding", [False, True])
def test_a_sample_is_what_it_is_in_a_run_of_its_robot(two_robots, noisy_padding):
    """Values by hand; errors and gradients of a model of its widths with the same weights."""
    core, datasets = make_core(noisy_padding), data.open_datasets(DataConfig(mixture=two_robots))
    robots = Robots.find(datasets, [ACTION])
    statistics = robots.statistics(datasets, all_rows(datasets))
    preprocess = make_preprocessor(core.config, load_trunk_tokenizer("tiny", None), statistics, robots)
    samples = [SampleKey(0, slot, *place) for slot, place in enumerate(PLACES)]
    batch = preprocess(read(datasets, samples, 4, 4))
    errors = core(batch)[ACTION]
    masked_mean(errors, batch.masks[ACTION]).backward()
    counted, gradients = batch.masks[ACTION].sum(), {}
    for slot, sample in enumerate(samples):
        dataset = datasets[sample.dataset]
        row = {
            name: np.asarray(dataset.vector(key)[sample.row])
            for name, key in (("state", STATE_KEY), (ACTION, ACTION_KEY))
        }
        of = {
            name: lerobots_statistics(Path(dataset.root), key)
            for name, key in (("state", STATE_KEY), (ACTION, ACTION_KEY))
        }
        by_hand = {
            name: torch.tensor((row[name] - np.array(of[name].mean)) / np.array(of[name].std)).float() for name in row
        }
        width = {name: len(values) for name, values in by_hand.items()}
        torch.testing.assert_close(batch.state[slot, : width["state"]], by_hand["state"], rtol=1e-4, atol=1e-4)
        assert not batch.state[slot, width["state"] :].any()
        target = batch.targets[ACTION]
        torch.testing.assert_close(target.value[slot, 0, : width[ACTION]], by_hand[ACTION], rtol=1e-4, atol=1e-4)
        assert target.value[slot, :, width[ACTION] : 4].isnan().all()
        own, own_preprocess, raw = alone(core, dataset, sample)
        own_batch = own_preprocess(
            replace(
                raw,
                noise={ACTION: read(datasets, samples, 4, 4).noise[ACTION][slot : slot + 1]},
                time={ACTION: target.time[slot : slot + 1]},
            )
        )
        own_errors = own(own_batch)[ACTION]
        torch.testing.assert_close(own_errors[0], errors[slot], rtol=1e-4, atol=1e-4)
        masked_mean(own_errors, own_batch.masks[ACTION], counted).backward()
        for name, parameter in own.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad
    for name, parameter in core.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_each_robot_has_its_quantiles(two_robots):
    datasets = data.open_datasets(DataConfig(mixture=two_robots))
    found = Robots.find(datasets, [ACTION])
    statistics = found.statistics(datasets, all_rows(datasets), mode="quantiles")
    preprocess = make_preprocessor(make_core().config, load_trunk_tokenizer("tiny", None), statistics, found)
    for name, key in (("state", STATE_KEY), (ACTION, ACTION_KEY)):
        for index, dataset in enumerate(datasets):
            q01, q99 = np.quantile(np.asarray(dataset.vector(key), np.float64), [0.01, 0.99], axis=0)
            values = np.asarray(dataset.vector(key)[5:9])
            padded = torch.tensor(np.pad(values, ((0, 0), (0, 4 - values.shape[1]))))
            expected = 2 * (values - q01) / np.where(q99 > q01, q99 - q01, 2) - 1 + (q99 == q01)  # 1 to 1 is 0 to 2
            found_values = preprocess.normalize(name, padded, [index] * 4)
            np.testing.assert_allclose(found_values[:, : values.shape[1]], expected, atol=1e-4)
            assert not found_values[:, values.shape[1] :].any()


def test_held_out_errors_are_those_of_each_robot_alone(two_robots):
    core, datasets = make_core().eval(), data.open_datasets(DataConfig(mixture=two_robots))
    robots = Robots.find(datasets, [ACTION])
    tokenizer, accelerator = load_trunk_tokenizer("tiny", None), Accelerator(cpu=True)
    statistics = robots.statistics(datasets, all_rows(datasets))
    samples = [SampleKey(0, slot, *place) for slot, place in enumerate(PLACES)]
    raw, executed = read(datasets, samples, 4, 4), 2
    preprocess = make_preprocessor(core.config, tokenizer, statistics, robots)
    together = held_out_errors(core, [raw], preprocess, accelerator, executed=executed)
    decoded = SimpleNamespace(kind="quantized")  # without a latent head nobody evaluates latents
    assert held_out_errors(core, [raw], preprocess, accelerator, decoded, executed) == together
    in_units = together.pop("val/executed_action_error")
    sums, count, differences = {}, 0, []
    for slot, sample in enumerate(samples):
        own, preprocess, of_it = alone(core, datasets[sample.dataset], sample)
        of_it = replace(
            of_it, noise={ACTION: raw.noise[ACTION][slot : slot + 1]}, time={ACTION: raw.time[ACTION][slot : slot + 1]}
        )
        tokens = int(of_it.action_mask.sum())
        count += tokens
        for name, value in held_out_errors(own.eval(), [of_it], preprocess, accelerator).items():
            sums[name] = sums.get(name, 0) + tokens * value
        # What a policy of this robot would execute.
        batch, width = preprocess(of_it), of_it.actions.shape[-1]
        chunk = own.sample(batch, ACTION, of_it.noise[ACTION][:, 0])[..., :width]
        error = preprocess.statistics[ACTION].unnormalize(chunk) - of_it.actions
        differences += error.abs().mean(-1)[:, :executed][of_it.action_mask[:, :executed]].tolist()
    assert in_units == pytest.approx(np.mean(differences), rel=1e-3)
    assert together == pytest.approx({name: value / count for name, value in sums.items()}, rel=1e-4)


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stage_2_reads_the_states_of_several_robots(
    tmp_path, labelled_dataset, narrow, stateless, laq_checkpoint, capsys
):
    entries = [f"root: {labelled_dataset}, robot: wide", f"root: {narrow}, robot: so100", f"root: {stateless}"]
    path = write(tmp_path / "three.yaml", *entries)
    options = ["--data.mixture", path, "--model.preset", "tiny", "--laq-ckpt", laq_checkpoint, "--batch-size", "6"]
    run_stage(train_stage2, tmp_path / "s2", *options)
    manifest = load_artifact(tmp_path / "s2" / ARTIFACT).manifest
    assert manifest.core.state_dim == 4
    assert manifest.normalization.keys() == {"state of wide", "state of so100", LATENT}
    assert close(manifest.normalization["state of so100"], lerobots_statistics(narrow, STATE_KEY))
    initial = open_from(tmp_path / "s2" / ARTIFACT)
    with pytest.raises(ValueError, match=r"several robots, state of wide, state of so100: use --normalization data"):
        initial.recorded_statistics({"state_dim": 4, "action_dim": 4})

    # examples/imagine.py normalises a state as its robot's.
    options = {"laq_ckpt": laq_checkpoint, "out": tmp_path / "imagined.png", "rows": 2}
    config = imagine.ImagineConfig(
        stage2_artifact=tmp_path / "s2" / ARTIFACT, data=PolicyDataConfig(roots=(narrow,)), robot="so100", **options
    )
    imagine.main(config)
    assert config.out.stat().st_size > 10_000
    datasets = data.open_datasets(config.data)
    preprocess = imagine.make_preprocessor(initial.core, initial, datasets, "so100")
    raw = SampleDataset(datasets, SampleSpec((CAMERA,), state_dim=4), 0)[[SampleKey(0, 0, 0, 7)]]
    expected, of = datasets[0].vector(STATE_KEY)[7], lerobots_statistics(narrow, STATE_KEY)
    expected = (torch.tensor(expected) - torch.tensor(of.mean)) / torch.tensor(of.std)
    torch.testing.assert_close(preprocess(raw).state[0, :3], expected.float(), rtol=1e-4, atol=1e-4)
    assert not preprocess(raw).state[0, 3:].any()  # padded to max_state_dim
    faults = {None: "is not given: .* are those of wide, so100", "wide": "wide: .* 4 dimensions, .* has 3"}
    for robot, fault in faults.items():
        with pytest.raises(ValueError, match=f"--robot {fault}"):
            imagine.make_preprocessor(initial.core, initial, datasets, robot)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, labelled_dataset, narrow) -> Path:
    """The directory of a policy that was trained on two robots."""
    tmp_path = tmp_path_factory.mktemp("two")
    path = write(tmp_path / "two.yaml", f"root: {labelled_dataset}, robot: wide", f"root: {narrow}, robot: so100")
    options = ["--data.mixture", path, "--model.preset", "tiny", "--chunk-size", "4", "--n-action-steps", "2"]
    run_stage(train_stage3, tmp_path / "s3", *options)
    return tmp_path / "s3" / POLICY


@pytest.mark.slow
@pytest.mark.parametrize("robot, fixture", [("wide", "labelled_dataset"), ("so100", "narrow")])
def test_the_policy_of_a_robot_is_one_of_lerobots(trained, robot, fixture, request):
    """LeRobot's factory and processors load it; it acts as the model does with that robot's numbers put in by hand."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    root = request.getfixturevalue(fixture)
    (dataset,) = data.open_datasets(DataConfig(roots=(root,)))
    directory = trained / "robots" / robot
    config = PreTrainedConfig.from_pretrained(directory)
    config.pretrained_path, config.device = directory, "cpu"
    policy = make_policy(config, ds_meta=lerobot_dataset(dataset).meta)
    preprocess, postprocess = make_pre_post_processors(
        policy.config, pretrained_path=str(directory), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    assert load_saved(str(directory)).config.robot == robot
    of = {key: lerobots_statistics(root, key) for key in (STATE_KEY, ACTION_KEY)}
    for pipeline in (preprocess, postprocess):
        (normalizer,) = [step for step in pipeline.steps if hasattr(step, "norm_map")]
        assert normalizer.stats.keys() == {STATE_KEY, ACTION_KEY}
        for key, expected in of.items():
            assert close(Statistics(*(normalizer.stats[key][name].tolist() for name in ("mean", "std"))), expected)
    item = lerobot_dataset(dataset)[5]
    noise = torch.randn(1, 4, 32)
    batch = preprocess({key: item[key] for key in (CAMERA, STATE_KEY, "task")})
    action = postprocess(policy.select_action(batch, noise=noise))
    assert action.shape == (1, dataset.vector_dim(ACTION_KEY))
    # By hand, of the file's weights, in a model of this robot's widths.
    saved = load_saved(str(directory))
    core = SmolVLASharedCore(saved.config.core).eval()
    core.load_state_dict(saved.weights)
    assert (core.config.state_dim, core.config.action_dim) == (dataset.vector_dim(STATE_KEY), len(of[ACTION_KEY].mean))
    raw = read([dataset], [SampleKey(0, 0, 0, 5)], core.config.state_dim, core.config.action_dim)
    own = Preprocessor(core.config, saved.tokenizer, {"state": of[STATE_KEY], ACTION: of[ACTION_KEY]})(raw)
    expected = core.sample(own, ACTION, noise)[:, 0] * torch.tensor(of[ACTION_KEY].std) + torch.tensor(
        of[ACTION_KEY].mean
    )
    torch.testing.assert_close(action, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_policy_of_several_robots_acts_with_none_until_one_is_named(trained, tmp_path):
    files = [
        trained / "model.safetensors",
        *(trained / "robots" / name / "model.safetensors" for name in ("wide", "so100")),
    ]
    assert len({path.stat().st_ino for path in files}) == 1  # on the disk once
    assert not [*trained.glob("policy_*")]
    message = r"which robot\? This policy was trained on wide, so100: pass --robot"
    for load in (load_saved, HLRPSmolVLASharedPolicy.from_pretrained, lambda name: of_robot(Path(name), None)):
        with pytest.raises(ValueError, match=message):
            load(str(trained))
    assert of_robot(trained, "so100") == trained / "robots" / "so100"
    with pytest.raises(ValueError, match=r"there is no robot arm in .*, it acts with wide, so100"):
        of_robot(trained, "arm")
    one = trained / "robots" / "wide"
    assert of_robot(one, None) == of_robot(one, "wide") == one
    with pytest.raises(ValueError, match=r"there is no robot so100 in .*, it acts with wide"):
        of_robot(one, "so100")
    assert "robots/wide" in (trained / "README.md").read_text()
    # Training goes on from one of them, with its statistics or the data's.
    assert open_from(one).statistics["state"].mean == load_saved(str(one)).statistics["state"].mean
