"""Which clips could not be read, is that still a run worth having, and is every clip of the index accounted for?

The ledger of one rank. Two counts, because a bad clip comes again every epoch: *distinct* clips decide about the
corpus (more than `max_fraction` of it is bad, however often it was met), *visits* in a row about the moment (a file
system that went away fails clip after clip). Both go on in a resumed run. What every rank found is put together by
`ledger.Accounts`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audiossl.batch import Batch, Skipped
from audiossl.config.secrets import mask
from audiossl.errors import UserError

EARLY_BAD, EARLY_TIMES = 100, 2  # so many bad clips, at so many times the limit, need not wait for the whole corpus


class Entry(NamedTuple):
    """Say which clip could not be used, where it lies, and why."""

    key: str
    shard: str
    reason: str


class BadClips:
    """Count clips, list each bad one once in a CSV file (key, shard, reason), and stop the run when there are too many.

    The file is `bad_clips.csv` in `folder` (None: no file), `bad_clips_rank1.csv` and so on for further ranks.
    `num_clips` is the size of the corpus that the run draws from, with the clips `lost` with damaged shards; clips are
    numbered as the index numbers them, below `num_rows`. Raises UserError, from `add`, when

    - more than `max_fraction` of the corpus is bad, lost clips included; at the latest then, and as soon as 100 clips
      are bad and they are more than twice that fraction of the clips met so far,
    - `max_in_a_row` visits in a row failed,
    - the whole corpus is bad.

    On several ranks (`num_ranks`) a rank sees only its part, and one that stops alone leaves the others waiting: there
    `add` only counts, and `Accounts` asks for the `problem` after each step, on all ranks at once.
    """

    def __init__(
        self,
        folder: Path | None,
        num_rows: int,
        num_clips: int,
        max_fraction: float,
        max_in_a_row: int,
    ):
        self.folder = folder
        self.num_clips = num_clips
        self.max_fraction, self.max_in_a_row = max_fraction, max_in_a_row
        self.visited = np.zeros(num_rows, bool)
        self.bad: dict[int, Entry] = {}
        self.lost: dict[int, Entry] = {}
        self.visits_trained = self.visits_skipped = self.in_a_row = 0
        self._unshared: dict[int, Entry] = {}
        self.at_rank(0, 1)

    @classmethod
    def uncounted(cls, num_rows: int) -> BadClips:
        """Make a ledger that nobody reads and that stops nothing."""
        return cls(None, num_rows, num_rows, 1.0, sys.maxsize)

    def at_rank(self, rank: int, num_ranks: int) -> None:
        """Say whose ledger this is; a resumed run goes on with that rank's list."""
        self.rank, self.num_ranks = rank, num_ranks
        name = f"bad_clips_rank{rank}.csv" if rank else "bad_clips.csv"
        self.path = None if self.folder is None else self.folder / name
        self._listed: set[tuple[str, str]] = set()
        if self.path is not None and self.path.exists():
            with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                self._listed = {(row["key"], row["shard"]) for row in csv.DictReader(file)}

    def lose(self, lost: Iterable[tuple[int, Entry]]) -> None:
        """Count and list clips that are gone with their shard; raise UserError when that is too much to begin."""
        self.lost = {clip: Entry(*mask(entry)) for clip, entry in lost}
        if self.rank == 0:
            self._list(self.lost.values())
        if problem := self.problem():
            raise UserError(problem)

    def add(self, batch: Batch, clips: dict[int, int], *, is_training: bool = True) -> None:
        """Count a batch, in the order of its rows; `clips` maps rows to the index's numbers."""
        skipped: dict[int, Skipped] = {clip.row: clip for clip in batch.skipped}
        for row in sorted(clips):
            if row not in skipped:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            if clips[row] not in self.bad:
                self.bad[clips[row]] = self._unshared[clips[row]] = entry = Entry(*mask(skipped[row][:3]))
                self._list([entry])
            if self.in_a_row >= self.max_in_a_row and self.num_ranks == 1:
                break
        if is_training:
            self.visited[list(clips.values())] = True
            self.visits_trained += len(clips) - len(skipped)
            self.visits_skipped += len(skipped)
        if self.num_ranks == 1 and (problem := self.problem()):
            raise UserError(problem)

    def problem(self) -> str | None:
        """Word the limit that is passed, with three examples; None while none is."""
        num_bad = len(self.bad) + len(self.lost)
        if self.in_a_row >= self.max_in_a_row:
            return f"{self.in_a_row} clips in a row could not be read, which is the limit{self._tail()}"
        if num_bad == 0:
            return None
        if num_bad >= self.num_clips:
            shards = {entry.shard for entries in (self.lost, self.bad) for entry in entries.values()}
            return f"0 samples from {len(shards)} shards: none of the {num_bad} clips could be read{self._tail()}"
        num_visited = self._num_visited() if num_bad > EARLY_BAD else 0
        is_hopeless = num_bad > EARLY_BAD and num_bad > EARLY_TIMES * self.max_fraction * num_visited
        if num_bad > self.max_fraction * self.num_clips or is_hopeless:
            met = f", {num_visited} of them met so far," if is_hopeless else ""
            return (
                f"{num_bad} of {self.num_clips} clips{met} could not be read, more than the limit of "
                f"{self.max_fraction:.3g}{self._tail()}"
            )
        return None

    def _num_visited(self) -> int:
        """Count the clips met, guessing that the other ranks met as many."""
        return min(self.num_clips, int(np.count_nonzero(self.visited)) * self.num_ranks + len(self.lost))

    def take_unshared(self) -> dict[int, Entry]:
        """Give the bad clips found since the last call."""
        unshared, self._unshared = self._unshared, {}
        return unshared

    def _list(self, entries: Iterable[Entry]) -> None:
        new = [entry for entry in entries if (entry.key, entry.shard) not in self._listed]
        if self.path is None or not new:
            return
        self._listed.update((entry.key, entry.shard) for entry in new)
        is_new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(Entry._fields)
            writer.writerows(new)

    def _tail(self) -> str:
        known = [*self.lost.values(), *self.bad.values()]
        named = "; ".join(f"{key} in {shard}: {reason}" for key, shard, reason in known[:3])
        where = f" (all in {self.path})" if self.path else ""
        return f": {named}{where}; mend or pack them again, or allow more by data.max_bad_fraction"
