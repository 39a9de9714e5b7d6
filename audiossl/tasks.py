"""What is a model asked, of which clips, and what is right?

A task is a labelled set: its classes, its clips with their labels (or events, with onset and offset), and which of them
are trained on, which choose and which are tested on. It is read from a folder as it was published, or from packed
shards; `probe.py` and `finetune.py` see no difference. One YAML in conf/task/ is one set, and `task=folder` is any.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.labelled.classes import Kind, check_classes, classes_of, kind_of, labels_of
from audiossl.labelled.columns import Columns, Keys, Ragged, columns_of_rows
from audiossl.labelled.divisions import Division, divide
from audiossl.labelled.reading import columns_of_shards, rows_of_folder, those_there
from audiossl.labelled.recordings import pack_rows, write_labels
from audiossl.scoring.numbers import CLIP_METRICS, EVENT_METRICS
from audiossl.sound import audio
from audiossl.sound.audio import decode
from audiossl.sound.waveform import resample

log = logging.getLogger(__name__)

METRICS = CLIP_METRICS | {"events": EVENT_METRICS}
USUAL = {"multiclass": "accuracy", "multilabel": "mAP", "events": "event_f1"}
LATE_SECONDS = 0.5  # of an event's end behind its recording's; less is how people annotate


@dataclass(frozen=True, kw_only=True)
class Task:
    """Hold a labelled set of n clips and C classes.

    `keys` and `labels`, each clip's class ids, are read where they lie; `known` (n, C) bool says which were judged,
    None for all.
    `events` lists each clip's (onset_seconds, offset_seconds, class id), None where the set does not say when.
    `onset_collar_seconds` and `variance_penalty` are those of `scoring.numbers.event_scores`.
    `seconds` (n,) are the clips' lengths, `clip_seconds` what is listened to of them, None for all. `hash` changes with
    any byte of audio, any label and any division. `published` are the scores of others, `about` where the set comes
    from.
    """

    name: str
    kind: Kind
    classes: list[str]
    metric: str
    onset_collar_seconds: float
    variance_penalty: float
    keys: Sequence[str] = field(repr=False)
    labels: Ragged = field(repr=False)
    known: NDArray[np.bool_] | None
    events: list[list[tuple[float, float, int]]] | None
    divisions: list[Division]
    clip_seconds: float | None
    published: dict[str, float]
    about: str
    index: Index
    clips: NDArray[np.int64] = field(repr=False)  # of the index

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def seconds(self) -> NDArray[np.float32]:
        return self.index.seconds[self.clips]

    @property
    def targets(self) -> NDArray[np.float32]:
        """Lay the labels out as (n, C): 1 for a clip's own, else 0. For some clips alone: `targets_of`."""
        return self.targets_of(np.arange(len(self)))

    def targets_of(self, clips: NDArray[np.int64]) -> NDArray[np.float32]:
        """Lay the labels of some clips out: (len(clips), C)."""
        return self.labels.one_hot(clips, len(self.classes))

    @property
    def hash(self) -> str:
        """Hash audio, labels and divisions: hexadecimal."""
        digest = hashlib.sha256(f"{self.index.corpus_hash} {self.kind} {self.classes} {self.events}".encode())
        for values in (self.clips, self.labels.ids, self.known, *(part for d in self.divisions for part in d[1:])):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def check_times(self) -> None:
        """Raise `UserError` where nobody says when things happen in a clip that is tested on."""
        if self.kind != "events":
            return
        for clip in np.concatenate([division.test for division in self.divisions]).tolist():
            if self.events[clip] is None:
                raise UserError(f"task={self.name}: nobody says when things happen in test clip {self.keys[clip]}")

    def waveform(self, clip: int, rate_hz: int) -> NDArray[np.float32]:
        """Read a clip: (S,) float32 at `rate_hz`, mono; raises `AudioError` for one that is damaged.

        Through 16 bits and the filter that training has, which is the loader's where clips have several rates: another
        one leaves other traces in the bands that an 8 kHz recording does not have, and a model that was trained on the
        ones does not know the others.
        """
        waveform, stored_hz = decode(self.index.read(int(self.clips[clip])))
        if self.clip_seconds is not None:
            waveform = waveform[: round(self.clip_seconds * stored_hz)]
        if self._has_several_rates:
            waveform, stored_hz = audio.resample(waveform, stored_hz, rate_hz), rate_hz
        return resample(torch.from_numpy(audio.to_int16(waveform))[None], stored_hz, rate_hz)[0].numpy()

    @cached_property
    def _has_several_rates(self) -> bool:
        return len(np.unique(self.index.rate_hz[self.clips[self.divisions[0].train]])) > 1

    def shards_of(self, division: Division, path: Path) -> Path:
        """Write an index of a division's clips to `path`, with splits train, val and test; for `data.shards`."""
        parts = {"train": division.train, "val": division.validation, "test": division.test}
        clips = np.concatenate(list(parts.values()))
        split = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
        said = dict(classes=self.classes, labels=self.labels.take(clips), split=split, splits=list(parts))
        return write_labels(self.index, self.clips[clips], path, **said)


def load_task(
    *,
    name: str,
    kind: Kind | None,
    root: str | None,
    shards: str | None,
    layout: str | None,
    metadata: str | None,
    filename: str,
    audio_folder: str | None,
    label: str | None,
    separator: str | None,
    classes: str | list[str] | None,
    empty_classes: Literal["stop", "allow"],
    split: str | None,
    train_splits: list[str] | None,
    validation_splits: list[str] | None,
    test_splits: list[str] | None,
    fold: str | None,
    folds: list[int] | None,
    validation: float | Literal["next"] | None,
    test: float | None,
    metric: str | None,
    onset_collar_seconds: float,
    variance_penalty: float,
    clip_seconds: float | None,
    published: dict,
    about: str | None,
    cache_dir: str | None,
    max_bad_fraction: float,
) -> Task:
    """Read a labelled set; every setting is explained in conf/task/folder.yaml.

    Raises `UserError`, naming file, line and key, for a set that is not there, labels that are not among `classes`, a
    class that no clip teaches, an event that ends before it begins, and divisions that cannot be made.
    """
    if (root is None) == (shards is None):
        given = f"task.root={root or 'null'}, task.shards={shards or 'null'}"
        raise UserError(f"{given}: give the set's folder, or packed shards of it. {about or ''}".strip())
    columns = dict(filename=filename, label=label, separator=separator, split=split, fold=fold)
    if shards is not None:
        index = Index.load(shards)
        said, clips = columns_of_shards(index, metadata, columns | dict(audio_folder=""), max_bad_fraction)
    else:
        folder = _existing(root, about)
        rows = rows_of_folder(folder, kind, layout, metadata, audio_folder, columns)
        _check_labels(columns_of_rows(rows), kind, classes, metric, root)
        index, found = pack_rows(folder, rows, cache_dir=cache_dir, max_bad_fraction=max_bad_fraction)
        said, clips = those_there(rows, found)
    where = shards or root
    kind = kind_of(said, kind, where)
    names = classes_of(said, classes, where)
    labels, known = labels_of(said, names)
    keys = Keys(index, clips)
    names_of = {"train": train_splits, "validation": validation_splits, "test": test_splits}
    how = dict(names=names_of, folds=folds, validation=validation, test=test)
    divisions = divide(keys, said, **how)
    check_classes(divisions, labels, names, empty_classes)
    return Task(
        name=name,
        kind=kind,
        classes=names,
        metric=_metric(metric, kind),
        onset_collar_seconds=onset_collar_seconds,
        variance_penalty=variance_penalty,
        keys=keys,
        labels=labels,
        known=known,
        events=_events(said, names, index.seconds[clips], clip_seconds) if kind == "events" else None,
        divisions=divisions,
        clip_seconds=clip_seconds,
        published=dict(published),
        about=about or "",
        index=index,
        clips=clips,
    )


def _existing(root: str, about: str | None) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"task.root={root}: no such folder. {about or ''}".strip())
    return folder


def _check_labels(
    said: Columns, kind: Kind | None, classes: str | list[str] | None, metric: str | None, where: str | None
) -> None:
    """Refuse labels that are not what the task asks, before hours of packing."""
    _metric(metric, kind_of(said, kind, where))
    classes_of(said, classes, where)


def _metric(metric: str | None, kind: Kind) -> str:
    if metric is not None and metric not in METRICS[kind]:
        raise UserError(f"task.metric={metric}: a {kind} task is judged by {', '.join(METRICS[kind])}")
    return metric or USUAL[kind]


def _events(
    said: Columns, classes: list[str], seconds: NDArray[np.float32], clip_seconds: float | None
) -> list[list[tuple[float, float, int]] | None]:
    """List each clip's events: of those that `clip_seconds` cuts, what is left; of those past the audio, a warning."""
    place = {name: number for number, name in enumerate(classes)}
    late = [
        f"{said.name_of(clip)}: {e.label}, {e[0]:g} to {e[1]:g} s of {seconds[clip]:.4g} s"
        for clip, own in enumerate(said.events)
        for e in own or ()
        if e[1] > seconds[clip] + LATE_SECONDS
    ]
    if late:
        log.warning("%d events end after their recording does, where nothing is heard: %s", len(late), late[0])
    reach = math.inf if clip_seconds is None else clip_seconds
    return [
        None if own is None else [(e[0], min(e[1], reach), place[e.label]) for e in own if e[0] < reach]
        for own in said.events
    ]
