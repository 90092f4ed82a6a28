"""initial.py: a core gets the weights of whatever it starts from, to the bit, and only what may be fresh is fresh."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import tyro
from helpers import equal
from safetensors.torch import load_file, save_file
from test_artifact import CAMERAS, LATENTS, STATISTICS, make_core, save
from test_lerobot_smolvla import (
    FINAL_NORM,
    OUTPUT_LAYER,
    STATE,
    TOP,
    WRIST,
    A,
    buffers,
    by_our_names,
    copy,
    expected_normalization,
    run_stage,
    save_ours,
    without_processors,
    write_checkpoint,
)
from transformers import AutoConfig, SmolVLMForConditionalGeneration

import train_stage2
import train_stage3
from smolvla_shared.artifact import ARTIFACT_NAME, load_artifact
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import DataConfig, ModelConfig, PolicyDataConfig
from smolvla_shared.files import MANIFEST_NAME, write_manifest
from smolvla_shared.initial import InitialWeights, open_initial
from smolvla_shared.labels import OnlineLabels
from smolvla_shared.laq_files import load_laq, teacher_id
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import PARTS, parameter_table, parameters_by_part
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import TextTokenizer
from smolvla_shared.run import inputs
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config, pack_tokenizer

HEAD = {"action_dim": 4, "chunk_size": 8}  # an action head
LATENT_HEAD = {"latent_vector_dim": 32, "code_seq_len": 4}


@pytest.fixture(scope="module")
def core() -> SmolVLASharedCore:
    return make_core()


@pytest.fixture(scope="module")
def artifact(core, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("artifact"), core)


@pytest.fixture(scope="module")
def smolvla(tiny_vlm, tmp_path_factory) -> Path:
    """A policy as LeRobot writes it, with a camera that observations may lack."""
    return write_checkpoint(tmp_path_factory.mktemp("lerobot") / "smolvla", tiny_vlm, empty_cameras=1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A policy of ours, with a latent head."""
    save_ours(directory := tmp_path_factory.mktemp("ours") / "pretrained_model")
    return directory


@pytest.fixture(scope="module")
def smolvlm(tiny_vlm, tmp_path_factory) -> Path:
    """A SmolVLM as its makers save it, with two language layers more than the 16 that a core keeps."""
    directory = Path(shutil.copytree(tiny_vlm, tmp_path_factory.mktemp("trunk") / "smolvlm"))
    config = AutoConfig.from_pretrained(directory)
    config.text_config.num_hidden_layers = 18
    torch.manual_seed(1)
    SmolVLMForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.fixture(params=["artifact", "policy", "smolvla"])
def source(request) -> Path:
    """What --init-from may name."""
    return request.getfixturevalue(request.param)


def open_from(path: Path, **options) -> InitialWeights:
    return open_initial(ModelConfig(init_from=str(path), **options))


def build(initial: InitialWeights, seed: int = 0, **dims: int) -> SmolVLASharedCore:
    """A core with the cameras that it was trained with; the seed is of what is fresh."""
    torch.manual_seed(seed)
    return initial.build(ModelConfig(), initial.core.cameras or CAMERAS, ["latent", "action"], **dims)


def without(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def problems(error: pytest.ExceptionInfo) -> list[str]:
    """The lines of a refusal below its title."""
    return str(error.value).splitlines()[1:]


def make_batch(tokenizer) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    return Batch(
        normal(2, 3, 64, 64).clamp(-1, 1),
        torch.ones(2, 2, dtype=torch.bool),
        *TextTokenizer(tokenizer, 48)(["öffne das Fenster", "slide the plate into the goal"]),
        normal(32),
        torch.ones(2, dtype=torch.bool),
        {"latent": FlowTarget(normal(4, 8), torch.ones(2, 4, dtype=torch.bool), normal(3, 4, 8), normal(3).sigmoid())},
    )


@torch.no_grad()
def outputs(core: SmolVLASharedCore, tokenizer) -> dict[str, torch.Tensor]:
    batch = make_batch(tokenizer)
    return {"error": core(batch)["latent"], "sample": core.sample(batch, "latent", batch.targets["latent"].noise[:, 0])}


# --- a Stage 2 artifact -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cameras", [CAMERAS, ("front", "side")], ids=["its cameras", "renamed"])
def test_a_core_from_an_artifact_gives_the_outputs_of_the_one_that_was_saved(artifact, core, cameras):
    """To the model a camera is its place in the order; its name changes nothing."""
    initial = open_from(artifact)
    torch.manual_seed(1)
    rebuilt = initial.build(ModelConfig(), cameras, ["latent"]).eval()
    assert rebuilt.config == replace(core.config, cameras=cameras)
    assert equal(outputs(rebuilt, initial.tokenizer), outputs(core, load_trunk_tokenizer("tiny", None)))


@pytest.mark.slow
def test_a_core_from_an_artifact_needs_neither_hub_nor_cache(artifact, core, tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from safetensors.torch import save_file
from smolvla_shared.config import ModelConfig
from smolvla_shared.initial import open_initial
from test_initial import outputs
initial = open_initial(ModelConfig(), Path({str(artifact)!r}))
core = initial.build(ModelConfig(), initial.core.cameras, ["latent"]).eval()
save_file(outputs(core, initial.tokenizer), {str(tmp_path / "found.safetensors")!r})
"""
    # Without HF_HUB_OFFLINE only the tests' own guard is left, and it raises at the first address.
    environment = os.environ | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert equal(load_file(tmp_path / "found.safetensors"), outputs(core, load_trunk_tokenizer("tiny", None)))


def test_a_latent_only_artifact_gets_a_fresh_action_head_and_nothing_else(artifact, core):
    initial = open_from(artifact)
    cores = [build(initial, seed, **HEAD) for seed in (1, 2)]
    assert initial.fresh_parts(cores[0]) == ["action head"]
    states = [built.state_dict() for built in cores]
    head = {key for key in states[0] if key.startswith("action_head.")}
    assert len(head) == 8
    for state in states:
        assert equal(without(state, *head), dict(core.state_dict()))
    assert all(not torch.equal(states[0][key], states[1][key]) for key in head)


def test_an_action_head_in_the_artifact_is_taken(tmp_path):
    core = make_core(**HEAD)
    initial = open_from(save(tmp_path, core))
    rebuilt = build(initial, seed=3)
    assert initial.fresh_parts(rebuilt) == []
    assert equal(dict(rebuilt.state_dict()), dict(core.state_dict()))


def test_both_options_read_an_artifact(artifact):
    by_stage2, by_init = open_initial(ModelConfig(), artifact), open_from(artifact)
    assert equal(by_stage2.weights, by_init.weights)
    for name in ("name", "core", "statistics", "latents", "provenance", "may_be_fresh", "no_statistics", "left_out"):
        assert getattr(by_stage2, name) == getattr(by_init, name), name


def test_what_belongs_to_an_artifact_comes_with_it(artifact):
    initial = open_from(artifact)
    assert (initial.statistics, initial.latents) == (STATISTICS, LATENTS)
    manifest = load_artifact(artifact).manifest
    assert initial.provenance["stage2_artifact"] == manifest.weights.sha256
    assert initial.provenance["stage2"] == asdict(manifest.source) | {"latents": asdict(manifest.latents)}
    assert pack_tokenizer(initial.tokenizer) == pack_tokenizer(load_trunk_tokenizer("tiny", None))


# --- a SmolVLA policy of LeRobot's ------------------------------------------------------------------------------------


def test_a_core_to_train_starts_from_a_smolvla_policy(smolvla):
    """Cameras, sizes of the data and the latent head are the run's; everything else is the policy's."""
    initial = open_from(smolvla)
    dims = {"latent_vector_dim": 8, "code_seq_len": 2, "action_dim": 7, "state_dim": 5, "chunk_size": 9}
    core = initial.build(ModelConfig(), ("left",), ["latent"], **dims)
    assert core.config == replace(initial.core, cameras=("left",), **dims)
    assert initial.fresh_parts(core) == ["latent head"]
    assert core.config.num_trunk_layers == 4 and core.config.flow_steps == 5  # its own
    state = core.state_dict()
    latent_head = [key for key in state if key.startswith("latent_head.")]
    assert len(latent_head) == 8
    assert equal(without(state, *latent_head), by_our_names(smolvla))
    again = build(initial, seed=1, **dims).state_dict()
    assert all(not torch.equal(state[key], again[key]) for key in latent_head)


@pytest.mark.parametrize("kind", ["policy", "smolvla"])
def test_a_resumed_run_knows_whether_what_it_started_from_was_edited(kind, request, tmp_path):
    """As LeRobot's commands leave a policy, without hashes of its files: the start's hash is of what was read."""
    directory = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "start"))
    (directory / MANIFEST_NAME).unlink(missing_ok=True)

    def known_as() -> str:
        return inputs([], open_from(directory).provenance).hashes["initial weights"]

    before, weights = known_as(), directory / "model.safetensors"
    (directory / "README.md").write_text("nobody trains on it")
    assert known_as() == before
    (normalizer,) = directory.glob("*_normalizer_processor.safetensors")
    found = []
    for path in (weights, normalizer):
        content, tensors = path.read_bytes(), load_file(path)
        name = min(name for name in tensors if tensors[name].is_floating_point())
        save_file(tensors | {name: tensors[name] * 1.01 + 1e-3}, path)
        found.append(known_as())
        path.write_bytes(content)
    assert known_as() == before and len({before, *found}) == 3


def test_what_belongs_to_a_smolvla_policy_comes_with_it(smolvla):
    initial = open_from(smolvla)
    assert initial.statistics == expected_normalization()
    assert initial.left_out == (OUTPUT_LAYER, FINAL_NORM)
    assert initial.provenance == {"smolvla": str(smolvla), "sha256": initial.sha256}
    assert initial.latents is None
    assert pack_tokenizer(initial.tokenizer) == pack_tokenizer(load_trunk_tokenizer("tiny", None))


def test_a_bfloat16_trunk_trains_in_float32(smolvla, tmp_path):
    prefix = "model.vlm_with_expert.vlm.model."
    tensors = load_file(smolvla / "model.safetensors")
    trunk = {key: tensor.bfloat16() for key, tensor in tensors.items() if key.startswith(prefix)}
    initial = open_from(copy(smolvla, tmp_path / "low", trunk))
    assert initial.core.torch_dtype == "bfloat16"
    core = build(initial)
    assert core.config.torch_dtype == "float32"
    assert {parameter.dtype for parameter in core.parameters()} == {torch.float32}
    key = "text_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(core.state_dict()[f"trunk.vlm.{key}"], trunk[prefix + key].float())


@pytest.mark.parametrize(("frozen", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_only_a_frozen_trunk_is_stored_in_bfloat16(smolvla, frozen, dtype):
    initial = open_from(smolvla)
    model = ModelConfig(freeze_trunk=frozen, freeze_vision=True)
    core = initial.build(model, initial.core.cameras, ["action"], "bf16")
    types = {part: {p.dtype for p in parameters.values()} for part, parameters in parameters_by_part(core).items()}
    in_trunk = {"vision tower", "connector", "language layers"}
    assert types == {part: {dtype if part in in_trunk else torch.float32} for part in types}
    assert core.config.torch_dtype == str(dtype).removeprefix("torch.")
    trained = [p for p in core.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}


# --- a policy of ours -------------------------------------------------------------------------------------------------


def test_a_core_starts_from_a_policy_of_ours(policy):
    """Sizes of the data are the run's; heads, the latent head too, are the policy's, whether they train or not."""
    initial = open_from(policy)
    expected = {key.removeprefix("model."): t for key, t in load_file(policy / "model.safetensors").items()}
    assert equal(dict(initial.weights), expected)
    dims = {"action_dim": 7, "state_dim": 5, "chunk_size": 9}
    core = initial.build(ModelConfig(), ("front", "side"), ["action"], **dims)
    assert core.config == replace(initial.core, cameras=("front", "side"), **dims)
    assert core.config.latent_vector_dim == 12
    assert equal(dict(core.state_dict()), expected)
    assert initial.fresh_parts(core) == []
    named = dict(core.named_parameters())
    assert not any(named[key].requires_grad for key in named if key.startswith("latent_head."))
    assert all(named[key].requires_grad for key in named if key.startswith("action_head."))


def test_a_policy_without_a_latent_head_gets_a_fresh_one(tmp_path):
    saved = save_ours(tmp_path / "ours", latent_vector_dim=0, code_seq_len=0)
    initial = open_from(tmp_path / "ours")
    cores = [build(initial, seed, **LATENT_HEAD) for seed in (1, 2)]
    assert initial.fresh_parts(cores[0]) == ["latent head"]
    states = [core.state_dict() for core in cores]
    latent_head = [key for key in states[0] if key.startswith("latent_head.")]
    assert len(latent_head) == 8
    assert all(not torch.equal(states[0][key], states[1][key]) for key in latent_head)
    assert equal(without(states[0], *latent_head), dict(saved.state_dict()))


def test_what_belongs_to_a_policy_of_ours_comes_with_it(policy):
    initial = open_from(policy)
    assert initial.statistics == expected_normalization()
    source = json.loads((policy / "source.json").read_text())
    assert initial.provenance == {"policy": str(policy), "started_from": source, "sha256": initial.sha256}
    assert initial.latents is None  # the policy's files do not say which
    assert pack_tokenizer(initial.tokenizer) == pack_tokenizer(load_trunk_tokenizer("tiny", None))


# --- the trunk's own weights ------------------------------------------------------------------------------------------


def test_a_pretrained_trunk_is_frozen_under_a_fresh_expert_and_fresh_heads(smolvlm):
    initial = open_initial(ModelConfig(name=str(smolvlm)))
    found = load_file(smolvlm / "model.safetensors")
    unread = re.compile(r"lm_head\.|model\.text_model\.(norm|layers\.1[67])\.")
    trunk = {f"trunk.vlm.{key.removeprefix('model.')}": t for key, t in found.items() if not unread.match(key)}
    cores = [build(initial, seed, state_dim=4, **HEAD, **LATENT_HEAD) for seed in (1, 2)]
    assert initial.fresh_parts(cores[0]) == ["expert", "state projection", "latent head", "action head"]
    assert cores[0].config.num_trunk_layers == 16
    states = [core.state_dict() for core in cores]
    for state in states:
        assert equal({key: tensor for key, tensor in state.items() if key.startswith("trunk.")}, trunk)
    fresh = [key for key in states[0] if key not in trunk and states[0][key].ndim > 1]  # norms begin as ones
    assert {key.split(".")[0] for key in fresh} == {"expert", "state_proj", "latent_head", "action_head"}
    assert all(not torch.equal(states[0][key], states[1][key]) for key in fresh)
    trained = {name.split(".")[0] for name, parameter in cores[0].named_parameters() if parameter.requires_grad}
    assert trained == {"expert", "state_proj", "latent_head", "action_head"}


def test_the_tiny_trunk_has_no_weights_so_all_is_fresh():
    model = ModelConfig(preset="tiny")
    initial = open_initial(model)
    assert initial.weights == {}
    states = [dict(build(initial, seed, state_dim=4, **HEAD).state_dict()) for seed in (0, 0, 1)]
    torch.manual_seed(0)
    plain = SmolVLASharedCore(make_core_config(model, CAMERAS, state_dim=4, **HEAD))
    assert equal(states[0], dict(plain.state_dict())) and equal(states[1], states[0])
    matrices = [key for key, tensor in states[0].items() if tensor.ndim > 1]
    assert all(not torch.equal(states[0][key], states[2][key]) for key in matrices)
    assert initial.fresh_parts(plain) == [part for part in PARTS if part != "latent head"]


def test_a_trunk_brings_nothing_but_itself(smolvlm):
    initial = open_initial(ModelConfig(name=str(smolvlm)))
    options = DataConfig(repo_ids=("a",))
    assert initial.data_options(options, with_latents=True) == options
    assert (initial.statistics, initial.latents, initial.provenance) == ({}, None, {})
    assert initial.core.model_name == str(smolvlm)


# --- the data's options -----------------------------------------------------------------------------------------------


def test_the_artifact_names_cameras_and_label_camera_where_the_user_does_not(tmp_path, core):
    initial = open_from(save(tmp_path, core, replace(LATENTS, label_cameras=CAMERAS[1:2])))
    options = PolicyDataConfig(repo_ids=("a",), random_shift=0.1)
    with_latents = initial.data_options(options, with_latents=True)
    assert with_latents == replace(options, cameras=CAMERAS, label_cameras=CAMERAS[1:2], frame_gap_s=0.5)
    # Without co-training no pairs are read, so a dataset need not have the label camera.
    assert initial.data_options(options, with_latents=False) == replace(options, cameras=CAMERAS)
    stated = replace(options, cameras=("front",), label_cameras=("front",), frame_gap_s=0.25)
    assert initial.data_options(stated, with_latents=True) == stated


def test_cameras_that_observations_may_lack_are_not_asked_for(smolvla, tmp_path):
    """Of SmolVLA's three cameras, LeRobot numbers one as empty; a policy of ours names those that may be missing."""
    assert open_from(smolvla).data_options(DataConfig(repo_ids=("a",)), True).cameras == (WRIST, TOP)
    save_ours(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optional_cameras": [TOP]}))
    write_manifest(path.parent, ["config.json"])
    assert open_from(tmp_path / "ours").data_options(DataConfig(repo_ids=("a",)), True).cameras == (WRIST,)


def test_cameras_that_the_user_names_take_the_places_in_turn(source):
    stated = DataConfig(repo_ids=("a",), cameras=("left", "right", "back"))
    assert open_from(source).data_options(stated, with_latents=False) == stated


def test_the_option_is_called_init_from():
    assert tyro.cli(ModelConfig, args=["--init-from", "lerobot/smolvla_base"]).init_from == "lerobot/smolvla_base"


# --- refused: weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [part for part in PARTS if part != "action head"])
def test_no_other_part_of_an_artifact_may_be_missing(artifact, part):
    """Neither one of its weights nor all of them."""
    initial = open_from(artifact)
    names = [key for key in initial.weights if key.startswith(PARTS[part])]
    for missing in (names[:1], names):
        incomplete = replace(initial, weights=without(initial.weights, *missing))
        with pytest.raises(ValueError, match="does not hold the model that it describes") as error:
            build(incomplete, **HEAD)
        shapes = {name: list(initial.weights[name].shape) for name in missing}
        assert problems(error) == sorted(f"  missing: {name} {shape}" for name, shape in shapes.items())


@pytest.mark.parametrize("part", ["vision tower", "connector", "language layers"])
def test_no_part_of_a_pretrained_trunk_may_be_missing(smolvlm, part):
    initial = open_initial(ModelConfig(name=str(smolvlm)))
    names = [key for key in initial.weights if key.startswith(PARTS[part])]
    for missing in (names[:1], names):
        with pytest.raises(ValueError, match=r"the trunk's own weights .* does not hold the model") as error:
            build(replace(initial, weights=without(initial.weights, *missing)), **HEAD)
        assert [line.split()[:2] for line in problems(error)] == [["missing:", name] for name in sorted(missing)]


def test_half_an_action_head_and_other_sizes_are_refused(tmp_path):
    initial = open_from(save(tmp_path, make_core(**HEAD)))
    key = "action_head.out_proj.bias"
    with pytest.raises(ValueError, match=f"missing: {key}") as error:
        build(replace(initial, weights=without(initial.weights, key)))
    assert len(problems(error)) == 1
    with pytest.raises(ValueError, match=r"unknown: action_head\.") as error:
        build(initial, action_dim=0)
    assert len(problems(error)) == 8
    with pytest.raises(ValueError, match=r"wrong shape: state_proj.weight \[\d+, 32\], expected \[\d+, 40\]"):
        build(initial, max_state_dim=40)


def test_a_latent_head_of_another_size_is_refused(policy):
    """A policy does not say whose latents its head has learned; at least their shape must fit."""
    with pytest.raises(ValueError, match=r"wrong shape: latent_head.in_proj.weight \[\d+, 4\], expected \[\d+, 8\]"):
        build(open_from(policy), **LATENT_HEAD)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.state_proj.bias": None}, r"missing: model.state_proj.bias \[128\]"),
        ({"model.extra": torch.zeros(1)}, r"unknown: model.extra \[1\]"),
        ({"model.state_proj.bias": torch.zeros(5)}, r"wrong shape: model.state_proj.bias \[5\], expected \[128\]"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
@pytest.mark.parametrize("name", ["policy", "smolvla"])
def test_the_weights_of_a_policy_must_be_its_models(request, tmp_path, name, weights, message):
    """Both kinds of policies call this layer by the same name."""
    changed = copy(request.getfixturevalue(name), tmp_path / "changed", weights)
    with pytest.raises(ValueError, match=message) as error:
        open_from(changed)
    assert len(problems(error)) == 1 and "changed" in str(error.value)


# --- refused: names and options ---------------------------------------------------------------------------------------


def test_all_contradictions_are_listed_at_once(source):
    recorded = open_from(source).core.model_name
    with pytest.raises(ValueError, match=f"the command line contradicts .*{source}") as error:
        open_from(source, name="my/trunk", revision="v2")
    model_name = f"  model_name: command line my/trunk, artifact {recorded}"
    assert problems(error) == [model_name, "  model_revision: command line v2, artifact None"]
    with pytest.raises(ValueError) as error:
        open_from(source, name=recorded, revision="v2")
    assert problems(error) == ["  model_revision: command line v2, artifact None"]
    with pytest.raises(ValueError) as error:
        open_from(source, preset="smolvlm2-500m")
    preset = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    assert problems(error) == [f"  model_name: command line {preset}, artifact {recorded}"]
    assert open_from(source, name=recorded).core.model_name == recorded


def test_a_stage2_artifact_is_not_contradicted_either(artifact):
    with pytest.raises(ValueError, match=r"contradicts .*\n  model_name: command line my/trunk, artifact nobody"):
        open_initial(ModelConfig(name="my/trunk"), artifact)


def test_a_preset_that_the_policy_was_trained_with_may_be_named(policy):
    assert open_from(policy, preset="tiny").core.model_name == "tiny"


def test_what_is_nothing_to_start_from_is_refused(smolvla, tmp_path):
    with pytest.raises(ValueError, match="no policy nobody/nothing: there is no such directory, and the hub"):
        open_from(Path("nobody/nothing"))
    with pytest.raises(ValueError, match=r"no policy in .*: config.json is missing, found \[\]"):
        open_from(tmp_path)
    with pytest.raises(ValueError, match=r"there is no missing.safetensors of its three files"):
        open_from(tmp_path / "missing.safetensors")
    act = copy(smolvla, tmp_path / "act")
    (act / "config.json").write_text(json.dumps({"type": "act"}))
    with pytest.raises(ValueError, match="act holds a policy of type act, expected smolvla"):
        open_from(act)
    for damaged in ("", "[]"):
        (act / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=f"{act / 'config.json'} .*JSON"):
            open_from(act)


def test_a_trunk_that_is_none_is_refused(smolvlm, tmp_path):
    with pytest.raises(ValueError, match=r"--model.name nobody/nothing: neither a local directory"):
        open_initial(ModelConfig(name="nobody/nothing"))
    weights = load_file(smolvlm / "model.safetensors")
    missing = "text_model.layers.2.self_attn.k_proj.weight"
    trunk = Path(shutil.copytree(smolvlm, tmp_path / "incomplete"))
    save_file(without(weights, f"model.{missing}"), trunk / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--model.name {trunk}: the weights lack {re.escape(missing)}$"):
        open_initial(ModelConfig(name=str(trunk)))


# --- latent actions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def labels(laq_checkpoint) -> OnlineLabels:
    return OnlineLabels(load_laq(laq_checkpoint), "quantized", CAMERAS[:1])


def options(frame_gap_s: float, cameras: tuple[str, ...] = CAMERAS) -> DataConfig:
    return DataConfig(repo_ids=("a",), cameras=cameras, frame_gap_s=frame_gap_s)


def test_co_training_on_other_latent_actions_is_refused(artifact, labels):
    initial = open_from(artifact)
    labels.kind, labels.horizon = "continuous", 2
    with pytest.raises(ValueError, match=f"{artifact} .*has learned other latent actions:\n") as error:
        initial.latent_dims(labels, options(0.25), CAMERAS[1:2])
    rows = [
        f"  teacher (--laq-ckpt): command line {labels.teacher_id}, artifact {'0' * 64}",
        "  --teacher-kind: command line continuous, artifact quantized",
        "  --data.frame-gap-s: command line 0.25, artifact 0.5",
        f"  --data.label-cameras: command line {CAMERAS[1]}, artifact {CAMERAS[0]}",
        "  --latent-horizon: command line 2, artifact 1",
    ]
    assert problems(error) == rows
    labels.kind, labels.horizon = "quantized", 1
    with pytest.raises(ValueError) as error:  # what agrees is not listed
        initial.latent_dims(labels, options(0.5), CAMERAS[:1])
    assert problems(error) == rows[:1]


def test_co_training_on_the_artifacts_latent_actions_fits_its_head(labels, core, tmp_path):
    initial = open_from(save(tmp_path, core, replace(LATENTS, teacher_id=labels.teacher_id)))
    dims = initial.latent_dims(labels, options(0.5), CAMERAS[:1])
    assert dims == {"latent_vector_dim": 32, "code_seq_len": 4, "codebook_size": 0}  # 4 codes of 8 dimensions
    assert torch.equal(build(initial, **dims).latent_head.out_proj.weight, core.latent_head.out_proj.weight)


def test_the_latent_head_is_the_artifacts_unless_another_is_stated(labels, core, tmp_path):
    initial = open_from(save(tmp_path, core, replace(LATENTS, teacher_id=labels.teacher_id)))
    with pytest.raises(ValueError) as error:
        initial.latent_dims(labels, options(0.5), CAMERAS[:1], "codes")
    assert problems(error) == ["  --latent-head: command line codes, artifact flow"]


def test_a_head_that_classifies_needs_codes(labels):
    initial = open_initial(ModelConfig(preset="tiny"))
    dims = initial.latent_dims(labels, options(0.5), CAMERAS[:1], "codes")
    assert dims["codebook_size"] == len(labels.codebook)
    labels.kind = "continuous"
    with pytest.raises(ValueError, match="classifies codes, --teacher-kind continuous has none"):
        initial.latent_dims(labels, options(0.5), CAMERAS[:1], "codes")


def test_the_label_camera_is_renamed_with_the_others(labels, core, tmp_path):
    """A camera is its place: the artifact's latents of its second camera are those of the data's second."""
    latents = replace(LATENTS, teacher_id=labels.teacher_id, label_cameras=CAMERAS[1:2])
    initial = open_from(save(tmp_path, core, latents))
    renamed = initial.data_options(options(0.5, ("front", "hand")), with_latents=True)
    assert renamed.label_cameras == ("hand",)
    assert initial.latent_dims(labels, renamed, ("hand",))
    with pytest.raises(ValueError, match=r"--data\.label-cameras: command line front, artifact hand"):
        initial.latent_dims(labels, renamed, ("front",))


@pytest.mark.parametrize("name", ["policy", "smolvla", "smolvlm"])
def test_what_does_not_say_whose_latents_it_has_learned_takes_any(request, name, labels):
    path = request.getfixturevalue(name)
    initial = open_initial(ModelConfig(name=str(path))) if name == "smolvlm" else open_from(path)
    assert initial.latent_dims(labels, 0.3, "any") == LATENT_HEAD | {"codebook_size": 0}


# --- statistics -------------------------------------------------------------------------------------------------------


def dims_of(state: int, action: int) -> dict[str, int]:
    return {"state_dim": state, "action_dim": action, "chunk_size": 9}


def test_an_artifact_has_statistics_of_the_state_only(artifact):
    assert open_from(artifact).recorded_statistics(dims_of(4, 7)) == {"state": STATISTICS["state"]}


@pytest.mark.parametrize("name", ["policy", "smolvla"])
def test_a_policy_has_statistics_of_state_and_action(request, name):
    initial = open_from(request.getfixturevalue(name))
    assert initial.recorded_statistics(dims_of(STATE, A)) == expected_normalization()


@pytest.mark.parametrize(
    ("name", "dims", "rows"),
    [
        ("artifact", dims_of(5, 7), ["state: dimensions in the data 5, in the artifact 4"]),
        ("artifact", dims_of(0, 7), ["state: dimensions in the data 0, in the artifact 4"]),
        ("policy", dims_of(STATE, 7), ["action: dimensions in the data 7, in the artifact 3"]),
        ("policy", dims_of(0, A), ["state: dimensions in the data 0, in the artifact 4"]),
        ("smolvla", dims_of(STATE, 7), ["action: dimensions in the data 7, in the artifact 3"]),
        ("smolvla", dims_of(2, A), ["state: dimensions in the data 2, in the artifact 4"]),
        (
            "smolvla",
            dims_of(2, 7),
            [
                "state: dimensions in the data 2, in the artifact 4",
                "action: dimensions in the data 7, in the artifact 3",
            ],
        ),
    ],
)
def test_statistics_of_other_widths_are_refused_and_only_those_are_listed(request, name, dims, rows):
    initial = open_from(request.getfixturevalue(name))
    with pytest.raises(ValueError, match=r"--normalization artifact: .* \(use --normalization data\):\n") as error:
        initial.recorded_statistics(dims)
    assert problems(error) == [f"  {row}" for row in rows]


def test_a_policy_without_a_state_has_none_to_give(tmp_path):
    save_ours(tmp_path / "ours", state_dim=0)
    initial = open_from(tmp_path / "ours")
    assert initial.recorded_statistics(dims_of(0, A)) == {"action": expected_normalization()["action"]}
    with pytest.raises(ValueError) as error:
        initial.recorded_statistics(dims_of(4, A))
    assert problems(error) == ["  state: dimensions in the data 4, in the artifact none"]


def test_an_artifact_without_statistics_is_not_passed_over_in_silence(artifact):
    """Whoever asks for the artifact's statistics and gets none of them should hear of it."""
    initial = replace(open_from(artifact), statistics={"latent": STATISTICS["latent"]})
    for state in (4, 0):
        with pytest.raises(ValueError) as error:
            initial.recorded_statistics(dims_of(state, 7))
        assert problems(error) == [f"  state: dimensions in the data {state}, in the artifact none"]


def test_a_smolvla_whose_statistics_cannot_be_mapped_trains_with_the_datas(smolvla, tmp_path):
    robots = without_processors(copy(smolvla, tmp_path / "robots", buffers("so100_") | buffers("so101_", scale=2)))
    initial = open_from(robots)
    assert equal(dict(build(initial).state_dict()), by_our_names(smolvla))
    missing = r"(?s)--normalization artifact: .*missing: observation.state.mean.*of the robots so100, so101: .*--robot"
    with pytest.raises(ValueError, match=missing):
        initial.recorded_statistics(dims_of(STATE, A))


def test_a_trunk_has_no_statistics():
    initial = open_initial(ModelConfig(preset="tiny"))
    with pytest.raises(ValueError, match=r"--normalization artifact: .* a trunk, which has no statistics: use --norm"):
        initial.recorded_statistics(dims_of(4, 4))


# --- the description --------------------------------------------------------------------------------------------------


def described(initial: InitialWeights, cameras: tuple[str, ...], **dims: int) -> str:
    """The first line."""
    return initial.describe(initial.build(ModelConfig(), cameras, ["action"], **dims)).splitlines()[0]


def test_cameras_of_an_artifact_may_be_renamed_and_the_description_says_so(tmp_path):
    path = save(tmp_path, make_core(cameras=("image_0", "image_1")))
    initial = open_from(path)
    stated = tyro.cli(DataConfig, args=["--repo-ids", "a", "--cameras", "front"])
    cameras = initial.data_options(stated, with_latents=False).cameras
    core = initial.build(ModelConfig(), cameras, ["action"], **HEAD)
    assert core.config.cameras == ("front",)
    expected = f"from {path} (s2 step 500); cameras front as image_0; freshly initialised: action head"
    assert initial.describe(core).splitlines()[0] == expected
    for cameras, places in {
        ("front", "image_1"): "front as image_0, image_1",
        ("image_1", "image_0"): "image_1 as image_0, image_0 as image_1",
        ("image_0", "image_1", "top"): "image_0, image_1, top as one more",
    }.items():
        assert f"; cameras {places}; freshly" in described(initial, cameras, **HEAD)


def test_the_description_says_what_a_smolvla_policy_leaves_out(smolvla):
    line = described(open_from(smolvla), ("left", "right", "back"), **LATENT_HEAD)
    assert line == (
        f"from the SmolVLA policy {smolvla}; cameras left as {WRIST}, right as {TOP}, back as one more; freshly "
        f"initialised: latent head; left out, nothing reads them: {OUTPUT_LAYER}, {FINAL_NORM}"
    )


def test_the_description_of_a_policy_and_of_a_trunk(policy, smolvlm):
    line = described(open_from(policy), (TOP, "side"))
    assert line == f"from the policy {policy}; cameras {TOP}, side as {WRIST}; freshly initialised: nothing"
    trunk = open_initial(ModelConfig(name=str(smolvlm)))
    assert described(trunk, ("front", "side"), **HEAD) == (
        f"from the trunk's own weights ({smolvlm}); cameras front, side; freshly initialised: expert, state "
        "projection, action head"
    )


def test_the_description_counts_parameters_and_compares_the_state(artifact):
    initial = open_from(artifact)
    core = build(initial, **HEAD)
    line = f"from {artifact} (s2 step 500); cameras {', '.join(CAMERAS)}; freshly initialised: action head"
    assert initial.describe(core) == f"{line}\n{parameter_table(core)}"
    # The second and the last dimension differ: by 2 at a standard deviation of 2, by 0.75 at one of 0.5.
    data = Statistics((0.1, 2.2, 1 / 3, 1.15), (1.0,) * 4)
    last = "state statistics: the data's mean is up to 1.50 standard deviations from the artifact's"
    last += "\nnormalised: state by mean_std"
    assert initial.describe(core, {"state": data}) == f"{line}\n{parameter_table(core)}\n{last}"
    trunk = open_initial(ModelConfig(preset="tiny"))  # there is nothing to compare with
    assert "state statistics" not in trunk.describe(build(trunk, **HEAD), {"state": data})


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_start_from_a_policy_of_ours(tmp_path, video_dataset, labelled_dataset, laq_checkpoint, capsys):
    """Stage 3 goes on with its weights and its statistics; Stage 2 carries its action head along."""
    labelled = ["--data.roots", labelled_dataset, "--chunk-size", "5", "--n-action-steps", "2"]
    run_stage(train_stage3, tmp_path / "first", *labelled, "--model.preset", "tiny")
    policy = tmp_path / "first" / "checkpoints" / "last" / "pretrained_model"
    normalizers = [path.name for path in policy.glob("policy_*normalizer_processor.safetensors")]
    assert len(normalizers) == 2
    for name in normalizers:  # other statistics than those of the same data
        save_file({key: tensor * 2 for key, tensor in load_file(policy / name).items()}, policy / name)
    (policy / MANIFEST_NAME).unlink()  # it says that they were edited

    run_stage(train_stage3, tmp_path / "s3", *labelled, "--init-from", policy, "--normalization", "artifact")
    run_stage(
        train_stage2,
        tmp_path / "s2",
        "--data.roots",
        video_dataset,
        "--init-from",
        policy,
        "--laq-ckpt",
        laq_checkpoint,
    )
    printed = capsys.readouterr().out
    assert f"from the policy {policy}; cameras {TOP}; freshly initialised: nothing\n" in printed
    assert f"from the policy {policy}; cameras {TOP}; freshly initialised: latent head\n" in printed

    before = load_file(policy / "model.safetensors")
    after = tmp_path / "s3" / "checkpoints" / "last" / "pretrained_model"
    trained = load_file(after / "model.safetensors")
    assert trained.keys() == before.keys()
    moved = {key: (trained[key] - before[key]).abs().max().item() for key in before}
    assert max(moved.values()) < 2e-4  # one step of learning rate 1e-4
    assert min(moved[key] for key in before if key.startswith("model.action_head.")) > 0
    for name in normalizers:
        assert equal(load_file(after / name), load_file(policy / name))
    assert json.loads((after / "source.json").read_text())["policy"] == str(policy)

    stage2 = load_artifact(tmp_path / "s2" / "artifacts" / f"{ARTIFACT_NAME}.safetensors").state_dict
    head = {key: tensor for key, tensor in stage2.items() if key.startswith("action_head.")}
    assert equal(head, {key.removeprefix("model."): before[key] for key in before if "action_head." in key})


@pytest.mark.slow
def test_stage2_goes_on_with_the_latent_statistics_of_an_artifact(tmp_path, video_dataset, laq_checkpoint):
    """Its latent head has learned latents that are normalised so. The state is measured again."""
    latents = replace(LATENTS, teacher_id=teacher_id(load_laq(laq_checkpoint)), label_cameras=(TOP,))
    path = save(tmp_path / "artifact", make_core(cameras=(TOP,)), latents)
    run_stage(
        train_stage2, tmp_path / "s2", "--data.roots", video_dataset, "--init-from", path, "--laq-ckpt", laq_checkpoint
    )
    found = load_artifact(tmp_path / "s2" / "artifacts" / f"{ARTIFACT_NAME}.safetensors").manifest.normalization
    assert found["latent"] == STATISTICS["latent"]
    assert found["state"] != STATISTICS["state"]


@pytest.mark.slow
def test_stage3_starts_from_an_artifact_with_other_camera_names(tmp_path, labelled_dataset, capsys):
    path = save(tmp_path / "artifact", make_core(cameras=("image_0",)))
    options = ["--data.roots", labelled_dataset, "--data.cameras", TOP, "--stage2-artifact", path]
    run_stage(train_stage3, tmp_path / "run", *options)
    assert f"from {path} (s2 step 500); cameras {TOP} as image_0; freshly" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "pretrained_model" / "config.json").read_text())
    assert config["core"]["cameras"] == [TOP]
