"""lerobot_policy.py: the LeRobot policy equals the core it was saved from, anywhere, and refuses what does not fit."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from safetensors.torch import load_file, save_file
from torch._inductor.cudagraph_trees import get_container

from smolvla_shared.batch import RawBatch
from smolvla_shared.config import ACTION, ModelConfig
from smolvla_shared.lerobot_files import save_policy
from smolvla_shared.lerobot_policy import (
    CUDA_GRAPH_MODES,
    HLRPSmolVLASharedConfig,
    HLRPSmolVLASharedPolicy,
    check_thread,
    make_hlrp_smolvla_shared_pre_post_processors,
    to_batch,
)
from smolvla_shared.lerobot_processor import TokenizeTask
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor, TextTokenizer
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config

CAMERA, WRIST = "observation.image", "observation.images.wrist"
T, A = 12, 4
TASKS = ["slide the plate into the goal", "öffne das Fenster\n", ""]
STATISTICS = {
    "state": Statistics((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 0.5)),
    "action": Statistics((0.0, -0.5, 0.5, 0.1), (0.3, 0.2, 0.1, 1.0)),
}
NAMES = {"state": ("x", "y", "z", "gripper"), "action": ("dx", "dy", "dz", "grip")}
STATS = {
    key: {"mean": torch.tensor(STATISTICS[name].mean), "std": torch.tensor(STATISTICS[name].std)}
    for key, name in {"observation.state": "state", "action": "action"}.items()
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_trunk_tokenizer("tiny", None)


def make_core(cameras=(CAMERA,), **dims):
    dims = {"state_dim": 4, "action_dim": A, "chunk_size": T, "latent_vector_dim": 12, "code_seq_len": 3} | dims
    # The name leads nowhere, as on a machine that does not have what the trunk was made from.
    config = replace(make_core_config(ModelConfig(preset="tiny"), cameras, **dims), model_name="nobody/nothing")
    torch.manual_seed(0)
    return SmolVLASharedCore(config).eval()


@pytest.fixture(scope="module")
def core():
    return make_core()


@pytest.fixture(scope="module")
def saved(core, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy") / "pretrained_model"
    source = {"run": "s3", "weights": "last step"}
    save_policy(
        directory,
        core.config,
        core.state_dict(),
        tokenizer,
        STATISTICS,
        3,
        source,
        names=NAMES,
        image_shapes={CAMERA: (3, 48, 80)},
    )
    return directory


def make_config(core, **options):
    return HLRPSmolVLASharedConfig(core=core.config, device="cpu", **options)


def make_policy(core, **options):
    policy = HLRPSmolVLASharedPolicy(make_config(core, **options)).eval()
    policy.model.load_state_dict(core.state_dict())
    return policy


def raw_batch(sizes, tasks=TASKS):
    """A batch with images of these (height, width), one a camera, and chunks whose ends are padding."""
    rng = torch.Generator().manual_seed(1)
    num = len(tasks)
    return RawBatch(
        images=[torch.randint(0, 256, (num, 3, *size), generator=rng, dtype=torch.uint8) for size in sizes],
        image_mask=torch.ones(num, len(sizes), dtype=torch.bool),
        tasks=tasks,
        state=torch.randn(num, 4, generator=rng),
        state_mask=torch.ones(num, dtype=torch.bool),
        pairs=None,
        pair_mask=torch.zeros(num, 1, dtype=torch.bool),
        actions=torch.randn(num, T, A, generator=rng),
        action_mask=torch.arange(T) < torch.tensor([T, 5, 1])[:num, None],
        noise={ACTION: torch.randn(num, 1, T, 32, generator=rng)},
        time={ACTION: torch.tensor([[0.9], [0.2], [0.5]])[:num]},
        dataset=[0] * num,
        row=list(range(num)),
        keys=["sample"] * num,
    )


def lerobot_batch(raw, cameras=(CAMERA,)):
    """The same values as LeRobot's datasets and environments give them: images are floats in [0, 1]."""
    images = {key: image.float() / 255 for key, image in zip(cameras, raw.images, strict=True)}
    return images | {
        "observation.state": raw.state,
        "task": raw.tasks,
        "action": raw.actions,
        "action_is_pad": ~raw.action_mask,
    }


@pytest.fixture(scope="module")
def processed(core, tokenizer):
    """A training batch after the preprocessor."""
    preprocessor, _ = make_hlrp_smolvla_shared_pre_post_processors(make_config(core), STATS, tokenizer)
    return preprocessor(lerobot_batch(raw_batch([(48, 80)])))


# --- config -----------------------------------------------------------------------------------------------------------


def test_config_survives_its_json(core, tmp_path):
    config = make_config(core, n_action_steps=5)
    config.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path) == config
    changed = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--n_action_steps=2", "--core.flow_steps=3"])
    assert changed == replace(config, n_action_steps=2, core=replace(core.config, flow_steps=3))


def test_config_states_what_the_policy_observes_and_does(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["type"] == "hlrp_smolvla_shared" and not config["push_to_hub"]
    assert config["input_features"] == {
        CAMERA: {"type": "VISUAL", "shape": [3, 48, 80]},
        "observation.state": {"type": "STATE", "shape": [4]},
    }
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [A]}}
    stateless = make_config(make_core(state_dim=0))
    assert {key: feature.shape for key, feature in stateless.input_features.items()} == {CAMERA: (3, 64, 64)}
    assert stateless.observation_delta_indices is None and stateless.action_delta_indices == list(range(T))


@pytest.mark.parametrize("steps", [0, T + 1])
def test_more_or_fewer_steps_than_a_chunk_has_are_refused(core, steps):
    with pytest.raises(ValueError, match=f"n_action_steps {steps} must be between 1 and .* {T}"):
        make_config(core, n_action_steps=steps)


def test_a_core_without_action_head_is_no_policy(core):
    with pytest.raises(ValueError, match="no action head"):
        HLRPSmolVLASharedConfig(core=replace(core.config, action_dim=0), device="cpu")


# --- saved and loaded -------------------------------------------------------------------------------------------------

ACT_ELSEWHERE = """
import sys
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import load_file, save_file
directory, inputs, outputs = sys.argv[1:4]
batch = load_file(inputs)
noise = batch.pop("noise")
config = PreTrainedConfig.from_pretrained(directory)
policy = get_policy_class(config.type).from_pretrained(directory)
preprocess, postprocess = make_pre_post_processors(config, pretrained_path=directory)
actions = policy.predict_action_chunk(preprocess(batch | {"task": sys.argv[4:]}), noise)
save_file({"actions": postprocess(actions)}, outputs)
"""


def test_another_process_acts_the_same_without_hub_and_cache(core, tokenizer, saved, tmp_path):
    raw = raw_batch([(48, 80)])
    noise = raw.noise.pop(ACTION)[:, 0]
    normalized = core.sample(Preprocessor(core.config, tokenizer, STATISTICS)(raw), ACTION, noise)

    batch = lerobot_batch(raw)
    save_file({CAMERA: batch[CAMERA], "observation.state": raw.state, "noise": noise}, tmp_path / "inputs.safetensors")
    paths = [saved, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    elsewhere = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    subprocess.run(
        [sys.executable, "-c", ACT_ELSEWHERE, *map(str, paths), *TASKS], check=True, env=elsewhere, cwd=tmp_path
    )
    actions = load_file(tmp_path / "outputs.safetensors")["actions"]
    assert actions.shape == (3, T, A)
    assert torch.equal(actions, STATISTICS["action"].unnormalize(normalized))


def environment(name, **options):
    from lerobot.envs.configs import EnvConfig

    return EnvConfig.get_choice_class(name)(**options)


def test_lerobot_eval_loads_it(core, saved, processed):
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(saved, cli_overrides=["--n_action_steps=2"])
    config.pretrained_path = saved
    policy = make_policy(config, env_cfg=environment("metaworld", task="plate-slide-v3"))
    assert not policy.training and policy.config.n_action_steps == 2
    assert all(torch.equal(value, core.state_dict()[key]) for key, value in policy.model.state_dict().items())
    # The overrides of lerobot-eval: an environment may name the camera otherwise.
    preprocessor, _ = make_pre_post_processors(
        config,
        pretrained_path=str(saved),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": {"observation.top": CAMERA}},
        },
    )
    again = preprocessor(lerobot_batch(raw_batch([(48, 80)]), cameras=("observation.top",)))
    assert torch.equal(again[CAMERA], processed[CAMERA])
    assert torch.equal(again["observation.language.tokens"], processed["observation.language.tokens"])


def test_lerobot_train_replaces_the_statistics(saved):
    from lerobot.policies.factory import make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(saved)
    features = config.input_features | config.output_features
    stats = {key: {"mean": [1.0] * 4, "std": [2.0] * 4} for key in STATS}
    options = {"norm_map": config.normalization_mapping, "stats": stats}
    preprocessor, postprocessor = make_pre_post_processors(
        config,
        pretrained_path=str(saved),
        preprocessor_overrides={"normalizer_processor": options | {"features": features}},
        postprocessor_overrides={"unnormalizer_processor": options | {"features": config.output_features}},
    )
    raw = raw_batch([(48, 80)])
    batch = preprocessor(lerobot_batch(raw))
    torch.testing.assert_close(batch["observation.state"], (raw.state - 1) / 2)
    torch.testing.assert_close(postprocessor(batch["action"]), raw.actions)


def test_an_environment_that_does_not_fit_is_refused(saved):
    from lerobot.policies.factory import make_policy

    config = PreTrainedConfig.from_pretrained(saved)
    config.pretrained_path = saved
    with pytest.raises(ValueError, match=r"built for .*'action': \[4\].* has .*'action': \[2\]"):
        make_policy(config, env_cfg=environment("pusht"))


def test_cameras_that_do_not_fit_are_refused(core):
    config = make_config(core)
    config.core = replace(core.config, cameras=(WRIST,))
    with pytest.raises(ValueError, match=rf"built for .*\['{WRIST}'\].* has .*\['{CAMERA}'\]"):
        HLRPSmolVLASharedPolicy(config)


def test_optional_cameras_may_be_missing_from_an_environment(core):
    config = make_config(make_core((CAMERA, WRIST)), optional_cameras=(WRIST,))
    del config.input_features[WRIST]
    config.validate_features()
    config.optional_cameras = (CAMERA,)
    with pytest.raises(ValueError, match=r"the model was built for"):
        config.validate_features()


@pytest.mark.parametrize("cameras", [(CAMERA, WRIST), ("top",)])
def test_optional_cameras_are_some_of_the_models(cameras):
    with pytest.raises(ValueError, match=r"optional_cameras .* must be some, not all, of the model's cameras"):
        make_config(make_core((CAMERA, WRIST)), optional_cameras=cameras)


def test_loading_is_strict(saved, tmp_path):
    weights = load_file(saved / "model.safetensors")
    bias, out = "model.state_proj.bias", "model.action_head.out_proj.weight"
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    for broken, message in [
        ({key: value for key, value in weights.items() if key != bias}, rf"missing: {bias} \[128\]"),
        (weights | {"model.extra": torch.zeros(1)}, r"unknown: model.extra \[1\]"),
        (weights | {out: weights[out][:5].clone()}, rf"wrong shape: {out} \[5, 96\], expected \[32, 96\]"),
    ]:
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            HLRPSmolVLASharedPolicy.from_pretrained(tmp_path)


def test_a_directory_without_a_policy_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"no policy .*/nowhere: there is no such directory"):
        HLRPSmolVLASharedPolicy.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "README.md").touch()
    with pytest.raises(ValueError, match=r"config\.json is missing, found \['README.md'\]"):
        HLRPSmolVLASharedPolicy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        HLRPSmolVLASharedPolicy.from_pretrained(tmp_path)


# --- acting -----------------------------------------------------------------------------------------------------------


def test_a_chunk_is_executed_for_n_action_steps_then_replanned(core, processed):
    policy = make_policy(core, n_action_steps=3)
    first, second = torch.randn(2, 3, T, 32, generator=torch.Generator().manual_seed(2))
    chunk, next_chunk = (policy.predict_action_chunk(processed, noise) for noise in (first, second))
    assert chunk.shape == (3, T, A) and not torch.equal(chunk, next_chunk)
    # While the queue lasts, neither noise nor observation matters.
    actions = [policy.select_action(processed, first), policy.select_action({}), policy.select_action({})]
    assert torch.equal(torch.stack(actions, dim=1), chunk[:, :3])
    assert torch.equal(policy.select_action(processed, second), next_chunk[:, 0])
    policy.reset()
    assert torch.equal(policy.select_action(processed, first), chunk[:, 0])


def test_noise_is_drawn_where_none_is_given(core, processed):
    policy = make_policy(core)
    torch.manual_seed(0)
    first, second = policy.predict_action_chunk(processed), policy.predict_action_chunk(processed)
    torch.manual_seed(0)
    assert torch.equal(policy.predict_action_chunk(processed), first) and not torch.equal(first, second)


def test_a_policy_without_state_does_not_ask_for_one(processed):
    policy = make_policy(make_core(state_dim=0))
    seen = {key: value for key, value in processed.items() if key != "observation.state"}
    noise = torch.ones(3, T, 32)
    assert torch.equal(policy.predict_action_chunk(seen, noise), policy.predict_action_chunk(processed, noise))


@pytest.mark.parametrize("key", [CAMERA, "observation.state", "observation.language.tokens"])
def test_a_missing_observation_is_refused(core, processed, key):
    seen = {name: value for name, value in processed.items() if name != key}
    with pytest.raises(ValueError) as error:
        make_policy(core).select_action(seen)
    assert f"['{key}'] is missing" in str(error.value) and all(name in str(error.value) for name in sorted(seen))


def test_a_compiled_policy_samples_in_one_graph_that_is_there_after_loading(saved, processed, monkeypatch):
    options = {"cli_overrides": ["--num_steps=2"]}
    plain, noise = HLRPSmolVLASharedPolicy.from_pretrained(saved, **options), torch.ones(1, T, 32)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: compile(f, backend="eager", **options))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    options["cli_overrides"].append("--compile_model=true")
    policy = HLRPSmolVLASharedPolicy.from_pretrained(saved, **options)
    assert counters["stats"]["unique_graphs"] == 1
    one = {key: value[:1] for key, value in processed.items() if isinstance(value, torch.Tensor)}
    text = torch.zeros(1, 16, dtype=torch.int64)
    one |= {"observation.language.tokens": text, "observation.language.attention_mask": text == 0}
    expected = plain.predict_action_chunk(one, noise)
    assert torch.equal(policy.predict_action_chunk(one, noise), expected)
    with torch.inference_mode():  # as LeRobot's commands do, with observations made in it or before
        made_in_it = {key: value.clone() for key, value in one.items()}
        assert torch.equal(policy.predict_action_chunk(one, noise), expected)
        assert torch.equal(policy.predict_action_chunk(made_in_it, noise.clone()), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    policy.predict_action_chunk(processed, torch.ones(3, T, 32))  # another shape
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def in_a_thread(call) -> BaseException | None:
    """What the call raises there."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()


def test_cuda_graphs_are_refused_in_the_threads_of_a_server(core):
    config = make_policy(core).config
    config.device = "cuda"
    for mode in CUDA_GRAPH_MODES:
        config.compile_mode = mode
        assert re.search("compile_mode to max-autotune-no-cudagraphs", str(in_a_thread(lambda: check_thread(config))))
        check_thread(config)
    for device, mode in (("cpu", "max-autotune"), ("cuda", "max-autotune-no-cudagraphs"), ("cuda", "default")):
        config.device, config.compile_mode = device, mode
        assert in_a_thread(lambda: check_thread(config)) is None
    # What PyTorch does there, and in which modes. If it can do so one day, there is nothing to refuse.
    assert get_container(0).tree_manager is None
    assert isinstance(in_a_thread(lambda: get_container(0)), AssertionError)
    modes = torch._inductor.list_mode_options()
    assert {mode for mode, options in modes.items() if options.get("triton.cudagraphs")} == set(CUDA_GRAPH_MODES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["deep", ""])
def test_a_copy_of_a_compiled_policy_samples_with_its_own_weights(core, processed, monkeypatch, copied):
    compile, noise = torch.compile, torch.ones(3, T, 32)
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **options: compile(f, backend="eager", **options))
    policy = make_policy(core, compile_model=True)
    expected = policy.predict_action_chunk(processed, noise)
    other = copied(policy)
    assert torch.equal(other.predict_action_chunk(processed, noise), expected)
    with torch.no_grad():
        for parameter in policy.model.action_head.parameters():
            parameter.zero_()
    assert not torch.equal(policy.predict_action_chunk(processed, noise), expected)
    assert torch.equal(other.predict_action_chunk(processed, noise), expected)


def test_a_compiled_policy_cannot_do_real_time_chunking(core):
    policy = make_policy(core)
    policy.config.compile_model, policy.config.rtc_config = True, RTCConfig(enabled=True)
    with pytest.raises(ValueError, match=r"--policy\.compile_model"):
        policy.init_rtc_processor()


@pytest.mark.parametrize("special", [(), (3, 5)], ids=["", "image special tokens"])
def test_a_missing_optional_camera_is_masked(processed, special):
    core = make_core((CAMERA, WRIST), image_special_tokens=special)
    policy = make_policy(core, optional_cameras=(CAMERA,))
    noise = torch.ones(3, T, 32)
    wrist = {WRIST: torch.rand(3, 3, 30, 40, generator=torch.Generator().manual_seed(0))}
    both = policy.predict_action_chunk(processed | wrist, noise)
    del (without := processed | wrist)[CAMERA]
    batch = to_batch(without, core.config, (CAMERA,))
    assert batch.image_mask.tolist() == [[True, False]] * 3  # the wrist's comes first
    assert torch.equal(batch.images[:, 0], to_batch(processed | wrist, core.config).images[:, 1])
    chunk = policy.predict_action_chunk(without, noise)
    assert not torch.allclose(chunk, both, atol=1e-3)
    batch.images[:, 1] = 0.5  # nothing shows through the mask
    assert torch.equal(core.sample(batch, ACTION, noise), chunk)


def test_a_state_of_another_width_is_refused(core, processed):
    with pytest.raises(ValueError, match=r"observation.state is \[3, 6\], the model expects \[3, 4\]"):
        to_batch(processed | {"observation.state": torch.zeros(3, 6)}, core.config)


def test_a_time_dimension_of_one_and_float64_change_nothing(core, processed):
    expected = to_batch(processed, core.config)
    inputs = {key: processed[key].double()[:, None] for key in (CAMERA, "observation.state")}
    found = to_batch(processed | inputs, core.config)
    torch.testing.assert_close(found.images, expected.images)
    torch.testing.assert_close(found.state, expected.state)
    assert found.state.dtype == found.images.dtype == torch.float32


def test_actions_that_are_not_finite_never_reach_a_robot(core, processed):
    state = processed["observation.state"].clone()
    state[1, 2] = torch.nan
    with pytest.raises(ValueError, match="actions that are not finite; the normalised state is tensor"):
        make_policy(core).select_action(processed | {"observation.state": state})


def test_images_outside_of_their_range_are_refused_when_an_episode_begins(core, processed):
    policy = make_policy(core)
    with pytest.raises(ValueError, match=rf"{CAMERA} has values from 0 to 255: images are uint8, or floats in"):
        policy.predict_action_chunk(processed | {CAMERA: processed[CAMERA].round() * 255})
    policy.reset()
    policy.predict_action_chunk(processed)


def test_noise_in_padded_dimensions_does_not_reach_the_actions(core, processed):
    noise = torch.randn(3, T, 32, generator=torch.Generator().manual_seed(3))
    other = noise.clone()
    other[..., A:] = 100.0
    chunks = [make_policy(core).predict_action_chunk(processed, draw) for draw in (noise, other)]
    assert torch.equal(*chunks)
    noisy = make_core(noisy_padding=True)  # as in LeRobot's SmolVLA
    chunks = [make_policy(noisy).predict_action_chunk(processed, draw) for draw in (noise, other)]
    assert not torch.allclose(*chunks, atol=1e-2)


# --- training with LeRobot's loop -------------------------------------------------------------------------------------


def test_loss_counts_valid_steps_and_real_dimensions_only(core, processed):
    raw = raw_batch([(48, 80)])
    noise, time = raw.noise[ACTION][:, 0], raw.time[ACTION][:, 0]
    policy = make_policy(core)
    loss, logged = policy.forward(processed, noise=noise, time=time)
    rows, _ = policy.forward(processed, reduction="none", noise=noise, time=time)

    # The same by hand: a mean over exactly the numbers that count.
    head, prefix = core.action_head, core.encode(to_batch(processed, core.config))
    target = torch.nn.functional.pad(processed["action"], (0, 32 - A))
    x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * target
    hidden = core.expert(head.embed(x_t[:, None], time[:, None]), prefix)
    error = head.velocity(hidden)[:, 0] - (noise - target)
    per_row = [error[row, :num_valid, :A].square() for row, num_valid in enumerate([T, 5, 1])]
    torch.testing.assert_close(loss, torch.cat(per_row).mean())
    torch.testing.assert_close(rows, torch.stack([row.mean() for row in per_row]))
    assert logged == {"loss": loss.item()}

    # The suffix is causal: no step that counts sees the padded ones after it.
    beyond = processed["action"] + 100 * processed["action_is_pad"][..., None]
    same, _ = policy.forward(processed | {"action": beyond}, noise=noise, time=time)
    torch.testing.assert_close(same, loss)


def test_training_draws_its_own_noise_and_learns(core, processed):
    torch.manual_seed(0)
    policy = make_policy(core).train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    probe = {"noise": torch.randn(3, T, 32), "time": torch.tensor([0.9, 0.5, 0.1])}
    before = policy.forward(processed, **probe)[0].item()
    for _ in range(20):
        optimizer.zero_grad()
        policy.forward(processed)[0].backward()
        optimizer.step()
    assert policy.forward(processed, **probe)[0].item() < 0.9 * before


def test_actions_that_do_not_fit_are_refused(core, processed):
    with pytest.raises(ValueError, match=rf"action is \[3, 2, 4\], the model expects \[B, {T}, {A}\]"):
        make_policy(core).forward(processed | {"action": torch.zeros(3, 2, A)})


def test_without_padding_marks_every_action_counts(core, processed):
    raw, policy = raw_batch([(48, 80)]), make_policy(core)
    draws = {"noise": raw.noise[ACTION][:, 0], "time": raw.time[ACTION][:, 0]}
    marked = processed | {"action_is_pad": torch.zeros(3, T, dtype=torch.bool)}
    unmarked = {key: value for key, value in processed.items() if key != "action_is_pad"}
    assert torch.equal(policy.forward(unmarked, **draws)[0], policy.forward(marked, **draws)[0])


# --- processors -------------------------------------------------------------------------------------------------------


def test_policy_preprocessing_equals_training(tokenizer):
    cameras = (CAMERA, WRIST)
    core = make_core(cameras)
    raw = raw_batch([(48, 80), (100, 75)])
    preprocessor, _ = make_hlrp_smolvla_shared_pre_post_processors(make_config(core), STATS, tokenizer)
    batch = preprocessor(lerobot_batch(raw, cameras))
    inference, training = to_batch(batch, core.config), Preprocessor(core.config, tokenizer, STATISTICS)(raw)
    for name in ("images", "image_mask", "text", "text_mask", "state", "state_mask"):
        ours, theirs = getattr(inference, name), getattr(training, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert torch.equal(batch["action"], training.targets[ACTION].value[..., :A])
    assert torch.equal(~batch["action_is_pad"], training.targets[ACTION].mask)


def test_uint8_images_are_the_same_images(core, processed):
    bytes_ = processed | {CAMERA: raw_batch([(48, 80)]).images[0]}
    assert torch.equal(to_batch(bytes_, core.config).images, to_batch(processed, core.config).images)


def test_single_observations_get_a_batch_dimension(core, tokenizer, processed):
    preprocessor, postprocessor = make_hlrp_smolvla_shared_pre_post_processors(make_config(core), STATS, tokenizer)
    raw = raw_batch([(48, 80)])
    single = preprocessor({CAMERA: raw.images[0][0].float() / 255, "observation.state": raw.state[0], "task": TASKS[0]})
    noise = torch.zeros(1, T, 32)
    one = {key: value[:1] for key, value in processed.items() if key.startswith("observation.")}
    policy = make_policy(core)
    action = policy.select_action(single, noise)
    torch.testing.assert_close(action, policy.predict_action_chunk(one, noise)[:, 0])
    assert torch.equal(postprocessor(action), STATISTICS["action"].unnormalize(action))


def test_the_step_carries_the_tokenizer(tokenizer):
    step = TokenizeTask(48, tokenizer)
    rebuilt = TokenizeTask(**json.loads(json.dumps(step.get_config())))
    rebuilt.load_state_dict(step.state_dict())
    tasks = [*TASKS, "ein sehr langer Satz 🤖 <image> " * 20]
    expected = TextTokenizer(tokenizer, 48)(tasks)
    found = rebuilt({"observation": {}, "complementary_data": {"task": tasks}})["observation"]
    assert torch.equal(found["observation.language.tokens"], expected[0]) and expected[0].shape == (4, 48)
    assert torch.equal(found["observation.language.attention_mask"], expected[1])


def test_a_missing_task_is_refused(core, tokenizer):
    preprocessor, _ = make_hlrp_smolvla_shared_pre_post_processors(make_config(core), STATS, tokenizer)
    with pytest.raises(ValueError, match=f'needs a "task" text .*, the batch has .*{CAMERA}.*, task None'):
        preprocessor({CAMERA: torch.zeros(1, 3, 8, 8)})


def test_lerobot_train_finds_the_tokenizer_by_the_trunks_name(core):
    config = HLRPSmolVLASharedConfig(core=replace(core.config, model_name="tiny"), device="cpu")
    preprocessor, _ = make_hlrp_smolvla_shared_pre_post_processors(config, STATS)
    assert preprocessor(lerobot_batch(raw_batch([(48, 80)])))["observation.language.tokens"].dtype == torch.int64


@pytest.mark.parametrize(
    ("stats", "missing"),
    [
        (None, "['observation.state.mean', 'observation.state.std', 'action.mean', 'action.std']"),
        ({"action": STATS["action"]}, "['observation.state.mean', 'observation.state.std']"),
        (STATS | {"action": {"mean": torch.zeros(4)}}, "['action.std']"),
    ],
)
def test_missing_statistics_are_refused(core, tokenizer, stats, missing):
    config = make_config(core)
    with pytest.raises(ValueError) as error:
        make_hlrp_smolvla_shared_pre_post_processors(config, stats, tokenizer)
    assert f"{missing} are missing, found " in str(error.value)
