"""What goes wrong in a `toy_training` run: death within a save, full disks, files that cannot be removed."""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from audiossl.checkpoints import atomic


def prepare(fault: dict, checkpoints: Path) -> None:
    """Arm kill: POINT, limit: BYTES of a file, disk: BYTES, obey_modes: True (root too), or undeletable: True."""
    if "kill" in fault:
        kill_at(fault["kill"])
    if "limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
    if "disk" in fault:
        mount_small_disk(checkpoints, fault["disk"])
    if "obey_modes" in fault:
        give_up_overriding_modes()
    if "undeletable" in fault:
        refuse_removal()


def give_up_overriding_modes() -> None:
    """Make root obey the modes of files, as any user does, and still be the owner of the environment (capset(2))."""
    version_3 = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)  # this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: bits 0-31, then 32-63
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    override, read_search = 1 << 1, 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    sets[0] &= ~(override | read_search)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def kill_at(point: str) -> None:
    """Die by SIGKILL at a moment of the second save: what a crash of the machine leaves on disk."""
    saves = 0

    def wrap(owner, name: str, when, begun: int = 2) -> None:
        original = getattr(owner, name)

        def dying(*args, **kwargs):
            if saves == begun and when(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, dying)

    def save(value, file):
        nonlocal saves
        saves += 1
        if saves == 2 and point == "mid-write":
            original_write(value, HalfFile(file))
        original_write(value, file)

    original_write = torch.save
    atomic.torch.save = save
    if point == "before temp":
        wrap(os, "open", lambda path, *_: ".tmp-" in str(path), begun=1)  # of the second save nothing is written yet
    if point == "before fsync":
        wrap(os, "fsync", lambda *_: True)
    if point == "before rename":
        wrap(os, "replace", lambda source, target: Path(target).name.startswith("step="))
    if point == "before last":
        wrap(os, "link", lambda *_: True)
    if point == "last half done":
        wrap(os, "replace", lambda source, target: Path(target).name == "last.ckpt")
    if point == "during removal":
        wrap(Path, "unlink", lambda path, *_: path.name.startswith("step="))


class HalfFile:
    """Pass on the first 4 kB, then die."""

    def __init__(self, file):
        self.file, self.left = file, 4096

    def write(self, data) -> int:
        self.file.write(bytes(data)[: self.left])
        self.left -= len(data)
        if self.left <= 0:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def mount_small_disk(folder: Path, num_bytes: int) -> None:
    """Mount a filesystem of this size that only this process sees."""
    new_namespaces = 0x00020000 | (0x10000000 if os.geteuid() else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    failed = libc.unshare(new_namespaces)
    failed = failed or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE
    if failed or libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={num_bytes}".encode()):
        sys.exit(99)


def refuse_removal() -> None:
    original = Path.unlink

    def refuse(path: Path, *args, **kwargs):
        if path.name.startswith("step="):
            raise PermissionError(1, "Operation not permitted", str(path))
        return original(path, *args, **kwargs)

    Path.unlink = refuse
