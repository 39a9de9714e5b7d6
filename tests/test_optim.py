"""Do rates and decay follow the published recipe, parameter by parameter and step by step?"""

import json
from collections import OrderedDict

import pytest
import torch
from conftest import golden_cases
from maes import audiomae
from safetensors.torch import load_file

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.optim import (
    OptimSettings,
    build_optimizer,
    layer_decay_groups,
    parameter_groups,
    scale_lr,
    warmup_cosine,
)
from audiossl.weights.audiomae import our_name

GIVEN = dict(lr=1e-3, base_lr=None, min_lr=0.0, warmup_steps=10, warmup_epochs=None, warmup_ratio=None)
REST = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)


@pytest.mark.parametrize("case", golden_cases("sched_mae*"))
def test_the_schedule_equals_the_published_one(case):
    configs = json.loads((case / "case.json").read_text())["configs"]
    expected = load_file(case / "expected.safetensors")
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


@pytest.mark.parametrize("case", golden_cases("groups_mae*"))
def test_pre_training_decays_what_the_published_code_decays(case):
    told = json.loads((case / "case.json").read_text())["pretrain"]
    local = dict(decoder="local", decoder_depth=16, decoder_width=32, decoder_num_heads=16)
    model = audiomae(1024, depth=told["depth"], **local)
    groups = parameter_groups(model, weight_decay=told["weight_decay"])
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {our_name(name): decay for name, decay in told["groups"].items()}
    assert len(decays) == len(list(model.parameters()))


@pytest.mark.parametrize("case", golden_cases("groups_mae*"))
def test_fine_tuning_scales_layers_as_the_published_code_does(case):
    told = json.loads((case / "case.json").read_text())["finetune"]
    sizes = dict(num_mels=128, frames=128, patch=(16, 16), stride=(16, 16), width=24, num_heads=2, mlp_ratio=4.0)
    encoder = Encoder(**sizes, depth=told["depth"], positions="published", drop_path=0.0)
    encoder.norm = torch.nn.Identity()  # the published fine-tuning model normalises the mean instead
    parts = dict(encoder=encoder, fc_norm=torch.nn.LayerNorm(24), head=torch.nn.Linear(24, 5))
    rates = dict(layer_decay=told["layer_decay"], weight_decay=told["weight_decay"], no_decay=["class_token"])
    groups = layer_decay_groups(torch.nn.Sequential(OrderedDict(parts)), depth=told["depth"], **rates)
    found = {name: [g["lr_scale"], g["weight_decay"]] for g in groups for name in g["names"]}
    heads = ("fc_norm", "head")
    assert found == {k if k.startswith(heads) else our_name(k): pytest.approx(v) for k, v in told["groups"].items()}
    optimizer = build_optimizer(groups, OptimSettings(**GIVEN, **REST), lr=2.0)
    assert {group["lr"] for group in optimizer.param_groups} == {2.0 * scale for scale, _ in found.values()}


def test_frozen_parameters_and_fixed_tables_are_in_no_group():
    model = audiomae()
    model.encoder.patch_embed.requires_grad_(False)
    names = [name for group in parameter_groups(model, weight_decay=0.1) for name in group["names"]]
    assert not any("patch_embed" in name or "table" in name for name in names)
    assert len(names) == len(set(names)) == len([p for p in model.parameters() if p.requires_grad])


def test_the_optimiser_is_adamw_with_the_settings():
    optimizer = build_optimizer(audiomae(), OptimSettings(**GIVEN, **REST), lr=1e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["lr"] == 1e-3
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]


def test_rates_scale_with_the_global_batch():
    assert scale_lr(2e-4, 512) == 4e-4
    given = GIVEN | dict(lr=None, base_lr=2e-4)
    assert OptimSettings(**given, **REST).peak_lr(512) == 4e-4
    assert OptimSettings(**GIVEN, **REST).peak_lr(512) == 1e-3


def test_warm_up_in_epochs_or_as_a_share_becomes_steps():
    epochs = OptimSettings(**(GIVEN | dict(warmup_steps=None, warmup_epochs=3)), **REST)
    assert epochs.in_steps(10.4, 900).warmup_steps == 31
    assert epochs.in_steps(0.01, 900).warmup_steps == 1
    share = OptimSettings(**(GIVEN | dict(warmup_steps=None, warmup_ratio=0.08)), **REST)
    assert share.in_steps(10.4, 900).warmup_steps == 72
    assert OptimSettings(**GIVEN, **REST).in_steps(10.4, 900).warmup_steps == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(base_lr=1e-3), "optim.lr=0.001, optim.base_lr=0.001"),
        (dict(lr=None), "optim.lr=None, optim.base_lr=None"),
        (dict(warmup_steps=None), "optim.warmup_steps=None, optim.warmup_epochs=None"),
        (dict(lr=-1.0), "optim.lr=-1.0"),
        (dict(lr=float("nan")), "optim.lr=nan"),
    ],
)
def test_settings_that_contradict_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        OptimSettings(**(GIVEN | changes), **REST)
