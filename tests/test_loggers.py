"""metrics.csv survives a resume, and a broken logger does not cost the run."""

import csv
import tracemalloc

import pytest
from lightning.pytorch.loggers import Logger

from audiossl.running.loggers import Guarded, MetricsCsv


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_keep_full_precision_and_merge_within_a_step(tmp_path):
    metrics = MetricsCsv(tmp_path)
    for step in range(3):
        metrics.log_metrics({"loss": 1 / (step + 3), "epoch": 0}, step)
        metrics.save()
    metrics.log_metrics({"val_loss": 0.1}, 2)
    metrics.save()
    rows = read(tmp_path / "metrics.csv")
    assert [float(r["loss"]) for r in rows] == [1 / 3, 1 / 4, 1 / 5]
    assert [r["val_loss"] for r in rows] == ["", "", "0.1"] and "epoch" not in rows[0]


@pytest.mark.faults("P12")
def test_a_resumed_run_keeps_the_history_and_redoes_only_what_was_lost(tmp_path):
    first = MetricsCsv(tmp_path)
    for step in range(6):
        first.log_metrics({"loss": float(step)}, step)
        first.save()
    second = MetricsCsv(tmp_path)
    second.start_at(4)
    for step in range(4, 9):
        second.log_metrics({"loss": 10.0 + step}, step)
        second.save()
    rows = read(tmp_path / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(9))
    assert [float(r["loss"]) for r in rows] == [0, 1, 2, 3, 14, 15, 16, 17, 18]


@pytest.mark.faults("P12", "R10")
def test_a_long_history_stays_on_disk_and_takes_late_numbers_and_new_columns(tmp_path):
    metrics = MetricsCsv(tmp_path)
    sizes = []
    for step in range(1200):
        metrics.log_metrics({"loss": step / 3}, step)
        metrics.save()
        if step == 200:
            tracemalloc.start()
        if step in (300, 1199):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < sizes[0] + 10_000, "bytes held grow with the steps"
    metrics.log_metrics({"val_loss": 0.5}, 7)
    metrics.log_metrics({"loss": 2.0}, 1200)
    metrics.save()
    rows = read(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1201))
    assert [float(row["loss"]) for row in rows] == [*(step / 3 for step in range(1200)), 2.0]
    assert {row["step"]: row["val_loss"] for row in rows if row["val_loss"]} == {"7": "0.5"}


def test_a_row_cut_by_a_kill_is_forgotten(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,lr\n0,1.0,0.1\n1,0.9")
    metrics = MetricsCsv(tmp_path)
    metrics.log_metrics({"loss": 0.5, "lr": 0.1}, 1)
    metrics.save()
    assert [r["loss"] for r in read(tmp_path / "metrics.csv")] == ["1.0", "0.5"]


class Unreachable(Logger):
    """Fail as a logging service does that went away."""

    name, version = "unreachable", ""
    calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        raise ConnectionError("no route to host")

    def log_hyperparams(self, params):
        raise ConnectionError("no route to host")


@pytest.mark.faults("P11", "P8")
def test_a_logger_that_fails_is_switched_off_once_with_a_line(caplog):
    inner = Unreachable()
    guarded = Guarded(inner)
    guarded.log_metrics({"loss": 1.0}, 0)
    guarded.log_metrics({"loss": 1.0}, 1)
    assert inner.calls == 1
    assert [r.getMessage() for r in caplog.records] == [
        "Unreachable failed and is switched off for this run: no route to host"
    ]
