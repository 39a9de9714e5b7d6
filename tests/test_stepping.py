"""Where the device refuses an update by itself, the host never waits for it, and a run ends as if it had."""

import copy
import re
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from fits import assert_same, run
from methods import build, settings_of
from test_alarm import rung_at
from test_pretraining import OPTIM, QUIET, demo_data
from torch import nn
from toy_teacher import COLLAPSING, learn
from waits import SHORT, fit_with

from audiossl.checkpoints.files import newest_valid, step_of
from audiossl.ema import update_teacher
from audiossl.pretraining import NonFiniteError, Pretraining
from audiossl.running.averaging import Averaging
from audiossl.running.callbacks import Forensics
from audiossl.stepping.hostcopy import HostCopy
from audiossl.stepping.places import Places
from audiossl.stepping.refusal import can_skip, skip_unless_finite, step_done


def test_a_step_is_the_same_whether_it_is_looked_at_at_once_or_later(fused, tmp_path, monkeypatch):
    for every in (1, 50):
        common = (*settings_of("atst_clip"), *SHORT, "trainer.max_steps=5", f"trainer.log_every_n_steps={every}")
        fit_with(pl.Callback(), tmp_path / f"{every}", monkeypatch, *common, "checkpoint.every_steps=4")
    for step in (4, 5):
        files = (tmp_path / f"{every}" / "checkpoints" / f"step={step:09d}.ckpt" for every in (1, 50))
        states = [torch.load(file, weights_only=True) for file in files]
        for part in ("state_dict", "optimizer_states"):
            assert_same(*(state[part] for state in states), part)
        alarms = [next(v for k, v in state["callbacks"].items() if "CollapseAlarm" in k) for state in states]
        assert alarms[0] == alarms[1] and alarms[0]["highest"]["teacher_rank"] > 1


class Poison(pl.Callback):
    """Turn a clip of one micro-batch into NaN; keep the weights before it, and how far the run came."""

    def __init__(self, step: int, micro: int = 0):
        self.at, self.begun = (step, micro), []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        now = (trainer.global_step, batch_idx % trainer.accumulate_grad_batches)
        self.begun.append(now)
        if now == (self.at[0], 0):
            self.weights = copy.deepcopy(module.method.state_dict())
        if now == self.at:
            self.keys = list(batch.key)
            batch.waveform = batch.waveform.float()
            batch.waveform[1] = float("nan")


def poisoned(folder, *, accumulate: int = 1, log_every: int = 50, callbacks=(), step: int = 2) -> tuple[Poison, dict]:
    """Train a student and its teacher until they meet a NaN; gives the evidence."""
    data, method = demo_data(2), build("atst_clip", momentum=0.9)
    module = Pretraining(
        method, optim=replace(OPTIM, warmup_steps=0), max_steps=6, batch_size=2, waveform_rate_hz=data.rate_hz, seed=3
    )
    crops = dict(rank=0, world_size=1, start_step=0, max_steps=6, seed=3, crop_samples=method.crop_samples)
    poison = Poison(step, accumulate - 1)
    trainer = pl.Trainer(
        max_steps=6, accumulate_grad_batches=accumulate, log_every_n_steps=log_every,
        callbacks=[poison, *callbacks, Forensics(folder)], **QUIET,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=f"^step {step}: the loss is nan, the gradient's norm nan$"):
        trainer.fit(module, data.train_loader(accumulate=accumulate, **crops))
    record = torch.load(folder / f"nonfinite-step={step:09d}.pt", weights_only=True)
    for name, value in module.method.named_parameters():
        assert torch.equal(value, poison.weights[name]) and torch.equal(value, record["weights"][name]), name
    return poison, record


@pytest.mark.faults("P7")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_seen_a_step_later_has_moved_neither_student_nor_teacher(fused, tmp_path, accumulate):
    poison, record = poisoned(tmp_path, accumulate=accumulate)
    assert poison.begun[-1] == (3, accumulate - 1), "seen in the step after"
    assert record["step"] == 2 and record["keys"] == poison.keys and record["waveforms"][0][1].isnan().all()
    assert any(name.startswith("student.encoder") for name in record["non_finite_gradients"])


def test_the_evidence_is_the_same_whenever_the_step_was_looked_at(fused, tmp_path):
    for every in (50, 1):
        (tmp_path / f"{every}").mkdir()
    (_, late), (poison, at_once) = (poisoned(tmp_path / f"{every}", log_every=every) for every in (50, 1))
    assert poison.begun[-1] == (2, 0), "the row of the step was due"
    assert late["non_finite_gradients"] == at_once["non_finite_gradients"] and late["keys"] == at_once["keys"]
    assert late["weights"].keys() == at_once["weights"].keys()
    for name, value in at_once["weights"].items():
        torch.testing.assert_close(late["weights"][name], value, rtol=0, atol=0, equal_nan=True)


def test_no_average_takes_in_a_step_that_nobody_has_seen(fused, tmp_path):
    averaging = Averaging(start=1, every=1, unit="steps", steps_per_epoch=1, max_steps=6)
    poison, _ = poisoned(tmp_path, callbacks=[averaging])
    assert poison.begun[-1] == (2, 0) and averaging.state_dict()["num_snapshots"] == 2


SMALL = (*settings_of("audiomae"), "data.batch_size=2", "data.fraction=0.1", "data.validation_clips=4")
RARE = (*SMALL, "trainer.max_steps=8", "trainer.log_every_n_steps=50", "trace=false")


@pytest.mark.faults("P7")
@pytest.mark.parametrize("step, due, saved", [(5, 3, 3), (4, 3, 3), (5, 1, 5)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_is_due_looks_first_and_holds_no_step_that_was_refused(tmp_path, step, due, saved, ranks):
    """A save at the end of the very step that is not finite, and one a step later; NaN on the last rank only."""
    given = (*RARE, f"checkpoint.every_steps={due}", "validate_every_steps=100")
    fault = {"do": "nan", "step": step, "rank": ranks - 1, "fused": True}
    runs = run(tmp_path, *given, ranks=ranks, fault=fault, expect=1)
    assert all(f"NonFiniteError: step {step}: the loss is nan" in one.output() for one in runs)
    newest = newest_valid(tmp_path / "checkpoints")
    assert step_of(newest) == saved
    records = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("nonfinite-step=*.pt"))]
    assert [record["step"] for record in records] == [step] * ranks
    if saved == step:
        weights = torch.load(newest, weights_only=True)["state_dict"]
        assert all(torch.equal(v, weights[f"method.{k}"]) for k, v in records[0]["weights"].items())


@pytest.mark.faults("P7")
def test_a_step_before_a_validation_is_looked_at_before_it(tmp_path):
    given = (*RARE, "checkpoint.every_steps=100", "validate_every_steps=6")
    (one,) = run(tmp_path, *given, fault={"do": "nan", "step": 5, "fused": True}, expect=1)
    assert "NonFiniteError: step 5" in one.output() and "val_loss" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.faults("P7")
def test_the_last_step_of_a_run_is_looked_at_too(tmp_path):
    given = (*RARE, "checkpoint.every_steps=100", "validate_every_steps=100")
    (one,) = run(tmp_path, *given, fault={"do": "inf", "step": 7, "at": "update", "fused": True}, expect=1)
    assert re.search(r"NonFiniteError: step 7: the loss is [\d.]+, the gradient's norm inf", one.output())
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_a_collapse_seen_later_is_told_of_the_same_step(fused, tmp_path):
    rows, said = learn(tmp_path, COLLAPSING)
    low = [row["loss"] < 0.1 and min(row["student_std"], row["teacher_std"]) < 0.25 / 4 for row in rows]
    first = next(end for end in range(10, len(rows) + 1) if all(low[end - 10 : end])) - 1
    assert rung_at(said) == first and len(rows) - first in (1, 2)
    assert f"loss={rows[first]['loss']:.3g} is below" in said
    assert all(int(path.stem[5:]) <= first for path in (tmp_path / "checkpoints").glob("step=*.ckpt"))


def test_fused_adamw_leaves_everything_as_it_is_when_it_is_told_to():
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)
    assert can_skip(optimizer) and not can_skip(torch.optim.AdamW(linear.parameters(), fused=False))
    before = None
    for factor in (1.0, float("nan"), 1.0):
        linear(torch.ones(2, 4)).sum().mul(factor).backward()
        refused = skip_unless_finite(optimizer, linear.weight.grad.norm())
        optimizer.step()
        after = copy.deepcopy([linear.state_dict(), optimizer.state_dict()["state"]])
        if refused:
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        before = after
        optimizer.zero_grad()
    assert float(after[1][0]["step"]) == 2 and linear.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_follows_to_the_same_bits_and_not_at_all_after_a_refused_step(dtype):
    torch.manual_seed(0)
    teachers, student = [nn.Linear(40, 30, dtype=dtype) for _ in range(3)], nn.Linear(40, 30, dtype=dtype)
    for teacher in teachers[1:]:
        teacher.load_state_dict(teachers[0].state_dict())
    start = copy.deepcopy(teachers[0].state_dict())
    update_teacher(teachers[0], student, 0.996)
    for teacher, refused in zip(teachers[1:], (0.0, 1.0), strict=True):
        with step_done(torch.tensor(refused)):
            update_teacher(teacher, student, 0.996)
    for name, value in teachers[0].state_dict().items():
        torch.testing.assert_close(
            teachers[1].state_dict()[name], value, rtol=1e-6 if dtype.itemsize > 4 else 0, atol=0
        )
        assert torch.equal(teachers[2].state_dict()[name], start[name])


def test_a_copy_for_the_host_is_of_the_moment_it_was_asked_for():
    value = torch.arange(3.0)
    copied = HostCopy([value, value[1]])
    value += 1
    assert [one.tolist() for one in copied.read()] == [[0.0, 1.0, 2.0], 1.0]


def test_places_pick_what_a_mask_would_and_their_gradient_is_the_same():
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.4
    tokens = torch.randn(5, 7, 3, requires_grad=True)
    torch.testing.assert_close(Places(mask).take(tokens), tokens[mask], rtol=0, atol=0)
    weight = torch.randn(int(mask.sum()), 3)
    found, wanted = (
        torch.autograd.grad((x * weight).sum(), tokens)[0] for x in (Places(mask).take(tokens), tokens[mask])
    )
    assert torch.equal(found, wanted)
    assert Places(torch.zeros(5, 7).bool()).take(tokens).shape == (0, 3)
