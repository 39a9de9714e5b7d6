"""A run that was killed and resumed is the run that was never stopped, bit for bit."""

import signal

import pytest
import torch
from commands import TINY, kill_when, metrics, start, train

STEPS = 14
CLIPS = 32  # and 8 held out


def settings(shards, run, workers=0, accumulate=1, batch_size=4):
    """Set up a run whose randomness has every source: order, crops, masks, dropout; with validation and best-k."""
    return [
        *TINY,
        "model.decoder=local",
        "model.decoder_depth=2",
        "data=folder",
        f"data.shards={shards}/shard-*.tar",
        f"data.batch_size={batch_size}",
        f"data.num_workers={workers}",
        "data.validation_clips=8",
        "validate_every_steps=4",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.max_steps={STEPS}",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        "trace=true",
        f"hydra.run.dir={run}",
    ]


@pytest.fixture(scope="module")
def straight(folder_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    train(*settings(folder_shards, run), cwd=run.parent)
    return run


def column(run, name):
    return [(row["step"], float(row[name]).hex()) for row in metrics(run) if row[name]]


def assert_same_run(one, other):
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other))
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"]
    for key, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][key][n])) for n, v in state.items()), key
    assert column(one, "loss") == column(other, "loss") and len(column(one, "loss")) == STEPS
    traces = [(run / "trace.csv").read_text() for run in (one, other)]
    assert traces[0] == traces[1]
    return traces[0].splitlines()[1:]


def interrupted(folder_shards, folder, sig, **changes):
    """Signal a run as soon as its third step is saved; returns its arguments and exit code."""
    arguments = settings(folder_shards, folder / "killed", **changes)
    process = start(*arguments, cwd=folder)
    return arguments, kill_when(process, folder / "killed" / "checkpoints" / "step=000000003.ckpt", sig)


def check_kill_and_resume(reference, folder_shards, folder, **changes):
    arguments, code = interrupted(folder_shards, folder, signal.SIGKILL, **changes)
    assert code == -signal.SIGKILL
    assert "resuming from" in train(*arguments, "ckpt=last", cwd=folder)
    rows = assert_same_run(reference, folder / "killed")
    validations = column(reference, "val_loss")
    assert validations == column(folder / "killed", "val_loss") and len(validations) == 3
    return rows


@pytest.mark.faults("R1", "P12")
def test_fourteen_steps_equal_three_a_kill_and_a_resume(straight, folder_shards, tmp_path):
    """32 clips in batches of 4: the resume lies inside the first epoch, and the run goes on into the second."""
    rows = check_kill_and_resume(straight, folder_shards, tmp_path)
    keys = [key for row in rows for key in row.split(",")[2].split()]
    assert len(set(keys[:CLIPS])) == CLIPS, "an epoch holds every clip exactly once"
    assert keys[:CLIPS] != keys[CLIPS:] + keys[len(keys) - CLIPS : CLIPS], "and the next comes in another order"


@pytest.mark.faults("R3", "R1")
def test_the_same_with_workers_and_accumulation(folder_shards, tmp_path):
    """Steps of 8 clips: the run crosses the ends of three epochs."""
    train(*settings(folder_shards, tmp_path / "straight", 2, 2), cwd=tmp_path)
    check_kill_and_resume(tmp_path / "straight", folder_shards, tmp_path, workers=2, accumulate=2)


@pytest.mark.faults("X9")
def test_a_resume_may_accumulate_otherwise(straight, folder_shards, tmp_path):
    """2 x 2 clips until the kill, 4 x 1 after it: the same clips and masks, so the same losses but for float sums."""
    interrupted(folder_shards, tmp_path, signal.SIGKILL, batch_size=2, accumulate=2)
    train(*settings(folder_shards, tmp_path / "killed"), "ckpt=last", cwd=tmp_path)
    losses = [[float.fromhex(loss) for _, loss in column(run, "loss")] for run in (straight, tmp_path / "killed")]
    assert len(losses[1]) == STEPS and losses[1] == pytest.approx(losses[0], rel=5e-3)
    rows = [(run / "trace.csv").read_text().splitlines()[-1].split(",")[2] for run in (straight, tmp_path / "killed")]
    assert rows[0] == rows[1]


@pytest.mark.faults("P10", "R12")
def test_other_data_or_another_optimiser_is_no_resume(straight, folder_shards):
    changes = ["data.validation_clips=4", "optim.weight_decay=0.5", "ckpt=last"]
    output = train(*settings(folder_shards, straight), *changes, cwd=straight.parent, expect=2)
    assert "data.validation_clips: 8 -> 4" in output and "optim.weight_decay: 0.05 -> 0.5" in output


@pytest.mark.faults("P5", "P6")
@pytest.mark.parametrize(
    ("sig", "expected"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_a_step_and_a_resume_ends_the_same(straight, folder_shards, tmp_path, sig, expected):
    arguments, code = interrupted(folder_shards, tmp_path, sig)
    assert code == expected
    train(*arguments, "ckpt=must", cwd=tmp_path)
    assert_same_run(straight, tmp_path / "killed")
    assert set(column(tmp_path / "killed", "val_loss")) <= set(column(straight, "val_loss"))


@pytest.mark.faults("P5")
@pytest.mark.slow
def test_a_run_out_of_time_is_not_finished(folder_shards, tmp_path):
    train(*settings(folder_shards, tmp_path / "run"), "trainer.max_steps=100000", "trainer.max_time='00:00:00:02'",
          cwd=tmp_path, expect=75)  # fmt: skip


@pytest.mark.faults("R1")
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_resume_holds_ten_times_in_a_row(straight, folder_shards, tmp_path, trial):
    check_kill_and_resume(straight, folder_shards, tmp_path, workers=2 * (trial % 2))
