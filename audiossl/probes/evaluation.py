"""How much of a task is in a source's features?

Features come from the cache, become examples (clips, segments or moments), and every head is fitted on every fold and
from every seed. What is chosen is chosen on validation clips alone; where a set has none, a share of the training clips
is held out for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from audiossl.errors import UserError
from audiossl.heads.examples import (
    Examples,
    Layers,
    Pooling,
    Split,
    averaged,
    good_clips,
    pooled_rows,
    split_rows,
    take_layers,
    within,
)
from audiossl.heads.fitting import NetSettings, fit
from audiossl.heads.linear import Predicted, knn, linear
from audiossl.probes.blocks import ClipFeatures
from audiossl.probes.moments import moment_examples, on_a_grid, thresholds_of, usual_step, without_bad
from audiossl.probes.scores import Tested
from audiossl.probes.segments import Wanted
from audiossl.scoring.frames import FrameScores

if TYPE_CHECKING:
    from audiossl.tasks import Task

HEADS = ("linear", "knn", "sgd", "mlp", "attention", "weighted")
Head = dict | NetSettings


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Say how features are read: which layers, how moments are pooled, how a clip's segments are put together.

    `aggregate` embeddings averages the segments' features before the head; predictions fits heads on segments and
    averages their probabilities. `thresholds` say when something is heard: a probability, or tuned on validation
    clips, class by class, for the highest F1 of moments.
    """

    layers: Layers = "last"
    pooling: Pooling = "mean"
    aggregate: Literal["embeddings", "predictions"] = "embeddings"
    held_out: float = 0.2
    thresholds: float | Literal["validation"] = "validation"


@dataclass(frozen=True)
class Judged:
    """Hold what a head reached on a source: its test probabilities, its choices, and the seconds that it took."""

    tested: list[Tested]
    chosen: list[dict]
    seconds: float


def wanted_of(
    task: Task, heads: Mapping[str, Head], support: float | None, layers: Layers, cached: int | None
) -> Wanted:
    """Say what the cache must hold for these heads; moments are kept of the layers that are read alone."""
    needs_moments = task.kind == "events" or any(getattr(head, "over", "") == "moments" for head in heads.values())
    is_weighted = any(getattr(head, "weighted", False) for head in heads.values())
    of_moments = None
    if needs_moments and not is_weighted and not isinstance(layers, list):
        of_moments = 1 if layers == "last" else int(layers)
    return Wanted(support, needs_moments, cached, of_moments)


def check_heads(task: Task, heads: Mapping[str, Head]) -> None:
    """Raise `UserError` for a head that cannot answer what the task asks."""
    for name, head in heads.items():
        over = getattr(head, "over", "clip")
        if task.kind == "events" and over != "clip":
            raise UserError(
                f"probe.heads={name}: puts the {over} of a clip together, but {task.name} asks when something is "
                "heard; take linear, knn, sgd, mlp, or heads.NAME.over=clip"
            )


def judge(
    task: Task, features: ClipFeatures, name: str, head: Head, reading: Reading, *, seeds: Sequence[int],
    column_seconds: float | None, device: torch.device | str,
) -> Judged:  # fmt: skip
    """Fit a head on every fold, from every seed where it knows chance, and give its test probabilities."""
    begin = time.perf_counter()
    clips = good_clips(features)
    splits = [_split(division, clips, task, head, reading.held_out) for division in task.divisions]
    if task.kind == "events":
        examples, owner = moment_examples(
            task, features, clips, None if getattr(head, "weighted", False) else reading.layers
        )
        splits = [split_rows(split, owner) for split in splits]
    else:
        examples, owner = _clip_examples(task, features, clips, head, reading), np.arange(len(clips))
    tested, chosen = [], []
    for seed in seeds if isinstance(head, NetSettings) else seeds[:1]:
        found = _predict(examples, splits, name, head, reading, seed, device, task.kind == "events")
        for division, split, one in zip(task.divisions, splits, found, strict=True):
            asked = clips[np.unique(owner[split.test])]
            if task.kind == "events":
                step = column_seconds or usual_step(features)
                held_out = clips[np.unique(owner[split.validation])], one.validation
                thresholds = thresholds_of(task, features, *held_out, step, reading.thresholds)
                probabilities = on_a_grid(task, features, asked, one.probabilities, step)
                tested.append(Tested(division.name, seed, asked, FrameScores(probabilities), step, thresholds))
                is_tuned = isinstance(thresholds, np.ndarray)
                decided = [round(each, 6) for each in thresholds.tolist()] if is_tuned else thresholds
                chosen.append(one.chosen | {"thresholds": decided})
                continue
            tested.append(Tested(division.name, seed, asked, one.probabilities))
            chosen.append(one.chosen)
    return Judged(tested, chosen, time.perf_counter() - begin)


def _predict(
    examples: Examples, splits: list[Split], name: str, head: Head, reading: Reading, seed: int, device,
    with_validation: bool = False,
) -> list[Predicted]:  # fmt: skip
    if reading.aggregate == "predictions" and len(examples.rows) > len(examples):
        rows, owner = examples.exploded()
        found = _predict(rows, [split_rows(s, owner) for s in splits], name, head, reading, seed, device)
        together = []
        for split, one in zip(splits, found, strict=True):
            of_rows = np.searchsorted(split.test, owner[np.isin(owner, split.test)])
            together.append(Predicted(averaged(one.probabilities, of_rows, len(split.test)), one.chosen))
        return together
    how = dict(device=device, with_validation=with_validation)
    if isinstance(head, NetSettings):
        return fit(examples, splits, head, seed=seed, **how)
    return (linear if name == "linear" else knn)(examples, splits, **how, **head)


def _clip_examples(task: Task, features: ClipFeatures, clips: NDArray, head: Head, reading: Reading) -> Examples:
    over, is_weighted = getattr(head, "over", "clip"), getattr(head, "weighted", False)
    targets, known = task.targets_of(clips), None if task.known is None else task.known[clips]
    layers = None if is_weighted else reading.layers
    if over == "moments":
        assert features.moments is not None and features.moment_offsets is not None
        rows = features.moments if layers is None else take_layers(features.moments, layers)
        offsets = without_bad(features.moment_offsets, clips)
    else:
        rows, offsets = pooled_rows(features, reading.pooling, layers), without_bad(features.offsets, clips)
    examples = Examples(rows, offsets, targets, known, task.kind == "multiclass")
    if over == "clip" and reading.aggregate == "embeddings":
        shape = (len(clips), *rows.shape[1:])
        alone = examples.vectors().reshape(shape) if reading.pooling != "max" else _highest(rows, offsets)
        return replace(examples, rows=alone, offsets=np.arange(len(clips) + 1))
    return examples


def _highest(rows: NDArray, offsets: NDArray) -> NDArray[np.float32]:
    return np.maximum.reduceat(rows, offsets[:-1], axis=0)


def _split(division, clips: NDArray, task: Task, head: Head, held_out: float) -> Split:
    """Say which places of `clips` a head is fitted on, chooses on and is tested on."""
    train, validation, test = (within(part, clips) for part in division[1:])
    for part, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise UserError(f"{task.name} {division.name}: none of the clips to {part} on can be used")
    if not len(validation) and _chooses(head):
        train, validation = hold_out(train, task.targets_of(clips), held_out, is_exclusive=task.kind == "multiclass")
    return Split(train, validation, test)


def _chooses(head: Head) -> bool:
    if isinstance(head, NetSettings):
        return len(head.lr) * len(head.hidden_layers) > 1 or head.patience is not None
    return any(len(values) > 1 for values in head.values())


def hold_out(
    train: NDArray, targets: NDArray, share: float, *, is_exclusive: bool, seed: int = 0
) -> tuple[NDArray, NDArray]:
    """Divide training examples: what is left, and a share to choose on, of each class where a clip has one."""
    draw = np.random.default_rng(seed)
    groups = targets[train].argmax(1) if is_exclusive else np.zeros(len(train), int)
    held = np.zeros(len(train), bool)
    for group in np.unique(groups):
        members = draw.permutation(np.flatnonzero(groups == group))
        held[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return train[~held], train[held]
