"""How does a folder of shards become batches of waveforms?

`ShardData` loads the index, holds out validation clips, and makes the loaders of a rank. Which clip comes when is a
function of (seed, epoch) and the step (`order.py`); how a clip is read and cut is in `clips.py`; workers and time-outs
are in `loader.py`, the list of bad clips in `badclips.py`. Rank and world size are passed in, never asked for.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from audiossl.audio import AudioError, decode, resample
from audiossl.badclips import BadClips, Entry
from audiossl.clips import ClipDataset
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.loader import Loader, Requests, make_loader
from audiossl.order import FixedSampler, StepSampler

log = logging.getLogger(__name__)

MAX_EXAMPLE_SECONDS = 30.0
AT_LEAST = {"batch_size": 1, "rate_hz": 1, "crop_seconds": 1e-4, "max_bad_in_a_row": 1, "timeout_seconds": 1}  # else 0


class ShardData:
    """Make loaders of the clips in `shards`: a glob of tars, or a folder or file with their index.

    - rate_hz: of the waveforms delivered; null takes the clips' own rate where they share one, else `default_rate_hz`
      (the front end's). Clips of another rate are resampled in the workers.
    - batch_size: clips per process and micro-batch. num_workers: decoding processes, 0 for none.
    - crop_seconds: of each clip, null for what the front end's frames need; longer clips are cut at random, shorter
      ones repeated (padding "cyclic") or filled up with silence ("zeros").
    - split: train on this split only, null for all clips. validation_clips: as many of those are held out, chosen by a
      hash of their keys, so always the same ones.
    - cache_mb: decoded audio to keep, shared out among the workers.
    - damaged_shards: "stop" where a shard is missing or has another size than the index says, or "skip" its clips.
    - max_bad_fraction: of the corpus, and max_bad_in_a_row: clips skipped before the run stops (`badclips.py`).
    - timeout_seconds: to wait for a batch before a worker is taken to hang; without workers nothing can watch.
    - mean, std: of the corpus' log-mel, for front ends that normalise by them.
    - run_dir: where `bad_clips.csv` goes, null for nowhere.

    Attributes: index, clips and held_out (arrays of clips of the index), rate_hz, corpus_hash, num_clips,
    num_validation_clips, hours, bad_clips (this rank's ledger). Raises UserError for shards that are missing or without
    an index, an unknown split, and values out of range.
    """

    def __init__(
        self,
        *,
        shards: str,
        rate_hz: int | None,
        batch_size: int,
        num_workers: int,
        crop_seconds: float | None,
        padding: Literal["cyclic", "zeros"],
        validation_clips: int,
        split: str | None,
        cache_mb: int,
        damaged_shards: Literal["stop", "skip"],
        max_bad_fraction: float,
        max_bad_in_a_row: int,
        timeout_seconds: float,
        mean: float,
        std: float,
        default_rate_hz: int,
        run_dir: str | Path | None,
    ):
        given = dict(batch_size=batch_size, rate_hz=rate_hz, crop_seconds=crop_seconds, num_workers=num_workers)
        given |= dict(cache_mb=cache_mb, validation_clips=validation_clips, max_bad_fraction=max_bad_fraction)
        _check_ranges(given | dict(max_bad_in_a_row=max_bad_in_a_row, timeout_seconds=timeout_seconds))
        self.index = Index.load(shards, damaged_shards)
        if len(self.index) == 0:
            raise UserError(f"data.shards={shards}: 0 clips in {len(self.index.shards)} shards; nothing to train on")
        chosen = self.index.select(split=split)
        if validation_clips >= len(chosen):
            raise UserError(
                f"data.validation_clips={validation_clips}: only {len(chosen)} clips are there, and some must train"
            )
        lost = np.fromiter(self.index.lost, np.int64)
        self.clips, self.held_out = (_without(clips, lost) for clips in _hold_out(self.index, chosen, validation_clips))
        self.rate_hz = rate_hz or _common_rate(self.index, chosen) or default_rate_hz
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.crop_seconds = crop_seconds
        self.padding = padding
        self.cache_bytes = cache_mb * 2**20
        self.mean = mean
        self.std = std
        self.default_rate_hz = default_rate_hz
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.timeout_seconds = timeout_seconds
        self.corpus_hash = _hash_of(self.index, lost)
        self.num_clips = len(self.clips)
        self.num_validation_clips = len(self.held_out)
        self.hours = float(self.index.seconds[self.clips].sum(dtype=np.float64)) / 3600
        self.bad_clips = BadClips(self.run_dir, len(self.index), len(chosen), max_bad_fraction, max_bad_in_a_row)
        self._list_lost(lost[np.isin(lost, chosen)])

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
            num_clips=self.num_clips,
            batch_size=self.batch_size,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            seed=seed,
            max_steps=max_steps,
            start_step=start_step,
        )
        return make_loader(
            self._dataset(crop_samples, self.num_workers),
            Requests(sampler, self.index, self.clips, seed),
            num_workers=self.num_workers,
            bad_clips=self._ledger_of(rank, world_size),
            timeout_seconds=self.timeout_seconds,
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
            bad_clips=self._ledger_of(rank, world_size),
            timeout_seconds=self.timeout_seconds,
            is_iterated_often=True,
        )

    def example_clips(self, num_clips: int) -> list[tuple[str, torch.Tensor]]:
        """Pick clips to look at, one of each kind in turn: name and waveform (S,) float32 at `default_rate_hz`.

        The kind is what the clip's json says (`kind`), else its labels. From the clips held out where there are some;
        at most 30 s of each; an unreadable clip is passed over with a line in the log.
        """
        pool = self.held_out if self.num_validation_clips else self.clips
        by_kind: dict[str, list[int]] = {}
        for i in pool[:1000].tolist() if num_clips else []:
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

    def _list_lost(self, lost: np.ndarray) -> None:
        """Account for clips that are gone with their shards, before anything is trained."""
        index = self.index
        self.bad_clips.lose((i, Entry(index.key(i), str(index.shard_path(i)), index.lost[i])) for i in lost.tolist())
        if len(lost):
            shards = len(np.unique(index.shard[lost]))
            log.warning("%d clips are lost with %d damaged shards: %s", len(lost), shards, self.bad_clips.path)
        if not self.num_clips:
            raise UserError(f"0 clips to train on are left of {self.bad_clips.num_clips}: the rest is held out or lost")

    def _ledger_of(self, rank: int, world_size: int) -> BadClips:
        self.bad_clips.at_rank(rank, world_size)
        return self.bad_clips


def _check_ranges(given: dict[str, float | None]) -> None:
    for name, value in given.items():
        if value is not None and value < (least := AT_LEAST.get(name, 0)):
            raise UserError(f"data.{name}={value}: must be {least:g} or more")


def _hold_out(index: Index, chosen: np.ndarray, num_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Split clips into those to train on and `num_clips` held out, by a hash that knows nothing of seed and corpus."""
    if num_clips == 0:
        return chosen, chosen[:0]
    keys = (index.key(i).encode("utf-8", "surrogateescape") for i in chosen.tolist())
    hashes = np.fromiter(map(zlib.crc32, keys), np.int64, len(chosen))
    is_held_out = np.zeros(len(chosen), bool)
    is_held_out[np.argsort(hashes, kind="stable")[:num_clips]] = True
    return chosen[~is_held_out], chosen[is_held_out]


def _without(clips: np.ndarray, lost: np.ndarray) -> np.ndarray:
    return clips[~np.isin(clips, lost)] if len(lost) else clips


def _hash_of(index: Index, lost: np.ndarray) -> str:
    """Hash what can be trained on: a run whose shards come back is not the same run, its order being another."""
    if not len(lost):
        return index.corpus_hash
    return hashlib.sha256(index.corpus_hash.encode() + lost.astype("<i8").tobytes()).hexdigest()


def _common_rate(index: Index, clips: np.ndarray) -> int | None:
    rates = np.unique(index.rate_hz[clips])
    return int(rates[0]) if len(rates) == 1 else None
