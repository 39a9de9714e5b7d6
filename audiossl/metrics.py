"""How well do a model's scores tell which classes a clip holds, and when?

Average precision (AP) and the area under the ROC curve (AUC), class by class, as scikit-learn defines them: exact, over
all scores at once, equal scores sharing a threshold. Their plain means over the classes are what AudioSet papers call
mAP and mAUC, and d' = sqrt(2) * Phi^-1(mAUC), the distance of two unit Gaussians with that AUC. What needs a
decision (top-k, F1, confusion, calibration), what is said of events, intervals, and every number of a task by its name
(`scoring/numbers.py`) are in `scoring/`.

Differs: a class that no clip holds has no AP. It is left out of the means and counted, as ATST does; PaSST's plain mean
would be NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from audiossl.scoring.classes import (
    confusion_matrix,
    decision_counts,
    multiclass_calibration_error,
    multilabel_calibration_error,
    normalised_score,
    one_hot,
    top_k_accuracy,
)

__all__ = [
    "Scores",
    "accuracy",
    "confusion_matrix",
    "d_prime",
    "decision_counts",
    "multiclass_calibration_error",
    "multilabel_calibration_error",
    "normalised_score",
    "one_hot",
    "score_classes",
    "top_k_accuracy",
]


@dataclass(frozen=True)
class Scores:
    """Hold what `score_classes` found: per class, NaN where it is not defined, and `accuracy`, None for several labels.

    `clips` (C,) counts the clips that hold each class, of `num_clips`.
    """

    average_precision: NDArray[np.float64]  # (C,), NaN for a class that no clip holds
    auc: NDArray[np.float64]  # (C,), NaN for a class that no clip or every clip holds
    clips: NDArray[np.int64]
    num_clips: int
    accuracy: float | None
    judged: NDArray[np.int64]  # (C,), the clips of which it is known whether they hold the class
    is_exact: bool = True  # False: of scores rounded to float16 (`scoring.tally`)

    @property
    def num_absent(self) -> int:
        """Count the classes that no clip holds."""
        return int((self.clips == 0).sum())

    @property
    def mean_average_precision(self) -> float:
        """Average over the classes that are there."""
        return _mean(self.average_precision[self.clips > 0])

    @property
    def mean_auc(self) -> float:
        """Average over the classes that some of the clips judged hold and others do not."""
        return _mean(self.auc[(self.clips > 0) & (self.clips < self.judged)])

    @property
    def d_prime(self) -> float:
        """Turn the mean AUC into d'; infinite for 1."""
        return float(d_prime(self.mean_auc))


def score_classes(scores: ArrayLike, targets: ArrayLike, known: ArrayLike | None = None) -> Scores:
    """Compare scores (N, C), the higher the surer, with targets (N, C), which are 0 or 1.

    Any strictly growing function of the scores, such as the logits instead of their sigmoids, gives the same; in
    float32 sigmoids of large logits become equal, so take the logits. A class with a score that is NaN or infinite is
    NaN itself, and so are the means. `known` (N, C) marks the labels that were judged; the rest is left out, class by
    class, as OpenMIC's evaluation does by a sample weight of 0.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets) > 0.5
    judged = np.ones_like(targets) if known is None else np.asarray(known, bool)
    assert scores.shape == targets.shape == judged.shape and scores.ndim == 2
    num_clips, num_classes = scores.shape
    clips, num_judged = (targets & judged).sum(0, dtype=np.int64), judged.sum(0, dtype=np.int64)
    precision, auc = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    is_finite = (np.isfinite(scores) | ~judged).all(0)
    for number in np.flatnonzero((clips > 0) & is_finite).tolist():
        rows = slice(None) if known is None else judged[:, number]
        precision[number] = average_precision_score(targets[rows, number], scores[rows, number])
        if clips[number] < num_judged[number]:
            auc[number] = roc_auc_score(targets[rows, number], scores[rows, number])
    has_one_each = num_clips > 0 and bool((targets.sum(1) == 1).all() and judged.all())
    of_one = accuracy(scores, targets) if has_one_each else None
    return Scores(precision, auc, clips, num_clips, of_one, num_judged)


def accuracy(scores: NDArray, targets: NDArray) -> float:
    """Give the share of clips (N, C) whose highest score is at their label, the first of several."""
    return float((scores.argmax(1) == targets.argmax(1)).mean())


def d_prime(auc: ArrayLike) -> NDArray[np.float64]:
    """Turn areas under the ROC curve into d' = sqrt(2) * Phi^-1(AUC)."""
    return math.sqrt(2) * torch.special.ndtri(torch.as_tensor(auc, dtype=torch.float64)).numpy()


def _mean(values: NDArray) -> float:
    return float(values.mean()) if len(values) else math.nan
