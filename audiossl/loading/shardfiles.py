"""How are bytes of shards read, when there are more shards than a process may hold open?"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping

from audiossl.errors import UserError
from audiossl.remote.location import RemoteShard
from audiossl.remote.shardcache import mark_used
from audiossl.sound.audio import AudioError

MAX_OPEN_SHARDS = 32
MARK_SECONDS = 5.0  # how often a shard that is read is marked as used


class ShardFiles:
    """Read bytes of shards, keeping the files used last open; those in `remote`, by name, are downloaded when absent.

    `pread` moves no shared position, so processes that inherited a descriptor do not disturb each other.
    """

    def __init__(self, remote: Mapping[str, RemoteShard] | None = None):
        self._open: OrderedDict[str, int] = OrderedDict()
        self._remote = remote or {}
        self._marked: dict[str, float] = {}

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset`; raise AudioError where the shard ends early, UserError where it is gone."""
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be read: {error.strerror}; bring it back and resume") from error
        if len(data) < size:
            raise AudioError(f"its shard ends at byte {offset + len(data)} of the {offset + size} that the index says")
        return data

    def _descriptor(self, shard: str) -> int:
        if shard not in self._open:
            self._close_evicted()
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._remote[shard].open() if shard in self._remote else os.open(shard, os.O_RDONLY)
        self._open.move_to_end(shard)
        if shard in self._remote and time.monotonic() > self._marked.get(shard, 0) + MARK_SECONDS:
            mark_used(self._open[shard])
            self._marked[shard] = time.monotonic()
        return self._open[shard]

    def _close_evicted(self) -> None:
        """Close what the cache has let go, so that its room becomes free."""
        for shard in [name for name in self._open if name in self._remote]:
            if os.fstat(self._open[shard]).st_nlink == 0:
                os.close(self._open.pop(shard))

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)
