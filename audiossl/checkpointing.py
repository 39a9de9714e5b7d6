"""When is a checkpoint saved, and which ones are kept?

Every so many optimiser steps, every so many minutes, when a signal asks for it and at the end; always between two
optimiser steps, so that no half accumulation window is ever saved. The newest few and the best few stay.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from audiossl.checkpoints.atomic import AtomicCheckpointIO, link_or_copy, try_to_remove
from audiossl.checkpoints.files import (
    describe_file,
    is_valid,
    lower_is_better,
    newest_valid,
    resolve_ckpt,
    set_aside_later_than,
)
from audiossl.checkpoints.generators import generator_states, restore_generators
from audiossl.checkpoints.room import check_room, prepare_folder
from audiossl.errors import UserError
from audiossl.running.ranks import Ranks
from audiossl.stepping.watch import settle

__all__ = ["AtomicCheckpointIO", "Checkpointing", "describe_file", "is_valid", "newest_valid", "resolve_ckpt"]

log = logging.getLogger(__name__)

_BEST = re.compile(r"best-step=(\d+)-(.+)=([^=]+)\.ckpt")


class Checkpointing(Checkpoint):
    """Save `folder`/step=N.ckpt, keep the last `keep_last` and the `keep_best` best, and point last.ckpt at the newest.

    every_steps: optimiser steps between two saves, or None; every_minutes: the same by rank 0's clock, or None.
    metric: a name in `trainer.callback_metrics` that ranks the best (lower is better when "loss" or "error" is in the
    name); where a run without validation has no such metric, the mean training loss since the last save ranks them.
    provenance: plain types only, saved under "audiossl". Raises `UserError`, on all ranks, when more than
    `max_failed_saves` saves in a row fail, or the last one, or when the weights are not finite: nothing that cannot be
    loaded, and no NaN, is ever a checkpoint. The trainer needs `plugins=[AtomicCheckpointIO()]`. A moving average of
    the weights must be updated in `optimizer_step`, since Lightning calls the module's `on_train_batch_end` after the
    callbacks'.

    Not Lightning's ModelCheckpoint: that has one trigger each, saves only what it decides itself (a signal cannot ask),
    picks "last" by the files' times without a look inside, and in a folder without last.ckpt starts again from step 0.

    The random generators of every rank (python, numpy, torch, CUDA) are saved too, for callbacks that draw from them.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        every_steps: int | None,
        every_minutes: float | None,
        keep_last: int,
        keep_best: int,
        metric: str | None,
        provenance: dict[str, Any],
        max_failed_saves: int = 0,
    ):
        for name, value, least in (
            ("max_failed_saves", max_failed_saves, 0),
            ("every_steps", every_steps, 1),
            ("keep_last", keep_last, 1),
            ("keep_best", keep_best, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"checkpoint.{name}={value}: must be at least {least}")
        if every_minutes is not None and not every_minutes > 0:
            raise UserError(f"checkpoint.every_minutes={every_minutes}: must be above 0, or null")
        self.folder = Path(folder)
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_best, self.metric = keep_last, keep_best, metric
        self.provenance, self.max_failed_saves = provenance, max_failed_saves
        self.ranks = Ranks()
        self.is_at_boundary = False  # between two optimiser steps, not within an accumulation window
        self._seen_step = self._saved_step = self._failed_step = -1
        self._failed_saves = 0  # in a row
        self._saved_at = 0.0
        self._losses: list[Any] = [0.0, 0]  # sum and count since the last candidate
        self._judged: float | None = None
        self._generators: list[dict[str, Any]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.ranks = Ranks()
        self._on_first_rank(trainer, prepare_folder, self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        first, last = -self.ranks.maximum(-step), self.ranks.maximum(step)
        if first != last:
            raise UserError(f"the ranks resume from different steps, {first} to {last}; do they see the same files?")
        self._seen_step, self._saved_at = step, time.monotonic()
        self._on_first_rank(trainer, check_room, self.folder, trainer, pl_module)
        if trainer.is_global_zero:
            set_aside_later_than(self.folder, step)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._generators is not None:
            restore_generators(self._generators)
            self._generators = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._losses[0] = self._losses[0] + outputs["loss"].detach().float() * trainer.accumulate_grad_batches
            self._losses[1] += 1
        self.is_at_boundary = trainer.global_step != self._seen_step
        if not self.is_at_boundary:
            return
        self._seen_step = trainer.global_step
        if self._is_due(trainer):
            self.save(trainer)
            self._judge(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self.is_at_boundary:
            self._judge(trainer, only_metric=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self.save(trainer, is_last=True)
            self._judge(trainer)
        if self.metric and self.keep_best and self._judged is None and trainer.enable_validation:
            known = ", ".join(trainer.callback_metrics) or "none"
            log.warning(
                "no best checkpoint: checkpoint.metric=%s was never logged; logged were: %s", self.metric, known
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["audiossl"] = self.provenance

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss_sum": float(self._losses[0]),
            "loss_count": self._losses[1],
            "generators": self.ranks.gather(generator_states()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = [state_dict["loss_sum"], state_dict["loss_count"]]
        self._generators = state_dict["generators"]

    def save(self, trainer: pl.Trainer, is_last: bool = False) -> Path | None:
        """Save the state between two optimiser steps (call it on all ranks); returns the file.

        None for a save that failed, while no more than `max_failed_saves` in a row have; of the last step it raises.
        """
        step = trainer.global_step
        path = self.folder / f"step={step:09d}.ckpt"
        if self._saved_step == step:
            return path
        if self._failed_step == step and not is_last:
            return None
        settle(trainer.lightning_module)
        self._refuse_non_finite(trainer)
        self._losses = self.ranks.mean(self._losses)
        error = None
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except Exception as failure:  # whatever it is, the other ranks wait at the end of save_checkpoint
            error = failure
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if error is None and trainer.is_global_zero:
            try:
                link_or_copy(path, self.folder / "last.ckpt")
            except OSError as failure:
                error = UserError(f"{self.folder / 'last.ckpt'}: not updated, {failure.strerror}; {path.name} is saved")
                error.__cause__ = failure
        self._saved_at = time.monotonic()
        if failed := self.ranks.maximum(0 if error is None else 1 if isinstance(error, UserError) else 2):
            self._failed_step, self._failed_saves = step, self._failed_saves + 1
            error = error or UserError(f"{path}: not saved, another rank failed to; its log says why")
            if failed == 2 or is_last or self._failed_saves > self.max_failed_saves:
                raise error
            log.error("%s; going on, %d of %d failed saves in a row", error, self._failed_saves, self.max_failed_saves)
            return None
        self._saved_step, self._failed_saves = step, 0
        if trainer.is_global_zero:
            log.info("saved %s", path)
            for old in sorted(self.folder.glob("step=*.ckpt"), reverse=True)[self.keep_last :]:
                try_to_remove(old)
        return path

    def _on_first_rank(self, trainer: pl.Trainer, check: Callable[..., None], *about: Any) -> None:
        """Let the rank that writes check something; where it raises `UserError`, the others leave with it, silently."""
        problem = None
        if trainer.is_global_zero:
            try:
                check(*about)
            except UserError as error:
                problem = error
        if self.ranks.maximum(problem is not None):
            raise problem or SystemExit(2)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        by_steps = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        if by_steps or self.every_minutes is None:
            return by_steps
        passed = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return bool(self.ranks.maximum(trainer.is_global_zero and passed))

    def _judge(self, trainer: pl.Trainer, only_metric: bool = False) -> None:
        """Keep this step as one of the best if its metric is; `only_metric` leaves the training loss out of it."""
        name, value = "loss", math.nan
        if not only_metric:
            total, count = self.ranks.mean(self._losses)
            self._losses = [0.0, 0]
            if count and (self.metric is None or not trainer.enable_validation):
                value = total / count
        if self.metric is not None and self.metric in trainer.callback_metrics:
            name, value = self.metric, float(trainer.callback_metrics[self.metric])
            if value == self._judged:
                return self._keep(trainer, name, math.nan)  # an earlier step's measurement, seen again
            self._judged = value
        self._keep(trainer, name, value)

    def _keep(self, trainer: pl.Trainer, name: str, value: float) -> None:
        sign = 1 if lower_is_better(name) else -1
        name = re.sub(r"[^\w.-]", "_", name)
        ranked = sorted((sign * float(found[3]), found[0]) for found in self._best() if found[2] == name)
        has_room = len(ranked) < self.keep_best
        wanted = math.isfinite(value) and self.keep_best > 0 and (has_room or sign * value < ranked[-1][0])
        if not self.ranks.maximum(trainer.is_global_zero and wanted):
            return
        path = self.save(trainer)
        if path is None or not trainer.is_global_zero:
            return
        best = f"best-step={trainer.global_step:09d}-{name}={value:.6g}.ckpt"
        link_or_copy(path, self.folder / best)
        kept = {name for _, name in sorted([*ranked, (sign * value, best)])[: self.keep_best]}
        for found in self._best():
            if found[0] not in kept:
                try_to_remove(self.folder / found[0])

    def _best(self) -> list[re.Match[str]]:
        matches = (_BEST.fullmatch(path.name) for path in self.folder.glob("best-*.ckpt"))
        return [found for found in matches if found is not None]

    def _refuse_non_finite(self, trainer: pl.Trainer) -> None:
        # of a weight that is spread over the ranks (ZeRO stage 3) each looks at its piece
        pieces = (getattr(p, "ds_tensor", p) for p in trainer.lightning_module.parameters())
        parameters = [p.detach() for p in pieces if p.is_floating_point()]
        finite = [p.isfinite().all() for p in parameters]
        if self.ranks.maximum(bool(finite) and not torch.stack(finite).all()):
            raise UserError(
                f"step {trainer.global_step}: the weights hold NaN or infinity and are not saved; resume with ckpt=last"
                " from the checkpoint before and lower the learning rate, or look for a bad clip"
            )
