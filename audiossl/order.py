"""Which clip comes when?

The stream of clips is one permutation after another, one per epoch, each a function of (seed, epoch) alone. Optimiser
step s takes the stream's positions [s * G, (s + 1) * G), G being the global batch, and every rank and micro-batch takes
its rows of it. So nothing has to be remembered but the number of steps done: a run resumed at any step, or continued on
another number of ranks, workers or accumulated batches with the same G, meets the very same global batches.

What happens to the tail: nothing is dropped and nothing is padded. Where N clips are no multiple of G, the step at the
end of an epoch takes the last clips of one permutation and the first of the next; each clip comes exactly once per
epoch, and every rank has equally many batches of equal size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from audiossl.noise import mix_seed

Request = tuple[int, int, int]  # (row of the global batch, epoch, clip)


@lru_cache(maxsize=2)  # a step that straddles two epochs needs both
def clip_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """Permute the clips of an epoch: (num_clips,) int64.

    Sorted by Philox's raw words, because numpy promises those (and not its own shuffles) to stay as they are.
    """
    words = np.random.Philox(key=mix_seed(seed, "order", epoch)).random_raw(num_clips)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def clips_at(positions: np.ndarray, num_clips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Look up stream positions: two int64 arrays of their shape, epoch and clip."""
    epochs, places = np.divmod(positions, num_clips)
    clips = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        clips[here] = clip_order(num_clips, seed, int(epoch))[places[here]]
    return epochs, clips


def rows_of(micro_batch: int, *, rank: int, world_size: int, batch_size: int) -> range:
    """Name the rows of the global batch that one rank takes in one micro-batch."""
    first = (micro_batch * world_size + rank) * batch_size
    return range(first, first + batch_size)


class StepSampler:
    """Yield, for each micro-batch of one rank, its list of (row, epoch, clip), from `start_step` up to `max_steps`.

    The length counts from step 0 whatever `start_step` is: on resume Lightning restores the number of batches done,
    adds to it what the fresh iterator gives, and takes the loader as finished at its length (`training_epoch_loop.py`,
    `on_run_start`). So one Lightning "epoch" is the whole run, and our epochs are those of `clip_order`.
    """

    def __init__(
        self,
        *,
        num_clips: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        max_steps: int,
        start_step: int,
    ):
        assert num_clips > 0 and 0 <= rank < world_size and min(batch_size, accumulate) > 0 and start_step >= 0
        self.num_clips = num_clips
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
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
        epochs, clips = clips_at(step * self.global_batch + np.asarray(rows), self.num_clips, self.seed)
        return list(zip(rows, epochs.tolist(), clips.tolist(), strict=True))

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
