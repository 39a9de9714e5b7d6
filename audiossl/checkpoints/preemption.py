"""How does a run on many ranks end at a signal without losing a step or hanging?

The handlers of `signals` only note the signal. After every optimiser step (and validation batch) the ranks
compare notes; as soon as one has been asked, all save the same step once and leave with the same exit code.
Lightning's own SIGTERM handler broadcasts from inside the handler, which hangs when the ranks are not signalled at
the same moment.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from audiossl.checkpointing import Checkpointing
from audiossl.checkpoints.signals import AT_BOUNDARY, AT_ONCE, LEAVING, Preempted, install_early_handlers, request

log = logging.getLogger(__name__)


class Preemption(Callback):
    """Save with `checkpointing` and raise `Preempted` on all ranks at the first step boundary after a signal.

    SIGTERM and SIGUSR1 give code 75, SIGINT 130; more SIGTERMs change nothing, a second SIGINT leaves at once,
    unsaved. Before the first step a signal leaves without saving. A validation cut short by a signal is not repeated
    by the resumed run. The handlers that stood before `trainer.fit` are in place again after it. Under SLURM give the
    trainer `plugins=[SLURMEnvironment(auto_requeue=False)]`, or Lightning saves and requeues inside of its own
    handler.
    """

    def __init__(self, checkpointing: Checkpointing):
        self.checkpointing = checkpointing
        self._seen_step = self._code = 0
        self._has_begun = False
        self._validation_batches_left = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # last of all: when this one leaves, every other callback has seen the step
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def on_sanity_check_start(self, *_: Any) -> None:
        install_early_handlers()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # here, since Lightning registers its handlers only just before; it also puts back those it found, at the end
        install_early_handlers()
        self._seen_step, self._code, self._has_begun = trainer.global_step, 0, False
        request.when = AT_BOUNDARY

    def on_train_batch_start(self, *_: Any) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._code = self.checkpointing.ranks.maximum(request.code)
        self._leave()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._save_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()
        is_between_steps = trainer.state.fn == TrainerFn.FITTING and self.checkpointing.is_at_boundary
        batches = int(min(sum(trainer.num_val_batches), 2**40)) if is_between_steps else 0
        # ranks may have different numbers of batches, but have to compare notes equally often
        self._validation_batches_left = -self.checkpointing.ranks.maximum(-batches)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._validation_batches_left > 0:
            self._validation_batches_left -= 1
            self._save_if_asked(trainer)
            self._leave()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_asked(trainer)
        self._leave()
        request.when = AT_ONCE

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Preempted):
            request.when = AT_ONCE

    def _save_if_asked(self, trainer: pl.Trainer) -> None:
        self._code = max(self._code, self.checkpointing.ranks.maximum(request.code))
        if self._code:
            saved = self.checkpointing.save(trainer) is not None
            what = "is saved" if saved else "could not be saved"
            log.warning(
                "step %d %s; leaving with exit code %d, as a signal asked", trainer.global_step, what, self._code
            )

    def _leave(self) -> None:
        # not in on_train_batch_end itself: the module's own hook and the loggers see the step after the callbacks do
        if self._code:
            request.code, request.when = self._code, LEAVING
            raise Preempted(self._code)
