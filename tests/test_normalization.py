"""normalization.py and what makes its statistics, against LeRobot's normaliser and numpy's quantiles."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lerobot_dataset, set_vectors
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep, TransitionKey, UnnormalizerProcessorStep
from lerobot.processor.converters import create_transition
from safetensors.torch import load_file, save_file
from test_artifact import LATENTS, ORIGIN, rewrite
from test_artifact import make_core as make_artifact_core
from test_initial import open_from
from test_lerobot_policy import lerobot_batch, make_core, raw_batch
from test_lerobot_smolvla import run_stage
from test_robots import ARTIFACT, POLICY

import train_stage2
import train_stage3
from smolvla_shared import data, robots
from smolvla_shared.artifact import load_artifact, save_artifact
from smolvla_shared.config import ACTION, DataConfig, PolicyDataConfig, StageOptions
from smolvla_shared.data import ACTION_KEY, STATE_KEY
from smolvla_shared.files import MANIFEST_NAME
from smolvla_shared.lerobot_files import load_saved, save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.normalization import Quantiles, Statistics, of_mode
from smolvla_shared.preprocess import Preprocessor
from smolvla_shared.trunk_files import load_trunk_tokenizer

# --- values -----------------------------------------------------------------------------------------------------------


def test_statistics_are_lerobots():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal([100, -3, 1e-3, 5], [20, 1, 1e-4, 0], (50, 4)).astype(np.float32))
    statistics = Statistics.of(values)
    np.testing.assert_allclose(statistics.mean, values.numpy().mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, values.numpy().std(0, dtype=np.float64), rtol=1e-9)
    assert statistics.std[3] == 0  # a joint that never moves must not blow up

    features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    norm_map = {FeatureType.ACTION: NormalizationMode.MEAN_STD}
    stats = {"action": {"mean": np.array(statistics.mean), "std": np.array(statistics.std)}}
    transition = create_transition(action=values)
    expected = NormalizerProcessorStep(features, norm_map, stats)(transition)[TransitionKey.ACTION]
    normalized = statistics.normalize(values)
    assert torch.equal(normalized, expected)
    assert normalized.std(0, correction=0).tolist() == pytest.approx([1, 1, 1, 0], abs=2e-4)

    back = statistics.unnormalize(normalized)
    unnormalizer = UnnormalizerProcessorStep(features, norm_map, stats)
    assert torch.equal(back, unnormalizer(create_transition(action=normalized))[TransitionKey.ACTION])
    torch.testing.assert_close(back, values, rtol=1e-5, atol=1e-6)


def test_statistics_survive_json_lists():
    assert Statistics([1.0, 2.0], [3.0, 4.0]) == Statistics((1.0, 2.0), (3.0, 4.0))


@pytest.mark.parametrize("equal", [False, True])
def test_quantiles_are_lerobots(equal):
    """To the bit, also where a statistic of others says that two quantiles are equal."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal([100, -3, 1e-3, 5], [20, 1, 1e-4, 0], (50, 4)).astype(np.float32))
    q01, q99 = (torch.quantile(values, q, dim=0) for q in (0.01, 0.99))
    if not equal:
        q99[3] += 0.5
    statistics = of_mode("quantiles", {"mean": [0] * 4, "std": [1] * 4, "q01": q01.tolist(), "q99": q99.tolist()})
    stats = {"action": {"q01": q01, "q99": q99}}
    features, norm_map = {"action": PolicyFeature(FeatureType.ACTION, (4,))}, {}
    norm_map[FeatureType.ACTION] = NormalizationMode.QUANTILES
    expected = NormalizerProcessorStep(features, norm_map, stats)(create_transition(action=values))
    normalized = statistics.normalize(values)
    assert torch.equal(normalized, expected[TransitionKey.ACTION])
    back = UnnormalizerProcessorStep(features, norm_map, stats)(create_transition(action=normalized))
    assert torch.equal(statistics.unnormalize(normalized), back[TransitionKey.ACTION])
    torch.testing.assert_close(statistics.unnormalize(normalized), values, rtol=1e-5, atol=1e-6)
    inside = ((normalized[:, :3] >= -1) & (normalized[:, :3] <= 1)).float().mean(0)
    assert inside.tolist() == pytest.approx([0.96] * 3)  # without the smallest and the largest of 50


# --- of datasets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path, labelled_dataset) -> Path:
    """A copy of labelled_dataset: one state in 188 is an outlier, one action closes the gripper."""
    root = Path(shutil.copytree(labelled_dataset, tmp_path / "uneven"))
    (dataset,) = data.open_datasets(DataConfig(roots=(root,)))
    state, action = (np.array(dataset.vector(key)) for key in (STATE_KEY, ACTION_KEY))
    state[40, 0], action[:, 2], action[77, 2] = 1e6, 0, 1
    set_vectors(root, {STATE_KEY: state, ACTION_KEY: action})
    return root


def values_of(datasets: list[data.RobotDataset], key: str) -> np.ndarray:
    return np.concatenate([lerobot_dataset(d).hf_dataset.with_format("numpy")[key][:] for d in datasets])


def test_quantiles_of_datasets_are_numpys(labelled_dataset):
    """Over all rows of several datasets, and over some."""
    (labelled,), (again,) = (data.open_datasets(DataConfig(roots=(labelled_dataset,))) for _ in range(2))
    found = robots.vector_statistics(
        [labelled, again], ACTION_KEY, [(0, labelled.rows(20, 90)), (1, again.rows())], "quantiles"
    )
    values = np.concatenate([values_of([labelled], ACTION_KEY)[20:90], values_of([again], ACTION_KEY)])
    assert isinstance(found, Quantiles)
    np.testing.assert_allclose(
        [found.q01, found.q99], np.quantile(values.astype(np.float64), [0.01, 0.99], axis=0), atol=1e-6
    )
    np.testing.assert_allclose([found.mean, found.std], [values.mean(0), values.std(0)], atol=1e-5)


def test_an_outlier_moves_no_quantile(uneven, labelled_dataset):
    changed, plain = (
        robots.vector_statistics(data.open_datasets(DataConfig(roots=(root,))), STATE_KEY, mode="quantiles")
        for root in (uneven, labelled_dataset)
    )
    assert changed.std[0] > 1e4 > 1e3 * plain.std[0]
    assert np.allclose(changed.q01, plain.q01, atol=0.01) and np.allclose(changed.q99, plain.q99, atol=0.01)


def test_equal_quantiles_are_the_mean_minus_and_plus_the_deviation(uneven):
    """A gripper that is closed once in 188 frames, and a dimension of the state that is always 1."""
    datasets = data.open_datasets(DataConfig(roots=(uneven,)))
    gripper = robots.vector_statistics(datasets, ACTION_KEY, mode="quantiles")
    share = 1 / datasets[0].num_frames
    deviation = (share * (1 - share)) ** 0.5
    assert (gripper.q01[2], gripper.q99[2]) == pytest.approx((share - deviation, share + deviation))
    assert gripper.normalize(torch.tensor([0.0, 0, 1, 0]))[2] == pytest.approx((1 - share) / deviation, rel=1e-4)
    still = robots.vector_statistics(datasets, STATE_KEY, mode="quantiles")
    assert (still.mean[3], still.std[3], still.q01[3], still.q99[3]) == (1, 1, 0, 2)
    assert still.normalize(torch.tensor([0.0, 0, 0, 1.01]))[3] == pytest.approx(0.01, abs=1e-6)


# --- in files ---------------------------------------------------------------------------------------------------------

QUANTILES = {
    "state": Quantiles(
        (0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 0.5), q01=(-1.0, -2.0, -3.0, 0.0), q99=(1.0, 2.0, 5.0, 1 / 3)
    ),
    "action": Quantiles((0.0, -0.5, 0.5, 0.1), (0.3, 0.2, 0.1, 1.0), q01=(-0.5,) * 4, q99=(0.5, 0.25, 1.0, 1.5)),
}
BOTH = {"state": QUANTILES["state"], "action": Statistics((0.0, -0.5, 0.5, 0.1), (0.3, 0.2, 0.1, 1.0))}


def test_an_artifact_keeps_quantiles(tmp_path):
    core, tokenizer = make_artifact_core(), load_trunk_tokenizer("tiny", None)
    statistics = {"state": QUANTILES["state"], "latent": Statistics((0.0,) * 32, (1.0,) * 32)}
    path = save_artifact(tmp_path, core.config, core.state_dict(), tokenizer, statistics, LATENTS, ORIGIN)
    assert load_artifact(path).manifest.normalization == statistics
    initial = open_from(path)
    assert initial.normalization_mode(StageOptions(data=PolicyDataConfig(roots=("x",)))) == "quantiles"
    assert (
        initial.normalization_mode(StageOptions(data=PolicyDataConfig(roots=("x",)), normalization_mode="mean_std"))
        == "mean_std"
    )
    assert initial.recorded_statistics({"state_dim": 4, "action_dim": 4}) == {"state": QUANTILES["state"]}
    body = json.loads(path.with_suffix(".json").read_text())
    assert body["normalization"]["state"]["q99"] == [1.0, 2.0, 5.0, 1 / 3]
    for change, message in (
        (lambda state: state.pop("q01"), r"normalization\.state\.q01: missing"),
        (
            lambda state: state.update(q50=[0.0]),
            r"normalization\.state\.q50: unknown; there are mean, std, mode, q01, q99",
        ),
        (lambda state: state.update(mode="min_max"), r"normalization\.state\.mode: expected one of 'mean_std', found"),
    ):
        changed = json.loads(json.dumps(body))
        change(changed["normalization"]["state"])
        rewrite(path.with_suffix(".json"), changed)
        with pytest.raises(ValueError, match=message):
            load_artifact(path)


@pytest.mark.parametrize("statistics", [QUANTILES, BOTH], ids=["quantiles", "one of each"])
def test_a_policy_acts_in_lerobots_processors_as_it_was_trained(statistics, tmp_path):
    core, tokenizer, raw = make_core(), load_trunk_tokenizer("tiny", None), raw_batch([(48, 80)])
    save_policy(tmp_path, core.config, core.state_dict(), tokenizer, statistics, 3, {})
    config = PreTrainedConfig.from_pretrained(tmp_path)
    found = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
    modes = {name.upper(): of.mode.upper() for name, of in statistics.items()}
    assert found == {"VISUAL": "IDENTITY"} | modes
    assert load_saved(str(tmp_path)).statistics.keys() == statistics.keys()
    for name, of in load_saved(str(tmp_path)).statistics.items():
        assert type(of) is type(statistics[name])
        assert all(np.allclose(x, y) for x, y in zip(of.named().values(), statistics[name].named().values()))

    overrides = {"device_processor": {"device": "cpu"}}
    preprocess, postprocess = make_pre_post_processors(
        config, pretrained_path=str(tmp_path), preprocessor_overrides=overrides
    )
    policy = HLRPSmolVLASharedPolicy.from_pretrained(tmp_path).to("cpu")
    noise = raw.noise[ACTION][:, 0]
    trained = Preprocessor(core.config, tokenizer, statistics)(raw)
    observed = preprocess(lerobot_batch(raw))
    assert torch.equal(observed["observation.state"], trained.state[:, :4])
    assert torch.equal(observed["action"], trained.targets[ACTION].value[..., :4])
    action = postprocess(policy.predict_action_chunk(observed, noise))
    assert torch.equal(action, statistics["action"].unnormalize(core.sample(trained, ACTION, noise)))


def test_what_is_missing_in_a_policys_statistics_is_named(tmp_path):
    core = make_core()
    save_policy(tmp_path, core.config, core.state_dict(), load_trunk_tokenizer("tiny", None), QUANTILES, 3, {})
    for path in tmp_path.glob("policy_*normalizer_processor.safetensors"):
        save_file({key: value for key, value in load_file(path).items() if not key.endswith("mean")}, path)
    (tmp_path / MANIFEST_NAME).unlink()  # which says that they were edited
    initial = open_from(tmp_path)
    with pytest.raises(
        ValueError, match=r"--normalization artifact: .*quantiles are mean, std, q01, q99, missing: mean"
    ):
        initial.recorded_statistics({"state_dim": 4, "action_dim": 4})


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_normalise_by_quantiles(uneven, laq_checkpoint, tmp_path, capsys):
    """Stage 3 goes on in the mode of its artifact, unless told otherwise, and keeps statistics of it."""
    s2, s3, again, other = (tmp_path / name for name in ("s2", "s3", "again", "other"))
    video = ["--data.roots", uneven, "--laq-ckpt", laq_checkpoint, "--model.preset", "tiny"]
    run_stage(train_stage2, s2, *video, "--normalization-mode", "quantiles")
    assert "normalised: state by quantiles, latent by mean_std\n" in capsys.readouterr().out
    state = load_artifact(s2 / ARTIFACT).manifest.normalization["state"]
    np.testing.assert_allclose(
        [state.q01[0], state.q99[0]],
        np.quantile(values_of(data.open_datasets(DataConfig(roots=(uneven,))), STATE_KEY)[:, 0], [0.01, 0.99]),
        rtol=1e-5,
    )
    labelled = ["--data.roots", uneven, "--chunk-size", "5", "--n-action-steps", "2"]
    run_stage(train_stage3, s3, *labelled, "--stage2-artifact", s2 / ARTIFACT)
    assert "normalised: state by quantiles, action by quantiles\n" in capsys.readouterr().out
    run_stage(train_stage3, again, *labelled, "--init-from", s3 / POLICY, "--normalization", "artifact")
    before, after = (load_saved(str(run / POLICY)).statistics for run in (s3, again))
    assert before == after and {type(of) for of in after.values()} == {Quantiles}
    run_stage(train_stage3, other, *labelled, "--stage2-artifact", s2 / ARTIFACT, "--normalization-mode", "mean_std")
    printed = capsys.readouterr().out
    assert "from the artifact's, which is normalised by quantiles\n" in printed
    assert "normalised: state by mean_std, action by mean_std\n" in printed
    assert load_saved(str(other / POLICY)).config.normalization_mapping["ACTION"].value == "MEAN_STD"
    # The loss of another scale of actions is another one.
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss/action"] for run in (s3, other)]
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Statistics([0.0] * 4, [1.0] * 3), "one width, found {'mean': 4, 'std': 3}"),
        (lambda: Statistics([0.0], [-1.0]), r"std must be at least 0, found \[-1.0\]"),
        (lambda: Quantiles([0.0], [1.0], q01=[0.0], q99=[]), "one width"),
        (lambda: Quantiles([0.0], [1.0], q01=[2.0], q99=[1.0]), r"q01 must be at most q99, found \[\(2.0, 1.0\)\]"),
    ],
)
def test_statistics_that_no_values_have_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_dimension_that_never_changes_has_statistics():
    Statistics([1.0], [0.0]), Quantiles([1.0], [0.0], q01=[1.0], q99=[1.0])
