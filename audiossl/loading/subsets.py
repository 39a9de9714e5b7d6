"""Which clips does a run see: which are held out, and which are left when it asks for a fraction?

Both go by a hash of the clip's key, so they do not depend on how a corpus was packed or on the training seed. Clips are
held out first and are the same for every fraction. A fraction is a prefix of one order of the clips, so the 1 % lies
inside the 10 %; by class, that order takes one clip of each class in turn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.noise import mix_seed

BLOCK = 2**17  # clips hashed at once: what fits into a processor's cache


def hold_out(index: Index, clips: np.ndarray, num_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Split clips into those to train on and `num_clips` held out; the same ones whatever the seed."""
    if num_clips == 0:
        return clips, clips[:0]
    hashes = crc32(*index.key_spans(clips))
    is_held_out = np.zeros(len(clips), bool)
    is_held_out[np.argsort(hashes, kind="stable")[:num_clips]] = True
    return clips[~is_held_out], clips[is_held_out]


def take_fraction(
    index: Index, clips: np.ndarray, *, fraction: float, by: Literal["random", "class"], seed: int
) -> np.ndarray:
    """Keep a fraction of `clips`, in their order.

    By "class" every clip belongs to its rarest label, and the labels take turns, each giving its clips in the order of
    their hash; a label with no clip left is passed over, and clips without labels come last. So counts are equal as far
    as the classes last; of several labels the common ones come along with the rare.
    Raises UserError when no clip is left, or none has a label to be balanced by.
    """
    if fraction == 1:
        return clips
    num_clips = round(fraction * len(clips))
    if num_clips == 0:
        raise UserError(f"data.fraction={fraction:g}: is none of the {len(clips)} clips of {index.path}; take more")
    hashes = _scrambled(crc32(*index.key_spans(clips)), mix_seed(seed, "fraction"))
    turns = np.zeros(len(clips), np.int64)
    if by == "class":
        label_ids, label_ends = index.labels_of(clips)
        if not len(label_ids):
            raise UserError(f"data.fraction_by=class: no clip of {index.path} has a label; take random")
        turns = _class_turns(label_ids, label_ends, hashes)
    return clips[np.sort(np.lexsort((hashes, turns))[:num_clips])]


def _class_turns(label_ids: np.ndarray, label_ends: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Say in which round each clip is taken: its place, by hash, among the clips of its rarest label."""
    counts = np.bincount(label_ids)
    lengths = np.diff(label_ends, prepend=0)
    is_labelled = lengths > 0
    rarity = counts[label_ids] * len(counts) + label_ids
    rarest = np.full(len(label_ends), len(counts))
    rarest[is_labelled] = np.minimum.reduceat(rarity, (label_ends - lengths)[is_labelled]) % len(counts)
    order = np.lexsort((hashes, rarest))
    turns = np.empty(len(order), np.int64)
    turns[order] = np.arange(len(order)) - np.searchsorted(rarest[order], rarest[order])
    turns[~is_labelled] = len(order)
    return turns


def crc32(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Take the CRC-32 of many pieces of `text` (uint8) at once, as `zlib.crc32` does of each: (C,) int64."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1)
    hashes = np.empty(len(ends), np.int64)
    for first in range(0, len(ends), BLOCK):
        block = slice(first, first + BLOCK)
        places, lengths = starts[block].copy(), ends[block] - starts[block]
        found = np.full(len(lengths), 0xFFFFFFFF, np.uint32)
        for done in range(int(lengths.max())):
            here = np.flatnonzero(lengths > done)
            found[here] = table[(found[here] ^ text[places[here]]) & 0xFF] ^ (found[here] >> 8)
            places += 1
        hashes[block] = found ^ 0xFFFFFFFF
    return hashes


def _scrambled(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Mix a seed into 32-bit hashes: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = hashes.astype(np.uint64) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
