"""Who writes into this run's folder?

One job at a time: a second would interleave its checkpoints and numbers with those of the first. The first holds a lock
of the operating system on a file that says who it is, so a lock ends with whoever held it, however it ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audiossl.errors import UserError
from audiossl.planning.jobs import is_first_process

log = logging.getLogger(__name__)

NAME = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`/run.lock on the first rank; raises `UserError` naming host, process and job of who holds it.

    Where the file system knows no locks, a living process of this host counts as one, and of another host nothing is
    known.
    """
    if not is_first_process():
        yield
        return
    try:
        descriptor = _acquire(Path(folder) / NAME)
    except OSError as error:
        where = "make room there, or write elsewhere: hydra.run.dir=..."
        raise UserError(f"{folder}: cannot be written into: {error.strerror}; {where}") from error
    try:
        yield
    finally:
        try:
            os.unlink(Path(folder) / NAME)
        except OSError as error:
            log.debug("%s: not removed: %s", folder, error)
        os.close(descriptor)


def refuse_if_held(folder: Path) -> None:
    """Raise the `UserError` of `locked` where another process holds the lock now; takes nothing itself."""
    path = Path(folder) / NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(path)
        if error.errno not in _NO_LOCKS or _lives_here(owner):
            raise _in_use(path, owner) from error
    finally:
        os.close(descriptor)


def _in_use(path: Path, owner: dict) -> UserError:
    return UserError(
        f"{path.parent}: is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}, job "
        f"{owner.get('job') or 'none'}; wait for it to end, or give this run another name=..."
    )


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(path)
            is_alive = error.errno not in _NO_LOCKS or _lives_here(owner)
            if is_alive:
                os.close(descriptor)
                raise _in_use(path, owner) from error
            log.warning("%s: this file system knows no locks; nothing keeps another host's job out", path)
        try:
            is_ours = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            is_ours = False
        if is_ours:  # and not the file of one who has just ended and removed it
            break
        os.close(descriptor)
    if before := _owner(path):
        log.info("%s: left by process %s on %s, which is gone", path, before.get("pid"), before.get("host"))
    about = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)
    return descriptor


def _owner(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives_here(owner: dict) -> bool:
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    return owner["pid"] != os.getpid() and Path(f"/proc/{owner['pid']}").exists()
