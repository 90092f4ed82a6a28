"""metrics.py: metrics.jsonl survives a kill, curves are drawn, and where a step's time goes is told in words."""

from smolvla_shared.metrics import MetricsLog, plot_curves


def test_a_log_is_cut_at_the_step_of_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss/a": 0.5})
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4]
    assert [line["step"] for line in MetricsLog(log.path, 2).read()] == [1, 2]
    assert MetricsLog(log.path, 0).read() == []


def test_curves_are_drawn(tmp_path):
    metrics = [{"step": 1, "loss/a": 1.0}, {"step": 2, "loss/a": 0.5, "val/a": 0.7, "lr": 1e-3}]
    plot_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_curves([{"step": 1, "lr": 1.0}], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
