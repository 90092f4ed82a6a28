"""run_metrics.py: metrics.jsonl survives a kill, curves are drawn, trackers get the same, a verdict on the speed."""

import json
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Regression, drawn_figures, make_config, metrics_of, passes, train_points
from PIL import Image

from smolvla_shared import run, run_metrics
from smolvla_shared.config import LATENT
from smolvla_shared.losses import masked_mean
from smolvla_shared.run_metrics import MetricsLog, StepClock, plot_curves, verdict


def test_a_log_is_cut_at_the_step_of_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss/a": 0.5})
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4]
    assert [line["step"] for line in MetricsLog(log.path, 2).read()] == [1, 2]
    assert MetricsLog(log.path, 0).read() == []


def test_curves_are_drawn(tmp_path, monkeypatch):
    """A panel for each quantity, with held-out values beside the training's; what is not measured leaves no point."""
    figures = drawn_figures(monkeypatch)
    metrics = [{"step": 1, "loss/a": 1.0, "val/b": 3.0}, {"step": 2, "loss/a": 0.5, "val/a": 0.7, "lr": 1e-3}]
    plot_curves(metrics, tmp_path / "curves.png")
    a, b = figures["curves.png"].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in a.lines} == {
        "loss/a": [[1, 1.0], [2, 0.5]],
        "val/a": [[2, 0.7]],
    }
    assert {line.get_label(): line.get_xydata().tolist() for line in b.lines} == {"val/b": [[1, 3.0]]}
    assert (a.get_title(), a.get_yscale(), b.get_title(), b.get_yscale()) == ("a", "log", "b", "linear")
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 0
    plot_curves([{"step": 1, "lr": 1.0}], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/a": 0.5}\n{"step": 2, "loss')
    log = MetricsLog(path, 5)
    log.write({"step": 2, "loss/a": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss/a": 0.5},
        {"step": 2, "loss/a": 0.25},
    ]


# --- where the time goes ----------------------------------------------------------------------------------------------


def test_the_clock_charges_each_phase_with_what_it_took():
    clock = StepClock(torch.device("cpu"))
    for _ in range(3):
        time.sleep(0.01)
        clock.mark("data")
        time.sleep(0.03)
        clock.mark("forward")
        clock.mark("backward")
    seconds = clock.read()
    assert seconds["data"] >= 0.03 and seconds["forward"] >= 0.09
    assert seconds["backward"] < 0.01 < seconds["data"] < seconds["forward"]
    assert clock.read() == seconds


@pytest.mark.parametrize(
    "seconds, words",
    [
        ({"data": 6.1, "forward": 2, "backward": 1.9, "other": 90}, "data-bound: 61% of a step is waiting for data"),
        ({"data": 1, "teacher": 5, "forward": 4}, "teacher-bound: 50% of a step is the teacher; write its labels once"),
        ({"transfer": 3, "forward": 1}, "transfer-bound: 75%"),
        ({"data": 1, "teacher": 1, "preprocess": 1, "forward": 3, "backward": 4}, "compute-bound: 80% of a step"),
    ],
)
def test_the_verdict_names_what_bounds_the_steps(seconds, words):
    assert verdict(Counter(seconds)).startswith(words)


def test_a_run_whose_data_is_slow_is_called_data_bound(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_metrics, "plot_curves", lambda lines, path: None)
    config = make_config(tmp_path / "run", steps=25, log_every=5, batch_size=8)

    def slow(step: int):
        for batch in passes(step):
            time.sleep(0.02)
            yield batch

    train_points(config, make_batches=slow)
    out = capsys.readouterr().out
    assert out.count("data-bound: ") == 2  # after 20 steps, and at the end
    assert " s a step, 0:00:00 to go" in out
    for line in (json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()):
        assert line["time/data"] >= 0.02
        phases = ["transfer", "preprocess", "forward", "backward", "optimizer"]
        assert all(0 < line[f"time/{phase}"] < line["time/data"] for phase in phases)
        assert line["time/samples_per_s"] < 8 / 0.02


# --- the errors of each slot and dataset ------------------------------------------------------------------------------


def test_errors_are_logged_for_each_slot_and_dataset(tmp_path, monkeypatch):
    """Means over the valid ones of all steps since the last line."""
    monkeypatch.setattr(run_metrics, "plot_curves", lambda lines, path: None)
    config = make_config(tmp_path / "run", steps=4, log_every=2, accumulation_steps=2)
    errors, masks = [], []

    def rename(raw):
        return replace(raw, masks={LATENT: raw.masks["a"], "b": raw.masks["b"]})

    class Renamed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.core = Regression()

        def forward(self, batch):
            found = self.core(batch)
            if torch.is_grad_enabled():
                errors.append(found["a"].detach().clone())
                masks.append(batch.masks[LATENT])
            return {LATENT: found["a"], "b": found["b"]}

    train_points(config, module=Renamed(), prepare=rename, inputs=run.Inputs(["data/x", "me/y", "unread"]))
    lines = metrics_of(config.run_dir)
    for number, line in enumerate(lines):
        error, mask = (torch.cat(of[4 * number : 4 * number + 4]) for of in (errors, masks))
        for slot in range(5):
            assert line[f"slot/latent_{slot}"] == pytest.approx(masked_mean(error[:, slot], mask[:, slot]).item())
        assert "slot/b_0" not in line
        for index, dataset in enumerate(["data/x", "me/y"]):
            expected = masked_mean(error[index::2], mask[index::2]).item()
            assert line[f"loss/latent_of_{dataset}"] == pytest.approx(expected)
        assert "loss/latent_of_unread" not in line


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    config = make_config(tmp_path / "run", trackers=("tensorboard", "wandb"))
    with pytest.raises(ValueError, match="--trackers tensorboard wandb: not installed here: pip install tensorboard w"):
        run.start_run(config)[0]


def train_tracked(config, **options):
    """A run that is stopped after step 4 and resumed, so that step 4 is sent twice."""

    class Stop(Exception):
        pass

    def stop(step: int):
        if step == 5:
            raise Stop
        return {}

    config.run_dir.rmdir()  # a new run makes its own
    with pytest.raises(Stop):
        train_points(config, run.start_run(config)[0], after_step=stop)
    time.sleep(1)  # wandb names its files by the second: two runs within one would share them
    resumed = replace(config, resume=True)
    accelerator, resume_from = run.start_run(resumed)
    train_points(resumed, accelerator, resume_from=resume_from)


@pytest.mark.slow
def test_tensorboard_gets_the_lines_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path / "run", steps=7, save_every=3, trackers=("tensorboard",))
    train_tracked(config)
    events = EventAccumulator(str(config.run_dir / "tensorboard" / "smolvla_shared")).Reload()
    lines = metrics_of(config.run_dir)
    assert {"loss/a", "lr", "grad_norm", "samples", "time/forward"} <= set(events.Tags()["scalars"])
    for key in ("loss/a", "lr", "grad_norm"):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3, 4, 5, 6, 7]
        assert [event.value for event in events.Scalars(key)] == pytest.approx([line[key] for line in lines])


@pytest.mark.slow
def test_wandb_works_offline(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(tmp_path / "run", steps=7, save_every=3, trackers=("wandb",))
    train_tracked(config)
    sent, runs = {}, set()
    for path in sorted((config.run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while data := store.scan_data():
            record = Record.FromString(data)
            runs |= {record.run.run_id} if record.HasField("run") else set()
            if record.HasField("history"):
                values = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                sent[values["_step"]] = values
    assert len(runs) == 1  # the resumed run goes on with it
    for line in metrics_of(config.run_dir):
        assert sent[line["step"]]["loss/a"] == pytest.approx(line["loss/a"])


@pytest.mark.slow
def test_trackio_gets_the_lines_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = make_config(tmp_path / "run", steps=3, trackers=("trackio",))
    config.run_dir.rmdir()  # a new run makes its own
    train_points(config, run.start_run(config)[0])
    import sqlite3

    [database] = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3]
    assert json.loads(rows[2][1])["loss/a"] == pytest.approx(metrics_of(config.run_dir)[2]["loss/a"])
