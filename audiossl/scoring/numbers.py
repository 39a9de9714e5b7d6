"""What is a task's result: every number that describes it, under the name it has in all tables?

One function for clips, of one label or several, and one for events; each may bound the number that the task is judged
by (`scoring/bootstrap.py`). Numbers of several classes are means over the classes that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax

from audiossl.errors import UserError
from audiossl.metrics import accuracy, score_classes
from audiossl.scoring import bootstrap, classes
from audiossl.scoring.events import Event
from audiossl.scoring.frames import FrameScores
from audiossl.scoring.hearing import Heard, hear, of_frames
from audiossl.scoring.psds import PSDS1, PSDS2, PsdsSettings, PsdsTable

# the name of each number, by the kind of task; the first of each is what a task of that kind is judged by
CLIP_METRICS = {
    "multiclass": ("accuracy", "top5", "macro_f1", "micro_f1", "mAP", "auc", "d_prime", "ece"),
    "multilabel": ("mAP", "auc", "d_prime", "macro_f1", "micro_f1", "ece"),
}
EVENT_METRICS = (
    *("psds1", "psds2", "event_f1", "event_f1_micro", "onset_f1", "onset_f1_micro", "intersection_f1"),
    *("segment_f1", "segment_f1_micro", "segment_error_rate", "frame_mAP"),
)
UNBOUNDED = ("d_prime", "segment_error_rate")


def clip_scores(
    kind: Literal["multiclass", "multilabel"],
    scores: ArrayLike,
    targets: ArrayLike,
    known: ArrayLike | None = None,
    *,
    are_logits: bool = True,
    thresholds: float | ArrayLike = 0.5,
    metric: str | None = None,
    num_resamples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Give every number of `CLIP_METRICS[kind]` for scores (N, C): logits, or probabilities if `are_logits` is False.

    `thresholds` of probability, one or per class (C,), decide for F1 of several labels; of one label the highest score
    does. With `num_resamples`, `metric` (the kind's first, if None) also has its 95 % interval, as METRIC_low and
    METRIC_high. `top5` is there where there are more than 5 classes. Raises `UserError` for tables that do not fit
    together, scores that are NaN, clips of a multiclass task without exactly one label, and names that are not known.
    """
    if kind not in CLIP_METRICS:
        raise UserError(f"kind {kind}: clips are scored as {' or '.join(CLIP_METRICS)}")
    scores, targets, judged = classes.check_tables(scores, targets, known)
    is_multiclass = kind == "multiclass"
    if is_multiclass and not ((targets.sum(1) == 1).all() and judged.all()):
        raise UserError("a multiclass task has exactly one label a clip, all of them known")
    probabilities = scores if not are_logits else softmax(scores, axis=1) if is_multiclass else expit(scores)
    ranked = score_classes(scores, targets, known)
    predicted = classes.one_hot(scores) if is_multiclass else probabilities > np.asarray(thresholds)
    calibration_error = _multiclass_error if is_multiclass else classes.multilabel_calibration_error
    counts = classes.decision_counts(predicted, targets, known)
    numbers = {"macro_f1": counts.macro, "micro_f1": counts.micro, "mAP": ranked.mean_average_precision}
    numbers |= {"auc": ranked.mean_auc, "d_prime": ranked.d_prime}
    if is_multiclass:
        numbers |= {"accuracy": accuracy(scores, targets)}
        if scores.shape[1] > 5:
            numbers["top5"] = classes.top_k_accuracy(scores, targets, 5)
    numbers["ece"] = calibration_error(probabilities, targets, judged)
    numbers = {name: numbers[name] for name in CLIP_METRICS[kind] if name in numbers}
    statistics = {
        "accuracy": lambda: bootstrap.of_means(classes.top_k_correct(scores, targets, 1)),
        "top5": lambda: bootstrap.of_means(classes.top_k_correct(scores, targets, 5)),
        "macro_f1": lambda: counts.macro_of,
        "micro_f1": lambda: counts.micro_of,
        "mAP": lambda: bootstrap.of_mean_average_precision(scores, targets, known),
        "auc": lambda: bootstrap.of_rows(lambda *rows: score_classes(*rows).mean_auc, scores, targets, judged),
        "d_prime": lambda: bootstrap.of_rows(lambda *rows: score_classes(*rows).d_prime, scores, targets, judged),
        "ece": lambda: bootstrap.of_rows(calibration_error, probabilities, targets, judged),
    }
    return numbers | _interval(metric, statistics, numbers, len(scores), num_resamples, seed)


def event_scores(
    probabilities: Sequence[NDArray],
    events: Sequence[Sequence[Event]],
    seconds: ArrayLike,
    *,
    frame_seconds: float,
    thresholds: float | ArrayLike = 0.5,
    median_frames: int = 7,
    onset_collar_seconds: float = 0.2,
    variance_penalty: float = 1.0,
    metric: str | None = None,
    num_resamples: int = 0,
    seed: int = 0,
    folder: str | Path | None = None,
) -> dict[str, float]:
    """Give every number of `EVENT_METRICS` for frame probabilities, per clip (T', C), and its events and length.

    A median filter over `median_frames` comes first, then, except for PSDS, `thresholds`, one or per class (C,).
    `event_f1` takes DCASE's collars (200 ms; for the offset also 20 %), `onset_f1` onsets alone within
    `onset_collar_seconds` (HEAR 2021: 0.05 for notes, 0.2 for sounds, both `_micro`), `segment_f1` seconds,
    `intersection_f1` half of each covered; without `_micro` all are means over classes. `frame_mAP` is of unfiltered
    frames. AudioSet Strong is published without PSDS's `variance_penalty`. Intervals and errors as `clip_scores`.

    Scores that are many lie in files without a name in `folder` meanwhile (`scoring.frames`), twice as large as
    `probabilities`; memory holds one class's.
    """
    seconds = np.asarray(seconds, np.float64)
    metric = metric or EVENT_METRICS[0]
    if metric not in EVENT_METRICS:
        raise UserError(f"metric {metric}: there are {', '.join(EVENT_METRICS)}")
    scores = probabilities if isinstance(probabilities, FrameScores) else FrameScores(probabilities)
    how = dict(thresholds=thresholds, median_frames=median_frames, onset_collar_seconds=onset_collar_seconds)
    heard = hear(scores, events, seconds, frame_seconds=frame_seconds, folder=folder, **how)
    about = dict(frame_seconds=frame_seconds, variance_penalty=variance_penalty)
    statistics = _event_statistics(heard, events, seconds, **about)
    once, numbers, resampled = np.ones((len(events), 1), np.float32), {}, {}
    for name in EVENT_METRICS:
        statistic = statistics[name]()
        numbers[name] = float(statistic(once)[0])
        if name == metric and num_resamples:
            resampled[name] = lambda statistic=statistic: statistic
    return numbers | _interval(metric, resampled, numbers, len(events), num_resamples, seed)


def _event_statistics(
    heard: Heard,
    events: Sequence[Sequence[Event]],
    seconds: NDArray[np.float64],
    *,
    frame_seconds: float,
    variance_penalty: float,
) -> dict[str, Callable[[], bootstrap.Statistic]]:
    """Say how each number of `EVENT_METRICS` is made; a table of PSDS is large, and made only when it is asked for."""

    def of_psds(settings: PsdsSettings) -> bootstrap.Statistic:
        settings = replace(settings, alpha_st=variance_penalty)
        return PsdsTable(heard.smoothed, events, seconds, frame_seconds=frame_seconds, settings=settings).statistic

    return {
        "event_f1": lambda: heard.collars.macro_of,
        "event_f1_micro": lambda: heard.collars.micro_of,
        "onset_f1": lambda: heard.onsets.macro_of,
        "onset_f1_micro": lambda: heard.onsets.micro_of,
        "intersection_f1": lambda: heard.covered.macro_of,
        "segment_f1": lambda: heard.segments.macro_of,
        "segment_f1_micro": lambda: heard.segments.micro_of,
        "segment_error_rate": lambda: heard.segments.error_rate_of,
        "frame_mAP": lambda: of_frames(heard.raw, events, frame_seconds),
        "psds1": lambda: of_psds(PSDS1),
        "psds2": lambda: of_psds(PSDS2),
    }


def _multiclass_error(probabilities: NDArray, targets: NDArray, known: NDArray) -> float:
    return classes.multiclass_calibration_error(probabilities, targets)


def _interval(
    metric: str | None,
    statistics: Mapping[str, Callable[[], bootstrap.Statistic]],
    numbers: Mapping[str, float],
    num_clips: int,
    num_resamples: int,
    seed: int,
) -> dict[str, float]:
    """Bound one number: METRIC_low and METRIC_high; nothing for no resamples."""
    metric = next(iter(numbers)) if metric is None else metric
    if metric not in numbers:
        raise UserError(f"metric {metric}: there are {', '.join(numbers)}")
    if not num_resamples:
        return {}
    found = bootstrap.bootstrap(
        statistics[metric](),
        num_clips,
        num_resamples=num_resamples,
        seed=seed,
        is_centred=metric not in ("accuracy", "top5"),  # means of clips are where their resamples' middle is
    )
    # a shifted interval can reach beyond what there is
    low, high = found[1:] if metric in UNBOUNDED else np.clip(found[1:], 0, 1).tolist()
    return {f"{metric}_low": low, f"{metric}_high": high}
