"""What is inside `index.safetensors`, and how is it written whole and read with suspicion?

A column per fact, as plain arrays; keys and label ids are ragged, so each has a column of ends. The header's metadata
holds one JSON text: format, counts, shards (name, bytes, clips, sha256), vocabulary, splits, corpus_hash.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from audiossl.errors import UserError
from audiossl.sound.audio import EXTENSIONS

FORMAT = 1
MAX_LABELS = 100_000
COLUMNS = {
    "shard": np.int32,  # position in the list of shards
    "offset": np.int64,  # of the audio's first byte in its shard
    "size": np.int64,  # bytes of encoded audio
    "num_frames": np.int64,  # samples per channel, as stored
    "seconds": np.float32,
    "rate_hz": np.int32,
    "channels": np.uint8,
    "extension": np.uint8,  # position in audio.EXTENSIONS
    "split": np.int32,  # position in the list of splits, -1 for none
    "fold": np.int32,  # -1 for none
    "key_ends": np.int64,  # end of each key in key_bytes
    "label_ends": np.int64,  # end of each clip's labels in label_ids
}
RAGGED = {"key_bytes": np.uint8, "label_ids": np.int32}  # UTF-8; positions in the vocabulary


def write_index(
    path: Path, shards: Iterable[dict], *, vocabulary: Sequence[str] | None = None, **extra: object
) -> dict:
    """Write the index of `shards` to `path`, all of it or nothing, and return its metadata.

    Each shard is {name (relative to the index's folder), bytes, sha256, rows}; a row is [key, extension, offset, size,
    num_frames, rate_hz, channels, labels, split or None, fold or None]. Shards may come from a generator: only one is
    in memory as Python objects at a time. `vocabulary` fixes the labels' order, with those that no clip has, so that a
    label's id is its published index; without it the labels that occur are sorted. `extra` joins the metadata.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, *RAGGED)}
    labels = {name: position for position, name in enumerate(vocabulary or ())}
    splits: dict[str, int] = {}
    described = []
    for number, shard in enumerate(shards):
        described.append({name: shard[name] for name in ("name", "bytes", "sha256")} | {"clips": len(shard["rows"])})
        for name, column in _columns_of(shard["rows"], number, labels, splits).items():
            parts[name].append(column)
    if len(labels) > MAX_LABELS:
        raise UserError(f"{len(labels)} different labels, such as '{next(iter(labels))}': captions, not classes?")
    assert vocabulary is None or len(labels) == len(vocabulary), "a clip has a label that the vocabulary lacks"
    dtypes = COLUMNS | RAGGED
    columns = {name: np.concatenate([np.zeros(0, dtype), *parts.pop(name)]) for name, dtype in dtypes.items()}
    for ends in ("key_ends", "label_ends"):
        columns[ends] = np.cumsum(columns[ends])
    if vocabulary is None:
        columns["label_ids"] = _alphabetical(columns["label_ids"], labels)
        vocabulary = sorted(labels)
    columns["split"] = _alphabetical(columns["split"], splits)
    meta = {"format": FORMAT, "shards": described, "vocabulary": list(vocabulary), "splits": sorted(splits), **extra}
    meta["counts"] = {"clips": len(columns["offset"]), "seconds": float(columns["seconds"].sum(dtype=np.float64))}
    meta["corpus_hash"] = corpus_hash(described)
    write_whole(path, save(columns, metadata={"audiossl": json.dumps(meta, sort_keys=True)}))
    return meta


def read_index(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Read columns and metadata and check that they fit together; raises UserError for a damaged index."""
    columns, meta = {}, read_meta(path)
    try:
        with safe_open(path, "numpy") as file:
            for name, dtype in (COLUMNS | RAGGED).items():
                columns[name] = file.get_tensor(name)
                if columns[name].dtype != dtype or columns[name].ndim != 1:
                    raise ValueError(f"column {name} is {columns[name].dtype} of {columns[name].ndim} axes")
        _check(columns, meta)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"index {path} is damaged ({error}); build it again") from error
    return columns, meta


def read_meta(path: Path) -> dict:
    """Read the metadata alone, which costs nothing."""
    try:
        with safe_open(path, "numpy") as file:
            meta = json.loads((file.metadata() or {})["audiossl"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not an index of audio shards ({error!r}); build it again") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"index {path} has format {meta.get('format')}, this version reads {FORMAT}; build it again")
    return meta


def corpus_hash(shards: list[dict]) -> str:
    """Hash what shards contain: it changes with any byte of any of them, not with where they lie."""
    return hashlib.sha256("\n".join(shard["sha256"] for shard in shards).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash a file in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all, whatever is killed when."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def take_ragged(values: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take some rows of a ragged column: the values that are left, and the new ends."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[rows] if len(ends) else ends
    lengths = ends[rows] - starts
    new_ends = np.cumsum(lengths)
    within = np.arange(int(new_ends[-1]) if len(new_ends) else 0) - np.repeat(new_ends - lengths, lengths)
    return values[np.repeat(starts, lengths) + within], new_ends


def _columns_of(rows: list, number: int, vocabulary: dict[str, int], splits: dict[str, int]) -> dict[str, np.ndarray]:
    facts = zip(*rows, strict=True) if rows else [()] * 10
    keys, extensions, offsets, sizes, frames, rates, channels, labels, in_split, folds = facts
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ids = [vocabulary.setdefault(label, len(vocabulary)) for names in labels for label in names]
    values = {
        "shard": [number] * len(rows),
        "offset": offsets,
        "size": sizes,
        "num_frames": frames,
        "seconds": [length / rate for length, rate in zip(frames, rates, strict=True)],
        "rate_hz": rates,
        "channels": channels,
        "extension": [EXTENSIONS.index(extension) for extension in extensions],
        "split": [-1 if name is None else splits.setdefault(name, len(splits)) for name in in_split],
        "fold": [-1 if fold is None else fold for fold in folds],
        "key_ends": [len(key) for key in encoded],
        "label_ends": [len(names) for names in labels],
        "label_ids": ids,
    }
    columns = {name: np.array(values[name], dtype) for name, dtype in (COLUMNS | RAGGED).items() if name in values}
    return columns | {"key_bytes": np.frombuffer(b"".join(encoded), np.uint8)}


def _alphabetical(codes: np.ndarray, names: dict[str, int]) -> np.ndarray:
    """Renumber codes from order of appearance to position in the sorted names."""
    renumbered = np.full(len(names) + 1, -1, codes.dtype)  # the last entry answers for -1
    for position, name in enumerate(sorted(names)):
        renumbered[names[name]] = position
    return renumbered[codes]


def _check(columns: dict[str, np.ndarray], meta: dict) -> None:
    clips, sizes = meta["counts"]["clips"], np.array([shard["bytes"] for shard in meta["shards"]], np.int64)
    for name in COLUMNS:
        if len(columns[name]) != clips:
            raise ValueError(f"column {name} has {len(columns[name])} rows, not {clips}")
    for values, ends in (("key_bytes", "key_ends"), ("label_ids", "label_ends")):
        last = int(columns[ends][-1]) if clips else 0
        if last != len(columns[values]) or (np.diff(columns[ends], prepend=0) < 0).any():
            raise ValueError(f"column {ends} does not fit {values}")
    for name, below in (("shard", len(sizes)), ("extension", len(EXTENSIONS)), ("label_ids", len(meta["vocabulary"]))):
        if len(columns[name]) and not 0 <= columns[name].min() <= columns[name].max() < below:
            raise ValueError(f"column {name} points outside its list")
    offset, size = columns["offset"], columns["size"]
    if clips and ((offset < 0) | (size <= 0) | (offset > sizes[columns["shard"]] - size)).any():
        raise ValueError("an offset points outside its shard")
    if clips and min(columns["num_frames"].min(), columns["rate_hz"].min(), columns["channels"].min()) <= 0:
        raise ValueError("a clip without frames, rate or channels")
    if clips and columns["split"].max() >= len(meta["splits"]):
        raise ValueError("column split points outside its list")
