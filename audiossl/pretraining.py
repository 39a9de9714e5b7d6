"""How is any method trained?

One LightningModule runs them all: it hands the method a batch of waveforms on the device and the noise of this step,
sets learning rate and weight decay as pure functions of the step, refuses a non-finite update before it is applied, and
tells the method when an optimiser step is done (a teacher's moving average belongs there). Nothing here is random by
itself: every number comes from (seed, step), so a resumed run needs no generator state. Where the device can refuse an
update by itself, the host looks at a step during the next one, and never waits.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from audiossl.batch import Batch
from audiossl.noise import Noise, mix_seed
from audiossl.optim import OptimSettings, build_optimizer
from audiossl.parts.blocks import compiled
from audiossl.parts.health import Spectrum
from audiossl.spectrogram import resample, to_float
from audiossl.stepping.look import Gradients, Look, NonFiniteError, batch_statistics
from audiossl.stepping.refusal import can_skip, skip_unless_finite, step_done
from audiossl.stepping.watch import Watched

__all__ = ["NonFiniteError", "Pretraining", "prepare"]

VALIDATION_SEED = 20_211  # the masks of every validation, of every run: losses stay comparable


def prepare(batch: Batch, frontend: nn.Module, waveform_rate_hz: int) -> Batch:
    """Turn a loader's int16 at `waveform_rate_hz` into floats at the front end's rate; returns a new batch."""
    if batch.waveform is None:
        return batch
    rate = frontend.rate_hz
    waveform = resample(to_float(batch.waveform), waveform_rate_hz, rate)
    samples = batch.num_samples
    if samples is not None and rate != waveform_rate_hz:
        samples = torch.ceil(samples.double() * rate / waveform_rate_hz).long().clamp(max=waveform.shape[1])
    return Batch(**{**vars(batch), "waveform": waveform, "num_samples": samples})


class Pretraining(Watched):
    """Train a method (see `audiossl.methods`) for `max_steps` optimiser steps.

    `waveform_rate_hz` is the rate of the loader's waveforms; they are resampled on the device when the method's front
    end wants another. `batch_size` is per process and micro-batch. Works with a bare `lightning.Trainer` and any loader
    of `Batch`es whose order is a function of the step.
    """

    def __init__(
        self,
        method: nn.Module,
        *,
        optim: OptimSettings,
        max_steps: int,
        batch_size: int,
        waveform_rate_hz: int,
        seed: int,
    ):
        super().__init__()
        self.method = method
        self.optim = optim
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.waveform_rate_hz = waveform_rate_hz
        self.seed = seed
        self.step_batches: list[tuple[Batch, Tensor]] = []  # with their losses: what this optimiser step has seen
        self.idle_since = 0.0  # seconds: when the last step's own work, and what callbacks did after it, was over
        self.row: dict[str, Tensor | float] = {}
        self.excess: Tensor | None = None
        self._window: list[dict[str, Tensor]] = []
        self._spectra: dict[str, list[Spectrum]] = {}
        self._refused: Tensor | None = None  # on the device: 1 where it left the last update out

    @property
    def global_batch_size(self) -> int:
        """Count the clips of one optimiser step over all ranks and micro-batches."""
        return self.batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def prepare(self, batch: Batch) -> Batch:
        """Turn the loader's int16 into floats at the front end's rate; returns a new batch."""
        return prepare(batch, self.method.frontend, self.waveform_rate_hz)

    def noise_of(self, step: int, batch: Batch) -> Noise:
        """Give the noise of optimiser step `step` for the rows of one of its micro-batches."""
        return Noise(self.seed, step, batch.rows, self.global_batch_size, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step, micro = self.global_step, batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix_seed(self.seed, "dropout", step))  # what it drops is shared by all clips of a step
        noise = self.noise_of(step, batch)
        with noise.of_this_step(), compiled():
            output = self.method(self.prepare(batch), generator=noise)
        if micro == 0:
            self.step_batches = []
            self._spectra = {k: [] for k, v in output.items() if isinstance(v, Spectrum)}
        self.step_batches.append((batch, output["loss"].detach()))
        for name, spectra in self._spectra.items():
            spectra.append(output[name])
        self._window.append({k: v.detach() for k, v in output.items() if k not in self._spectra})
        loss = output["loss"]
        if "weight" in output and self.trainer.accumulate_grad_batches > 1:
            loss = loss * (output["weight"] / self._window[0]["weight"].clamp(min=1))  # `excess` is divided out later
        if len(self._window) == self.trainer.accumulate_grad_batches:
            self._log_window()
        return loss

    def _begin_idle(self, *_) -> None:
        self.idle_since = time.perf_counter() - self.waited  # a wait for the device is no rest

    on_train_start = on_validation_end = _begin_idle

    def on_train_batch_end(self, *_) -> None:
        if not self._window and self.global_step % self.trainer.log_every_n_steps == 0:
            self.settle()  # Lightning is about to read what was logged
            self._log_ranks()
        self._begin_idle()

    def _log_window(self) -> None:
        """Record the mean of every scalar over the micro-batches of this optimiser step and over the ranks.

        Where the method says what a micro-batch weighs, `self.excess` becomes what the gradients are too large by: each
        was weighed against the first one, since the sum was not known yet.
        """
        weights = None
        if len(self._window) > 1 and "weight" in self._window[0]:
            weights = torch.stack([w["weight"] for w in self._window])
            self.excess = (weights.sum().clamp(min=1) / len(weights)) / weights[0].clamp(min=1)
            weights = weights / weights.sum().clamp(min=1)
        names = [name for name in self._window[0] if name != "weight"]
        stacks = {name: torch.stack([w[name].float() for w in self._window]) for name in names}
        means = {name: x.mean() if weights is None else (x * weights).sum() for name, x in stacks.items()}
        self._window.clear()
        self.row = {}
        self.record({k: self.trainer.strategy.reduce(v, reduce_op="mean") for k, v in means.items()})

    def record(self, metrics: dict[str, Tensor | float]) -> None:
        """Log what belongs to this optimiser step, and keep it in `row` for `callbacks.Rows`."""
        self.row |= metrics
        for name, value in metrics.items():  # plain numbers stay on the host, and Lightning's progress bar shows none
            value = value if isinstance(value, Tensor) else torch.tensor(float(value))
            self.log(name, value, on_step=True, on_epoch=False)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        noise = Noise(VALIDATION_SEED, batch_idx, batch.rows, self.batch_size * self.trainer.world_size, self.device)
        with compiled():
            loss = self.method(self.prepare(batch), generator=noise)["loss"]
        self.log("val_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        allow_fused = self._scaler is None  # which would not unscale before our look
        peak = self.optim.peak_lr(self.global_batch_size)
        return build_optimizer(self.method, self.optim, lr=peak, allow_fused=allow_fused)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by hand: Lightning refuses to behind a fused optimiser, for the sake of a scaler that is not there."""
        how = dict(gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)
        if self._scaler is not None or self._is_sharded:
            return self.clip_gradients(optimizer, **how)
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip = (
                torch.nn.utils.clip_grad_value_
                if gradient_clip_algorithm == "value"
                else torch.nn.utils.clip_grad_norm_
            )
            clip(parameters, gradient_clip_val)

    @property
    def _scaler(self):
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Count micro-batches anew: another accumulation with the same global batch resumes at the same clips."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        shift = done - progress["current"]["processed"]
        for scope in ("current", "total"):
            for count in ("ready", "started", "processed", "completed"):
                progress[scope][count] += shift

    def lr_at(self, step: int) -> float:
        """Give the learning rate of optimiser step `step` (0-based)."""
        return self.optim.lr_at(step, global_batch=self.global_batch_size, max_steps=self.max_steps)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        step = self.global_step
        changing = {"lr": self.lr_at(step)}
        if self.optim.final_weight_decay is not None:
            changing["weight_decay"] = self.optim.weight_decay_at(step, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = changing["lr"] * group.get("lr_scale", 1.0)
            if group["weight_decay"]:
                group["weight_decay"] = changing.get("weight_decay", group["weight_decay"])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._window:
            return  # DeepSpeed accumulates by itself, and is asked for a step after every micro-batch
        if self._is_sharded:
            self.trainer.strategy.divide_gradient_by(1.0)  # the next window's, before it begins
            self.record({"grad_norm": self.trainer.strategy.gradient_norm()})
            self._spectra = {}
            self._look(Gradients.of(self.method)).read()
        self.record(changing)
        if hasattr(self.method, "after_step"):
            with step_done(self._refused):
                self.method.after_step(step, self.max_steps)

    def on_before_optimizer_step(self, optimizer) -> None:
        """Measure the gradient; a non-finite one ends the run before any weight moves: here, inside the closure.

        A fused optimiser is told on the device to leave such an update out, and the run ends within the next step, or
        when something is about to be saved, validated or logged. Under 16-mixed an overflowing gradient is the scaler's
        to skip; a non-finite loss still ends the run.
        """
        if self._window:
            return
        if self._is_sharded:  # no rank has the whole gradient, whose norm DeepSpeed tells after a step, taken or not
            excess = 1.0 if self.excess is None else float(self.excess)
            # Lightning averages over micro-batches, and DeepSpeed does once more
            self.trainer.strategy.divide_gradient_by(excess / self.trainer.accumulate_grad_batches)
            self.put_off(self._look(Gradients.of(self.method)))
            self.look()
            return self._log_ranks()
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        if self.excess is not None and gradients:
            torch._foreach_div_(gradients, self.excess.to(gradients[0].device))
        found = Gradients.of(self.method)
        self.record({"grad_norm": found.norm})
        can_wait = self._scaler is None and can_skip(optimizer)
        self.put_off(self._look(found, can_wait))
        if can_wait:
            self._refused = skip_unless_finite(optimizer, self.row["loss"], found.norm)
        else:
            self.look()
            self._log_ranks()

    @property
    def _is_sharded(self) -> bool:
        return hasattr(self.trainer.strategy, "gradient_norm")

    def _look(self, gradients: Gradients, can_wait: bool = False) -> Look:
        seen = dict(gradients=gradients, batches=self.step_batches, judges_norm=self._scaler is None)
        statistics = batch_statistics(self.method) if can_wait else {}
        return Look(self.global_step, self.row, self._spectra, **seen, statistics=statistics)

    def _log_ranks(self) -> None:
        self.record({name: self.row[name] for name in self._spectra})
