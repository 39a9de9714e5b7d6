"""Two gloo ranks do what one process does with twice the batch."""

import csv
import shutil

import numpy as np
import pytest
import torch
from commands import TINY, metrics, train
from damaged import overwrite
from methods import settings_of

from audiossl.index import Index
from audiossl.weights.reading import read_torch_file as load


def trace(path):
    with open(path, newline="") as file:
        return [row["keys"].split() for row in csv.DictReader(file)]


def with_an_unreadable_shard(folder_shards, folder):
    """Copy shards and spoil every clip of the smallest; returns the copy and how many clips are left."""
    index = Index.load(shutil.copytree(folder_shards, folder))
    shard = int(np.bincount(index.shard).argmin())
    spoilt = np.flatnonzero(index.shard == shard)
    for clip in spoilt.tolist():
        overwrite(index, clip, b"no audio")
    return folder, len(index) - len(spoilt)


@pytest.mark.faults("X9")
def test_one_process_two_ranks_and_accumulation_take_the_same_steps_though_a_shard_is_unreadable(
    folder_shards, tmp_path
):
    """Clips, masks, dropout and the mean over all hidden patches are the global batch's: 1 x 8, 2 x 4, 2 x 2 x 2.

    So a rank's whole batch may be unreadable. Weights agree to 1e-5 after six steps of a rate up to 3e-4, an epoch
    and a bit.
    """
    shards, readable = with_an_unreadable_shard(folder_shards, tmp_path / "shards")
    common = [*TINY, "data=folder", f"data.shards={shards}", "trainer.max_steps=6", "trace=true", "optim.eps=1e-4"]
    common += [
        "data.max_bad_fraction=0.9",
        "data.validation_clips=0",
        "model.decoder_dropout=0.1",
        "model.drop_path=0.3",
    ]
    common += ["optim.lr=null", "optim.base_lr=0.01", "optim.warmup_ratio=null", "optim.warmup_epochs=0.4"]
    layouts = {"one": (1, 8, 1), "two": (2, 4, 1), "accumulated": (2, 2, 2)}
    for name, (devices, batch, accumulate) in layouts.items():
        layout = [f"trainer.devices={devices}", f"data.batch_size={batch}", f"hydra.run.dir={name}"]
        said = train(*common, *layout, f"trainer.accumulate_grad_batches={accumulate}", cwd=tmp_path)
        assert ("2 CPU processes = 1 node x 2" in said) == (devices == 2)
        assert len(list((tmp_path / name / "checkpoints").glob("step=*.ckpt"))) == 1
    steps = [[float(row["lr"]) for row in metrics(tmp_path / name)] for name in layouts]
    assert len(steps[0]) == 6 and steps[0] == steps[1] == steps[2] and max(steps[0]) == pytest.approx(0.01 * 8 / 256)
    first, second = trace(tmp_path / "two" / "trace.csv"), trace(tmp_path / "two" / "trace-rank=1.csv")
    assert [a + b for a, b in zip(first, second, strict=True)] == trace(tmp_path / "one" / "trace.csv")
    epoch = [key for step in range(5) for key in first[step] + second[step]]
    assert len(set(epoch)) == len(epoch) == readable
    assert len({len(rows) for rows in first + second}) > 1, "no rank missed a clip"
    for name in ("loss", "grad_norm"):
        one, *others = ([float(row[name]) for row in metrics(tmp_path / run)] for run in layouts)
        for other in others:
            assert other == pytest.approx(one, rel=1e-4), name
    one, *others = (load(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"] for run in layouts)
    for other in others:
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


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
