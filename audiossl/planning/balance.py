"""How evenly are clips and shards shared out over ranks and workers?

Clips are dealt out one by one from the whole corpus and not shard by shard (`loading/order.py`), so nobody runs short.
What differs is how many shards a worker has to open. Both are counted here in the order that the run will use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audiossl.loading.order import Order


@dataclass(frozen=True)
class Balance:
    """Hold what the workers of all ranks get in the first epoch, as (fewest, most)."""

    workers: int
    shards: int
    clips_per_worker: tuple[int, int]
    shards_per_worker: tuple[int, int]


def balance_of(
    order: Order, shard: np.ndarray, *, devices: int, workers: int, batch_size: int, accumulate: int
) -> Balance:
    """Deal out the first epoch as the loaders do: micro-batches to ranks, and a rank's in turn to its `workers`.

    `shard` (C,) says where each clip of the order lies. Without workers the rank itself counts as one.
    """
    workers, positions = max(workers, 1), np.arange(order.epoch_length)
    clips = order.at(positions)[1]
    step, row = np.divmod(positions, batch_size * devices * accumulate)
    micro_batch, rest = np.divmod(row, batch_size * devices)
    reader = rest // batch_size * workers + (step * accumulate + micro_batch) % workers
    counts = np.bincount(reader, minlength=devices * workers)
    _, shards = np.unique(shard, return_inverse=True)
    num_shards = int(shards.max()) + 1
    opened = np.unique(reader.astype(np.int64) * num_shards + shards[clips])
    per_reader = np.bincount(opened // num_shards, minlength=devices * workers)
    return Balance(
        workers=devices * workers,
        shards=num_shards,
        clips_per_worker=(int(counts.min()), int(counts.max())),
        shards_per_worker=(int(per_reader.min()), int(per_reader.max())),
    )
