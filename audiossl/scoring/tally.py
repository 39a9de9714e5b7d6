"""How are the scores of more moments than memory holds judged?

Rows are kept as they are up to a limit, and AP, AUC and thresholds are exact. Beyond it they are counted: by class, by
score rounded to float16 (65,536 values), and by whether the class is there. What is said then is exact for the rounded
scores, 11 bits of each, equal ones sharing a threshold; it takes 0.5 MB a class, whether of a thousand moments or of a
billion (AudioSet Strong: 25 million of 407 classes).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from audiossl.metrics import Scores, score_classes
from audiossl.running.ranks import Ranks
from audiossl.scoring.thresholds import best_thresholds

MAX_VALUES = 2**27  # kept as they are: 0.8 GB
CODES, HIGHEST = 2**16, np.float32(65_504)


class Tally:
    """Collect scores (n, C), the higher the surer, and their targets, which are 0 or 1, NaN for what nobody judged."""

    def __init__(self, num_classes: int, *, max_values: int = MAX_VALUES):
        self.num_classes, self.max_values, self.num_rows = num_classes, max_values, 0
        self._rows: list[tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]] = []
        self._num_kept = 0
        self._counts: NDArray[np.int32] | None = None  # (2, C, CODES): judged; and of those, there
        self._is_finite = np.ones(num_classes, bool)
        self._num_right, self._has_one_each = 0, True

    @property
    def is_exact(self) -> bool:
        """Tell whether scores are as they came, or rounded to float16."""
        return self._counts is None

    def add(self, scores: ArrayLike, targets: ArrayLike) -> None:
        """Collect some rows."""
        scores, targets = np.asarray(scores, np.float32), np.asarray(targets)
        assert scores.shape == targets.shape == (len(scores), self.num_classes)
        self._rows.append((scores, targets > 0.5, ~np.isnan(targets)))
        self.num_rows, self._num_kept = self.num_rows + len(scores), self._num_kept + len(scores)
        if self._num_kept * self.num_classes > self.max_values:
            self._count()

    def join(self, ranks: Ranks) -> None:
        """Collect what the other ranks have, too; all ranks call it together."""
        if ranks.size == 1:
            return
        everyone = ranks.gather((self.num_rows, self.is_exact))
        total = sum(num_rows for num_rows, _ in everyone)
        if all(is_exact for _, is_exact in everyone) and total * self.num_classes <= self.max_values:
            self._rows = [ranks_rows for rows in ranks.gather(self._rows) for ranks_rows in rows]
        else:
            self._count()
            self._counts = ranks.total(self._counts)
            about = ranks.gather((self._is_finite, self._num_right, self._has_one_each))
            self._is_finite = np.all([is_finite for is_finite, *_ in about], axis=0)
            self._num_right = sum(num_right for _, num_right, _ in about)
            self._has_one_each = all(has_one_each for *_, has_one_each in about)
        self.num_rows = total

    def scores(self) -> Scores:
        """Judge what was collected."""
        if self.is_exact:
            scores, there, judged = self._all()
            return score_classes(scores, there, None if judged.all() else judged)
        self._count()
        judged, there = (part.astype(np.int64) for part in self._counts)
        num_there, num_judged = there.sum(1), judged.sum(1)
        precision, auc = np.full(self.num_classes, np.nan), np.full(self.num_classes, np.nan)
        for label in np.flatnonzero((num_there > 0) & self._is_finite).tolist():
            found, called = there[label, ::-1].cumsum(), judged[label, ::-1].cumsum()
            at = np.flatnonzero(judged[label, ::-1])
            precision[label] = (there[label, ::-1][at] * (found[at] / called[at])).sum() / num_there[label]
            if num_there[label] < num_judged[label]:
                absent = judged[label, ::-1] - there[label, ::-1]
                won = (absent * (found - there[label, ::-1] / 2)).sum()
                auc[label] = won / (num_there[label] * (num_judged[label] - num_there[label]))
        accuracy = self._num_right / self.num_rows if self._has_one_each else None
        return Scores(precision, auc, num_there, self.num_rows, accuracy, num_judged, is_exact=False)

    def thresholds(self, *, absent: float = 0.5) -> NDArray[np.float64]:
        """Find each class's threshold of highest F1 as `best_thresholds` does, of probability where scores are logits.

        A class that no row holds gets `absent`.
        """
        if self.is_exact:
            logits, there, judged = self._all()
            return best_thresholds(expit(logits.astype(np.float64)), there, judged, absent=absent)
        self._count()
        found = np.full(self.num_classes, absent)
        probabilities = expit(_values_of(np.arange(CODES)).astype(np.float64))
        for label in np.flatnonzero(self._counts[1].any(1)).tolist():
            judged, there = self._counts[:, label].astype(np.int64)
            at = np.flatnonzero(judged)[::-1]
            f1 = 2 * there[at].cumsum() / (judged[at].cumsum() + there.sum())
            best = int(f1.argmax())
            above = probabilities[at[best]]
            is_last = best + 1 == len(at)
            found[label] = np.nextafter(np.float32(above), np.float32(-np.inf)) if is_last else (
                (above + probabilities[at[best + 1]]) / 2)  # fmt: skip
        return found

    def _all(self) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        none = np.zeros((0, self.num_classes), np.float32), *[np.zeros((0, self.num_classes), bool)] * 2
        return tuple(np.concatenate(parts) for parts in zip(none, *self._rows, strict=True))

    def _count(self) -> None:
        """Count the rows that are kept, and keep them no longer."""
        if self._counts is None:
            self._counts = np.zeros((2, self.num_classes, CODES), np.int32)
        for scores, there, judged in self._rows:
            self._has_one_each &= bool((there.sum(1) == 1).all() and judged.all())
            self._num_right += int((scores.argmax(1) == there.argmax(1)).sum())
        scores, there, judged = self._all()
        self._rows, self._num_kept = [], 0
        for label in range(self.num_classes):
            rows = judged[:, label]
            of_class = scores[rows, label]
            self._is_finite[label] &= bool(np.isfinite(of_class).all())
            codes = _codes_of(np.nan_to_num(of_class))
            self._counts[0, label] += np.bincount(codes, minlength=CODES).astype(np.int32)
            self._counts[1, label] += np.bincount(codes[there[rows, label]], minlength=CODES).astype(np.int32)


def _codes_of(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number scores, rounded to float16, in ascending order: 0 to 65,535."""
    rounded = (np.clip(scores, -HIGHEST, HIGHEST) + np.float32(0)).astype(np.float16)
    bits = (rounded + np.float16(0)).view(np.uint16).astype(np.int64)  # adding 0 turns -0 into 0
    return np.where(bits & 0x8000, CODES - 1 - bits, bits | 0x8000)


def _values_of(codes: NDArray[np.int64]) -> NDArray[np.float16]:
    bits = np.where(codes & 0x8000, codes & 0x7FFF, CODES - 1 - codes)
    return bits.astype(np.uint16).view(np.float16)
