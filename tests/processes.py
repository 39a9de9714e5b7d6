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


def end_within(seconds: float, alive) -> bool:
    """Wait until `alive()` lists nothing."""
    deadline = time.monotonic() + seconds
    while alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
