"""run_signals.py: signals end a run after the step, saved, in every process; resumed it is the same run."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from helpers import equal, make_accelerator, make_config, metrics_of, names_in, train_points
from torch.utils.data import Dataset

from smolvla_shared import data_loader, run_metrics
from smolvla_shared.run_checkpoint import check_run
from smolvla_shared.run_signals import EXIT_STOPPED, SIGNALS, STOPPED_FILE, StopSignals


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run_metrics, "plot_curves", lambda lines, path: None)


def send(number: signal.Signals, at: int, times: int = 1):
    """An after_step that sends this process a signal in a step."""

    def after_step(step: int) -> dict[str, float]:
        for _ in range(times * (step == at)):
            os.kill(os.getpid(), number)
        return {}

    return after_step


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_as_the_same_run(tmp_path, number, capfd):
    options = {"steps": 6, "save_every": 4, "log_every": 2, "ema_decay": 0.9}
    config = make_config(tmp_path / "run", **options)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train_points(config, after_step=send(number, at=3))
    assert stopped.value.code == EXIT_STOPPED == 75
    assert signal.getsignal(number) == before
    assert names_in(config.run_dir / "checkpoints") == ["000003", "last"]
    assert json.loads((config.run_dir / STOPPED_FILE).read_text()) == {"step": 3, "received": number.name}
    out, err = capfd.readouterr()
    assert f"{number.name}: finishing the step and saving" in err
    assert f"stopped by {number.name}, saved at step 3; --resume goes on" in out
    resumed = make_config(tmp_path / "run", resume=True, **options)
    found = train_points(resumed, resume_from=check_run(resumed, make_accelerator()))
    assert not (config.run_dir / STOPPED_FILE).exists()
    whole = train_points(make_config(tmp_path / "whole", **options))
    assert equal(dict(found.state_dict()), dict(whole.state_dict()))
    # The checkpoint of step 3 ends a line of its own; all lines that begin where the other run's do are equal.
    cut, uncut = ({line["step"]: line for line in metrics_of(tmp_path / name)} for name in ("run", "whole"))
    assert (list(cut), list(uncut)) == ([2, 3, 4, 6], [2, 4, 6])
    assert cut[2] == uncut[2] and cut[6] == uncut[6]
    assert {key for key in uncut[4] if cut[4][key] != uncut[4][key]} == {"loss/a", "loss/b"}  # means of two steps


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    config = make_config(tmp_path / "run", steps=3)
    train_points(config, after_step=send(signal.SIGTERM, at=3))
    assert names_in(config.run_dir / "checkpoints") == ["000003", "last"]
    assert not (config.run_dir / STOPPED_FILE).exists()


def test_a_second_interrupt_stops_at_once(tmp_path):
    config = make_config(tmp_path / "run", steps=6, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_points(config, after_step=send(signal.SIGINT, at=3, times=2))
    assert names_in(config.run_dir / "checkpoints") == ["000002", "last"]


def test_processes_that_are_started_hidden_do_not_see_the_signals_but_end_with_the_training():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    # Spawned: a fork server may run already, from another test, and would hand on the mask that it was started with.
    started = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    with StopSignals(1) as signals:
        with signals.hidden():
            assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
            started.start()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        for number in SIGNALS:
            os.kill(started.pid, number)
        started.join(timeout=0.5)
        assert started.is_alive()
    started.join(timeout=5)
    assert started.exitcode == -signal.SIGKILL


class Masks(Dataset):
    """What a loader's worker blocks."""

    def __getitem__(self, keys: list[int]) -> list[int]:
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_workers_of_a_fork_server_that_runs_already_do_not_see_the_signals_either():
    """It runs since the caches were filled, before the training, and with the mask of that time."""
    started = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    started.start()
    started.join()
    (masks,) = data_loader.make_loader(Masks(), [[0]], num_workers=1)
    assert set(SIGNALS) <= set(masks)
