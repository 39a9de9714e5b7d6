"""When does a run with a teacher end because its features have collapsed?

ATST's authors (2204.12076, 2306.04186) advise to lower the learning rate or to raise the momentum of the teacher when
the loss is below 0.1 while the features' std falls far below 1 / sqrt(dim). Here that is watched at every optimiser
step, together with the effective rank (see `health`), and ends the run before days are spent on it.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from audiossl.errors import UserError

log = logging.getLogger(__name__)

STDS, RANK = ("student_std", "teacher_std"), "teacher_rank"
ADVICE = "lower the learning rate (optim.lr, optim.base_lr), or raise the momentum of the teacher's moving average"


class CollapseError(UserError):
    """Stop a run whose features no longer tell clips apart, in words that name the step and the values."""


class CollapseAlarm(Callback):
    """Ring when for `patience` optimiser steps in a row the features look collapsed; stop the run, or warn.

    Collapsed is: the loss (2 - 2 cos, 0 to 4) below `loss` while `student_std` or `teacher_std` is below `std_share` of
    1 / sqrt(`method.feature_dim`); or `teacher_rank`, less the 1 of a single direction, below `rank_share` of its
    highest so far. (The student's rank is logged and not judged: that of an untrained predictor's noise is high, and
    its first steps bring it to a handful in healthy runs too.) At a share s of the std two clips' features have a mean
    cosine of 1 - s ** 2: at .25 a clip predicted from another one has a loss of .125, so a loss below .1 says next to
    nothing.

    What the method does not log is not judged. All ranks see the same means and stop at the same step, or, where the
    look at it was put off, during the next; before a checkpoint of it, rank 0 with `CollapseError` and the others with
    `SystemExit(2)`; `action` warn says it once each time it comes to that. Counts and highest ranks are in the
    checkpoint, so a resumed run rings at the same step.
    """

    def __init__(
        self, *, action: Literal["stop", "warn"], loss: float, std_share: float, rank_share: float, patience: int
    ):
        self.action = action
        self.loss, self.std_share, self.rank_share = loss, std_share, rank_share
        self.patience = patience
        self.steps = {"std": 0, "rank": 0}  # in a row
        self.highest: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        module.tell()

    def on_step_seen(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, row: dict[str, float]) -> None:
        """Judge optimiser step `step` by what it logged."""
        row = {name: row[name] for name in ("loss", *STDS, RANK) if name in row}
        if row.keys() <= {"loss"}:
            return
        signs = {"std": self._low_std(row, getattr(module.method, "feature_dim", None)), "rank": self._low_rank(row)}
        for name, sign in signs.items():
            self.steps[name] = self.steps[name] + 1 if sign else 0
        rung = [sign for name, sign in signs.items() if sign and self.steps[name] == self.patience]
        if not rung:
            return
        said = f"step {step}: the features have collapsed: for {self.patience} steps {' and '.join(rung)}; {ADVICE}"
        if self.action == "warn":
            if trainer.is_global_zero:
                log.warning("%s", said)
            return
        if not trainer.is_global_zero:
            raise SystemExit(2)  # rank 0 says why
        raise CollapseError(f"{said}; earlier checkpoints stay; alarm.action=warn goes on all the same")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self.steps), "highest": dict(self.highest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.highest = dict(state_dict["steps"]), dict(state_dict["highest"])

    def _low_std(self, row: dict[str, float], dim: int | None) -> str:
        if dim is None or not row["loss"] < self.loss:
            return ""
        least = self.std_share / math.sqrt(dim)
        low = [f"{name}={row[name]:.3g}" for name in STDS if name in row and row[name] < least]
        if not low:
            return ""
        return (
            f"loss={row['loss']:.3g} is below alarm.loss={self.loss:g} while {', '.join(low)} is below {least:.3g} "
            f"(alarm.std_share={self.std_share:g} of 1/sqrt({dim}))"
        )

    def _low_rank(self, row: dict[str, float]) -> str:
        if RANK not in row:
            return ""
        self.highest[RANK] = highest = max(self.highest.get(RANK, 1.0), row[RANK])
        if row[RANK] - 1 >= self.rank_share * (highest - 1):
            return ""
        return f"the effective rank has fallen away ({RANK}={row[RANK]:.3g} was {highest:.3g})"
