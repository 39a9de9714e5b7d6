"""How are shards on another machine here before a worker asks for them?

A thread of the trainer looks through the batches to come and downloads their shards in order, as far ahead as the cache
has room for; what it has not done when a worker gets there, the worker does. What the first batch needs is downloaded
before training starts, with a bar of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.remote.location import RemoteShard
from audiossl.remote.shardcache import GB

if TYPE_CHECKING:
    from audiossl.index import Index
    from audiossl.loading.loader import Requests

FILL = 0.9  # of the cache, by what lies ahead
SAY_SECONDS = 30.0
WAIT_SECONDS = 0.2


class Downloads:
    """Download what `requests` will need of `remote`, shards by name; start at a batch, be told of each one reached."""

    def __init__(self, requests: Requests, remote: Mapping[str, RemoteShard]):
        self.requests, self.remote = requests, remote
        self.cache = next(iter(remote.values())).cache
        self._reached = 0
        self._is_over = threading.Event()
        self._said = 0.0

    def fetch_first(self) -> None:
        """Download the shards of the first batch, showing a bar for each; raises UserError where one cannot be had."""
        if self.requests.first < len(self.requests):
            for name in self._shards_of(self.requests.first):
                os.close(self.remote[name].open())

    def start(self, number: int) -> None:
        """Begin to download ahead of batch `number`, in the background."""
        self._reached = number
        self._is_over = threading.Event()
        threading.Thread(target=self._run, args=(number, self._is_over), daemon=True, name="downloads").start()

    def reached(self, number: int) -> None:
        """Note that the batches before `number` have been served."""
        self._reached = number

    def stop(self) -> None:
        """Begin no other download."""
        self._is_over.set()

    def are_moving(self) -> bool:
        """Tell whether anything is being downloaded into this cache, so that waiting makes sense; say so now and then.

        Downloads of other runs count too: they may be what a worker waits for.
        """
        arriving = self.cache.arriving()
        if arriving and time.monotonic() > self._said + SAY_SECONDS:
            self._said = time.monotonic()
            names = {shard.sha256: shard.name for shard in self.remote.values()}
            parts = [
                f"{names.get(sha256, 'a shard')} {have / GB:.2f} of {total / GB:.2f} GB"
                for sha256, (have, total) in list(arriving.items())[:4]
            ]
            tqdm.write(f"waiting for downloads: {', '.join(parts)}")
        return bool(arriving)

    def _shards_of(self, number: int) -> list[str]:
        names = dict.fromkeys(request.shard for request in self.requests.batch(number))
        return [name for name in names if name in self.remote]

    def _run(self, first: int, is_over: threading.Event) -> None:
        last_use: dict[str, int] = {}
        seen: set[str] = set()
        has_room_for_all = sum(shard.num_bytes for shard in self.remote.values()) <= FILL * self.cache.max_bytes
        for number in range(first, len(self.requests)):
            for name in self._shards_of(number):
                last_use[name] = number
                while not is_over.is_set() and self._is_full(last_use, name):
                    time.sleep(WAIT_SECONDS)
                if is_over.is_set():
                    return
                if name not in seen or not self.remote[name].is_here:
                    seen.add(name)
                    try:
                        os.close(self.remote[name].open())
                    except UserError:  # the worker that needs it will say so
                        return
            if has_room_for_all and len(seen) == len(self.remote):
                return

    def _is_full(self, last_use: dict[str, int], name: str) -> bool:
        """Forget shards that no batch looked at needs any more; tell whether the others leave no room for `name`."""
        for old in [old for old, number in last_use.items() if number < self._reached and old != name]:
            del last_use[old]
        ahead = sum(self.remote[other].num_bytes for other in last_use)
        return len(last_use) > 1 and ahead > FILL * self.cache.max_bytes


def remote_shards(index: Index) -> dict[str, RemoteShard]:
    """Pick the shards of an index that have to be downloaded, by name."""
    return {str(shard): shard for shard in index.shards if isinstance(shard, RemoteShard)}


def check_room(index: Index, clips: np.ndarray, held_out: np.ndarray, shuffle_shards: int | None) -> None:
    """Refuse an order that would download the same shards again and again, in a line that says what to change."""
    remote = [shard if isinstance(shard, RemoteShard) else None for shard in index.shards]
    trained_on, validated_on = (_sizes(remote, np.unique(index.shard[rows])) for rows in (clips, held_out))
    if not (trained_on or validated_on):
        return
    room = next(shard for shard in remote if shard is not None).cache.max_bytes
    both = _sizes(remote, np.unique(index.shard[np.concatenate([clips, held_out])]))
    if sum(both) <= room:
        return
    what = f"{len(both)} remote shards of {sum(both) / GB:.3g} GB do not fit into data.cache_gb={room / GB:g}"
    left = room - sum(validated_on)
    if left < max(trained_on, default=0):
        raise UserError(
            f"{what}, and the {len(held_out)} validation clips alone lie in {len(validated_on)} of them; lower "
            "data.validation_clips or raise data.cache_gb"
        )
    fitting = int(np.searchsorted(np.cumsum(sorted(trained_on, reverse=True)), left, side="right"))
    if shuffle_shards is None or shuffle_shards > fitting:
        now = "a shuffle over all of them" if shuffle_shards is None else f"data.shuffle_shards={shuffle_shards}"
        raise UserError(
            f"{what}, and {now} would download each many times an epoch; set "
            f"data.shuffle_shards={max(1, fitting // 2)} (at most {fitting}) or raise data.cache_gb"
        )


def _sizes(remote: list[RemoteShard | None], numbers: np.ndarray) -> list[int]:
    return [shard.num_bytes for number in numbers.tolist() if (shard := remote[number]) is not None]
