"""Which order do the settings under `data` ask for?

Every clip once per epoch, or weighted draws, or shard by shard; within each corpus of a mixture, and for one corpus.
What cannot work with the clips that are there is refused here, before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from audiossl.config.rules import check_drawing, check_value
from audiossl.errors import UserError
from audiossl.loading.corpus import Corpus
from audiossl.loading.mixture import Mixed, largest_remainder
from audiossl.loading.order import Order, ShardWindows, Shuffled
from audiossl.loading.sampling import FORMULAS, Weighted, clip_weights
from audiossl.noise import mix_seed

AT_LEAST = {"batch_size": 1, "rate_hz": 1, "max_bad_in_a_row": 1, "timeout_seconds": 1}  # else 0
AT_LEAST |= {"crop_seconds": 1e-4, "cache_gb": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Hold the settings of how clips are drawn; what each means is said in `shards.ShardData`."""

    sampling: Literal["audiomae", "passt", "atst"] | None
    sampling_offset: float | None
    sampling_reduce: Literal["sum", "max"]
    replacement: bool | None
    draws_per_epoch: int | None
    shuffle_shards: int | None

    def clips_per_epoch(self, corpus: Corpus) -> int:
        """Count the clips of what schedules and users call an epoch."""
        return self.draws_per_epoch or sum(map(len, corpus.pools))

    def weights(self, corpus: Corpus) -> list[np.ndarray] | None:
        """Weigh the clips of each pool by their labels; None where every clip comes once per epoch.

        Raises UserError where no clip of a pool has a label.
        """
        if self.sampling is None:
            return [np.ones(len(pool)) for pool in corpus.pools] if self.replacement else None
        offset = FORMULAS[self.sampling].offset if self.sampling_offset is None else self.sampling_offset
        weights = []
        for number, pool in enumerate(corpus.pools):
            weights.append(clip_weights(*corpus.index.labels_of(pool), offset=offset, reduce=self.sampling_reduce))
            if not weights[-1].any():
                raise UserError(
                    f"data.sampling={self.sampling}: none of the {len(pool)} clips of {corpus.keys(number)} has "
                    "a label to be balanced by; take data.sampling=null"
                )
        return weights

    def describe(self, corpus: Corpus, weights: list[np.ndarray] | None) -> str:
        """Say what an epoch holds where it is not each clip once, and what is left out; "" where there is no more."""
        notes = []
        if (draws := self.clips_per_epoch(corpus)) != sum(map(len, corpus.pools)):
            notes.append(f"of {draws} draws")
        if corpus.names[0]:
            parts = zip(corpus.names, corpus.shares, corpus.pools, strict=True)
            notes += [f"{name}: {share:.1%} of the draws from {len(pool)} clips" for name, share, pool in parts]
        if weights is not None and (idle := sum(int((w == 0).sum()) for w in weights)):
            notes.append(f"{idle} clips without a label never come")
        if corpus.num_unlabelled:
            notes.append(f"{corpus.num_unlabelled} clips left out for having no label")
        return f" ({', '.join(notes)})" if notes else ""

    def order(self, corpus: Corpus, weights: list[np.ndarray] | None, seed: int) -> Order:
        """Build the order of a run, `weights` as above; raises UserError where the clips do not suffice for it."""
        if not corpus.names[0]:
            return self._one(corpus, 0, weights, self.clips_per_epoch(corpus), seed)
        quotas = largest_remainder(corpus.shares, self.clips_per_epoch(corpus))
        parts = []
        for number, (name, quota) in enumerate(zip(corpus.names, quotas, strict=True)):
            if quota == 0:
                raise UserError(
                    f"data.sources.{name}: its share of {corpus.shares[number]:.2g} is no clip of the {sum(quotas)} in "
                    "an epoch; raise its weight or data.draws_per_epoch"
                )
            parts.append(self._one(corpus, number, weights, quota, mix_seed(seed, "source", name)))
        return Mixed(parts, num_clips=list(map(len, corpus.pools)), quotas=quotas, seed=seed)

    def _one(self, corpus: Corpus, number: int, weights: list[np.ndarray] | None, num_draws: int, seed: int) -> Order:
        pool = corpus.pools[number]
        if weights is None:
            if self.shuffle_shards is None:
                return Shuffled(len(pool), seed=seed)
            return ShardWindows(corpus.index.shard[pool], num_shards=self.shuffle_shards, seed=seed)
        replacement = self.replacement
        if replacement is None:
            replacement = FORMULAS[self.sampling].replacement
        there = np.count_nonzero(weights[number])
        if not replacement and num_draws > there:
            raise UserError(
                f"data.draws_per_epoch={self.draws_per_epoch}: is {num_draws} of {corpus.keys(number)} without "
                f"replacement, but only {there} clips have a label; draw fewer, or take data.replacement=true"
            )
        return Weighted(weights[number], num_draws=num_draws, replacement=replacement, seed=seed)


def check_ranges(given: dict[str, float | None]) -> None:
    """Raise `UserError` for a number under `data` that is too small."""
    for name, value in given.items():
        if value is not None and value < (least := AT_LEAST.get(name, 0)):
            raise UserError(f"data.{name}={value}: must be {least:g} or more")


def check_settings(settings: dict) -> None:
    """Check values and how they go together, with the config's own rules."""
    sources = settings["sources"] or {}
    values = {f"data.{name}": value for name, value in settings.items() if name != "sources"}
    values |= {f"data.sources.{name}.{key}": value for name, entry in sources.items() for key, value in entry.items()}
    for key, value in values.items():
        check_value(key, value)
    check_drawing(values)
