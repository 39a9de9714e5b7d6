"""What do a stranger's webdataset shards hold, and which samples are whole enough to train on?

Members of one key in one shard make a sample, wherever they stand: audio, and a label as json, cls or txt. Nothing
is unpickled or extracted, members of other kinds are passed over, and what is left out is counted, named and listed.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import read_index, sha256_of, write_index, write_whole
from audiossl.indexing.shardpaths import INDEX_NAME, common_folder, expand, is_remote
from audiossl.packing.tarfiles import Damage, Member, Oddity, TarDamage, walk
from audiossl.packing.writer import counted, num_cores
from audiossl.remote.location import expand_remote
from audiossl.remote.shardcache import ShardCache
from audiossl.sound.audio import AudioError, extension_of, probe

MAX_LEFT_OUT = 0.01
MAX_AUDIO_BYTES = 2**28
MAX_LABEL_BYTES = 2**20
WORTH_WORKERS_BYTES = 10**8  # starting processes takes longer than reading less than this
LABELS = ("json", "cls", "txt")


def index_shards(pattern: str, out: Path | None = None, cache: ShardCache | None = None) -> int:
    """Index the shards of `pattern` into `out` (default: beside them), print what was found, return the exit code.

    `out` is the file, or a folder for it. Remote shards pass through `cache` one by one, and the index has their
    URLs.
    1 when more than 1 % of the samples were left out, or a shard is damaged so that nobody knows how many are lost.
    Raises UserError when no sample is left.
    """
    if is_remote(pattern):
        shards, scanned = _remote(pattern, out, cache or ShardCache.of(None, None))
    else:
        shards = expand(pattern)
        if unreadable := [shard for shard in shards if not shard.is_file() or not os.access(shard, os.R_OK)]:
            raise UserError(f"{unreadable[0]} is no file that can be read")
        scanned = _scan_all(shards)
    out = Path(os.path.abspath(out)) if out else common_folder(shards) / INDEX_NAME
    out = out / INDEX_NAME if out.is_dir() else out
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist")
    left_out: list[tuple[str, str, str]] = []
    damaged: list[str] = []
    before, owners = _index_before(out), {}
    found = _unique(scanned, out.parent, owners, left_out, damaged)
    part = out.with_name(f"{out.name}.new")
    meta = write_index(part, found)
    num_clips = meta["counts"]["clips"]
    if not num_clips:
        part.unlink()
        raise UserError(f"0 samples with audio in the {len(shards)} shards of {pattern}; {_first(left_out)}")
    os.replace(part, out)
    if before is not None and (gone := _gone(before, set(shards), owners)):
        left_out += gone
        print(f"{'gone':<12}{len(gone)} of the {len(before)} clips of the index before")
    if left_out:
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator="\n").writerows([("shard", "key", "reason"), *left_out])
        write_whole(out.parent / "rejected.csv", table.getvalue().encode("utf-8", "surrogateescape"))
        print(f"{'left out':<12}{len(left_out)}, listed in {out.parent / 'rejected.csv'}")
    print(f"{'clips':<12}{num_clips}\n{'hours':<12}{meta['counts']['seconds'] / 3600:.2f}")
    print(f"{'shards':<12}{len(meta['shards'])}\n{'labels':<12}{len(meta['vocabulary'])}\n{'index':<12}{out}")
    return int(bool(damaged) or len(left_out) > MAX_LEFT_OUT * (num_clips + len(left_out)))


def scan_shard(path: Path) -> dict:
    """Read one shard: `rows` as `indexfile.write_index` wants them, `left_out` as (key, reason), `damage` or None."""
    samples: dict[str, dict[str, Member]] = {}
    left_out, damage, repeated = [], None, set()
    try:
        for member in walk(path):
            if isinstance(member, Damage):
                damage = damage or member.reason
                left_out.append(("", member.reason))
                continue
            if isinstance(member, Oddity):
                left_out.append((member.name, member.reason))
                continue
            key, field = _split(member.name)
            if field is None:
                continue
            sample = samples.setdefault(key, {})
            if field in sample:
                repeated.add(key)
            sample[field] = member
    except (TarDamage, OSError) as error:
        damage = str(error)
        left_out.append(("", damage))
    is_labelled = any(name in sample for sample in samples.values() for name in LABELS)
    rows = []
    with open(path, "rb") as shard:
        for key, sample in samples.items():
            row = "a member occurs twice" if key in repeated else _row(shard, key, sample, is_labelled)
            if isinstance(row, str):
                left_out.append((key, row))
            else:
                rows.append(row)
    rows.sort(key=lambda row: row[2])
    facts = {"path": path, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return facts | {"rows": rows, "left_out": left_out, "damage": damage}


def _scan_all(shards: list[Path]) -> Iterator[dict]:
    workers = min(len(shards), num_cores())
    with tqdm(total=len(shards), unit="shard", desc="index", mininterval=0.5) as bar:
        if workers == 1 or sum(path.stat().st_size for path in shards) < WORTH_WORKERS_BYTES:
            results = map(scan_shard, shards)
            yield from counted(results, bar)
            return
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            yield from counted(pool.map(scan_shard, shards), bar)


def _remote(pattern: str, out: Path | None, cache: ShardCache) -> tuple[list[str], Iterator[dict]]:
    """List remote shards, and make the generator that downloads and scans one after another."""
    if out is None:
        raise UserError("--out DIR: an index of remote shards needs a folder here")
    if out.suffix != ".safetensors":
        out.mkdir(parents=True, exist_ok=True)
    urls = expand_remote(pattern)

    def scanned() -> Iterator[dict]:
        with tqdm(total=len(urls), unit="shard", desc="index", mininterval=0.5) as bar:
            yield from counted((scan_shard(cache.add(url)) | {"url": url} for url in urls), bar)

    return urls, scanned()


def _index_before(out: Path) -> Index | None:
    """Read the index that is about to be replaced; None where there is none that can be read."""
    try:
        columns, meta = read_index(out)
    except (UserError, OSError):
        return None
    return Index(columns=columns, meta=meta, path=out)


def _gone(before: Index, shards: Iterable[str | Path], owners: dict[str, str]) -> list[tuple[str, str, str]]:
    """List the clips that an index had and that are in no shard any more; what was not looked at is not missed."""
    looked_at = set(map(str, shards))
    is_looked_at = [
        str(shard) in looked_at or (isinstance(shard, Path) and not shard.exists()) for shard in before.shards
    ]
    missed = (i for i in range(len(before)) if is_looked_at[before.shard[i]] and before.key(i) not in owners)
    return [(before.shard_path(i).name, before.key(i), "gone: it was in the index before") for i in missed]


def _unique(
    results: Iterator[dict], folder: Path, owners: dict[str, str], left_out: list, damaged: list
) -> Iterator[dict]:
    """Name each shard relative to `folder`, leave out keys seen before, and print one line for each reason."""
    for shard in results:
        path, rows = shard.get("url") or str(shard["path"]), []
        name = shard.get("url") or os.path.relpath(path, folder)
        for row in shard["rows"]:
            if row[0] in owners:
                shard["left_out"].append((row[0], f"key is also in {os.path.basename(owners[row[0]])}"))
            else:
                owners[row[0]] = path
                rows.append(row)
        for reason, number in Counter(reason for _, reason in shard["left_out"]).items():
            first = next(key for key, why in shard["left_out"] if why == reason)
            tqdm.write(f"{path}: {reason}" + (f" ({number} x, first '{first}')" if first else ""))
        left_out += [(os.path.basename(path), key, reason) for key, reason in shard["left_out"]]
        if shard["damage"]:
            damaged.append(path)
        yield {"name": name, "bytes": shard["bytes"], "sha256": shard["sha256"], "rows": rows}


def _split(name: str) -> tuple[str, str | None]:
    """Split a member's name into key and `audio extension` or label kind, None for a kind we pass over.

    Differs: webdataset ends a key at the first dot of the file name, so `a.b.flac` and `a.c.flac` become one sample;
    here a key ends at the last.
    """
    key, _, field = name.rpartition(".")
    field = field.lower()
    is_ours = key and not key.endswith("/") and (field in LABELS or extension_of(name))
    return (key, field) if is_ours else (name, None)


def _row(shard: io.BufferedReader, key: str, sample: dict[str, Member], is_labelled: bool) -> tuple | str:
    """Make the row of a sample, or say why it is left out."""
    extensions = [field for field in sample if field not in LABELS]
    if not extensions:
        return "label without audio"
    if len(extensions) > 1:
        return "more than one audio member"
    if is_labelled and len(sample) == 1:
        return "audio without label"
    audio = sample[extensions[0]]
    if audio.size > MAX_AUDIO_BYTES:
        return f"{audio.size} bytes of audio, more than the limit of {MAX_AUDIO_BYTES}"
    try:
        info = probe(_read(shard, audio))
        labels, split, fold = _labels(shard, sample)
    except (AudioError, ValueError) as error:
        return " ".join(str(error).split())
    shape = (audio.size, info.num_frames, info.rate_hz, info.channels)
    return (key, extensions[0], audio.offset, *shape, labels, split, fold)


def _labels(shard: io.BufferedReader, sample: dict[str, Member]) -> tuple[list[str], str | None, int | None]:
    """Read labels, split and fold; raises ValueError for a label member that cannot be read."""
    labels: list[str] = []
    split = fold = None
    for kind in LABELS:
        member = sample.get(kind)
        if member is None or labels:
            continue
        if member.size > MAX_LABEL_BYTES:
            raise ValueError(f"a {kind} of {member.size} bytes")
        try:
            text = _read(shard, member).decode("utf-8")
            if kind == "json":
                labels, split, fold = _from_json(json.loads(text))
            else:
                labels = [str(int(text))] if kind == "cls" else _names(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{kind} cannot be read: {error}"[:120]) from error
    return labels, split, fold


def _from_json(found: object) -> tuple[list[str], str | None, int | None]:
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    labels = found.get("labels", found.get("label", []))
    if isinstance(labels, int | float):
        labels = [labels]
    if not isinstance(labels, str | list) or not all(isinstance(label, str | int) for label in labels):
        raise ValueError("labels are neither names nor numbers")
    names = _names(labels) if isinstance(labels, str) else [str(label) for label in labels]
    split, fold = found.get("split"), found.get("fold")
    is_fold = isinstance(fold, int) and 0 <= fold < 2**31
    return list(dict.fromkeys(names)), split if isinstance(split, str) and split else None, fold if is_fold else None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


def _read(shard: io.BufferedReader, member: Member) -> bytes:
    shard.seek(member.offset)
    return shard.read(member.size)


def _first(left_out: list[tuple[str, str, str]]) -> str:
    return f"{len(left_out)} left out, first: {' '.join(left_out[0])}" if left_out else "no flac, wav, ogg, mp3 or opus"
