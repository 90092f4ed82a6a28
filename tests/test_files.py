"""weights.py: what is published, strict checks, and files that are whole or absent."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smolvla_shared.files import (
    check_weights,
    find_directory,
    link_or_copy,
    new_directory,
    public_state,
    state_sha256,
    write_text,
    write_weights,
)
from smolvla_shared.hashes import file_sha256


def make_module() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[0].register_buffer("_usage", torch.zeros(5))
    module.add_module("_cache", nn.Linear(1, 1))
    return module


def test_private_names_are_not_published():
    module = make_module()
    assert {"0._usage", "_cache.weight"} < module.state_dict().keys()
    assert list(public_state(module.state_dict())) == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.num_batches_tracked",
        "1.running_mean",
        "1.running_var",
        "1.weight",
    ]


def test_weights_come_back_as_they_were_written(tmp_path):
    weights = {"transposed": torch.randn(3, 4).T, "bf16": torch.randn(2).bfloat16(), "count": torch.tensor(3)}
    sha256 = write_weights(tmp_path / "w.safetensors", weights)
    assert sha256 == file_sha256(tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_the_hash_of_a_state_counts_names_shapes_and_values_but_neither_order_nor_float_type():
    state = {"a": torch.tensor([[0.5, -2.0]]), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3.0), "a": torch.tensor([[0.5], [-2.0]], dtype=torch.bfloat16).T}
    assert state_sha256(same) == state_sha256(state)
    others = [{"c": state["a"], "b": state["b"]}, state | {"a": state["a"][0]}, state | {"a": state["a"] + 2**-22}]
    assert len({state_sha256(other) for other in (state, {}, {"a": state["a"]}, *others)}) == 6


def test_the_hash_tells_one_changed_bit(tmp_path):
    path = tmp_path / "w.safetensors"
    sha256 = write_weights(path, {"a": torch.zeros(4)})
    assert write_weights(path, {"a": torch.zeros(4)}) == sha256
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert file_sha256(path) != sha256


def test_check_lists_all_that_is_wrong_at_once():
    expected = {"same": torch.zeros(1), "lost": torch.zeros(2, 3), "gone": torch.zeros(5), "turned": torch.zeros(3, 4)}
    found = {"same": torch.ones(1), "extra": torch.zeros(7), "turned": torch.zeros(4, 3)}
    with pytest.raises(ValueError) as error:
        check_weights("policy.safetensors", expected, found)
    assert str(error.value).splitlines() == [
        "policy.safetensors does not hold the model that it describes:",
        "  missing: gone [5]",
        "  missing: lost [2, 3]",
        "  unknown: extra [7]",
        "  wrong shape: turned [4, 3], expected [3, 4]",
    ]
    check_weights("itself", expected, expected)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_have_the_mode_that_the_user_wants(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)})
        write_text(tmp_path / "w.json", "{}")
        assert os.umask(umask) == umask  # reading the mask did not change it
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "w.safetensors": mode,
        "w.json": mode,
    }


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    weights, text = tmp_path / "w.safetensors", tmp_path / "w.json"
    sha256 = write_weights(weights, {"a": torch.zeros(1)})
    write_text(text, "old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_weights(weights, {"a": torch.ones(1)})
    with pytest.raises(KeyboardInterrupt):
        write_text(text, "new")
    assert (file_sha256(weights), text.read_text()) == (sha256, "old")


def test_a_new_directory_appears_when_it_is_complete(tmp_path):
    with new_directory(tmp_path / "deep" / "out") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    with pytest.raises(ValueError, match="out exists already"), new_directory(tmp_path / "deep" / "out"):
        raise AssertionError
    with pytest.raises(KeyError), new_directory(tmp_path / "deep" / "other") as directory:
        (directory / "file").write_text("x")
        raise KeyError
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_directory_is_found_with_what_it_needs(tmp_path):
    (tmp_path / "config.json").touch()
    assert find_directory("policy", tmp_path, ("config.json",)) == tmp_path
    with pytest.raises(ValueError, match=r"no policy in .*: b is missing, found \['config.json'\]"):
        find_directory("policy", tmp_path, ("config.json", "b"))
    with pytest.raises(ValueError, match="no policy nobody/nothing: there is no such directory, and the hub says"):
        find_directory("policy", "nobody/nothing", ())


def test_a_second_name_takes_no_space_where_that_can_be(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.write_bytes(b"weights")
    link_or_copy(source, tmp_path / "b")
    assert os.path.samefile(source, tmp_path / "b")

    def refuse(*paths):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, tmp_path / "c")
    assert not os.path.samefile(source, tmp_path / "c") and (tmp_path / "c").read_bytes() == b"weights"
