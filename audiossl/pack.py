"""How does a folder of audio become tar shards that every run can read fast, and that a kill cannot leave half done?

The folder is first cut into shards by a plan that depends on nothing but the files; workers decode and encode clips,
and one process writes them in the plan's order. What a finished shard holds is kept in `OUT/.pack` until the index is
written, so the same command goes on where it was killed.
"""

import argparse
import csv
import fcntl
import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from audiossl import audio
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexfile import read_meta, write_index, write_whole
from audiossl.packsource import Clip, Source, cut_into_shards, read_source
from audiossl.packwriter import Settings, counted, encode_all, num_cores, write_shard
from audiossl.shardpaths import INDEX_NAME

STATE = ".pack"
REJECTED = "rejected.csv"
MAX_REJECTED = 0.01
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class Summary:
    """Count what became of a source."""

    num_clips: int
    num_rejected: int
    num_clipped: int
    num_unlisted: int
    num_shards: int
    num_bytes: int
    seconds: float
    wall_seconds: float
    num_packed_now: int

    @property
    def rejected_fraction(self) -> float:
        return self.num_rejected / max(1, self.num_clips + self.num_rejected)


def pack(source: Path, out: Path, settings: Settings, workers: int) -> Summary:
    """Pack the clips of folder `source` into `out`, or go on where an earlier call with the same arguments stopped.

    Raises UserError when `out` holds anything but the same pack, begun or finished, and when no clip could be packed.
    """
    started = time.monotonic()
    found = read_source(source)
    with _claim(out, found, settings):
        shards = cut_into_shards(found, settings.rate_hz or 0, settings.codec, settings.shard_bytes)
        if (out / INDEX_NAME).is_file():  # _claim let only the same corpus through
            Index.load(out)  # and its shards have to be there, whole
            num_packed_now = 0
        else:
            num_packed_now = _write_shards(found, shards, out, settings, workers)
            _finish(found, len(shards), out, settings)
    meta = read_meta(out / INDEX_NAME)
    return Summary(
        num_clips=meta["counts"]["clips"],
        num_rejected=meta["pack"]["rejected"],
        num_clipped=meta["pack"]["clipped"],
        num_unlisted=len(found.unlisted),
        num_shards=len(meta["shards"]),
        num_bytes=sum(shard["bytes"] for shard in meta["shards"]),
        seconds=meta["counts"]["seconds"],
        wall_seconds=time.monotonic() - started,
        num_packed_now=num_packed_now,
    )


def _write_shards(found: Source, shards: list[list[Clip]], out: Path, settings: Settings, workers: int) -> int:
    for part in out.glob("shard-*.tar.part"):
        part.unlink()
    todo = [number for number in range(len(shards)) if not _is_done(out, number)]
    num_todo = sum(len(shards[number]) for number in todo)
    paths = [found.folder / clip.path for number in todo for clip in shards[number]]
    encoded = encode_all(paths, settings, workers) if paths else iter(())
    done_before = len(found.clips) - num_todo
    with tqdm(total=len(found.clips), initial=done_before, unit="clip", desc="pack", mininterval=0.5) as bar:
        encoded = counted(encoded, bar)
        for number in todo:
            write_shard(_shard_path(out, number), _rows_path(out, number), found, shards[number], encoded)
    return num_todo


def _is_done(out: Path, number: int) -> bool:
    """Tell whether a shard is whole: its rows are written first, so a shard without them was never begun."""
    if not _rows_path(out, number).is_file():
        return False
    shard, path = json.loads(_rows_path(out, number).read_bytes()), _shard_path(out, number)
    return not shard["rows"] or (path.is_file() and path.stat().st_size == shard["bytes"])


def _finish(found: Source, num_shards: int, out: Path, settings: Settings) -> None:
    """Write rejected.csv and, last, the index: where it is, the pack is complete."""
    rejected, num_clipped, num_rows = list(found.missing), 0, 0
    for number in range(num_shards):
        shard = json.loads(_rows_path(out, number).read_bytes())
        rejected += [tuple(pair) for pair in shard["rejected"]]
        num_clipped += shard["clipped"]
        num_rows += len(shard["rows"])
    if rejected:
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator="\n").writerows([("file", "reason"), *rejected])
        write_whole(out / REJECTED, table.getvalue().encode("utf-8", "surrogateescape"))
    if not num_rows:
        raise UserError(f"none of the {len(rejected)} files could be packed, see {out / REJECTED}")
    shards = (json.loads(_rows_path(out, number).read_bytes()) for number in range(num_shards))
    facts = asdict(settings) | {"fingerprint": found.fingerprint(), "rejected": len(rejected), "clipped": num_clipped}
    write_index(out / INDEX_NAME, (shard for shard in shards if shard["rows"]), pack=facts)


@contextmanager
def _claim(out: Path, found: Source, settings: Settings) -> Iterator[None]:
    """Hold `out` for this pack: refuse what is another's, remember the plan, and clean up when the index is there."""
    out.mkdir(parents=True, exist_ok=True)
    plan = {"settings": asdict(settings), "files": found.fingerprint(), "times": found.times()}
    _refuse_other(out, plan)
    (out / STATE).mkdir(exist_ok=True)
    with open(out / STATE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing into {out}") from error
        write_whole(out / STATE / "plan.json", json.dumps(plan).encode())
        yield
    shutil.rmtree(out / STATE)


def _refuse_other(out: Path, plan: dict) -> None:
    way_out = f"choose another --out, or delete {out} to pack anew"
    if (out / INDEX_NAME).is_file():
        packed = read_meta(out / INDEX_NAME).get("pack", {})
        wanted = plan["settings"] | {"fingerprint": plan["files"]}
        if changed := [name for name, value in wanted.items() if packed.get(name) != value]:
            raise UserError(f"{out} holds another corpus ({', '.join(changed)} differ); {way_out}")
        return
    if not (out / STATE / "plan.json").is_file():
        if shards := sorted(out.glob("*.tar")):
            raise UserError(f"{out} holds shards already ({shards[0].name} ...); {way_out}")
        return
    begun = json.loads((out / STATE / "plan.json").read_bytes())
    changed = [f"--{name}" for name, value in plan["settings"].items() if begun["settings"][name] != value]
    if begun["files"] != plan["files"] or begun["times"] != plan["times"]:
        changed.append("the files or meta.csv")
    if changed:
        raise UserError(f"{out} holds a pack begun with other arguments ({', '.join(changed)} changed); {way_out}")


def _shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.tar"


def _rows_path(out: Path, number: int) -> Path:
    return out / STATE / f"shard-{number:06d}.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl pack`."""
    parser.add_argument("source", metavar="SRC", type=Path, help="a folder with a meta.csv, or any folder of audio")
    parser.add_argument("--out", type=Path, required=True, help="where the shards and index.safetensors go")
    parser.add_argument("--rate", type=int, default=32_000, help="sample rate of the shards in Hz (default: 32000)")
    choices = ("flac", "keep")
    parser.add_argument("--codec", choices=choices, default="flac", help="mono 16-bit FLAC, or the source's bytes")
    parser.add_argument("--shard-size", type=parse_bytes, default=10**9, help="about so much a shard (default: 1GB)")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: all cores)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for any rejected file, not only past 1 %%")


def main(args: argparse.Namespace) -> int:
    """Pack, print the table, and return 1 when more files were rejected than allowed."""
    if not audio.MIN_RATE_HZ <= args.rate <= audio.MAX_RATE_HZ:
        raise UserError(f"--rate {args.rate}: Hz between {audio.MIN_RATE_HZ} and {audio.MAX_RATE_HZ}")
    settings = Settings(args.codec, args.rate if args.codec == "flac" else None, args.shard_size)
    try:
        summary = pack(args.source, args.out, settings, args.workers)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the last whole shard in {args.out}")
        return 130
    print(describe(summary, args.out))
    limit = 0.0 if args.strict else MAX_REJECTED
    return int(summary.rejected_fraction > limit)


def describe(summary: Summary, out: Path) -> str:
    """Lay the summary out as a table."""
    speed = summary.num_packed_now / summary.wall_seconds
    rows = {
        "clips": f"{summary.num_clips}",
        "hours": f"{summary.seconds / 3600:.2f}",
        "shards": f"{summary.num_shards} in {out}",
        "bytes": f"{summary.num_bytes} ({summary.num_bytes / 1e6:.1f} MB)",
        "rejected": f"{summary.num_rejected}" + (f", see {out / REJECTED}" if summary.num_rejected else ""),
        "clips/s": f"{speed:.1f}" if summary.num_packed_now else "(packed before)",
    }
    if summary.num_clipped:
        rows["clipped"] = f"{summary.num_clipped} clips far over full scale"
    if summary.num_unlisted:
        rows["not in meta.csv"] = f"{summary.num_unlisted} audio files, left out"
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
