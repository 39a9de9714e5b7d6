"""Which processes does a run consist of, have they ended, and what of the machine do they see?"""

import ctypes
import os
import sys
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

    Ask `is_lost()` often: it is true once the group did less than `LEAST` seconds of work within `seconds` of our own
    asking. A machine that stands still as a whole, and we with it, counts as no time.
    """

    LEAST, LONGEST = 0.2, 0.05

    def __init__(self, seconds: float):
        self.seconds, self.waited, self.asked, self.work = seconds, 0.0, time.monotonic(), -self.LEAST

    def is_lost(self, group: int) -> bool:
        now = time.monotonic()
        self.waited, self.asked = self.waited + min(now - self.asked, self.LONGEST), now
        if self.work >= 0 and self.waited < self.seconds:
            return False
        before, self.waited, self.work = self.work, 0.0, seconds_of_work(group)
        return self.work - before < self.LEAST


NO_NAMESPACE = 99  # exit code of a process that may not leave the machine's mounts or network
IMPOSSIBLE = "needs namespaces of its own (unshare), which this container or user may not make"
_NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
_BIND, _REC, _PRIVATE, _REMOUNT, _READ_ONLY = 0x1000, 0x4000, 0x40000, 0x20, 0x1


def stand_in_read_only(folder: Path) -> None:
    """Make `folder` the current one and, for this process alone, read-only, which binds root too."""
    libc, here = ctypes.CDLL(None, use_errno=True), str(folder).encode()
    failed = libc.unshare(_NEW_MOUNTS | (_NEW_USER if os.geteuid() else 0))
    failed = failed or libc.mount(b"none", b"/", None, _REC | _PRIVATE, None)
    failed = failed or libc.mount(here, here, None, _BIND, None)
    if failed or libc.mount(b"none", here, None, _REMOUNT | _BIND | _READ_ONLY, None):
        sys.exit(NO_NAMESPACE)
    os.chdir(folder)


def leave_the_network() -> None:
    """Give this process a network with nothing in it, not even itself."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK | (_NEW_USER if os.geteuid() else 0)):
        sys.exit(NO_NAMESPACE)


def end_within(seconds: float, alive) -> bool:
    """Wait until `alive()` lists nothing."""
    deadline = time.monotonic() + seconds
    while alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
