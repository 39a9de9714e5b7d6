"""What do frame scores say of many clips, and how often are they right?

Clips are gone through a few at a time: their scores are smoothed and turned into events, those are counted, and the
scores are laid down class by class (`scoring/frames.py`) for what looks at all thresholds. The counts stay, scores and
events found do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from audiossl.scoring import eventf1
from audiossl.scoring.bootstrap import Statistic, of_mean_average_precision
from audiossl.scoring.eventf1 import Counts
from audiossl.scoring.events import DECIMALS, Event, check_events, events_of, smooth
from audiossl.scoring.frames import FrameScores, FrameTable, frames_there, probable
from audiossl.scoring.psds import check_clip, check_sides

CLIPS_AT_ONCE = 64
VALUES_AT_ONCE = 2e7  # of weights of frames, as a bootstrap takes them


@dataclass(frozen=True)
class Heard:
    """Hold the counts of all clips and classes, and the scores class by class, as they came and smoothed."""

    collars: Counts
    onsets: Counts
    covered: Counts
    segments: Counts
    raw: FrameTable
    smoothed: FrameTable


def hear(
    scores: FrameScores,
    events: Sequence[Sequence[Event]],
    seconds: NDArray[np.float64],
    *,
    frame_seconds: float,
    thresholds: float | ArrayLike,
    median_frames: int,
    onset_collar_seconds: float,
    folder: str | Path | None = None,
) -> Heard:
    """Go through all clips; the arguments are those of `scoring.numbers.event_scores`, and so are the errors."""
    num_classes = scores.num_classes
    check_sides(len(scores), events, seconds)
    check_events(events, num_classes)
    lengths = frames_there(scores.num_frames, seconds, frame_seconds)
    how = dict(are_logits=scores.are_logits, folder=folder)
    tables = [FrameTable(lengths, num_classes, scores.dtype, **how) for _ in range(2)]
    counts: list[list[Counts]] = []
    for first in range(0, len(scores), CLIPS_AT_ONCE):
        clips = range(first, min(first + CLIPS_AT_ONCE, len(scores)))
        detected = []
        for clip in clips:
            values = scores.values(clip)
            check_clip(clip, values, num_classes)
            smoothed = smooth(values, median_frames)
            for table, of_clip in zip(tables, (values, smoothed), strict=True):
                table.add(of_clip)
            is_active = probable(smoothed, scores.are_logits) > np.asarray(thresholds)
            detected.append(events_of(is_active, frame_seconds=frame_seconds, seconds=float(seconds[clip])))
        real, how = events[clips.start : clips.stop], dict(num_classes=num_classes)
        onsets = dict(collar_seconds=onset_collar_seconds, offsets_count=False)
        counts.append(
            [
                eventf1.collar_counts(detected, real, **how),
                eventf1.collar_counts(detected, real, **how, **onsets),
                eventf1.intersection_counts(detected, real, **how),
                eventf1.segment_counts(detected, real, seconds[clips.start : clips.stop], **how),
            ]
        )
    return Heard(*map(Counts.of_parts, zip(*counts, strict=True)), *tables)


def of_frames(table: FrameTable, events: Sequence[Sequence[Event]], frame_seconds: float) -> Statistic:
    """Make a statistic of mAP over all clips' frames; a frame holds a class that sounds anywhere in it.

    Exact, ties included, as `bootstrap.of_mean_average_precision`.
    """
    marks: list[list[slice]] = [[] for _ in range(table.num_classes)]
    for start, frames, of_clip in zip(table.starts.tolist(), table.num_frames.tolist(), events, strict=True):
        for onset, offset, label in of_clip:
            first, stop = (round(time / frame_seconds, DECIMALS) for time in (onset, offset))
            first, stop = min(max(math.floor(first), 0), frames), min(max(math.ceil(stop), 0), frames)
            marks[label].append(slice(start + first, start + stop))

    def targets_of(label: int) -> NDArray[np.bool_]:
        there = np.zeros(table.total, bool)
        for mark in marks[label]:
            there[mark] = True
        return there

    def statistic(weights: NDArray) -> NDArray[np.float64]:
        total, number = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
        at_once = max(1, int(VALUES_AT_ONCE // table.total))
        for label in np.flatnonzero([len(own) > 0 for own in marks]).tolist():
            scores, there = probable(table.row(label), table.are_logits), targets_of(label)
            if (weights == 1).all():
                found = average_precision(scores, there)[None]
            else:
                of_class = of_mean_average_precision(scores[:, None], there[:, None])
                parts = np.split(weights, range(at_once, weights.shape[1], at_once), axis=1)
                found = np.concatenate([of_class(np.repeat(part, table.num_frames, axis=0)) for part in parts])
            total, number = total + np.nan_to_num(found), number + ~np.isnan(found)
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    return statistic


def average_precision(scores: NDArray, there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Give a class's AP from its scores and where it is (n,), NaN where it is nowhere; equal scores share a threshold.

    Only how many scores reach each of the few that are there is counted, so nothing but the scores is sorted.
    """
    own = np.sort(scores[there])
    if not len(own):
        return np.float64(np.nan)
    called = len(scores) - np.searchsorted(np.sort(scores), own, side="left")
    found = len(own) - np.searchsorted(own, own, side="left")
    return np.mean(found / called)
