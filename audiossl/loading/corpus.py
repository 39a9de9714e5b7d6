"""Which corpora does a run train on, and on which of their clips?

One corpus (`data.shards`) or several (`data.sources`). From each, in this order: its split, the clips with a label
where the method needs one, the clips held out for validation, the fraction of the rest. So the clips held out are the
same whatever the fraction, shares and seed. With `data.validation_split` those come from a split of their own instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.loading.mixture import JoinedIndex, largest_remainder
from audiossl.loading.subsets import hold_out, take_fraction
from audiossl.remote.shardcache import ShardCache


@dataclass(frozen=True, kw_only=True)
class Source:
    """Say what one corpus of a mixture is: an entry of `data.sources`.

    - shards: a glob of tars, or a folder or file with their index.
    - weight: its part of every epoch, in proportion to the other sources' weights; null for all: to their clips.
    - fraction, split: null as `data.fraction` and `data.split` say.
    """

    shards: str
    weight: float | None = None
    fraction: float | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Hold the clips of a run: `pools[i]` (clips of `index`, ascending) are those of `names[i]` to train on.

    `shares` adds up to 1. One corpus of its own has the name "". `held_out` are clips of `index`. `hash` (hex) changes
    with any byte of any shard, with what is lost, and in a mixture with any name, split, share or fraction. `rates_hz`
    are those of the clips before the fraction was taken. `lost` are clips that would be in a pool or held out, were
    their shards whole. Where labels are needed, `hash` changes with any label too, and `num_unlabelled` counts the
    clips left out for having none; it is 0 where they are not.
    """

    index: Index
    names: list[str]
    pools: list[np.ndarray]
    held_out: np.ndarray
    lost: np.ndarray
    shares: list[float]
    rates_hz: list[int]
    hash: str
    num_unlabelled: int

    def some_of(self, clips: np.ndarray, num_clips: int) -> list[int]:
        """List the first of `clips` (of the index), equally many of each corpus; about `num_clips` at most."""
        corpora = np.split(clips, np.searchsorted(clips, getattr(self.index, "firsts", [0])[1:]))
        return np.concatenate([part[: -(-num_clips // len(corpora))] for part in corpora]).tolist()

    def keys(self, number: int) -> str:
        """Name the config's node of corpus `number`, for a message."""
        return f"data.sources.{self.names[number]}" if self.names[number] else "data"


def load_corpus(
    *,
    shards: str | None,
    sources: Mapping[str, Mapping] | None,
    split: str | None,
    fraction: float,
    fraction_by: Literal["random", "class"],
    fraction_seed: int,
    validation_clips: int,
    validation_split: str | None,
    needs_labels: bool,
    damaged_shards: Literal["stop", "skip"],
    cache: ShardCache,
) -> Corpus:
    """Load the indexes and choose clips; what each setting means is said in `shards.ShardData`.

    Raises UserError for shards that are missing or without an index, an unknown split, one that is both trained on and
    validated on, more clips held out than there are, a fraction of nothing, and no label where labels are needed.
    """
    entries = {name: Source(**entry) for name, entry in sorted((sources or {}).items())} or {"": Source(shards=shards)}
    indexes = {name: _load(source.shards, damaged_shards, cache) for name, source in entries.items()}
    splits = [source.split or split for source in entries.values()]
    chosen = [index.select(split=name) for index, name in zip(indexes.values(), splits, strict=True)]
    apart = None if validation_split is None else _of_split(indexes, splits, validation_split)
    num_chosen = sum(map(len, chosen))
    if needs_labels:
        chosen = _labelled(indexes, chosen)
        apart = apart and _labelled(indexes, apart)
    remaining, held_out = _held_out(list(indexes.values()), chosen, apart, validation_clips)
    pools, fractions = [], []
    for (name, source), clips in zip(entries.items(), remaining, strict=True):
        if not len(clips):
            raise UserError(f"data.sources.{name}: all its clips are held out; lower data.validation_clips")
        fractions.append(fraction if source.fraction is None else source.fraction)
        pools.append(take_fraction(indexes[name], clips, fraction=fractions[-1], by=fraction_by, seed=fraction_seed))
    weights = [source.weight for source in entries.values()]
    weights = [float(len(pool)) for pool in pools] if None in weights else weights
    shares = [weight / sum(weights) for weight in weights]
    rates = [np.unique(index.rate_hz[clips]) for index, clips in zip(indexes.values(), chosen, strict=True)]
    said = (splits, shares, fractions, fraction_by, fraction_seed)
    index = JoinedIndex(indexes) if sources else indexes[""]
    firsts = index.firsts if sources else [0]
    pools = [clips + first for clips, first in zip(pools, firsts, strict=True)]
    held_out = np.concatenate([clips + first for clips, first in zip(held_out, firsts, strict=True)])
    gone = np.fromiter(index.lost, np.int64)
    lost = np.intersect1d(gone, np.concatenate([*pools, held_out])) if len(gone) else gone
    return Corpus(
        index=index,
        names=list(entries),
        pools=[_without(pool, lost) for pool in pools],
        held_out=_without(held_out, lost),
        lost=lost,
        shares=shares,
        rates_hz=np.unique(np.concatenate(rates)).tolist(),
        hash=_hash(index, lost, *(said if sources else ()), *([_label_hash(index)] if needs_labels else [])),
        num_unlabelled=num_chosen - sum(map(len, chosen)),
    )


def _load(shards: str, damaged_shards: Literal["stop", "skip"], cache: ShardCache) -> Index:
    index = Index.load(shards, damaged_shards=damaged_shards, cache=cache)
    if len(index) == 0:
        raise UserError(f"data.shards={shards}: 0 clips in {len(index.shards)} shards; nothing to train on")
    return index


def _held_out(
    indexes: list[Index], chosen: list[np.ndarray], apart: list[np.ndarray] | None, num_clips: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split the clips of each corpus into those to train on and those held out, which come from `apart` if given."""
    pools = chosen if apart is None else apart
    counts = [len(clips) for clips in pools]
    if apart is not None and (num_clips == 0 or num_clips >= sum(counts)):
        return chosen, apart
    if num_clips >= sum(counts):
        raise UserError(f"data.validation_clips={num_clips}: only {sum(counts)} clips are there, and some must train")
    held = map(hold_out, indexes, pools, largest_remainder(counts, num_clips))
    remaining, held_out = zip(*held, strict=True)
    return list(remaining) if apart is None else chosen, list(held_out)


def _of_split(indexes: Mapping[str, Index], splits: list[str | None], wanted: str) -> list[np.ndarray]:
    """Select the clips to validate on, none from a corpus of a mixture that lacks the split."""
    found = []
    for (name, index), trained in zip(indexes.items(), splits, strict=True):
        if name and wanted not in index.splits:
            found.append(np.zeros(0, np.int64))
            continue
        found.append(index.select(split=wanted))
        if trained is None:  # `rules.check_drawing` knows the rest
            where = f"data.sources.{name}.split" if name else "data.split"
            others = "+".join(other for other in index.splits if other != wanted)
            raise UserError(
                f"data.validation_split={wanted}: {where}=null trains on these clips too; train on others"
                + (f", {where}={others} for example" if others else "")
            )
    if not sum(map(len, found)):
        known = sorted({split for index in indexes.values() for split in index.splits})
        raise UserError(f"data.validation_split={wanted}: no source has this split; they have {known or 'no splits'}")
    return found


def _labelled(indexes: Mapping[str, Index], chosen: list[np.ndarray]) -> list[np.ndarray]:
    """Keep the clips that have a label."""
    left = []
    for (name, index), clips in zip(indexes.items(), chosen, strict=True):
        left.append(clips[np.diff(index.column("label_ends"), prepend=0)[clips] > 0])
        if len(clips) and not len(left[-1]):
            raise UserError(
                f"data.{f'sources.{name}.' if name else ''}shards: none of {len(clips)} clips of {index.path} has a "
                "label, and this model learns from labels; pack them with a meta.csv that has a column label (or "
                "labels), or take a model that needs none, such as model=audiomae"
            )
    return left


def _label_hash(index: Index) -> str:
    """Hash names and labels as the index has them: shards of the same bytes may be indexed with another vocabulary."""
    named = hashlib.sha256("\n".join(index.vocabulary).encode("utf-8", "surrogateescape"))
    for column in ("label_ends", "label_ids"):
        named.update(np.ascontiguousarray(index.column(column)))
    return named.hexdigest()


def _without(clips: np.ndarray, lost: np.ndarray) -> np.ndarray:
    return clips[~np.isin(clips, lost)] if len(lost) else clips


def _hash(index: Index, lost: np.ndarray, *said: object) -> str:
    """Hash what can be trained on: a run whose shards come back is not the same run, its order being another.

    Of one whole corpus it is the index's own, which in a mixture covers the names and the corpora.
    """
    if not said and not len(lost):
        return index.corpus_hash
    return hashlib.sha256(f"{index.corpus_hash} {said}".encode() + lost.astype("<i8").tobytes()).hexdigest()
