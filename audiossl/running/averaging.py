"""What are the weights of a whole stretch of training worth, taken together?

Stochastic weight averaging (1803.05407): from some point on, a snapshot now and then joins a running mean. The mean is
often better than the last weights and costs no training. As PaSST (2110.05069) uses it: learning rate and training
itself know nothing of it. Torch's `AveragedModel` holds the mean; this says when, saves it and hands it on.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel

from audiossl.checkpoints.room import bytes_of
from audiossl.errors import UserError
from audiossl.stepping.watch import look

log = logging.getLogger(__name__)


class Averaging(Callback):
    """Average the method's weights: a snapshot after `start` of training, then one every `every`.

    start None: no average. `unit` says what both count: `epochs`, optimiser `steps`, or shares of the `run`. Parameters
    are averaged and buffers copied, so batch normalisation keeps the statistics of the last weights. The mean and its
    number of snapshots are in the checkpoint; a resumed run ends with the same bits. The mean is a function of the
    weights after whole optimiser steps, so accumulation and ranks change nothing. It must stand before the callbacks
    that save.

    Raises `UserError` where the first snapshot lies behind the end.
    """

    def __init__(
        self,
        *,
        start: float | None,
        every: float,
        unit: Literal["epochs", "steps", "run"],
        steps_per_epoch: float,
        max_steps: int,
    ):
        if unit not in ("epochs", "steps", "run"):
            raise UserError(f"swa.unit={unit!r}: choose epochs, steps or run")
        scale = {"epochs": steps_per_epoch, "steps": 1, "run": max_steps}[unit]
        self.every_steps = max(round(every * scale), 1)
        self.first_step = math.inf if start is None else max(round(start * scale), 1)
        if start is not None and self.first_step > max_steps:
            raise UserError(
                f"swa.start={start} ({unit}) is step {self.first_step}, behind the run's {max_steps}; "
                "for a short one take swa.unit=run swa.start=0.5 swa.every=0.05"
            )
        self.model: AveragedModel | None = None
        self._seen_step = 0

    def averages(self) -> dict[str, nn.Module]:
        """Give the averaged method under the name `swa`, once there is a snapshot."""
        return {} if self.model is None or not int(self.model.n_averaged) else {"swa": self.model.module}

    @property
    def bytes_to_save(self) -> int:
        """Count what the average will add to a checkpoint, once there is a snapshot."""
        return 0 if self.model is None else bytes_of(self.model.module.state_dict().values())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.first_step < math.inf and self.model is None:
            self.model = AveragedModel(pl_module.method).requires_grad_(False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        if self.model is not None:
            self.model.to(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # within an accumulation window
            return
        self._seen_step = step
        if step >= self.first_step and (step - self.first_step) % self.every_steps == 0:
            look(pl_module)
            self.model.update_parameters(pl_module.method)
            log.debug("snapshot %d joins the average after step %d", int(self.model.n_averaged), step)

    def state_dict(self) -> dict[str, Any]:
        if not self.averages():
            return {}
        return {"num_snapshots": int(self.model.n_averaged), "weights": self.model.module.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and self.model is not None:
            self.model.module.load_state_dict(state_dict["weights"])
            self.model.n_averaged.fill_(state_dict["num_snapshots"])
