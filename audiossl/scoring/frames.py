"""Where do the scores of more moments than memory holds lie while they are judged?

Models say all classes of a clip; metrics want all clips of a class. Scores come clip by clip and are laid down class by
class, in memory where they are few, else in a file without a name, which is gone with the process whatever ends it. It
is read and written in pieces and never mapped, so that what is held is one class's scores: AudioSet Strong's 4.2
million moments, 34 MB, instead of 14 GB of all its classes.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.special import expit

from audiossl.errors import UserError

HELD_BYTES = 2**28  # of scores that stay in memory
BLOCK_BYTES = 2**26  # written at once


class FrameScores(Sequence[NDArray]):
    """Hold scores of every clip's frames, (T', C) each: as they are given, or logits that are read as probabilities.

    `num_frames` (N,) are the clips' lengths. Subclasses read from elsewhere; indexing gives probabilities.
    """

    are_logits = False

    def __init__(self, scores: Sequence[NDArray]):
        self.scores = scores
        self.num_frames = np.array([len(of_clip) for of_clip in scores], np.int64)

    @property
    def num_classes(self) -> int:
        return np.shape(self.values(0))[-1] if len(self) else 0

    @property
    def dtype(self) -> np.dtype:
        """The type that values are kept in, with no less than 32 bits."""
        return np.result_type(self.values(0), np.float32)

    def __len__(self) -> int:
        return len(self.num_frames)

    def __getitem__(self, clip: int) -> NDArray:
        return probable(self.values(clip), self.are_logits)

    def values(self, clip: int) -> NDArray:
        """Read a clip as it is kept: (T', C)."""
        return np.asarray(self.scores[clip])


class FrameTable:
    """Collect scores clip by clip, (T', C) each, and give them class by class.

    `num_frames` (N,) says how many of each clip's frames are taken, the first ones. What is larger than HELD_BYTES lies
    in a file in `folder` (that of temporary files, if None); raises `UserError` where that has no room.
    """

    def __init__(
        self,
        num_frames: NDArray[np.int64],
        num_classes: int,
        dtype: DTypeLike,
        *,
        are_logits: bool = False,
        folder: str | Path | None = None,
    ):
        self.num_frames, self.num_classes, self.dtype = np.asarray(num_frames, np.int64), num_classes, np.dtype(dtype)
        self.are_logits = are_logits
        self.starts = np.cumsum(self.num_frames) - self.num_frames
        self.total = int(self.num_frames.sum())
        self._added, self._written, self._block = 0, 0, []
        num_bytes = self.total * num_classes * self.dtype.itemsize
        self._file = _scratch(num_bytes, folder) if num_bytes > HELD_BYTES else None
        self._held = np.empty((num_classes, self.total), self.dtype) if self._file is None else None

    def add(self, of_clip: NDArray) -> None:
        """Take the next clip."""
        self._block.append(np.asarray(of_clip[: self.num_frames[self._added]], self.dtype))
        self._added += 1
        waiting = int(self.num_frames[: self._added].sum()) - self._written
        if self._added == len(self.num_frames) or waiting * self.num_classes * self.dtype.itemsize >= BLOCK_BYTES:
            self._write(np.ascontiguousarray(np.concatenate(self._block).T))
            self._block = []

    def row(self, label: int) -> NDArray:
        """Give a class's scores as they were added, clip after clip, once all are there: (sum of frames,)."""
        assert self._added == len(self.num_frames), "a clip is missing"
        if self._held is not None:
            return self._held[label]
        found = np.empty(self.total, self.dtype)
        view, at = memoryview(found).cast("B"), label * found.nbytes
        while view:
            count = os.preadv(self._file.fileno(), [view[: 2**30]], at)
            if not count:
                raise UserError("the file of scores ends early: its disk is full, or failed")
            view, at = view[count:], at + count
        return found

    def _write(self, block: NDArray) -> None:
        first, self._written = self._written, self._written + block.shape[1]
        if self._held is not None:
            self._held[:, first : self._written] = block
            return
        for label, row in enumerate(block):
            write_at(self._file.fileno(), row, (label * self.total + first) * self.dtype.itemsize)


def probable(values: NDArray, are_logits: bool) -> NDArray:
    """Turn values as they are kept into scores: logits into probabilities in float64, as rounded ones would tie."""
    return expit(values.astype(np.float64)) if are_logits else values


def frames_there(num_frames: NDArray[np.int64], seconds: NDArray[np.float64], frame_seconds: float) -> NDArray:
    """Count the frames of each clip that begin before its end; the rest is padding."""
    begin = np.arange(int(num_frames.max())) * frame_seconds
    return np.minimum(num_frames, np.searchsorted(begin, seconds, side="left"))


def write_at(descriptor: int, values: NDArray, at: int) -> None:
    """Write an array into a file, whole; raises `UserError` on a disk that is full."""
    view = memoryview(np.ascontiguousarray(values)).cast("B")
    try:
        while view:
            count = os.pwrite(descriptor, view[: 2**30], at)
            view, at = view[count:], at + count
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("no room is left on the disk that the scores of moments are written to") from error


def check_room(folder: str | Path, num_bytes: int, what: str) -> None:
    """Raise `UserError` where a folder's disk has no room."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(f"{folder}: {what} need {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")


def _scratch(num_bytes: int, folder: str | Path | None):
    where = Path(tempfile.gettempdir() if folder is None else folder)
    check_room(where, num_bytes, "scores of moments, while they are judged,")
    return tempfile.TemporaryFile(dir=where, prefix="scores")
