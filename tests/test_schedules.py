"""Are rate, decay and momentum of every step those of the published code?"""

import json
import math
from fractions import Fraction

import pytest
import torch
from conftest import golden_cases
from maes import PLAIN
from safetensors.torch import load_file

from audiossl.optim import OptimSettings
from audiossl.schedules import atst_cosine, momentum_at, passt_ramps, warmup_cosine

EXACT = dict(rel=1e-12, abs=1e-18)


def settings(**changes) -> OptimSettings:
    given = dict(lr=1.0, base_lr=None, min_lr=0.0, warmup_steps=None, warmup_epochs=None, warmup_ratio=None)
    rest = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    return OptimSettings(**(PLAIN | given | rest | changes))


def read(case):
    return json.loads((case / "case.json").read_text())["configs"], load_file(case / "expected.safetensors")


@pytest.mark.parametrize("case", golden_cases("sched_mae*"))
def test_the_schedule_equals_the_published_one(case):
    configs, expected = read(case)
    for name, told in configs.items():
        steps = told["steps_per_epoch"]
        ends = dict(warmup_steps=told["warmup_epochs"] * steps, max_steps=told["epochs"] * steps)
        rates = [warmup_cosine(s, peak=told["lr"], floor=told["min_lr"], **ends) for s in range(len(expected[name]))]
        torch.testing.assert_close(torch.tensor(rates).double(), expected[name][:, 0].double(), rtol=1e-6, atol=1e-12)
        assert rates == pytest.approx(expected[name][:, 0].tolist(), rel=1e-12, abs=1e-18)
        assert [rate * 0.5 for rate in rates] == pytest.approx(expected[name][:, 1].tolist(), rel=1e-12, abs=1e-18)


def test_the_schedule_rises_falls_and_stays():
    rates = [warmup_cosine(s, peak=1.0, floor=0.1, warmup_steps=10, max_steps=50) for s in range(60)]
    assert rates[0] == 0 and rates[10] == 1.0 == max(rates) and rates[50:] == [0.1] * 10
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:50], rates[11:51], strict=True))


def test_a_run_that_is_all_warm_up_or_has_none_is_possible():
    assert warmup_cosine(4, peak=1.0, floor=0.0, warmup_steps=8, max_steps=8) == 0.5
    assert warmup_cosine(8, peak=1.0, floor=0.0, warmup_steps=8, max_steps=8) == 1.0
    assert warmup_cosine(0, peak=1.0, floor=0.0, warmup_steps=0, max_steps=8) == 1.0


@pytest.mark.parametrize("case", golden_cases("sched_atst*"))
def test_atst_rate_decay_and_momentum_equal_the_published_ones(case):
    configs, expected = read(case)
    for name, told in configs.items():
        steps, (start, end) = told["max_steps"], told["wd"]
        optim = settings(
            schedule="atst", lr=told["learning_rate"], min_lr=told["final_lr"], warmup_steps=told["warmup_steps"],
            weight_decay=start, final_weight_decay=end,
        )  # fmt: skip
        rates = [optim.lr_at(step, global_batch=1, max_steps=steps) for step in range(steps)]
        assert rates == pytest.approx(expected[f"{name}.lr"].tolist(), **EXACT)
        decays = [optim.weight_decay_at(step, steps) for step in range(steps)]
        assert decays == pytest.approx(expected[f"{name}.wd"].tolist(), **EXACT)
        momenta = [momentum_at(step, told["ema"], steps) for step in range(-1, steps)]
        published = expected[f"{name}.ema"].tolist()
        assert momenta == pytest.approx([*published, published[-1]], **EXACT)  # its last update is past the array
        tune = told["finetune"]
        ends = dict(base=told["learning_rate"], final=told["final_lr"])
        ends |= {
            f"{n}_steps": tune[f"{n}_epochs".removeprefix("max_")] * tune["niter_per_epoch"] for n in ("warmup", "max")
        }
        rates = [atst_cosine(step, **ends) for step in range(ends["max_steps"])]
        assert rates == pytest.approx(expected[f"{name}.finetune_lr"].tolist(), **EXACT)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, Fraction(100_000, 12)])
@pytest.mark.parametrize("case", golden_cases("sched_passt*"))
def test_passt_factors_equal_the_published_ones_in_every_epoch(case, steps_per_epoch):
    configs, expected = read(case)
    for name, told in configs.items():
        start, length = told["ramp_down_start"], told.get("ramp_down_len", 0)
        is_cycle = "cycle_len" in told
        optim = settings(
            schedule="passt_cycle" if is_cycle else "passt", min_lr=told["last_lr_value"], ramp_down=(start, length),
            warmup_epochs=told["cycle_len"] / 2 if is_cycle else told["warm_up_len"],
        ).in_steps(float(steps_per_epoch), 10**6)  # fmt: skip
        for epoch, factor in enumerate(expected[name].tolist()):
            first, last = math.ceil(epoch * steps_per_epoch), math.ceil((epoch + 1) * steps_per_epoch) - 1
            for step in (first, last):
                assert optim.lr_at(step, global_batch=1, max_steps=1) == pytest.approx(factor, rel=1e-6, abs=1e-9)


def test_passt_in_shares_of_a_short_run_is_the_same_curve_without_stairs():
    optim = settings(schedule="passt", min_lr=0.01, warmup_ratio=0.05, ramp_down=(0.5, 0.25)).in_steps(3.7, 400)
    rates = [optim.lr_at(step, global_batch=1, max_steps=400) for step in range(400)]
    assert 0 < rates[0] < 0.01 and rates[10] == pytest.approx(torch.tensor(-5 * 0.25).exp().item())
    assert rates[20:201] == [1.0] * 181 and rates[250] == pytest.approx(0.505) and rates[300:] == [0.01] * 100
    assert all(a < b for a, b in zip(rates[1:20], rates[2:21], strict=True))
    assert all(a > b for a, b in zip(rates[200:300], rates[201:301], strict=True))


def test_a_passt_run_may_have_no_warm_up_and_drop_at_once():
    ends = dict(peak=1.0, floor=0.1, tread=1.0)
    assert [passt_ramps(s, warmup=0, ramp_down=(2, 0), **ends) for s in range(4)] == [1.0, 1.0, 1.0, 0.1]


def test_an_atst_run_of_one_step_or_of_warm_up_only_is_possible():
    assert atst_cosine(0, base=1.0, final=0.1, warmup_steps=0, max_steps=1) == 1.0
    assert [atst_cosine(s, base=1.0, final=0.1, warmup_steps=3, max_steps=3) for s in range(5)] == [0, 0.5, 1, 1, 1]
    assert atst_cosine(0, base=1.0, final=0.1, warmup_steps=1, max_steps=4) == 0.0
    assert momentum_at(0, 0.99, 1) == 0.99
