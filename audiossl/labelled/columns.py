"""How is what a set says of two million clips held?

A column per fact, as plain arrays: ids of labels laid end to end with a column of ends, codes of splits, folds.
Packed shards have their labels so already, and no clip becomes a Python object; the rows of a table are turned into the
same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audiossl.index import Index
from audiossl.indexing.indexfile import take_ragged
from audiossl.labelled.rows import Event, Row


class Ragged(Sequence):
    """Hold a row of ids for each of n clips: `ids` (int32) of all, and where each clip's end (`ends`, int64)."""

    def __init__(self, ids: NDArray[np.int32], ends: NDArray[np.int64]):
        self.ids, self.ends = ids, ends

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Lay rows one after the other."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        ids = np.fromiter((value for row in rows for value in row), np.int32, int(lengths.sum()))
        return cls(ids, np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, clip: int) -> NDArray[np.int32]:
        clip = range(len(self))[clip]
        return self.ids[self.ends[clip - 1] if clip else 0 : self.ends[clip]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.ends, prepend=0)

    @property
    def owner(self) -> NDArray[np.int64]:
        """Say whose each id is."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, clips: NDArray[np.int64]) -> Ragged:
        """Take some clips' rows, in their order."""
        return Ragged(*take_ragged(self.ids, self.ends, clips))

    def renumbered(self, numbers: NDArray[np.int32]) -> Ragged:
        """Give id i the number `numbers[i]`; each clip's come out ascending."""
        ids = numbers[self.ids].astype(np.int32)
        if (np.diff(ids) < 0).any():
            ids = ids[np.lexsort((ids, self.owner))]
        return Ragged(ids, self.ends)

    def one_hot(self, clips: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
        """Lay the rows of some clips out as (n, num_classes): 1 for their own ids, else 0."""
        some = self.take(clips)
        targets = np.zeros((len(some), num_classes), np.float32)
        targets[some.owner, some.ids] = 1
        return targets


class Keys(Sequence):
    """List the keys of some clips of an index, each read where it lies when it is asked for."""

    def __init__(self, index: Index, clips: NDArray[np.int64]):
        self._index, self._clips = index, clips

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, clip: int) -> str:
        return self._index.key(int(self._clips[clip]))

    def __iter__(self) -> Iterator[str]:
        return map(self._index.key, map(int, self._clips))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None


@dataclass(frozen=True)
class Columns:
    """Hold what a set says of n recordings: the labels' ids in `names`, the codes of their splits, and their folds.

    A code or fold is -1 where there is none. `known` and `events` are those of `Row`, None where no recording has them.
    `name_of` names a recording for whoever reads an error.
    """

    labels: Ragged
    names: list[str]
    split: NDArray[np.int32]
    splits: list[str]
    fold: NDArray[np.int32]
    known: list[tuple[str, ...] | None] | None
    events: list[tuple[Event, ...] | None] | None
    name_of: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)


def columns_of_rows(rows: Sequence[Row]) -> Columns:
    """Turn rows into columns; names and splits are numbered as they come."""
    names: dict[str, int] = {}
    splits: dict[str, int] = {}
    labels = Ragged.of([[names.setdefault(label, len(names)) for label in row.labels] for row in rows])
    split = [-1 if row.split is None else splits.setdefault(row.split, len(splits)) for row in rows]
    fold = [-1 if row.fold is None else row.fold for row in rows]
    known = [row.known for row in rows] if any(row.known is not None for row in rows) else None
    events = [row.events for row in rows] if any(row.events is not None for row in rows) else None
    codes = np.array(split, np.int32), list(splits), np.array(fold, np.int32)
    return Columns(labels, list(names), *codes, known, events, lambda clip: rows[clip].filename)


def columns_of_index(index: Index, clips: NDArray[np.int64], *, by_fold: bool) -> Columns:
    """Take the columns of some clips as their index has them; with their folds, or with their splits."""
    none = np.full(len(clips), -1, np.int32)
    split, fold = (none, index.fold[clips]) if by_fold else (index.column("split")[clips], none)
    labels = Ragged(*index.labels_of(clips))
    about = labels, index.vocabulary, split, index.splits, fold
    return Columns(*about, None, None, lambda clip: index.key(int(clips[clip])))
