"""What is left on disk when a run dies, the disk fills or the weights turn NaN, and what a run keeps."""

import os
import random
import re
import tempfile
import time
from pathlib import Path

import pytest
from toy_training import Toys, straight_weights, toys

from audiossl.checkpoints.files import is_valid, newest_valid, step_of


@pytest.fixture(name="toys", scope="module")
def _toys() -> Toys:
    return toys()


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob(pattern))


def invalid(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("*.ckpt") if is_valid(path)]


KILL_POINTS = ["before temp", "mid-write", "before fsync", "before rename", "before last", "last half done"]
KILL_POINTS += ["during removal"]


@pytest.mark.faults("P2")
@pytest.mark.parametrize("point", KILL_POINTS)
def test_kill_9_within_a_save_leaves_a_valid_checkpoint_to_go_on_from(toys, tmp_path, point):
    code, run = toys.run(tmp_path, keep_last=1, fault={"kill": point})
    assert code == -9, run.output()
    assert invalid(tmp_path) == []
    is_complete = point in ("before last", "last half done", "during removal")
    assert step_of(newest_valid(tmp_path / "checkpoints")) == (6 if is_complete else 3)
    code, resumed = toys.run(tmp_path, keep_last=1, ckpt="must")
    assert (code, resumed.weights()) == (0, straight_weights()), resumed.output()
    assert names(tmp_path) == ["last.ckpt", "step=000000008.ckpt"]


def kill_and_resume(toys, folder: Path, times: int) -> None:
    """Kill a run that saves all the time at random moments; TMPDIR is on another device, as /tmp on a cluster is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:
        assert os.stat(temporary).st_dev != os.stat(folder).st_dev
        done = 0
        for _ in range(times):
            run = toys.start(folder, {"TMPDIR": temporary}, steps=10**6, every_steps=1, size=8000, ckpt="last")
            run.wait_for_steps(2)
            time.sleep(random.random() / 2)
            os.killpg(run.pid, 9)
            assert run.wait() == -9, run.output()
            acknowledged = int(run.losses()[-1].split()[0])
            assert invalid(folder) == []
            assert step_of(newest_valid(folder / "checkpoints")) >= acknowledged > done
            assert len(names(folder, ".tmp-*")) <= 1, "the part file of the run before was not swept"
            done = acknowledged
        code, run = toys.run(folder, {"TMPDIR": temporary}, steps=done + 1, every_steps=1, size=8000, ckpt="must")
        assert code == 0 and names(folder, ".tmp-*") == os.listdir(temporary) == [], run.output()


@pytest.mark.faults("P1")
def test_kill_9_at_random_moments_never_costs_a_saved_step(toys, tmp_path):
    kill_and_resume(toys, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.faults("P1")
def test_kill_9_thirty_times_never_costs_a_saved_step(toys, tmp_path):
    kill_and_resume(toys, tmp_path, 30)


def on_a_small_disk(toys, folder: Path, megabytes: int, **options):
    """Run with `folder` on a disk of so many MB: a tmpfs, mounted for this process alone."""
    code, run = toys.run(folder, fault={"disk": megabytes * 1_000_000}, **options)
    if code == 99:
        pytest.skip("a tmpfs of one's own needs a mount namespace, which this container or user may not make")
    return code, run


@pytest.mark.faults("P3")
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(toys, tmp_path):
    # three times the ballast (weights and two moments), 9 MB: one fits, two do not
    code, run = on_a_small_disk(toys, tmp_path, 16, size=3000)
    assert code == 1 and "step=000000006.ckpt: not saved, No space left on device: about 92" in run.output()
    left = re.findall("^left: (.*)$", run.output(), re.MULTILINE)
    assert left == [f"{name}: a checkpoint of step 3" for name in ("last.ckpt", "step=000000003.ckpt")]


@pytest.mark.faults("P3", "P4")
def test_saves_that_fail_are_counted_and_as_many_in_a_row_as_allowed_let_the_run_go_on(toys, tmp_path):
    options = dict(size=3000, every_steps=2)
    code, run = on_a_small_disk(toys, tmp_path / "stop", 16, max_failed_saves=1, **options)
    assert code == 1 and run.losses()[-1].startswith("5 "), run.output()
    assert "going on, 1 of 1 failed saves in a row" in run.output() and "UserError: " in run.output()
    code, run = on_a_small_disk(toys, tmp_path / "go on", 16, max_failed_saves=9, **options)
    assert code == 1 and run.losses()[-1].startswith("8 "), "the end is not saved, and that is an error all the same"
    assert run.output().count("going on") == 3 and run.output().count("left: ") == 2
    assert not re.search("left: .*(truncated|damaged|empty)", run.output())


@pytest.mark.faults("P3")
def test_a_file_size_limit_stops_the_run_at_the_first_save_without_a_file(toys, tmp_path):
    code, run = toys.run(tmp_path, size=3000, fault={"limit": 5_000_000})
    assert code == 1 and "UserError" in run.output() and "File too large" in run.output()
    assert names(tmp_path) == []


@pytest.mark.faults("C7")
def test_a_folder_that_cannot_be_written_stops_the_run_before_the_first_step(toys, tmp_path):
    (tmp_path / "checkpoints").mkdir(mode=0o555)
    code, run = toys.run(tmp_path, fault={"obey_modes": True})
    assert code == 1 and "checkpoints cannot be written here: Permission denied" in run.output()
    assert run.losses() == []


@pytest.mark.faults("C7")
def test_a_disk_too_small_for_a_checkpoint_stops_the_run_before_the_first_step(toys, tmp_path):
    code, run = on_a_small_disk(toys, tmp_path, 6, size=3000)  # the weights alone would fit
    said = r"\d+ bytes are free .* a checkpoint takes 92\d{5} \(weights 30\d{5}, the optimiser's moments 61\d{5}\)"
    assert code == 1 and re.search(said, run.output()), run.output()
    assert run.losses() == [] and names(tmp_path) == []


@pytest.mark.faults("P7")
def test_non_finite_weights_are_not_saved(toys, tmp_path):
    code, run = toys.run(tmp_path, fault={"nan": 4})
    assert code == 1 and "step 6: the weights hold NaN" in run.output()
    assert names(tmp_path) == ["last.ckpt", "step=000000003.ckpt"]


def test_the_last_and_the_best_are_kept_also_across_a_resume(toys, tmp_path):
    options = {"keep_last": 2, "keep_best": 2, "metric": "val_loss", "validate_every": 1, "every_steps": 2}
    code, run = toys.run(tmp_path / "straight", **options)
    assert code == 0, run.output()
    kept = names(tmp_path / "straight")
    code, run = toys.run(tmp_path / "broken", fault={"at": "forward", "step": 4, "signals": ["SIGTERM"]}, **options)
    code, run = toys.run(tmp_path / "broken", ckpt="last", **options)
    assert (code, names(tmp_path / "broken")) == (0, kept), run.output()
    assert sum(name.startswith("step=") for name in kept) == 2 and "step=000000008.ckpt" in kept
    assert sum(name.startswith("best-step=") and "val_loss" in name for name in kept) == 2
    checkpoints = tmp_path / "straight" / "checkpoints"
    assert (checkpoints / "last.ckpt").samefile(checkpoints / "step=000000008.ckpt")
    assert invalid(tmp_path / "straight") == []


def test_higher_is_better_for_a_metric_that_is_no_loss(toys, tmp_path):
    code, run = toys.run(tmp_path, keep_best=1, metric="accuracy", validate_every=2, every_steps=4)
    assert code == 0, run.output()
    assert names(tmp_path, "best*") == ["best-step=000000008-accuracy=8.ckpt"]


def test_without_validation_the_mean_training_loss_ranks_and_a_resume_changes_nothing(toys, tmp_path):
    options = {"keep_best": 3, "metric": "val_loss"}
    toys.run(tmp_path / "straight", **options)
    toys.run(tmp_path / "broken", fault={"at": "forward", "step": 4, "signals": ["SIGTERM"]}, **options)
    code, run = toys.run(tmp_path / "broken", ckpt="last", **options)
    assert code == 0, run.output()
    best = names(tmp_path / "straight", "best*")
    assert [name.split("-loss=")[0] for name in best] == [f"best-step={step:09d}" for step in (3, 6, 8)]
    assert names(tmp_path / "broken", "best*") == best


@pytest.mark.faults("P18")
def test_a_file_that_cannot_be_deleted_does_not_stop_the_run(toys, tmp_path):
    code, run = toys.run(tmp_path, keep_last=1, fault={"undeletable": True})
    assert code == 0 and "cannot be removed" in run.output()
    assert len(names(tmp_path, "step=*")) == 3


def test_minutes_are_a_trigger_of_their_own(toys, tmp_path):
    code, run = toys.run(tmp_path, every_steps=None, every_minutes=0.001, pause=0.05, keep_last=10)
    assert code == 0, run.output()
    assert len(names(tmp_path, "step=*")) >= 3


@pytest.mark.parametrize("every_steps", [3, 4])  # saved within the last batch, saved after it
def test_a_finished_run_can_be_made_longer(toys, tmp_path, every_steps):
    assert toys.run(tmp_path, steps=6, every_steps=every_steps)[0] == 0
    code, run = toys.run(tmp_path, ckpt="last")
    assert (code, run.weights()) == (0, straight_weights()), run.output()
