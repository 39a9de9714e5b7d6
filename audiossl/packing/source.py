"""Which clips does a folder hold, in what order, under which keys, and which go into which shard?

A pure function of the folder's names, sizes and `meta.csv`, so that an interrupted `pack` finds the same plan again.
AudioSet's layout is another `Source`, in `audiosetfiles`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from audiossl.errors import UserError
from audiossl.labelled.cells import fold_of, open_table, plain
from audiossl.sound import ffmpeg
from audiossl.sound.audio import MAX_SECONDS, AudioError, extension_of, probe

META_NAME = "meta.csv"
OWN_FIELDS = ("labels", "seconds", "rate_hz", "split", "fold", "source")  # of the json beside each clip
_MEMBER_OVERHEAD = 2048  # two tar headers, the json and the padding
_NUM_PROBED = 64
_SLACK_SECONDS = 10.0  # by which a file may be longer than its segment


@dataclass(slots=True)
class Clip:
    """Name one file to pack: `path` relative to the source folder, its size in bytes, and what meta.csv says of it."""

    path: str
    size: int
    modified_ns: int
    key: str = ""
    labels: tuple[str, ...] = ()
    split: str | None = None
    fold: int | None = None
    extra: tuple[object, ...] = ()  # values of Source.extra_columns
    segment_seconds: float | None = None  # what the labels are about, where a table says so

    @property
    def max_seconds(self) -> float:
        """Return the length past which the file is refused: a whole video does not have the labels of ten seconds."""
        return MAX_SECONDS if self.segment_seconds is None else self.segment_seconds + _SLACK_SECONDS


@dataclass
class Source:
    """Hold the clips to pack, in order, and (file, reason) for rows and files that cannot be.

    `num_unlisted` counts audio that the table leaves out, `num_twins` those of them that are a second file of a row.
    Rows of `absent()` are listed and do not count as rejected. `vocabulary` is given where its order is published.
    """

    folder: Path
    clips: Sequence[Clip]
    extra_columns: tuple[str, ...] = ()
    rejected: list[tuple[str, str]] = field(default_factory=list)
    num_unlisted: int = 0
    num_twins: int = 0
    num_absent: int = 0
    vocabulary: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Hash names, sizes and metadata: the same for a copy of the folder."""
        digest = hashlib.sha256(repr(self.extra_columns).encode())
        for clip in self.clips:
            fact = (clip.key, clip.path, clip.size, clip.labels, clip.split, clip.fold, clip.extra)
            digest.update(repr(fact).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def times(self) -> str:
        """Hash the times of change, which find an edited file of the same size while a pack is under way."""
        return hashlib.sha256(repr([clip.modified_ns for clip in self.clips]).encode()).hexdigest()

    def absent(self) -> Iterator[tuple[str, str]]:
        """Yield (name, reason) for rows that nobody can be asked to have."""
        return iter(())

    def num_through_ffmpeg(self) -> int:
        """Count the clips that libsndfile cannot read."""
        return sum(ffmpeg.extension_of(clip.path) is not None for clip in self.clips)

    def packed_bytes(self, rate_hz: int, codec: str) -> Iterable[float]:
        """Estimate the bytes of each clip in a shard."""
        expansion = {} if codec == "keep" else _expansion(self, rate_hz)
        return (clip.size * expansion.get(clip.path.rpartition(".")[2].lower(), 1.0) for clip in self.clips)

    def json_of(self, clip: Clip, seconds: float, rate_hz: int) -> bytes:
        """Write the json member of a clip: OWN_FIELDS, then the other columns that are not empty."""
        own = (list(clip.labels), round(seconds, 6), rate_hz, clip.split, clip.fold, clip.path)
        found = dict(zip(OWN_FIELDS, own, strict=True))
        for column, value in zip(self.extra_columns, clip.extra, strict=True):
            if value not in ("", None):
                found[f"meta_{column}" if column in OWN_FIELDS else column] = value
        return json.dumps(found).encode()


def read_source(folder: Path) -> Source:
    """List the clips of a folder with a meta.csv, or of a plain folder of audio (recursive), sorted by path.

    meta.csv has `filename` (relative to the folder) and may have `label` (else `labels`; either may hold several,
    between `;`), `split` and `fold` (an integer); what else it has goes into each clip's json. Raises UserError for a
    table that cannot be meant.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files = _audio_files(folder)
    found = {clip.path: clip for clip in files if extension_of(clip.path)}
    source = Source(folder, [])
    if (folder / META_NAME).is_file():
        _read_table(folder / META_NAME, found, source)
        source.num_unlisted = len(found)
    else:
        source.clips = list(found.values())
        if num_others := len(files) - len(found):  # a video beside each recording must not be packed with it
            kinds = ", ".join(ffmpeg.EXTENSIONS)
            source.notes.append(f"{num_others} {kinds} files are left out; a meta.csv that lists them packs them")
    source.clips.sort(key=lambda clip: clip.path)
    if not source.clips:
        raise UserError(f"{folder} holds no audio that can be packed ({len(source.rejected)} rows without a file)")
    name_keys(source.clips)
    return source


def cut_into_shards(source: Source, rate_hz: int, codec: str, shard_bytes: int) -> list[range]:
    """Cut the clips, in order, into runs of about `shard_bytes`; at least one clip each."""
    begins: list[int] = []
    room = 0.0
    for position, num_bytes in enumerate(source.packed_bytes(rate_hz, codec)):
        size = num_bytes + _MEMBER_OVERHEAD
        if not begins or size > room:
            begins.append(position)
            room = shard_bytes
        room -= size
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(source.clips)], strict=True)]


def key_of(path: str) -> str:
    """Escape a relative path without its extension into a key; `urllib.parse.unquote` gives the path back.

    Dots, slashes, blanks, control characters and all that is not ASCII become %XX: a key's first dot ends it for every
    webdataset reader, and a leading dash is an option to `tar`.
    """
    key = quote(os.fsencode(path), safe="").replace(".", "%2E").replace("~", "%7E")
    return "%2D" + key[1:] if key.startswith("-") else key


def _audio_files(folder: Path) -> list[Clip]:
    clips = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if (extension_of(name) or ffmpeg.extension_of(name)) and not name.startswith("."):
                path = os.path.join(parent, name)
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)
                relative = os.path.relpath(path, folder).replace(os.sep, "/")
                clips.append(Clip(relative, status.st_size, status.st_mtime_ns))
    return clips


def _read_table(path: Path, found: dict[str, Clip], source: Source) -> None:
    with open_table(path) as (header, lines):
        if "filename" not in header:
            raise UserError(f"{path} has no column 'filename' (it has: {', '.join(header)})")
        special = {"filename", "split", "fold", _column_of_labels(header)}
        source.extra_columns = tuple(name for name in header if name not in special)
        seen: set[str] = set()
        for number, row in lines:
            where = f"{path} line {number}"
            name = os.path.normpath(row["filename"]).replace(os.sep, "/")
            if name in seen:
                raise UserError(f"{where}: '{name}' is listed twice")
            seen.add(name)
            clip = found.pop(name, None) or _unusual(source.folder, name)
            if isinstance(clip, str):
                source.rejected.append((row["filename"], clip))
                continue
            clip.labels, clip.split = _labels(row, where), plain(row.get("split", ""), f"{where}: split") or None
            clip.fold = fold_of(row.get("fold", ""), f"{where}: fold")
            clip.extra = tuple(row[column] for column in source.extra_columns)
            source.clips.append(clip)


def _unusual(folder: Path, name: str) -> Clip | str:
    """Find a listed file that the walk did not: in a hidden folder; or say why it is not packed."""
    if name.startswith(("/", "../")) or name == "..":
        return "the name leads out of the folder"
    if not (folder / name).is_file():
        return "file is missing"
    if not extension_of(name) and not ffmpeg.extension_of(name):
        return "not an audio file by its name"
    status = (folder / name).stat()
    return Clip(name, status.st_size, status.st_mtime_ns)


def _column_of_labels(columns: Collection[str]) -> str | None:
    return next((name for name in ("label", "labels") if name in columns), None)


def _labels(row: dict[str, str], where: str) -> tuple[str, ...]:
    """Split the cell of a clip's labels, as `task=folder` does."""
    column = _column_of_labels(row)
    cell = plain(row[column], f"{where}: {column}") if column else ""
    return tuple(dict.fromkeys(label.strip() for label in cell.split(";") if label.strip()))


def name_keys(clips: list[Clip]) -> None:
    """Make keys of the paths below the folder that all clips share; two files that differ in extension only keep it."""
    shared = os.path.commonpath([os.path.dirname(clip.path) for clip in clips])
    skip = len(shared) + 1 if shared else 0
    stems = [clip.path[skip:].rpartition(".")[0] for clip in clips]
    times = Counter(stems)
    for clip, stem in zip(clips, stems, strict=True):
        clip.key = key_of(stem if times[stem] == 1 and stem else clip.path[skip:])
    if repeated := [key for key, number in Counter(clip.key for clip in clips).items() if number > 1]:
        clash = [clip.path for clip in clips if clip.key == repeated[0]]
        raise UserError(f"{' and '.join(clash)} would get the same key; rename one")


def _expansion(source: Source, rate_hz: int) -> dict[str, float]:
    """Estimate, for each extension, bytes of FLAC per byte of source, from some headers spread over the clips."""
    packed: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for clip in source.clips[:: max(1, len(source.clips) // _NUM_PROBED)]:
        if ffmpeg.extension_of(clip.path):
            continue
        try:
            seconds = probe(source.folder / clip.path).seconds
        except AudioError:
            continue  # it will be rejected with its reason when it is packed
        extension = extension_of(clip.path)
        packed[extension] += seconds * rate_hz * 2 * 0.6
        stored[extension] += clip.size
    # not measured: the plan would change with the program's presence. Sound of 128 kb/s, or smaller shards
    compressed = dict.fromkeys(ffmpeg.EXTENSIONS, rate_hz * 2 * 0.6 / 16_000)
    return compressed | {extension: packed[extension] / stored[extension] for extension in packed}
