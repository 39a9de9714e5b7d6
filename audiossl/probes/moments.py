"""How does a head that reads moments answer when something is heard?

Every moment is an example of what sounds at its middle. What a head says of moments is laid on a grid of frames, and
a threshold per class decides, tuned on validation clips as a fine-tuning's (`scoring.thresholds`), never on test clips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audiossl.heads.examples import Examples, Layers, take_layers
from audiossl.probes.blocks import ClipFeatures
from audiossl.probes.scores import MEDIAN_FRAMES
from audiossl.scoring.events import raster, smooth
from audiossl.scoring.thresholds import best_thresholds

if TYPE_CHECKING:
    from audiossl.tasks import Task


def moment_examples(
    task: Task, features: ClipFeatures, clips: NDArray, layers: Layers | None
) -> tuple[Examples, NDArray[np.int64]]:
    """Make every moment an example, with the classes that sound at its middle; returns whose clip each is of.

    `layers` None is all of them.
    """
    assert features.moments is not None and features.middles_seconds is not None
    rows = features.moments if layers is None else take_layers(features.moments, layers)
    offsets = without_bad(features.moment_offsets, clips)
    targets = np.zeros((len(rows), len(task.classes)), np.float32)
    known = np.ones(targets.shape, bool)
    for place, clip in enumerate(clips):
        if task.events[clip] is None:  # its labels say what is heard, and nobody says when
            known[offsets[place] : offsets[place + 1]] = False
            continue
        middles = features.middles_seconds[offsets[place] : offsets[place + 1]]
        for onset, offset, label in task.events[clip]:
            sounding = (middles >= onset) & (middles < offset)
            targets[offsets[place] : offsets[place + 1]][sounding, label] = 1
    owner = np.repeat(np.arange(len(clips)), np.diff(offsets))
    return Examples(rows, np.arange(len(rows) + 1), targets, None if known.all() else known, False), owner


def on_a_grid(
    task: Task, features: ClipFeatures, clips: NDArray, probabilities: NDArray, step: float
) -> list[NDArray[np.float64]]:
    """Give each clip's frames, `step` seconds apart from its start, those of the nearest moment."""
    found, begin = [], 0
    for clip in clips:
        first, stop = features.moment_offsets[clip], features.moment_offsets[clip + 1]
        middles = np.asarray(features.middles_seconds[first:stop])
        seconds = (
            float(task.seconds[clip])
            if task.clip_seconds is None
            else min(float(task.seconds[clip]), task.clip_seconds)
        )
        asked = (np.arange(max(1, int(np.ceil(seconds / step - 1e-6)))) + 0.5) * step
        between = (middles[1:] + middles[:-1]) / 2
        found.append(probabilities[begin + np.searchsorted(between, asked)])
        begin += stop - first
    return found


def thresholds_of(
    task: Task, features: ClipFeatures, clips: NDArray, probabilities: NDArray | None, step: float, asked: float | str
) -> float | NDArray[np.float64]:
    """Tune a threshold per class on validation clips, moments smoothed as in testing; .5 where there are none."""
    if asked != "validation":
        return float(asked)
    if not len(clips) or probabilities is None:
        return 0.5
    on_grid = on_a_grid(task, features, clips, probabilities, step)
    timed = [
        (task.events[clip], one) for clip, one in zip(clips, on_grid, strict=True) if task.events[clip] is not None
    ]
    if not timed:
        return 0.5
    frames = [smooth(one, MEDIAN_FRAMES) for _, one in timed]
    how = dict(frame_seconds=step, num_classes=len(task.classes))
    there = [raster(events, num_frames=len(one), **how) for events, one in timed]
    return best_thresholds(np.concatenate(frames), np.concatenate(there))


def usual_step(features: ClipFeatures) -> float:
    """Say how far moments are apart, in seconds."""
    steps = np.diff(np.asarray(features.middles_seconds))
    return float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0


def without_bad(offsets: NDArray[np.int64], clips: NDArray) -> NDArray[np.int64]:
    """Drop the empty bags of clips that are left out; those are not among `clips`."""
    return np.concatenate([offsets[clips], offsets[-1:]])
