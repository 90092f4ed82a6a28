"""artifact.py: what comes out of an artifact is what went in, to the bit, and anything else is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smolvla_shared.artifact import (
    Artifact,
    Latents,
    Origin,
    build_core,
    check_agreement,
    check_teacher,
    fingerprints,
    load_artifact,
    save_artifact,
)
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import DataConfig, ModelConfig
from smolvla_shared.files import json_sha256
from smolvla_shared.model import PARTS, SmolVLASharedCore, make_core_config
from smolvla_shared.preprocess import Statistics, TextTokenizer
from smolvla_shared.trunk import load_trunk_tokenizer

CAMERAS = ("observation.images.top", "observation.images.wrist")
STATISTICS = {
    "state": Statistics((0.1, 0.2, 1 / 3, 0.4), (1.0, 2.0, 3.0, 0.5)),
    "latent": Statistics(tuple(i / 7 for i in range(32)), (1.0,) * 32),
}
LATENTS = Latents("0" * 64, "quantized", 0.5, CAMERAS[0], 2 / 3)
ORIGIN = Origin("s2", 500, ("my/videos", "other"), ("expert", "latent head"), "last step", {"torch": "2", "numpy": "1"})


def make_core(**dims) -> SmolVLASharedCore:
    config = make_core_config(
        ModelConfig(preset="tiny"), CAMERAS, state_dim=4, latent_vector_dim=32, code_seq_len=4, **dims
    )
    torch.manual_seed(0)
    # The name leads nowhere, as on a machine that does not have what the trunk was made from.
    return SmolVLASharedCore(replace(config, model_name="nobody/nothing")).eval()


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


def save(directory: Path, core: SmolVLASharedCore) -> Path:
    return save_artifact(
        directory, core.config, core.state_dict(), load_trunk_tokenizer("tiny", None), STATISTICS, LATENTS, ORIGIN
    )


@pytest.fixture(scope="module")
def core() -> SmolVLASharedCore:
    return make_core()


@pytest.fixture(scope="module")
def original(core, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("artifacts"), core)


@pytest.fixture(scope="module")
def artifact(original) -> Artifact:
    return load_artifact(original)


@pytest.fixture
def copied(original, tmp_path) -> Path:
    """An artifact that a test may tamper with."""
    for path in original.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / original.name


# --- round trip -------------------------------------------------------------------------------------------------------


def test_three_files_lie_side_by_side(original):
    name = "smolvla_shared_stage2_artifact"
    assert sorted(path.name for path in original.parent.iterdir()) == [
        f"{name}.json",
        f"{name}.safetensors",
        f"{name}.tokenizer.json",
    ]


def test_the_manifest_comes_back_as_it_was_written(artifact, core):
    manifest = artifact.manifest
    assert asdict(manifest.core) == asdict(core.config)
    assert (manifest.normalization, manifest.latents, manifest.source) == (STATISTICS, LATENTS, ORIGIN)
    assert (manifest.source.backend, manifest.source.training_mode) == ("smolvla_shared", "latent_flow")
    assert manifest.schema_version == "smolvla_shared.v1"
    assert manifest.weights.num_parameters == sum(tensor.numel() for tensor in core.state_dict().values())
    assert manifest.weights.num_tensors == len(core.state_dict())


def test_a_rebuilt_core_gives_equal_outputs(artifact, core):
    torch.manual_seed(1)
    rebuilt, _ = build_core(artifact)
    found = outputs(rebuilt.eval(), artifact.tokenizer)
    for name, expected in outputs(core, load_trunk_tokenizer("tiny", None)).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.slow
def test_a_rebuild_needs_neither_hub_nor_cache(original, core, tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from safetensors.torch import save_file
from smolvla_shared.artifact import build_core, load_artifact
from test_artifact import outputs
artifact = load_artifact(Path({str(original)!r}))
save_file(outputs(build_core(artifact)[0].eval(), artifact.tokenizer), {str(tmp_path / "found.safetensors")!r})
"""
    # Without HF_HUB_OFFLINE only the tests' own guard is left, and it raises at the first address.
    environment = os.environ | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    for name, expected in outputs(core, load_trunk_tokenizer("tiny", None)).items():
        assert torch.equal(found[name], expected), name


def test_a_latent_only_artifact_gets_a_fresh_action_head_and_nothing_else(artifact):
    cores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        core, is_fresh = build_core(artifact, action_dim=4, chunk_size=8)
        assert is_fresh
        cores.append(core.state_dict())
    head = {key for key in cores[0] if key.startswith("action_head.")}
    assert len(head) == 8
    assert cores[0].keys() - head == artifact.state_dict.keys()
    for key in artifact.state_dict:
        assert torch.equal(cores[0][key], artifact.state_dict[key]), key
    assert all(not torch.equal(cores[0][key], cores[1][key]) for key in head)


def test_an_action_head_in_the_artifact_is_taken(tmp_path):
    core = make_core(action_dim=4, chunk_size=8)
    torch.manual_seed(3)
    rebuilt, is_fresh = build_core(load_artifact(save(tmp_path, core)))
    assert not is_fresh
    for key, value in core.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[key], value), key


def test_private_buffers_are_dropped(tmp_path, artifact):
    core = make_core()
    core.expert.register_buffer("_cache", torch.ones(1000))
    loaded = load_artifact(save(tmp_path, core))
    assert loaded.state_dict.keys() == artifact.state_dict.keys()
    assert loaded.manifest.weights == artifact.manifest.weights


def test_fingerprints_tell_which_part_has_changed():
    core = make_core()
    before = fingerprints(core.state_dict())
    assert before == fingerprints(make_core().state_dict())
    with torch.no_grad():
        core.state_proj.bias[3] += 1e-6
    after = fingerprints(core.state_dict())
    assert [part for part in before if before[part] != after[part]] == ["state projection"]


# --- refused ----------------------------------------------------------------------------------------------------------


def mutations(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every single change of a JSON value: (path, what is there instead); DELETED takes the entry away."""
    if isinstance(value, dict):
        yield (*path, "unknown_field"), 1
        for key, item in value.items():
            yield (*path, key), DELETED
            yield from mutations(item, (*path, key))
    elif isinstance(value, list):
        yield (*path, len(value)), "one more"
        for index, item in enumerate(value):
            yield (*path, index), DELETED
            yield from mutations(item, (*path, index))
    else:
        changed = {bool: lambda v: not v, str: lambda v: v + "x", int: lambda v: v + 1, float: lambda v: v + 1e-9}
        yield path, changed[type(value)](value) if value is not None else "something"
        if value is not None:
            yield path, None


DELETED = object()


def apply(body: Any, path: tuple, value: Any) -> Any:
    """A copy of a JSON value with one change."""
    body = json.loads(json.dumps(body))
    *parents, last = path
    place = body
    for key in parents:
        place = place[key]
    if value is DELETED:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return body


def test_every_single_change_of_the_manifest_is_refused(copied):
    path = copied.with_suffix(".json")
    body = json.loads(path.read_text())
    changes = list(mutations(body))
    objects = {change[:-1] for change, value in changes if change[-1] == "unknown_field"}
    assert {(), ("core",), ("core", "vlm"), ("normalization", "state"), ("latents",), ("weights",)} < objects
    accepted = []
    for change, value in changes:
        path.write_text(json.dumps(apply(body, change, value)))
        try:
            load_artifact(copied)
            accepted.append((change, value))
        except ValueError:
            pass
    assert not accepted
    path.write_text(json.dumps(body))  # it was the changes, not the writing
    load_artifact(copied)


def rewrite(path: Path, body: dict) -> None:
    """Write a manifest whose own hash is right: as a program that differs from ours would."""
    body.pop("manifest_sha256")
    path.write_text(json.dumps(body | {"manifest_sha256": json_sha256(body)}))


LEVELS = [(), ("core",), ("normalization", "state"), ("latents",), ("source",), ("weights",)]


@pytest.mark.parametrize("level", LEVELS, ids=".".join)
def test_fields_of_another_program_are_named(copied, level):
    path = copied.with_suffix(".json")
    body = json.loads(path.read_text())
    rewrite(path, apply(body, (*level, "colour"), "red"))
    with pytest.raises(ValueError, match=rf"unknown field\(s\) in .*{'.'.join(level)}: \['colour'\]"):
        load_artifact(copied)
    place = body
    for key in level:
        place = place[key]
    for name in place.keys() - {"manifest_sha256", "schema_version"}:
        rewrite(path, apply(body, (*level, name), DELETED))
        with pytest.raises(ValueError, match=name):
            load_artifact(copied)


@pytest.mark.parametrize("schema", ["smolvla_shared.v2", None, 1])
def test_another_schema_is_refused(copied, schema):
    path = copied.with_suffix(".json")
    rewrite(path, json.loads(path.read_text()) | {"schema_version": schema})
    with pytest.raises(ValueError, match=rf"schema_version is {schema!r}, this version reads 'smolvla_shared.v1'"):
        load_artifact(copied)


@pytest.mark.parametrize("suffix", [".safetensors", ".tokenizer.json"])
def test_tampered_files_are_refused(copied, suffix):
    path = copied.with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: sha256 is .*, the manifest expects .*Copy all three"):
        load_artifact(copied)


@pytest.mark.parametrize("suffix", [".safetensors", ".tokenizer.json", ".json"])
def test_missing_files_are_named(copied, suffix):
    copied.with_suffix(suffix).unlink()
    with pytest.raises(ValueError, match=rf"{copied.with_suffix(suffix).name} does not exist; .*three files"):
        load_artifact(copied)


def test_a_path_that_is_not_the_weights_is_refused(copied):
    for path in (copied.with_suffix(".json"), copied.parent):
        with pytest.raises(ValueError, match=r"should name the weights, a \.safetensors file"):
            load_artifact(path)


@pytest.mark.parametrize("part", [part for part in PARTS if part != "action head"])
def test_no_other_part_may_be_missing(artifact, part):
    missing = next(key for key in artifact.state_dict if key.startswith(PARTS[part]))
    state = {key: value for key, value in artifact.state_dict.items() if key != missing}
    with pytest.raises(ValueError, match=f"missing: {missing}"):
        build_core(replace(artifact, state_dict=state), action_dim=4, chunk_size=8)


def test_half_an_action_head_and_other_sizes_are_refused(tmp_path):
    artifact = load_artifact(save(tmp_path, make_core(action_dim=4, chunk_size=8)))
    key = "action_head.out_proj.bias"
    state = {k: v for k, v in artifact.state_dict.items() if k != key}
    with pytest.raises(ValueError, match=f"missing: {key}"):
        build_core(replace(artifact, state_dict=state))
    with pytest.raises(ValueError, match="unknown: action_head"):
        build_core(artifact, action_dim=0)
    with pytest.raises(ValueError, match=r"wrong shape: state_proj.weight \[\d+, 32\], expected \[\d+, 40\]"):
        build_core(artifact, max_state_dim=40)


def test_all_disagreements_are_listed_at_once(artifact):
    stated = {"model_name": "my/trunk", "cameras": CAMERAS[::-1], "image_size": 64, "model_revision": None}
    with pytest.raises(ValueError) as error:
        check_agreement(artifact.manifest.core, stated)
    assert str(error.value).splitlines()[1:] == [
        "  model_name: command line my/trunk, artifact nobody/nothing",
        f"  cameras: command line {CAMERAS[::-1]}, artifact {CAMERAS}",
    ]
    check_agreement(artifact.manifest.core, {"model_name": "nobody/nothing", "cameras": CAMERAS, "image_size": None})


def test_co_training_on_other_latent_actions_is_refused(artifact):
    data = DataConfig(roots=(Path("x"),), frame_gap_s=0.25, label_camera=CAMERAS[1])
    with pytest.raises(ValueError) as error:
        check_teacher(artifact.manifest, "1" * 64, "continuous", data)
    assert str(error.value).splitlines()[1:] == [
        f"  teacher (--laq-ckpt): command line {'1' * 64}, artifact {'0' * 64}",
        "  --teacher-kind: command line continuous, artifact quantized",
        "  --data.frame-gap-s: command line 0.25, artifact 0.5",
        f"  --data.label-camera: command line {CAMERAS[1]}, artifact {CAMERAS[0]}",
    ]
    check_teacher(artifact.manifest, "0" * 64, "quantized", DataConfig(roots=(Path("x"),), frame_gap_s=0.5))
