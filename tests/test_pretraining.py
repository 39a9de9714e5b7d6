"""The LightningModule: a bare Trainer suffices, noise belongs to the global batch, and NaN never reaches a weight."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import ROOT
from maes import PLAIN, audiomae
from maes import TINY as SIZES
from methods import build
from tiny_shards import EVERY_CLIP_ONCE, NO_DAMAGE
from torch.utils.flop_counter import FlopCounterMode

from audiossl.batch import Batch
from audiossl.methods.audiomae import AudioMAE
from audiossl.noise import Noise
from audiossl.optim import OptimSettings
from audiossl.planning.cost import flop_counter
from audiossl.pretraining import NonFiniteError, Pretraining, prepare
from audiossl.running.callbacks import Forensics, Throughput
from audiossl.schedules import momentum_at
from audiossl.shards import ShardData
from audiossl.spectrogram import PasstMel

OPTIM = OptimSettings(
    lr=1e-3, base_lr=None, min_lr=0.0, warmup_steps=2, warmup_epochs=None, warmup_ratio=None, betas=(0.9, 0.95),
    eps=1e-8, weight_decay=0.05, **PLAIN,
)  # fmt: skip
QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=-1,
             enable_checkpointing=False, use_distributed_sampler=False)  # fmt: skip


def module_for(data, max_steps, *, batch_size=4, **changes):
    torch.manual_seed(0)
    method = audiomae(frames=64, num_mels=64, **{**SIZES, **changes})
    return Pretraining(
        method, optim=OPTIM, max_steps=max_steps, batch_size=batch_size, waveform_rate_hz=data.rate_hz, seed=3
    )


def demo_data(batch_size=4):
    return ShardData(
        shards=str(ROOT / "demo" / "shards"), rate_hz=16000, batch_size=batch_size, num_workers=0, crop_seconds=0.7,
        padding="cyclic", validation_clips=0, split="train", cache_mb=0, mean=-8.0, std=5.0, default_rate_hz=16000,
        run_dir=None, validation_split=None, needs_labels=False, **EVERY_CLIP_ONCE, **NO_DAMAGE,
    )  # fmt: skip


def loader(data, max_steps, accumulate=1):
    return data.train_loader(
        rank=0, world_size=1, accumulate=accumulate, start_step=0, max_steps=max_steps, seed=3, crop_samples=11000
    )


def fit(batch_size, accumulate, max_steps=3):
    data = demo_data(batch_size)
    module = module_for(data, max_steps, batch_size=batch_size)
    trainer = pl.Trainer(max_steps=max_steps, accumulate_grad_batches=accumulate, **QUIET)
    trainer.fit(module, loader(data, max_steps, accumulate))
    return module


def test_a_bare_trainer_and_five_lines_suffice():
    module = fit(batch_size=4, accumulate=1)
    assert module.trainer.global_step == 3 and float(module.trainer.callback_metrics["loss"]) > 0


def test_eight_clips_at_once_and_four_twice_are_the_same_step():
    """Same clips, same masks, same mean loss; the weights differ by the order of float sums only."""
    whole, halves = fit(8, 1), fit(4, 2)
    losses = [float(m.trainer.callback_metrics["loss"]) for m in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, one), two in zip(whole.method.named_parameters(), halves.method.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5, msg=name)


def test_every_rank_draws_its_rows_of_the_global_batch():
    everyone = Noise(1, 5, torch.arange(8), 8).uniform(6)
    some = Noise(1, 5, torch.tensor([2, 3, 6]), 8).uniform(6)
    assert torch.equal(everyone[[2, 3, 6]], some)
    assert not torch.equal(everyone, Noise(1, 6, torch.arange(8), 8).uniform(6))


@pytest.mark.faults("C4")
def test_the_rate_of_the_shards_becomes_the_rate_of_the_front_end():
    """A 1 kHz tone in 32 kHz shards lies in the band of 1 kHz after the device has resampled it."""
    module = module_for(demo_data(), 1)
    module.waveform_rate_hz = 32000
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(22000) / 32000)
    batch = Batch((tone * 32767).to(torch.int16)[None], num_samples=torch.tensor([22000]), rows=torch.tensor([0]))
    prepared = module.prepare(batch)
    assert prepared.waveform.shape == (1, 11000) and int(prepared.num_samples[0]) == 11000
    frontend = module.method.frontend
    band = int(frontend(prepared.waveform).mean(-1).argmax())
    reference = torch.sin(2 * torch.pi * 1000 * torch.arange(11000) / 16000)[None]
    assert band == int(frontend(reference).mean(-1).argmax())


class Poison(pl.Callback):
    """Turn one clip of step 2 into NaN, as a broken preprocessing would."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.weights = {k: v.clone() for k, v in module.method.state_dict().items()}
        if trainer.global_step == 2:
            batch.waveform = batch.waveform.float()
            batch.waveform[1] = float("nan")


@pytest.mark.faults("P7")
def test_a_nan_stops_the_run_before_the_update_and_leaves_evidence(tmp_path):
    data = demo_data()
    module, poison = module_for(data, 4), Poison()
    trainer = pl.Trainer(max_steps=4, callbacks=[poison, Forensics(tmp_path)], **QUIET)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.fit(module, loader(data, 4))
    assert all(torch.equal(v, module.method.state_dict()[k]) for k, v in poison.weights.items())
    record = torch.load(tmp_path / "nonfinite-step=000000002.pt", weights_only=True)
    assert record["step"] == 2 and len(record["keys"]) == 4 and record["non_finite_gradients"]
    assert record["waveforms"][0][1].isnan().all() and record["losses"][0] != record["losses"][0]


def test_throughput_is_logged_and_counts_the_models_arithmetic():
    data = demo_data()
    module, throughput = module_for(data, 4), Throughput(every_steps=2)
    trainer = pl.Trainer(max_steps=4, callbacks=[throughput], **QUIET)
    trainer.fit(module, loader(data, 4))
    metrics = trainer.callback_metrics
    assert float(metrics["tokens_per_second"]) == pytest.approx(
        float(metrics["clips_per_second"]) * module.method.tokens_per_clip, rel=1e-5
    )
    tokens, width = 1 + int(16 * (1 - 0.8)), SIZES["width"]
    least = 2 * SIZES["depth"] * 12 * width * width * tokens  # the encoder's matrices alone
    assert least < throughput.flops_per_clip < 100 * least
    batch = next(iter(loader(data, 4)))
    with flop_counter() as whole, FlopCounterMode(display=False) as without_attention:
        clips = prepare(batch, module.method.frontend, data.rate_hz)
        module.method(clips, generator=Noise.for_batch(0, 0, 4))["loss"].backward()
    assert throughput.flops_per_clip * 4 == whole.get_total_flops() > without_attention.get_total_flops()


def test_a_micro_batch_without_a_readable_clip_changes_nothing_and_breaks_nothing():
    module = module_for(demo_data(), 1)
    module.waveform_rate_hz = 32000
    empty = Batch(
        torch.zeros(0, 11000, dtype=torch.int16), torch.zeros(0, dtype=torch.int64), rows=torch.zeros(0).long()
    )
    loss = module.method(module.prepare(empty), generator=Noise.for_batch(0, 0, 0))["loss"]
    loss.backward()
    assert float(loss) == 0 and all(p.grad is None or not p.grad.any() for p in module.method.parameters())


def test_the_front_ends_own_noise_is_drawn_in_training_and_only_there():
    """PaSST shifts its mel bands from step to step; the spectrogram the encoder sees shows it."""
    conf = yaml.safe_load((ROOT / "conf" / "frontend" / "passt_mel.yaml").read_text())
    del conf["_target_"]
    frontend = PasstMel(**conf | {"seconds": 0.64, "hop_ms": 10.0})
    model = yaml.safe_load((ROOT / "conf" / "model" / "audiomae.yaml").read_text()) | SIZES
    method = AudioMAE(frontend=frontend, **{name: value for name, value in model.items() if name != "_target_"})
    seen = []
    method.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    batch = Batch(torch.randn(2, 21000, generator=torch.Generator().manual_seed(0)), rows=torch.arange(2))
    for is_training in (True, False):
        method.train(is_training)
        for step in range(2):
            method(batch, generator=Noise.for_batch(0, step, 2))
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])


class Watch(pl.Callback):
    """Note one weight of the student and of its teacher after each micro-batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        parts = module.method.student, module.method.teacher
        self.seen.append([part.projector[0].weight.detach().clone() for part in parts])


def test_a_teacher_moves_once_per_optimiser_step_however_many_micro_batches():
    data, watch, method = demo_data(2), Watch(), build("atst_clip", momentum=0.9)
    start = method.teacher.projector[0].weight.clone()
    sizes = dict(max_steps=2, batch_size=2, waveform_rate_hz=data.rate_hz)
    module = Pretraining(method, optim=replace(OPTIM, warmup_steps=0), seed=3, **sizes)
    crops = dict(
        rank=0, world_size=1, accumulate=3, start_step=0, max_steps=2, seed=3, crop_samples=method.crop_samples
    )
    trainer = pl.Trainer(max_steps=2, accumulate_grad_batches=3, callbacks=[watch], **QUIET)
    trainer.fit(module, data.train_loader(**crops))
    assert len(watch.seen) == 6
    teachers = [start, *(teacher for _, teacher in watch.seen)]
    assert [not torch.equal(a, b) for a, b in zip(teachers, teachers[1:], strict=False)] == [False, False, True] * 2
    for step, last in enumerate((2, 5)):
        student, teacher = watch.seen[last]
        expected = torch.lerp(student, teachers[last], momentum_at(step, 0.9, 2))
        torch.testing.assert_close(teacher, expected, rtol=0, atol=1e-7)


def test_a_step_whose_clips_are_all_unreadable_moves_on_with_micro_batches_too():
    data = demo_data(2)
    module = module_for(data, 1, batch_size=2)
    nothing = Batch(torch.zeros(0, 11000, dtype=torch.int16), rows=torch.zeros(0, dtype=torch.int64))
    batches = torch.utils.data.DataLoader([nothing, nothing], batch_size=None)
    pl.Trainer(max_steps=1, accumulate_grad_batches=2, **QUIET).fit(module, batches)
    assert module.trainer.global_step == 1 and all(p.isfinite().all() for p in module.method.parameters())


@pytest.mark.parametrize("precision, algorithm", [("32-true", "norm"), ("bf16-mixed", "norm"), ("bf16-mixed", "value")])
def test_gradients_are_clipped_behind_a_fused_optimiser_too(precision, algorithm):
    """Lightning would refuse the fused one under mixed precision; on GPUs it is what `build_optimizer` gives."""
    weights, data = {}, demo_data()
    for is_fused in (False, True):
        module = module_for(data, 2)
        optimizer = torch.optim.AdamW(module.method.parameters(), lr=1e-3, eps=1e-3, fused=is_fused)
        module.configure_optimizers = lambda optimizer=optimizer: optimizer
        how = dict(gradient_clip_val=1e-4, gradient_clip_algorithm=algorithm, precision=precision)
        pl.Trainer(max_steps=2, **how, **QUIET).fit(module, loader(data, 2))
        largest = max(float(p.grad.abs().max()) for p in module.method.parameters() if p.grad is not None)
        assert largest <= 1.001e-4
        weights[is_fused] = module.method.state_dict()
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=1e-4, atol=1e-6, msg=name)
