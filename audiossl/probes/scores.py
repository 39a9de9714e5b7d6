"""How good is a head over all folds and seeds, and how sure is that?

Each fold is scored by itself, as the published numbers are, and the task's score is the mean over folds and seeds. Its
interval comes from resampling the test clips: of one fold and of several, the same clips for every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from audiossl.metrics import score_classes
from audiossl.scoring import bootstrap
from audiossl.scoring.classes import confusion_matrix, top_k_correct
from audiossl.scoring.frames import FrameScores
from audiossl.scoring.numbers import clip_scores, event_scores

if TYPE_CHECKING:
    from audiossl.tasks import Task


MEDIAN_FRAMES = 7  # of the filter that frame scores of events pass


@dataclass(frozen=True)
class Tested:
    """Hold the probabilities of one fold and seed: (test, C) of clips, or (frames, C) for each of them for events."""

    fold: str
    seed: int
    clips: NDArray[np.int64]
    probabilities: NDArray[np.float64] | FrameScores
    frame_seconds: float | None = None
    thresholds: float | NDArray[np.float64] = 0.5
    median_frames: int = MEDIAN_FRAMES
    bad_clips: Mapping[str, str] = field(default_factory=dict)  # keys of those that could not be read, and why


def summarise(task: Task, tested: Sequence[Tested], *, num_resamples: int, folder: Path | None = None) -> dict:
    """Give `score` with `low` and `high`, `std` over seeds, `folds` and every other number of the task.

    All are means over folds and seeds; numbers are those of `audiossl.scoring.numbers`, as is `folder`.
    """
    if task.kind == "events":
        found = [_of_events(task, one, num_resamples, folder) for one in tested]
    else:
        found = [_of_clips(task, one) for one in tested]
    names = list(dict.fromkeys(name for numbers in found for name in numbers if not name.endswith(("_low", "_high"))))
    numbers = {name: _mean([one[name] for one in found if name in one]) for name in names}
    metric = task.metric
    of_seed = {seed: _mean([n[metric] for t, n in zip(tested, found, strict=True) if t.seed == seed]) for seed in
               dict.fromkeys(one.seed for one in tested)}  # fmt: skip
    of_fold = {fold: _mean([n[metric] for t, n in zip(tested, found, strict=True) if t.fold == fold]) for fold in
               dict.fromkeys(one.fold for one in tested)}  # fmt: skip
    if task.kind == "events":
        low, high = (_mean([one.get(f"{metric}_{end}", np.nan) for one in found]) for end in ("low", "high"))
    else:
        low, high = interval(task, tested, num_resamples)
    std = float(np.std(list(of_seed.values()), ddof=1)) if len(of_seed) > 1 else None
    summary = {"score": numbers[metric], "low": low, "high": high, "std": std}
    return summary | {"folds": of_fold, "seeds": list(of_seed.values()), "numbers": numbers}


def _of_clips(task: Task, one: Tested) -> dict[str, float]:
    known = None if task.known is None else task.known[one.clips]
    probabilities = np.clip(one.probabilities, 0, 1)
    how = dict(are_logits=False, thresholds=one.thresholds)
    return clip_scores(task.kind, probabilities, task.targets_of(one.clips), known, **how)


def _of_events(task: Task, one: Tested, num_resamples: int, folder: Path | None) -> dict[str, float]:
    from audiossl.scoring.events import Event

    events = [[Event(*event) for event in task.events[clip]] for clip in one.clips]
    seconds = task.seconds[one.clips].astype(np.float64)
    seconds = seconds if task.clip_seconds is None else np.minimum(seconds, task.clip_seconds)
    how = dict(frame_seconds=one.frame_seconds, metric=task.metric, num_resamples=num_resamples)
    how |= dict(thresholds=one.thresholds, median_frames=one.median_frames)
    how |= dict(onset_collar_seconds=task.onset_collar_seconds, variance_penalty=task.variance_penalty, folder=folder)
    return event_scores(one.probabilities, events, seconds, **how)


def interval(task: Task, tested: Sequence[Tested], num_resamples: int) -> tuple[float, float]:
    """Bound the mean over folds and seeds: the middle 95 % over resamples of all test clips."""
    if not num_resamples:
        return float("nan"), float("nan")
    clips = np.unique(np.concatenate([one.clips for one in tested]))
    parts = [(np.searchsorted(clips, one.clips), _statistic(task, one)) for one in tested]

    def statistic(weights: NDArray) -> NDArray:
        return np.nanmean([of_part(weights[rows]) for rows, of_part in parts], axis=0)

    with np.errstate(invalid="ignore", divide="ignore"):
        found = bootstrap.bootstrap(statistic, len(clips), num_resamples=num_resamples)
    return found.low, found.high


def _statistic(task: Task, one: Tested) -> bootstrap.Statistic:
    targets = task.targets_of(one.clips)
    known = np.ones_like(targets, bool) if task.known is None else task.known[one.clips]
    probabilities = np.clip(one.probabilities, 0, 1)
    if task.metric == "accuracy":
        return bootstrap.of_means(top_k_correct(probabilities, targets, 1))
    if task.metric == "mAP":
        return bootstrap.of_mean_average_precision(probabilities, targets, known)

    def metric(scores: NDArray, labels: NDArray, judged: NDArray) -> float:
        judged = None if task.known is None else judged
        return clip_scores(task.kind, scores, labels, judged, are_logits=False)[task.metric]

    return bootstrap.of_rows(metric, probabilities, targets, known)


def confusion(task: Task, tested: Sequence[Tested]) -> NDArray[np.float64]:
    """Add up the confusion matrices of all folds, averaged over seeds: (C, C), true classes along the rows."""
    total = sum(confusion_matrix(one.probabilities, task.targets_of(one.clips)).astype(float) for one in tested)
    return total / len({one.seed for one in tested})


def per_class(
    task: Task, tested: Sequence[Tested], of: Literal["average_precision", "auc"] = "average_precision"
) -> NDArray[np.float64]:
    """Average each class's AP, or AUC, over folds and seeds: (C,), NaN where nothing can be said."""
    found = []
    for one in tested:
        known = None if task.known is None else task.known[one.clips]
        found.append(getattr(score_classes(one.probabilities, task.targets_of(one.clips), known), of))
    there = np.isfinite(found)
    return np.where(there.any(0), np.where(there, found, 0).sum(0) / there.sum(0).clip(min=1), np.nan)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
