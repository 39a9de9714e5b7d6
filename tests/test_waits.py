"""Where the device refuses an update by itself, the host asks it nothing from one row of the log to the next."""

import lightning.pytorch as pl
import pytest
import torch
from methods import settings_of
from test_finetuning import batch_for
from test_finetuning import build as fine_tuned
from test_pretraining import OPTIM, QUIET
from waits import SHORT, Waits, count, fit_with

from audiossl.batch import Batch
from audiossl.pretraining import Pretraining

METHODS = ["audiomae", "atst_clip", "atst_frame", "passt"]


@pytest.mark.parametrize("model", METHODS)
def test_between_two_rows_of_the_log_a_step_asks_the_device_nothing(model, fused, tmp_path, monkeypatch):
    """With the progress bar, the alarm and everything else a run has; but its rows, one every 50 steps."""
    waits = Waits(2, 6)
    rare = ("trainer.max_steps=7", "trainer.log_every_n_steps=50", "trainer.enable_progress_bar=true")
    fit_with(waits, tmp_path, monkeypatch, *settings_of(model), *SHORT, *rare)
    assert not count(waits), count(waits)


@pytest.mark.parametrize("kind", ["any encoder", "one label", "desed"])
def test_fine_tuning_asks_the_device_nothing_either(kind, fused):
    """Clips with several labels and with one, and moments, of which some clips have none."""
    method, waits = fine_tuned(kind), Waits(2, 5)
    sizes = dict(batch_size=4, waveform_rate_hz=method.frontend.rate_hz, max_steps=6, seed=0)
    batches = torch.utils.data.DataLoader([batch_for(method) for _ in range(6)], batch_size=None)
    pl.Trainer(max_steps=6, callbacks=[waits], **QUIET).fit(Pretraining(method.train(), optim=OPTIM, **sizes), batches)
    assert not count(waits), count(waits)


class Strict(pl.Callback):
    """Let torch raise where the host waits for the GPU, between two steps."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.steps = first, last, 0

    def on_train_batch_start(self, trainer, *_):
        is_on = self.first <= trainer.global_step < self.last
        self.steps += is_on
        torch.cuda.set_sync_debug_mode("error" if is_on else "default")

    def on_train_epoch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_epoch_end


@pytest.mark.gpu
@pytest.mark.parametrize("model", METHODS)
def test_on_a_gpu_torch_sees_no_wait_in_a_step(model, tmp_path, monkeypatch):
    """Never run where this was written: there was no GPU."""
    strict, device = Strict(3, 9), ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
    rare = ("trainer.max_steps=10", "trainer.log_every_n_steps=50", "trainer.enable_progress_bar=true")
    fit_with(strict, tmp_path, monkeypatch, *settings_of(model), *SHORT, *device, *rare)
    assert strict.steps == 6


@pytest.mark.gpu
def test_batches_sent_beside_what_a_gpu_computes_arrive_whole():
    """Never run where this was written: there was no GPU. Each is sent while a long product is computed."""
    busy, found = torch.randn(4096, 4096, device="cuda"), []
    for number in range(20):
        batch = Batch(waveform=torch.full((64, 160_000), number, dtype=torch.int16)).pin_memory()
        for _ in range(3):
            busy = busy @ busy / busy.norm()
        found.append(batch.to("cuda").waveform.sum())
    assert [int(total) for total in found] == [number * 64 * 160_000 for number in range(20)]


def test_a_batch_is_moved_whole_but_for_what_the_host_looks_at():
    batch = Batch(waveform=torch.ones(2, 3), rows=torch.arange(2), key=["a", "b"], start_seconds=torch.zeros(2))
    moved = batch.to("meta")
    assert moved.waveform.is_meta and moved.rows.is_meta and moved.key == ["a", "b"]
    assert moved.start_seconds is batch.start_seconds and moved.to("meta").waveform.is_meta


def test_what_is_counted_as_a_wait_is_found(tmp_path, monkeypatch):
    """With the plain optimiser a step is looked at at once, and its own count of steps is read."""
    waits = Waits(2, 4)
    waits.on_train_batch_end = lambda trainer, module, *_: module.method.mask_token[torch.ones(1, 1, 24).bool()].sum()
    rare = ("trainer.max_steps=5", "trainer.log_every_n_steps=50")
    fit_with(waits, tmp_path, monkeypatch, *settings_of("atst_frame"), *SHORT, *rare)
    found = " ".join(count(waits))
    assert "index by a mask" in found and "_local_scalar_dense" in found
