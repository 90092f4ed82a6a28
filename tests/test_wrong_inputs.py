"""Damaged and edited files: every one is refused by a message that names it, or loads what was written, to the bit.

MUTATIONS=5000 pytest tests/test_wrong_inputs.py tries more than the default.
"""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import equal, make_config, make_core, train_points
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from smolvla_shared import cache, run_checkpoint
from smolvla_shared.artifact import ARTIFACT_NAME, Latents, Origin, load_artifact, save_artifact
from smolvla_shared.cache import RowCache
from smolvla_shared.command import is_mistake, of_machine
from smolvla_shared.files import MANIFEST_NAME, sealed
from smolvla_shared.hub_upload import open_upload
from smolvla_shared.label_cache import CachedLabels, LabelKey, cached_key, write_codebook
from smolvla_shared.label_health import Verdict, read_verdict, write_report
from smolvla_shared.laq_files import load_laq, teachers_source
from smolvla_shared.lerobot_files import load_saved, save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.normalization import Statistics
from smolvla_shared.trunk_files import load_trunk_tokenizer, pack_tokenizer

MUTATIONS = int(os.environ.get("MUTATIONS", 500))
ROWS = 50
KEY = LabelKey("a" * 64, "quantized", 0.5, ("observation.image",), "b" * 64, {"torch": "2.11"})
STATISTICS = {"state": Statistics([0.5] * 4, [1.5] * 4), "action": Statistics([0.1] * 4, [0.3] * 4)}


@dataclass(frozen=True)
class Kind:
    """What is written in a directory of its own, and how it is read again, as tensors and JSON values."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def write_artifact(directory: Path) -> None:
    core = make_core()
    latents = Latents("c" * 64, "quantized", 0.5, ("observation.image",), 0.9)
    source = Origin("run", 3, ("video",), ("expert",), "last step", {"torch": "2.11"})
    statistics = {"state": STATISTICS["state"], "latent": Statistics([0.0] * 32, [1.0] * 32)}
    tokenizer = load_trunk_tokenizer("tiny", None)
    save_artifact(directory, core.config, core.state_dict(), tokenizer, statistics, latents, source)


def read_artifact(directory: Path) -> Any:
    artifact = load_artifact(directory / f"{ARTIFACT_NAME}.safetensors")
    return asdict(artifact.manifest), artifact.state_dict, pack_tokenizer(artifact.tokenizer)


def write_policy(directory: Path) -> None:
    core = make_core(action_dim=4, chunk_size=6)
    tokenizer = load_trunk_tokenizer("tiny", None)
    save_policy(directory, core.config, core.state_dict(), tokenizer, STATISTICS, 5, {"run": "x"})


def read_policy(directory: Path) -> Any:
    saved = load_saved(str(directory))
    config = asdict(replace(saved.config, pretrained_path=None))
    about = config, pack_tokenizer(saved.tokenizer), saved.rename_map, saved.source
    stats = {key: {of: torch.as_tensor(value) for of, value in stats.items()} for key, stats in saved.stats.items()}
    return *map(str, about), saved.weights, stats


def write_labels(directory: Path) -> None:
    store = RowCache(directory / "data", asdict(KEY), ROWS, 20)
    store.claim()
    write_codebook(store, torch.randn(8, 3))
    for rows in store.shards():
        store.write(rows, torch.arange(rows.start, rows.stop, dtype=torch.int32)[:, None] % 8)


def read_labels(directory: Path) -> Any:
    cache.read_mapped.cache_clear()
    key = replace(KEY, teacher_id=cached_key(directory / "data").teacher_id)  # as --labels cache does
    labels = CachedLabels([RowCache(directory / "data", asdict(key), ROWS, 20)], [1])
    return labels.teacher_id, labels.codebook, [labels.in_a_row(0, row) for row in range(ROWS)]


def features_of(directory: Path) -> RowCache:
    return RowCache(directory / "data", {"tower": "d" * 64, "stored_in": "bfloat16"}, ROWS, 20)


def write_features(directory: Path) -> None:
    features_of(directory).claim()
    for rows in features_of(directory).shards():
        features_of(directory).write(rows, torch.randn(len(rows), 4, 8).bfloat16())


def read_features(directory: Path) -> Any:
    cache.read_mapped.cache_clear()
    (store := features_of(directory)).open()
    return [store[row].float() for row in range(ROWS)]


def write_checkpoint(directory: Path) -> None:
    train_points(make_config(directory / "run", steps=2))


def read_checkpoint(directory: Path) -> Any:
    last = run_checkpoint.last_checkpoint(directory / "run")
    return torch.load(last / run_checkpoint.STATE_FILE, weights_only=True)


def write_health(directory: Path) -> None:
    verdict = Verdict("fail", ("the latents tell nothing",), "e" * 64, "quantized", 0.5, ("observation.image",))
    write_report(directory / "label_health.json", verdict, {"pairs": 100, "gain": 0.01}, [])


def read_teacher(directory: Path) -> Any:
    laq = load_laq(directory / "laq.safetensors")
    return laq.state_dict(), str(laq.config), teachers_source(directory / "laq.safetensors")


KINDS = {
    "artifact": Kind(write_artifact, read_artifact),
    "policy": Kind(write_policy, read_policy),
    "teacher": Kind(lambda directory: None, read_teacher),
    "labels": Kind(write_labels, read_labels),
    "features": Kind(write_features, read_features),
    "checkpoint": Kind(write_checkpoint, read_checkpoint),
    "health": Kind(write_health, lambda directory: asdict(read_verdict(directory / "label_health.json"))),
}
UNREAD = {"README.md", "config.json of a run", "metrics.jsonl", "curves.png"}


@pytest.fixture(scope="module")
def written(tmp_path_factory, laq_checkpoint) -> dict[str, tuple[Path, Any]]:
    """The directory of each kind, and what it holds."""
    found = {}
    for name, kind in KINDS.items():
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        if name == "teacher":
            shutil.copytree(laq_checkpoint.parent, directory, dirs_exist_ok=True)
        kind.write(directory)
        found[name] = directory, kind.read(directory)
    return found


# --- mutations --------------------------------------------------------------------------------------------------------

VALUES = [None, -1, 0, 1, 7, 10**9, -1.5, float("nan"), float("inf"), "", "../../../evil", "text", [], {}, [1, 2], True]
WHOLES = [b"", b"{}", b"null", b"[1]", b"not json", b"\xff\xfe", pickle.dumps({"a": 1}), b"[" * 10000, b"\x00" * 64]
TENSOR_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a NaN": lambda t: t.index_fill(0, torch.tensor([0]), float("nan")),
    "an infinity": lambda t: t.index_fill(0, torch.tensor([0]), float("inf")),
    "1e38": lambda t: torch.full_like(t, 1e38),
    "zeros": torch.zeros_like,
    "half precision": lambda t: t.half(),
    "whole numbers": lambda t: t.to(torch.int64),
    "transposed": lambda t: t.transpose(0, -1).contiguous(),
    "one row": lambda t: t[:1].clone(),
}
PLACES = [
    "flip",
    "cut",
    "whole",
    "field",
    "field deleted",
    "tensor",
    "tensor renamed",
    "tensor dropped",
    "file removed",
]


def pick[T](items: list[T], share: float) -> T:
    return items[min(int(share * len(items)), len(items) - 1)]


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of all values in a JSON value, the nested ones and what nests them."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from leaves(item, (*path, key))


def change_field(body: Any, share: float, value: Any, delete: bool) -> Any:
    path = pick([*leaves(body)], share)
    at = body
    for key in path[:-1]:
        at = at[key]
    if delete:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return body


def mutated(data: bytes, name: str, place: str, share: float, other: float) -> bytes | None:
    """What a file of these bytes is changed into; None: it is removed."""
    if place == "file removed":
        return None
    if place == "whole":
        return pick(WHOLES, other)
    if place.startswith("field") and name.endswith(".json"):
        return json.dumps(change_field(json.loads(data), share, pick(VALUES, other), "deleted" in place)).encode()
    if place.startswith("tensor") and name.endswith(".safetensors"):
        tensors = load(data)
        key = pick(sorted(tensors), share)
        if place == "tensor renamed":
            tensors[pick(["../../../evil", "/evil", f"{key}x", ""], other)] = tensors.pop(key)
        elif place == "tensor dropped":
            tensors.pop(key)
        else:
            tensors[key] = pick([*TENSOR_CHANGES.values()], other)(tensors[key].float())
        return save(tensors)
    at = min(int(share * len(data)), len(data) - 1)
    if place == "cut":
        return data[:at]
    return data[:at] + bytes([data[at] ^ 1 << int(other * 7.99)]) + data[at + 1 :]


@contextmanager
def in_place_of(path: Path, data: bytes | None) -> Iterator[None]:
    """Within the context a file has these bytes, or is not there."""
    before = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def files_of(directory: Path) -> list[Path]:
    """The files that loading may depend on."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [path for path in paths if path.name not in UNREAD and path.parent.name != "run"]


SHARE = st.floats(0, 1, exclude_max=True)
MUTATION = {"place": st.sampled_from(PLACES), "file": SHARE, "share": SHARE, "other": SHARE}
SEEDED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@settings(max_examples=MUTATIONS, **SEEDED)
@given(kind=st.sampled_from([*KINDS, "labels", "teacher", "health"]), **MUTATION)
def test_a_mutation_is_refused_by_name_or_changes_nothing(written, kind, place, file, share, other):
    directory, expected = written[kind]
    path = pick(files_of(directory), file)
    before = sorted(directory.parent.iterdir())
    with in_place_of(path, mutated(path.read_bytes(), path.name, place, share, other)):
        try:
            found = KINDS[kind].read(directory)
        except ValueError as error:
            named = path.name in str(error) or str(directory) in str(error) or path.parent.name in str(error)
            assert named, f"{path}: {error}"
        else:
            assert equal(found, expected), f"{kind} {path.name}: {place} gave something else"
    assert sorted(directory.parent.iterdir()) == before  # nothing is written elsewhere


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_twice_is_refused(written, kind):
    """Its hash in a sealed file is that of the object with the last of the two values, and whoever reads the first
    would read another one.
    """
    directory, _ = written[kind]
    paths = [path for path in files_of(directory) if path.suffix == ".json" and "tokenizer" not in path.name]
    assert paths
    for path in paths:
        key, data = next(iter(json.loads(path.read_bytes()))), path.read_bytes()
        twice = b"{" + json.dumps(key).encode() + b": 0, " + data.lstrip()[1:]
        is_hashed = kind == "policy" and path.name != MANIFEST_NAME
        without_hashes = in_place_of(directory / MANIFEST_NAME, None) if is_hashed else nullcontext()
        said = pytest.raises(ValueError, match=rf'{path.name} is not JSON \(an object has the key "{key}" twice\)')
        with without_hashes, in_place_of(path, twice), said:
            KINDS[kind].read(directory)


def resealed(data: bytes) -> bytes:
    body = json.loads(data)
    body.pop("manifest_sha256", None)
    return sealed(body).encode()


@settings(max_examples=MUTATIONS // 5, **SEEDED)
@given(kind=st.sampled_from(["artifact", "teacher", "health"]), share=SHARE, other=SHARE, deleted=st.booleans())
def test_what_was_sealed_again_is_refused_by_its_values_or_loads(written, kind, share, other, deleted):
    """Whoever writes the hash anew can write another artifact; no value of it may end in another error."""
    directory, _ = written[kind]
    (path,) = [path for path in directory.glob("*.json") if "tokenizer" not in path.name]
    changed = change_field(json.loads(path.read_bytes()), share, pick(VALUES, other), deleted)
    with in_place_of(path, resealed(json.dumps(changed).encode())):
        try:
            KINDS[kind].read(directory)
        except ValueError as error:
            assert path.stem in str(error) or "must be" in str(error), error


@settings(max_examples=max(40, MUTATIONS // 20), **SEEDED)
@given(
    place=st.sampled_from(["field", "field deleted", "whole", "tensor", "tensor renamed"]),
    file=SHARE,
    **{name: SHARE for name in ("share", "other")},
)
def test_a_policy_without_hashes_is_refused_or_loads(written, place, file, share, other, tmp_path):
    """As LeRobot's own commands save it: nothing in it ends in another error than a refusal."""
    directory, _ = written["policy"]
    with in_place_of(directory / MANIFEST_NAME, None):
        paths = [path for path in files_of(directory) if path.name not in (MANIFEST_NAME, "model.safetensors")]
        path = pick(paths, file)
        with in_place_of(path, mutated(path.read_bytes(), path.name, place, share, other)), suppress(ValueError):
            read_policy(directory)


# --- what a policy's processors may be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"class": "os.system", "config": {"command": "touch {evil}"}},
        {"class": "pathlib.Path.touch", "config": {"self": "{evil}"}},
        {"registry_name": "rename_observations_processor", "class": "os.system", "config": {"command": "touch {evil}"}},
        {"registry_name": "rename_observations_processor", "config": {}, "state_file": "../evil.safetensors"},
        {"registry_name": "rename_observations_processor", "config": {}, "state_file": "/etc/passwd"},
        {"registry_name": "to_batch_processor", "config": {}},
    ],
)
@pytest.mark.parametrize("processor", ["policy_preprocessor", "policy_postprocessor"])
def test_no_processor_step_runs_or_reads_what_it_names(written, processor, entry, tmp_path):
    directory, _ = written["policy"]
    path, evil = directory / f"{processor}.json", tmp_path / "evil"
    body = json.loads(path.read_text())
    body["steps"][0] = json.loads(json.dumps(entry).replace("{evil}", str(evil)))
    with in_place_of(path, json.dumps(body).encode()), in_place_of(directory / MANIFEST_NAME, None):
        for load_policy in (load_saved, HLRPSmolVLASharedPolicy.from_pretrained):
            with pytest.raises(ValueError, match=path.name):
                load_policy(str(directory))
    assert not evil.exists()


def test_a_policy_says_which_of_its_files_have_no_hash(written, caplog):
    directory, expected = written["policy"]
    with in_place_of(directory / MANIFEST_NAME, None):
        assert equal(read_policy(directory), expected)
    (line,) = [record.message for record in caplog.records if "has no hash of" in record.message]
    assert "config.json, model.safetensors" in line and "\n" not in line


# --- policies without hashes, as LeRobot's commands save them ---------------------------------------------------------


def changed_json(path: Path, *place: Any, value: Any) -> bytes:
    body = at = json.loads(path.read_bytes())
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return json.dumps(body).encode()


NORMALIZER = "policy_preprocessor_step_4_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
WRONG_FIELDS = [
    ("policy_preprocessor.json", ("steps", 0, "config", "rename_map"), 7, "rename_map: expected an object, found 7"),
    ("policy_preprocessor.json", ("steps", 0, "config", "rename_map"), {"a": 7}, "rename_map.a: expected a text"),
    ("policy_preprocessor.json", ("steps", 2, "config", "max_tokens"), 5, "max_tokens: the step has 5, config.json 48"),
    (
        "policy_preprocessor.json",
        ("steps", 2, "config", "max_tokens"),
        "5",
        'max_tokens: expected a whole number, found "5"',
    ),
    ("policy_preprocessor.json", ("steps", 4, "config", "eps"), 5.0, "eps: the step has 5.0, the policy 1e-08"),
    ("policy_preprocessor.json", ("steps", 4, "config", "features"), {}, "features.action: the step has False"),
    (
        "policy_postprocessor.json",
        ("steps", 0, "config", "norm_map", "ACTION"),
        "IDENTITY",
        "ACTION: the step has IDENTITY",
    ),
    ("source.json", ("global_step",), 5, "source.json does not say what a card needs: KeyError 'weights'"),
    ("source.json", ("started_from",), 7, "source.json does not say what a card needs"),
    ("source.json", ("trained_by",), "LeRobot", "source.json does not say what a card needs: KeyError 'started_from'"),
    ("config.json", ("input_features",), None, "config.json does not describe a policy"),
]


@pytest.mark.parametrize("name, place, value, said", WRONG_FIELDS)
def test_a_wrong_field_of_a_policy_without_hashes_is_refused(written, name, place, value, said):
    directory, _ = written["policy"]
    data = changed_json(directory / name, *place, value=value)
    said_so = pytest.raises(ValueError, match=re.escape(said))
    with in_place_of(directory / MANIFEST_NAME, None), in_place_of(directory / name, data), said_so as error:
        load_saved(str(directory))
    assert name in str(error.value) and is_mistake(error.value)


@pytest.mark.parametrize("file", [NORMALIZER, UNNORMALIZER])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"action.mean": torch.zeros(1), "action.std": torch.ones(1)}, "should have 4 numbers, as the policy's action"),
        ({"action.std": -torch.ones(4)}, "action.std is negative"),
    ],
)
def test_statistics_of_another_width_are_refused(written, file, change, said):
    """LeRobot's normaliser would broadcast one number over all dimensions."""
    directory, _ = written["policy"]
    data = save(load((directory / file).read_bytes()) | change)
    said_so = pytest.raises(ValueError, match=rf"{file} cannot normalise: .*{said}")
    with in_place_of(directory / MANIFEST_NAME, None), in_place_of(directory / file, data), said_so:
        load_saved(str(directory))


def test_a_policy_with_a_state_needs_its_statistics(written):
    directory, _ = written["policy"]
    kept = {name: t for name, t in load((directory / NORMALIZER).read_bytes()).items() if "state" not in name}
    said_so = pytest.raises(ValueError, match=r"cannot normalise: observation.state.mean is missing")
    with in_place_of(directory / MANIFEST_NAME, None), in_place_of(directory / NORMALIZER, save(kept)), said_so:
        load_saved(str(directory))


def test_a_disk_that_is_full_is_no_damaged_policy(written, monkeypatch):
    """LeRobot writes a copy of config.json into the temporary directory before it reads it."""
    directory, _ = written["policy"]

    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lerobot.configs.policies.tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(OSError) as error:
        load_saved(str(directory))
    assert of_machine(error.value).startswith("error: the disk is full")


def test_a_card_that_is_no_text_is_refused(written):
    directory, _ = written["policy"]
    said_so = pytest.raises(ValueError, match=r"README.md is no text in UTF-8: .*: save it as UTF-8, or remove it")
    with in_place_of(directory / "README.md", b"\xff\xfe"), said_so:
        open_upload(directory)
