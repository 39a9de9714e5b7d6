"""What does a run show while it trains?

A progress bar in optimiser steps with loss, clips/s and the time left; throughput (clips/s, tokens/s, and the share of
the device's peak that the model's own arithmetic uses, MFU) beside the loss; a picture now and then; and, when a step
turns out NaN or infinite, a file with all that is needed to find out why.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from audiossl.checkpoints.atomic import write_atomically
from audiossl.planning.cost import flop_counter
from audiossl.plots import reconstruction_figure
from audiossl.pretraining import NonFiniteError
from audiossl.running.loggers import MetricsCsv, log_picture
from audiossl.running.ranks import others_wait

log = logging.getLogger(__name__)


class Progress(TQDMProgressBar):
    """Show optimiser steps, the loss, clips/s and the time left."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        metrics = {k: v for k, v in super().get_metrics(trainer, module).items() if k != "v_num"}
        metrics |= {"loss": module.last_row["loss"]} if module.last_row else {}
        rate = trainer.callback_metrics.get("clips_per_second")
        return metrics | ({"clips/s": f"{float(rate):.0f}"} if rate is not None else {})

    def init_train_tqdm(self):
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed} < {remaining} left{postfix}]"
        return bar

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.train_progress_bar.initial = self.train_progress_bar.n = done


class Throughput(Callback):
    """Log clips/s and tokens/s of the whole job, and MFU where the device's peak is known.

    Floating-point operations are counted in the first micro-batch that is trained on, backward pass and attention
    included: a teacher has none, patchout has fewer. What other callbacks do (validation, probes, checkpoints) is left
    out of the time; waiting for data is not, and the micro-batch that is counted is.
    """

    def __init__(self, every_steps: int):
        self.every_steps = every_steps
        self.flops_per_clip: float | None = None
        self._counter: Any = None
        self._seconds = 0.0
        self._batches = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.flops_per_clip is None and len(batch):
            self._counter = flop_counter()
            self._counter.__enter__()

    def state_dict(self) -> dict[str, Any]:
        return {"flops_per_clip": self.flops_per_clip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flops_per_clip = state["flops_per_clip"]  # what is counted is not compiled, and rounds otherwise

    def on_exception(self, *_: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out, batch, *_: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops_per_clip, self._counter = self._counter.get_total_flops() / len(batch), None
            module.record({"flops_per_clip": self.flops_per_clip})
            module.waited = 0.0
            return
        self._batches += 1
        is_due = self._batches >= self.every_steps * trainer.accumulate_grad_batches
        if is_due:
            module.look()  # the device is to have done what is counted
        self._seconds += time.perf_counter() - module.idle_since
        module.waited = 0.0
        if not is_due:
            return
        clips = self._batches * module.batch_size * trainer.world_size / self._seconds
        metrics = {"clips_per_second": clips}
        if tokens := getattr(module.method, "tokens_per_clip", None):
            metrics["tokens_per_second"] = clips * tokens
        peak = _peak_flops(module.device, trainer.precision)
        if peak and self.flops_per_clip:
            metrics["mfu"] = self.flops_per_clip * clips / trainer.world_size / peak
        module.record(metrics)
        self._seconds, self._batches = 0.0, 0


def _peak_flops(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    try:
        return get_available_flops(device, dtype)
    except Exception as error:  # a chip Lightning's table does not know: no MFU, but say so
        log.info("no MFU: %s", error)
        return None


class Rows(Callback):
    """Hand a step's row to `metrics.csv` before that step can be in a checkpoint.

    Lightning calls its loggers after every callback, so a run killed right after a save would resume behind a row that
    was never written.
    """

    def __init__(self, metrics: MetricsCsv):
        self.metrics = metrics
        self._seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:
            module.look()
            self.metrics.log_metrics({k: float(v) for k, v in module.row.items()}, trainer.global_step - 1)
            self.metrics.save()


class Pictures(Callback):
    """Draw reconstructions of the same few clips every `every_steps` steps and hand them to the loggers.

    Parameters
    ----------
    clips: `(name, waveform (S,) at the method's rate)` pairs, chosen once.
    """

    def __init__(self, *, every_steps: int, clips: list[tuple[str, torch.Tensor]], folder: Path):
        self.every_steps = every_steps
        self.clips = clips
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        is_boundary = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0
        if self.clips and is_boundary and step % self.every_steps == 0:
            module.settle()
            with others_wait():
                if trainer.is_global_zero:
                    self._draw(trainer, module, step)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        from audiossl.reconstruct import reconstruct_clips

        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step={step:09d}.png"
        reconstruction_figure(reconstruct_clips(module.method, self.clips), path)
        log_picture(trainer, "reconstruction", path)


class Forensics(Callback):
    """Write what a non-finite step looked like to `nonfinite-step=N.pt`: loss, clips, targets, gradients."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, NonFiniteError):
            return
        look = exception.look
        batches = [(b, x) for b, x in look.batches if not x.isfinite()] or look.batches  # the guilty ones, else all
        suffix = f"-rank={trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder / f"nonfinite-step={look.step:09d}{suffix}.pt"
        keys = [key for batch, _ in batches for key in batch.key]
        record = {
            "step": look.step,
            "losses": [float(loss) for _, loss in batches],
            "keys": keys,
            "waveforms": [None if b.waveform is None else b.waveform.cpu() for b, _ in batches],
            "spectrograms": [None if b.spectrogram is None else b.spectrogram.cpu() for b, _ in batches],
            "targets": [None if b.target is None else b.target.cpu() for b, _ in batches],
            "non_finite_gradients": look.spoilt,
        }
        if trainer.is_global_zero:
            weights = module.method.state_dict() | look.statistics
            record["weights"] = {k: v.cpu() for k, v in weights.items()}
        write_atomically(path, lambda file: torch.save(record, file))
        named = ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")
        log.error("%s; clips %s; the update was not applied; what it takes to look into it: %s", exception, named, path)
