"""What happens to one class's events and false alarms when the threshold falls?

Every run of frames that a threshold can give (`scoring/runs.py`) is judged once: is enough of it covered by its class,
and which other classes does it sound over? It then counts from its birth to its death, and an event is found for as
long as the relevant runs that are there cover enough of it. What is left are the levels at which a count changes, clip
by clip; `scoring/psds.py` makes a staircase of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audiossl.scoring.events import DECIMALS, Event, merge_touching
from audiossl.scoring.runs import Runs


@dataclass(frozen=True)
class PsdsSettings:
    """Hold the tolerances (shares in [0, 1]) and penalties of a PSDS; without `alpha_ct` nothing is a cross trigger."""

    dtc: float
    gtc: float
    cttc: float
    alpha_ct: float
    alpha_st: float
    max_per_hour: float = 100.0


# DCASE 2021-2024 task 4; AudioSet Strong is published with alpha_st=0 (dataclasses.replace)
PSDS1 = PsdsSettings(dtc=0.7, gtc=0.7, cttc=0.0, alpha_ct=0.0, alpha_st=1.0)
PSDS2 = PsdsSettings(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5, alpha_st=1.0)


@dataclass(frozen=True)
class Changes:
    """Hold what changes when the threshold falls to a level, sorted from the highest: one class.

    `what` is 0 for events found, 1 for false alarms and 2 + k for false alarms that sound over class k.
    """

    level: NDArray
    clip: NDArray
    what: NDArray
    change: NDArray


class Truth:
    """Hold all clips' events, merged, as columns sorted by clip and class; a slot is a class in a clip."""

    def __init__(self, events: Sequence[Sequence[Event]], num_classes: int):
        rows = [(clip, e.label_id, *e[:2]) for clip, of in enumerate(events) for e in merge_touching(of)]
        table = np.array(sorted(rows), np.float64).reshape(-1, 4)
        self.clip, self.label = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        self.onset, self.offset = table[:, 2], table[:, 3]
        self.seconds = self.offset - self.onset
        self.num_events = np.bincount(self.label, minlength=num_classes)
        keys, self.slot_first, self.slot_count = np.unique(
            self.clip * num_classes + self.label, return_index=True, return_counts=True
        )
        self.slot_clip, self.slot_label = keys // num_classes, keys % num_classes
        self.slots_of_clip = np.searchsorted(self.slot_clip, np.arange(len(events) + 1))
        self.slot = np.full((len(events), num_classes), -1, np.int32)
        self.slot[self.slot_clip, self.slot_label] = np.arange(len(keys))

    def covered(self, edges: NDArray) -> NDArray[np.float64]:
        """Add up how long each slot has sounded until each edge (N, T + 1): (slots, T + 1) seconds."""
        seconds = np.zeros((len(self.slot_clip), edges.shape[1]))
        for slot, (clip, first, count) in enumerate(zip(self.slot_clip, self.slot_first, self.slot_count, strict=True)):
            for event in range(first, first + count):
                seconds[slot] += np.clip(edges[clip] - self.onset[event], 0, self.seconds[event])
        return seconds


def _meets(seconds: NDArray, share: float, of_seconds: NDArray) -> NDArray:
    return np.round(seconds, DECIMALS) >= np.round(share * of_seconds, DECIMALS)


def _expand(counts: NDArray, firsts: NDArray) -> tuple[NDArray, NDArray]:
    """Pair each item with `counts` others, numbered from `firsts` on: (item, other)."""
    item = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)
    return item, np.repeat(firsts, counts) + within


def alarms_of(levels: NDArray, clips: NDArray) -> tuple[NDArray, ...]:
    """Count the runs of clips in which every run is a false alarm, from their scores (T, n), a clip a column.

    A run more at every peak, one less at every dip: level, clip, `what` and change, without going through the runs.
    """
    padded = np.full((len(levels) + 2, len(clips)), -np.inf, levels.dtype)
    padded[1:-1] = levels
    rises = padded[1:] > padded[:-1]
    change = (rises[:-1].astype(np.int8) - rises[1:]) * (padded[1:-1] > -np.inf)
    frame, column = np.nonzero(change)
    what = np.ones(len(frame), np.int64)
    return padded[frame + 1, column], clips[column], what, change[frame, column].astype(np.float64)


def changes_of(
    runs: Runs,
    alarms: tuple[NDArray, ...],
    label: int,
    edges: NDArray,
    covered: NDArray,
    truth: Truth,
    settings: PsdsSettings,
) -> Changes:
    """Follow one class's events found, false alarms and cross triggers down the thresholds; `row` is the clip.

    `alarms` are the changes in other clips (`alarms_of`).
    """
    clip, slot = runs.row, truth.slot[runs.row, label]
    onset, offset = edges[clip, runs.start], edges[clip, runs.stop]
    own = np.where(slot >= 0, covered[slot, runs.stop] - covered[slot, runs.start], 0.0)
    is_relevant = _meets(own, settings.dtc, offset - onset)
    alarm = np.flatnonzero(~is_relevant)
    parts = [
        alarms,
        (runs.birth[alarm], clip[alarm], np.ones(len(alarm), np.int64), np.ones(len(alarm))),
        (runs.death[alarm], clip[alarm], np.ones(len(alarm), np.int64), -np.ones(len(alarm))),
        *_found(runs, np.flatnonzero(is_relevant & (own > 0)), slot, onset, offset, truth, settings),
    ]
    if settings.alpha_ct:
        first = truth.slots_of_clip[clip[alarm]]
        which, other = _expand(truth.slots_of_clip[clip[alarm] + 1] - first, first)
        run = alarm[which]
        over = covered[other, runs.stop[run]] - covered[other, runs.start[run]]
        crosses = _meets(over, settings.cttc, (offset - onset)[run]) & (truth.slot_label[other] != label)
        run, what = run[crosses], 2 + truth.slot_label[other[crosses]]
        parts += [(runs.birth[run], clip[run], what, np.ones(len(run)))]
        parts += [(runs.death[run], clip[run], what, -np.ones(len(run)))]
    return _sum_up(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _found(
    runs: Runs,
    relevant: NDArray,
    slot: NDArray,
    onset: NDArray,
    offset: NDArray,
    truth: Truth,
    settings: PsdsSettings,
) -> list[tuple[NDArray, ...]]:
    """Say at which levels events become found, or lost: an event is while relevant runs cover enough of it."""
    which, event = _expand(truth.slot_count[slot[relevant]], truth.slot_first[slot[relevant]])
    run = relevant[which]
    shared = np.minimum(offset[run], truth.offset[event]) - np.maximum(onset[run], truth.onset[event])
    run, event, shared = run[shared > 0], event[shared > 0], shared[shared > 0]
    levels = np.concatenate([runs.birth[run], runs.death[run]])
    events, shares = np.concatenate([event, event]), np.concatenate([shared, -shared])
    order = np.lexsort((-levels, events))
    levels, events, shares = levels[order], events[order], shares[order]
    total = np.cumsum(shares)  # an event's shares add up to 0 in the end, so that none is left for the next
    is_last = np.append((levels[1:] != levels[:-1]) | (events[1:] != events[:-1]), True)[: len(levels)]
    levels, events = levels[is_last], events[is_last]
    is_found = _meets(total[is_last], settings.gtc, truth.seconds[events]) & (levels > -np.inf)
    was_found = np.append(False, is_found[:-1] & (np.diff(events) == 0))[: len(is_found)]
    change = is_found.astype(np.float64) - was_found
    return [(levels, truth.clip[events], np.zeros(len(levels), np.int64), change)]


def _sum_up(level: NDArray, clip: NDArray, what: NDArray, change: NDArray) -> Changes:
    """Add what changes together, drop what cancels and sort by falling level."""
    is_there = level > -np.inf  # after the last threshold nothing is looked at
    level, clip, what, change = level[is_there], clip[is_there], what[is_there], change[is_there]
    order = np.argsort(-level)
    level, clip, what, change = level[order], clip[order], what[order], change[order]
    # one number for level, class and clip: sorting what is almost sorted is far quicker than sorting by three columns
    place = np.cumsum(np.append(0, np.diff(level) != 0))[: len(level)]
    key = (place * (what.max(initial=0) + 1) + what) * (clip.max(initial=0) + 1) + clip
    order = np.argsort(key, kind="stable")
    key, level, clip, what, change = key[order], level[order], clip[order], what[order], change[order]
    is_new = np.append(True, np.diff(key) != 0)[: len(key)]
    first = np.flatnonzero(is_new)
    total = np.add.reduceat(change, first) if len(first) else change
    kept = first[total != 0]
    clip, what, change = clip[kept].astype(np.int32), what[kept].astype(np.int32), total[total != 0].astype(np.float32)
    return Changes(level[kept], clip, what, change)
