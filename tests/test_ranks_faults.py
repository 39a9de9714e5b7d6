"""One of two ranks is killed, stopped, or fails: the other ends in time and says whose fault it was."""

import os
import signal
import time

import pytest
from fits import column, run, start
from methods import settings_of
from tiny_shards import ragged_corpus

from audiossl.checkpoints.files import newest_valid, step_of


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    shards = ragged_corpus(tmp_path_factory.mktemp("ragged"))
    data = ["data=folder", f"data.shards={shards}", "data.validation_clips=0", "frontend.seconds=0.64"]
    small = ["frontend.num_mels=64", "checkpoint.every_steps=2", "data.batch_size=2", "trainer.max_steps=9"]
    return [*settings_of("audiomae"), *data, *small]


def check_resume(folder, settings, *, step: int) -> None:
    """No more than `every_steps` are lost, and the run goes on to its end."""
    assert step_of(newest_valid(folder / "checkpoints")) >= step - 2
    run(folder, *settings, ranks=2, ckpt="must")
    assert [step for step, _ in column(folder, "loss")] == list(range(9))
    assert not list((folder / "ranks").iterdir())


@pytest.mark.faults("X6")
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_of_a_killed_rank_says_which_is_gone_and_a_resume_goes_on(settings, tmp_path, victim):
    runs = start(tmp_path, *settings, ranks=2, fault={"do": "kill", "step": 5, "rank": victim})
    started = time.monotonic()
    codes = [one.wait(60) for one in runs]
    assert time.monotonic() - started < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert f"rank {victim} (process {runs[victim].pid} on {os.uname().nodename}) is gone" in runs[1 - victim].output()
    check_resume(tmp_path, settings, step=5)


@pytest.mark.faults("X8", "P8")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_on_one_rank_is_what_both_say_first(settings, tmp_path, victim):
    runs = start(tmp_path, *settings, ranks=2, fault={"do": "raise", "step": 5, "rank": victim})
    assert [one.wait(60) for one in runs] == [1, 1]
    own, other = runs[victim].output(), runs[1 - victim].output()
    assert own.index(f"rank {victim} failed: ValueError: the fault of this test") < own.index("Traceback")
    assert other.index(f"rank {victim} failed first: ValueError: the fault of this test") < other.index("Traceback")
    check_resume(tmp_path, settings, step=5)


@pytest.mark.faults("X8")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_users_error_on_one_rank_ends_both_at_once_and_both_say_what_it_was(settings, tmp_path, victim):
    runs = start(tmp_path, *settings, ranks=2, fault={"do": "user error", "step": 5, "rank": victim})
    assert [one.wait(60) for one in runs] == [2, 2], runs[1 - victim].output()
    own, other = runs[victim].output(), runs[1 - victim].output()
    assert "train.py: data.shards=x: the fault of this test; give another" in own
    assert f"train.py: rank {victim}: data.shards=x: the fault of this test; give another" in other
    assert "Traceback" not in own + other
    ended = [(tmp_path / f"{one.name}.code").stat().st_mtime for one in runs]
    assert abs(ended[0] - ended[1]) < 15, "the other waited"
    check_resume(tmp_path, settings, step=5)


@pytest.mark.slow
@pytest.mark.faults("X7")
def test_a_first_rank_that_draws_for_longer_than_the_time_out_is_waited_for(settings, tmp_path):
    more = ["trainer.timeout_seconds=4.0", "pictures.clips=1", "pictures.every_steps=3", "data.validation_clips=2"]
    runs = run(tmp_path, *settings, *more, ranks=2, fault={"do": "rest", "step": 2, "at": "pictures", "rank": 0})
    assert not any("Timeout (" in one.output() for one in runs)
    assert len(list((tmp_path / "pictures").glob("step=*.png"))) >= 3 and (tmp_path / "results.json").exists()


@pytest.mark.faults("X7")
def test_a_rank_that_never_comes_is_given_up_after_the_time_of_the_start(settings, tmp_path):
    config = ["trainer.startup_timeout_seconds=4.0"]
    first, second = start(tmp_path, *settings, *config, ranks=2)
    os.kill(second.pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        assert first.wait(60) == 1
        assert time.monotonic() - started < 4 + 15
    finally:
        os.kill(second.pid, signal.SIGKILL)
    assert "DistStoreError" in first.output() or "imed out" in first.output(), first.output()


@pytest.mark.faults("X7")
def test_a_rank_that_stands_still_is_given_up_in_time_with_the_stacks_of_the_others(settings, tmp_path):
    more = [*settings, "trainer.timeout_seconds=6.0"]
    runs = start(tmp_path, *more, ranks=2, fault={"do": "stop", "step": 5, "rank": 1})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoints" / "step=000000004.ckpt").exists():
            assert time.monotonic() < deadline, runs[0].output()
            time.sleep(0.05)
        started = time.monotonic()
        assert runs[0].wait(60) == 1
        assert time.monotonic() - started < 6 + 15
    finally:
        os.kill(runs[1].pid, signal.SIGKILL)
    said = runs[0].output()
    assert f"rank 1 (process {runs[1].pid} on" in said and "hangs" in said
    assert "Timeout (" in said and "most recent call first" in said and "training_step" in said
    check_resume(tmp_path, settings, step=5)
