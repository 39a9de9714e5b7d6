"""How do several corpora share one run?

Each corpus keeps its own endless stream, and an epoch of the mixture takes an exact number of clips from each (its
share, by largest remainder), interleaved at random as a function of (seed, epoch). A small corpus with a large share is
passed through several times an epoch, a large one with a small share once in many, and neither repeats a clip before
its pass is over. To the loader the corpora are one index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from audiossl.index import Index
from audiossl.indexing.indexfile import COLUMNS
from audiossl.loading.order import Order, random_words


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to `shares` into whole numbers that add up to it; ties go to the earlier."""
    exact = np.asarray(shares, np.float64) / sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    most_cut = np.argsort(counts - exact, kind="stable")
    counts[most_cut[: total - int(counts.sum())]] += 1
    return counts.tolist()


class Mixed(Order):
    """Interleave the streams of `parts`, `quotas[i]` of part i in every epoch.

    The clips of part i are numbered on from those of part i - 1; `num_clips[i]` counts them.
    """

    def __init__(self, parts: Sequence[Order], *, num_clips: Sequence[int], quotas: Sequence[int], seed: int):
        super().__init__(sum(quotas))
        self.parts, self.quotas, self.seed = parts, quotas, seed
        self.firsts = np.cumsum([0, *num_clips[:-1]]).tolist()

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Take each part's next quota and interleave them."""
        order = np.argsort(random_words(self.epoch_length, self.seed, "mixture", epoch), kind="stable")
        which = np.repeat(np.arange(len(self.parts), dtype=np.int16), self.quotas)[order]
        turns, clips = np.empty(self.epoch_length, np.int64), np.empty(self.epoch_length, np.int64)
        for number, (part, quota, first) in enumerate(zip(self.parts, self.quotas, self.firsts, strict=True)):
            here = np.flatnonzero(which == number)
            turns[here], clips[here] = part.at(np.arange(epoch * quota, (epoch + 1) * quota))
            clips[here] += first
        return turns, clips


class JoinedIndex(Index):
    """Look up the clips of several indexes, one after another, as those of one; built by `join`.

    Keys may repeat between corpora, so `key` puts the corpus' name before each: "speech/clip1". The vocabulary is the
    union of theirs. `firsts` says where each corpus begins.
    """

    def __init__(self, indexes: Mapping[str, Index]):
        parts = list(indexes.values())
        vocabulary = sorted(set().union(*(index.vocabulary for index in parts)))
        splits = sorted(set().union(*(index.splits for index in parts)))
        columns = {}
        for name in (*COLUMNS, "key_bytes", "label_ids"):
            pieces = [_renumbered(index, name, vocabulary, splits) for index in parts]
            shift = {"shard": [len(i.shards) for i in parts], "key_ends": [len(i.column("key_bytes")) for i in parts]}
            shift["label_ends"] = [len(i.column("label_ids")) for i in parts]
            if name in shift:
                pieces = [p + p.dtype.type(s) for p, s in zip(pieces, np.cumsum([0, *shift[name][:-1]]), strict=True)]
            columns[name] = np.concatenate(pieces)
        shards = [shard for index in parts for shard in index.meta["shards"]]
        meta = {**parts[0].meta, "vocabulary": vocabulary, "splits": splits, "shards": shards}
        meta["counts"] = {"clips": len(columns["offset"]), "seconds": float(columns["seconds"].sum(dtype=np.float64))}
        super().__init__(columns=columns, meta=meta, path=parts[0].path)
        self.shards = [shard for index in parts for shard in index.shards]
        self.firsts = np.cumsum([0, *(len(index) for index in parts[:-1])]).tolist()
        self._names = list(indexes)
        for index, first in zip(parts, self.firsts, strict=True):
            self.lost |= {clip + first: reason for clip, reason in index.lost.items()}
        joined = "\n".join(f"{name} {index.corpus_hash}" for name, index in indexes.items())
        self.corpus_hash = hashlib.sha256(joined.encode()).hexdigest()

    def source(self, i: int) -> str:
        """Name the corpus of clip `i`."""
        return self._names[int(np.searchsorted(self.firsts, i, side="right")) - 1]

    def key(self, i: int) -> str:
        """Return the key of clip `i` with its corpus before it."""
        return f"{self.source(i)}/{super().key(i)}"

    def member_key(self, i: int) -> str:
        """Return the key of clip `i` as its shard has it."""
        return super().key(i)


def _renumbered(index: Index, name: str, vocabulary: list[str], splits: list[str]) -> np.ndarray:
    """Give a column with its codes looked up in the joint lists."""
    column = index.column(name)
    if name not in ("label_ids", "split"):
        return column
    old, new = (index.vocabulary, vocabulary) if name == "label_ids" else (index.splits, splits)
    position = {word: place for place, word in enumerate(new)}
    codes = np.array([*(position[word] for word in old), -1], column.dtype)  # the last entry answers for -1
    return codes[column]
