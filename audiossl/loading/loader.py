"""How do batches reach the trainer, and what happens when they do not?

Clips are decoded by worker processes (`workers.py`), straight into memory that they share with the trainer
(`handover.py`). A clip that cannot be read is counted here, in the trainer; a worker that dies or hangs becomes one
clear line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.loading.badclips import BadClips
from audiossl.loading.clips import ClipDataset, ClipRequest
from audiossl.loading.handover import Ring, collate, make_ring
from audiossl.loading.order import FixedSampler, StepSampler
from audiossl.loading.workers import Watch, fork_server, start_worker
from audiossl.noise import mix_seed
from audiossl.remote.prefetch import Downloads

GRACE_SECONDS = 1.0  # before workers that keep the trainer waiting are killed
POLL_SECONDS = 5  # how soon a dead worker is noticed


class Requests:
    """Turn a sampler's (row, turn, clip) into requests that a worker can answer without the index.

    `clips` (C,) are the index's clips that the sampler counts through. The crop of a clip is drawn from (seed, turn,
    clip); with `seed` None every crop is the middle one. `with_labels` sends the clips' labels along.
    """

    def __init__(
        self,
        sampler: StepSampler | FixedSampler | None,
        index: Index,
        clips: np.ndarray,
        seed: int | None,
        *,
        with_labels: bool = False,
    ):
        self.sampler = sampler
        self.index = index
        self.clips = clips
        self.seed = seed
        self.num_classes = len(index.vocabulary) if with_labels else None
        self.shards = [str(shard) for shard in index.shards]

    def batch(self, number: int) -> list[ClipRequest]:
        """List micro-batch `number`, counted from step 0."""
        return [self.request(*entry) for entry in self.sampler.batch(number)]

    def request(self, row: int, turn: int, clip: int) -> ClipRequest:
        """Say where the clip lies and what its crop is drawn from."""
        i = int(self.clips[clip])
        return ClipRequest(
            row=row,
            clip=i,
            draw=None if self.seed is None else mix_seed(self.seed, "crop", turn, clip),
            key=self.index.key(i),
            member=f"{self.index.member_key(i)}.{self.index.extension(i)}",
            shard=self.shards[self.index.shard[i]],
            offset=int(self.index.offset[i]),
            size=int(self.index.size[i]),
            num_frames=int(self.index.num_frames[i]),
            rate_hz=int(self.index.rate_hz[i]),
            extension=self.index.extension(i),
            labels=None if self.num_classes is None else tuple(self.index.label_ids(i).tolist()),
        )

    def clips_of(self, number: int) -> dict[int, int]:
        """Map the rows of micro-batch `number` to the index's clips."""
        return {row: int(self.clips[clip]) for row, _, clip in self.sampler.batch(number)}

    @property
    def first(self) -> int:
        """Number the first batch that is yielded."""
        return self.sampler.first

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        for number in range(self.first, len(self)):
            yield self.batch(number)

    def __len__(self) -> int:
        return len(self.sampler)


class Loader:
    """Iterate over the `Batch`es of a DataLoader, counting bad clips and wording what goes wrong in the workers.

    It is no DataLoader itself, so Lightning leaves its sampler alone. `len` is the sampler's, which counts from step 0.
    Raises UserError for too many bad clips, a worker that died, and a batch that took more than `timeout_seconds`.
    """

    def __init__(
        self, loader: DataLoader, *, timeout_seconds: float, bad_clips: BadClips, downloads: Downloads | None = None
    ):
        self.loader = loader
        self.timeout_seconds = timeout_seconds
        self.bad_clips = bad_clips
        self.downloads = downloads
        self._has_started, self._ring = False, None

    def __len__(self) -> int:
        return len(self.loader.batch_sampler)

    def state_dict(self) -> dict:
        """Have nothing to save, the position being a function of the step; Lightning warns where this is missing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept what `state_dict` gave."""
        assert not state

    def __iter__(self) -> Iterator[Batch]:
        (batches, ring), requests = self._start(), self.loader.batch_sampler
        number = requests.first
        watch = Watch(batches._workers if self.loader.num_workers else [])
        if self.downloads is not None:
            self.downloads.start(number)
        try:
            while (batch := self._next(batches, number, watch)) is not None:
                self.bad_clips.add(batch, requests.clips_of(number), is_training=requests.seed is not None)
                yield batch
                number += 1
                if self.downloads is not None:
                    self.downloads.reached(number)
        except Exception:
            # the traceback keeps `batches` alive, and workers that end only when it is collected take seconds each
            if self.loader.num_workers:
                with watch.limit(GRACE_SECONDS):
                    batches._shutdown_workers()
            raise
        finally:
            watch.end()
            if self.downloads is not None:
                self.downloads.stop()
            if ring is not None and not self.loader.persistent_workers:
                del batches  # its workers end
                ring.close()

    def _start(self) -> tuple[Iterator[Batch], Ring | None]:
        """Start the workers, unless they are kept from the last time, with slots to put batches into."""
        loader, requests = self.loader, self.loader.batch_sampler
        if loader.num_workers and not (self._has_started and loader.persistent_workers):
            self._has_started = True
            num_clips = len(requests.batch(requests.first)) if requests.first < len(requests) else 1
            slot_bytes = 2 * num_clips * loader.dataset.crop_samples
            self._ring = make_ring(loader.num_workers, loader.prefetch_factor, slot_bytes)
            loader.worker_init_fn = partial(start_worker, environment=dict(os.environ), ring=self._ring)
        return iter(loader), self._ring

    def _next(self, batches: Iterator[Batch], number: int, watch: Watch) -> Batch | None:
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                with watch.limit(deadline + GRACE_SECONDS - time.monotonic()):
                    return next(batches, None)
            except UserError as error:  # raised in a worker: torch wraps it in the worker's traceback
                raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
            except (OSError, EOFError) as error:  # it died while it handed over a batch
                if watch.has_killed:
                    raise self._explained(RuntimeError("timed out"), number) from error
                raise self._explained(RuntimeError(f"a worker exited unexpectedly ({error!r})"), number) from error
            except RuntimeError as error:
                if "timed out" in str(error):
                    if self.downloads is not None and self.downloads.are_moving():
                        deadline = time.monotonic() + self.timeout_seconds
                    if time.monotonic() < deadline:
                        continue  # it only looked whether all workers are alive
                raise self._explained(RuntimeError("timed out") if watch.has_killed else error, number) from error

    def _explained(self, error: RuntimeError, number: int) -> Exception:
        if "exited unexpectedly" in str(error):
            return UserError(
                f"{error}: killed from outside, as a rule for memory (or a full /dev/shm); "
                "lower data.num_workers, data.cache_mb or data.batch_size and resume with ckpt=last"
            )
        if "timed out" in str(error):
            shards = sorted({request.shard for request in self.loader.batch_sampler.batch(number)})
            return UserError(
                f"no batch within {self.timeout_seconds:.0f} s: a worker hangs reading one of {len(shards)} shards "
                f"({', '.join(shards[:3])}); look at the file system, then resume with ckpt=last"
            )
        return error


def make_loader(
    dataset: ClipDataset,
    requests: Requests,
    *,
    num_workers: int,
    bad_clips: BadClips,
    timeout_seconds: float,
    prefetch: int = 4,
    is_iterated_often: bool = False,
    downloads: Downloads | None = None,
) -> Loader:
    """Serve the batches of `requests`, a batch sampler of lists of `ClipRequest`, by `num_workers` processes.

    0 workers decode in the calling process, where no time-out can interrupt a read that hangs. `prefetch` is in batches
    per worker. `is_iterated_often` keeps the workers and their caches from one iteration to the next. `downloads`
    brings remote shards.
    """
    # torch restarts kept workers within one time-out, which a busy machine may need more of
    poll_seconds = 6 * POLL_SECONDS if is_iterated_often else POLL_SECONDS
    return Loader(
        DataLoader(
            dataset,
            batch_sampler=requests,
            num_workers=num_workers,
            collate_fn=partial(collate, crop_samples=dataset.crop_samples, num_classes=requests.num_classes),
            pin_memory=torch.cuda.is_available() and not dataset.resident,
            timeout=poll_seconds if num_workers else 0,
            multiprocessing_context=fork_server() if num_workers else None,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=is_iterated_often and num_workers > 0,
        ),
        timeout_seconds=timeout_seconds,
        bad_clips=bad_clips,
        downloads=downloads,
    )
