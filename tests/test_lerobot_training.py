"""lerobot_config.py, lerobot_policy.py: what LeRobot's own training builds, freezes, keeps and refuses."""

import json
import os
import stat
from pathlib import Path

import pytest
import test_artifact
import torch
from draccus.utils import ParsingError
from forked import run_forked
from helpers import make_core
from lerobot.configs import NormalizationMode
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_policy_config, make_pre_post_processors
from safetensors.torch import load_file
from test_initial import save
from test_lerobot_smolvla import save_ours

from smolvla_shared import data
from smolvla_shared.artifact import load_artifact
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import ModelConfig
from smolvla_shared.initial import open_initial
from smolvla_shared.lerobot_config import HLRPSmolVLASharedConfig, feature_names
from smolvla_shared.lerobot_files import load_saved
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.losses import masked_mean
from smolvla_shared.normalization import Quantiles
from smolvla_shared.preprocess import Preprocessor
from smolvla_shared.robots import Robots

T = 6


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """Of Stage 2 on the state and camera of labelled_dataset; no action head."""
    return save(tmp_path_factory.mktemp("artifact"), make_core())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A policy of ours with two cameras, a state of 6 and actions of 7 dimensions."""
    save_ours(directory := tmp_path_factory.mktemp("ours") / "pretrained_model")
    return directory


def fresh_config(**options) -> HLRPSmolVLASharedConfig:
    return make_policy_config("hlrp_smolvla_shared", device="cpu", **{"chunk_size": T, "n_action_steps": 3} | options)


def metadata(root: Path):
    return LeRobotDataset(root.name, root=root).meta


def trained(policy: HLRPSmolVLASharedPolicy) -> set[str]:
    """The parts, by the first component of their parameters' names, that train."""
    return {name.split(".")[1] for name, parameter in policy.named_parameters() if parameter.requires_grad}


# --- a fresh policy ---------------------------------------------------------------------------------------------------


def test_a_fresh_policy_is_what_stage_3_trains(artifact, labelled_dataset):
    """Stage 3 in LeRobot's loop: for equal data, noise and times, train_stage3.py's loss."""
    config = fresh_config(stage2_artifact=str(artifact))
    torch.manual_seed(0)
    policy = make_policy(config, ds_meta=metadata(labelled_dataset))
    preprocess, _ = make_pre_post_processors(config, dataset_stats=policy.config._runtime_dataset_meta.stats)
    meta = metadata(labelled_dataset)
    delta_timestamps = resolve_delta_timestamps(config, meta)
    dataset = LeRobotDataset(labelled_dataset.name, root=labelled_dataset, delta_timestamps=delta_timestamps)
    rows = [0, 17, 60]  # the second chunk runs over the end of its episode
    batch = torch.utils.data.default_collate([dataset[row] for row in rows])
    noise, time = torch.randn(3, T, 32), torch.tensor([0.9, 0.4, 0.1])
    loss, logged = policy.forward(preprocess(dict(batch)), noise=noise, time=time)
    assert logged == {"loss": loss.item()}

    datasets = data.open_datasets(data_options(labelled_dataset))
    initial = open_initial(ModelConfig(), artifact)
    torch.manual_seed(0)
    core = initial.build(ModelConfig(), ("observation.image",), {"action"}, state_dim=4, action_dim=4, chunk_size=T)
    raw = RawBatch(
        images=[datasets[0].read_frames("observation.image", rows)],
        image_mask=torch.ones(3, 1, dtype=torch.bool),
        tasks=batch["task"],
        state=batch["observation.state"],
        state_mask=torch.ones(3, dtype=torch.bool),
        pairs=None,
        pair_mask=torch.zeros(3, 0, dtype=torch.bool),
        actions=batch["action"],
        action_mask=~batch["action_is_pad"],
        noise={"action": noise[:, None]},
        time={"action": time[:, None]},
        dataset=[0] * 3,
        row=rows,
        keys=["a", "b", "c"],
    )
    assert not raw.action_mask.all()
    statistics = Robots.find(datasets, ["action"]).statistics(datasets, [(0, datasets[0].rows())])
    ours = Preprocessor(core.config, initial.tokenizer, statistics)(raw)
    expected = masked_mean(core(ours)["action"], ours.masks["action"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def data_options(root: Path):
    from smolvla_shared.config import PolicyDataConfig

    return PolicyDataConfig(roots=(root,))


def test_a_fresh_policy_freezes_what_stage_3_freezes(artifact, labelled_dataset, tiny_vlm, tmp_path):
    """An artifact's trunk is tiny's and trains; a SmolVLM's is pretrained and frozen, unless it is to train."""
    from transformers import AutoConfig, SmolVLMForConditionalGeneration

    meta = metadata(labelled_dataset)
    assert trained(make_policy(fresh_config(stage2_artifact=str(artifact)), ds_meta=meta)) == {
        "trunk",
        "expert",
        "state_proj",
        "action_head",
    }
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_vlm / name).read_bytes())
    SmolVLMForConditionalGeneration(AutoConfig.from_pretrained(tiny_vlm)).save_pretrained(tmp_path)
    policy = make_policy(fresh_config(vlm_model_name=str(tmp_path)), ds_meta=meta)
    assert trained(policy) == {"expert", "state_proj", "action_head"}
    assert len(policy.get_optim_params()) == len([p for p in policy.parameters() if p.requires_grad])
    options = {"train_expert_only": False, "freeze_vision_encoder": True, "train_state_proj": False}
    policy = make_policy(fresh_config(vlm_model_name=str(tmp_path), **options), ds_meta=meta)
    assert trained(policy) == {"trunk", "expert", "action_head"}
    policy.save_pretrained(tmp_path / "saved")
    again = HLRPSmolVLASharedPolicy.from_pretrained(tmp_path / "saved")
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in policy.named_parameters() if p.requires_grad
    ]


def test_a_fresh_policy_reads_the_cameras_of_its_artifact(artifact, image_dataset, tmp_path):
    """Of the dataset's two it takes the one that Stage 2 has seen; without one of that name, the dataset's in order."""
    policy = make_policy(fresh_config(stage2_artifact=str(artifact), use_state=False), ds_meta=metadata(image_dataset))
    assert policy.config.core.cameras == ("observation.image",)
    policy.save_pretrained(tmp_path / "saved")
    again = HLRPSmolVLASharedPolicy.from_pretrained(tmp_path / "saved")
    assert list(again.config.input_features) == ["observation.image"]
    fresh = make_policy(fresh_config(vlm_model_name="tiny"), ds_meta=metadata(image_dataset))
    assert fresh.config.core.cameras == ("observation.image", "observation.images.wrist")


def test_another_normalisation_than_that_of_the_artifact_is_said(labelled_dataset, monkeypatch, tmp_path, caplog):
    state = Quantiles((0.0,) * 4, (1.0,) * 4, q01=(-1.0,) * 4, q99=(1.0,) * 4)
    monkeypatch.setitem(test_artifact.STATISTICS, "state", state)
    artifact, meta = str(save(tmp_path, make_core())), metadata(labelled_dataset)
    make_policy(fresh_config(stage2_artifact=artifact), ds_meta=meta)
    assert "has learned with its state normalised by quantiles, here it is by mean_std" in caplog.text
    caplog.clear()
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MEAN_STD"}
    modes = {kind: NormalizationMode(mode) for kind, mode in modes.items()}
    make_policy(fresh_config(stage2_artifact=artifact, normalization_mapping=modes), ds_meta=meta)
    assert "has learned" not in caplog.text


def test_a_fresh_policy_needs_cameras_and_actions(video_dataset):
    with pytest.raises(ValueError, match="needs the cameras and the actions of a dataset, got the features"):
        make_policy(fresh_config(vlm_model_name="tiny"), ds_meta=metadata(video_dataset))


@pytest.mark.parametrize("option", ["stage2_artifact", "init_from", "vlm_model_name"])
def test_a_policy_that_has_weights_takes_no_others(saved, option):
    with pytest.raises(ParsingError) as error:
        PreTrainedConfig.from_pretrained(saved, cli_overrides=[f"--{option}=tiny"])
    assert f"has weights already, {option} would give it others: start a fresh one" in str(error.value.__cause__)


def test_options_have_lerobots_names_and_reach_its_presets():
    config = fresh_config(optimizer_lr=3e-4, scheduler_decay_steps=70, optimizer_grad_clip_norm=2.0)
    assert config.get_optimizer_preset().lr == config.get_scheduler_preset().peak_lr == 3e-4
    assert config.get_optimizer_preset().grad_clip_norm == 2.0
    assert config.get_scheduler_preset().num_decay_steps == 70
    assert config.action_delta_indices == list(range(T))


# --- another robot ----------------------------------------------------------------------------------------------------


def test_a_policy_goes_on_with_another_robot(saved, image_dataset):
    """Other cameras, no state to read, other actions: its weights fit, they are padded."""
    config = PreTrainedConfig.from_pretrained(saved, cli_overrides=["--input_features=null"])
    config.pretrained_path = saved
    with pytest.raises(ValueError, match=r"the model was built for .*'state': \[4\].* has .*'state': None"):
        make_policy(config, ds_meta=metadata(image_dataset))


def test_a_policy_goes_on_with_another_state_and_other_actions(saved, labelled_dataset):
    config = PreTrainedConfig.from_pretrained(saved, cli_overrides=["--input_features=null", "--chunk_size=5"])
    config.pretrained_path, config.fps = saved, 50
    policy = make_policy(config, ds_meta=metadata(labelled_dataset))
    core = policy.config.core
    assert policy.config.fps is None  # it was that of the demonstrations before
    assert (core.cameras, core.state_dim, core.action_dim) == (("observation.image",), 4, 4)
    assert policy.config.input_features["observation.image"].shape == (3, 96, 96)  # the dataset's, not the model's
    before = load_file(saved / "model.safetensors")
    assert all(torch.equal(before[f"model.{name}"], tensor) for name, tensor in policy.model.state_dict().items())


def test_an_environment_of_another_width_is_still_refused(saved):
    from lerobot.envs.configs import EnvConfig

    config = PreTrainedConfig.from_pretrained(saved)
    config.pretrained_path = saved
    with pytest.raises(ValueError, match="the model was built for"):
        make_policy(config, env_cfg=EnvConfig.get_choice_class("pusht")())


@pytest.mark.parametrize(
    "names, expected",
    [
        (["x", "y"], ("x", "y")),
        ({"motors": ["a.pos", "b.pos"]}, ("a.pos", "b.pos")),
        ({"x": 0, "y": 1}, ("x", "y")),
        (None, None),
        (["x"], None),
    ],
)
def test_names_of_dimensions_are_flat(names, expected):
    feature = {"dtype": "float32", "shape": (2,), "names": names}
    assert feature_names({"action": feature, "observation.images.top": feature}) == {"action": expected}


# --- the contract of from_pretrained and of the processors ------------------------------------------------------------


def test_from_pretrained_takes_what_lerobots_takes(saved, caplog):
    policy = HLRPSmolVLASharedPolicy.from_pretrained(
        saved,
        cli_overrides=["--n_action_steps=1"],
        force_download=False,
        resume_download=None,
        proxies=None,
        token=None,
        cache_dir=None,
        local_files_only=True,
        revision=None,
        strict=False,
    )
    assert policy.config.n_action_steps == 1 and "missing weights are always an error" in caplog.text


@pytest.mark.parametrize("mode", list(NormalizationMode))
def test_every_mode_of_lerobots_normaliser_needs_its_statistics_only(saved, mode):
    config = load_saved(str(saved)).config
    config.normalization_mapping = {"VISUAL": NormalizationMode.IDENTITY, "STATE": mode, "ACTION": mode}
    needed = {
        "MEAN_STD": ["mean", "std"],
        "MIN_MAX": ["min", "max"],
        "QUANTILES": ["q01", "q99"],
        "QUANTILE10": ["q10", "q90"],
        "IDENTITY": [],
    }[mode.name]
    widths = {"observation.state": 6, "action": 7}
    stats = {
        key: {of: torch.full((width,), float(i + 1)) for i, of in enumerate(needed)} for key, width in widths.items()
    }
    preprocess, postprocess = make_pre_post_processors(config, dataset_stats=stats)
    action = torch.rand(2, 7)
    batch = preprocess({"observation.state": torch.rand(2, 6), "action": action, "task": ["a", "b"]})
    torch.testing.assert_close(postprocess(batch["action"]), action)
    if needed:
        del stats["action"][needed[1]]
        with pytest.raises(ValueError, match=rf"the statistics \['action.{needed[1]}'\] are missing"):
            make_pre_post_processors(config, dataset_stats=stats)


# --- real commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(server, labelled_dataset, tmp_path):
    """lerobot-train on labelled_dataset, 2 samples a step."""

    def run(*options: str) -> str:
        data = [f"--dataset.repo_id={labelled_dataset.name}", f"--dataset.root={labelled_dataset}", "--batch_size=2"]
        command = ["-m", "lerobot.scripts.lerobot_train", *data, "--num_workers=0", "--log_freq=1", *options]
        code, printed = run_forked(server, command, tmp_path / "printed.txt")
        assert code == 0, printed
        return printed

    return run


@pytest.mark.slow
def test_lerobot_train_builds_saves_resumes_and_fine_tunes(train, artifact, labelled_dataset, tmp_path):
    run = tmp_path / "run"
    options = [f"--output_dir={run}", "--policy.device=cpu", "--save_freq=2", "--steps=2"]
    options += ["--policy.type=hlrp_smolvla_shared", f"--policy.stage2_artifact={artifact}", f"--policy.chunk_size={T}"]
    printed = train(*options, "--policy.n_action_steps=2", "--policy.optimizer_lr=1e-3", "--policy.use_state=true")
    assert "freshly initialised: action head" in printed and "latent head" in printed
    first = run / "checkpoints" / "000002" / "pretrained_model"
    weights, original = load_file(first / "model.safetensors"), load_artifact(artifact).state_dict
    latent = {name for name in original if name.startswith("latent_head.")}
    assert latent and all(torch.equal(weights[f"model.{name}"], original[name]) for name in latent)  # has no target
    assert not torch.equal(weights["model.state_proj.weight"], original["state_proj.weight"])

    train(f"--config_path={first}/train_config.json", "--resume=true", "--steps=3", "--save_freq=3")
    second = run / "checkpoints" / "000003" / "pretrained_model"
    assert not torch.equal(
        load_file(second / "model.safetensors")["model.state_proj.weight"], weights["model.state_proj.weight"]
    )
    for directory in (first, second):
        saved = load_saved(str(directory))
        assert saved.config.core.chunk_size == T and saved.config.core.noisy_padding is False
        assert saved.config.stage2_artifact is None and saved.statistics["action"].mean
        config = json.loads((directory / "config.json").read_text())
        assert config["optimizer_lr"] == 1e-3 and config["n_action_steps"] == 2

    tuned = tmp_path / "tuned"
    options = [f"--policy.path={second}", f"--output_dir={tuned}", "--policy.device=cpu", "--steps=2", "--save_freq=2"]
    mapping = '{"ACTION": "MIN_MAX", "STATE": "MEAN_STD", "VISUAL": "IDENTITY"}'
    train(*options, f"--policy.normalization_mapping={mapping}")
    saved = load_saved(str(tuned / "checkpoints" / "last" / "pretrained_model"))
    with pytest.raises(ValueError, match=r"normalises \{'action': 'MIN_MAX'\}"):
        _ = saved.statistics


@pytest.mark.slow
def test_an_adapter_trains_and_is_merged(train, saved_for_labelled, tmp_path):
    options = [f"--policy.path={saved_for_labelled}", f"--output_dir={tmp_path / 'run'}", "--policy.device=cpu"]
    train(*options, "--steps=2", "--save_freq=2", "--peft.r=4", "--policy.optimizer_lr=1e-2")
    adapter = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert not (adapter / "model.safetensors").exists()
    merged, base = load_saved(str(adapter)).weights, load_file(saved_for_labelled / "model.safetensors")
    assert merged.keys() == {name.removeprefix("model.") for name in base}
    changed = {name for name in merged if not torch.equal(merged[name], base[f"model.{name}"])}
    expected = "expert.layers.0.self_attn.q_proj.weight", "state_proj.weight", "action_head.out_proj.weight"
    assert set(expected) <= changed
    assert all(name.startswith(("expert.", "state_proj.", "action_head.")) for name in changed)
    assert not [name for name in changed if "k_proj" in name or "mlp." in name]
    policy = HLRPSmolVLASharedPolicy.from_pretrained(adapter)  # for rollout.py, and as LeRobot's own loading does it
    assert all(torch.equal(merged[name], tensor) for name, tensor in policy.model.state_dict().items())
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((adapter / "config.json").stat().st_mode) == 0o666 & ~mask


@pytest.fixture
def saved_for_labelled(saved, labelled_dataset, tmp_path) -> Path:
    config = PreTrainedConfig.from_pretrained(saved, cli_overrides=["--input_features=null"])
    config.pretrained_path = saved
    policy = make_policy(config, ds_meta=metadata(labelled_dataset))
    directory = tmp_path / "base"
    policy.save_pretrained(directory)
    stats = metadata(labelled_dataset).stats
    config._tokenizer = load_saved(str(saved)).tokenizer
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(directory)
    return directory
