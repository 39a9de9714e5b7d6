"""What does a fine-tuned classifier say of a fold's test clips, and is it one that can answer?

The classifier that was just trained and one that somebody else trained (`evaluate=true`) are the same method here, so
that their scores are too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy.special import expit, softmax

from audiossl.errors import UserError
from audiossl.finetuning import FineTuning
from audiossl.labelled.divisions import Division
from audiossl.pretrained import PretrainedEncoder
from audiossl.probes.scores import Tested, summarise
from audiossl.running.build import method_from_config
from audiossl.scoring.events import raster, smooth
from audiossl.scoring.frames import check_room
from audiossl.scoring.tally import Tally
from audiossl.tasks import Task
from audiossl.tuning.predictions import ARRAYS, Moments, about_fold, write_tested
from audiossl.tuning.start import check_classes
from audiossl.tuning.testing import Testing, predicted
from audiossl.weights.export import export_encoder, read_export

log = logging.getLogger(__name__)

NOTHING_HIDDEN = dict.fromkeys(
    ("mask_ratio_time", "mask_ratio_frequency", "patchout_time", "patchout_frequency", "patchout_random"), 0
)


def check_kind(model: Mapping[str, Any], task: Task) -> None:
    """Refuse a head that cannot answer what the task asks."""
    is_frame = model["level"] == "frame"
    if task.kind == "events" and not is_frame:
        raise UserError(
            f"task={task.name} asks when things happen, and model.level=clip says only whether: take tuning=events, or "
            "task.kind=multilabel"
        )
    if task.kind != "events" and is_frame and model["weak_pooling"] == "none":
        raise UserError(
            f"model.level=frame: the clips of task={task.name} have labels and no events; take "
            "model.weak_pooling=attention, or model.level=clip"
        )
    if task.kind != "multiclass" and model["loss"] == "ce":
        raise UserError(f"model.loss=ce: is for one label a clip, and task={task.name} is {task.kind}; take bce")


def classifier_of(
    config: dict[str, Any], model: PretrainedEncoder, task: Task
) -> tuple[FineTuning, list[int], NDArray[np.float64]]:
    """Make a method of a classifier that is there; give it, the task's classes among its own, and its thresholds."""
    places = check_classes(model, task.classes, config["init"])
    head = model.head.geometry
    pooling = "columns" if head["pooling"] in ("tokens", "columns") else head["pooling"]
    level = "frame" if pooling == "columns" else "clip"
    if task.kind == "events" and level == "clip":
        raise UserError(
            f"init={config['init']}: its classifier scores whole clips, and task={task.name} asks when things happen; "
            "take task.kind=multilabel, or an encoder fine-tuned with tuning=events"
        )
    settings = config["model"] | {
        "geometry": model.encoder.geometry,
        "level": level,
        "pooling": pooling,
        "head_norm": head["norm"],
        "head_eps": head["eps"],
        "final_norm": None,
        "drop_path": None,
        "teacher": None,
        "distill_weight": 0.0,
        "freeze": "none",
        "mask_padding": model.mask_padding,
        "weak_pooling": _weak_pooling(config, model, task) if level == "frame" else "none",
        **{"loss": "bce", "label_smoothing": 0.0, "random_positions": False},
        "hiding": config["model"]["hiding"] | NOTHING_HIDDEN,
        "augment": config["model"]["augment"] | {"roll_magnitude": "none", "resized_crop": "none"},
    }
    if model.description.get("chunk_frames") and settings["chunk_frames"] is None:
        settings |= {name: model.description[name] for name in ("chunk_frames", "chunk_division")}
    names = model.labels or [str(number) for number in range(head["num_classes"])]
    method = method_from_config({"model": settings, "frontend": {}}, frontend=model.frontend, vocabulary=names)
    method.encoder.load_state_dict(model.encoder.state_dict())
    method.head.load_state_dict(model.head.state_dict())
    if method.attention is not None:
        method.attention.load_state_dict(model.attention.state_dict())
    decided = np.asarray((model.description.get("decisions") or {}).get("thresholds", 0.5), np.float64)
    return method.eval(), places, np.broadcast_to(decided, (head["num_classes"],))[places]


def _weak_pooling(config: dict[str, Any], model: PretrainedEncoder, task: Task) -> str:
    """Choose how moments are pooled for a task of clips: as asked for, else as they were in training."""
    if task.kind == "events":
        return "none"
    asked, own = config["model"]["weak_pooling"], model.weak_pooling
    chosen = own if asked == "none" else asked
    if chosen == "none" or (chosen == "attention" and model.attention is None):
        why = "its classifier scores moments" if chosen == "none" else "it holds no attention over its moments"
        raise UserError(
            f"init={config['init']}: {why}, and task={task.name} has labels of clips; say how they are pooled, with "
            "model.weak_pooling=max, average, linear_softmax or exponential_softmax"
        )
    return chosen


def judge_fold(
    config: dict[str, Any],
    testing: Testing,
    method: FineTuning,
    places: list[int] | None,
    decided: NDArray[np.float64] | None,
    task: Task,
    division: Division,
    folder: Path,
    seed: int,
) -> Tested:
    """Score a division's test clips, and what noise does to them; export what was tested, and write it down.

    `places` and `decided` are those of `classifier_of`, None for a method that was trained on the task. Thresholds are
    tuned on validation clips; where there are none, they are what the classifier decided by before, or a half.
    """
    if torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu":
        method.cuda()
    is_windowed = method.frontend.frames is not None or not method.chunk["chunk_frames"]
    how = dict(is_windowed=is_windowed, padding=config["data"]["padding"], of_moments=task.kind == "events")
    step = method.column_seconds if method.level == "frame" else None
    name = f" {division.name}" if division.name else ""
    thresholds: float | NDArray = 0.5 if decided is None else decided
    thresholds = thresholds if testing.thresholds == "validation" else float(testing.thresholds)
    validation = division.validation
    folder.mkdir(parents=True, exist_ok=True)
    if task.kind == "events":
        _check_room(task, division, step, folder, num_tests=1 + bool(testing.snr_db))
        validation = np.array([clip for clip in validation if task.events[clip] is not None], np.int64)
    if testing.thresholds == "validation" and len(validation) and task.kind != "multiclass":
        heard = predicted(method, task, validation, testing, {}, what=f"thresholds{name}", **how)
        thresholds = _thresholds(task, heard, places, step, testing.median_frames)
    about = dict(frame_seconds=step, thresholds=thresholds, median_frames=testing.median_frames)

    def scored(what: str, path: Path | None, snr_db: float | None = None) -> Tested:
        bad: dict[int, str] = {}
        heard = predicted(method, task, division.test, testing, bad, what=what, snr_db=snr_db, **how)
        beside = about_fold(task, division.name, seed, step, testing.median_frames)
        kept = Moments(len(task.classes), folder, path, beside) if task.kind == "events" else None
        clips, probabilities = _collected(task, heard, places, kept)
        _check_heard(task, clips, bad, what)
        bad_clips = {task.keys[clip]: reason for clip, reason in bad.items()}
        return Tested(division.name, seed, clips, probabilities, **about, bad_clips=bad_clips)

    tested, noisy = scored(f"test{name}", folder / ARRAYS), {}
    for snr_db in testing.snr_db or ():
        with_noise = scored(f"test{name} at {snr_db:g} dB", None, snr_db)
        noisy[snr_db] = summarise(task, [with_noise], num_resamples=0, folder=folder)["numbers"]
    if not config["evaluate"]:
        _export(method, folder, tested)
    write_tested(folder, task, tested, noisy)
    return tested


def _check_room(task: Task, division: Division, step: float, folder: Path, *, num_tests: int) -> None:
    """Raise `UserError` where a fold's disk has no room for what is said of all moments, and to judge it."""
    seconds = task.seconds[division.test].astype(np.float64)
    seconds = seconds if task.clip_seconds is None else np.minimum(seconds, task.clip_seconds)
    num_bytes = 4 * len(task.classes) * float((seconds / step).sum())
    check_room(folder, int((2 + num_tests) * num_bytes), f"the scores of {len(seconds)} test clips, and to judge them,")


def _check_heard(task: Task, clips: NDArray[np.int64], bad: Mapping[int, str], what: str) -> None:
    if not len(clips):
        clip, reason = next(iter(bad.items()))
        raise UserError(f"none of the {len(bad)} clips to {what} could be read; {task.keys[clip]}: {reason}")


def _collected(
    task: Task, heard: Iterable[tuple[int, NDArray[np.float32]]], places: list[int] | None, kept: Moments | None
) -> tuple[NDArray[np.int64], NDArray | Moments]:
    """Take in the logits of all clips: whose they are, and their probabilities, or those of moments in `kept`."""
    clips, found = [], []
    for clip, logits in heard:
        logits = logits if places is None else logits[..., places]
        clips.append(clip)
        found.append(logits) if kept is None else kept.add(logits)
    clips = np.array(clips, np.int64)
    if kept is not None or not found:
        return clips, kept
    stacked = np.stack(found).astype(np.float64)
    return clips, softmax(stacked, axis=1) if task.kind == "multiclass" else expit(stacked)


def _thresholds(
    task: Task,
    heard: Iterable[tuple[int, NDArray[np.float32]]],
    places: list[int] | None,
    step: float | None,
    median_frames: int,
) -> NDArray[np.float64]:
    """Tune a threshold per class on validation clips, for the highest F1: of clips, or of smoothed moments.

    Moments are not kept where they are too many (`scoring.tally`): thresholds then are those of rounded logits.
    """
    tally, num_clips = Tally(len(task.classes)), 0
    for clip, logits in heard:
        logits, num_clips = logits if places is None else logits[..., places], num_clips + 1
        if task.kind == "events":
            there = raster(task.events[clip], num_frames=len(logits), frame_seconds=step, num_classes=len(task.classes))
            tally.add(smooth(logits, median_frames), there)
        else:
            target = task.targets_of(np.array([clip]))
            tally.add(logits[None], target if task.known is None else np.where(task.known[clip], target, np.nan))
    if not num_clips:
        raise UserError(f"task={task.name}: none of the clips to validate on could be read, and they decide thresholds")
    if not tally.is_exact:
        log.warning(
            "thresholds are tuned on logits rounded to float16: %d moments are too many to keep", tally.num_rows
        )
    return tally.thresholds()


def _export(method: FineTuning, folder: Path, tested: Tested) -> None:
    """Export the weights that were tested, with what decides between present and absent, as the fold's encoder."""
    path, config = folder / "encoder.safetensors", yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    description, _ = read_export(path)
    thresholds = tested.thresholds if isinstance(tested.thresholds, float) else tested.thresholds.tolist()
    extra = {"decisions": {"thresholds": thresholds, "median_frames": tested.median_frames}}
    about = dict(vocabulary=description["vocabulary"], provenance=description["provenance"], extra=extra)
    export_encoder(method.cpu(), config, path, **about)
