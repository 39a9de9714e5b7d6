"""Where on this machine do downloaded shards lie, and which of them goes when there is no room?

A shard's file is named by its sha256, so it is never stale and mirrors share it. Every process of the machine uses the
same folder: a lock per shard lets one of them download while the others wait, a whole file appears by a rename, and the
shard used longest ago goes first. A process that still reads a shard that went keeps it open until it opens another
one, so nothing breaks; the room is free then.
"""

import fcntl
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from audiossl.errors import UserError
from audiossl.remote.transfer import Patience, fetch

GB = 10**9
DEFAULT_CACHE_GB = 50.0
MAX_INDEX_BYTES = 2**32
INDEX_TRIES = 4
POLL_SECONDS = 0.1
STALE_SECONDS = 600.0  # a download that went on wrote, or was tried again, more often


def default_folder() -> Path:
    """Give `audiossl` in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "audiossl"


@dataclass(frozen=True)
class ShardCache:
    """Keep downloaded files in `folder`, those of shards at most `max_bytes` together; travels to workers by pickle."""

    folder: Path
    max_bytes: int
    patience: Patience = Patience()

    @classmethod
    def of(cls, folder: str | os.PathLike | None, gb: float | None) -> "ShardCache":
        """Make the cache of two settings, null for the user's cache folder and for the default size."""
        place = default_folder() if folder is None else Path(os.path.abspath(os.path.expanduser(folder)))
        return cls(place, int((DEFAULT_CACHE_GB if gb is None else gb) * GB))

    def open(self, url: str, num_bytes: int, sha256: str) -> int:
        """Give a descriptor of a shard, downloaded first where it is absent, and mark it as used.

        Raises UserError where it cannot be had.
        """
        if (found := self._opened(sha256, num_bytes)) is not None:
            return found
        with self.lock(sha256):
            if (found := self._opened(sha256, num_bytes)) is not None:  # another process was faster
                return found
            part = self._reserve(sha256, num_bytes, url)
            fetch(url, part, num_bytes=num_bytes, sha256=sha256, max_bytes=self.max_bytes, patience=self.patience,
                  is_shown=is_in_foreground())  # fmt: skip
            found = os.open(part, os.O_RDONLY)  # before anyone can remove it
            os.replace(part, self.path(sha256))
            return found

    def add(self, url: str) -> Path:
        """Download a shard of which nothing is known, and give its path, which ends in its sha256."""
        name = "unknown-" + hashlib.sha256(url.encode()).hexdigest()
        with self.lock(name):
            part = self._reserve(name, 0, url)
            sha256, _ = fetch(url, part, num_bytes=None, sha256=None, max_bytes=self.max_bytes, patience=self.patience,
                              is_shown=is_in_foreground())  # fmt: skip
            assert sha256 is not None, "only a known tag leaves it open"
            self._make_room(part.stat().st_size, url, part)
            os.replace(part, self.path(sha256))
        return self.path(sha256)

    def index(self, url: str) -> Path:
        """Download an index, unless the copy here has the tag that the server names; give its path."""
        path = self._made("indexes") / f"{hashlib.sha256(url.encode()).hexdigest()}.safetensors"
        tag_path, part = path.with_suffix(".tag"), path.with_suffix(".part")
        with self.lock(path.stem):
            known = tag_path.read_text() if tag_path.exists() and path.exists() else None
            patience = replace(self.patience, tries=min(INDEX_TRIES, self.patience.tries))  # someone sits and waits
            try:
                sha256, tag = fetch(url, part, num_bytes=None, sha256=None, max_bytes=MAX_INDEX_BYTES,
                                    patience=patience, known_tag=known)  # fmt: skip
                if sha256 is not None:
                    tag_path.unlink(missing_ok=True)
                    os.replace(part, path)
                    if tag is not None:
                        tag_path.write_text(tag)
            finally:
                part.unlink(missing_ok=True)
        return path

    def path(self, sha256: str) -> Path:
        """Say where a shard lies once it is here."""
        return self.folder / "shards" / f"{sha256}.tar"

    def has(self, sha256: str) -> bool:
        """Tell whether a shard is here."""
        return self.path(sha256).exists()

    def arriving(self) -> dict[str, tuple[int, int]]:
        """List the downloads that have moved lately, by any process: sha256 -> bytes here, bytes in all."""
        found = {}
        for path in (self.folder / "parts").glob("*"):
            with suppress(FileNotFoundError):
                here = path.stat()
                if here.st_mtime > time.time() - 2 * self.patience.stall_seconds - 60:
                    name, _, total = path.name.rpartition(".")
                    found[name] = (here.st_size, int(total))
        return found

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Be the only process of this machine in here."""
        path = self._made("locks") / name
        descriptor = None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            raise UserError(f"{path}: {error.strerror}; set data.cache_dir to a folder on a local disk") from error
        try:
            yield
        finally:
            os.close(descriptor)  # and so unlocked, as when the process dies

    def _made(self, name: str) -> Path:
        try:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}; set data.cache_dir to a folder you may write") from error
        return self.folder / name

    def _opened(self, sha256: str, num_bytes: int) -> int | None:
        path = self.path(sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; remove it, it will be downloaded again") from error
        if os.fstat(descriptor).st_size != num_bytes:  # a crash of the machine
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        mark_used(descriptor)
        return descriptor

    def _reserve(self, name: str, num_bytes: int, url: str) -> Path:
        """Make room for a download and give its part file, whose name says how much room it takes."""
        part = self._made("parts") / f"{name}.{num_bytes}"
        self._make_room(num_bytes, url, part)
        return part

    def _make_room(self, num_bytes: int, url: str, part: Path) -> None:
        """Remove shards, the one used longest ago first, until `part` may grow to `num_bytes`; wait where none is left.

        What takes the room then are downloads of other processes, which end.
        """
        if num_bytes > self.max_bytes:
            raise UserError(
                f"{url} has {num_bytes / GB:.3g} GB, more than data.cache_gb={self.max_bytes / GB:g}; allow more"
            )
        self._made("shards")
        while True:
            with self.lock("room"):
                if self._evict(num_bytes, part):
                    with open(part, "ab"):
                        os.utime(part)
                    return
            time.sleep(POLL_SECONDS)

    def _evict(self, num_bytes: int, part: Path) -> bool:
        used, candidates = num_bytes, []
        for path in (*self.folder.glob("shards/*.tar"), *self.folder.glob("parts/*")):
            if path == part:
                continue
            with suppress(FileNotFoundError):
                found, is_part = path.stat(), path.parent.name == "parts"
                size = max(found.st_size, int(path.name.rpartition(".")[2])) if is_part else found.st_size
                used += size
                if not is_part or found.st_mtime < time.time() - STALE_SECONDS:
                    candidates.append((found.st_mtime_ns, size, path))
        for _, size, path in sorted(candidates):
            if used <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used <= self.max_bytes


def mark_used(descriptor: int) -> None:
    """Make a shard the last that has to go."""
    with suppress(OSError):  # it may belong to another user
        os.utime(descriptor)


def is_in_foreground() -> bool:
    """Tell whether a bar may be drawn here: in the trainer's own thread, not in a worker."""
    return multiprocessing.parent_process() is None and threading.current_thread() is threading.main_thread()
