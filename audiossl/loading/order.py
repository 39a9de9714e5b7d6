"""Which clip comes when?

The stream of clips is endless, one epoch after another; an `Order` says what an epoch holds, a function of (seed,
epoch) alone: one permutation of all clips (`Shuffled`), the same window by window of shards (`ShardWindows`), weighted
draws (`sampling.Weighted`) or a mixture of corpora (`mixture.Mixed`). Optimiser step s takes the stream's positions
[s * G, (s + 1) * G), G being the global batch, and every rank and micro-batch takes its rows of it. So nothing has to
be remembered but the number of steps done: a run resumed at any step, or continued on another number of ranks, workers
or accumulated batches with the same G, meets the very same global batches.

What happens to the tail: nothing is dropped and nothing is padded. Where N clips are no multiple of G, the step at the
end of an epoch takes the last clips of one permutation and the first of the next; each clip comes exactly once per
epoch, and every rank has equally many batches of equal size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from audiossl.noise import mix_seed

Request = tuple[int, int, int]  # (row of the global batch, turn, clip)


def random_words(num: int, *parts: int | str) -> np.ndarray:
    """Draw uint64 words that depend on `parts` alone: numpy promises Philox's raw words, and not its own shuffles."""
    return np.random.Philox(key=mix_seed(*parts)).random_raw(num)


def clip_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """Permute the clips of an epoch: (num_clips,) int64."""
    return np.argsort(random_words(num_clips, seed, "order", epoch), kind="stable")


class Order(ABC):
    """Give the clips of an endless stream by their positions; a subclass says what each epoch holds.

    `epoch_length` counts the positions of an epoch. A clip's `turn` tells its visits apart: (turn, clip) comes once in
    the whole stream, so a crop drawn from it is never the same one again.
    """

    def __init__(self, epoch_length: int):
        assert epoch_length > 0
        self.epoch_length = epoch_length
        self._recent = lru_cache(maxsize=2)(self.epoch)  # a step that straddles two epochs needs both

    @abstractmethod
    def epoch(self, epoch: int) -> tuple[np.ndarray | int, np.ndarray]:
        """List an epoch: the turns, or the one turn of all, and the clips (epoch_length,) int64."""

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up ascending positions (P,) int64 of the stream: two int64 arrays of their shape, turn and clip."""
        epochs, places = np.divmod(positions, self.epoch_length)
        turns, clips = np.empty_like(places), np.empty_like(places)
        there, starts = np.unique(epochs, return_index=True)
        for epoch, start, end in zip(there.tolist(), starts, [*starts[1:], len(places)], strict=True):
            here = slice(start, end)
            epoch_turns, epoch_clips = self._recent(epoch)
            turns[here] = epoch_turns if isinstance(epoch_turns, int) else epoch_turns[places[here]]
            clips[here] = epoch_clips[places[here]]
        return turns, clips


class Shuffled(Order):
    """Give each clip once per epoch, in a new permutation each; the turn is the epoch."""

    def __init__(self, num_clips: int, *, seed: int):
        super().__init__(num_clips)
        self.seed = seed

    def epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Permute all clips."""
        return epoch, clip_order(self.epoch_length, self.seed, epoch)


class ShardWindows(Order):
    """Give each clip once per epoch, a few shards at a time, for storage where jumping between shards is dear.

    `shard` (C,) says which shard each clip lies in. Each epoch permutes the shards, cuts that into windows of
    `num_shards`, and permutes the clips within each window.
    """

    def __init__(self, shard: np.ndarray, *, num_shards: int, seed: int):
        assert num_shards > 0
        super().__init__(len(shard))
        self.shards, self._place, self._sizes = np.unique(shard, return_inverse=True, return_counts=True)
        self.num_shards = num_shards
        self.seed = seed

    def _shard_order(self, epoch: int) -> np.ndarray:
        return np.argsort(random_words(len(self.shards), self.seed, "shards", epoch), kind="stable")

    def epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Permute the clips window by window."""
        window = np.empty(len(self.shards), np.int32)
        window[self._shard_order(epoch)] = np.arange(len(self.shards), dtype=np.int32) // self.num_shards
        words = random_words(self.epoch_length, self.seed, "order", epoch)
        return epoch, np.lexsort((words, window[self._place]))

    def shards_ahead(self, position: int) -> Iterator[list[int]]:
        """Yield the shards of the window that `position` of the stream lies in, then those of each window after it."""
        epoch, place = divmod(position, self.epoch_length)
        while True:
            order = self._shard_order(epoch)
            ends = np.cumsum(self._sizes[order])
            for first in range(0, len(order), self.num_shards):
                here = order[first : first + self.num_shards]
                if place < ends[first + len(here) - 1]:
                    yield self.shards[here].tolist()
            epoch, place = epoch + 1, 0


def rows_of(micro_batch: int, *, rank: int, world_size: int, batch_size: int) -> range:
    """Name the rows of the global batch that one rank takes in one micro-batch."""
    first = (micro_batch * world_size + rank) * batch_size
    return range(first, first + batch_size)


class StepSampler:
    """Yield, for each micro-batch of one rank, its list of (row, turn, clip), from `start_step` up to `max_steps`.

    The length counts from step 0 whatever `start_step` is: on resume Lightning restores the number of batches done,
    adds to it what the fresh iterator gives, and takes the loader as finished at its length (`training_epoch_loop.py`,
    `on_run_start`). So one Lightning "epoch" is the whole run, and our epochs are those of `order`.
    """

    def __init__(
        self,
        *,
        order: Order,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        max_steps: int,
        start_step: int,
    ):
        assert 0 <= rank < world_size and min(batch_size, accumulate) > 0 and start_step >= 0
        self.order = order
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.max_steps = max_steps
        self.start_step = start_step

    @property
    def global_batch(self) -> int:
        """Count the clips of an optimiser step."""
        return self.batch_size * self.accumulate * self.world_size

    def batch(self, number: int) -> list[Request]:
        """List this rank's micro-batch `number`, counted from step 0."""
        step, micro_batch = divmod(number, self.accumulate)
        rows = rows_of(micro_batch, rank=self.rank, world_size=self.world_size, batch_size=self.batch_size)
        turns, clips = self.order.at(step * self.global_batch + np.asarray(rows))
        return list(zip(rows, turns.tolist(), clips.tolist(), strict=True))

    @property
    def first(self) -> int:
        """Number the first micro-batch that is yielded."""
        return self.start_step * self.accumulate

    def __iter__(self) -> Iterator[list[Request]]:
        for number in range(self.first, len(self)):
            yield self.batch(number)

    def __len__(self) -> int:
        return self.max_steps * self.accumulate


class FixedSampler:
    """Yield the clips once and in order, for validation: every rank the same number of batches.

    Global batch s holds the positions [s * G, (s + 1) * G), G = batch_size * world_size; a rank takes every
    world_size-th row, so the short last batch is shared out evenly and only a tail of fewer clips than ranks leaves a
    rank with an empty batch.
    """

    first = 0

    def __init__(self, *, num_clips: int, batch_size: int, rank: int, world_size: int):
        assert 0 <= rank < world_size and batch_size > 0
        self.num_clips = num_clips
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    @property
    def global_batch(self) -> int:
        """Count the clips of a validation step."""
        return self.batch_size * self.world_size

    def batch(self, number: int) -> list[Request]:
        """List this rank's batch `number`."""
        first = number * self.global_batch
        num_rows = min(self.global_batch, self.num_clips - first)
        return [(row, 0, first + row) for row in range(self.rank, num_rows, self.world_size)]

    def __iter__(self) -> Iterator[list[Request]]:
        for number in range(len(self)):
            yield self.batch(number)

    def __len__(self) -> int:
        return -(-self.num_clips // self.global_batch)
