"""lerobot_smolvla.py: LeRobot's SmolVLA policies become ours and ours theirs, with the same actions, or are refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import tyro
from forked import run_forked
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

import train_stage2
import train_stage3
from smolvla_shared import lerobot_policy as ours
from smolvla_shared.artifact import ARTIFACT_NAME, load_artifact
from smolvla_shared.command import is_mistake
from smolvla_shared.config import ModelConfig
from smolvla_shared.files import write_manifest
from smolvla_shared.initial import open_initial
from smolvla_shared.lerobot_files import load_saved, save_policy
from smolvla_shared.lerobot_smolvla import (
    ExportConfig,
    ImportConfig,
    export_smolvla,
    import_smolvla,
    main,
)
from smolvla_shared.lerobot_smolvla_files import load_checkpoint
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import Quantiles, Statistics
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config

TOP, WRIST, EMPTY = "observation.image", "observation.images.wrist", "observation.images.empty_camera_0"
T, A, STATE = 6, 3, 4
TASKS = ["slide the plate into the goal", "öffne das Fenster", ""]
OUR_NAMES = {  # the beginning of a core's names, by the beginning of LeRobot's
    "model.vlm_with_expert.vlm.model.": "trunk.vlm.",
    "model.vlm_with_expert.lm_expert.": "expert.",
    "model.state_proj.": "state_proj.",
    "model.action_in_proj.": "action_head.in_proj.",
    "model.action_time_mlp_in.": "action_head.time_mlp_in.",
    "model.action_time_mlp_out.": "action_head.time_mlp_out.",
    "model.action_out_proj.": "action_head.out_proj.",
}
FINAL_NORM = "model.vlm_with_expert.vlm.model.text_model.norm.weight"
OUTPUT_LAYER = "model.vlm_with_expert.vlm.lm_head.weight"
STATS = {
    "observation.state": {"mean": torch.linspace(-1, 1, STATE), "std": torch.linspace(0.5, 2, STATE)},
    "action": {"mean": torch.linspace(0, 1, A), "std": torch.linspace(0.1, 3, A)},
}


def strengthen(module: torch.nn.Module) -> None:
    """Random weights, other than initial ones in norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise
        parameter.data = value.to(parameter.dtype)


def write_checkpoint(directory: Path, trunk: Path, **options) -> Path:
    """A policy as LeRobot's own classes write it."""
    cameras = {key: PolicyFeature(FeatureType.VISUAL, (3, 48, 80)) for key in (WRIST, TOP)}
    config = SmolVLAConfig(
        vlm_model_name=str(trunk),
        input_features=cameras | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (A,))},
        resize_imgs_with_padding=(64, 64),
        chunk_size=T,
        n_action_steps=2,
        num_vlm_layers=4,
        num_steps=5,
        device="cpu",
        **options,
    )
    policy = SmolVLAPolicy(config)
    strengthen(policy)
    policy.save_pretrained(directory)
    for processor in make_pre_post_processors(config, dataset_stats=STATS):
        processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tiny_vlm, tmp_path_factory) -> Path:
    """A LeRobot SmolVLA policy with every feature that has a counterpart here."""
    return write_checkpoint(
        tmp_path_factory.mktemp("lerobot") / "smolvla",
        tiny_vlm,
        empty_cameras=1,
        add_image_special_tokens=True,
        self_attn_every_n_layers=3,
        tokenizer_max_length=20,
        pad_language_to="max_length",
    )


@pytest.fixture(scope="module")
def imported(checkpoint) -> Path:
    out = checkpoint.parent / "imported"
    import_smolvla(ImportConfig(str(checkpoint), out))
    return out


@pytest.fixture(scope="module")
def exported(imported) -> Path:
    out = imported.parent / "exported"
    export_smolvla(ExportConfig(str(imported), out))
    return out


def observations() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    images = {key: torch.rand(3, 3, *size, generator=rng) for key, size in {TOP: (48, 80), WRIST: (70, 50)}.items()}
    return images | {
        "observation.state": torch.randn(3, STATE, generator=rng),
        "noise": torch.randn(3, T, 32, generator=rng),
    }


# Loads policies as LeRobot's commands do, and acts: processors, chunk, processors.
ACT = """
import sys
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from safetensors.torch import load_file, save_file
inputs, outputs, *directories = sys.argv[1:5]
actions = {}
for directory in directories:
    batch = load_file(inputs)
    noise = batch.pop("noise")
    config = PreTrainedConfig.from_pretrained(directory)
    policy = get_policy_class(config.type).from_pretrained(directory)
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=directory)
    chunk = policy.predict_action_chunk(preprocess(batch | {"task": sys.argv[5:]}), noise=noise)
    actions[config.type] = postprocess(chunk)
save_file(actions, outputs)
"""


def act(directory: Path) -> torch.Tensor:
    """The same here."""
    batch = observations()
    noise = batch.pop("noise")
    config = PreTrainedConfig.from_pretrained(directory)
    if config.type == "smolvla":
        policy = SmolVLAPolicy.from_pretrained(directory, strict=True)
    else:
        policy = ours.HLRPSmolVLASharedPolicy.from_pretrained(directory)
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=directory)
    return postprocess(policy.predict_action_chunk(preprocess(batch | {"task": TASKS}), noise=noise))


def by_our_names(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """LeRobot's weights by our names, those that begin with the prefix; without the two that no action depends on."""
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in OUR_NAMES.items()
        if name.startswith(old) and name not in (FINAL_NORM, OUTPUT_LAYER)
    }
    assert len(renamed) == len(tensors) - 2
    return {name: tensor for name, tensor in renamed.items() if name.startswith(prefix)}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- there and back ---------------------------------------------------------------------------------------------------


def test_an_imported_policy_acts_as_lerobots(checkpoint, imported):
    expected = act(checkpoint)
    assert expected.shape == (3, T, A)
    assert relative_difference(act(imported), expected) < 1e-5
    core = PreTrainedConfig.from_pretrained(imported).core
    assert core.cameras == (WRIST, TOP, EMPTY)  # in LeRobot's order
    assert core.image_special_tokens == (3, 5) and core.self_attn_every_n_layers == 3 and core.flow_steps == 5


@pytest.mark.parametrize("delay, horizon", [(None, None), (2, None), (1, 3)])
def test_chunks_in_real_time_are_lerobots(checkpoint, imported, delay, horizon):
    """Guided towards what is left of the last chunk, as lerobot-rollout --inference.type=rtc asks for it."""
    batch, left_over = observations(), torch.randn(3, T - 2, A, generator=torch.Generator().manual_seed(5))
    noise = batch.pop("noise")
    chunks = []
    for kind, directory in ((SmolVLAPolicy, checkpoint), (ours.HLRPSmolVLASharedPolicy, imported)):
        policy = kind.from_pretrained(directory)
        policy.config.rtc_config = RTCConfig(execution_horizon=4)
        policy.init_rtc_processor()
        assert policy.supports_rtc()
        preprocess, _ = make_pre_post_processors(policy.config, pretrained_path=directory)
        options = {"inference_delay": delay, "execution_horizon": horizon}
        options |= {} if delay is None else {"prev_chunk_left_over": left_over}
        chunks.append(policy.predict_action_chunk(preprocess(batch | {"task": TASKS}), noise=noise, **options))
    assert relative_difference(chunks[1], chunks[0]) < 1e-5
    unguided = relative_difference(chunks[1][:, :2], left_over[:, :2]) > 0.5
    assert unguided == (delay is None)
    with pytest.raises(ValueError, match="cannot do real-time chunking"):
        policy.select_action({})


@pytest.mark.slow
def test_commands_and_policies_work_elsewhere(server, checkpoint, tmp_path):
    """The real commands, and LeRobot's own loading, in processes that are offline and have an empty cache."""

    def run(*command: str | Path) -> str:
        code, printed = run_forked(server, ["-m", "smolvla_shared.lerobot_smolvla", *command], tmp_path / "printed.txt")
        assert code == 0, printed
        return printed

    printed = run("import", checkpoint, tmp_path / "imported")
    assert f"left out, no action depends on them: {OUTPUT_LAYER}, {FINAL_NORM}" in printed
    run("export", tmp_path / "imported", tmp_path / "exported")
    files = [tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    save_file(observations(), files[0])
    directories = [tmp_path / "imported", tmp_path / "exported"]
    # Not forked: LeRobot must find our policy where nothing has imported it.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    subprocess.run([sys.executable, "-c", ACT, *map(str, files + directories), *TASKS], check=True, env=environment)
    actions = load_file(files[1])
    assert relative_difference(actions["hlrp_smolvla_shared"], act(checkpoint)) < 1e-5
    assert relative_difference(actions["smolvla"], act(checkpoint)) < 1e-6


@pytest.mark.parametrize("arguments", [[], ["import-smolvla", "a", "b"]])
def test_the_commands_are_named_where_another_is_asked_for(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["lerobot_smolvla.py", *arguments])
    with pytest.raises(ValueError, match="import, export"):
        main()


def test_lerobot_to_ours_and_back_is_equal_to_the_bit(checkpoint, exported):
    before, after = (load_file(directory / "model.safetensors") for directory in (checkpoint, exported))
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {FINAL_NORM, OUTPUT_LAYER}
    assert after[FINAL_NORM].eq(1).all()
    embedding = "model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"
    assert torch.equal(after[OUTPUT_LAYER], after[embedding])

    configs = [json.loads((directory / "config.json").read_text()) for directory in (checkpoint, exported)]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"push_to_hub", "pad_language_to"}
    for file in ("policy_preprocessor_step_5_normalizer", "policy_postprocessor_step_0_unnormalizer"):
        before, after = (load_file(d / f"{file}_processor.safetensors") for d in (checkpoint, exported))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


IN_PROJ = "model.action_head.in_proj.weight"


def save_ours(directory: Path, rename_map: dict[str, str] | None = None, **dims) -> SmolVLASharedCore:
    """A policy of ours as Stage 3 writes it, with a latent head."""
    dims = {"state_dim": STATE, "action_dim": A, "latent_vector_dim": 12, "code_seq_len": 3, "chunk_size": T} | dims
    core = SmolVLASharedCore(make_core_config(ModelConfig(preset="tiny"), (TOP, WRIST), **dims))
    strengthen(core)
    names = {"state": "observation.state", "action": "action"}
    statistics = {name: Statistics(*(STATS[key][s].tolist() for s in ("mean", "std"))) for name, key in names.items()}
    shapes = {TOP: (3, 48, 80), WRIST: (3, 70, 50)}
    tokenizer = load_trunk_tokenizer("tiny", None)
    weights = core.state_dict()
    save_policy(
        directory, core.config, weights, tokenizer, statistics, 2, {}, image_shapes=shapes, rename_map=rename_map
    )
    return core


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_to_lerobot_and_back_is_equal_to_the_bit(tmp_path, dtype):
    save_ours(tmp_path / "ours", rename_map={"observation.images.front": TOP}, torch_dtype=dtype)
    export_smolvla(ExportConfig(str(tmp_path / "ours"), tmp_path / "lerobot"))
    import_smolvla(ImportConfig(str(tmp_path / "lerobot"), tmp_path / "back"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    shared = {key for key in before if not key.startswith("model.latent_head.")}
    assert after.keys() == shared < before.keys()
    # LeRobot's padding carries noise, ours does not: the weights that would read it are 0 there.
    assert after[IN_PROJ][:, :A].abs().sum() > 0 and not after[IN_PROJ][:, A:].any()
    before[IN_PROJ][:, A:] = 0
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in shared)
    cores = [asdict(PreTrainedConfig.from_pretrained(tmp_path / name).core) for name in ("ours", "back")]
    # tiny is a directory for LeRobot
    lost = {"model_name", "latent_vector_dim", "code_seq_len", "noisy_padding"}
    assert {key for key in cores[0] if cores[0][key] != cores[1][key]} == lost
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        assert (tmp_path / "back" / file).read_text() == (tmp_path / "ours" / file).read_text()
    assert "observation.images.front" in (tmp_path / "lerobot" / "policy_preprocessor.json").read_text()

    if dtype == "float32":  # LeRobot builds the trunk in its configuration's dtype
        expected = act(tmp_path / "ours")
        assert relative_difference(act(tmp_path / "back"), expected) < 1e-6
        assert relative_difference(act(tmp_path / "lerobot"), expected) < 1e-5


def test_a_missing_optional_camera_is_lerobots_missing_camera(checkpoint, imported):
    """LeRobot lets any camera be missing, as many as it counts as empty; here the policy names them."""
    batch = observations()
    noise = batch.pop("noise")
    del batch[WRIST]  # the first
    their_config, our_config = (PreTrainedConfig.from_pretrained(directory) for directory in (checkpoint, imported))
    their_config.empty_cameras = 2
    our_config.optional_cameras = (EMPTY, WRIST)
    theirs = SmolVLAPolicy.from_pretrained(checkpoint, config=their_config)
    preprocess, _ = make_pre_post_processors(our_config, pretrained_path=imported)
    batch = preprocess(batch | {"task": TASKS})
    expected = theirs.predict_action_chunk(dict(batch), noise=noise)
    policy = ours.HLRPSmolVLASharedPolicy.from_pretrained(imported, config=our_config)
    assert relative_difference(policy.predict_action_chunk(batch, noise), expected) < 1e-5

    strict = ours.HLRPSmolVLASharedPolicy.from_pretrained(imported)
    with pytest.raises(ValueError, match=rf"\['{WRIST}'\] is missing .*optional_cameras"):
        strict.predict_action_chunk(batch, noise)


# --- statistics -------------------------------------------------------------------------------------------------------


def copy(checkpoint: Path, directory: Path, weights: dict | None = None, config: dict | None = None) -> Path:
    """The checkpoint with other or (None) without some tensors and configuration fields."""
    shutil.copytree(checkpoint, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    tensors = load_file(directory / "model.safetensors") | (weights or {})
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")
    fields = json.loads((directory / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "manifest.json").unlink(missing_ok=True)  # of a policy of ours
    return directory


def without_processors(directory: Path) -> Path:
    for path in directory.glob("policy_*"):
        path.unlink()
    return directory


def rename_statistics(directory: Path, prefix: str) -> None:
    for path in directory.glob("policy_*normalizer_processor.safetensors"):
        save_file({f"{prefix}{key}": tensor for key, tensor in load_file(path).items()}, path)


def buffers(robot: str = "", scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The statistics as checkpoints from before the processors carry them."""
    return {
        f"{place}.{robot}buffer_{feature.replace('.', '_')}.{statistic}": scale * value
        for feature, places in {
            "observation.state": ["normalize_inputs"],
            "action": ["normalize_targets", "unnormalize_outputs"],
        }.items()
        for place in places
        for statistic, value in STATS[feature].items()
    }


def expected_normalization() -> dict[str, Statistics]:
    names = {"state": "observation.state", "action": "action"}
    return {name: Statistics(*(STATS[key][s].tolist() for s in ("mean", "std"))) for name, key in names.items()}


def test_buffers_of_old_checkpoints_are_their_statistics(checkpoint, tmp_path):
    old = without_processors(copy(checkpoint, tmp_path / "old", buffers()))
    found = load_checkpoint(str(old))
    assert found.normalization() == expected_normalization()
    assert not any("normalize" in key for key in (*found.weights, *found.unread))


def test_a_robots_statistics_are_taken_when_it_is_named(checkpoint, tmp_path):
    old = copy(checkpoint, tmp_path / "old", buffers("so100_") | buffers("so100-red_", scale=2))
    old = load_checkpoint(str(without_processors(old)))
    assert old.normalization("so100") == expected_normalization()
    assert old.normalization("so100-red")["action"].std == tuple((2 * STATS["action"]["std"]).tolist())
    rename_statistics(new := copy(checkpoint, tmp_path / "new"), "so100.buffer.")
    new = load_checkpoint(str(new))
    assert new.normalization("so100") == expected_normalization()
    for found, robots in ((old, "so100, so100-red"), (new, "so100")):
        with pytest.raises(ValueError, match=rf"(?s)missing: action.mean.*found:.*of the robots {robots}: .*--robot"):
            found.normalization()
    with pytest.raises(ValueError, match=r"statistics of so101:\n  missing: observation.state.mean"):
        new.normalization("so101")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_processors, r"missing: observation.state.mean\n.*missing: action.std\nfound:\n  none"),
        (lambda d: rename_statistics(d, "arm."), r"missing: action.mean.*found:\n.*: arm.action.mean"),
        (
            lambda d: (
                save_file(
                    {f"{key}.{s}": v for key, value in STATS.items() for s, v in value.items() if key == "action"},
                    d / "policy_preprocessor_step_5_normalizer_processor.safetensors",
                )
                or (d / "policy_postprocessor_step_0_unnormalizer_processor.safetensors").unlink()
                or save_file(
                    {"x": torch.zeros(1)}, d / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
                )
            ),
            r"missing: observation.state.mean\n  missing: observation.state.std\nfound:\n.*action.mean",
        ),
        (
            lambda d: copy_over(d, buffers(scale=2)),
            "different values: .*normalizer_processor.safetensors: action.std.*model.safetensors: unnormalize_outputs",
        ),
        (
            lambda d: copy_over(without_processors(d), buffers(scale=torch.inf)),
            r"not 3 finite numbers: .*action.std: \[inf, inf, inf\]",
        ),
    ],
    ids=["none", "other keys", "no state", "contradicting", "never set"],
)
def test_statistics_that_cannot_be_mapped_are_listed(checkpoint, tmp_path, change, message):
    change(copy(checkpoint, tmp_path / "changed"))
    with pytest.raises(ValueError, match=rf"(?s)cannot map the statistics.*{message}"):
        import_smolvla(ImportConfig(str(tmp_path / "changed"), tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_weights_are_lerobots_by_our_names(checkpoint):
    found, expected = load_checkpoint(str(checkpoint)).weights, by_our_names(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def copy_over(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(directory / "model.safetensors") | tensors, directory / "model.safetensors")


# --- refused ----------------------------------------------------------------------------------------------------------

OUT_PROJ = "model.action_out_proj.weight"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.state_proj.bias": None}, r"missing: model.state_proj.bias \[128\]"),
        ({"model.extra": torch.zeros(1)}, r"unknown: model.extra \[1\]"),
        ({OUT_PROJ: torch.zeros(32, 5)}, rf"wrong shape: {OUT_PROJ} \[32, 5\], expected \[32, 96\]"),
    ],
)
def test_loading_is_strict(checkpoint, tmp_path, weights, message):
    copy(checkpoint, tmp_path / "changed", weights)
    with pytest.raises(ValueError, match=message):
        import_smolvla(ImportConfig(str(tmp_path / "changed"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_of_a_compiled_model_are_understood(checkpoint, tmp_path):
    compiled, key = copy(checkpoint, tmp_path / "compiled"), "model.state_proj.bias"
    tensors = load_file(compiled / "model.safetensors")
    renamed = {key.replace("model.", "model._orig_mod.", 1): tensor for key, tensor in tensors.items()}
    save_file(renamed, compiled / "model.safetensors")
    found = load_checkpoint(str(compiled)).weights
    assert found.keys() == by_our_names(checkpoint).keys()
    assert torch.equal(found["state_proj.bias"], tensors[key])


def test_language_layers_beyond_those_kept_are_left_out(checkpoint, tmp_path):
    layer = "model.vlm_with_expert.vlm.model.text_model.layers.{}.input_layernorm.weight"
    deep = copy(checkpoint, tmp_path / "deep", {layer.format(4): torch.zeros(128), layer.format(31): torch.zeros(128)})
    found = load_checkpoint(str(deep))
    assert found.unread == (OUTPUT_LAYER, layer.format(31), layer.format(4), FINAL_NORM)
    assert found.weights.keys() == by_our_names(checkpoint).keys()


def test_a_checkpoint_with_quantiles_acts_the_same(tiny_vlm, tmp_path, monkeypatch):
    """There, here and back; its action is normalised by mean and deviation."""
    for feature, width in (("observation.state", STATE), ("action", A)):
        quantiles = {"q01": torch.linspace(-1, 0, width), "q99": torch.linspace(0.5, 2, width)}
        monkeypatch.setitem(STATS, feature, STATS[feature] | quantiles)
    mapping = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MEAN_STD"}
    modes = {kind: NormalizationMode(mode) for kind, mode in mapping.items()}
    theirs = write_checkpoint(tmp_path / "theirs", tiny_vlm, normalization_mapping=modes)
    import_smolvla(ImportConfig(str(theirs), tmp_path / "ours"))
    export_smolvla(ExportConfig(str(tmp_path / "ours"), tmp_path / "back"))
    assert relative_difference(act(tmp_path / "ours"), act(theirs)) < 1e-5
    assert relative_difference(act(tmp_path / "back"), act(theirs)) < 1e-6
    assert load_saved(str(tmp_path / "ours")).config.normalization_mapping == modes
    found = load_checkpoint(str(theirs)).normalization()
    assert (type(found["state"]), type(found["action"])) == (Quantiles, Statistics)
    assert found["state"].q99 == tuple(torch.linspace(0.5, 2, STATE).tolist())
    preprocessor = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    for file in (preprocessor, "policy_postprocessor_step_0_unnormalizer_processor.safetensors"):
        kept = {key: value for key, value in load_file(theirs / file).items() if key != "observation.state.q01"}
        save_file(kept, theirs / file)
    with pytest.raises(
        ValueError, match=r"cannot map the statistics of its only robot:\n  missing: observation.state.q01\n"
    ):
        load_checkpoint(str(theirs)).normalization()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_expert_layers": 2}, "num_expert_layers is 2, here there are as many as the trunk's: 4"),
        ({"attention_mode": "self_attn"}, "attention_mode is self_attn, here it is always cross_attn"),
        ({"use_peft": True}, "use_peft is True, here it is always False"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True, here it is always False"),
        ({"resize_imgs_with_padding": [64, 48]}, r"resize_imgs_with_padding is \(64, 48\), .* padded to a square"),
        ({"self_attn_every_n_layers": 0}, "self_attn_every_n_layers is 0, here it is at least 1"),
        (
            {"normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}},
            "normalization_mapping is .*MIN_MAX.*MEAN_STD or QUANTILES",
        ),
        ({"tokenizer_max_length": 48}, "tokenizer_processor: max_length is 20, here it is always 48"),
        ({"vlm_model_name": "nobody/nothing"}, "tokenizer_processor: tokenizer_name is .*tiny_vlm.* nobody/nothing"),
        ({"input_features": {TOP: {"type": "VISUAL", "shape": [3, 8, 8]}}}, "needs cameras, a state and an action"),
    ],
)
def test_what_has_no_counterpart_is_refused(checkpoint, tmp_path, config, message):
    copy(checkpoint, tmp_path / "changed", config=config)
    with pytest.raises(ValueError, match=rf"(?s)changed is a SmolVLA that has no counterpart here:\n.*{message}"):
        load_checkpoint(str(tmp_path / "changed"))


def test_a_configuration_that_lerobot_does_not_read_is_refused(checkpoint, tmp_path):
    copy(checkpoint, tmp_path / "changed", config={"number_of_legs": 4})
    with pytest.raises(ValueError, match=r"installed LeRobot does not read its config.json: .*number_of_legs"):
        load_checkpoint(str(tmp_path / "changed"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"not json", b"\xff", b"{}", b'{"type": 7}', b'{"type": "no policy"}'], ids=str
)
def test_a_config_of_no_smolvla_is_refused(checkpoint, tmp_path, content):
    (copy(checkpoint, tmp_path / "changed") / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'changed'}\W") as error:
        open_initial(ModelConfig(init_from=str(tmp_path / "changed")))
    assert is_mistake(error.value)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'changed'}\W") as error:
        import_smolvla(ImportConfig(str(tmp_path / "changed"), tmp_path / "out"))
    assert is_mistake(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_action_steps": T + 1}, rf"does not read its config.json: .*{T + 1} for `n_action_steps` and {T}"),
        ({"n_action_steps": 0}, r"(?s)config.json .*n_action_steps: expected at least 1 .*got 0"),
        ({"num_steps": None}, r"(?s)config.json .*num_steps: expected a whole number, found null"),
        ({"max_action_dim": None}, r"(?s)config.json .*max_action_dim: expected a whole number, found null"),
        ({"num_vlm_layers": None}, r"(?s)config.json .*num_vlm_layers: expected a whole number, found null"),
        ({"expert_width_multiplier": 1e9}, "its config.json describes a model that cannot be built"),
        ({"normalization_mapping": {"STATE": "no mode"}}, "does not read its config.json"),
        ({"empty_cameras": -1}, r"(?s)config.json .*empty_cameras: expected at least 0, got -1"),
    ],
)
def test_wrong_values_of_a_smolvla_are_refused(checkpoint, tmp_path, config, message):
    copy(checkpoint, tmp_path / "changed", config=config)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(str(tmp_path / "changed"))
    assert is_mistake(error.value)


def test_an_unknown_processor_step_is_refused(checkpoint, tmp_path):
    path = copy(checkpoint, tmp_path / "changed") / "policy_postprocessor.json"
    pipeline = json.loads(path.read_text())
    pipeline["steps"].append({"registry_name": "absolute_actions_processor", "config": {}})
    path.write_text(json.dumps(pipeline))
    with pytest.raises(ValueError, match="processor step absolute_actions_processor: unknown"):
        load_checkpoint(str(path.parent))


def test_what_is_no_smolvla_checkpoint_is_refused(checkpoint, imported, tmp_path):
    with pytest.raises(
        ValueError, match="no SmolVLA checkpoint nobody/nothing: there is no such directory, and the hub"
    ):
        load_checkpoint("nobody/nothing")
    with pytest.raises(ValueError, match="holds a policy of type hlrp_smolvla_shared, expected smolvla"):
        load_checkpoint(str(imported))
    moved = without_processors(copy(checkpoint, tmp_path / "moved", config={"vlm_model_name": "/nowhere"}))
    with pytest.raises(ValueError, match=r"its vlm_model_name in config.json cannot be loaded: .*/nowhere"):
        load_checkpoint(str(moved))


def test_an_existing_directory_is_not_written_to(checkpoint, imported):
    for command, config in (
        (import_smolvla, ImportConfig(str(checkpoint), imported)),
        (export_smolvla, ExportConfig(str(imported), checkpoint)),
    ):
        with pytest.raises(ValueError, match="exists already: name a new directory"):
            command(config)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"state_dim": 0}, "a policy without a state"),
        ({"time_beta_alpha": 2.0}, "time_beta_alpha 2.0, there it is always 1.5"),
        ({"image_special_tokens": (5, 3)}, r"image_special_tokens \(5, 3\), there it is always \(3, 5\)"),
    ],
)
def test_what_lerobot_cannot_express_is_not_exported(tmp_path, dims, message):
    save_ours(tmp_path / "ours", **dims)
    with pytest.raises(ValueError, match=rf"(?s)LeRobot's SmolVLA cannot express:\n.*{message}"):
        export_smolvla(ExportConfig(str(tmp_path / "ours"), tmp_path / "lerobot"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_optional_cameras_are_exported_by_lerobots_names_only(imported, tmp_path):
    config = json.loads((copy_tree(imported, tmp_path / "ours") / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"optional_cameras": [WRIST]}))
    write_manifest(tmp_path / "ours", ["config.json"])
    with pytest.raises(ValueError, match=rf"optional cameras of other names than .*: {WRIST}"):
        export_smolvla(ExportConfig(str(tmp_path / "ours"), tmp_path / "lerobot"))


def test_cameras_are_exported_in_the_models_order(imported, exported, tmp_path):
    """LeRobot's SmolVLA takes the cameras in the order of its features; a policy of ours takes its core's order."""
    path = copy_tree(imported, tmp_path / "ours") / "config.json"
    config = json.loads(path.read_text())
    config["input_features"] = dict(reversed(config["input_features"].items()))
    path.write_text(json.dumps(config))
    write_manifest(path.parent, ["config.json"])
    export_smolvla(ExportConfig(str(path.parent), tmp_path / "lerobot"))
    expected, found = (json.loads((d / "config.json").read_text()) for d in (exported, tmp_path / "lerobot"))
    assert list(found["input_features"].items()) == list(expected["input_features"].items())


def copy_tree(source: Path, directory: Path) -> Path:
    return Path(shutil.copytree(source, directory))


# --- the scripts ------------------------------------------------------------------------------------------------------

PRETRAINED = "pretrained_model"
SIZES = "--steps 1 --save-every 1 --log-every 1 --batch-size 2 --val-fraction 0".split()
SIZES += "--data.num-workers 0".split()


def run_stage(script, run_dir: Path, *options: str | Path) -> None:
    config_class = {train_stage2: train_stage2.Stage2Config, train_stage3: train_stage3.Stage3Config}[script]
    script.main(tyro.cli(config_class, args=[*SIZES, "--run-dir", str(run_dir), *map(str, options)]))


@pytest.mark.slow
def test_both_stages_train_from_a_checkpoint(
    checkpoint, tmp_path, video_dataset, labelled_dataset, laq_checkpoint, capsys
):
    """Stage 2 trains the expert and carries the action head along; Stage 3 takes it from there, or from LeRobot's."""
    start = ["--init-from", checkpoint, "--data.cameras", TOP]
    s2, s3, direct = (tmp_path / name for name in ("s2", "s3", "direct"))
    run_stage(train_stage2, s2, *start, "--data.roots", video_dataset, "--laq-ckpt", laq_checkpoint)
    artifact = load_artifact(s2 / "artifacts" / f"{ARTIFACT_NAME}.safetensors")
    assert artifact.manifest.source.changed_parts == ("expert", "state projection", "latent head")
    for kept in ("trunk.", "action_head."):  # the trunk is frozen because it is a pretrained one
        for key, tensor in by_our_names(checkpoint, kept).items():
            assert torch.equal(artifact.state_dict[key], tensor), key
    for key, tensor in by_our_names(checkpoint, "expert.").items():
        assert 0 <= (artifact.state_dict[key] - tensor).abs().max() < 2e-4, key  # one step of learning rate 1e-4

    labelled = ["--data.roots", labelled_dataset, "--chunk-size", "5", "--n-action-steps", "2"]
    weights = s2 / "artifacts" / f"{ARTIFACT_NAME}.safetensors"
    run_stage(train_stage3, s3, *labelled, "--stage2-artifact", weights)
    run_stage(train_stage3, direct, *labelled, *start)
    printed = capsys.readouterr().out
    left_out = f"left out, nothing reads them: {OUTPUT_LAYER}, {FINAL_NORM}\n"
    described = f"from the SmolVLA policy {checkpoint}; cameras {TOP} as {WRIST}; freshly initialised: "
    assert printed.count(described) == 2
    assert f"{described}latent head; {left_out}" in printed  # Stage 2
    assert f"{described}nothing; {left_out}" in printed  # Stage 3
    assert f"from {weights} (s2 step 1); cameras {TOP}; freshly initialised: nothing\n" in printed
    for run in (s3, direct):
        policy = ours.HLRPSmolVLASharedPolicy.from_pretrained(run / "checkpoints" / "last" / PRETRAINED)
        core = policy.config.core
        assert (core.cameras, core.action_dim, core.chunk_size, core.self_attn_every_n_layers) == ((TOP,), 4, 5, 3)
        for key, tensor in by_our_names(checkpoint, "action_head.").items():
            assert 0 < (policy.model.state_dict()[key] - tensor).abs().max() < 2e-4, key
    assert core.latent_vector_dim == 0
    started_from = {s3: {"stage2_artifact": artifact.manifest.weights.sha256}, direct: {"smolvla": str(checkpoint)}}
    for run, source in started_from.items():
        written = json.loads((run / "checkpoints" / "last" / PRETRAINED / "source.json").read_text())
        assert {key: written[key] for key in ("stage2_artifact", "smolvla") if key in written} == source


def test_training_refuses_what_does_not_fit_the_checkpoint(checkpoint, tmp_path, labelled_dataset):
    labelled = ["--data.roots", labelled_dataset]
    # Only the cameras that observations must have are asked for. The state's width is the data's: no line about it.
    other_vectors = r"\(use --normalization data\):\n  action: dimensions in the data 4, in the artifact 3$"
    for options, message in [
        ([], rf"asked for \['{WRIST}', '{TOP}'\].*found .*{TOP}"),
        (["--data.cameras", TOP, "--normalization", "artifact"], other_vectors),
        (["--model.preset", "smolvlm2-500m"], "model_name: command line HuggingFaceTB/SmolVLM2-500M.*tiny_vlm"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_stage(train_stage3, tmp_path / "run", *labelled, "--init-from", checkpoint, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_can_keep_the_checkpoints_statistics(checkpoint, tmp_path, monkeypatch, labelled_dataset):
    """Of state and action alike: the action head knows actions in no other units."""
    monkeypatch.setitem(STATS, "action", {"mean": torch.linspace(0, 1, 4), "std": torch.linspace(0.1, 3, 4)})
    fit = {"output_features": {"action": {"type": "ACTION", "shape": [4]}}}
    start = without_processors(copy(checkpoint, tmp_path / "four_actions", buffers(), fit))
    options = ["--data.roots", labelled_dataset, "--data.cameras", TOP, "--normalization", "artifact"]
    run_stage(train_stage3, tmp_path / "run", *options, "--init-from", start)
    out = tmp_path / "run" / "checkpoints" / "last" / PRETRAINED
    found = load_file(out / "policy_preprocessor_step_4_normalizer_processor.safetensors")
    for key, stats in STATS.items():
        for statistic, value in stats.items():
            assert torch.equal(found[f"{key}.{statistic}"], value)
