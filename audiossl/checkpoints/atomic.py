"""How is a checkpoint written so that no crash, full disk or foreign type leaves a bad one?

A file gets its final name only when it is complete: it is written beside its target, forced to disk, read back,
renamed. Every value is checked beforehand to be of a type that `weights_only=True` reads back, so that loading never
needs to run code.
"""

from __future__ import annotations

import collections
import errno
import logging
import os
import pickle
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from audiossl.checkpoints.files import describe_file, read_lazily
from audiossl.errors import UserError
from audiossl.sharded.folders import SEAL

log = logging.getLogger(__name__)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)
_SEQUENCES = (list, tuple, set)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_FOREIGN_SECONDS = 3600.0  # a part file of another host is litter when nothing was added to it for so long


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save checkpoints that are complete or absent, and load them without running code (give to `Trainer(plugins=)`).

    Lightning's own writer copies over the good file when $TMPDIR is on another filesystem, never forces data to disk
    and swallows a PermissionError.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`; raises `UserError` (types, disk, permissions) and then leaves `path` as it was."""
        assert storage_options is None, "local files have no storage options"
        path = Path(path)
        num_bytes = check_plain(checkpoint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(checkpoint, file), check=read_lazily)
        except (OSError, RuntimeError) as error:
            raise _save_error(path, num_bytes, error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without running code; only an explicit `weights_only=False` allows code, with a warning."""
        if weights_only is False:
            log.warning("%s: loaded with weights_only=False; code in it runs", path)
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only is not False)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{path}: cannot be loaded: it is {describe_file(path)}") from error


def check_plain(value: Any, where: str = "checkpoint", seen: set[int] | None = None) -> int:
    """Refuse what `weights_only=True` would not read back, naming its key path; returns the bytes of the tensors.

    Raises `UserError`. Subclasses count as foreign: a numpy float is a `float` that cannot be loaded.
    """
    seen = set() if seen is None else seen
    kind = type(value)
    if kind in _TENSORS:
        # tensors may share memory, which is written once
        storage = value.untyped_storage() if value.layout == torch.strided else None
        if storage is None or storage._cdata in seen:
            return 0
        seen.add(storage._cdata)
        return storage.nbytes()
    if kind in _MAPPINGS:
        for key in value:
            check_plain(key, f"{where}, key {key!r}", seen)
        return sum(check_plain(item, f"{where}[{key!r}]", seen) for key, item in value.items())
    if kind in _SEQUENCES:
        return sum(check_plain(item, f"{where}[{place}]", seen) for place, item in enumerate(value))
    if kind not in _PLAIN:
        raise UserError(
            f"not saved: {where} is a {kind.__module__}.{kind.__qualname__}, which could not be loaded again;"
            " store tensors, numbers, strings, lists and dicts"
        )
    return 0


def write_atomically(path: Path, write: Callable[[BinaryIO], None], check: Callable[[Path], Any] | None = None) -> None:
    """Let `path` appear complete or not at all: part file beside it, fsync, `check`, rename, fsync of the folder."""
    part = _part_name(path.parent)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(part)
        os.replace(part, path)
    except BaseException:
        try_to_remove(part)
        raise
    sync_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` become another name of `source`, atomically; a copy where the filesystem has no hard links."""
    if target.exists() and target.samefile(source):
        return  # renaming a link over its twin would do nothing and leave the part file
    part = _part_name(target.parent)
    if source.is_dir():
        return _link_folder(source, target, part)
    try:
        os.link(source, part)
    except OSError as error:
        log.debug("%s: no hard link (%s), copying", target, error)
        with source.open("rb") as file:
            write_atomically(target, lambda out: shutil.copyfileobj(file, out, 2**22))
        return
    os.replace(part, target)
    sync_folder(target.parent)


def _link_folder(source: Path, target: Path, part: Path) -> None:
    """Let a folder of many ranks appear under a second name; for a moment it may have only the first."""
    shutil.copytree(source, part, copy_function=link_or_copy_file)
    if target.is_dir():
        old = _part_name(target.parent)
        os.replace(target, old)
        try_to_remove(old)
    else:
        try_to_remove(target)
    os.replace(part, target)
    sync_folder(target.parent)


def link_or_copy_file(source: str, target: str) -> None:
    """Give a file a second name, or where the filesystem has no hard links a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sweep(folder: Path) -> None:
    """Remove the part files that dead processes left in `folder`."""
    for part in folder.glob(".tmp-*.part"):
        found = re.fullmatch(r"\.tmp-(.+)-(\d+)-[0-9a-f]+\.part", part.name)
        try:
            stale = found is not None and _is_stale(found[1], int(found[2]), part)
        except FileNotFoundError:
            continue
        if stale and try_to_remove(part):
            log.info("removed %s, left by a process that died while saving", part)


def try_to_remove(path: Path) -> bool:
    """Remove a file, or a folder of many ranks; a failure is logged, never raised. True when it is gone."""
    try:
        if path.is_dir():
            (path / SEAL).unlink(missing_ok=True)  # first, so that half of it is never taken for a whole one
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", path, error.strerror)
        return False
    return True


def _part_name(folder: Path) -> Path:
    return folder / f".tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.part"


def _is_stale(host: str, pid: int, part: Path) -> bool:
    if host != socket.gethostname():
        return time.time() - part.stat().st_mtime > _FOREIGN_SECONDS
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # alive, somebody else's
    return False


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to disk, where the filesystem can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network filesystems cannot; the rename itself has happened
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _save_error(path: Path, num_bytes: int, error: BaseException) -> UserError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    kept = "checkpoints saved before are as they were"
    if cause is not None and cause.errno in _FULL:
        free = shutil.disk_usage(path.parent).free
        return UserError(
            f"{path}: not saved, {cause.strerror}: about {num_bytes} bytes needed, {free} free on its filesystem"
            f" (a quota may be lower); {kept}"
        )
    reason = error if cause is None else cause.strerror
    return UserError(f"{path}: not saved, {reason}; {kept}")
