"""Where is the audio of a labelled set, so that the one loader can read it?

A folder's files are packed as they are, once, into shards in the user's cache folder: a second run, a probe and a
fine-tuning find them there. Shards that somebody packed are taken where they are. What a task says of the clips, labels
and splits, is written into an index of its own over the same shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import COLUMNS, take_ragged, write_whole
from audiossl.indexing.shardpaths import INDEX_NAME
from audiossl.labelled.columns import Ragged
from audiossl.labelled.rows import Row
from audiossl.pack import REJECTED, pack_source
from audiossl.packing.source import Clip, Source, key_of, name_keys
from audiossl.packing.writer import Settings
from audiossl.remote.shardcache import default_folder
from audiossl.sound import ffmpeg
from audiossl.sound.audio import extension_of

log = logging.getLogger(__name__)

CLIP_OVERHEAD = 2048  # bytes: tar headers, the json, its line in the index
SHARD_BYTES, RATE_HZ = 10**9, 32_000  # of what ffmpeg decodes; the rest stays as it is


def pack_rows(root: Path, rows: Sequence[Row], *, cache_dir: str | None, max_bad_fraction: float) -> tuple[Index, list]:
    """Pack the files of `rows` into the cache, unless they are there; give their index and each row's clip, or None.

    Size and place are said before it begins. A file that is missing or cannot be read is None, and listed. Raises
    `UserError` where more than `max_bad_fraction` of them are, and where the disk has too little room.
    """
    source, reasons = _source(root, rows)
    needs_ffmpeg = source.num_through_ffmpeg() > 0
    settings = Settings("flac" if needs_ffmpeg else "keep", RATE_HZ if needs_ffmpeg else None, SHARD_BYTES)
    _refuse_bad(root, rows, reasons, max_bad_fraction)
    name = hashlib.sha256(f"{source.fingerprint()} {source.times()} {settings}".encode()).hexdigest()[:16]
    out = (default_folder() if cache_dir is None else Path(cache_dir).expanduser()) / "tasks" / f"{root.name}-{name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two runs that begin together, one packs and the other waits
        if not (out / INDEX_NAME).is_file():
            _announce(source, settings, out)
            pack_source(source, out, settings, workers=1)
    index = Index.load(out)
    clip_of = {index.key(clip): clip for clip in range(len(index))}
    keys = {clip.path: clip.key for clip in source.clips}
    clips = [clip_of.get(keys.get(row.filename, "")) for row in rows]
    unreadable = {row.filename: f"see {out / REJECTED}" for row, clip in zip(rows, clips, strict=True) if clip is None}
    _refuse_bad(root, rows, unreadable | reasons, max_bad_fraction)
    return index, clips


def _announce(source: Source, settings: Settings, out: Path) -> None:
    """Say what will be copied where; raise `UserError` where there is no room for it."""
    sizes = source.packed_bytes(settings.rate_hz or 0, settings.codec)
    needed = sum(size + CLIP_OVERHEAD for size in sizes)
    there = sum(path.stat().st_size for path in out.glob("*")) if out.is_dir() else 0  # a pack that was killed goes on
    free = shutil.disk_usage(out.parent).free
    if needed - there > free:
        raise UserError(
            f"{source.folder}: packing its {len(source.clips):,} files once takes about {_size(needed)} in "
            f"{out.parent}, where {_size(free)} are free; take a larger disk with task.cache_dir=DIR, or pack it "
            f"yourself (python -m audiossl pack {source.folder} --out SHARDS) and give task.shards=SHARDS, no task.root"
        )
    said = "packing %s files of %s once, about %s, into %s (task.cache_dir; %s free)"
    log.info(said, f"{len(source.clips):,}", source.folder, _size(needed), out, _size(free))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2g} MB"


def find_rows(index: Index, rows: Sequence[Row], *, max_bad_fraction: float) -> list[int | None]:
    """Find each row's clip in packed shards, by its name without extension; see `pack_rows`."""
    clip_of = {index.key(clip): clip for clip in range(len(index))}
    clips = []
    for row in rows:
        stem = row.filename.rpartition(".")[0] or row.filename
        names = (key_of(stem), key_of(stem.rpartition("/")[2]), row.filename)
        clips.append(next((clip_of[name] for name in names if name in clip_of), None))
    absent = {row.filename: "not in the shards" for row, clip in zip(rows, clips, strict=True) if clip is None}
    _refuse_bad(index.path, rows, absent, max_bad_fraction)
    return clips


def write_labels(
    index: Index, clips: NDArray, path: Path, *, classes: Sequence[str], labels: Ragged, split: NDArray,
    splits: Sequence[str],
) -> Path:  # fmt: skip
    """Write an index of some clips of another, with `labels` (ids of `classes`) and `split` (ids of `splits`) of each.

    Gives its path.
    """
    order = np.argsort(clips)
    rows, there = clips[order], np.unique(split).tolist()
    splits, kept = sorted(splits[code] for code in there), splits
    columns = {name: index.column(name)[rows] for name in COLUMNS if not name.endswith("_ends")}
    columns["key_bytes"], columns["key_ends"] = take_ragged(index.column("key_bytes"), index.column("key_ends"), rows)
    places = np.array([splits.index(name) if name in splits else -1 for name in kept], np.int32)
    columns["split"], own = places[split[order]], labels.take(order)
    columns["label_ids"], columns["label_ends"] = own.ids, own.ends
    shards = [
        described | {"name": str(shard)} for shard, described in zip(index.shards, index.meta["shards"], strict=True)
    ]
    meta = {name: index.meta[name] for name in ("format", "corpus_hash") if name in index.meta}
    meta |= {"shards": shards, "vocabulary": list(classes), "splits": splits}
    meta["counts"] = {"clips": len(rows), "seconds": float(columns["seconds"].sum(dtype=np.float64))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(columns, metadata={"audiossl": json.dumps(meta, sort_keys=True)}))
    return path


def _source(root: Path, rows: Sequence[Row]) -> tuple[Source, dict[str, str]]:
    """List the files of `rows` as `pack` takes them, and why some cannot be."""
    clips, reasons = [], {}
    for row in rows:
        path = root / row.filename
        if not path.is_file():
            reasons[row.filename] = "no such file"
        elif not (extension_of(row.filename) or ffmpeg.extension_of(row.filename)):
            reasons[row.filename] = "not an audio file by its name"
        else:
            status = os.stat(path)
            clips.append(Clip(row.filename, status.st_size, status.st_mtime_ns))
    if not clips:
        why = next(iter(reasons.items()), ("", "the table is empty"))
        raise UserError(
            f"{root}: none of {len(rows)} recordings can be read ({why[0]}: {why[1]}); check task.audio_folder"
        )
    clips.sort(key=lambda clip: clip.path)
    name_keys(clips)
    return Source(root, clips), reasons


def _refuse_bad(where: Path, rows: Sequence[Row], reasons: dict[str, str], max_bad_fraction: float) -> None:
    if not reasons:
        return
    name, why = next(iter(reasons.items()))
    said = f"{where}: {len(reasons)} of {len(rows)} recordings cannot be used, such as {name} ({why})"
    if len(reasons) > max_bad_fraction * len(rows):
        raise UserError(
            f"{said}; bring them back, or allow more with task.max_bad_fraction={len(reasons) / len(rows):.2g}"
        )
    log.warning("%s", said)
