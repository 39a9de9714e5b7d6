"""How are the recordings of a folder labelled: by a csv, a line a recording, or by DCASE's tsv, a line an event?

What a table says is taken at its word or refused with its line: nothing is guessed but the names of columns that are
as usual.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from audiossl.errors import UserError
from audiossl.labelled.cells import CONTROL, fold_of, lines_of, open_table, plain
from audiossl.labelled.rows import Event, Row
from audiossl.sound import ffmpeg
from audiossl.sound.audio import extension_of

A_SPLIT = "; a column of names is a split: task.split=COLUMN"
EVENT_COLUMNS = ("filename", "onset", "offset", "event_label")


def read_table(
    path: Path,
    *,
    filename: str,
    audio_folder: str,
    label: str | None,
    separator: str | None,
    split: str | None,
    fold: str | None,
) -> list[Row]:
    """Read a csv (or tsv) with a line a recording; each argument names a column, None for the usual ones.

    The usual ones: `label`, else `labels`; and, where neither is named, `fold`, else `split`. Cells of several labels
    are split at `separator`. Raises `UserError` for a file, column or line that cannot be meant.
    """
    with open_table(path) as (header, found):
        lines = list(found)
    labels = label or next((name for name in ("label", "labels") if name in header), None)
    if split is None and fold is None:
        fold = "fold" if "fold" in header else None
        split = "split" if fold is None and "split" in header else None
    for key, column in (("filename", filename), ("label", labels or "label"), ("split", split), ("fold", fold)):
        if column is not None and column not in header:
            raise UserError(f"{path}: no column '{column}'; it has {', '.join(header)}: choose with task.{key}=COLUMN")
    if not lines:
        raise UserError(f"{path}: names columns and no recording")
    rows: dict[str, Row] = {}
    numbers: dict[str, int] = {}
    for number, line in lines:
        where = f"{path} line {number}"
        cell = plain(line[labels], f"{where}: {labels}")
        parts = (part.strip() for part in (cell.split(separator) if separator else [cell]))
        name = _relative(line[filename], audio_folder, where)
        if numbers.setdefault(name, number) != number:
            way_out = f"give each recording one line, its labels between '{separator}'" if separator else "keep one"
            raise UserError(f"{where}: '{name}' is listed twice, first in line {numbers[name]}; {way_out}")
        of_split = plain(line[split], f"{where}: {split}") or None if split else None
        of_fold = fold_of(line[fold], f"{where}: {fold}", A_SPLIT) if fold else None
        rows[name] = Row(name, tuple(dict.fromkeys(filter(None, parts))), of_split, of_fold)
    return list(rows.values())


def read_events(root: Path, *, audio_folder: str, tables: list[Path]) -> list[Row]:
    """Read DCASE's tsv files (filename, onset, offset, event_label); each table's name is the split of its recordings.

    A recording without events stands with empty cells, in `NAME_durations.tsv` beside NAME.tsv, or in meta.csv with its
    `split`. Raises `UserError` for a line that cannot be meant, above all an offset that is not after its onset.
    """
    events: dict[tuple[str, str], list[Event]] = {}
    for table in tables:
        split = table.stem
        for number, line in lines_of(table):
            where = f"{table} line {number}"
            if absent := [column for column in EVENT_COLUMNS if column not in line]:
                raise UserError(f"{table}: no column '{absent[0]}'; DCASE's has {', '.join(EVENT_COLUMNS)}")
            of_clip = events.setdefault((split, _relative(line["filename"], audio_folder, where)), [])
            if line["event_label"]:
                of_clip.append(_event(line, where))
            elif line["onset"] or line["offset"]:
                raise UserError(f"{where}: an event without a label")
        durations = table.with_name(f"{split}_durations.tsv")
        for number, line in lines_of(durations) if durations.is_file() else ():
            events.setdefault((split, _relative(line["filename"], audio_folder, f"{durations} line {number}")), [])
    for split, name in _silent(root, {split for split, _ in events}):
        events.setdefault((split, name), [])
    _refuse_twins(root, [name for _, name in events])
    rows = []
    for (split, name), of_clip in events.items():
        labels = tuple(dict.fromkeys(event.label for event in of_clip))
        rows.append(Row(name, labels, split, None, events=tuple(sorted(of_clip))))
    return rows


def event_tables(root: Path) -> list[Path]:
    """List the tsv files in a folder that have an event a line."""
    found = []
    for path in sorted(root.glob("*.tsv")):
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            columns = file.readline().strip().split("\t")
        if set(EVENT_COLUMNS) == set(columns):
            found.append(path)
    return found


def audio_named(root: Path, folder: Path) -> dict[str, str]:
    """Map the name without extension of every audio file below `folder` to its path relative to `root`."""
    found: dict[str, str] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if extension_of(name) or ffmpeg.extension_of(name):
                found[name.rpartition(".")[0]] = os.path.relpath(os.path.join(parent, name), root).replace(os.sep, "/")
    return found


def _silent(root: Path, splits: set[str]) -> Iterator[tuple[str, str]]:
    """Find the recordings that meta.csv gives to one of the splits."""
    path = root / "meta.csv"
    for number, line in lines_of(path) if path.is_file() else ():
        if line.get("split") in splits and line.get("filename"):
            yield line["split"], _relative(line["filename"], "", f"{path} line {number}")


def _event(line: dict[str, str], where: str) -> Event:
    try:
        event = Event(float(line["onset"]), float(line["offset"]), plain(line["event_label"], where))
    except ValueError:
        raise UserError(f"{where}: onset '{line['onset']}', offset '{line['offset']}': give seconds") from None
    if not (math.isfinite(event.offset_seconds) and 0 <= event.onset_seconds < math.inf):
        said = f"onset '{line['onset']}', offset '{line['offset']}'"
        raise UserError(f"{where}: {event.label} has {said}: give seconds from the clip's start")
    if not event.onset_seconds < event.offset_seconds:
        raise UserError(f"{where}: {event.label} ends at {line['offset']} s, not after its onset at {line['onset']} s")
    return event


def _relative(name: str, folder: str, where: str) -> str:
    path = os.path.normpath(os.path.join(folder, name)).replace(os.sep, "/")
    if not name or path.startswith(("/", "../")) or CONTROL.search(name):
        raise UserError(f"{where}: {name!r} is no file below the set's folder")
    return path


def _refuse_twins(path: Path, names: list[str]) -> None:
    repeated: dict[str, int] = defaultdict(int)
    for name in names:
        repeated[name] += 1
        if repeated[name] > 1:
            raise UserError(f"{path}: '{name}' is listed twice ({len(names) - len(set(names))} of {len(names)} are)")
