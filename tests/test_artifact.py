"""artifact.py: what comes out of an artifact is what went in, to the bit, and anything else is refused."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smolvla_shared.artifact import (
    Artifact,
    Latents,
    Origin,
    fingerprints,
    load_artifact,
    save_artifact,
)
from smolvla_shared.config import ModelConfig
from smolvla_shared.hashes import json_sha256
from smolvla_shared.lerobot_card import teacher_lines
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import Statistics
from smolvla_shared.teacher_config import GroundedIn
from smolvla_shared.trunk_files import load_trunk_tokenizer, make_core_config, pack_tokenizer

CAMERAS = ("observation.images.top", "observation.images.wrist")
STATISTICS = {
    "state": Statistics((0.1, 0.2, 1 / 3, 0.4), (1.0, 2.0, 3.0, 0.5)),
    "latent": Statistics(tuple(i / 7 for i in range(32)), (1.0,) * 32),
}
LATENTS = Latents("0" * 64, "quantized", 0.5, CAMERAS[:1], 2 / 3)
ORIGIN = Origin("s2", 500, ("my/videos", "other"), ("expert", "latent head"), "last step", {"torch": "2", "numpy": "1"})


def make_core(cameras: tuple[str, ...] = CAMERAS, **dims: int) -> SmolVLASharedCore:
    dims = {"state_dim": 4, "latent_vector_dim": 32, "code_seq_len": 4} | dims
    config = make_core_config(ModelConfig(preset="tiny"), cameras, **dims)
    torch.manual_seed(0)
    # The name leads nowhere, as on a machine that does not have what the trunk was made from.
    return SmolVLASharedCore(replace(config, model_name="nobody/nothing")).eval()


def save(directory: Path, core: SmolVLASharedCore, latents: Latents = LATENTS) -> Path:
    tokenizer = load_trunk_tokenizer("tiny", None)
    return save_artifact(directory, core.config, core.state_dict(), tokenizer, STATISTICS, latents, ORIGIN)


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


def test_weights_and_tokenizer_come_back_to_the_bit(artifact, core):
    expected = core.state_dict()
    assert artifact.state_dict.keys() == expected.keys()
    for key, tensor in expected.items():
        assert artifact.state_dict[key].dtype == tensor.dtype and torch.equal(artifact.state_dict[key], tensor), key
    assert pack_tokenizer(artifact.tokenizer) == pack_tokenizer(load_trunk_tokenizer("tiny", None))


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
    prefix = "".join(rf"{key}\." for key in level)
    rewrite(path, apply(body, (*level, "colour"), "red"))
    with pytest.raises(ValueError, match=rf"artifact manifest .*:\n  {prefix}colour: unknown"):
        load_artifact(copied)
    place = body
    for key in level:
        place = place[key]
    for name in place.keys() - {"manifest_sha256", "schema_version", "teacher_grounding"}:
        rewrite(path, apply(body, (*level, name), DELETED))
        with pytest.raises(ValueError, match=rf"artifact manifest .*:\n  {prefix}{name}: missing"):
            load_artifact(copied)


def test_what_the_teacher_was_grounded_in_is_kept_and_may_be_missing_in_older_files(core, copied, tmp_path):
    """Artifacts from before the field are those of a teacher without, or one whose grounding is not known."""
    path = copied.with_suffix(".json")
    body = json.loads(path.read_text())
    assert body["latents"]["teacher_grounding"] is None
    rewrite(path, apply(body, ("latents", "teacher_grounding"), DELETED))
    assert load_artifact(copied).manifest.latents == LATENTS
    grounded = replace(LATENTS, teacher_grounding=GroundedIn(("my/demos", "others"), 7, 0.1))
    (tmp_path / "grounded").mkdir()
    saved = save(tmp_path / "grounded", core, grounded)
    assert load_artifact(saved).manifest.latents == grounded
    named = "teacher 000000000000 (grounded in 7 episodes of my/demos, others, weight 0.1) on observation.images.top, "
    assert named in str(grounded)
    line = "- The teacher was grounded in 7 episodes of my/demos, others, weight 0.1"
    assert line in teacher_lines(json.loads(saved.with_suffix(".json").read_text())["latents"])
    assert not [line for line in teacher_lines(body["latents"]) if "grounded" in line]
    wrong = json.loads(saved.with_suffix(".json").read_text())
    rewrite(saved.with_suffix(".json"), apply(wrong, ("latents", "teacher_grounding", "weight"), "much"))
    with pytest.raises(ValueError, match=r"latents.teacher_grounding.weight: expected a number, found .much."):
        load_artifact(saved)


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
    with pytest.raises(ValueError, match=rf"no {copied.with_suffix(suffix).name} of its three files"):
        load_artifact(copied)


def test_a_path_that_is_not_the_weights_is_refused(copied):
    for path in (copied.with_suffix(".json"), copied.parent):
        with pytest.raises(ValueError, match=r"named by its weights, a \.safetensors file, not "):
            load_artifact(path)
