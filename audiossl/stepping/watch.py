"""Who looks at a step, when, and who is told what was seen?

A LightningModule queues the look at each optimiser step and reads the one before, so that the device always has work.
Whoever writes something down, or judges the weights, calls for the last look first: `settle`.
"""

from __future__ import annotations

import time

import lightning.pytorch as pl

from audiossl.stepping.look import Look


class Watched(pl.LightningModule):
    """Keep the last look, not read yet, and what was seen in the one before.

    Callbacks with `on_step_seen(trainer, module, step, row)` are told the numbers of every optimiser step, as floats
    and in order, a step late where the look was put off, but before that step is in a checkpoint or validated.
    """

    def __init__(self):
        super().__init__()
        self.last_row: dict[str, float] = {}  # the last one that was read
        self.waited = 0.0  # seconds: for looks, since somebody set it back
        self._pending: Look | None = None
        self._untold: tuple[int, dict[str, float]] | None = None

    def put_off(self, look: Look) -> None:
        """Read a look later."""
        self.look()
        self._pending = look

    def look(self) -> None:
        """Read the look that was put off, if one was; raises `NonFiniteError` where that step was none."""
        look, self._pending = self._pending, None
        if look is None:
            return
        self.tell()
        began = time.perf_counter()
        look.read()
        self.waited += time.perf_counter() - began
        self.last_row, self._untold = look.row, (look.step, look.row)

    def tell(self) -> None:
        """Tell the callbacks what was seen."""
        told, self._untold = self._untold, None
        if told is not None:
            for callback in self.trainer.callbacks:
                if hasattr(callback, "on_step_seen"):
                    callback.on_step_seen(self.trainer, self, *told)

    def settle(self) -> None:
        """Look and tell: after it, nothing about the steps so far is in doubt."""
        self.look()
        self.tell()

    def on_validation_start(self) -> None:
        self.settle()

    on_train_epoch_end = on_validation_start


def settle(module: pl.LightningModule) -> None:
    """Settle what a module has put off, if it is one that puts off."""
    if isinstance(module, Watched):
        module.settle()


def look(module: pl.LightningModule) -> None:
    """Read what a module has put off, if it is one that puts off; nobody is told yet."""
    if isinstance(module, Watched):
        module.look()
