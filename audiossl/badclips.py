"""How many clips could not be read, which ones, and is that still a run worth having?"""

from __future__ import annotations

import csv
from pathlib import Path

from audiossl.batch import Batch, Skipped
from audiossl.errors import UserError


class BadClips:
    """Count the clips that could not be read, list each once in a CSV file, and stop the run when there are too many.

    Raises UserError for more than `max_fraction` of the clips seen, once `min_seen` have been, and for `max_in_a_row`.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_fraction: float = 0.01,
        min_seen: int = 200,
        max_in_a_row: int = 100,
    ):
        self.path = path
        self.max_fraction = max_fraction
        self.min_seen = min_seen
        self.max_in_a_row = max_in_a_row
        self.seen = self.bad = self.in_a_row = 0
        self.examples: dict[tuple[str, str], str] = {}
        if path is not None and path.exists():  # a resumed run goes on with its list
            with open(path, newline="", encoding="utf-8") as file:
                self._listed = {(row["key"], row["shard"]) for row in csv.DictReader(file)}
        else:
            self._listed = set()

    def add(self, batch: Batch) -> None:
        """Count a batch; its clips are taken in the order of their rows."""
        skipped = {clip.row: clip for clip in batch.skipped}
        for row in sorted([*batch.rows.tolist(), *skipped]):
            self.seen += 1
            if row not in skipped:
                self.in_a_row = 0
                continue
            self.bad += 1
            self.in_a_row += 1
            self._list(skipped[row])
            if self.in_a_row >= self.max_in_a_row:
                raise UserError(f"{self.in_a_row} clips in a row could not be read, which is the limit: {self._tail()}")
        if self.seen >= self.min_seen and self.bad > self.max_fraction * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} clips could not be read, more than the limit of {self.max_fraction:.0%}: "
                + self._tail()
            )

    def _list(self, clip: Skipped) -> None:
        place = (clip.key, clip.shard)
        if len(self.examples) < 3:
            self.examples[place] = clip.reason
        if self.path is None or place in self._listed:
            return
        self._listed.add(place)
        is_new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["key", "shard", "reason"])
            writer.writerow([clip.key, clip.shard, clip.reason])

    def _tail(self) -> str:
        named = "; ".join(f"{key} in {shard}: {reason}" for (key, shard), reason in self.examples.items())
        return named + (f" (all in {self.path})" if self.path else "") + "; pack them again without the bad files"
