"""Which file on disk is which segment of AudioSet, whatever a laboratory has called it?

Read in one walk: names are split into id and times, looked up in batches among the sorted ids, and kept as columns, so
that two million files and rows need some 300 MB. Nobody has all of AudioSet: a segment without a file is listed, and
counts as absent, not as rejected.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.packing.audioset import Segments, find_tables, parse_stem, possible_times_ms, read_classes, read_segments
from audiossl.packing.source import Clip, Source, key_of
from audiossl.sound import ffmpeg
from audiossl.sound.audio import extension_of

EXTRA_COLUMNS = ("mids", "ytid", "start_seconds", "end_seconds")  # of the json beside each clip
ABSENT = "file is missing"
FLAC_BYTES_PER_SAMPLE = 1.2
_BATCH = 50_000


class AudioSetSource(Source):
    """Hold the segments that have a file, in the order of the csv files; clips are made one at a time when asked for.

    `rejected` has rows and files that cannot be used (label not in the class list, segment listed twice, file that
    could be two segments); `absent()` the rows without a file; `num_unlisted` counts audio that no row means.
    """

    def __init__(self, folder: Path, segments: Segments):
        super().__init__(folder, [], EXTRA_COLUMNS, list(segments.rejected))
        self.segments, self.notes, self.vocabulary = segments, segments.notes, list(segments.classes.names)
        self.files = _Files(len(segments))
        _match(self.folder, segments, self.files, self)
        self.rows = np.flatnonzero(self.files.of_row >= 0)
        self.file_ids = self.files.of_row[self.rows]
        self.clips = _Clips(self)
        self.rejected.sort()
        is_here = self.files.of_row >= 0
        self._absent = np.sort(segments.order[~is_here[segments.order]])
        self.num_absent = len(self._absent)

    def fingerprint(self) -> str:
        """Hash the class list, the rows that have a file, and the names and sizes of these files."""
        rows, segments = self.rows, self.segments
        digest = hashlib.sha256(repr((segments.classes.mids, self.vocabulary, segments.splits)).encode())
        for column in (segments.ytid, segments.start_ms, segments.end_ms, segments.table):
            digest.update(np.ascontiguousarray(column[rows]).tobytes())
        digest.update(np.frombuffer(self.files.size, np.int64)[self.file_ids].tobytes())
        for row, file in zip(rows.tolist(), self.file_ids.tolist(), strict=True):
            digest.update(self.files.path(file) + b"\0" + segments.labels(row).tobytes())
        return digest.hexdigest()

    def times(self) -> str:
        """Hash the times of change."""
        return hashlib.sha256(np.frombuffer(self.files.modified_ns, np.int64)[self.file_ids].tobytes()).hexdigest()

    def absent(self) -> Iterator[tuple[str, str]]:
        """Yield (segment, reason) for each row without a file."""
        return ((self.segments.name(row), ABSENT) for row in self._absent)

    def num_through_ffmpeg(self) -> int:
        """Count the clips that libsndfile cannot read."""
        return int(np.frombuffer(self.files.needs_ffmpeg, np.uint8)[self.file_ids].sum())

    def packed_bytes(self, rate_hz: int, codec: str) -> Iterator[float]:
        """Estimate the bytes of each clip in a shard, from the csv's times or the file's size."""
        if codec == "keep":
            return iter(np.frombuffer(self.files.size, np.int64)[self.file_ids].tolist())
        length_ms = self.segments.end_ms[self.rows] - self.segments.start_ms[self.rows]
        return iter((length_ms * (rate_hz * FLAC_BYTES_PER_SAMPLE / 1000)).tolist())


class _Clips(Sequence):
    """Make `Clip`s from columns when they are asked for; a slice is a list."""

    def __init__(self, source: AudioSetSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source.rows)

    def __getitem__(self, at: int | slice) -> Clip | list[Clip]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        row, file = int(self._source.rows[at]), int(self._source.file_ids[at])
        segments, files = self._source.segments, self._source.files
        classes, label_ids = segments.classes, segments.labels(row).tolist()
        start, end = int(segments.start_ms[row]) / 1000, int(segments.end_ms[row]) / 1000
        return Clip(
            path=os.fsdecode(files.path(file)),
            size=files.size[file],
            modified_ns=files.modified_ns[file],
            key=key_of(segments.name(row)),
            labels=tuple(classes.names[label] for label in label_ids),
            split=segments.splits[segments.table[row]],
            extra=([classes.mids[label] for label in label_ids], segments.ytid[row].decode(), start, end),
            segment_seconds=end - start,
        )


class _Files:
    """Hold the files that are segments as columns; `of_row` names the file of each row, -1 for none."""

    def __init__(self, num_rows: int):
        self._paths, self._ends = bytearray(), array("q")
        self.size, self.modified_ns, self.needs_ffmpeg = array("q"), array("q"), array("B")
        self.of_row = np.full(num_rows, -1, np.int32)

    def __len__(self) -> int:
        return len(self.size)

    def add(self, path: bytes, status: os.stat_result) -> int:
        self._paths += path
        self._ends.append(len(self._paths))
        self.size.append(status.st_size)
        self.modified_ns.append(status.st_mtime_ns)
        self.needs_ffmpeg.append(ffmpeg.extension_of(os.fsdecode(path)) is not None)
        return len(self) - 1

    def path(self, file: int) -> bytes:
        return bytes(self._paths[self._ends[file - 1] if file else 0 : self._ends[file]])


def read_audioset(folder: Path, segments: list[Path] | None, classes: Path | None) -> AudioSetSource | None:
    """Read a folder in AudioSet's layout, or None when neither the folder nor the arguments name its csv files."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if (tables := find_tables(folder, segments, classes)) is None:
        return None
    source = AudioSetSource(folder, read_segments(tables[0], read_classes(tables[1])))
    if not len(source.clips):
        found = f"{source.num_unlisted} audio files, none named after a segment" if source.num_unlisted else "no audio"
        example = source.segments.ytid[0].decode()
        raise UserError(
            f"{folder} holds {found}; names such as Y{example}.wav, {example}.flac or {source.segments.name(0)}.m4a "
            f"are found, in any sub-folder ({len(source.segments)} segments in {', '.join(t.name for t in tables[0])})"
        )
    return source


def _match(folder: Path, segments: Segments, files: _Files, source: Source) -> None:
    """Find the file of each row; of two files of one row the first by name is taken, whatever order the disk gives."""
    ytid = segments.ytid[segments.order]
    batch: list[tuple[str, os.DirEntry, tuple]] = []

    def look_up() -> None:
        wanted = np.array([name.encode() for _, _, (name, _, _) in batch], ytid.dtype)
        begins, ends = np.searchsorted(ytid, wanted, "left"), np.searchsorted(ytid, wanted, "right")
        for (path, entry, parsed), begin, end in zip(batch, begins.tolist(), ends.tolist(), strict=True):
            row = _row_of(segments, segments.order[begin:end].tolist(), path, parsed) if begin < end else None
            if isinstance(row, int):
                _take(files, row, path, entry, source)
            elif row is None:
                source.num_unlisted += 1
            else:
                source.rejected.append((path, row))
        batch.clear()

    with tqdm(desc="files", unit="file", delay=2, leave=False, mininterval=0.5) as bar:
        for path, entry in _walk(folder, ""):
            parsed = parse_stem(entry.name.rpartition(".")[0])
            if parsed is None:
                source.num_unlisted += 1
                continue
            batch.append((path, entry, parsed))
            bar.update()
            if len(batch) >= _BATCH:
                look_up()
        look_up()


def _walk(folder: Path, below: str) -> Iterator[tuple[str, os.DirEntry]]:
    """Yield (relative path, entry) of the audio files, in no order, without listing a folder in memory."""
    folders = []
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif extension_of(entry.name) or ffmpeg.extension_of(entry.name):
                yield f"{below}{entry.name}", entry
    for name in folders:
        yield from _walk(folder, f"{below}{name}/")


def _row_of(segments: Segments, rows: list[int], path: str, parsed: tuple) -> int | str | None:
    """Choose among the rows of a video the one that a file means; a reason when it could be two, None for none."""
    _, start, end = parsed
    if start is not None:
        times = possible_times_ms(start, end)
        rows = [
            row
            for row in rows
            if (int(segments.start_ms[row]), None if end is None else int(segments.end_ms[row])) in times
        ]
    if len(rows) > 1:
        folders = path.split("/")[:-1]
        splits = [segments.splits[segments.table[row]] for row in rows]
        in_split = [
            row
            for row, split in zip(rows, splits, strict=True)
            if any(folder == split or folder.startswith(f"{split}_segments") for folder in folders)
        ]
        rows = in_split if len(in_split) == 1 else rows
    if len(rows) > 1:
        return f"could be {len(rows)} segments ({', '.join(segments.name(row) for row in rows[:3])}): name the start"
    return rows[0] if rows else None


def _take(files: _Files, row: int, path: str, entry: os.DirEntry, source: Source) -> None:
    """Give a row its file, or count the file as unlisted when the row has one with a name before it."""
    try:
        status = entry.stat()
    except OSError:
        status = entry.stat(follow_symlinks=False)  # a link to nowhere is rejected when it is read
    taken = int(files.of_row[row])
    encoded = os.fsencode(path)
    if taken < 0 or encoded < files.path(taken):
        files.of_row[row] = files.add(encoded, status)
    if taken >= 0:
        source.num_unlisted += 1
        source.num_twins += 1
