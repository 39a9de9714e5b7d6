"""How does a folder of audio become tar shards that every run can read fast, and that a kill cannot leave half done?

The folder is first cut into shards by a plan that depends on nothing but the files and their table; workers decode and
encode clips, and one process writes them in the plan's order. The same command goes on where it was killed
(`packing.state`).
"""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import read_meta, write_index
from audiossl.indexing.shardpaths import INDEX_NAME
from audiossl.packing.audiosetfiles import read_audioset
from audiossl.packing.source import META_NAME, Source, cut_into_shards, read_source
from audiossl.packing.state import claim, is_done, rows_path, shard_path
from audiossl.packing.writer import Settings, counted, encode_all, num_cores, write_shard
from audiossl.sound import audio, ffmpeg

REJECTED = "rejected.csv"
MAX_REJECTED = 0.01
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LAYOUTS = """\
SRC is one of
  any folder of audio        sub-folders included; no labels
  a folder with meta.csv     columns filename and, if you like, label (several: separated by ;), split, fold
  AudioSet                   *_segments.csv and class_labels_indices.csv as published, in SRC or named by --segments and
                             --classes; audio anywhere below SRC: [Y]<id>[_<start>[_<end>]].<extension>, start and end
                             in seconds or ms. The split is the csv's name, the classes keep their published order.

What cannot be packed is listed in OUT/rejected.csv with its reason. The exit code is 1 when more than 1 % of what is
there was rejected (with --strict: anything), 0 otherwise. Segments of AudioSet whose file is missing are listed and
counted, but never make the exit code 1: nobody has them all. A file more than 10 s longer than its segment is rejected,
since the labels are not about the rest. m4a, mp4, webm and aac are read by the program ffmpeg where it is installed, in
AudioSet's layout and where meta.csv lists them.
"""


@dataclass
class Summary:
    """Count what became of a source; `num_absent` rows of AudioSet had no file and do not count as rejected."""

    num_clips: int
    num_rejected: int
    num_absent: int
    num_clipped: int
    num_unlisted: int
    num_twins: int
    num_shards: int
    num_bytes: int
    seconds: float
    wall_seconds: float
    num_packed_now: int

    @property
    def rejected_fraction(self) -> float:
        return self.num_rejected / max(1, self.num_clips + self.num_rejected)


def pack(
    source: Path,
    out: Path,
    settings: Settings,
    workers: int,
    segments: list[Path] | None = None,
    classes: Path | None = None,
) -> Summary:
    """Pack the clips of folder `source` into `out`, or go on where an earlier call with the same arguments stopped.

    `segments` and `classes` name AudioSet's csv files where they are not in `source`. Raises UserError when `out` holds
    anything but the same pack, begun or finished, and when no clip could be packed.
    """
    return pack_source(find_source(source, segments, classes), out, settings, workers)


def pack_source(found: Source, out: Path, settings: Settings, workers: int) -> Summary:
    """Pack what a layout lists; see `pack`."""
    started = time.monotonic()
    _refuse_without_ffmpeg(found, settings)
    for note in found.notes:
        tqdm.write(note, file=sys.stderr)
    fingerprint = found.fingerprint()
    with claim(out, fingerprint, found.times(), settings):
        shards = cut_into_shards(found, settings.rate_hz or 0, settings.codec, settings.shard_bytes)
        if (out / INDEX_NAME).is_file():  # claim let only the same corpus through
            Index.load(out)  # and its shards have to be there, whole
            num_packed_now = 0
        else:
            num_packed_now = _write_shards(found, shards, out, settings, workers)
            _finish(found, fingerprint, len(shards), out, settings)
    meta = read_meta(out / INDEX_NAME)
    return Summary(
        num_clips=meta["counts"]["clips"],
        num_rejected=meta["pack"]["rejected"],
        num_absent=meta["pack"].get("absent", 0),
        num_clipped=meta["pack"]["clipped"],
        num_unlisted=found.num_unlisted,
        num_twins=found.num_twins,
        num_shards=len(meta["shards"]),
        num_bytes=sum(shard["bytes"] for shard in meta["shards"]),
        seconds=meta["counts"]["seconds"],
        wall_seconds=time.monotonic() - started,
        num_packed_now=num_packed_now,
    )


def find_source(folder: Path, segments: list[Path] | None = None, classes: Path | None = None) -> Source:
    """Read a folder in its layout: AudioSet's when its csv files are named, or found and there is no meta.csv."""
    if not (segments or classes) and (folder / META_NAME).is_file():
        return read_source(folder)
    return read_audioset(folder, segments, classes) or read_source(folder)


def _refuse_without_ffmpeg(found: Source, settings: Settings) -> None:
    """Stop at once where nothing could be packed; some clips among others are rejected one by one."""
    if settings.codec == "flac" and not ffmpeg.is_installed() and found.num_through_ffmpeg() == len(found.clips):
        raise UserError(
            f"{found.folder}: its {len(found.clips)} clips are {', '.join(ffmpeg.EXTENSIONS)}, which {ffmpeg.MISSING}"
        )


def _write_shards(found: Source, shards: list[range], out: Path, settings: Settings, workers: int) -> int:
    for part in out.glob("shard-*.tar.part"):
        part.unlink()
    todo = [number for number in range(len(shards)) if not is_done(out, number)]
    num_todo = sum(len(shards[number]) for number in todo)
    clips = (clip for number in todo for clip in map(found.clips.__getitem__, shards[number]))
    encoded = encode_all(((found.folder / clip.path, clip.max_seconds) for clip in clips), settings, workers)
    done_before = len(found.clips) - num_todo
    with tqdm(total=len(found.clips), initial=done_before, unit="clip", desc="pack", mininterval=0.5) as bar:
        encoded = counted(encoded, bar)
        for number in todo:
            clips_of_shard = map(found.clips.__getitem__, shards[number])
            write_shard(shard_path(out, number), rows_path(out, number), found, clips_of_shard, encoded)
    return num_todo


def _finish(found: Source, fingerprint: str, num_shards: int, out: Path, settings: Settings) -> None:
    """Write rejected.csv and, last, the index: where it is, the pack is complete."""
    counts = {"rejected": len(found.rejected), "absent": found.num_absent, "clipped": 0}
    num_rows = 0
    for shard in _finished(out, num_shards):
        num_rows += len(shard["rows"])
        counts["rejected"] += len(shard["rejected"])
        counts["clipped"] += shard["clipped"]
    of_shards = chain.from_iterable(shard["rejected"] for shard in _finished(out, num_shards))
    _write_rejected(out / REJECTED, chain(found.rejected, of_shards, found.absent()))
    if not num_rows:
        raise UserError(f"none of the {counts['rejected']} files could be packed, see {out / REJECTED}")
    facts = asdict(settings) | {"fingerprint": fingerprint} | counts
    whole = (shard for shard in _finished(out, num_shards) if shard["rows"])
    write_index(out / INDEX_NAME, whole, vocabulary=found.vocabulary, pack=facts)


def _finished(out: Path, num_shards: int) -> Iterator[dict]:
    """Read what the shards hold, one at a time."""
    return (json.loads(rows_path(out, number).read_bytes()) for number in range(num_shards))


def _write_rejected(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write (file, reason) as they come, whole or not at all; no file when there are none."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "reason"))
        begin = file.tell()
        writer.writerows(pairs)
        has_any = file.tell() > begin
        file.flush()
        os.fsync(file.fileno())
    if has_any:
        os.replace(part, path)
    else:
        part.unlink()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl pack`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, LAYOUTS
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="a folder with a meta.csv, of AudioSet, or of any audio"
    )
    parser.add_argument("--out", type=Path, required=True, help="where the shards and index.safetensors go")
    parser.add_argument("--rate", type=int, default=32_000, help="sample rate of the shards in Hz (default: 32000)")
    choices = ("flac", "keep")
    parser.add_argument("--codec", choices=choices, default="flac", help="mono 16-bit FLAC, or the source's bytes")
    parser.add_argument("--shard-size", type=parse_bytes, default=10**9, help="about so much a shard (default: 1GB)")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: all cores)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for any rejected file, not only past 1 %%")
    tables = parser.add_argument_group("AudioSet, when its csv files are not in SRC")
    tables.add_argument("--segments", metavar="CSV", type=Path, nargs="+", help="one or several *_segments.csv")
    tables.add_argument("--classes", metavar="CSV", type=Path, help="class_labels_indices.csv (default: beside them)")


def main(args: argparse.Namespace) -> int:
    """Pack, print the table, and return 1 when more files were rejected than allowed."""
    if not audio.MIN_RATE_HZ <= args.rate <= audio.MAX_RATE_HZ:
        raise UserError(f"--rate {args.rate}: Hz between {audio.MIN_RATE_HZ} and {audio.MAX_RATE_HZ}")
    settings = Settings(args.codec, args.rate if args.codec == "flac" else None, args.shard_size)
    try:
        summary = pack(args.source, args.out, settings, args.workers, args.segments, args.classes)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last whole shard in {args.out}")
        return 130
    print(describe(summary, args.out))
    limit = 0.0 if args.strict else MAX_REJECTED
    return int(summary.rejected_fraction > limit)


def describe(summary: Summary, out: Path) -> str:
    """Lay the summary out as a table."""
    speed = summary.num_packed_now / summary.wall_seconds
    num_listed = summary.num_rejected + summary.num_absent
    rows = {
        "clips": f"{summary.num_clips}",
        "hours": f"{summary.seconds / 3600:.2f}",
        "shards": f"{summary.num_shards} in {out}",
        "bytes": f"{summary.num_bytes} ({summary.num_bytes / 1e6:.1f} MB)",
        "rejected": f"{summary.num_rejected}" + (f", see {out / REJECTED}" if num_listed else ""),
        "missing": f"{summary.num_absent} segments without a file, listed there too, not counted as rejected",
        "clips/s": f"{speed:.1f}" if summary.num_packed_now else "(packed before)",
    }
    if not summary.num_absent:
        del rows["missing"]
    if summary.num_clipped:
        rows["clipped"] = f"{summary.num_clipped} clips far over full scale"
    if summary.num_unlisted:
        twins = f", {summary.num_twins} of them second files of a segment" if summary.num_twins else ""
        rows["not in the csv"] = f"{summary.num_unlisted} audio files, left out{twins}"
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def parse_bytes(text: str) -> int:
    """Read a size such as 500MB, 1GB or 1GiB."""
    number = text.strip().rstrip("BKMGIbkmgi")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 500MB or 1GB")
    return size
