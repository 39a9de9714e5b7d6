"""`python train.py` on a damaged folder: it trains to the end, or stops with one clear line."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import TINY, environment, start, train
from conftest import ROOT
from damaged import damage, write_folder
from processes import descendants, processes, workers
from tiny_shards import audio, clip, noise, write_shards


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Damage a folder in many ways at once: the index of before, the clips lost with shards, and the bad ones."""
    index = write_folder(tmp_path_factory.mktemp("damaged") / "theirs")
    return index, *damage(index)


def settings(shards, run: str, *more: str) -> list[str]:
    return [*TINY, "data=folder", f"data.shards={shards}", f"hydra.run.dir={run}", *more]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ends_within(process: subprocess.Popen, seconds: float) -> str:
    """Wait for a run and all its processes to end; returns what it printed."""
    family = set(descendants(process.pid)) | {process.pid}
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        for pid in family & set(processes()):
            os.kill(pid, signal.SIGKILL)
    return output


def wait_for_steps(process: subprocess.Popen, run: Path, num_steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").exists() or len(table(run / "metrics.csv")) < num_steps:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.faults("D1", "D4", "D5", "D8")
def test_a_folder_damaged_in_many_ways_trains_to_the_end_on_two_ranks_and_every_clip_is_accounted_for(
    damaged, tmp_path
):
    """D1, D4, D5, D8, D11: stopped within the first epoch and resumed, so that the accounts go on."""
    index, lost, bad = damaged
    common = settings(index.path.parent, "run", "data.damaged_shards=skip", "data.max_bad_fraction=0.6", "trace=true")
    common += ["trainer.devices=2", "data.crop_seconds=0.7", "data.num_workers=1"]
    train(*common, "trainer.max_steps=4", cwd=tmp_path)
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    output = train(*common, "trainer.max_steps=20", "ckpt=last", cwd=tmp_path)
    second = json.loads((tmp_path / "run" / "results.json").read_text())
    num_bad, num_good = len(bad), 96 - len(lost) - len(bad)
    assert first["clips"]["trained"] + first["clips"]["skipped"] == 32 == 65 - first["clips"]["not_reached"]
    assert first["visits"]["trained"] == first["clips"]["trained"]
    expected = {"in_the_index": 96, "trained": num_good, "skipped": num_bad, "lost": len(lost), "not_reached": 0}
    assert second["clips"] == expected | {"held_out": 0, "not_chosen": 0, "held_out_unreadable": 0}
    assert sum(second["visits"].values()) == 20 * 8
    assert f"96 clips in the index = {num_good} trained + {num_bad} skipped + {len(lost)} lost" in output
    files = [tmp_path / "run" / name for name in ("trace.csv", "trace-rank=1.csv")]
    trained = [key for file in files for row in table(file) for key in row["keys"].split(" ") if key]
    names = {index.key(i).replace("with space", "with"): i for i in range(96)}  # a trace's keys are parted by blanks
    assert {names[key] for key in trained if key != "space"} == set(range(96)) - lost - set(bad)
    ledgers = [table(tmp_path / "run" / name) for name in ("bad_clips.csv", "bad_clips_rank1.csv")]
    listed = [{row["key"] for row in rows} for rows in ledgers]
    assert listed[0] | listed[1] == {index.key(i) for i in lost | set(bad)}
    assert all(
        len(rows) == len(keys) and all(row["reason"] for row in rows)
        for rows, keys in zip(ledgers, listed, strict=True)
    )


@pytest.mark.faults("D4", "D8")
def test_the_same_folder_stops_at_once_in_one_line_unless_told_to_go_on(damaged, tmp_path):
    """D4, D8: the default."""
    output = train(*settings(damaged[0].path.parent, "run", "trainer.max_steps=4"), cwd=tmp_path, expect=2)
    assert "part-1.tar has" in output and "data.damaged_shards=skip" in output and output.count("\n") == 1


@pytest.mark.faults("D3")
def test_a_limit_passed_on_one_rank_stops_both_in_the_same_step_with_one_line(damaged, tmp_path):
    """D3 on two ranks: 31 clips are lost, 12 are bad, and 40 of 96 would be allowed."""
    more = ["data.damaged_shards=skip", "data.max_bad_fraction=0.42", "trainer.devices=2", "trainer.max_steps=1000"]
    process = start(*settings(damaged[0].path.parent, "run", *more), cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run", 1)
    output = ends_within(process, 60)
    assert process.returncode == 2, output[-4000:]
    lines = [line for line in output.replace("\r", "\n").splitlines() if "could not be read" in line]
    assert len(lines) == 1 and "of 96 clips could not be read, more than the limit of 0.42" in lines[0]
    assert "Traceback" not in output


def small_shards(folder: Path, num_shards: int) -> Path:
    clips = [[clip(f"s{s:02d}c{i}", audio(noise(s, 5600)), 5600) for i in range(2)] for s in range(num_shards)]
    return Path(write_shards(folder, clips))


@pytest.mark.faults("D8")
@pytest.mark.slow
def test_a_shard_deleted_in_the_middle_of_an_epoch_ends_both_ranks_with_its_name(tmp_path):
    """D8: more shards than are kept open."""
    shards = small_shards(tmp_path / "s", 100)
    process = start(*settings(shards, "run", "trainer.devices=2", "trainer.max_steps=10000"), cwd=tmp_path)
    wait_for_steps(process, tmp_path / "run", 1)
    for path in shards.glob("*.tar"):
        path.unlink()
    started = time.monotonic()
    output = ends_within(process, 60)
    assert time.monotonic() - started < 30
    assert process.returncode not in (0, None)
    assert "cannot be read: No such file or directory; bring it back and resume" in output


def run_with_a_worker_signalled(folder: Path, name: str) -> tuple[list[str], str, float]:
    """Signal the worker of a run under way; returns its arguments, what it printed, and how long it took to end."""
    shards = small_shards(folder / "s", 2)
    arguments = settings(shards, "run", "data.num_workers=1", "data.timeout_seconds=5", "checkpoint.every_steps=2")
    process = start(*arguments, "trainer.max_steps=100000", cwd=folder)
    wait_for_steps(process, folder / "run", 3)
    (worker,) = workers(process.pid)
    os.kill(worker, signal.Signals[name])
    started = time.monotonic()
    output = ends_within(process, 60)
    assert process.returncode == 2, output[-4000:]
    assert worker not in processes()
    return arguments, output, time.monotonic() - started


@pytest.mark.faults("D9")
@pytest.mark.slow
def test_a_worker_that_stands_still_ends_the_run_in_time_with_the_shards_it_may_hang_on(tmp_path):
    """D9, F28: stopped altogether, it neither answers nor hears."""
    _, output, seconds = run_with_a_worker_signalled(tmp_path, "SIGSTOP")
    assert seconds < 5 + 10
    assert "no batch within 5 s: a worker hangs reading one of" in output and "shard-000000.tar" in output


@pytest.mark.faults("D14")
@pytest.mark.slow
def test_a_run_whose_worker_was_killed_says_so_and_goes_on_where_it_was(tmp_path):
    """D14."""
    arguments, output, seconds = run_with_a_worker_signalled(tmp_path, "SIGKILL")
    assert seconds < 15
    assert "exited unexpectedly" in output and "data.num_workers" in output and "ckpt=last" in output
    step = max(int(path.stem.partition("=")[2]) for path in (tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))
    output = train(*arguments, "ckpt=last", f"trainer.max_steps={step + 2}", cwd=tmp_path)
    assert f"{(step + 2) * 4} crops = {(step + 2) * 4} trained + 0 skipped" in output


@pytest.mark.faults("D10")
def test_a_corpus_without_one_readable_clip_ends_in_one_line(tmp_path):
    """D10, F27: with limits that allow everything."""
    shards = write_shards(tmp_path / "s", [[clip(f"k{i}", b"no audio", 900) for i in range(12)]])
    more = ["data.max_bad_fraction=1", "data.max_bad_in_a_row=1000000", "trainer.max_steps=100000"]
    output = train(*settings(shards, "run", *more), cwd=tmp_path, expect=2)
    assert "0 samples from 1 shards: none of the 12 clips could be read: k" in output


OBEYING = """
import runpy, sys
sys.path.insert(0, {tests!r})
from toy_faults import give_up_overriding_modes
give_up_overriding_modes()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.faults("D8")
@pytest.mark.slow
def test_a_shard_that_may_not_be_read_is_named_at_the_start(tmp_path):
    """D8: by any user, and by root where root obeys modes."""
    shards = small_shards(tmp_path / "s", 3)
    (shards / "shard-000001.tar").chmod(0)
    arguments = settings(shards, "run", "trainer.max_steps=3", "data.max_bad_fraction=0.4")
    script = OBEYING.format(tests=str(ROOT / "tests"))

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, str(ROOT / "train.py"), *arguments, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)

    done = run()
    assert done.returncode == 2, done.stderr
    assert "shard-000001.tar may not be read" in done.stderr and done.stderr.count("\n") == 1
    done = run("data.damaged_shards=skip")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["clips"]["lost"] == 2
    assert {row["reason"] for row in table(tmp_path / "run" / "bad_clips.csv")} == {"its shard is not readable"}
