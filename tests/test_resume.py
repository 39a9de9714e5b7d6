"""A run that was killed and resumed is the run that was never stopped, bit for bit."""

import signal

import pytest
import torch
from commands import TINY, kill_when, metrics, start, train

STEPS = 14


def settings(shards, run, workers, accumulate):
    return [
        *TINY,
        "data=folder",
        f"data.shards={shards}/shard-*.tar",
        f"data.num_workers={workers}",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.max_steps={STEPS}",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        "trace=true",
        f"hydra.run.dir={run}",
    ]


def assert_same_run(one, other):
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other))
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"]
    for key, state in states[0].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][key][n])) for n, v in state.items()), key
    losses = [[(r["step"], float(r["loss"]).hex()) for r in metrics(run)] for run in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    traces = [(run / "trace.csv").read_text() for run in (one, other)]
    assert traces[0] == traces[1]
    return traces[0].splitlines()[1:]


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 2)])
def test_fourteen_steps_equal_three_a_kill_and_a_resume(folder_shards, tmp_path, workers, accumulate):
    """40 clips in batches of 4: the resume lies inside the first epoch, and the run crosses its end (and another's)."""
    train(*settings(folder_shards, tmp_path / "straight", workers, accumulate), cwd=tmp_path)
    arguments = settings(folder_shards, tmp_path / "killed", workers, accumulate)
    process = start(*arguments, cwd=tmp_path)
    assert kill_when(process, tmp_path / "killed" / "checkpoints" / "step=000000003.ckpt") == -signal.SIGKILL
    output = train(*arguments, "ckpt=last", cwd=tmp_path)
    assert "resuming from" in output
    rows = assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert len(rows) == STEPS * accumulate
    keys = [key for row in rows for key in row.split(",")[2].split()]
    assert len(set(keys[:40])) == 40, "an epoch holds every clip exactly once"
    assert keys[:40] != keys[40:80], "and the next comes in another order"


@pytest.mark.parametrize(
    ("sig", "expected"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_a_step_and_a_resume_ends_the_same(folder_shards, tmp_path, sig, expected):
    train(*settings(folder_shards, tmp_path / "straight", 0, 1), cwd=tmp_path)
    arguments = settings(folder_shards, tmp_path / "asked", 0, 1)
    process = start(*arguments, cwd=tmp_path)
    code = kill_when(process, tmp_path / "asked" / "checkpoints" / "step=000000003.ckpt", sig)
    assert code == expected
    train(*arguments, "ckpt=must", cwd=tmp_path)
    assert_same_run(tmp_path / "straight", tmp_path / "asked")


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_resume_holds_ten_times_in_a_row(folder_shards, tmp_path, trial):
    test_fourteen_steps_equal_three_a_kill_and_a_resume(folder_shards, tmp_path, *[(0, 1), (2, 2)][trial % 2])
