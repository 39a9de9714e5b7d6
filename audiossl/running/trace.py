"""Which clips, and which noise, did every step see?

`trace=true` writes `trace.csv`: a row per micro-batch with its keys and a hash of what the encoder was given. Two runs
with equal traces saw the same data, crops and masks in the same order; a resumed run's trace has no seam.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

COLUMNS = ("step", "micro_batch", "keys", "encoder_input")


class Trace(Callback):
    """Append a row per micro-batch of this rank to `trace.csv` (`trace-rank=R.csv` beyond rank 0)."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._digest = hashlib.sha256()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        suffix = f"-rank={trainer.global_rank}" if trainer.global_rank else ""
        self.path = self.folder / f"trace{suffix}.csv"
        kept = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) < trainer.global_step]
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *kept])
        self._hook = module.method.encoder.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, encoder: torch.nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        for tensor in (*arguments, *named.values()):
            if isinstance(tensor, torch.Tensor):
                self._digest.update(tensor.detach().cpu().numpy().tobytes())

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._digest = hashlib.sha256()
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out, batch, batch_idx: int) -> None:
        micro = batch_idx % trainer.accumulate_grad_batches
        row = [self._step, micro, " ".join(batch.key), self._digest.hexdigest()[:16]]
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(row)

    def on_train_end(self, *_: Any) -> None:
        self._hook.remove()
