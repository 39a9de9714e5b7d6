"""What every method keeps, found by its YAML."""

import pytest
import torch
from conftest import ROOT
from maes import real_clips
from methods import batch_of, build, compose_for

from audiossl.noise import Noise
from audiossl.optim import parameter_groups
from audiossl.parts.health import Spectrum
from audiossl.running.build import method_from_config

METHODS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


@pytest.fixture(scope="module")
def clips():
    return real_clips(4, 5.0)


@pytest.fixture(params=METHODS)
def method(request):
    return build(request.param)


def forward(method, clips, step=0):
    return method(batch_of(method, clips), generator=Noise.for_batch(0, step, len(clips)))


def test_the_loss_is_finite_and_reaches_every_weight_that_is_trained(method, clips):
    output = forward(method.train(), clips)
    logged = [value.rank() if isinstance(value, Spectrum) else value for value in output.values()]
    assert all(value.ndim == 0 and value.isfinite() for value in logged)
    output["loss"].backward()
    without = [
        name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not without
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)


def test_a_teacher_is_in_no_optimiser_group_and_follows_after_the_step(method, clips):
    trained = {name for group in parameter_groups(method, weight_decay=0.1) for name in group["names"]}
    assert trained == {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher.") for name in trained)
    if not hasattr(method, "after_step"):
        return
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    method.after_step(0, 100)
    moved = [float((p - before[name]).mean()) for name, p in method.teacher.named_parameters()]
    assert all(0 < move < 0.02 for move in moved)


def test_the_loss_halves_on_four_clips_without_a_collapse(method, clips):
    method.train()
    if hasattr(method, "distill_weight"):
        method.distill_weight = 0.0  # the labels here are made up, and a teacher would contradict them
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    losses, output = [], {}
    for step in range(400):
        torch.manual_seed(step)
        output = forward(method, clips, step % 5)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        if hasattr(method, "after_step"):
            method.after_step(step, 400)
        losses.append(float(output["loss"].detach()))
        if step > 5 and sum(losses[-5:]) < 0.5 * sum(losses[:5]):
            break
    else:
        raise AssertionError(f"400 steps took the loss from {losses[0]:.3f} to {losses[-1]:.3f}")
    with torch.no_grad():
        spread = method.encoder(method.frontend(clips[:, : method.frontend.samples_for(method.frontend.frames)])).std(0)
    assert float(spread.mean()) > 0.02, "the encoder says the same of every clip"
    if "teacher_std" in output:
        assert float(output["teacher_std"]) > 0.25 / method.feature_dim**0.5


def test_a_batch_without_a_readable_clip_costs_nothing(method, clips):
    output = method.train()(batch_of(method, clips[:0]), generator=Noise(0, 0, torch.arange(0), 4))
    output["loss"].backward()
    assert float(output["loss"]) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


# as counted in the published files, less what has no effect there: mask token, Frame's class position, head_dist
PUBLISHED_VALUES = {
    "audiomae": 85_659_407 - (527 * 768 + 527) + 512 * 768,  # fine-tuned: less the head, and the table, which is fixed
    "atst_clip": 85_420_032 - 768,
    "atst_frame": 85_419_264 - 2 * 768,
    "passt": 86_153_758 - 2 * (527 * 768 + 527) - 2 * 768,  # and without the head
}


@pytest.mark.parametrize("name", PUBLISHED_VALUES)
def test_on_audioset_a_method_has_the_published_size_and_length(name):
    config = compose_for(name, "data=audioset", "data.shards=x") | {"data": {}}
    method = method_from_config(config, vocabulary=[f"class {i}" for i in range(527)])
    assert sum(v.numel() for v in method.encoder.state_dict().values()) == PUBLISHED_VALUES[name]
    assert method.frontend.frames == {"audiomae": 1024, "atst_clip": 601, "atst_frame": 1001, "passt": 1000}[name]
