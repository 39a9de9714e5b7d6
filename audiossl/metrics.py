"""How well do a model's scores tell which classes a clip holds?

Average precision (AP) and the area under the ROC curve (AUC), class by class, as scikit-learn defines them: exact, over
all scores at once, equal scores sharing a threshold. Their plain means over the classes are what AudioSet papers call
mAP and mAUC, and d' = sqrt(2) * Phi^-1(mAUC), the distance of two unit Gaussians with that AUC.

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
        """Average over the classes that some clips hold and others do not."""
        return _mean(self.auc[(self.clips > 0) & (self.clips < self.num_clips)])

    @property
    def d_prime(self) -> float:
        """Turn the mean AUC into d'; infinite for 1."""
        return float(d_prime(self.mean_auc))


def score_classes(scores: ArrayLike, targets: ArrayLike) -> Scores:
    """Compare scores (N, C), the higher the surer, with targets (N, C), which are 0 or 1.

    Any strictly growing function of the scores, such as the logits instead of their sigmoids, gives the same; in
    float32 sigmoids of large logits become equal, so take the logits. A class with a score that is NaN or infinite is
    NaN itself, and so are the means.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets) > 0.5
    assert scores.shape == targets.shape and scores.ndim == 2
    num_clips, num_classes = scores.shape
    clips = targets.sum(0, dtype=np.int64)
    precision, auc = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    is_finite = np.isfinite(scores).all(0)
    for number in np.flatnonzero((clips > 0) & is_finite).tolist():
        precision[number] = average_precision_score(targets[:, number], scores[:, number])
        if clips[number] < num_clips:
            auc[number] = roc_auc_score(targets[:, number], scores[:, number])
    has_one_each = num_clips > 0 and bool((targets.sum(1) == 1).all())
    return Scores(precision, auc, clips, num_clips, accuracy(scores, targets) if has_one_each else None)


def accuracy(scores: NDArray, targets: NDArray) -> float:
    """Give the share of clips (N, C) whose highest score is at their label, the first of several."""
    return float((scores.argmax(1) == targets.argmax(1)).mean())


def d_prime(auc: ArrayLike) -> NDArray[np.float64]:
    """Turn areas under the ROC curve into d' = sqrt(2) * Phi^-1(AUC)."""
    return math.sqrt(2) * torch.special.ndtri(torch.as_tensor(auc, dtype=torch.float64)).numpy()


def _mean(values: NDArray) -> float:
    return float(values.mean()) if len(values) else math.nan
