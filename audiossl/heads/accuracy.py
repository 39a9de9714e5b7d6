"""How many clips does a head name right, that can add little of its own to their features?

The two heads without chance (`heads/linear.py`): a vote of the nearest neighbours by cosine, and multinomial logistic
regression, both on features standardised by the clips they are fitted on. What they may choose (the number of
neighbours, the L2 strength) is chosen on a validation fold; then they are refitted with that fold, and only then the
test folds are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audiossl.heads.examples import Examples, Split
from audiossl.heads.linear import Predicted, knn, linear


@dataclass(frozen=True)
class HeadScore:
    """Hold what a head reached: its choice, and for each test row whether it was right."""

    chosen: float
    correct: NDArray

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def knn_accuracy(features: NDArray, labels: NDArray, split: Split, *, neighbours: Sequence[int]) -> HeadScore:
    """Score a vote of the nearest training clips by cosine; the number of voters is the most accurate in validation.

    features (clips, D) float, labels (clips,) int; `neighbours` are the numbers of voters to choose from.
    """
    assert min(neighbours) <= len(split.train), "fewer training clips than neighbours"
    return _scored(knn, features, labels, split, neighbours=list(neighbours))


def linear_accuracy(features: NDArray, labels: NDArray, split: Split, *, l2_grid: Sequence[float]) -> HeadScore:
    """Score multinomial logistic regression, fitted by L-BFGS from zero and so without chance.

    features (clips, D) float, labels (clips,) int, each class among the training clips. An entry of `l2_grid` weighs
    half the squared weights against the cross-entropy summed over the clips. The entry of least cross-entropy in
    validation is taken: accuracies of a few dozen clips are equal too often to choose by.
    """
    return _scored(linear, features, labels, split, l2_grid=list(l2_grid))


def _scored(
    head: Callable[..., list[Predicted]], features: NDArray, labels: NDArray, split: Split, **choices: list
) -> HeadScore:
    classes, place = np.unique(labels, return_inverse=True)
    targets = np.eye(len(classes), dtype=np.float32)[place]
    examples = Examples(features[:, None], np.arange(len(features) + 1), targets, None, is_exclusive=True)
    (found,) = head(examples, [split], **choices)
    (chosen,) = found.chosen.values()
    return HeadScore(chosen, found.probabilities.argmax(1) == place[split.test])


def confidence_interval(correct: NDArray, *, seed: int = 0, num_resamples: int = 2000) -> tuple[float, float]:
    """Bound the accuracy from below and above: the middle 95 % over bootstrap resamples of the test clips."""
    drawn = np.random.default_rng(seed).integers(len(correct), size=(num_resamples, len(correct)))
    low, high = np.quantile(correct[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
