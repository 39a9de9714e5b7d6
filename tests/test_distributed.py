"""Two gloo ranks do what one process does with twice the batch."""

import csv

import pytest
import torch
from commands import TINY, metrics, train
from methods import settings_of

from audiossl.weights.reading import read_torch_file as load


def trace(path):
    with open(path, newline="") as file:
        return [row["keys"].split() for row in csv.DictReader(file)]


@pytest.mark.faults("X9")
def test_two_ranks_see_disjoint_clips_and_train_as_one(folder_shards, tmp_path):
    common = [*TINY, "data=folder", f"data.shards={folder_shards}", "trainer.max_steps=6", "trace=true"]
    train(*common, "trainer.devices=2", "data.batch_size=4", "hydra.run.dir=two", cwd=tmp_path)
    train(*common, "data.batch_size=8", "hydra.run.dir=one", cwd=tmp_path)
    first, second = trace(tmp_path / "two" / "trace.csv"), trace(tmp_path / "two" / "trace-rank=1.csv")
    assert [a + b for a, b in zip(first, second, strict=True)] == trace(tmp_path / "one" / "trace.csv")
    epoch = [key for step in range(5) for key in first[step] + second[step]]
    assert len(set(epoch)) == len(epoch) == 40
    losses = [[float(row["loss"]) for row in metrics(tmp_path / run)] for run in ("one", "two")]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("model", ["atst_clip", "atst_frame"])
def test_a_student_and_its_teacher_end_alike_on_two_ranks_and_on_one(model, tmp_path):
    """Batch statistics, masked rows and the mean of the loss are those of all ranks; so one process ends where two do.

    Mixup is off, because each rank remembers the clips that it has seen itself.
    """
    common = [*settings_of(model), "data.num_workers=0", "model.mixup_ratio=0.0", "trainer=cpu", "trainer.max_steps=4"]
    common += ["probe=none", "data.validation_clips=8", "trainer.log_every_n_steps=1", "optim.eps=1e-4"]
    train(*common, "trainer.devices=2", "data.batch_size=4", "hydra.run.dir=two", cwd=tmp_path)
    train(*common, "data.batch_size=8", "hydra.run.dir=one", cwd=tmp_path)
    rows = [metrics(tmp_path / run) for run in ("one", "two")]
    for name in ("loss", "student_std", "teacher_std", "teacher_rank", "grad_norm"):
        one, two = ([float(row[name]) for row in run] for run in rows)
        assert len(one) == 4 and two == pytest.approx(one, rel=1e-3), name
    states = [load(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"] for run in ("one", "two")]
    for name, value in states[0].items():
        if "num_batches" not in name:
            torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
