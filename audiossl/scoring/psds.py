"""How well are events found, whatever the threshold: the polyphonic sound detection score (PSDS)?

Every threshold gives a class a rate of events found and a rate of false alarms per hour; PSDS is the area under the
staircase of the first over the second, averaged over the classes, up to 100 false alarms an hour (Bilen et al. 2020,
arXiv 1910.08440). A detection counts when enough of it is covered by its class (dtc), an event when enough of it is
covered by such detections (gtc); a false alarm that sounds over another class (cttc) may cost more. Computed over all
thresholds of the scores at once (the idea of Ebbers et al. 2022, arXiv 2201.13148), from the runs of `scoring/runs.py`.
Scores at which a class already sounds in more clips without it than there may be false alarms are not looked at: no
threshold that low counts. In clips of 10 s that is most of all scores.

Differs: a class without an event is left out, also as another class; sed_scores_eval refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audiossl.errors import UserError
from audiossl.scoring.changes import PSDS1, PSDS2, Changes, PsdsSettings, Truth, alarms_of, changes_of
from audiossl.scoring.events import Event, check_events
from audiossl.scoring.frames import FrameTable, frames_there, probable
from audiossl.scoring.runs import Runs, runs_of

__all__ = ["PSDS1", "PSDS2", "Psds", "PsdsSettings", "PsdsTable", "check_clip", "check_sides", "psds"]

VALUES_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Psds:
    """Hold a PSDS in [0, 1] and each class's own, NaN for a class without an event."""

    value: float
    per_class: NDArray[np.float64]


class PsdsTable:
    """Collect what every threshold does to every clip, for scores of any resampling of the clips.

    scores: per clip (T', C) float, finite, the higher the surer, or a `FrameTable` of what lies before the clips' ends;
    events: per clip; seconds (N,) the clips' lengths. Frame t lasts from t to t + 1 times `frame_seconds`, cut at the
    clip's end. Raises `UserError` for what does not fit together, for scores that are not finite and for events that
    `check_events` refuses.
    """

    def __init__(
        self,
        scores: Sequence[NDArray] | FrameTable,
        events: Sequence[Sequence[Event]],
        seconds: ArrayLike,
        *,
        frame_seconds: float,
        settings: PsdsSettings = PSDS1,
    ):
        self.settings, self.seconds = settings, np.asarray(seconds, np.float64)
        if not isinstance(scores, FrameTable):
            check_sides(len(scores), events, self.seconds)
            scores = _table_of(scores, self.seconds, frame_seconds)
            check_events(events, scores.num_classes)
        self.scores, self.num_classes = scores, scores.num_classes
        self.truth = Truth(events, self.num_classes)
        self.edges = np.minimum(np.arange(scores.num_frames.max() + 1) * frame_seconds, self.seconds[:, None])
        self.covered = self.truth.covered(self.edges)
        allowed = int(settings.max_per_hour * self.seconds.sum() / 3600) + 1
        self.num_sure = allowed + math.ceil(10 * math.sqrt(allowed))  # so that resampled clips are enough, too
        self.sure: dict[int, NDArray[np.int32]] = {}  # clips that have false alarms at all thresholds not looked at
        self.changes: dict[int, Changes] = {}
        self._follow(np.flatnonzero(self.truth.num_events).tolist(), self.num_sure)

    def _follow(self, labels: Sequence[int], num_sure: int | None) -> None:
        """Find what changes where in some classes, down to where `num_sure` clips have a false alarm; None for all."""
        waiting: list[tuple[int, NDArray, NDArray, tuple[NDArray, ...]]] = []
        num_values = 0
        for label in labels:
            clips, levels, self.sure[label] = self._heard(label, num_sure)
            is_plain = self._is_plain(label)[clips]
            alarms = alarms_of(levels[:, is_plain], clips[is_plain])
            waiting.append((label, clips[~is_plain], levels[:, ~is_plain], alarms))
            num_values += waiting[-1][2].size
            if num_values >= VALUES_AT_ONCE or label == labels[-1]:
                self._count(waiting)
                waiting, num_values = [], 0

    def _heard(self, label: int, num_sure: int | None) -> tuple[NDArray, NDArray, NDArray[np.int32]]:
        """Give the clips that have scores to look at, those scores (T, clips), -inf for the others, and `sure`."""
        scores = self.scores
        row = scores.row(label)
        highest = probable(np.maximum.reduceat(row, scores.starts), scores.are_logits)
        others, lowest = np.flatnonzero(self.truth.slot[:, label] < 0), -np.inf
        sure = others[:0]
        if num_sure is not None and num_sure <= len(others) and self.settings.dtc > 0:
            lowest = np.partition(highest[others], len(others) - num_sure)[len(others) - num_sure]
            sure = others[highest[others] >= lowest]
        clips = np.flatnonzero(highest > lowest)
        frames = np.arange(len(self.edges[0]) - 1)[:, None]
        is_there = frames < scores.num_frames[clips]
        levels = probable(row[np.where(is_there, scores.starts[clips] + frames, 0)], scores.are_logits)
        levels[~is_there | (levels <= lowest)] = -np.inf
        return clips, levels, sure.astype(np.int32)

    def _count(self, waiting: list[tuple[int, NDArray, NDArray, tuple[NDArray, ...]]]) -> None:
        """Go through the runs of several classes at once, and what they change."""
        runs = runs_of(np.concatenate([levels for *_, levels, _ in waiting], axis=1))
        ends = np.cumsum([len(clips) for _, clips, *_ in waiting])
        number = np.searchsorted(ends, runs.row, side="right")
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(len(waiting) + 1))
        for place, (label, clips, _, alarms) in enumerate(waiting):
            own = order[bounds[place] : bounds[place + 1]]
            clip = clips[runs.row[own] - (ends[place] - len(clips))]
            of_label = Runs(clip, runs.start[own], runs.stop[own], runs.birth[own], runs.death[own])
            about = (label, self.edges, self.covered, self.truth, self.settings)
            self.changes[label] = changes_of(of_label, alarms, *about)

    def _is_plain(self, label: int) -> NDArray[np.bool_]:
        """Mark the clips in which whatever is found of a class is a false alarm and no more: (N,)."""
        slot = self.truth.slot
        return (slot < 0).all(1) if self.settings.alpha_ct else slot[:, label] < 0

    def score(self, weights: ArrayLike | None = None) -> Psds:
        """Give the PSDS of the clips, each counted as often as `weights` (N,) says."""
        weights = np.ones(len(self.seconds)) if weights is None else np.asarray(weights, np.float64)
        self._look_further(weights)
        truth, settings = self.truth, self.settings
        num_events = np.bincount(truth.label, weights[truth.clip], self.num_classes)
        class_hours = np.bincount(truth.label, weights[truth.clip] * truth.seconds, self.num_classes) / 3600
        there = np.flatnonzero(num_events > 0)
        prices = np.zeros(2 + self.num_classes)
        prices[1] = 3600 / max(float(weights @ self.seconds), 1e-12)
        if len(there) > 1:
            prices[2 + there] = settings.alpha_ct / (len(there) - 1) / class_hours[there]
        curves = [_curve(self.changes[c], weights, prices, num_events[c], settings.max_per_hour) for c in there]
        per_class = np.full(self.num_classes, np.nan)
        per_class[there] = [_area([curve], 0.0, settings.max_per_hour) for curve in curves]
        return Psds(_area(curves, settings.alpha_st, settings.max_per_hour) if curves else np.nan, per_class)

    def _look_further(self, weights: NDArray) -> None:
        """Look at all thresholds of the classes whose `sure` false alarms are not too many when weighed like this."""
        hours = float(weights @ self.seconds) / 3600
        many = [weights[sure].sum() > self.settings.max_per_hour * hours + 1e-6 for sure in self.sure.values()]
        few = [label for label, sure, is_enough in zip(self.sure, self.sure.values(), many, strict=True)
               if len(sure) and not is_enough]  # fmt: skip
        self._follow(few, None)

    def statistic(self, weights: NDArray) -> NDArray[np.float64]:
        """Give the PSDS for every column of weights (N, R): (R,), as `bootstrap` asks for."""
        return np.array([self.score(column).value for column in weights.T])


def psds(
    scores: Sequence[NDArray],
    events: Sequence[Sequence[Event]],
    seconds: ArrayLike,
    *,
    frame_seconds: float,
    settings: PsdsSettings = PSDS1,
) -> Psds:
    """Give the PSDS of frame scores; the arguments are those of `PsdsTable`."""
    return PsdsTable(scores, events, seconds, frame_seconds=frame_seconds, settings=settings).score()


def check_sides(num_scores: int, events: Sequence[Sequence[Event]], seconds: NDArray) -> None:
    """Raise `UserError` for clips' scores, events and lengths that do not fit together."""
    if not num_scores or not num_scores == len(events) == len(seconds):
        raise UserError(f"frame scores of {num_scores} clips, events of {len(events)}, seconds of {len(seconds)}")
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise UserError("seconds: a clip has no length")


def check_clip(clip: int, of_clip: NDArray, num_classes: int) -> None:
    """Raise `UserError` for scores of a clip that are no numbers, or of another shape than (T', num_classes)."""
    if np.ndim(of_clip) != 2 or not len(of_clip) or of_clip.shape[1] != num_classes:
        raise UserError(f"clip {clip}: frame scores of shape {np.shape(of_clip)}, not (frames, {num_classes})")
    if not np.isfinite(of_clip).all():
        raise UserError(f"clip {clip}: a frame score is NaN or infinite")


def _table_of(scores: Sequence[NDArray], seconds: NDArray, frame_seconds: float) -> FrameTable:
    """Lay scores down class by class, without the frames after a clip's end."""
    num_classes = np.shape(scores[0])[-1]
    num_frames = frames_there(np.array([len(of_clip) for of_clip in scores]), seconds, frame_seconds)
    table = FrameTable(num_frames, num_classes, np.result_type(*scores[:1], np.float32))
    for clip, of_clip in enumerate(scores):
        check_clip(clip, of_clip, num_classes)
        table.add(of_clip)
    return table


def _curve(
    changes: Changes, weights: NDArray, prices: NDArray, num_events: float, max_per_hour: float
) -> tuple[NDArray, NDArray]:
    """Trace one class's staircase: false alarms per hour, rising, and the most events found with as few."""
    counted = changes.change * weights[changes.clip]
    found = np.cumsum(counted * (changes.what == 0)) / num_events
    alarms = np.maximum(np.cumsum(counted * prices[changes.what]), 0)
    is_last = np.append(np.diff(changes.level) != 0, True)[: len(found)]
    found, alarms = found[is_last], alarms[is_last]
    order = np.lexsort((-found, alarms))
    found, alarms = np.maximum.accumulate(found[order]), alarms[order]
    rises = np.diff(found, prepend=0.0) > 1e-12
    rises &= alarms <= max_per_hour
    return alarms[rises], found[rises]


def _area(curves: Sequence[tuple[NDArray, NDArray]], alpha_st: float, max_per_hour: float) -> float:
    """Integrate mean - alpha_st * deviation of the classes' staircases, not below 0, over the false alarms."""
    alarms = np.concatenate([[0.0], *(curve[0] for curve in curves)])
    steps = np.concatenate([[0.0], *(np.diff(found, prepend=0.0) for _, found in curves)])
    squares = np.concatenate([[0.0], *(np.diff(found**2, prepend=0.0) for _, found in curves)])
    order = np.argsort(alarms, kind="stable")
    mean = np.cumsum(steps[order]) / len(curves)
    deviation = np.sqrt(np.maximum(np.cumsum(squares[order]) / len(curves) - mean**2, 0))
    widths = np.diff(alarms[order], append=max_per_hour)
    return float((np.maximum(mean - alpha_st * deviation, 0) * widths).sum() / max_per_hour)
