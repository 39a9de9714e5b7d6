"""What do AudioSet's own csv files say, and which of their segments does the name of a file mean?

A segment is 10 s of a YouTube video: its id (11 characters, case and dashes count), start, end, and the classes heard
in it. Two million of them are held as columns, some 40 bytes each. Gemmeke et al., "Audio Set", ICASSP 2017; files:
research.google.com/audioset/download.html.
"""

import csv
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from audiossl.errors import UserError

CLASSES_NAME = "class_labels_indices.csv"
SEGMENTS_GLOB = "*_segments.csv"
ID_LENGTH = 11
_MAX_UNKNOWN = 10_000  # rows with a label that is in no class list, before the list itself is doubted
MAX_END_SECONDS = 2_000_000  # milliseconds have to fit 32 bits
_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_TIME = r"(\d{1,9}(?:\.\d{1,6})?)"
# the id has a fixed length, so a leading Y and underscores can be read in one way only
_STEM = re.compile(rf"Y?([A-Za-z0-9_-]{{11}})(?:_{_TIME}(?:[_-]{_TIME})?)?")
_ANNOUNCED = re.compile(r"\bnum_segs=(\d+)")


@dataclass(frozen=True)
class Classes:
    """List the classes in the official order: position = published class index; `ids` turns a mid into it."""

    mids: tuple[str, ...]
    names: tuple[str, ...]
    ids: dict[str, int]


@dataclass
class Segments:
    """Hold the rows of one or several segment files, in their order, as columns.

    `ytid` S11, `start_ms`, `end_ms` int32, `table` int16 (position in `splits` and `tables`), class ids of row i in
    `label_ids[label_ends[i - 1] : label_ends[i]]`. `order` sorts the rows by (id, start) and leaves out those in
    `rejected` (segment, reason); `notes` are for the reader.
    """

    classes: Classes
    tables: list[Path]
    splits: list[str]
    ytid: np.ndarray
    start_ms: np.ndarray
    end_ms: np.ndarray
    table: np.ndarray
    label_ends: np.ndarray
    label_ids: np.ndarray
    order: np.ndarray
    rejected: list[tuple[str, str]]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.ytid)

    def name(self, row: int) -> str:
        """Return `<id>_<start in ms>`, as AudioSet's strong labels name a segment: unique among the rows of `order`."""
        return f"{self.ytid[row].decode()}_{self.start_ms[row]}"

    def labels(self, row: int) -> np.ndarray:
        """Return the class ids of a row."""
        return self.label_ids[self.label_ends[row - 1] if row else 0 : self.label_ends[row]]


def find_tables(
    folder: Path, segments: list[Path] | None = None, classes: Path | None = None
) -> tuple[list[Path], Path] | None:
    """Return the segment files and the class list of a folder, those named before those found; None if it has none.

    Raises UserError for segments without a class list, and for a class list that is named without segments.
    """
    tables = segments or sorted(folder.glob(SEGMENTS_GLOB))
    places = [folder, *(path.parent for path in tables)]
    found = classes or next((place / CLASSES_NAME for place in places if (place / CLASSES_NAME).is_file()), None)
    if segments and not found:
        raise UserError(f"{segments[0]}: no {CLASSES_NAME} beside it or in {folder}; name it with --classes")
    if classes and not tables:
        raise UserError(f"--classes {classes}: no {SEGMENTS_GLOB} in {folder}; name the segments with --segments")
    if tables and not found and any(_is_official(path) for path in tables):
        raise UserError(f"{folder} has {tables[0].name} but no {CLASSES_NAME}; put it there or name it with --classes")
    if not tables or not found:
        return None
    if repeated := [path for path, times in Counter(path.resolve() for path in tables).items() if times > 1]:
        raise UserError(f"--segments names {repeated[0]} more than once")
    if missing := [path for path in (*tables, found) if not path.is_file()]:
        raise UserError(f"{missing[0]} is no file")
    return tables, found


def read_classes(path: Path) -> Classes:
    """Read `index,mid,display_name`; raises UserError unless the indices are 0, 1, 2 ... and mids and names unique."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, skipinitialspace=True)
        header = [name.strip() for name in next(rows, [])]
        if header != ["index", "mid", "display_name"]:
            raise UserError(f"{path} begins with '{','.join(header)[:80]}', not with index,mid,display_name")
        found: dict[int, tuple[str, str]] = {}
        for row in rows:
            if not row:
                continue
            if len(row) != 3 or not row[0].isdecimal() or int(row[0]) in found or not row[1] or not row[2]:
                raise UserError(f"{path} line {rows.line_num}: '{','.join(row)[:80]}' is no index,mid,display_name")
            found[int(row[0])] = (row[1].strip(), row[2].strip())
    if not found or sorted(found) != list(range(len(found))):
        raise UserError(f"{path}: the indices of its {len(found)} rows are not 0, 1, 2 ...; is it whole?")
    mids, names = zip(*(found[index] for index in range(len(found))), strict=True)
    for values in (mids, names):
        if repeated := [value for value, times in Counter(values).items() if times > 1]:
            raise UserError(f"{path} lists '{repeated[0]}' more than once")
    return Classes(mids, names, {mid: index for index, mid in enumerate(mids)})


def read_segments(tables: list[Path], classes: Classes) -> Segments:
    """Read segment files; the split is a file's name without `_segments.csv`.

    A row with a mid that is not among the classes, or of a segment that was listed before, is rejected with its reason.
    Raises UserError naming the line of a row that cannot be read.
    """
    ytid, columns, labels, notes = bytearray(), {name: array("i") for name in ("start_ms", "end_ms")}, array("i"), []
    table, label_ends, unknown = array("h"), array("q"), {}
    for number, path in enumerate(tables):
        begun = len(table)
        for line, (name, start, end, mids) in _rows(path, notes):
            ytid += name.encode()
            columns["start_ms"].append(start)
            columns["end_ms"].append(end)
            table.append(number)
            for mid in mids:
                if mid in classes.ids:
                    labels.append(classes.ids[mid])
                else:
                    unknown[len(table) - 1] = f"{path.name} line {line}: '{mid}' is not in {CLASSES_NAME}"
            label_ends.append(len(labels))
            if len(unknown) > max(_MAX_UNKNOWN, len(table) // 2):
                raise UserError(f"{next(iter(unknown.values()))}, nor are those of half the rows: another class list?")
        if len(table) == begun:
            raise UserError(f"{path} has no segments")
    found = Segments(
        classes=classes,
        tables=tables,
        splits=[split_of(path) for path in tables],
        ytid=np.frombuffer(ytid, f"S{ID_LENGTH}"),
        start_ms=np.frombuffer(columns["start_ms"], np.int32),
        end_ms=np.frombuffer(columns["end_ms"], np.int32),
        table=np.frombuffer(table, np.int16),
        label_ends=np.frombuffer(label_ends, np.int64),
        label_ids=np.frombuffer(labels, np.int32),
        order=np.zeros(0, np.int64),
        rejected=[],
        notes=notes,
    )
    found.rejected = [(found.name(row), reason) for row, reason in unknown.items()]
    _sort(found, np.fromiter(unknown, np.int64, len(unknown)))
    return found


def split_of(path: Path) -> str:
    """Name the split of a segment file: `balanced_train_segments.csv` holds `balanced_train`."""
    return path.name.removesuffix(".csv").removesuffix("_segments")


def parse_stem(stem: str) -> tuple[str, str | None, str | None] | None:
    """Split a file's name without extension into id, start and end as written; None when it is no segment's."""
    match = _STEM.fullmatch(stem)
    return match.groups() if match else None


def possible_times_ms(start: str, end: str | None) -> set[tuple[int, int | None]]:
    """Return what the times in a name can mean, in ms: a decimal point says seconds, no point seconds or ms."""
    both = [text for text in (start, end) if text is not None]
    factors = (1000,) if any("." in text for text in both) else (1000, 1)
    return {(_ms(start, factor), None if end is None else _ms(end, factor)) for factor in factors}


def _ms(text: str, factor: int) -> int:
    return round(float(text) * factor)


def _is_official(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(14) == b"# Segments csv"


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[int, tuple[str, int, int, list[str]]]]:
    """Yield (line, row) of a segment file, and note it when there are fewer rows than its comment announces."""
    announced, num_rows = None, 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, skipinitialspace=True, strict=True)  # strict: a file cut within quotes is no row
        try:
            for values in tqdm(rows, desc=path.name, unit="row", delay=2, leave=False, mininterval=0.5):
                if not values:
                    continue
                if values[0].startswith("#"):
                    match = _ANNOUNCED.search(",".join(values))
                    announced = int(match[1]) if match else announced
                    continue
                yield rows.line_num, _read_row(values)
                num_rows += 1
        except (csv.Error, ValueError, OverflowError) as error:
            wanted = 'YTID, start_seconds, end_seconds, "mid,mid"'
            raise UserError(f"{path} line {rows.line_num}: {error} where a row has {wanted}") from error
    if announced is not None and announced != num_rows:
        notes.append(f"{path.name} announces {announced} segments and holds {num_rows}: cut, or filtered?")


def _read_row(values: list[str]) -> tuple[str, int, int, list[str]]:
    """Turn a row into id, start and end in ms, and mids; raises ValueError in words for what it is not."""
    if len(values) != 4:
        raise ValueError(f"{len(values)} values")
    name, start, end, mids = (value.strip() for value in values)
    if not _ID.fullmatch(name):
        raise ValueError(f"'{name[:40]}' is no id of 11 characters")
    start_ms, end_ms = round(float(start) * 1000), round(float(end) * 1000)
    if not 0 <= start_ms < end_ms <= MAX_END_SECONDS * 1000:
        raise ValueError(f"start {start}, end {end}")
    found = list(dict.fromkeys(mid.strip() for mid in mids.split(",") if mid.strip()))
    if not found:
        raise ValueError("no label")
    return name, start_ms, end_ms, found


def _sort(found: Segments, left_out: np.ndarray) -> None:
    """Order the rows by (id, start), and reject the later of two rows of one segment."""
    order = np.lexsort((found.start_ms, found.ytid))  # stable: twins keep the order of the files
    order = order[~np.isin(order, left_out)] if len(left_out) else order
    ytid, start_ms = found.ytid[order], found.start_ms[order]
    is_twin = np.concatenate([[False], (ytid[1:] == ytid[:-1]) & (start_ms[1:] == start_ms[:-1])])
    first = np.maximum.accumulate(np.where(is_twin, 0, np.arange(len(order))))
    for place in np.flatnonzero(is_twin):
        owner = found.tables[found.table[order[first[place]]]].name
        found.rejected.append((found.name(order[place]), f"segment is listed before, in {owner}"))
    found.order = order[~is_twin]
