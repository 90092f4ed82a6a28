"""run_checkpoint.py: whole checkpoints only, damaged ones told, and what a resumed run may change."""

import errno
import json
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Regression, equal, make_accelerator, make_config, metrics_of, names_in, train_points

from smolvla_shared import run_metrics
from smolvla_shared.config import PolicyDataConfig
from smolvla_shared.run_checkpoint import TrainingState, check_run, checkpoint_bytes, claim_run, last_checkpoint
from smolvla_shared.run_optimizer import learning_rate


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run_metrics, "plot_curves", lambda lines, path: None)  # most of the time of such short runs


def test_a_new_run_claims_its_directory_and_another_is_refused(tmp_path):
    config = replace(make_config(tmp_path), run_dir=tmp_path / "runs" / "s2")
    assert check_run(config, make_accelerator()) is None
    claim_run(config, make_accelerator())
    record = json.loads((config.run_dir / "config.json").read_text())
    assert (record["batch_size"], record["optim"]["lr"], record["data"]["roots"]) == (8, 1e-2, ["x"])
    with pytest.raises(ValueError, match=r"--run-dir .*s2 exists: pass --resume .* or another directory"):
        check_run(config, make_accelerator())


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    config = replace(make_config(tmp_path), run_dir=tmp_path / "run", accumulation_steps=3)
    with pytest.raises(ValueError, match=r"--batch-size 8 .* is not divisible by 1 process\(es\) x 3 accumulation"):
        check_run(config, make_accelerator())
    assert not config.run_dir.exists()


def test_a_resume_of_nothing_is_refused(tmp_path):
    config = make_config(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"--resume: there is no run at .* \(no config.json\); start without --resume"):
        check_run(config, make_accelerator())


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path):
    config = make_config(tmp_path / "run", steps=3, save_every=2)
    with pytest.raises(Died):
        train_points(config, after_step=die_at(1))
    assert check_run(replace(config, resume=True), make_accelerator()) is None
    found = train_points(replace(config, resume=True))
    whole = train_points(make_config(tmp_path / "whole", steps=3, save_every=2))
    assert equal(dict(found.state_dict()), dict(whole.state_dict()))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_resume_with_other_settings_is_refused_and_all_are_listed(tmp_path, capsys):
    config = make_config(tmp_path / "run", save_every=2)
    train_points(config)
    # Everything that may change at once.
    freed = {"steps": 9, "save_every": 3, "keep": 2, "log_every": 5, "eval_every": 7, "accumulation_steps": 2}
    resumed = replace(config, resume=True, **freed, data=replace(config.data, num_workers=1))
    moved = replace(resumed, run_dir=shutil.copytree(config.run_dir, tmp_path / "moved", symlinks=True))
    assert check_run(moved, make_accelerator()) == tmp_path / "moved" / "checkpoints" / "000004"
    assert "--steps: was 4, now 9\n" in capsys.readouterr().out
    other = replace(resumed, seed=1, optim=replace(config.optim, lr=3e-3))
    with pytest.raises(ValueError) as error:
        check_run(other, make_accelerator())
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  --optim.lr: was 0.01, now 0.003", "  --seed: was 0, now 1"]
    for name in (*freed, "data.num_workers", "trackers"):
        assert f"--{name.replace('_', '-')}" in lines[3]


def test_a_resume_with_other_episodes_is_refused(tmp_path):
    config = make_config(tmp_path / "run", save_every=2, data=PolicyDataConfig(roots=("x",), episodes=(0, 5)))
    train_points(config)
    resumed = replace(config, resume=True, steps=9)
    assert check_run(resumed, make_accelerator()).name == "000004"
    with pytest.raises(ValueError, match=r"--data.episodes: was \[0, 5\], now \[0, 6\]\n"):
        check_run(replace(resumed, data=replace(config.data, episodes=(0, 6))), make_accelerator())


def test_more_steps_follow_the_longer_schedule_from_there_on(tmp_path):
    config = make_config(tmp_path / "run", steps=4, save_every=2)
    train_points(config)
    longer = replace(config, steps=8, resume=True)
    train_points(longer, resume_from=check_run(longer, make_accelerator()))
    rates = [line["lr"] for line in metrics_of(config.run_dir)]
    assert rates == [learning_rate(step, 4 if step < 4 else 8, config.optim) for step in range(8)]
    assert json.loads((config.run_dir / "config.json").read_text())["steps"] == 8


class Died(BaseException):
    """As a kill: nothing that handles errors sees it."""


def die_at(last: int):
    def after_step(step: int) -> dict[str, float]:
        if step == last:
            raise Died
        return {}

    return after_step


def test_last_points_at_a_whole_checkpoint_whenever_the_run_dies(tmp_path):
    config = make_config(tmp_path / "run", steps=6, save_every=2)
    checkpoints = config.run_dir / "checkpoints"

    def die_at_the_second(directory: Path, weights: dict, step: int) -> None:
        directory.mkdir()
        (directory / "model").write_text("half")
        if "000004" in str(directory):
            raise Died
        (directory / "model").write_text("whole")

    def export(directory: Path, weights: dict, step: int) -> None:
        directory.mkdir()
        (directory / "model").write_text("whole")

    with pytest.raises(Died):
        train_points(config, export=die_at_the_second)
    assert (checkpoints / "last").readlink() == Path("000002")
    assert (checkpoints / "last" / "pretrained_model" / "model").read_text() == "whole"
    assert not (checkpoints / "000004").exists()
    train_points(replace(config, resume=True), export=export, resume_from=(checkpoints / "last").resolve())
    assert names_in(checkpoints) == ["000002", "000004", "000006", "last"]  # and no temporary names
    assert (checkpoints / "last").readlink() == Path("000006")
    for step in ("000002", "000004", "000006"):
        assert (checkpoints / step / "pretrained_model" / "model").read_text() == "whole"
        state = torch.load(checkpoints / step / "training_state" / "state.pt", weights_only=True)
        assert state["step"] == int(step)


def test_keep_keeps_the_newest(tmp_path):
    config = make_config(tmp_path / "run", steps=7, save_every=1, keep=2)
    train_points(config)
    assert names_in(config.run_dir / "checkpoints") == ["000006", "000007", "last"]
    assert check_run(replace(config, resume=True, steps=8), make_accelerator()).name == "000007"


def test_keep_counts_from_the_checkpoint_that_last_names(tmp_path):
    """A run that went back: later, damaged checkpoints are neither counted nor trusted, but written again."""
    config = make_config(tmp_path / "run", steps=7, save_every=1)
    train_points(config)
    checkpoints = config.run_dir / "checkpoints"
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("000003")
    config = replace(config, resume=True, keep=1)
    with pytest.raises(Died):
        train_points(config, after_step=die_at(6), resume_from=check_run(config, make_accelerator()))
    assert names_in(checkpoints) == ["000005", "000006", "000007", "last"]
    assert check_run(config, make_accelerator()).name == "000005"


def damaged(what: str, checkpoint: Path) -> None:
    state = checkpoint / "training_state" / "state.pt"
    if what == "truncated":
        os.truncate(state, 1000)
    elif what == "mixed":
        shutil.copy(checkpoint.parent / "000002" / "training_state" / "state.pt", state)
    elif what == "missing":
        state.unlink()
    elif what == "a byte":
        content = bytearray(state.read_bytes())
        content[-200] ^= 1
        state.write_bytes(content)
    elif what == "no record":
        (checkpoint / "checkpoint.json").write_text("")
    elif what == "gone":
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    "what, message",
    [
        ("truncated", r"state.pt: 1,000 bytes, [\d,]+ were written"),
        ("mixed", "state.pt: not what was written"),
        ("missing", "training_state/state.pt: missing"),
        ("a byte", r"state.pt: not what was written \(sha256 differs\)"),
        ("no record", "checkpoint.json is not JSON"),
        ("gone", "checkpoint.json cannot be read: No such file"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_offered(tmp_path, what, message):
    config = make_config(tmp_path / "run", steps=6, save_every=2)
    train_points(config)
    checkpoints = config.run_dir / "checkpoints"
    assert last_checkpoint(config.run_dir) == checkpoints / "000006"
    damaged(what, checkpoints / "000006")
    os.truncate(checkpoints / "000004" / "training_state" / "state.pt", 10)  # nor is that one whole
    with pytest.raises(ValueError, match=message) as error:
        check_run(replace(config, resume=True), make_accelerator())
    assert "The newest that is whole is 000002" in str(error.value)
    subprocess.run(str(error.value).splitlines()[-1], shell=True, check=True)  # the command that it offers
    resume_from = check_run(replace(config, resume=True), make_accelerator())
    assert resume_from == checkpoints / "000002"
    train_points(replace(config, resume=True), resume_from=resume_from)
    assert last_checkpoint(config.run_dir) == checkpoints / "000006"
    assert [line["step"] for line in metrics_of(config.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_kill_before_the_first_checkpoint_is_named_loses_nothing(tmp_path):
    """SIGKILL between the renames of save_checkpoint: the checkpoint is whole, `last` is not there yet."""
    config = make_config(tmp_path / "run", steps=2, save_every=2)
    train_points(config)
    (config.run_dir / "checkpoints" / "last").unlink()
    assert last_checkpoint(config.run_dir) == config.run_dir / "checkpoints" / "000002"
    os.truncate(config.run_dir / "checkpoints" / "000002" / "training_state" / "state.pt", 10)
    with pytest.raises(ValueError, match="is damaged"):
        last_checkpoint(config.run_dir)


def test_where_no_checkpoint_is_whole_nothing_is_offered(tmp_path):
    config = make_config(tmp_path / "run", steps=2, save_every=2)
    train_points(config)
    damaged("truncated", config.run_dir / "checkpoints" / "000002")
    with pytest.raises(ValueError, match="No other is whole: start again in another --run-dir"):
        check_run(replace(config, resume=True), make_accelerator())


def test_a_copy_that_followed_the_link_is_told_and_mended_by_the_command_that_is_offered(tmp_path):
    """As `cp -rL` copies a run, and many programs that synchronise directories."""
    for every in (2, 6):  # three checkpoints, and one
        config = make_config(tmp_path / f"run{every}", steps=6, save_every=every)
        train_points(config)
        copy = replace(config, resume=True, steps=8, run_dir=shutil.copytree(config.run_dir, tmp_path / f"copy{every}"))
        last = copy.run_dir / "checkpoints" / "last"
        assert not last.is_symlink()
        with pytest.raises(ValueError, match=rf"{last} is no link to a checkpoint.*\n.* whole is 000006") as error:
            check_run(copy, make_accelerator())
        subprocess.run(str(error.value).splitlines()[-1], shell=True, check=True)
        train_points(copy, resume_from=check_run(copy, make_accelerator()))
        assert last.readlink() == Path("000008")


def test_what_a_user_keeps_beside_the_checkpoints_counts_for_nothing(tmp_path):
    config = make_config(tmp_path / "run", steps=6, save_every=2)
    train_points(config)
    checkpoints = config.run_dir / "checkpoints"
    for name in ("000002.bak", "0000x"):
        shutil.copytree(checkpoints / "000002", checkpoints / name)
    resumed = replace(config, resume=True, steps=8, keep=1)
    train_points(resumed, resume_from=check_run(resumed, make_accelerator()))
    assert names_in(checkpoints) == ["000002.bak", "000008", "0000x", "last"]


def test_a_checkpoint_of_another_name_than_its_step_is_refused(tmp_path):
    config = make_config(tmp_path / "run", steps=6, save_every=2)
    train_points(config)
    checkpoints = config.run_dir / "checkpoints"
    shutil.copytree(checkpoints / "000006", checkpoints / "000006.bak")
    shutil.rmtree(checkpoints / "000006")
    shutil.copytree(checkpoints / "000002", checkpoints / "000006")
    for name, said in [("000006", "it is of step 2"), ("000006.bak", "000006.bak is no checkpoint's name")]:
        (checkpoints / "last").unlink()
        (checkpoints / "last").symlink_to(name)
        with pytest.raises(ValueError, match=rf"{name} is damaged:\n  {said}.*\nThe newest that is whole is 000004"):
            check_run(replace(config, resume=True), make_accelerator())


def test_a_file_system_without_links_is_refused_before_training(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    config = replace(make_config(tmp_path), run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: this file system has no symbolic links \(Operation not permitted\)"):
        check_run(config, make_accelerator())
    assert names_in(tmp_path) == []


def test_a_run_without_a_record_of_what_it_read_is_refused_once_it_has_a_checkpoint(tmp_path):
    config = make_config(tmp_path / "run", steps=4, save_every=4)
    with pytest.raises(Died):
        train_points(config, after_step=die_at(1))
    (config.run_dir / "inputs.json").unlink()
    resumed = replace(config, resume=True)
    train_points(resumed, resume_from=check_run(resumed, make_accelerator()))
    (config.run_dir / "inputs.json").unlink()
    with pytest.raises(ValueError, match=r"inputs.json is missing.*\nPut the file back, or start a new run"):
        check_run(resumed, make_accelerator())
    assert not (config.run_dir / "inputs.json").exists()


def test_a_setting_that_may_change_may_be_missing(tmp_path, capsys):
    config = make_config(tmp_path / "run", steps=2, save_every=2)
    train_points(config)
    body = json.loads((config.run_dir / "config.json").read_text())
    del body["keep"]
    (config.run_dir / "config.json").write_text(json.dumps(body))
    check_run(replace(config, resume=True, steps=3, keep=1), make_accelerator())
    assert "--keep: was not recorded, now 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("source", [None, [], "text", {"global_step": 1}])
def test_a_product_of_another_step_is_written_again(tmp_path, source):
    config = make_config(tmp_path / "run", steps=2, save_every=2)
    train_points(config)
    (product := tmp_path / "artifact.json").write_text(json.dumps({"source": source}))
    resumed = replace(config, resume=True)
    assert check_run(resumed, make_accelerator(), product) == config.run_dir / "checkpoints" / "000002"
    product.write_text(json.dumps({"source": {"global_step": 2}}))
    with pytest.raises(SystemExit):
        check_run(resumed, make_accelerator(), product)


@pytest.mark.parametrize(
    "line, said",
    [
        (b"not json", "line 2 holds no metrics, b'not json"),
        (b"\xff\xfe", "line 2 holds no metrics"),
        (b"[1]", "line 2 holds no metrics"),
        (b'{"step": 1, "loss/action": "low"}', "line 2 holds no metrics"),
        (b'{"loss/action": 0.5}', "line 2 has no step"),
        (b'{"step": 1.5}', "line 2 has no step"),
    ],
)
def test_damaged_metrics_are_refused_before_a_run_goes_on(tmp_path, line, said):
    config = make_config(tmp_path / "run", steps=4, save_every=2)
    train_points(config)
    path = config.run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line + b"\n", *lines[2:]]))
    with pytest.raises(ValueError, match=rf"metrics.jsonl, {said}"):
        check_run(replace(config, resume=True, steps=6), make_accelerator())


def test_a_disk_that_is_full_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    """Files may not grow beyond a limit, from the second checkpoint on."""
    config = make_config(tmp_path / "run", steps=6, save_every=2, log_every=100)
    checkpoints = config.run_dir / "checkpoints"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int) -> dict[str, float]:
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        return {}

    try:
        with pytest.raises(OSError, match=r"step 4 could not be written: .*GB free; .* 000002 is still the last one"):
            train_points(config, after_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(checkpoints) == ["000002", "last"]
    config = replace(config, resume=True)
    found = train_points(config, resume_from=check_run(config, make_accelerator()))
    whole = train_points(make_config(tmp_path / "whole", steps=6, save_every=2, log_every=100))
    assert equal(dict(found.state_dict()), dict(whole.state_dict()))


def test_a_run_whose_checkpoints_do_not_fit_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    config = replace(make_config(tmp_path, steps=10, save_every=3, keep=2), run_dir=tmp_path / "run")
    size = checkpoint_bytes(TrainingState(Regression(), None), has_export=False)
    assert size == 4 * (3 * 3 + 3 + 3 * 3 * (5 * 3 + 5 + 2 * 3 + 2) // 3)  # frozen: weights; trained: twice more
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * size - 1))
    with pytest.raises(ValueError, match=r"3 checkpoint\(s\) .* free: pass --keep 1"):
        train_points(config)
    assert not config.run_dir.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * size))
    train_points(config)
    assert "3 checkpoint(s) of about 0.000 GB" in capsys.readouterr().out
