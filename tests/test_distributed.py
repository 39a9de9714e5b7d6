"""Two gloo ranks do what one process does with twice the batch."""

import csv

import pytest
from commands import TINY, metrics, train


def trace(path):
    with open(path, newline="") as file:
        return [row["keys"].split() for row in csv.DictReader(file)]


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
