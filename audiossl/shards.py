"""How does a folder of shards become batches of waveforms?

`ShardData` makes the loaders of a rank, out of `loading/`: which clips there are is in `corpus.py`; which comes when is
a function of (seed, epoch) and the step (`drawing.py`, `order.py`); how a clip is read and cut is in `clips.py`;
workers and time-outs are in `loader.py`, the list of bad clips in `badclips.py`. Rank and world size are passed in,
never asked for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from audiossl.errors import UserError
from audiossl.loading.badclips import BadClips, Entry
from audiossl.loading.clips import ClipDataset
from audiossl.loading.corpus import Source, load_corpus
from audiossl.loading.drawing import Drawing, check_ranges, check_settings
from audiossl.loading.examples import NUM_CONSIDERED, pick
from audiossl.loading.loader import Loader, Requests, make_loader
from audiossl.loading.order import FixedSampler, Order, StepSampler
from audiossl.loading.resident import Resident
from audiossl.remote.prefetch import Downloads, check_room, remote_shards
from audiossl.remote.shardcache import ShardCache

log = logging.getLogger(__name__)


class ShardData:
    """Make loaders of the clips in `shards`: a glob of tars, or a folder or file with their index; https and s3 too.

    - sources: several corpora instead of `shards`, by name (`corpus.Source`). Each has its own endless stream, and
      every epoch takes the very share of each that its weight asks for.
    - rate_hz: of the waveforms delivered; null takes the clips' own rate where they share one, else `default_rate_hz`
      (the front end's). Clips of another rate are resampled in the workers.
    - batch_size: clips per process and micro-batch. num_workers: decoding processes, 0 for none.
    - crop_seconds: of each clip, null for what the front end's frames need; longer clips are cut at random, shorter
      ones repeated (padding "cyclic") or filled up with silence ("zeros").
    - split: train on this split only ("a+b": on both), null for all clips. validation_clips: as many of those are held
      out, chosen by a hash of their keys, so always the same ones; of several sources, in proportion to their clips.
    - validation_split: validate on the clips of this split and hold none of the others out. validation_clips then says
      how many of them, chosen as above: 0, or more than there are, takes all.
    - fraction: of the clips that are left, above 0 and up to 1; a smaller one lies inside a larger one. fraction_by:
      "random", or "class" for equally many clips of each class. fraction_seed: which of them, whatever the run's seed.
    - sampling: null for each clip once per epoch, or draws by label weights, 1000 / (offset + count) summed over a
      clip's labels, as published by "audiomae", "passt" or "atst" (`sampling.py`). sampling_offset: another offset than
      theirs; sampling_reduce: "sum" or "max" over labels. replacement: whether a clip may come again in an epoch; null
      as published (only "passt" draws without), and false without sampling. In a mixture: within each source.
    - draws_per_epoch: clips of an epoch, null for as many as there are.
    - shuffle_shards: null shuffles all clips; a number visits that many shards at a time.
    - cache_mb: decoded audio to keep, shared out among the workers.
    - cache_dir: where remote shards are downloaded to, null for the user's cache folder; cache_gb: so much of them is
      kept, by all runs together.
    - damaged_shards: "stop" where a shard is missing or has another size than the index says, or "skip" its clips.
    - max_bad_fraction: of the corpus, and max_bad_in_a_row: clips skipped before the run stops (`badclips.py`).
    - timeout_seconds: to wait for a batch before a worker is taken to hang; without workers nothing can watch.
    - resident: the clips lie decoded on the device, whole (`resident.py`); num_workers and cache_mb mean nothing then.
    - mean, std: of the corpus' log-mel, for front ends that normalise by them.
    - run_dir: where `bad_clips.csv` goes, null for nowhere.
    - needs_labels: the method does: batches have a `target`, and clips without a label are left out.

    Attributes: index, clips and held_out (arrays of clips of the index), rate_hz, corpus_hash, num_clips,
    num_validation_clips, clips_per_epoch, hours, bad_clips (this rank's ledger). Raises UserError for shards that are
    missing or without an index, an unknown split, values out of range, and settings that contradict each other or the
    clips that are there.
    """

    def __init__(
        self,
        *,
        shards: str | None,
        sources: dict[str, Source] | None,
        rate_hz: int | None,
        batch_size: int,
        num_workers: int,
        crop_seconds: float | None,
        padding: Literal["cyclic", "zeros"],
        validation_clips: int,
        validation_split: str | None,
        split: str | None,
        fraction: float,
        fraction_by: Literal["random", "class"],
        fraction_seed: int,
        sampling: Literal["audiomae", "passt", "atst"] | None,
        sampling_offset: float | None,
        sampling_reduce: Literal["sum", "max"],
        replacement: bool | None,
        draws_per_epoch: int | None,
        shuffle_shards: int | None,
        cache_mb: int,
        cache_dir: str | None,
        cache_gb: float,
        damaged_shards: Literal["stop", "skip"],
        max_bad_fraction: float,
        max_bad_in_a_row: int,
        timeout_seconds: float,
        mean: float,
        std: float,
        resident: bool = False,
        default_rate_hz: int,
        run_dir: str | Path | None,
        needs_labels: bool,
    ):
        given = dict(batch_size=batch_size, rate_hz=rate_hz, crop_seconds=crop_seconds, num_workers=num_workers)
        given |= dict(cache_mb=cache_mb, cache_gb=cache_gb, validation_clips=validation_clips)
        given |= dict(max_bad_fraction=max_bad_fraction, max_bad_in_a_row=max_bad_in_a_row)
        check_ranges(given | dict(timeout_seconds=timeout_seconds))
        drawing = dict(sampling=sampling, sampling_offset=sampling_offset, sampling_reduce=sampling_reduce)
        drawing |= dict(replacement=replacement, draws_per_epoch=draws_per_epoch, shuffle_shards=shuffle_shards)
        chosen = dict(shards=shards, sources=sources, split=split, validation_clips=validation_clips)
        chosen |= dict(fraction=fraction, fraction_by=fraction_by, fraction_seed=fraction_seed)
        chosen |= dict(validation_split=validation_split)
        check_settings({**drawing, **chosen})
        cache = ShardCache.of(cache_dir, cache_gb)
        self.corpus = load_corpus(**chosen, needs_labels=needs_labels, damaged_shards=damaged_shards, cache=cache)
        self.needs_labels = needs_labels
        self.index = self.corpus.index
        self.bad_clips = self._ledger(run_dir, max_bad_fraction, max_bad_in_a_row)
        self.drawing = Drawing(**drawing)
        self._weights = self.drawing.weights(self.corpus)
        self.clips, self.held_out = np.concatenate(self.corpus.pools), self.corpus.held_out
        self.remote = remote_shards(self.index)
        check_room(self.index, self.clips, self.held_out, shuffle_shards)
        self.order(seed=0)  # refuses what the clips do not suffice for
        self.clips_per_epoch = self.drawing.clips_per_epoch(self.corpus)
        rates = self.corpus.rates_hz
        self.rate_hz = rate_hz or (rates[0] if len(rates) == 1 else default_rate_hz)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.crop_seconds = crop_seconds
        self.padding = padding
        self.cache_bytes = cache_mb * 2**20
        self.mean, self.std = mean, std
        self.resident, self._store = resident, None
        self.default_rate_hz = default_rate_hz
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.timeout_seconds = timeout_seconds
        self.corpus_hash = self.corpus.hash
        self.num_clips, self.num_validation_clips = len(self.clips), len(self.held_out)
        self.hours = float(self.index.seconds[self.clips].sum(dtype=np.float64)) / 3600

    def order(self, seed: int) -> Order:
        """Build the order of a run's clips, as positions in `clips`."""
        return self.drawing.order(self.corpus, self._weights, seed)

    def describe_epoch(self) -> str:
        """Say what an epoch holds where it is not each clip once, and what is left out; "" where there is no more."""
        return self.drawing.describe(self.corpus, self._weights)

    def train_loader(
        self,
        *,
        rank: int,
        world_size: int,
        accumulate: int,
        start_step: int,
        max_steps: int,
        seed: int,
        crop_samples: int | None = None,
        is_replay: bool = False,
        device: torch.device | str = "cpu",
        num_sharing: int = 1,
    ) -> Loader:
        """Serve a rank's micro-batches of the optimiser steps `start_step` up to `max_steps`.

        `crop_samples` at `rate_hz`, None for `crop_seconds`. The length counts from step 0 (`StepSampler`). A replay
        shows batches that have been trained on before: the ledger of clips takes no note of it. A resident corpus lies
        on `device`, or in the memory of a host that `num_sharing` ranks share.
        """
        sampler = StepSampler(
            order=self.order(seed),
            batch_size=self.batch_size,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            max_steps=max_steps,
            start_step=start_step,
        )
        requests = Requests(sampler, self.index, self.clips, seed, with_labels=self.needs_labels)
        downloads = Downloads(requests, self.remote) if self.remote else None
        if downloads is not None:
            downloads.fetch_first()
        num_workers = 0 if self.resident else self.num_workers
        return make_loader(
            self._dataset(crop_samples, num_workers, device, num_sharing),
            requests,
            num_workers=num_workers,
            bad_clips=BadClips.uncounted(len(self.index)) if is_replay else self._ledger_of(rank, world_size),
            timeout_seconds=self.timeout_seconds,
            downloads=downloads,
        )

    def validation_loader(
        self,
        *,
        rank: int,
        world_size: int,
        crop_samples: int | None = None,
        device: torch.device | str = "cpu",
        num_sharing: int = 1,
    ) -> Loader | None:
        """Serve the middle crops of the clips held out, always in the same order; None where there are none."""
        if not self.num_validation_clips:
            return None
        sampler = FixedSampler(
            num_clips=self.num_validation_clips, batch_size=self.batch_size, rank=rank, world_size=world_size
        )
        num_workers = 0 if self.resident else min(1, self.num_workers)
        requests = Requests(sampler, self.index, self.held_out, None, with_labels=self.needs_labels)
        return make_loader(
            self._dataset(crop_samples, num_workers, device, num_sharing),
            requests,
            num_workers=num_workers,
            bad_clips=self._ledger_of(rank, world_size),
            timeout_seconds=self.timeout_seconds,
            is_iterated_often=True,
            downloads=Downloads(requests, self.remote) if self.remote else None,
        )

    def example_clips(self, num_clips: int) -> list[tuple[str, torch.Tensor]]:
        """Pick clips to look at (`examples.pick`), from those held out where there are some."""
        pool = self.held_out if self.num_validation_clips else self.clips
        if self.remote:  # for a few pictures, one shard is downloaded and no more
            pool = pool[self.index.shard[pool] == self.index.shard[pool[0]]]
        return pick(self.index, self.corpus.some_of(pool, NUM_CONSIDERED), num_clips, rate_hz=self.default_rate_hz)

    def _dataset(self, crop_samples: int | None, num_workers: int, device, num_sharing: int) -> ClipDataset:
        if crop_samples is None:
            if self.crop_seconds is None:
                raise UserError("data.crop_seconds is null and no crop_samples are given; say how long a crop is")
            crop_samples = round(self.crop_seconds * self.rate_hz)
        if self.resident and (self._store is None or self._store.device != torch.device(device)):
            requests = Requests(None, self.index, np.union1d(self.clips, self.held_out), None)
            self._store = Resident(requests, self.remote, rate_hz=self.rate_hz, device=device, num_sharing=num_sharing)
        return ClipDataset(
            rate_hz=self.rate_hz,
            crop_samples=crop_samples,
            padding=self.padding,
            cache_bytes=0 if self.resident else self.cache_bytes // max(1, num_workers),
            remote=self.remote,
            resident=self._store and self._store.clips,
        )

    def _ledger(self, run_dir: str | Path | None, max_bad_fraction: float, max_bad_in_a_row: int) -> BadClips:
        """Open this run's ledger, and list in it the clips that are gone with their shards."""
        index, lost = self.index, self.corpus.lost
        num_clips = sum(map(len, self.corpus.pools)) + len(self.corpus.held_out) + len(lost)
        folder = None if run_dir is None else Path(run_dir)
        ledger = BadClips(folder, len(index), num_clips, max_bad_fraction, max_bad_in_a_row)
        ledger.lose((i, Entry(index.key(i), str(index.shard_path(i)), index.lost[i])) for i in lost.tolist())
        if len(lost):
            shards = len(np.unique(index.shard[lost]))
            log.warning("%d clips are lost with %d damaged shards: %s", len(lost), shards, ledger.path)
        for number, pool in enumerate(self.corpus.pools):
            if not len(pool):
                where = self.corpus.keys(number)
                raise UserError(f"{where}: 0 clips to train on are left of {num_clips}: the rest is held out or lost")
        return ledger

    def _ledger_of(self, rank: int, world_size: int) -> BadClips:
        self.bad_clips.at_rank(rank, world_size)
        return self.bad_clips
