"""How do rare sounds come as often as common ones?

Every label gets a weight that falls with its count, a clip the sum (or the largest) of its labels' weights, and an
epoch is N draws by these weights. The published formulas are all 1000 / (offset + count): Audio-MAE (arXiv:2207.06405)
and ATST (arXiv:2306.04186) with offset 0.01 and replacement, PaSST (arXiv:2110.05069) with offset 100 and without
replacement. An epoch's draws are a function of (seed, epoch) alone.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from audiossl.loading.order import Order, random_words


class Formula(NamedTuple):
    """Hold what was published: the offset added to each count, and whether draws are with replacement."""

    offset: float
    replacement: bool


FORMULAS = {"audiomae": Formula(0.01, True), "passt": Formula(100.0, False), "atst": Formula(0.01, True)}


def clip_weights(
    label_ids: np.ndarray, label_ends: np.ndarray, *, offset: float, reduce: Literal["sum", "max"]
) -> np.ndarray:
    """Weigh clips by their labels: (C,) float64, 0 for a clip without labels.

    `label_ids` holds the labels of all clips one after another, `label_ends` (C,) where each clip's end. Counts are
    taken over just these clips. Sums are taken in the order of the labels, so that they are the same on any machine.
    """
    counts = np.bincount(label_ids)
    by_label = 1000.0 / (offset + np.maximum(counts, 1))
    clips = np.repeat(np.arange(len(label_ends)), np.diff(label_ends, prepend=0))
    if reduce == "sum":
        return np.bincount(clips, weights=by_label[label_ids], minlength=len(label_ends))
    weights = np.zeros(len(label_ends))
    np.maximum.at(weights, clips, by_label[label_ids])
    return weights


class Weighted(Order):
    """Give `num_draws` clips per epoch, drawn by `weights` (C,); clips of weight 0 never come.

    With replacement a clip may come several times in an epoch, each with a crop of its own. Without, it comes at most
    once, and those chosen come in random order, so that an epoch does not begin with the heavy ones.
    """

    def __init__(self, weights: np.ndarray, *, num_draws: int, replacement: bool, seed: int):
        super().__init__(num_draws)
        self.clips = np.flatnonzero(weights)
        self.weights = weights[self.clips]
        assert len(self.clips) and (replacement or num_draws <= len(self.clips)), "cannot draw that many"
        self.replacement = replacement
        self.seed = seed

    def epoch(self, epoch: int) -> tuple[np.ndarray | int, np.ndarray]:
        """Draw an epoch."""
        if self.replacement:
            words = random_words(self.epoch_length, self.seed, "draws", epoch)
            first = epoch * self.epoch_length
            turns = np.arange(first, first + self.epoch_length)
            return turns, self.clips[draw_with_replacement(self.weights, words)]
        words = random_words(len(self.clips), self.seed, "draws", epoch)
        chosen = draw_without_replacement(self.weights, words, self.epoch_length)
        mixed = np.argsort(random_words(self.epoch_length, self.seed, "order", epoch), kind="stable")
        return epoch, self.clips[chosen[mixed]]


def draw_with_replacement(weights: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Draw one of C clips for each of the uint64 `words`, in proportion to `weights` (C,), by their running sum."""
    sums = np.cumsum(weights)
    points = (words >> np.uint64(11)) * 2.0**-53 * sums[-1]  # [0, sum)
    return np.minimum(np.searchsorted(sums, points, side="right"), len(weights) - 1)


def draw_without_replacement(weights: np.ndarray, words: np.ndarray, num_draws: int) -> np.ndarray:
    """Draw `num_draws` of C clips, one after another in proportion to the weights of those left; (num_draws,).

    Each clip waits for an exponential time with its weight as rate, and the first come (Efraimidis and Spirakis, 2006).
    """
    uniform = ((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]
    return np.argsort(-portable_log(uniform) / weights, kind="stable")[:num_draws]


def portable_log(x: np.ndarray) -> np.ndarray:
    """Take logarithms of (0, 1] by IEEE's basic operations alone, within 4e-16 (relative, or absolute where larger).

    numpy's own differ in the last bit from one kind of processor to the next, which may swap two clips, and ranks on
    unlike machines would then disagree about the order.
    """
    mantissa, exponent = np.frexp(x)
    is_low = mantissa < math.sqrt(0.5)
    mantissa = np.where(is_low, 2 * mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)  # log m = 2 artanh s, |s| < 0.172
    square = s * s
    series = np.full_like(x, 1 / 23)
    for odd in range(21, 0, -2):
        series = series * square + 1 / odd
    return (exponent - is_low) * math.log(2) + 2 * s * series
