"""Real runs in which something fails, is damaged or is in the way: what they say, and that a resume ends the same."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import metrics
from fits import assert_same_run, column, run, start
from methods import settings_of

from audiossl.checkpoints.files import newest_valid, step_of
from audiossl.checkpoints.runlock import locked
from audiossl.errors import UserError

SMALL = (*settings_of("audiomae"), "data.batch_size=2", "data.fraction=0.1", "data.validation_clips=4")
SETTINGS = (*SMALL, "trainer.max_steps=8", "validate_every_steps=3", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(folder, *SETTINGS)
    return folder


@pytest.mark.faults("P8")
@pytest.mark.parametrize("at", ["training_step", "callback", "validation", "backward", "logger"])
def test_an_exception_anywhere_is_shown_and_a_resume_ends_as_undisturbed(straight, tmp_path, at):
    (failed,) = run(tmp_path, *SETTINGS, fault={"do": "raise", "step": 5, "at": at}, expect=1)
    errors = [line for line in failed.output().splitlines() if "Error" in line and not line.startswith(" ")]
    assert errors[0] == "ValueError: the fault of this test"
    run(tmp_path, *SETTINGS, ckpt="must")
    # a validation that was cut short is not repeated, and so not counted
    assert_same_run(straight, tmp_path, 8, but=("loops", "callbacks") if at == "validation" else ())


@pytest.mark.faults("P8", "P11")
def test_a_logger_of_others_that_fails_is_switched_off_with_a_line_and_the_run_ends_as_undisturbed(straight, tmp_path):
    fault = {"do": "raise", "step": 5, "at": "tensorboard"}
    (one,) = run(tmp_path, *SETTINGS, "logger=default", fault=fault)
    line = "TensorBoardLogger failed and is switched off for this run: the fault of this test"
    assert one.output().count(line) == 1
    assert_same_run(straight, tmp_path, 8)


@pytest.mark.faults("P7")
@pytest.mark.parametrize("do, at", [("nan", "training_step"), ("inf", "update")])
def test_a_step_that_is_not_finite_is_not_applied_and_its_clips_are_kept(tmp_path, do, at):
    (failed,) = run(tmp_path, *SETTINGS, "checkpoint.every_steps=1", fault={"do": do, "step": 5, "at": at}, expect=1)
    record = torch.load(tmp_path / "nonfinite-step=000000005.pt", weights_only=True)
    saved = torch.load(newest_valid(tmp_path / "checkpoints"), weights_only=True)
    assert saved["global_step"] == record["step"] == 5 and len(record["keys"]) == 2 and record["losses"]
    for name, value in record["weights"].items():  # as they were when the run ended
        assert torch.equal(value, saved["state_dict"][f"method.{name}"]) and value.isfinite().all(), name
    assert "NonFiniteError: step 5" in failed.output()


@pytest.mark.faults("P7")
def test_a_nan_on_one_rank_stops_both_before_the_update(tmp_path):
    given = [*SETTINGS, "checkpoint.every_steps=1"]
    runs = start(tmp_path, *given, ranks=2, fault={"do": "nan", "step": 5, "rank": 1})
    assert [one.wait(120) for one in runs] == [1, 1]
    assert all("NonFiniteError: step 5" in one.output() for one in runs)
    assert step_of(newest_valid(tmp_path / "checkpoints")) == 5
    records = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("nonfinite-step=000000005*.pt"))]
    assert len(records) == 2 and not any(loss == loss for loss in records[1]["losses"])


@pytest.mark.faults("P10", "X10", "R12")
def test_a_checkpoint_of_another_experiment_is_refused_with_what_differs(straight):
    cases = {
        "seed=3": "seed: 0 -> 3",
        "data.batch_size=4": "global_batch: 2 -> 4; give the settings it was made with (here data.batch_size=2 keeps",
        "trainer.accumulate_grad_batches=4": "needs devices x accumulation to divide it; here they are 4)",
        "model.mask_ratio=0.5": "model.mask_ratio: 0.8 -> 0.5",
        "optim.weight_decay=0.5": "optim.weight_decay: 0.05 -> 0.5",
        "data.fraction=0.2": "data.fraction: 0.1 -> 0.2",
    }
    for override, said in cases.items():  # one after the other: of several at once the lock refuses all but one
        (one,) = start(straight, *SETTINGS, override, ckpt="last")
        assert one.wait(120) == 2 and said in one.output(), one.output()


@pytest.mark.faults("P16")
def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    (first,) = start(tmp_path, *SETTINGS, fault={"do": "stop", "step": 5})
    deadline = time.monotonic() + 60
    while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # stopped
        assert time.monotonic() < deadline, first.output()
        time.sleep(0.05)
    before = (tmp_path / "metrics.csv").read_bytes()
    (second,) = run(tmp_path, *SETTINGS, ckpt="last", expect=2)
    assert f"is in use by process {first.pid} on " in second.output() and "job none" in second.output()
    assert (tmp_path / "metrics.csv").read_bytes() == before
    first.kill()
    assert first.wait() == -signal.SIGKILL
    (third,) = run(tmp_path, *SETTINGS, ckpt="last")
    assert f"left by process {first.pid}" in third.output() and len(metrics(tmp_path)) == 8
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.faults("C7")
def test_a_run_folder_that_takes_no_file_is_one_line_with_the_way_out(tmp_path):
    (tmp_path / "run.lock").mkdir()  # what stands in the way of the lock, for root too
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written into: Is a directory; .* hydra.run.dir="):
        with locked(tmp_path):
            raise AssertionError("the run began")


@pytest.mark.faults("C7")
def test_room_for_all_that_a_checkpoint_will_hold_is_asked_for_before_the_first_step(tmp_path):
    """A teacher, two moments and an average of the weights; the first checkpoints, without the average, would fit."""
    given = [*settings_of("atst_frame"), "model.width=96", *SMALL[len(settings_of("audiomae")) :]]
    given += ["trainer.max_steps=2", "swa.unit=steps", "swa.start=2", "swa.every=1"]
    run(tmp_path / "wide", *given)
    size = (tmp_path / "wide" / "checkpoints" / "last.ckpt").stat().st_size
    (narrow,) = start(tmp_path / "narrow", *given, fault={"disk": int(0.9 * size)})
    if (code := narrow.wait(120)) == 99:
        pytest.skip("a tmpfs of one's own needs a mount namespace, which this container or user may not make")
    found = re.search(r"a checkpoint takes (\d+) \(weights .*, the optimiser's moments .*, averages", narrow.output())
    assert code == 2 and found and 0.95 * size < int(found[1]) < size, narrow.output()
    assert column(tmp_path / "narrow", "loss") == []


@pytest.mark.faults("P16")
def test_a_lock_names_the_job_and_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with locked(tmp_path), pytest.raises(UserError, match="in use by process .* job 4711"), locked(tmp_path):
        raise AssertionError("both hold the lock")
    with locked(tmp_path):
        assert (tmp_path / "run.lock").exists()
    assert list(tmp_path.iterdir()) == []
