"""A sweep ends with a table and a picture of its jobs, also when some of them fail."""

import csv
import json

from conftest import ROOT
from matplotlib.image import imread
from test_settings import run_app

from audiossl.sweeps import summarise


def rows_of(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_ends_with_a_table_and_a_picture_of_the_probe_score(tmp_path):
    done = run_app(tmp_path, "-m", "model.mask_ratio=0.7,0.8,0.9", "frontend.hop_ms=10,5", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "sweep")
    assert [row["job"] for row in rows] == list("012345")
    assert [row["model.mask_ratio"] for row in rows] == ["0.7", "0.7", "0.8", "0.8", "0.9", "0.9"]
    assert [row["frontend.hop_ms"] for row in rows] == ["10", "5"] * 3
    assert {row["status"] for row in rows} == {"finished"} and float(rows[5]["linear"]) == 0.9 - 0.1
    picture = imread(tmp_path / "sweep" / "summary.png")
    assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.01
    assert "mask_ratio" in done.stdout and "summary.csv" in done.stdout


def test_a_failing_job_is_a_row_and_the_others_still_run(tmp_path):
    done = run_app(tmp_path, "-m", "seed=13,1", "trainer.max_time=00:01:00:00", "hydra.sweep.dir=sweep")
    assert done.returncode == 1 and "ValueError: unlucky" in done.stderr
    rows = rows_of(tmp_path / "sweep")
    assert [(row["seed"], row["status"]) for row in rows] == [("13", "failed: ValueError: unlucky"), ("1", "finished")]
    again = run_app(tmp_path, "-m", "seed=1,2", "hydra.sweep.dir=sweep")
    assert again.returncode == 2 and "sweep: holds a sweep already" in again.stderr


def test_preemption_ends_the_sweep_with_its_code(tmp_path):
    done = run_app(tmp_path, "-m", "name=preempted,later", "hydra.sweep.dir=sweep")
    assert done.returncode == 75 and not (tmp_path / "sweep" / "1").exists()


def make_job(folder, number, overrides, results):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "hydra.yaml").write_text(f"hydra: {{job: {{num: {number}}}}}")
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))


def test_jobs_come_by_number_and_missing_ones_are_rows_too(tmp_path):
    ratios = [0.1 * n for n in range(12)]
    planned = [(f"model.mask_ratio={r:.1f}", "seed=1") for r in ratios]
    for number in (10, 2, 0):
        finished = {"status": "finished", "scores": {"knn": 0.1, "task": "esc10"}, "loss": 1.0, "seconds": 2}
        overrides = [f"++model.mask_ratio={ratios[number]:.1f}", "seed=1"]
        make_job(tmp_path / f"job{number}", number, overrides, None if number == 2 else finished)
    rows = summarise(tmp_path, planned)
    assert [row["job"] for row in rows] == list(range(12))
    status = {row["job"]: row["status"] for row in rows}
    assert (status[0], status[1], status[2], status[10]) == ("finished", "missing", "no results", "finished")
    assert "seed" not in rows[0] and rows[10]["model.mask_ratio"] == "1.0" and rows[10]["knn"] == 0.1
    assert (tmp_path / "summary.png").exists()


def test_losses_of_different_ratios_are_not_drawn_but_those_of_rates_are(tmp_path, capsys):
    for name, key in (("ratios", "model.mask_ratio"), ("rates", "optim.lr")):
        for number in range(2):
            results = {"status": "finished", "loss": 0.5, "seconds": 1, "scores": {}}
            make_job(tmp_path / name / str(number), number, [f"{key}=0.{number + 1}"], results)
        summarise(tmp_path / name)
    assert not (tmp_path / "ratios" / "summary.png").exists() and (tmp_path / "rates" / "summary.png").exists()
    printed = capsys.readouterr().out
    assert "cannot be compared" in printed and "ratios: summary.csv\n" in printed
    assert "rates: summary.csv, summary.png\n" in printed
    assert len(rows_of(tmp_path / "ratios")) == 2 and ROOT.exists()
