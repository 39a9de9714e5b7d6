"""How well does a method that learns from labels know the classes, while it trains and in the end?

During every validation the logits of all clips of all ranks are kept and scored at once, since neither average
precision nor AUC is a mean over batches; those of too many moments are counted, rounded (`scoring.tally`). A method
takes part by `logits(batch) -> (B, C)`, of a prepared batch and in eval mode; other sets of weights, such as an average
over training, are scored beside its own.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import Tensor, nn

from audiossl.batch import Batch
from audiossl.embeddings import evaluating
from audiossl.metrics import Scores, d_prime
from audiossl.running.ranks import Ranks
from audiossl.scoring.tally import Tally

log = logging.getLogger(__name__)

NUM_SHOWN = 10  # of the best classes, and of the worst


@torch.no_grad()
def logits_and_targets(scored: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Take a module's logits of a prepared batch, in eval mode, and what they should say: (n, C) float32 twice.

    A row is a clip, or a moment whose labels are all known where the module scores moments and the batch has targets
    for them (`batch.frame_target`); with targets of clips alone it has to pool its moments itself (`clip_logits`). A
    clip's label that nobody judged is NaN.
    """
    if hasattr(scored, "labelled"):
        batch = scored.labelled(batch)
    with evaluating(scored):
        if batch.frame_target is None and hasattr(scored, "clip_logits"):
            logits = scored.clip_logits(batch).float()
        else:
            logits = scored.logits(batch).float()
    if logits.ndim == 2:
        return logits, batch.target
    is_known = ~batch.frame_target.isnan().any(2)
    return logits[is_known], batch.frame_target[is_known]


def named(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Name the numbers of several sets of weights: `val_mAP` of the method's own (""), `val_mAP_swa` of "swa"."""
    numbers = {}
    for name, found in scores.items():
        suffix = f"_{name}" if name else ""
        numbers[f"val_mAP{suffix}"] = found.mean_average_precision
        numbers[f"val_auc{suffix}"] = found.mean_auc
        numbers[f"val_d_prime{suffix}"] = found.d_prime
        if found.accuracy is not None:
            numbers[f"val_accuracy{suffix}"] = found.accuracy
    return numbers


def score_classes_of(
    method: nn.Module,
    data: Any,
    vocabulary: list[str] | None,
    folder: Path,
    averages: Callable[[], Mapping[str, nn.Module]],
) -> list[ClassScores]:
    """Score the classes where the method can name them and there are clips to validate on: one callback, or none.

    `averages` gives other sets of weights by name; a method may have its own (`averages()`).
    """
    if not (data.needs_labels and hasattr(method, "logits") and data.num_validation_clips):
        return []
    own = getattr(method, "averages", dict)
    return [ClassScores(vocabulary=vocabulary, folder=folder, others=lambda: {**own(), **averages()})]


class ClassScores(Callback):
    """Log `val_mAP`, `val_auc`, `val_d_prime` (and `val_accuracy` where every clip has one label) of each validation.

    `others` gives further modules with `logits` by name, asked anew at each validation, and the same on all ranks. All
    names can be `checkpoint.metric`. `step` and `scores` hold the last validation, `unit` what its rows were: clips, or
    moments of them.
    """

    def __init__(self, *, vocabulary: list[str], folder: Path, others: Callable[[], Mapping[str, nn.Module]]):
        self.vocabulary, self.folder, self.others = vocabulary, Path(folder), others
        self.step, self.unit = -1, "clips"
        self.scores: dict[str, Scores] = {}
        self._tallies: dict[str, Tally] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ranks = Ranks()

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._begin(module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._collect(trainer, module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._score(trainer)
        for name, value in named(self.scores).items():
            module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def complete(
        self, trainer: pl.Trainer, module: pl.LightningModule, validation: Callable[[], Iterable[Batch]]
    ) -> None:
        """Score the last weights, unless a validation has, and write `per_class.csv`; on all ranks, after training."""
        if self.step != trainer.global_step:
            home = module.device
            module.to(trainer.strategy.root_device)
            self._begin(module)
            for batch in validation():
                self._collect(trainer, module, batch.to(module.device))
            self._score(trainer)
            module.to(home)
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics(named(self.scores), step=trainer.global_step - 1)  # the step that made them
                logger.save()
        if trainer.is_global_zero:
            self._write(self.folder / "per_class.csv")

    def results(self) -> dict[str, Any]:
        """Give what `results.json` holds of the last scores; None stands for what is not finite."""
        own = self.scores[""]
        about = {"step": self.step, self.unit: own.num_clips, "classes": len(self.vocabulary)}
        numbers = {name: value if math.isfinite(value) else None for name, value in named(self.scores).items()}
        about |= {"classes_without_a_clip": own.num_absent, "exact": own.is_exact}
        return {"scores": numbers, "validation": about}

    def table(self) -> Table:
        """Show the best and the worst classes by AP, all of them where they are few."""
        own = self.scores[""]
        ranked = sorted(np.flatnonzero(own.clips).tolist(), key=lambda c: -own.average_precision[c])
        cut = NUM_SHOWN if len(ranked) > 2 * NUM_SHOWN else len(ranked)
        title = [f"{own.num_clips} validation {self.unit}, {len(ranked)} classes"]
        title += [f"{own.num_absent} more have no {self.unit.removesuffix('s')}"] if own.num_absent else []
        title += [] if own.is_exact else ["scores rounded to float16, to be counted: they are too many to keep"]
        for name, found in self.scores.items():
            what = f"mAP {found.mean_average_precision:.3f}, AUC {found.mean_auc:.3f}, d' {found.d_prime:.2f}"
            title.append(f"{name}: {what}" if name else what)
        table = Table(title="\n".join(title), title_justify="left")
        for column in ("class", self.unit, "AP", "AUC", "d'"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for number in ranked[:cut]:
            table.add_row(*self._cells(number))
        if cut < len(ranked):
            table.add_section()
            for number in ranked[-NUM_SHOWN:]:
                table.add_row(*self._cells(number))
        return table

    def _cells(self, number: int) -> list[str]:
        own = self.scores[""]
        auc = own.auc[number]
        values = [f"{value:.3f}" for value in (own.average_precision[number], auc)]
        return [self.vocabulary[number], str(own.clips[number]), *values, f"{d_prime(auc):.2f}"]

    def _begin(self, module: pl.LightningModule) -> None:
        self._modules = {"": module.method, **self.others()}
        self._tallies, self._num_clips = {name: Tally(len(self.vocabulary)) for name in self._modules}, 0

    def _collect(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch) -> None:
        if not len(batch):  # a rank may have none of the last clips
            return
        prepared = module.prepare(batch)
        self._num_clips += len(batch)
        for name, scored in self._modules.items():
            with trainer.precision_plugin.forward_context():
                logits, targets = logits_and_targets(scored.to(module.device), prepared)
            self._tallies[name].add(logits.cpu().numpy(), targets.float().cpu().numpy())

    def _score(self, trainer: pl.Trainer) -> None:
        """Join the ranks' clips and score them on the first rank, for all of them."""
        scores, num_clips = None, sum(self.ranks.gather(self._num_clips))
        for tally in self._tallies.values():
            tally.join(self.ranks)
        if trainer.is_global_zero:
            scores = {name: tally.scores() for name, tally in self._tallies.items()}
        self._tallies = {}
        self.scores = self.ranks.gather(scores)[0]
        self.unit = "clips" if self.scores[""].num_clips == num_clips else "moments"
        self.step = trainer.global_step

    def _write(self, path: Path) -> None:
        """Write a row per class, those without a clip too; a cell stays empty where nothing can be said."""
        header, columns = ["class", self.unit], [self.vocabulary, self.scores[""].clips.tolist()]
        for name, found in self.scores.items():
            header += [f"{column}_{name}" if name else column for column in ("AP", "AUC", "d_prime")]
            columns += [_cell_texts(v) for v in (found.average_precision, found.auc, d_prime(found.auc))]
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(zip(*columns, strict=True))
        log.info("per class: %s", path)


def _cell_texts(values: np.ndarray) -> list[str]:
    return ["" if math.isnan(value) else repr(value) for value in values.tolist()]
