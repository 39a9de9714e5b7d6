"""Which processes does a run consist of, and have they ended?"""

import os
import time
from pathlib import Path


def processes() -> dict[int, int]:
    """Map every living process to its parent."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


def descendants(of: int) -> dict[int, int]:
    """Map the processes that come from process `of` to their parents."""
    parents = processes()
    found, new = {}, {of}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= {child: parents[child] for child in new}
    return found


def workers(of: int | None = None) -> list[int]:
    """List the loader's workers: the children of the fork server, which is the trainer's child."""
    of = of or os.getpid()
    return [child for child, parent in descendants(of).items() if parent != of]


def seconds_of_work(group: int) -> float:
    """Add up the processor time that the living processes of a group have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))  # its own, and that of children it has waited for
    return ticks / os.sysconf("SC_CLK_TCK")


class Patience:
    """Tell a process that stands still from one that a busy machine leaves little time.

    `is_lost()` is true once the group did less than `LEAST` seconds of work within the last `seconds`.
    """

    LEAST = 0.2

    def __init__(self, seconds: float):
        self.seconds, self.since, self.work = seconds, time.monotonic(), -self.LEAST

    def is_lost(self, group: int) -> bool:
        if self.work >= 0 and time.monotonic() - self.since < self.seconds:
            return False
        before, self.since, self.work = self.work, time.monotonic(), seconds_of_work(group)
        return self.work - before < self.LEAST


def end_within(seconds: float, alive) -> bool:
    """Wait until `alive()` lists nothing."""
    deadline = time.monotonic() + seconds
    while alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
