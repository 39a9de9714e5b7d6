"""How does a folder of shards become batches of waveforms?

`ShardData` makes the loaders of a rank. Which clips there are is in `corpus.py`; which comes when is a function of
(seed, epoch) and the step (`drawing.py`, `order.py`); how a clip is read and cut is in `clips.py`; workers and
time-outs are in `loader.py`, the list of bad clips in `badclips.py`. Rank and world size are passed in, never asked
for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from audiossl.audio import AudioError, decode, resample
from audiossl.badclips import BadClips
from audiossl.clips import ClipDataset
from audiossl.corpus import Source, load_corpus
from audiossl.drawing import Drawing
from audiossl.errors import UserError
from audiossl.loader import Loader, Requests, make_loader
from audiossl.order import FixedSampler, Order, StepSampler
from audiossl.rules import check_drawing, check_value

log = logging.getLogger(__name__)

MAX_EXAMPLE_SECONDS = 30.0
AT_LEAST = {"batch_size": 1, "rate_hz": 1, "crop_seconds": 1e-4, "num_workers": 0, "cache_mb": 0, "validation_clips": 0}


class ShardData:
    """Make loaders of the clips in `shards`: a glob of tars, or a folder or file with their index.

    - sources: several corpora instead of `shards`, by name (`corpus.Source`). Each has its own endless stream, and
      every epoch takes the very share of each that its weight asks for.
    - rate_hz: of the waveforms delivered; null takes the clips' own rate where they share one, else `default_rate_hz`
      (the front end's). Clips of another rate are resampled in the workers.
    - batch_size: clips per process and micro-batch. num_workers: decoding processes, 0 for none.
    - crop_seconds: of each clip, null for what the front end's frames need; longer clips are cut at random, shorter
      ones repeated (padding "cyclic") or filled up with silence ("zeros").
    - split: train on this split only, null for all clips. validation_clips: as many of those are held out, chosen by a
      hash of their keys, so always the same ones; of several sources, in proportion to their clips.
    - fraction: of the clips that are left, above 0 and up to 1; a smaller one lies inside a larger one. fraction_by:
      "random", or "class" for equally many clips of each class. fraction_seed: which of them, whatever the run's seed.
    - sampling: null for each clip once per epoch, or draws by label weights, 1000 / (offset + count) summed over a
      clip's labels, as published by "audiomae", "passt" or "atst" (`sampling.py`). sampling_offset: another offset than
      theirs; sampling_reduce: "sum" or "max" over labels. replacement: whether a clip may come again in an epoch; null
      as published (only "passt" draws without), and false without sampling. In a mixture: within each source.
    - draws_per_epoch: clips of an epoch, null for as many as there are.
    - shuffle_shards: null shuffles all clips; a number visits that many shards at a time.
    - cache_mb: decoded audio to keep, shared out among the workers.
    - mean, std: of the corpus' log-mel, for front ends that normalise by them.
    - run_dir: where `bad_clips.csv` goes, null for nowhere.

    Attributes: index, clips and held_out (arrays of clips of the index), rate_hz, corpus_hash, num_clips,
    num_validation_clips, clips_per_epoch, hours. Raises UserError for shards that are missing or without an index, an
    unknown split, values out of range, and settings that contradict each other or the clips that are there.
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
        mean: float,
        std: float,
        default_rate_hz: int,
        run_dir: str | Path | None,
    ):
        drawing = dict(sampling=sampling, sampling_offset=sampling_offset, sampling_reduce=sampling_reduce)
        drawing |= dict(replacement=replacement, draws_per_epoch=draws_per_epoch, shuffle_shards=shuffle_shards)
        chosen = dict(shards=shards, sources=sources, split=split, validation_clips=validation_clips)
        chosen |= dict(fraction=fraction, fraction_by=fraction_by, fraction_seed=fraction_seed)
        rest = dict(batch_size=batch_size, rate_hz=rate_hz, crop_seconds=crop_seconds, num_workers=num_workers)
        _check({**drawing, **chosen, **rest, "cache_mb": cache_mb})
        self.corpus = load_corpus(**chosen)
        self.drawing = Drawing(**drawing)
        self._weights = self.drawing.weights(self.corpus)
        self.index = self.corpus.index
        self.clips, self.held_out = np.concatenate(self.corpus.pools), self.corpus.held_out
        self.order(seed=0)  # refuses what the clips do not suffice for
        self.clips_per_epoch = self.drawing.clips_per_epoch(self.corpus)
        rates = self.corpus.rates_hz
        self.rate_hz = rate_hz or (rates[0] if len(rates) == 1 else default_rate_hz)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.crop_seconds = crop_seconds
        self.padding = padding
        self.cache_bytes = cache_mb * 2**20
        self.mean, self.std = mean, std
        self.default_rate_hz = default_rate_hz
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.corpus_hash = self.corpus.hash
        self.num_clips, self.num_validation_clips = len(self.clips), len(self.held_out)
        self.hours = float(self.index.seconds[self.clips].sum(dtype=np.float64)) / 3600

    def order(self, seed: int) -> Order:
        """Build the order of a run's clips, as positions in `clips`."""
        return self.drawing.order(self.corpus, self._weights, seed)

    def describe_epoch(self) -> str:
        """Say what an epoch holds where it is not each clip once; "" where it is."""
        corpus, notes = self.corpus, []
        if self.clips_per_epoch != self.num_clips:
            notes.append(f"of {self.clips_per_epoch} draws")
        if corpus.names[0]:
            parts = zip(corpus.names, corpus.shares, corpus.pools, strict=True)
            notes += [f"{name}: {share:.1%} of the draws from {len(pool)} clips" for name, share, pool in parts]
        if self._weights is not None and (idle := sum(int((weights == 0).sum()) for weights in self._weights)):
            notes.append(f"{idle} clips without a label never come")
        return f" ({', '.join(notes)})" if notes else ""

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
    ) -> Loader:
        """Serve a rank's micro-batches of the optimiser steps `start_step` up to `max_steps`.

        `crop_samples` at `rate_hz`, None for `crop_seconds`. The length counts from step 0 (`StepSampler`).
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
        return make_loader(
            self._dataset(crop_samples, self.num_workers),
            Requests(sampler, self.index, self.clips, seed),
            num_workers=self.num_workers,
            bad_clips=self._bad_clips(rank),
        )

    def validation_loader(self, *, rank: int, world_size: int, crop_samples: int | None = None) -> Loader | None:
        """Serve the middle crops of the clips held out, always in the same order; None where there are none."""
        if not self.num_validation_clips:
            return None
        sampler = FixedSampler(
            num_clips=self.num_validation_clips, batch_size=self.batch_size, rank=rank, world_size=world_size
        )
        num_workers = min(1, self.num_workers)
        return make_loader(
            self._dataset(crop_samples, num_workers),
            Requests(sampler, self.index, self.held_out, None),
            num_workers=num_workers,
            bad_clips=self._bad_clips(rank),
            is_iterated_often=True,
        )

    def example_clips(self, num_clips: int) -> list[tuple[str, torch.Tensor]]:
        """Pick clips to look at, one of each kind in turn: name and waveform (S,) float32 at `default_rate_hz`.

        The kind is what the clip's json says (`kind`), else its labels. From the clips held out where there are some;
        at most 30 s of each; an unreadable clip is passed over with a line in the log.
        """
        pool = self.held_out if self.num_validation_clips else self.clips
        by_kind: dict[str, list[int]] = {}
        for i in self.corpus.some_of(pool, 1000) if num_clips else []:
            kind = self.index.read_meta(i).get("kind") or ", ".join(self.index.labels(i))
            by_kind.setdefault(str(kind), []).append(i)
        depth = max(map(len, by_kind.values()), default=0)
        turns = [(k, i) for turn in range(depth) for k, clips in by_kind.items() for i in clips[turn : turn + 1]]
        examples = []
        for kind, i in turns:
            if len(examples) == num_clips:
                break
            try:
                examples.append((f"{kind}: {self.index.key(i)}".removeprefix(": "), self._waveform(i)))
            except AudioError as error:
                log.warning("%s in %s makes no picture: %s", self.index.key(i), self.index.shard_path(i), error)
        return examples

    def _waveform(self, i: int) -> torch.Tensor:
        rate_hz = int(self.index.rate_hz[i])
        num_frames = min(int(self.index.num_frames[i]), int(MAX_EXAMPLE_SECONDS * rate_hz))
        waveform, rate_hz = decode(self.index.read(i), 0, num_frames)
        return torch.from_numpy(resample(waveform, rate_hz, self.default_rate_hz))

    def _dataset(self, crop_samples: int | None, num_workers: int) -> ClipDataset:
        if crop_samples is None:
            if self.crop_seconds is None:
                raise UserError("data.crop_seconds is null and no crop_samples are given; say how long a crop is")
            crop_samples = round(self.crop_seconds * self.rate_hz)
        return ClipDataset(
            rate_hz=self.rate_hz,
            crop_samples=crop_samples,
            padding=self.padding,
            cache_bytes=self.cache_bytes // max(1, num_workers),
        )

    def _bad_clips(self, rank: int) -> BadClips:
        name = "bad_clips.csv" if rank == 0 else f"bad_clips_rank{rank}.csv"
        return BadClips(None if self.run_dir is None else self.run_dir / name)


def _check(settings: dict) -> None:
    """Check values and how they go together, with the config's own rules."""
    for name, least in AT_LEAST.items():
        if settings[name] is not None and settings[name] < least:
            raise UserError(f"data.{name}={settings[name]}: must be {least:g} or more")
    sources = settings["sources"] or {}
    values = {f"data.{name}": value for name, value in settings.items() if name != "sources"}
    values |= {f"data.sources.{name}.{key}": value for name, entry in sources.items() for key, value in entry.items()}
    for key, value in values.items():
        check_value(key, value)
    check_drawing(values)
