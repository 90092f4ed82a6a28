"""relative_actions.py and LeRobot's processor steps around it: what is subtracted in training is added in a rollout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from helpers import set_vectors
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.processor import RelativeActionsProcessorStep, to_relative_actions
from test_initial import open_from
from test_lerobot_smolvla import run_stage
from test_robots import CAMERA, POLICY, make_core, read

import train_stage3
from smolvla_shared import data
from smolvla_shared.config import ACTION, DataConfig
from smolvla_shared.data import ACTION_KEY, STATE_KEY
from smolvla_shared.data_order import SampleKey
from smolvla_shared.lerobot_files import load_saved
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.lerobot_smolvla import ExportConfig, export_smolvla
from smolvla_shared.robot_preprocessor import make_preprocessor
from smolvla_shared.robots import Robots
from smolvla_shared.trunk_files import load_trunk_tokenizer

NAMES = ["x", "y", "episode", "Gripper.pos"]
MASK = [True, True, True, False]
OF_STATE = [*NAMES[:3], "lamp"]
T = 4


def copy_with(root: Path, directory: Path, actions: list[str] | None, state: list[str] | None = OF_STATE) -> Path:
    """A copy of labelled_dataset with these names, whose actions are the next frame's position, and a gripper's."""
    root = Path(shutil.copytree(root, directory))
    info = json.loads((root / "meta" / "info.json").read_text())
    for key, names in {ACTION_KEY: actions, STATE_KEY: state}.items():
        info["features"][key]["names"] = names
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (dataset,) = data.open_datasets(DataConfig(roots=(root,)))
    position, values = dataset.vector(STATE_KEY)[:, :3], np.array(dataset.vector(ACTION_KEY))
    values[:, :3] = np.roll(position, -1, axis=0)
    values[dataset.episode_to - 1, :3] = position[dataset.episode_to - 1]
    set_vectors(root, {ACTION_KEY: values})
    return root


@pytest.fixture(scope="module")
def absolute(labelled_dataset, tmp_path_factory) -> Path:
    return copy_with(labelled_dataset, tmp_path_factory.mktemp("absolute") / "absolute", NAMES)


def find(root: Path, *options: str) -> tuple[list[data.RobotDataset], Robots]:
    given = ["--data.roots", str(root), "--run-dir", "run", "--chunk-size", str(T), "--n-action-steps", "3"]
    config = tyro.cli(train_stage3.Stage3Config, args=[*given, "--relative-actions", *options])
    datasets = data.open_datasets(config.data)
    return datasets, Robots.find(datasets, [ACTION], config.model.use_state, options=config)


def lerobots_chunks(root: Path) -> list[dict[str, torch.Tensor]]:
    """Every sample of the dataset with its chunk, by LeRobot's class and the conversion of LeRobot's step."""
    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    dataset = LeRobotDataset(root.name, root=root, delta_timestamps={ACTION_KEY: [i / fps for i in range(T)]})
    mask = RelativeActionsProcessorStep(True, ["gripper"], NAMES)._build_mask(4)
    assert mask == MASK
    samples = [dataset[row] for row in range(len(dataset))]
    relative = [to_relative_actions(s[ACTION_KEY][None], s[STATE_KEY][None], mask)[0] for s in samples]
    return [sample | {"relative": chunk} for sample, chunk in zip(samples, relative)]


def test_samples_and_statistics_are_of_lerobots_relative_chunks(absolute):
    datasets, robots = find(absolute)
    assert robots.relative.mask == tuple(MASK)
    chunks, rows = lerobots_chunks(absolute), [(0, datasets[0].rows())]
    every = torch.cat([chunk["relative"][~chunk["action_is_pad"]] for chunk in chunks]).double().numpy()
    statistics = robots.statistics(datasets, rows)
    np.testing.assert_allclose(statistics[ACTION].mean, every.mean(0), atol=1e-6)
    # An episode's number is that of all its frames: the difference never changes.
    np.testing.assert_allclose(statistics[ACTION].std, np.where([1, 1, 0, 1], every.std(0), 1), rtol=1e-5)
    recorded = np.asarray(datasets[0].vector(STATE_KEY), np.float64)
    np.testing.assert_allclose(statistics["state"].mean, recorded.mean(0), atol=1e-6)
    found = robots.statistics(datasets, rows, mode="quantiles")[ACTION]
    q01, q99 = np.where([1, 1, 0, 1], np.quantile(every, [0.01, 0.99], axis=0), [[-1], [1]])
    np.testing.assert_allclose([found.q01, found.q99], [q01, q99], atol=1e-6)

    places = [0, 17, 60]  # the second chunk runs over the end of its episode
    raw = read(datasets, [SampleKey(0, slot, 0, row) for slot, row in enumerate(places)], 4, 4)
    batch = make_preprocessor(make_core().config, load_trunk_tokenizer("tiny", None), statistics, robots)(raw)
    value, mask = batch.targets[ACTION].value[..., :4], batch.targets[ACTION].mask
    for slot, row in enumerate(places):
        assert torch.equal(~mask[slot], chunks[row]["action_is_pad"])
        expected = statistics[ACTION].normalize(chunks[row]["relative"])
        torch.testing.assert_close(value[slot][mask[slot]], expected[mask[slot]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "actions, state, options, message",
    [
        (NAMES, OF_STATE, ["--model.no-use-state"], "has no observation.state that is read, to be relative to"),
        (None, None, [], "have no names, which are of gripper.*--absolute-actions without a value"),
        (["x", "y", "episode", "z"], None, [], r"all of the actions of .* would be relative \(x, y, episode, z\)"),
        (NAMES, None, ["--absolute-actions", "x", "y", "e"], "none of the actions of .* would be relative"),
        (NAMES, ["y", "x", "episode", "lamp"], [], "does not measure, one by one, what its actions are targets of"),
        (NAMES, None, [], None),
        (None, None, ["--absolute-actions"], None),
    ],
    ids=["no state", "no names", "no gripper", "all grippers", "other order", "a state without names", "all"],
)
def test_what_names_and_widths_tell(labelled_dataset, tmp_path, actions, state, options, message):
    root = copy_with(labelled_dataset, tmp_path / "copy", actions, state)
    if message:
        with pytest.raises(ValueError, match=f"--relative-actions: .*{message}"):
            find(root, *options)
    else:
        assert find(root, *options)[1].relative.mask == tuple(MASK if actions else [True] * 4)


def test_velocities_are_no_positions(labelled_dataset):
    with pytest.raises(ValueError, match="are no absolute positions, they vary less than their differences to"):
        find(labelled_dataset, "--absolute-actions")


@pytest.mark.slow
def test_a_rollout_adds_the_state_that_a_chunk_saw(absolute, tmp_path, capsys):
    """In LeRobot's processors, read from the files, over two chunks of which some actions are executed."""
    options = ["--data.roots", absolute, "--model.preset", "tiny", "--relative-actions", "--chunk-size", str(T)]
    options += ["--normalization-mode", "quantiles", "--n-action-steps", "3"]
    run_stage(train_stage3, tmp_path / "run", *options)
    directory = tmp_path / "run" / POLICY
    config = PreTrainedConfig.from_pretrained(directory)
    assert (config.relative_actions, config.absolute_actions) == (True, ("gripper",))
    policy = HLRPSmolVLASharedPolicy.from_pretrained(directory).to("cpu")
    overrides = {"device_processor": {"device": "cpu"}}
    preprocess, postprocess = make_pre_post_processors(
        config, pretrained_path=str(directory), preprocessor_overrides=overrides
    )
    statistics = load_saved(str(directory)).statistics[ACTION]

    # A training batch: what LeRobot's steps make of absolute actions is what Stage 3 learns.
    samples = lerobots_chunks(absolute)[5:7]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in (CAMERA, STATE_KEY, ACTION_KEY)}
    learned = preprocess(batch | {"task": ["slide"] * 2})[ACTION_KEY]
    relative = torch.stack([sample["relative"] for sample in samples])
    torch.testing.assert_close(learned, statistics.normalize(relative))
    torch.testing.assert_close(postprocess(learned), batch[ACTION_KEY], rtol=1e-4, atol=1e-5)

    # A rollout: the robot moves at every step, the targets of a chunk do not move with it.
    policy.reset()
    generator, mask = torch.Generator().manual_seed(0), torch.tensor(MASK)
    for step in range(6):
        seen = {CAMERA: batch[CAMERA], STATE_KEY: torch.rand(2, 4, generator=generator), "task": ["slide"] * 2}
        observed, noise = preprocess(seen), torch.randn(2, T, 32, generator=generator)
        if step % 3 == 0:
            chunk = statistics.unnormalize(policy.predict_action_chunk(observed, noise))
            chunk = chunk + (seen[STATE_KEY] * mask)[:, None]
        action = postprocess(policy.select_action(observed, noise))
        torch.testing.assert_close(action, chunk[:, step % 3], rtol=1e-4, atol=1e-5)

    # What reads a policy takes it for what it is.
    capsys.readouterr()
    run_stage(train_stage3, tmp_path / "more", *options[:-4], "--n-action-steps", "3", "--init-from", directory)
    printed = capsys.readouterr().out
    assert f"from the policy {directory} of relative actions; cameras" in printed
    assert "normalised: state by quantiles, action by quantiles\n" in printed
    with pytest.raises(
        ValueError, match=r"--normalization artifact: .* has learned relative actions, with statistics of"
    ):
        open_from(directory).recorded_statistics({"state_dim": 4, "action_dim": 4})
    with pytest.raises(ValueError, match=r"SmolVLA cannot express:\n  relative actions"):
        export_smolvla(ExportConfig(str(directory), tmp_path / "smolvla"))
    config.pretrained_path = directory
    with pytest.raises(ValueError, match="lerobot-train would normalise relative actions by the dataset's statistics"):
        make_policy(config, ds_meta=LeRobotDataset(absolute.name, root=absolute).meta)
    with pytest.raises(ValueError, match=r"relative actions need observation.state, which is missing"):
        preprocess({CAMERA: batch[CAMERA], "task": ["slide"] * 2})
