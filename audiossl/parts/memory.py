"""How does a resumed run remember the clips that a method mixes into later ones?

A method's memory is too large for a checkpoint (2,000 spectrograms of 64 x 1001 are 512 MB a rank), and a function of
what came before: which clips, which crops. So the checkpoint holds their keys, and a resumed run reads those clips
again and hands them to the method as they came, before it takes its first step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from audiossl.batch import Batch
from audiossl.running.ranks import Ranks

log = logging.getLogger(__name__)

SPARE_STEPS = 8  # read as well where clips were skipped and one memory's length of steps does not fill it


class Memory(Callback):
    """Save the keys of `method.memory` (banks with `keys()` and `clear()`) and fill it again on resume.

    `replay(first_step, last_step)` gives this rank's micro-batches of the optimiser steps from the first up to the
    last, which is left out. `method.remember(batch, generator)` takes one.
    """

    def __init__(self, replay: Callable[[int, int], Iterable[Batch]]):
        self.replay = replay
        self._saved: list[list[list[str]]] = []  # by rank, by bank

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.ranks = Ranks()
        self.banks = list(module.method.memory)

    def state_dict(self) -> dict[str, Any]:
        return {"keys": self.ranks.gather([bank.keys() for bank in self.banks])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state["keys"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if not step or not self._saved:
            return
        if (ranks := len(self._saved)) != trainer.world_size:
            log.warning("the mixup memory starts empty: saved by %d ranks, now %d", ranks, trainer.world_size)
            return
        wanted = self._saved[trainer.global_rank]
        most = max(map(len, wanted))
        steps = math.ceil(most / (module.batch_size * trainer.accumulate_grad_batches))
        for first in (step - steps, step - 2 * steps - SPARE_STEPS):
            self._fill(trainer, module, max(first, 0))
            if [bank.keys() for bank in self.banks] == wanted or first <= 0:
                break
        for bank, keys in zip(self.banks, wanted, strict=True):
            if differing := len(keys) - sum(a == b for a, b in zip(bank.keys(), keys, strict=False)):
                log.warning("the mixup memory differs in %d of %d clips from what was saved", differing, len(keys))
        log.info("the mixup memory of %d clips is as it was at step %d", most, step)

    def _fill(self, trainer: pl.Trainer, module: pl.LightningModule, first_step: int) -> None:
        for bank in self.banks:
            bank.clear()
        accumulate = trainer.accumulate_grad_batches
        num_batches = (trainer.global_step - first_step) * accumulate
        module.method.train()
        batches = self.replay(first_step, trainer.global_step)
        bar = tqdm(batches, total=num_batches, desc="remembering", unit="batch", disable=num_batches < 50)
        for number, batch in enumerate(bar):
            batch = batch.to(module.device)
            noise = module.noise_of(first_step + number // accumulate, batch)
            module.method.remember(module.prepare(batch), generator=noise)
