"""How good are the features of an encoder while it trains, and at its end?

Compute them once per clip, then fit two small heads (`heads/accuracy.py`) and test them on folds that neither the
heads nor, in the demo, pre-training have seen. The statistics of the log-mel itself, put through the same heads, say
what a score is worth; the same encoder before training says what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor, nn

from audiossl.embeddings import clip_features, windows_of
from audiossl.errors import UserError
from audiossl.features.statistics import logmel_statistics
from audiossl.heads.accuracy import confidence_interval, knn_accuracy, linear_accuracy
from audiossl.heads.examples import Split
from audiossl.index import Index
from audiossl.running.ranks import others_wait
from audiossl.sound.audio import AudioError, decode, resample, to_int16
from audiossl.stepping.watch import settle


def clip_statistics(frontend: nn.Module, waveforms: Sequence[NDArray], *, batch_size: int) -> NDArray[np.float32]:
    """Take `logmel_statistics` of whole clips, padding left out: (clips, 4 F)."""
    parts: list[list[Tensor]] = [[] for _ in waveforms]
    for windows in windows_of(frontend, waveforms, batch_size):
        spectrograms = frontend.denormalise(windows.spectrogram)[:, 0].cpu()
        for clip, valid, spectrogram in zip(windows.clip, windows.valid_frames, spectrograms, strict=True):
            parts[clip].append(spectrogram[:, :valid])
    return torch.stack([logmel_statistics(torch.cat(clip, dim=1)) for clip in parts]).numpy()


class Probe:
    """Score frozen features on labelled shards: decoded once, kept in memory as int16.

    `train_folds` may name `validation_fold`; heads are fitted on the training folds, choose on the validation fold, are
    refitted on both and tested on each of `test_folds` and on all of them. `rate_hz` is the front end's. Raises
    `UserError` for folds without clips and for clips that do not have exactly one label.
    """

    def __init__(
        self,
        *,
        shards: str,
        rate_hz: int,
        train_folds: list[int],
        validation_fold: int,
        test_folds: list[int],
        every_steps: int,
        batch_size: int,
        neighbours: list[int],
        l2_grid: list[float],
        pooling: Literal["max", "mean", "class"],
    ):
        _check_folds(train_folds, validation_fold, test_folds)
        self.rate_hz, self.every_steps, self.batch_size = rate_hz, every_steps, batch_size
        self.pooling = pooling
        self.test_folds, self.neighbours, self.l2_grid = list(test_folds), list(neighbours), list(l2_grid)
        index = Index.load(shards)
        clips = index.select(folds=sorted({*train_folds, validation_fold, *test_folds}))
        self.name = f"{len(clips)} clips of {index.path.parent}"
        self.labels = np.array([_one_label(index, clip) for clip in clips])
        self.folds = index.fold[clips].astype(int)
        self.waveforms = [_read(index, clip, rate_hz) for clip in clips]
        self.split = Split.of_folds(
            self.folds, train_folds=train_folds, validation_fold=validation_fold, test_folds=test_folds
        )
        if unseen := set(self.labels) - set(self.labels[self.split.train]):
            names = ", ".join(index.vocabulary[label] for label in sorted(unseen))
            raise UserError(
                f"probe.train_folds={list(train_folds)}: without the validation fold no clip is left of {names}"
            )

    def run(self, encoder: nn.Module, frontend: nn.Module) -> dict[str, float]:
        """Score an encoder's features; see `score`. The caller's modes and random state stay as they were."""
        self._check_rate(frontend)
        return self.score(
            clip_features(encoder, frontend, self.waveforms, batch_size=self.batch_size, pooling=self.pooling)
        )

    def baseline(self, frontend: nn.Module) -> dict[str, float]:
        """Score the statistics of the log-mel, which an encoder has to beat."""
        self._check_rate(frontend)
        return self.score(clip_statistics(frontend, self.waveforms, batch_size=self.batch_size))

    def score(self, features: NDArray) -> dict[str, float]:
        """Fit both heads to features (clips, D) and give `knn` and `linear` accuracy over all test folds.

        Beside them: each test fold's (`linear_fold4`), the bounds of the 95 % interval (`linear_low`, `linear_high`)
        and what was chosen (`knn_neighbours`, `linear_l2`).
        """
        heads = {
            "knn": knn_accuracy(features, self.labels, self.split, neighbours=self.neighbours),
            "linear": linear_accuracy(features, self.labels, self.split, l2_grid=self.l2_grid),
        }
        scores = {name: head.accuracy for name, head in heads.items()}
        for name, head in heads.items():
            fold_of = self.folds[self.split.test]
            scores |= {f"{name}_fold{fold}": float(head.correct[fold_of == fold].mean()) for fold in self.test_folds}
            scores[f"{name}_low"], scores[f"{name}_high"] = confidence_interval(head.correct)
        return scores | {"knn_neighbours": heads["knn"].chosen, "linear_l2": heads["linear"].chosen}

    def _check_rate(self, frontend: nn.Module) -> None:
        if frontend.rate_hz != self.rate_hz:
            raise UserError(f"probe.rate_hz={self.rate_hz} but frontend.rate_hz={frontend.rate_hz}: make them equal")


class ProbeCallback(Callback):
    """Run a probe before training, every `probe.every_steps` optimiser steps and after it, on the first rank.

    The others wait for it, however long it takes; they know of the steps in `history` without scores.

    `history` maps an optimiser step to its scores and `baseline` holds those of the log-mel; both travel with the
    checkpoint, so that a resumed run still knows what stood before. Every score goes to the loggers as `probe/NAME`.
    """

    def __init__(self, *, probe: Probe):
        self.probe = probe
        self.baseline: dict[str, float] = {}
        self.history: dict[int, dict[str, float]] = {}
        self._has_baseline = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step in self.history:  # a resumed run's loggers have forgotten the step that it starts from
            self._log(trainer, trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score before the first step; here, since by now a signal is heard (`Preemption`)."""
        if not self._has_baseline:
            self._has_baseline = True
            with others_wait():
                self.baseline = self.probe.baseline(module.method.frontend) if trainer.is_global_zero else {}
        if trainer.global_step % self.probe.every_steps == 0:
            self._run(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.probe.every_steps == 0:
            self._run(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._run(trainer, module)

    def complete(self, method: nn.Module, step: int) -> None:
        """Score what is still missing of the closing table: a run resumed at its end trains no step that would."""
        self.baseline = self.baseline or self.probe.baseline(method.frontend)
        if step not in self.history:
            self.history[step] = self.probe.run(method.encoder, method.frontend)

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step in self.history:  # several micro-batches end at the same step
            return
        settle(module)
        with others_wait():
            is_first = trainer.is_global_zero
            self.history[step] = self.probe.run(module.method.encoder, module.method.frontend) if is_first else {}
        self._log(trainer, step)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{name}": value for name, value in self.history[step].items()}, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline, self.history = dict(state["baseline"]), dict(state["history"])
        self._has_baseline = bool(self.baseline)

    def table(self) -> dict[str, Any]:
        """Give the closing table: `task`, test `folds`, and `rows` of a name and its cells (kNN, linear, each fold).

        The scores of the last step stand beside them under their own names (`knn`, `linear`, `linear_fold4`, ...).
        """
        rows, steps, folds = {"log-mel statistics": self.baseline}, sorted(self.history), self.probe.test_folds
        rows |= {f"encoder, step {step}": self.history[step] for step in dict.fromkeys((steps[0], steps[-1]))}
        cells = [{"name": name, "cells": _cells(scores, folds)} for name, scores in rows.items()]
        return self.history[steps[-1]] | {"task": self.probe.name, "folds": folds, "rows": cells}


def _cells(scores: dict[str, float], folds: Sequence[int]) -> list[str]:
    """Word the scores: accuracy over all test folds with its interval, then linear accuracy fold by fold."""
    both = [f"{scores[h]:.3f} ({scores[f'{h}_low']:.2f} to {scores[f'{h}_high']:.2f})" for h in ("knn", "linear")]
    return both + [f"{scores[f'linear_fold{fold}']:.3f}" for fold in folds]


def _check_folds(train_folds: Sequence[int], validation_fold: int, test_folds: Sequence[int]) -> None:
    if shared := sorted({*train_folds, validation_fold} & set(test_folds)):
        raise UserError(f"probe.test_folds={list(test_folds)}: {shared} are trained on; a test fold must be unseen")
    if not set(train_folds) - {validation_fold} or not test_folds:
        raise UserError("probe.train_folds must name a fold beside probe.validation_fold, and probe.test_folds one")


def _one_label(index: Index, clip: int) -> int:
    labels = index.label_ids(clip)
    if len(labels) != 1:
        raise UserError(
            f"{index.path}: clip {index.key(clip)} has {len(labels)} labels; a probe needs exactly one a clip"
        )
    return int(labels[0])


def _read(index: Index, clip: int, rate_hz: int) -> NDArray[np.int16]:
    try:
        waveform, stored_hz = decode(index.read(clip))
    except AudioError as error:
        raise UserError(f"{index.shard_path(clip)}: clip {index.key(clip)}: {error}") from error
    return to_int16(resample(waveform, stored_hz, rate_hz))
