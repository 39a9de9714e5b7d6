"""A sweep that was stopped goes on, its failed points are run alone, and an array job runs one point of it."""

import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_settings import run_app
from test_sweeps import make_job, rows_of

from audiossl.__main__ import main
from audiossl.config.cli import launch
from audiossl.config.settings import plain_config
from audiossl.config.specs import PRETRAIN, PROBE
from audiossl.sweeping.status import read_jobs

RATIOS = "model.mask_ratio=0.7,0.8,0.9"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Give a function that runs `-m ARGUMENTS` in this process, and lists the points that it ran.

    A point whose ratio is in `fails` raises, one in `stops` is pre-empted as a training is.
    """
    monkeypatch.chdir(tmp_path)

    def run_sweep(*arguments, fails=(), stops=(), program="train.py"):
        ran = []

        def run(cfg):
            config = plain_config(cfg)
            ratio = config["model"]["mask_ratio"]
            ran.append(ratio)
            if ratio in fails:
                raise ValueError(f"unlucky at {ratio}")
            if ratio in stops:
                raise SystemExit(75)
            results = {"status": "finished", "loss": 0.5, "seconds": 1.0, "scores": {"linear": ratio - 0.1}}
            Path(config["run_dir"], "results.json").write_text(json.dumps(results))

        monkeypatch.setattr(sys, "argv", [program])
        try:
            code = launch("train", run, PRETRAIN, argv=[program, "-m", *arguments])
        except SystemExit as leaving:
            code = leaving.code
        return code, ran

    return run_sweep


def statuses(folder):
    return [row["status"] for row in rows_of(folder)]


def test_a_stopped_sweep_goes_on_and_leaves_out_what_is_finished(sweep, capsys):
    assert sweep(RATIOS, "hydra.sweep.dir=s", stops=[0.8]) == (75, [0.7, 0.8])
    assert (
        "to go on: python train.py -m model.mask_ratio=0.7,0.8,0.9 hydra.sweep.dir=s ckpt=last"
        in capsys.readouterr().err
    )
    assert sweep(RATIOS, "hydra.sweep.dir=s")[0] == 2 and "holds a sweep already" in capsys.readouterr().err
    assert sweep(RATIOS, "hydra.sweep.dir=s", "ckpt=last") == (0, [0.8, 0.9])
    assert statuses(Path("s")) == ["finished"] * 3
    assert sweep(RATIOS, "hydra.sweep.dir=s", "ckpt=last") == (0, [])


def test_failed_points_are_listed_and_run_alone_by_the_command_that_is_printed(sweep, capsys):
    assert sweep("seed=0", RATIOS, "hydra.sweep.dir=s", fails=[0.7, 0.9]) == (1, [0.7, 0.8, 0.9])
    out = capsys.readouterr().out
    assert "2 of 3 did not finish:\n  0: failed: ValueError: unlucky at 0.7\n  2: failed: ValueError: unlucky" in out
    command = shlex.split(out.partition("to run those alone:\n")[2].splitlines()[0])
    assert command[:3] == ["python", "train.py", "-m"] and command[-1] == "hydra.sweeper.only=[0,2]"
    assert sweep(*command[3:], fails=[0.9]) == (1, [0.7, 0.9])
    assert statuses(Path("s")) == ["finished", "finished", "failed: ValueError: unlucky at 0.9"]
    assert sweep(*command[3:-1], "hydra.sweeper.only=[2]") == (0, [0.9])
    assert statuses(Path("s")) == ["finished"] * 3


def test_a_sweep_does_not_go_on_with_other_points_nor_with_a_point_that_there_is_not(sweep, capsys):
    assert sweep(RATIOS, "hydra.sweep.dir=s")[0] == 0
    assert sweep("model.mask_ratio=0.7,0.85,0.9", "hydra.sweep.dir=s", "ckpt=last")[0] == 2
    assert (
        "s: holds a sweep of 3 other points (this one has 3; they differ from number 1 on)" in capsys.readouterr().err
    )
    assert sweep(RATIOS, "data.num_workers=3", "hydra.sweep.dir=s", "ckpt=last") == (0, [])
    assert sweep(RATIOS, "hydra.sweep.dir=new", "hydra.sweeper.only=[3]")[0] == 2
    assert "hydra.sweeper.only: 3 is no point of the sweep; it has 0 to 2" in capsys.readouterr().err
    assert not Path("new").exists()


def test_each_task_of_an_array_runs_its_point_and_the_last_one_writes_the_summary(sweep, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    folder = Path("runs/sweep_77")
    for task, ratio in ((2, 0.9), (0, 0.7)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert sweep(RATIOS, "ckpt=last") == (0, [ratio])
        assert not (folder / "summary.csv").exists()
    assert "point 0: finished; still to end: 1 of runs/sweep_77" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert sweep(RATIOS, "ckpt=last", stops=[0.8]) == (75, [0.8])
    assert not (folder / "summary.csv").exists()
    assert sweep(RATIOS, "ckpt=last", fails=[0.8]) == (1, [0.8])
    assert statuses(folder) == ["finished", "failed: ValueError: unlucky at 0.8", "finished"]
    out = capsys.readouterr().out
    assert "summary.csv" in out and "hydra.sweep.dir=runs/sweep_77 ckpt=last 'hydra.sweeper.only=[1]'" in out
    assert sweep(RATIOS, "ckpt=last") == (0, [0.8]) and statuses(folder) == ["finished"] * 3
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert sweep(RATIOS, "ckpt=last") == (2, [])
    line = "train.py: SLURM_ARRAY_TASK_ID=3: the sweep has 3 points; submit it with --array=0-2\n"
    assert capsys.readouterr().err == line


def test_the_last_task_of_an_array_too_small_names_the_points_that_have_not_run(sweep, monkeypatch, capsys):
    for name, value in dict(JOB_ID=78, TASK_MIN=0, TASK_MAX=1, TASK_COUNT=2).items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
    folder = Path("runs/sweep_78")
    for task, ratio in ((0, 0.7), (1, 0.8)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert not (folder / "summary.csv").exists() and sweep(RATIOS) == (0, [ratio])
    assert statuses(folder) == ["finished", "finished", "missing"]
    said = capsys.readouterr().out
    assert "the array had no task for points 2; submit the same command with --array=2 and hydra.sweep.dir=" in said
    assert "'hydra.sweeper.only=[2]'" in said


def test_a_sweep_within_a_sweeps_folder_is_none_of_its_points(sweep):
    assert sweep(RATIOS, "hydra.sweep.dir=s", stops=[0.7])[0] == 75
    assert sweep(RATIOS, "hydra.sweep.dir=s/old") == (0, [0.7, 0.8, 0.9])
    points = [[text] for text in ("model.mask_ratio=0.7", "model.mask_ratio=0.8", "model.mask_ratio=0.9")]
    assert [job["status"] for job in read_jobs(Path("s"), points).values()] == ["no results", "missing", "missing"]
    Path("s").rename("moved")
    assert [job["status"] for job in read_jobs(Path("moved/old"), points).values()] == ["finished"] * 3


def test_tasks_of_an_array_that_run_at_once_leave_one_whole_summary(tmp_path):
    def task(number):
        environ = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": str(number), "PYTHONUNBUFFERED": "1"}
        return run_app(tmp_path, "-m", RATIOS, "name=array", **environ)

    run_app(tmp_path, "--version")  # which writes the app
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(task, range(3)))
    assert [process.returncode for process in done] == [0] * 3, done
    assert statuses(tmp_path / "runs" / "sweep_5") == ["finished"] * 3
    assert sum("summary.csv" in process.stdout for process in done) >= 1
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"sweep_5"}


def test_a_sweep_of_probes_goes_on_by_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran, broken = [], {"b"}

    def run(cfg):
        ran.append(cfg.init)
        if cfg.init in broken:
            raise ValueError("no encoder")
        results = json.dumps({"status": "finished", "scores": {"linear": 0.5}})
        Path(cfg.run_dir, "results.json").write_text(results)

    words = ["-m", "init=a,b,c", "task=folder", "task.root=set", "hydra.sweep.dir=s"]
    command = ["probe.py", *words, "hydra.callbacks.summary._target_=audiossl.sweeps.Summary"]
    with pytest.raises(SystemExit):
        launch("probe", run, PROBE, argv=command)
    assert "ckpt" not in capsys.readouterr().out
    broken.clear()
    assert launch("probe", run, PROBE, argv=command) == 0
    assert ran == ["a", "b", "c", "b"] and statuses(Path("s")) == ["finished"] * 3


def test_a_fine_tuning_that_is_trained_but_not_tested_has_not_ended(tmp_path):
    for number, results in enumerate([{"status": "finished"}, {"status": "finished", "format": "audiossl finetune 1"}]):
        make_job(tmp_path / str(number), number, [f"seed={number}"], results)
        (tmp_path / str(number) / "finetune.yaml").write_text("seed: 0")
    jobs = read_jobs(tmp_path, [("seed=0", "ckpt=last"), ("seed=1", "ckpt=last"), ("seed=2", "ckpt=last")])
    assert [job["status"] for job in jobs.values()] == ["no results", "finished", "missing"]


def test_the_command_sweep_says_how_far_a_sweep_is(sweep, capsys):
    assert sweep(RATIOS, "hydra.sweep.dir=s", stops=[0.8])[0] == 75
    capsys.readouterr()
    assert main(["sweep", "s"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 did not finish:\n  1: no results\n  2: missing\n" in out and "'hydra.sweeper.only=[1,2]'" in out
    assert main(["sweep", "."]) == 2 and "holds no sweep" in capsys.readouterr().err


def test_a_sweep_whose_files_a_crash_has_emptied_goes_on(sweep, capsys):
    assert sweep(RATIOS, "hydra.sweep.dir=s")[0] == 0
    Path("s/1/results.json").write_text("")
    Path("s/multirun.yaml").unlink()
    assert main(["sweep", "s"]) == 0 and "1: no results" in capsys.readouterr().out
    assert sweep(RATIOS, "hydra.sweep.dir=s", "ckpt=last") == (0, [0.8])
    for broken in ("", "[]", '{"a": 1}', '{"points": 5, "command": []}'):
        Path("s/sweep.json").write_text(broken)
        assert main(["sweep", "s"]) == 2 and "broken" in capsys.readouterr().err


def test_a_sweep_with_a_password_on_its_command_line_keeps_none_and_goes_on(sweep):
    given = [
        RATIOS,
        "hydra.sweep.dir=s",
        "data.cache_dir=https://me:planted@host/x",
        "+hydra.job.env_set.A_TOKEN=planted",
    ]
    assert sweep(*given, stops=[0.8]) == (75, [0.7, 0.8])
    files = [path for path in Path("s").rglob("*") if path.is_file()]
    assert {"sweep.json", "multirun.yaml", "hydra.yaml"} <= {path.name for path in files}
    assert not [path for path in files if b"planted" in path.read_bytes()]
    assert sweep(*given, "ckpt=last") == (0, [0.8, 0.9])
    assert statuses(Path("s")) == ["finished"] * 3 and main(["sweep", "s"]) == 0


@pytest.mark.slow
def test_a_sweep_by_submitit_ends_with_its_table_and_goes_on_with_its_failed_point(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    local = ("-m", "hydra/launcher=submitit_local", "seed=1,13,3", "hydra.sweep.dir=s")
    done = run_app(tmp_path, *local)
    assert done.returncode == 1, done.stderr
    assert statuses(tmp_path / "s") == ["finished", "failed: ValueError: unlucky", "finished"]
    again = run_app(tmp_path, *local, "ckpt=last")
    assert again.returncode == 1 and "2 of 3 points are finished already: 0, 2" in again.stdout
    assert sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir() and path.name[0] != ".") == list(
        "012"
    )
