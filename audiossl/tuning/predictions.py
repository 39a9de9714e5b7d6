"""What was said of every test clip of a fold?

Readable in a csv (or, of events, as DCASE's tsv), and whole in a file of arrays: the clips, their probabilities and
what decides. Of moments, the logits in float32, clip after clip (`ends`), which are written as they come and read a
clip at a time, so that a set may have more of them than memory holds. The file of arrays appears last: with it, the
fold is done.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from audiossl.indexing.indexfile import write_whole
from audiossl.probes.scores import Tested
from audiossl.scoring.events import events_of, smooth
from audiossl.scoring.frames import FrameScores, probable, write_at

if TYPE_CHECKING:
    from audiossl.tasks import Task

log = logging.getLogger(__name__)

ARRAYS, TABLE, EVENTS = "predictions.safetensors", "predictions.csv", "predictions.tsv"
NUM_NAMED = 5  # classes a row of predictions.csv
TYPES = {np.dtype(np.float64): "F64", np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8"}
ROOM_OF_HEADER = 1024  # for the small arrays that follow the logits


class Moments(FrameScores):
    """Hold the logits of clips' moments, (T', C) float32 each, in a file: a new one, or one that is there (`read`).

    A new one has its name, `path`, once it is sealed, and where there is no path none at all: it is gone with the
    process. `about` is what stands in the file beside the arrays.
    """

    are_logits, dtype, num_classes = True, np.dtype(np.float32), 0  # the last of every instance

    def __init__(
        self, num_classes: int, folder: Path, path: Path | None = None, about: Mapping[str, Any] | None = None
    ):
        self.num_classes, self.path, self.about, self._ends = num_classes, path, {}, [0]
        if path is None:
            self._file, self._begin = tempfile.TemporaryFile(dir=folder), 0
            return
        self._file, self.about = open(_part(path), "w+b"), {"__metadata__": {"audiossl": json.dumps(about)}}
        self._begin = 8 + len(self._header(10**14, {})) + ROOM_OF_HEADER

    @classmethod
    def read(cls, path: Path) -> Moments:
        """Open a file that was sealed."""
        self = cls.__new__(cls)
        self.path, self._file = path, open(path, "rb")
        length = int.from_bytes(self._file.read(8), "little")
        logits = json.loads(self._file.read(length))["logits"]
        self.num_classes, self._begin = logits["shape"][1], 8 + length + logits["data_offsets"][0]
        with safe_open(path, "numpy") as file:
            self._ends = [0, *file.get_tensor("ends").tolist()]
        return self

    @property
    def num_frames(self) -> NDArray[np.int64]:
        return np.diff(self._ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def values(self, clip: int) -> NDArray[np.float32]:
        first, stop = self._ends[clip], self._ends[clip + 1]
        found = np.empty((stop - first, self.num_classes), np.float32)
        count = os.preadv(self._file.fileno(), [found], self._place(first))
        assert count == found.nbytes, f"{self.path}: ends early"
        return found

    def add(self, logits: NDArray[np.float32]) -> None:
        """Take the next clip."""
        write_at(self._file.fileno(), np.asarray(logits, np.float32), self._place(self._ends[-1]))
        self._ends.append(self._ends[-1] + len(logits))

    def seal(self, arrays: Mapping[str, NDArray]) -> None:
        """Write small arrays and `ends` after the logits, and give the file its name: it is there whole, or not."""
        arrays = dict(arrays) | {"ends": np.array(self._ends[1:], np.int64)}
        place = self._place(self._ends[-1])
        for array in arrays.values():
            write_at(self._file.fileno(), np.atleast_1d(array), place)
            place += array.nbytes
        header = self._header(self._ends[-1], arrays).ljust(self._begin - 8)
        assert len(header) == self._begin - 8, "the header has no room"
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(_part(self.path), self.path)

    def _place(self, row: int) -> int:
        return self._begin + row * self.num_classes * 4

    def _header(self, num_rows: int, arrays: Mapping[str, NDArray]) -> bytes:
        at = num_rows * self.num_classes * 4
        about = self.about | {"logits": _tensor("F32", (num_rows, self.num_classes), 0, at)}
        for name, array in arrays.items():
            about[name] = _tensor(TYPES[array.dtype], array.shape, at, at + array.nbytes)
            at += array.nbytes
        return json.dumps(about).encode()


def write_tested(folder: Path, task: Task, tested: Tested, noisy: Mapping[float, Mapping[str, float]]) -> None:
    """Write what a fold's test clips were given: all scores, a table for readers, and `noisy`, the numbers by dB."""
    folder.mkdir(parents=True, exist_ok=True)
    if task.kind == "events":
        _write_events(folder / EVENTS, task, tested)
    else:
        write_whole(folder / TABLE, _table_text(task, tested).encode("utf-8", "surrogateescape"))
    if noisy:
        curve = {f"{snr_db:g}": dict(numbers) for snr_db, numbers in noisy.items()}
        write_whole(folder / "noise.json", json.dumps(curve, indent=1).encode())
    bad = np.frombuffer(json.dumps(dict(tested.bad_clips)).encode(), np.uint8)
    arrays = {"clips": tested.clips, "thresholds": np.asarray(tested.thresholds, np.float64), "bad_clips": bad}
    if isinstance(tested.probabilities, Moments):
        tested.probabilities.seal(arrays)
        return
    arrays |= {"probabilities": np.ascontiguousarray(tested.probabilities)}  # in float64: rounded ones would tie
    about = about_fold(task, tested.fold, tested.seed, tested.frame_seconds, tested.median_frames)
    write_whole(folder / ARRAYS, save(arrays, metadata={"audiossl": json.dumps(about)}))  # last: the fold is done


def about_fold(task: Task, fold: str, seed: int, frame_seconds: float | None, median_frames: int) -> dict[str, Any]:
    """Say what stands in a fold's file of arrays beside them."""
    about = {"fold": fold, "seed": seed, "frame_seconds": frame_seconds, "median_frames": median_frames}
    return about | {"classes": task.classes, "task": task.hash}


def read_tested(folder: Path, fold: str, seed: int) -> Tested | None:
    """Read what `write_tested` left of a finished fold; None where there is none."""
    path = folder / ARRAYS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            about, names = json.loads(file.metadata()["audiossl"]), set(file.keys())
            arrays = {name: file.get_tensor(name) for name in names - {"logits"}}
        probabilities = Moments.read(path) if "logits" in names else arrays["probabilities"]
        bad = json.loads(arrays["bad_clips"].tobytes())
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: cannot be read (%s); this fold is tested again", path, error)
        return None
    thresholds = arrays["thresholds"] if arrays["thresholds"].ndim else float(arrays["thresholds"])
    how = {name: about[name] for name in ("frame_seconds", "median_frames")} | {"thresholds": thresholds}
    return Tested(fold, seed, arrays["clips"], probabilities, **how, bad_clips=bad)


def _table_text(task: Task, tested: Tested) -> str:
    """Write a row a clip: its labels, the classes called present, and the most probable ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "labels", "predicted", "right", "most_probable"])
    called = tested.probabilities > np.asarray(tested.thresholds)
    for number, clip in enumerate(tested.clips.tolist()):
        row, own = tested.probabilities[number], {task.classes[label] for label in task.labels[clip]}
        order = np.argsort(-row, kind="stable")
        said = (
            [task.classes[order[0]]]
            if task.kind == "multiclass"
            else [task.classes[c] for c in order if called[number, c]]
        )
        best = ";".join(f"{task.classes[c]} {row[c]:.3f}" for c in order[:NUM_NAMED])
        writer.writerow([task.keys[clip], ";".join(sorted(own)), ";".join(said), int(set(said) == own), best])
    return text.getvalue()


def _write_events(path: Path, task: Task, tested: Tested) -> None:
    """Write the events found, as DCASE does: filename, onset, offset, event_label."""
    scores = tested.probabilities
    with open(_part(path), "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["filename", "onset", "offset", "event_label"])
        for number, clip in enumerate(tested.clips.tolist()):
            smoothed = probable(smooth(scores.values(number), tested.median_frames), scores.are_logits)
            seconds = min(float(task.seconds[clip]), task.clip_seconds or math.inf)
            is_active = smoothed > np.asarray(tested.thresholds)
            name = f"{unquote(task.keys[clip])}.{task.index.extension(int(task.clips[clip]))}"
            for event in events_of(is_active, frame_seconds=tested.frame_seconds, seconds=seconds):
                onset, offset = f"{event.onset_seconds:.3f}", f"{event.offset_seconds:.3f}"
                writer.writerow([name, onset, offset, task.classes[event.label_id]])
        file.flush()
        os.fsync(file.fileno())
    os.replace(_part(path), path)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _tensor(kind: str, shape: tuple[int, ...], first: int, stop: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [first, stop]}
