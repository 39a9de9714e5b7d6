"""Which clips of a labelled set are trained on, which choose, and which are tested on?

A set has splits, or folds that are each tested on once; where it has neither, a share of its clips is held out by a
hash of their keys, so that it is the same share everywhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from audiossl.errors import UserError

if TYPE_CHECKING:
    from audiossl.labelled.columns import Columns

log = logging.getLogger(__name__)

USUAL = {
    "train": ("train", "training", "dev", "development"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Division(NamedTuple):
    """Hold the clips (int64, ascending) of one training: `name` is "" for a set with splits, `fold3` of a fold."""

    name: str
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def divide(
    keys: Sequence[str],
    columns: Columns,
    *,
    names: dict[str, list[str] | None],
    folds: list[int] | None,
    validation: float | Literal["next"] | None,
    test: float | None,
) -> list[Division]:
    """Divide clips by their folds, else by their splits, else by a hash (`test`: the share to test on).

    `names` maps train, validation and test to the splits that are each, None for the usual names. `folds` to test on,
    None for all. `validation`: a share of the training clips, or "next", the fold after the one tested on, for sets
    that have no clips to validate on. Raises `UserError` for what is not there, and where nothing is left.
    """
    if (columns.fold >= 0).any():
        if test is not None:
            raise UserError(
                f"task.test={test}: this set has folds to test on; task.fold and task.test exclude each other"
            )
        return _by_fold(keys, columns.fold, folds, validation)
    if folds is not None:
        raise UserError(f"task.folds={folds}: this set has no folds; name their column with task.fold=COLUMN")
    if validation == "next":
        raise UserError("task.validation=next: is for sets with folds; give a share, such as 0.1")
    if (columns.split >= 0).any():
        if test is not None:
            raise UserError(f"task.test={test}: this set has a split to test on; leave it out")
        train, held_out, tested = _by_split(columns, names)
    else:
        if test is None:
            raise UserError(
                "the set has neither splits nor folds: name a column with task.split=COLUMN or task.fold=COLUMN, or "
                "hold a share of its clips out with task.test=0.2"
            )
        is_test = chosen_by_hash(keys, test, "test")
        train, held_out, tested = np.flatnonzero(~is_test), np.zeros(0, np.int64), np.flatnonzero(is_test)
    return [_checked(_hold_out(Division("", train, held_out, tested), keys, validation))]


def chosen_by_hash(keys: Iterable[str], share: float, what: str) -> NDArray[np.bool_]:
    """Choose about `share` of the clips, each by its own key: the same ones whatever else is in the set."""
    hashes = (hashlib.sha256(f"{what} {key}".encode("utf-8", "surrogateescape")).digest()[:8] for key in keys)
    return np.fromiter((int.from_bytes(digest) < share * 2**64 for digest in hashes), bool)


def _by_fold(
    keys: Sequence[str], numbers: NDArray[np.int32], folds: list[int] | None, validation: float | str | None
) -> list[Division]:
    there = np.unique(numbers[numbers >= 0]).tolist()
    if absent := sorted(set(folds or ()) - set(there)):
        raise UserError(f"task.folds={folds}: there is no fold {absent[0]}; the set has {there}")
    if folds is not None and len(set(folds)) != max(len(folds), 1):
        raise UserError(f"task.folds={folds}: name at least one, each once; null tests on all")
    if len(there) < 2 + (validation == "next"):
        raise UserError(f"the set has only the folds {there}: too few to test on one and train on others")
    _say_left_out(numbers >= 0, "in no fold")
    divisions = []
    for fold in there if folds is None else folds:
        tested, held_out = numbers == fold, np.zeros(len(numbers), bool)
        if validation == "next":
            held_out = numbers == there[(there.index(fold) + 1) % len(there)]
        train = np.flatnonzero((numbers >= 0) & ~tested & ~held_out)
        division = Division(f"fold{fold}", train, np.flatnonzero(held_out), np.flatnonzero(tested))
        divisions.append(_checked(_hold_out(division, keys, None if validation == "next" else validation)))
    return divisions


def _by_split(columns: Columns, names: dict[str, list[str] | None]) -> list[NDArray[np.int64]]:
    there = sorted(columns.splits[code] for code in np.unique(columns.split).tolist() if code >= 0)
    parts = []
    for part, given in names.items():
        given = None if given is None else [str(name) for name in given]  # of a column of numbers
        if absent := sorted(set(given or ()) - set(there)):
            raise UserError(f"task.{part}_splits={given}: there is no split '{absent[0]}'; the set has {there}")
        wanted = USUAL[part] if given is None else given
        parts.append(np.isin(columns.split, [code for code, name in enumerate(columns.splits) if name in wanted]))
        if part != "validation" and not parts[-1].any():
            raise UserError(f"no clip to {part} on: the splits are {there}; name them with task.{part}_splits=[...]")
    if (np.sum(parts, axis=0) > 1).any():
        raise UserError(f"task.*_splits={names}: a split is in two of them")
    _say_left_out(np.sum(parts, axis=0) > 0, f"in none of the splits for training, validation and test ({there})")
    return [np.flatnonzero(part) for part in parts]


def _say_left_out(used: NDArray[np.bool_], where: str) -> None:
    if not used.all():
        log.warning("%d of %d clips are left out: they are %s", (~used).sum(), len(used), where)


def _hold_out(division: Division, keys: Sequence[str], share: float | None) -> Division:
    if share is None or len(division.validation):
        return division
    if not 0 < share < 1:
        raise UserError(f"task.validation={share}: a share of the training clips, above 0 and below 1")
    chosen = chosen_by_hash((keys[clip] for clip in division.train.tolist()), share, "validation")
    return division._replace(train=division.train[~chosen], validation=division.train[chosen])


def _checked(division: Division) -> Division:
    for part in ("train", "test"):
        if not len(getattr(division, part)):
            raise UserError(f"{division.name or 'the set'}: no clip is left to {part} on")
    return division
