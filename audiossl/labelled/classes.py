"""Which classes does a labelled set know, and is what its labels say what the task asks?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from audiossl.errors import UserError
from audiossl.labelled.columns import Columns, Ragged
from audiossl.labelled.divisions import Division

log = logging.getLogger(__name__)

Kind = Literal["multiclass", "multilabel", "events"]


def kind_of(columns: Columns, kind: Kind | None, where: str | None) -> Kind:
    """Tell what is asked, or refuse what the labels cannot answer."""
    timed = [False] if columns.events is None else [events is not None for events in columns.events]
    has_events = any(timed) if kind == "events" else all(timed)  # DESED: some clips are known by label only
    counts = columns.labels.lengths
    if kind is None:
        kind = "events" if has_events else "multilabel" if (counts > 1).any() else "multiclass"
    if kind == "events" and not has_events:
        raise UserError(f"task.kind=events: {where} does not say when; it needs tsv files with onset and offset")
    if kind == "multiclass" and (counts != 1).any():
        odd = int((counts > 1).argmax() if (counts > 1).any() else (counts == 0).argmax())
        raise UserError(
            f"{where}: {columns.name_of(odd)} has {counts[odd]} labels, and a multiclass task needs one each; take "
            "task.kind=multilabel, or another column with task.label=COLUMN"
        )
    return kind


def classes_of(columns: Columns, classes: str | list[str] | None, where: str | None) -> list[str]:
    """List the classes in their published order, or sorted; numbers sort as numbers."""
    found = {columns.names[number] for number in np.unique(columns.labels.ids).tolist()}
    found |= {label for known in columns.known or () for label in known or ()}
    if isinstance(classes, str):
        path = Path(classes).expanduser()
        if not path.is_file():
            raise UserError(
                f"task.classes={classes}: no such file; a list such as [dog,rain], or a file, a name a line"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"task.classes={classes}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        classes = [line.strip() for line in lines if line.strip()]
    if classes is None:
        classes = sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    classes = [str(name) for name in classes]
    if unknown := sorted(found - set(classes)):
        raise UserError(
            f"{where}: the label '{unknown[0]}' is not in task.classes ({len(classes)} classes, and the labels name "
            f"{len(found)}, {len(unknown)} of them unknown); it has {', '.join(classes[:8])} ..."
        )
    if len(set(classes)) < len(classes):
        raise UserError("task.classes: a class is named twice")
    forms: dict[str, str] = {}
    for name in classes:
        if forms.setdefault(normalize("NFC", name), name) != name:
            raise UserError(
                f"{where}: two labels look like '{name}' and differ in how Unicode spells it (NFC, NFD); write one form"
            )
    if len(classes) < 2:
        raise UserError(f"{where}: {len(classes)} class ({', '.join(classes)}); there is nothing to tell apart")
    return classes


def labels_of(columns: Columns, classes: list[str]) -> tuple[Ragged, NDArray[np.bool_] | None]:
    """Number each clip's labels, ascending, and mark which were judged (n, C), None where all were."""
    place = {name: number for number, name in enumerate(classes)}
    labels = columns.labels.renumbered(np.array([place.get(name, -1) for name in columns.names], np.int32))
    if columns.known is None:
        return labels, None
    known = np.ones((len(columns), len(classes)), bool)
    for number, judged in enumerate(columns.known):
        if judged is not None:
            known[number] = False
            known[number, [place[label] for label in judged]] = True
            known[number, labels[number]] = True
    return labels, known


def check_classes(
    divisions: Sequence[Division],
    labels: Ragged,
    classes: list[str],
    empty: Literal["stop", "allow"],
) -> None:
    """Refuse a class that no clip teaches; say which are not tested."""
    for division in divisions:
        where = f"{division.name}: " if division.name else ""
        untaught = _absent(labels, division.train, len(classes))
        if len(untaught) and empty == "stop":
            raise UserError(
                f"{where}no clip to train on is of class '{classes[untaught[0]]}' ({len(untaught)} such classes): take "
                "it out of task.classes, divide the set otherwise, or say task.empty_classes=allow"
            )
        untested = _absent(labels, division.test, len(classes))
        if len(untested):
            said = "%s%d classes have no clip to test on, such as '%s'; means leave them out"
            log.warning(said, where, len(untested), classes[untested[0]])


def _absent(labels: Ragged, clips: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """List the classes that none of `clips` has."""
    return np.flatnonzero(np.bincount(labels.take(clips).ids, minlength=num_classes) == 0)
