"""What does a set say of its recordings, in whatever layout it lies?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.labelled.classes import Kind
from audiossl.labelled.columns import Columns, columns_of_index, columns_of_rows
from audiossl.labelled.recordings import find_rows
from audiossl.labelled.rows import Row
from audiossl.labelled.tables import event_tables, read_events, read_table

log = logging.getLogger(__name__)


def rows_of_folder(
    folder: Path, kind: Kind | None, layout: str | None, metadata: str | None, audio_folder: str | None, columns: dict
) -> list[Row]:
    """Read a folder's metadata in its layout; DCASE's tsv go before meta.csv, unless a label is named."""
    if layout is None:
        tables = event_tables(folder) if columns["label"] is None and metadata is None else []
        has_table = kind in ("multiclass", "multilabel") and (folder / "meta.csv").is_file()
        layout = "dcase" if tables and not has_table else "table"
    if layout == "dcase":
        tables = event_tables(folder) if metadata is None else [folder / metadata]
        if not tables:
            raise UserError(f"{folder}: no tsv with the columns filename, onset, offset and event_label")
        audio = audio_folder if audio_folder is not None else "audio" if (folder / "audio").is_dir() else ""
        return read_events(folder, audio_folder=audio, tables=tables)
    if layout == "table":
        path = folder / (metadata or "meta.csv")
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; name the table of labels with task.metadata=FILE (below the folder)"
            )
        return read_table(path, **columns, audio_folder=audio_folder or "")
    from audiossl.labelled.layouts import read_layout  # scikit-learn

    return read_layout(layout, folder)


def columns_of_shards(
    index: Index, metadata: str | None, columns: dict[str, Any], max_bad_fraction: float
) -> tuple[Columns, NDArray[np.int64]]:
    """Take labels, splits and folds from the shards' index, or from a table whose files are found among their keys.

    Gives what is said of them, and which clips of the index that is.
    """
    if metadata is not None:
        rows = read_table(Path(metadata).expanduser(), **columns)
        return those_there(rows, find_rows(index, rows, max_bad_fraction=max_bad_fraction))
    has_folds = bool((index.fold >= 0).any()) and columns["split"] is None
    labelled = np.flatnonzero(np.diff(index.column("label_ends"), prepend=0))
    if len(labelled) < len(index):
        log.warning(
            "%s: %d of %d clips have no label and are left out", index.path, len(index) - len(labelled), len(index)
        )
    if not len(labelled):
        raise UserError(f"{index.path}: no clip has a label; pack the set with a meta.csv, or give task.metadata=FILE")
    return columns_of_index(index, labelled, by_fold=has_folds), labelled


def those_there(rows: list[Row], clips: list[int | None]) -> tuple[Columns, NDArray[np.int64]]:
    """Keep the rows that have a clip."""
    there = [number for number, clip in enumerate(clips) if clip is not None]
    return columns_of_rows([rows[number] for number in there]), np.array([clips[number] for number in there], np.int64)
