"""How well can labels be read off features, by a head that can add little of its own?

Two heads: a vote of the nearest neighbours by cosine, and multinomial logistic regression, both on features
standardised by the clips they are fitted on. What a head may choose (the number of neighbours, the L2 strength) is
chosen on a validation fold; then it is refitted with that fold, and only then the test folds are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


@dataclass(frozen=True)
class Split:
    """Name the rows of a feature table that a head is fitted on, makes its choice on, and is tested on."""

    train: NDArray
    validation: NDArray
    test: NDArray

    @classmethod
    def of_folds(
        cls, folds: NDArray, *, train_folds: Sequence[int], validation_fold: int, test_folds: Sequence[int]
    ) -> Split:
        """Divide clips by fold number; `train_folds` may name the validation fold too, which is then taken out."""
        assert validation_fold not in test_folds and not set(train_folds) & set(test_folds), "a test fold is trained on"
        train = [fold for fold in train_folds if fold != validation_fold]
        return cls(
            np.flatnonzero(np.isin(folds, train)),
            np.flatnonzero(folds == validation_fold),
            np.flatnonzero(np.isin(folds, test_folds)),
        )


@dataclass(frozen=True)
class HeadScore:
    """Hold what a head reached: its choice, and for each test row whether it was right."""

    chosen: float
    correct: NDArray

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def _choose_then_test(
    make_head: Callable[[float], ClassifierMixin],
    candidates: Sequence[float],
    quality: Callable[[ClassifierMixin, NDArray, NDArray], float],
    features: NDArray,
    labels: NDArray,
    split: Split,
) -> HeadScore:
    """Take the candidate of highest quality on the validation rows (the first of equals), refit, and test once."""

    def fitted(candidate: float, rows: NDArray) -> ClassifierMixin:
        return make_pipeline(StandardScaler(), make_head(candidate)).fit(features[rows], labels[rows])

    known = split.validation
    chosen = max(candidates, key=lambda c: quality(fitted(c, split.train), features[known], labels[known]))
    head = fitted(chosen, np.concatenate([split.train, split.validation]))
    return HeadScore(chosen, head.predict(features[split.test]) == labels[split.test])


def knn_accuracy(features: NDArray, labels: NDArray, split: Split, *, neighbours: Sequence[int]) -> HeadScore:
    """Score a vote of the nearest training clips by cosine; the number of voters is the most accurate in validation.

    features (clips, D) float, labels (clips,) int; `neighbours` are the numbers of voters to choose from.
    """
    possible = [k for k in neighbours if k <= len(split.train)]
    assert possible, "fewer training clips than neighbours"

    def head(k: int) -> ClassifierMixin:
        return KNeighborsClassifier(k, metric="cosine")

    return _choose_then_test(head, possible, lambda h, x, y: h.score(x, y), features, labels, split)


def linear_accuracy(features: NDArray, labels: NDArray, split: Split, *, l2_grid: Sequence[float]) -> HeadScore:
    """Score multinomial logistic regression, fitted by L-BFGS from zero and so without chance.

    features (clips, D) float, labels (clips,) int, each class among the training clips. An entry of `l2_grid` weighs
    half the squared weights against the cross-entropy summed over the clips. The entry of least cross-entropy in
    validation is taken: accuracies of a few dozen clips are equal too often to choose by.
    """

    def head(l2: float) -> ClassifierMixin:
        return LogisticRegression(C=1 / l2, solver="lbfgs", max_iter=2000)

    def quality(h: ClassifierMixin, x: NDArray, y: NDArray) -> float:
        return -log_loss(y, h.predict_proba(x), labels=h.classes_)

    return _choose_then_test(head, l2_grid, quality, features, labels, split)


def confidence_interval(correct: NDArray, *, seed: int = 0, num_resamples: int = 2000) -> tuple[float, float]:
    """Bound the accuracy from below and above: the middle 95 % over bootstrap resamples of the test clips."""
    drawn = np.random.default_rng(seed).integers(len(correct), size=(num_resamples, len(correct)))
    low, high = np.quantile(correct[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
