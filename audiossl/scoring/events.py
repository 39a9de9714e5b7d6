"""Which events are in a clip, and which events do frame scores say there are?

An event is a class that sounds from an onset to an offset. Frame scores become events by a threshold per class; a
median filter before it removes what is too short. As in DCASE's evaluations, events of one class that overlap or touch
are one event.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from audiossl.errors import UserError
from audiossl.features.events import median_filter

DECIMALS = 6  # times are compared to the microsecond, as sed_scores_eval does: 0.1 + 0.2 is 0.3
EXCHANGED_FRAMES = 11  # up to here, comparing whole tables beats sorting every frame's neighbours, by ten times
THRESHOLDS = np.linspace(0.01, 0.99, 50)  # of the published evaluations with a grid (ATST-Frame, 2306.04186)


class Event(NamedTuple):
    """Say that class `label_id` sounds from `onset_seconds` to `offset_seconds` of its clip."""

    onset_seconds: float
    offset_seconds: float
    label_id: int


def check_events(events: Sequence[Sequence[Event]], num_classes: int) -> None:
    """Raise `UserError` for a time that is no number, an onset before the clip, an empty event or an unknown class."""
    for clip, of_clip in enumerate(events):
        for event in of_clip:
            onset, offset, label = event
            if not (math.isfinite(onset) and math.isfinite(offset)) or onset < 0:
                raise UserError(
                    f"clip {clip}: an event from {onset} s to {offset} s: times are finite and not negative"
                )
            if offset <= onset:
                raise UserError(
                    f"clip {clip}: an event ends at {offset} s and starts at {onset} s: offset before onset"
                )
            if not 0 <= label < num_classes:
                raise UserError(f"clip {clip}: an event of class {label}, but there are {num_classes} classes")


def merge_touching(events: Sequence[Event]) -> list[Event]:
    """Join a clip's events of one class that overlap or touch; sorted by onset, then class."""
    merged: list[Event] = []
    last: dict[int, int] = {}  # where a class's latest event lies in `merged`
    for onset, offset, label in sorted(events):
        if label in last and round(onset - merged[last[label]].offset_seconds, DECIMALS) <= 0:
            former = merged[last[label]]
            merged[last[label]] = Event(former.onset_seconds, max(former.offset_seconds, offset), label)
        else:
            last[label] = len(merged)
            merged.append(Event(float(onset), float(offset), int(label)))
    return merged


def smooth(probabilities: ArrayLike, median_frames: int) -> NDArray:
    """Put frame scores (T', C) through a median filter over `median_frames` (odd; 1 for none).

    A median commutes with a threshold: the events of smoothed scores are the smoothed events of the scores, for every
    threshold at once.
    """
    values = np.asarray(probabilities)
    if median_frames == 1 or not len(values):
        return values
    if median_frames > EXCHANGED_FRAMES:
        return median_filter(torch.from_numpy(np.ascontiguousarray(values.T)), median_frames).numpy().T
    length, half = len(values), median_frames // 2
    places = np.arange(-half, length + half) % (2 * length)
    mirrored = values[np.where(places < length, places, 2 * length - 1 - places)]
    window = [mirrored[first : first + length] for first in range(median_frames)]
    for last in range(median_frames - 1, half - 1, -1):  # the highest of what is left moves to the end
        for at in range(last):
            one, other = window[at], window[at + 1]
            window[at], window[at + 1] = np.minimum(one, other), np.maximum(one, other)
    return window[half]


def events_of(active: ArrayLike, *, frame_seconds: float, seconds: float | None = None) -> list[Event]:
    """Turn active frames (T', C), 0 or 1, into events, sorted by onset.

    Frame t lasts from t to t + 1 times `frame_seconds`, no longer than the clip's `seconds`; frames after it are
    padding.
    """
    active = np.asarray(active) > 0.5
    edges = frame_edges(len(active), frame_seconds, seconds)
    padded = np.zeros((len(active) + 2, active.shape[1]), np.int8)
    padded[1:-1] = active
    labels, starts = np.nonzero(np.diff(padded, axis=0).T == 1)
    stops = np.nonzero(np.diff(padded, axis=0).T == -1)[1]
    onsets, offsets = edges[starts].tolist(), edges[stops].tolist()
    found = [Event(*event) for event in zip(onsets, offsets, labels.tolist(), strict=True)]
    return sorted(event for event in found if event.offset_seconds > event.onset_seconds)


def detect(
    probabilities: ArrayLike,
    *,
    thresholds: float | ArrayLike,
    frame_seconds: float,
    median_frames: int = 1,
    seconds: float | None = None,
) -> list[Event]:
    """Find the events whose frame probabilities (T', C) exceed a threshold, or one per class (C,), after `smooth`."""
    return events_of(
        smooth(probabilities, median_frames) > np.asarray(thresholds), frame_seconds=frame_seconds, seconds=seconds
    )


def frame_edges(num_frames: int, frame_seconds: float, seconds: float | None = None) -> NDArray[np.float64]:
    """Say where frames begin and end, in seconds, none after the clip's end: (num_frames + 1,)."""
    edges = np.arange(num_frames + 1) * frame_seconds
    return edges if seconds is None else np.minimum(edges, seconds)


def raster(
    events: Iterable[tuple[float, float, int]],
    *,
    num_frames: int,
    frame_seconds: float,
    num_classes: int,
    start_seconds: float = 0.0,
) -> NDArray[np.bool_]:
    """Mark the frames (num_frames, C) that an event touches: from its onset rounded down to its offset rounded up.

    The first frame begins at `start_seconds` of the clip; what lies outside is cut off.
    """
    marked = np.zeros((num_frames, num_classes), bool)
    for onset, offset, label in events:
        first, last = (round((seconds - start_seconds) / frame_seconds, DECIMALS) for seconds in (onset, offset))
        marked[max(math.floor(first), 0) : max(math.ceil(last), 0), label] = True
    return marked
