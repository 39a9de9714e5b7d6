"""How many events were found, and how many of those found are real?

Four ways to say that an event was found: onset and offset within a collar (DCASE, sed_eval: 200 ms, the offset also
within 20 % of the event's length), the onset alone (HEAR 2021: 50 ms for notes, 200 ms for DCASE 2016's office sounds),
the same class in the same second (Mesaros et al. 2016, doi 10.3390/app6060162), or enough of it covered (Bilen et al.
2020, arXiv 1910.08440). All count per clip and class, so that sums, means over classes and resampled clips are read off
one table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from audiossl.errors import UserError
from audiossl.scoring.events import DECIMALS, Event, check_events, merge_touching, raster

Clips = Sequence[Sequence[Event]]


@dataclass(frozen=True)
class Counts:
    """Count, per clip and class (N, C): what was found, what was found in vain, and what was missed.

    `errors` (N,) holds the error rate's numerator, substitutions + deletions + insertions, where it is defined.
    """

    found: NDArray[np.int32]
    in_vain: NDArray[np.int32]
    missed: NDArray[np.int32]
    errors: NDArray[np.int32] | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[Counts]) -> Counts:
        """Put the counts of some clips after those of others."""
        columns = zip(*((part.found, part.in_vain, part.missed, part.errors) for part in parts), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))

    @property
    def per_class(self) -> NDArray[np.float64]:
        """Give each class's F1 in [0, 1], NaN for a class that is nowhere: (C,)."""
        hits, others = self.found.sum(0), self.in_vain.sum(0) + self.missed.sum(0)
        is_there = hits + self.missed.sum(0) > 0
        return np.where(is_there, 2 * hits / np.maximum(2 * hits + others, 1), np.nan)

    @property
    def macro(self) -> float:
        """Average F1 over the classes that are there; NaN for none."""
        return float(self.macro_of(np.ones((len(self.found), 1)))[0])

    @property
    def micro(self) -> float:
        """Take F1 of all classes' counts together; NaN where nothing is there and nothing was found."""
        return float(self.micro_of(np.ones((len(self.found), 1)))[0])

    @property
    def error_rate(self) -> float:
        """Give (substitutions + deletions + insertions) / events: 0 is best, 1 what silence gets, no upper end."""
        return float(self.error_rate_of(np.ones((len(self.found), 1)))[0])

    def macro_of(self, weights: NDArray) -> NDArray[np.float64]:
        """Give `macro` of clips that count as often as a column of `weights` (N, R) says: (R,)."""
        hits, vain, missed = (weights.T @ part for part in (self.found, self.in_vain, self.missed))
        is_there = hits + missed > 0
        f1 = np.where(is_there, 2 * hits / np.maximum(2 * hits + vain + missed, 1e-12), 0.0)
        number = is_there.sum(1)
        return np.where(number > 0, f1.sum(1) / np.maximum(number, 1), np.nan)

    def micro_of(self, weights: NDArray) -> NDArray[np.float64]:
        """Give `micro` of clips that count as often as a column of `weights` (N, R) says: (R,)."""
        hits, vain, missed = (weights.T @ part.sum(1) for part in (self.found, self.in_vain, self.missed))
        total = 2 * hits + vain + missed
        return np.where(total > 0, 2 * hits / np.where(total > 0, total, 1), np.nan)

    def error_rate_of(self, weights: NDArray) -> NDArray[np.float64]:
        """Give `error_rate` of clips that count as often as a column of `weights` (N, R) says: (R,)."""
        assert self.errors is not None, "an error rate is defined for segments"
        there = weights.T @ (self.found + self.missed).sum(1)
        return np.where(there > 0, weights.T @ self.errors / np.where(there > 0, there, 1), np.nan)


def collar_counts(
    detected: Clips,
    events: Clips,
    *,
    num_classes: int,
    collar_seconds: float = 0.2,
    share_of_length: float = 0.2,
    offsets_count: bool = True,
) -> Counts:
    """Count the events whose onset, and offset, are met within a collar.

    An offset may be off by `collar_seconds` or `share_of_length` of the real event, whichever is more; it is not looked
    at where `offsets_count` is False. Every event and detection has at most one partner, and as many have one as
    possible (a maximum matching: sed_eval's "optimal"). Both sides' touching events are merged first.
    """

    def matches(found: NDArray, real: NDArray) -> tuple[int, int]:
        near = np.round(np.abs(found[:, None, 0] - real[None, :, 0]), DECIMALS) <= collar_seconds
        if offsets_count:
            allowed = np.maximum(collar_seconds, share_of_length * (real[:, 1] - real[:, 0]))
            near &= np.round(np.abs(found[:, None, 1] - real[None, :, 1]) - allowed, DECIMALS) <= 0
        pairs = int((maximum_bipartite_matching(csr_array(near), perm_type="column") >= 0).sum())
        return pairs, len(found) - pairs

    return _count(detected, events, num_classes, matches)


def intersection_counts(
    detected: Clips, events: Clips, *, num_classes: int, dtc: float = 0.5, gtc: float = 0.5
) -> Counts:
    """Count the events of which a share `gtc` is covered by detections of which a share `dtc` is covered by events.

    DCASE 2021 task 4 takes 0.5 for both. Both sides' touching events are merged first.
    """

    def matches(found: NDArray, real: NDArray) -> tuple[int, int]:
        common = np.minimum(found[:, None, 1], real[:, 1]) - np.maximum(found[:, None, 0], real[:, 0])
        common = np.maximum(common, 0)
        is_relevant = _meets(common.sum(1), dtc * (found[:, 1] - found[:, 0]))
        covered = _meets(common[is_relevant].sum(0), gtc * (real[:, 1] - real[:, 0]))
        return int(covered.sum()), int((~is_relevant).sum())

    return _count(detected, events, num_classes, matches)


def segment_counts(
    detected: Clips, events: Clips, seconds: ArrayLike, *, num_classes: int, segment_seconds: float = 1.0
) -> Counts:
    """Count the segments in which a class sounds and was found to; a class that touches a segment is in it.

    Clips last `seconds` (N,); a last, shorter segment counts as one, and what lies after the clip's end does not. In a
    segment, a class missed and another found in vain are one substitution.
    """
    _check(detected, events, num_classes)
    counts = np.zeros((3, len(events), num_classes), np.int32)
    errors = np.zeros(len(events), np.int32)
    for clip, (found, real, length) in enumerate(zip(detected, events, np.asarray(seconds).tolist(), strict=True)):
        frames = math.ceil(round(length / segment_seconds, DECIMALS))
        is_found, is_real = (
            raster(side, num_frames=frames, frame_seconds=segment_seconds, num_classes=num_classes)
            for side in (found, real)
        )
        parts = np.stack([is_found & is_real, is_found & ~is_real, ~is_found & is_real])
        counts[:, clip] = parts.sum(1)
        errors[clip] = parts[1:].sum(2).max(0).sum()
    return Counts(*counts, errors)


def _meets(seconds: NDArray, needed: NDArray) -> NDArray:
    return np.round(seconds, DECIMALS) >= np.round(needed, DECIMALS)


def _count(detected: Clips, events: Clips, num_classes: int, matches) -> Counts:
    """Ask `matches`, for every clip and class with both, how many events are found and detections are in vain."""
    _check(detected, events, num_classes)
    found, in_vain, missed = np.zeros((3, len(events), num_classes), np.int32)
    for clip, sides in enumerate(zip(detected, events, strict=True)):
        ours, real = (_by_class(merge_touching(side)) for side in sides)
        for label in ours.keys() | real.keys():
            num_real = len(real.get(label, ()))
            hits, vain = 0, len(ours.get(label, ()))
            if vain and num_real:
                hits, vain = matches(ours[label], real[label])
            found[clip, label], in_vain[clip, label], missed[clip, label] = hits, vain, num_real - hits
    return Counts(found, in_vain, missed)


def _check(detected: Clips, events: Clips, num_classes: int) -> None:
    if len(detected) != len(events):
        raise UserError(f"detections of {len(detected)} clips, but events of {len(events)}")
    check_events(detected, num_classes)
    check_events(events, num_classes)


def _by_class(events: Sequence[Event]) -> dict[int, NDArray[np.float64]]:
    sides: dict[int, list[tuple[float, float]]] = {}
    for onset, offset, label in events:
        sides.setdefault(label, []).append((onset, offset))
    return {label: np.array(times) for label, times in sides.items()}
