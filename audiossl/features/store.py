"""How do the features of many files end in one file, and how does a killed command go on where it was?

Beside `features.npz` a folder `features.npz.partial` holds the plan (what is asked of which encoder, of which files)
and the features of each finished group of files. Groups follow from the files alone, so that a command that was killed
makes the same batches again and ends in the same bytes. The file itself appears whole or not at all.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audiossl.errors import UserError
from audiossl.indexing.indexfile import write_whole

KINDS = (".npz", ".h5", ".hdf5")
GROUP_FILES, GROUP_BYTES = 64, 2**25  # a kill loses no more


@dataclass
class Group:
    """Hold what became of some files: `rows`, the numbers of those embedded, their features, and the others' reasons.

    `frames` (sum of T', D") are one file's after the other's, `lengths` of each; both empty where not asked for.
    """

    rows: list[int] = field(default_factory=list)
    clips: list[NDArray] = field(default_factory=list)
    frames: list[NDArray] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Write it as npz."""
        target = io.BytesIO()
        order = np.argsort(self.rows).tolist()
        frames = [self.frames[i] for i in order] if self.frames else []
        np.savez(
            target,
            rows=np.array([self.rows[i] for i in order], np.int64),
            clip=np.stack([self.clips[i] for i in order]) if order else np.zeros((0, 0), np.float32),
            frames=np.concatenate(frames) if frames else np.zeros((0, 0), np.float32),
            lengths=np.array([len(some) for some in frames], np.int64),
            rejected=np.array(json.dumps(sorted(self.rejected))),
        )
        return target.getvalue()


def groups_of(sizes: Sequence[int]) -> list[range]:
    """Divide files of these sizes in bytes into groups, in order."""
    groups, begin, weight = [], 0, 0
    for number, size in enumerate(sizes):
        weight += size
        if number + 1 - begin >= GROUP_FILES or weight >= GROUP_BYTES or number + 1 == len(sizes):
            groups.append(range(begin, number + 1))
            begin, weight = number + 1, 0
    return groups


class Store:
    """Hold what is under way to `out`; `plan` (plain values) says what is asked, and has to stay the same."""

    def __init__(self, out: Path, plan: dict[str, Any]):
        self.out, self.plan, self.folder = out, plan, out.with_name(f"{out.name}.partial")

    @contextmanager
    def claimed(self) -> Iterator[Store]:
        """Keep other processes out; refuse what was begun with another plan. Raises `UserError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.out}: another process is writing it") from error
            path = self.folder / "plan.json"
            if path.is_file() and (changed := differing(json.loads(path.read_bytes()), self.plan)):
                raise UserError(
                    f"{self.out}: begun with other settings ({changed}); give the same, or delete {self.folder}"
                )
            write_whole(path, json.dumps(self.plan).encode())
            yield self

    def path(self, number: int) -> Path:
        """Name the file of a group."""
        return self.folder / f"group-{number:06d}.npz"

    def has(self, number: int) -> bool:
        """Tell whether a group is done."""
        return self.path(number).is_file()

    def add(self, number: int, group: Group) -> None:
        """Keep a finished group."""
        write_whole(self.path(number), group.to_bytes())

    def rejected(self, num_groups: int) -> list[tuple[int, str]]:
        """List (file number, reason) of what could not be used."""
        return [
            (row, reason)
            for number in range(num_groups)
            for row, reason in json.loads(str(self._of(number, "rejected")))
        ]

    def finish(self, num_groups: int, files: Sequence[str], times: Callable[[int], NDArray] | None) -> int:
        """Put all groups together as `out` and forget them; returns the number of files in it.

        `files` are all names; `times(T')` gives the timestamps of a file's frames in seconds, None without frames.
        """
        groups = range(num_groups)
        rows = np.concatenate([self._of(number, "rows") for number in groups])
        arrays: dict[str, tuple[tuple[int, ...], np.dtype, Iterator[NDArray]]] = {
            "clip": self._column("clip", groups),
            "files": _whole(np.array([files[row] for row in rows])),
            "about": _whole(np.array(json.dumps(self.plan))),
        }
        if times is not None:
            lengths = np.concatenate([self._of(number, "lengths") for number in groups])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            stamps = (times(int(length)) for length in lengths)
            arrays |= {
                "frames": self._column("frames", groups),
                "offsets": _whole(offsets),
                "timestamps_seconds": ((int(offsets[-1]),), np.dtype(np.float64), stamps),
            }
        part = self.folder / "features"
        (_write_npz if self.out.suffix == ".npz" else _write_h5)(part, arrays)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, self.out)
        self.forget()
        return len(rows)

    def forget(self) -> None:
        """Remove what is under way."""
        shutil.rmtree(self.folder)

    def _of(self, number: int, name: str) -> NDArray:
        with np.load(self.path(number), allow_pickle=False) as group:
            return group[name]

    def _column(self, name: str, groups: range) -> tuple[tuple[int, ...], np.dtype, Iterator[NDArray]]:
        shapes = [shape for number in groups if (shape := self._of(number, name).shape)[0]]
        shape = (sum(shape[0] for shape in shapes), shapes[0][1])
        return shape, np.dtype(np.float32), (self._of(number, name) for number in groups)


def write_ledger(path: Path, rejected: Sequence[tuple[str, str]]) -> None:
    """Write (file, reason) as csv, whole or not at all; no file where there are none."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "reason"), *rejected])
    if rejected:
        write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))
    else:
        path.unlink(missing_ok=True)


def check_kind(out: Path) -> None:
    """Raise `UserError` for a file that is neither npz nor HDF5, or HDF5 without h5py."""
    if out.suffix not in KINDS:
        raise UserError(f"--out {out}: the name of an {', '.join(KINDS)} file, features.npz for example")
    if out.suffix != ".npz":
        _h5py()


def plan_of(out: Path) -> dict[str, Any] | None:
    """Read what a finished file was asked for, None where it does not say."""
    try:
        if out.suffix == ".npz":
            with np.load(out, allow_pickle=False) as features:
                return json.loads(str(features["about"]))
        with _h5py().File(out) as features:
            return json.loads(features["about"][()])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say which settings differ, before -> now; empty where none does."""
    pairs = {key: (before.get(key), now.get(key)) for key in sorted({*before, *now})}
    shown = {key: [_short(value) for value in pair] for key, pair in pairs.items() if pair[0] != pair[1]}
    return ", ".join(f"{key}: {' -> '.join(pair)}" if pair[0] != pair[1] else key for key, pair in shown.items())


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 24 else f"{str(value)[:12]}..."


def _whole(array: NDArray) -> tuple[tuple[int, ...], np.dtype, Iterator[NDArray]]:
    return array.shape, array.dtype, iter([array])


def _write_npz(path: Path, arrays: dict[str, tuple[tuple[int, ...], np.dtype, Iterator[NDArray]]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, (shape, dtype, parts) in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # of 1980: the same features are the same bytes
            with archive.open(member, "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(np.ascontiguousarray(part, dtype).tobytes())


def _write_h5(path: Path, arrays: dict[str, tuple[tuple[int, ...], np.dtype, Iterator[NDArray]]]) -> None:
    with _h5py().File(path, "w") as file:
        for name, (shape, dtype, parts) in arrays.items():
            if dtype.kind == "U":
                (texts,) = parts
                plain = [text.encode("utf-8", "backslashreplace").decode() for text in texts.reshape(-1).tolist()]
                file[name] = plain if shape else plain[0]
                continue
            target, row = file.create_dataset(name, shape, dtype), 0
            for part in parts:
                if len(part):
                    target[row : row + len(part)] = part
                    row += len(part)


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise UserError("HDF5 needs the package h5py (pip install 'audiossl-lightning[h5]'); or write .npz") from error
    return h5py
