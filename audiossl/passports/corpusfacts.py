"""What can be said of a corpus without opening a shard, exactly, for two million clips in seconds?

Counts come from the index's columns. Which clips there are is said by a hash that knows no order, so two laboratories
can compare keys and labels without sharing either: equal hashes mean equal sets. Where they differ, the smallest few
thousand hashes of both (a bottom-k sketch) tell how much they share.
"""

from __future__ import annotations

import base64
import hashlib

import numpy as np

from audiossl.index import Index
from audiossl.indexing.indexfile import take_ragged
from audiossl.sound.audio import EXTENSIONS

SKETCH_KEYS = 4096  # of two million: says how much is shared to about 1 %; of fewer than this: exactly
PERCENTILES = (0, 1, 5, 50, 95, 99, 100)
DURATION_EDGES = np.round(np.geomspace(0.05, 3600, 97), 4)  # seconds; some 12 % wide
SHORT_SECONDS = 10.0
_CHUNK = 2**16
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def corpus_facts(index: Index, rows: np.ndarray, hashes: np.ndarray) -> dict:
    """Count what the index knows of clips `rows`, whose `hashes` are `key_hashes(index, rows)`; plain types only."""
    shards = np.unique(index.shard[rows])
    seconds = index.seconds[rows]
    ids, ends = take_ragged(index.column("label_ids"), index.column("label_ends"), rows)
    per_clip = np.diff(ends, prepend=0)
    return {
        "clips": len(rows),
        "hours": float(seconds.sum(dtype=np.float64)) / 3600,
        "shards": len(shards),
        "shard_bytes": int(sum(index.meta["shards"][i]["bytes"] for i in shards.tolist())),
        "audio_bytes": int(index.size[rows].sum(dtype=np.int64)),
        "hashes": {
            "corpus": index.corpus_hash,
            "keys": set_hash(hashes),
            "labels": set_hash(labelled_hashes(hashes, index.vocabulary, ids, per_clip)),
        },
        "keys_sketch": sketch(hashes),
        "splits": _counts(index.column("split")[rows], index.splits),
        "folds": _counts(index.fold[rows], None),
        "labels": label_facts(index.vocabulary, ids, per_clip),
        "rates_hz": _counts(index.rate_hz[rows], None),
        "channels": _counts(index.channels[rows], None),
        "extensions": _counts(index.column("extension")[rows], EXTENSIONS),
        "durations": _durations(seconds),
    }


def key_hashes(index: Index, rows: np.ndarray) -> np.ndarray:
    """Hash the keys of clips `rows`: uint64, the first bytes of each key's sha256."""
    ends = index.column("key_ends")
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    text = memoryview(index.column("key_bytes"))
    hashes = np.empty(len(rows), np.uint64)
    sha256 = hashlib.sha256
    for first in range(0, len(rows), _CHUNK):
        some = rows[first : first + _CHUNK]
        spans = zip(starts[some].tolist(), ends[some].tolist(), strict=True)
        digests = b"".join([sha256(text[start:end]).digest()[:8] for start, end in spans])
        hashes[first : first + len(some)] = np.frombuffer(digests, ">u8")
    return hashes


def set_hash(hashes: np.ndarray) -> str:
    """Hash a set of uint64 into hex, whatever its order."""
    return hashlib.sha256(np.sort(hashes).astype(">u8").tobytes()).hexdigest()


def mixed(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 so that neighbours come apart (the finaliser of splitmix64); a bijection."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


def labelled_hashes(hashes: np.ndarray, vocabulary: list[str], ids: np.ndarray, per_clip: np.ndarray) -> np.ndarray:
    """Hash each clip's key together with the names of its labels, whatever their order and numbering."""
    names = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in vocabulary]
    values = np.frombuffer(b"".join(names), ">u8").astype(np.uint64)[ids] if len(ids) else np.zeros(0, np.uint64)
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])  # wraps around, as it may
    ends = np.cumsum(per_clip)
    return mixed(hashes + mixed(running[ends] - running[ends - per_clip]))


def sketch(hashes: np.ndarray) -> str:
    """Keep the `SKETCH_KEYS` smallest hashes, ascending, as base64."""
    smallest = np.sort(hashes)[:SKETCH_KEYS]
    return base64.b64encode(smallest.astype(">u8").tobytes()).decode()


def read_sketch(text: str) -> np.ndarray:
    """Return what `sketch` kept: ascending uint64."""
    return np.frombuffer(base64.b64decode(text), ">u8").astype(np.uint64)


def label_facts(vocabulary: list[str], ids: np.ndarray, per_clip: np.ndarray) -> dict:
    """Count labels per class and per clip; `imbalance` is the most frequent class over the least frequent one."""
    counts = np.bincount(ids, minlength=len(vocabulary))
    present = counts[counts > 0]
    number, clips = np.unique(per_clip, return_counts=True)
    return {
        "classes": len(vocabulary),
        "classes_without_a_clip": int((counts == 0).sum()),
        "labels": len(ids),
        "labels_per_clip": float(per_clip.mean()) if len(per_clip) else 0.0,
        "clips_by_number_of_labels": dict(zip(map(str, number.tolist()), clips.tolist(), strict=True)),
        "imbalance": float(present.max() / present.min()) if len(present) else None,
        "counts": dict(zip(vocabulary, counts.tolist(), strict=True)),
    }


def percentiles(values: np.ndarray) -> dict[str, float] | None:
    """Give minimum, 1, 5, 50, 95, 99 % and maximum; None of nothing."""
    if not len(values):
        return None
    names = ["min", *(f"p{p}" for p in PERCENTILES[1:-1]), "max"]
    return dict(zip(names, np.percentile(values, PERCENTILES).astype(float).tolist(), strict=True))


def _durations(seconds: np.ndarray) -> dict:
    counts, _ = np.histogram(np.clip(seconds, DURATION_EDGES[0], DURATION_EDGES[-1]), DURATION_EDGES)
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return {
        "seconds": percentiles(seconds),
        "share_below_10_s": float((seconds < SHORT_SECONDS - 0.005).mean()),  # 9.999 s are ten
        "histogram": {
            "edges_seconds": DURATION_EDGES[first : last + 1].tolist(),
            "clips": counts[first:last].tolist(),
        },
    }


def _counts(codes: np.ndarray, names: list[str] | tuple[str, ...] | None) -> dict[str, int]:
    """Count codes under their names; -1 is a clip that has none."""
    values, counts = np.unique(codes, return_counts=True)
    named = ["none" if v < 0 else str(v) if names is None else names[v] for v in values.tolist()]
    return dict(zip(named, counts.tolist(), strict=True))
