"""Derived values of the configuration, and what it refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from lerobot.policies.smolvla.smolvlm_with_expert import get_intermediate_size

from smolvla_shared.config import CoreConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
from smolvla_shared.trunk import expert_mlp_width

CORE = CoreConfig(
    model_name="tiny",
    model_revision=None,
    vlm={"text_config": {"hidden_size": 128}},
    cameras=("top", "wrist"),
    image_size=64,
    state_dim=4,
    latent_vector_dim=32,
    code_seq_len=4,
    action_dim=4,
)


def test_json_gives_an_equal_config():
    assert CoreConfig(**json.loads(json.dumps(asdict(CORE)))) == CORE


def test_latent_dim_is_the_width_of_one_token():
    assert CORE.latent_dim == 8
    assert replace(CORE, latent_vector_dim=0, code_seq_len=0).latent_dim == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_vector_dim": 30}, "latent_vector_dim 30.*code_seq_len 4"),
        ({"state_dim": 33}, "state has 33 dimensions.*at most 32.*raise max_state_dim"),
        ({"action_dim": 40}, "action has 40 dimensions.*at most 32.*raise max_action_dim"),
    ],
)
def test_core_config_refuses_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CORE, **change)


def test_sizes_that_just_fit_are_taken():
    assert replace(CORE, state_dim=32, action_dim=32).action_dim == 32


@pytest.mark.parametrize("hidden", [96, 384, 432, 720, 960])
def test_expert_mlp_width_is_smolvlas(hidden):
    assert expert_mlp_width(hidden) == get_intermediate_size(hidden)


def test_only_the_embedded_trunk_has_no_pretrained_weights():
    assert not CORE.has_pretrained_trunk
    assert replace(CORE, model_name="HuggingFaceTB/SmolVLM2-500M-Video-Instruct").has_pretrained_trunk


def test_model_config_states_a_trunk_or_none():
    assert ModelConfig().stated_name is None
    assert ModelConfig(preset="tiny").stated_name == "tiny"
    assert ModelConfig(preset="smolvlm2-500m").stated_name == "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    assert ModelConfig(name="me/my-smolvlm").stated_name == "me/my-smolvlm"
    with pytest.raises(ValueError, match=r"--model\.preset tiny.*--model\.name me/my-smolvlm"):
        ModelConfig(preset="tiny", name="me/my-smolvlm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--data\.repo-ids.*--data\.roots"),
        ({"roots": (Path("a"),), "frame_gap_s": 0.0}, r"--data\.frame-gap-s.*got 0\.0"),
    ],
)
def test_data_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_share_of_held_out_episodes_that_nothing_can_have_is_refused(share):
    with pytest.raises(ValueError, match=rf"--val-fraction.*got {share}"):
        RunConfig(run_dir=Path("run"), data=DataConfig(roots=(Path("a"),)), val_fraction=share)


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_gradient_norm_that_nothing_can_have_is_refused(norm):
    with pytest.raises(ValueError, match=r"--optim\.max-grad-norm must be at least 1e-06, got"):
        OptimConfig(max_grad_norm=norm)


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation_steps", "save_every", "log_every", "eval_every"])
def test_run_config_names_the_option_it_refuses(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        RunConfig(run_dir=Path("run"), data=DataConfig(roots=(Path("a"),)), **{name: 0})
