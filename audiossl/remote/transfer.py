"""How does a file come whole through a network that fails now and then?

What may pass (a cut connection, a time-out, 429, 5xx, fewer bytes than announced) is tried again after a growing,
jittered wait, and goes on where it stopped if the server knows ranges; what will not pass (403, 404, a wrong size or
hash) ends at once in one line with URL and status.
"""

import hashlib
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.remote.streams import CHUNK_BYTES, Passing, Refused, Stream, open_stream

MAX_WAIT_SECONDS = 60.0
PROGRESS_BYTES = 2**20  # that much more than ever before, and the tries count anew


class Absent(UserError):
    """Report a file that is not there."""


@dataclass(frozen=True)
class Patience:
    """Say how often and how long a transfer is tried: `tries` without progress, `stall_seconds` without a byte."""

    tries: int = 8
    first_wait_seconds: float = 0.5
    stall_seconds: float = 30.0


def fetch(
    url: str,
    part: Path,
    *,
    num_bytes: int | None,
    sha256: str | None,
    max_bytes: int,
    patience: Patience,
    known_tag: str | None = None,
    is_shown: bool = False,
) -> tuple[str | None, str | None]:
    """Download `url` into `part`, going on with what is there, and return its sha256 and tag.

    The sha256 is None where the server's tag is still `known_tag`. Raises UserError (`Absent` for 404) in one line.
    """
    state = _Part(part, num_bytes, sha256, max_bytes)
    with state, tqdm(total=num_bytes, unit="B", unit_scale=True, desc=url.rpartition("/")[2], mininterval=0.5,
                     delay=1.0, leave=False, disable=not is_shown) as bar:  # fmt: skip
        failures = 0
        while not state.is_complete:
            best = state.furthest
            try:
                with open_stream(url, state.have, state.tag, patience.stall_seconds, known_tag) as stream:
                    if known_tag is not None and stream.tag == known_tag:
                        return None, known_tag
                    state.receive(stream, CHUNK_BYTES[url.partition(":")[0]], bar)
            except Refused as error:
                raise (Absent if error.is_absent else UserError)(f"{url}: {error}") from error
            except Passing as error:
                failures = 1 if state.furthest > best + PROGRESS_BYTES else failures + 1
                if failures >= patience.tries:
                    raise UserError(
                        f"{url}: {error}, {failures} times in a row; look at the network, then start again (ckpt=last "
                        "continues a run)"
                    ) from error
                if error.must_restart:
                    state.restart()
                state.sign_of_life()
                wait = min(MAX_WAIT_SECONDS, patience.first_wait_seconds * 2 ** (failures - 1))
                time.sleep(max(error.wait_seconds, wait * random.SystemRandom().uniform(0.5, 1.5)))
        if sha256 is not None and state.hash.hexdigest() != sha256:
            found = state.hash.hexdigest()
            state.drop()
            raise UserError(f"{url}: its sha256 is {found[:16]}... where the index says {sha256[:16]}...: replaced or "
                            "damaged; index the shards again or mend the file")  # fmt: skip
        return state.hash.hexdigest(), state.tag


class _Part:
    """Hold a file that grows, the hash of what is in it, and what is known of the whole."""

    def __init__(self, path: Path, num_bytes: int | None, sha256: str | None, max_bytes: int):
        self.path, self.num_bytes, self.sha256, self.max_bytes = path, num_bytes, sha256, max_bytes
        self.tag: str | None = None
        self.hash = hashlib.sha256()
        self.have = self.furthest = 0
        self.is_complete = False

    def __enter__(self) -> "_Part":
        self._file: BinaryIO = open(self.path, "ab+")
        if self.sha256 is None:
            self.restart()  # nobody could tell whether the beginning still fits the end
        self._file.seek(0)
        while chunk := self._file.read(2**20):
            self.hash.update(chunk)
            self.have += len(chunk)
        if self.num_bytes is not None and self.have >= self.num_bytes:
            self.is_complete = self.hash.hexdigest() == self.sha256
            if not self.is_complete:
                self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def receive(self, stream: Stream, chunk_bytes: int, bar: tqdm) -> None:
        """Append a stream to its end; raises Passing where it is cut, Refused for too many bytes."""
        if stream.num_bytes is not None and self.num_bytes not in (None, stream.num_bytes):
            raise Refused(f"has {stream.num_bytes} bytes where the index says {self.num_bytes}; replaced? index again")
        is_same = self.sha256 is not None or (stream.tag is not None and stream.tag == self.tag)
        if stream.start != self.have or (self.have and not is_same):
            self.restart()
            if stream.start:
                raise Passing("it changed while it came")
        self.tag = stream.tag
        total = self.num_bytes if self.num_bytes is not None else stream.num_bytes
        limit = self.max_bytes if total is None else total
        if limit > self.max_bytes:
            raise Refused(f"has {limit} bytes, more than the limit of {self.max_bytes}")
        bar.n, bar.total = self.have, total
        while chunk := stream.read(chunk_bytes):
            if self.have + len(chunk) > limit:
                raise Refused(f"sends more than {limit} bytes")
            self._append(chunk)
            bar.update(len(chunk))
        if total is not None and self.have < total:
            raise Passing(f"cut after {self.have} of {total} bytes")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.is_complete = True

    def sign_of_life(self) -> None:
        """Tell those who wait that this is still being tried."""
        os.utime(self._file.fileno())

    def drop(self) -> None:
        """Remove what came."""
        self.path.unlink(missing_ok=True)

    def _append(self, chunk: bytes) -> None:
        try:
            self._file.write(chunk)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path.parent}: {error.strerror} in a download; make room, or set data.cache_dir, data.cache_gb"
            ) from error
        self.hash.update(chunk)
        self.have += len(chunk)
        self.furthest = max(self.furthest, self.have)

    def restart(self) -> None:
        """Forget what came."""
        self._file.truncate(0)
        self.have, self.hash = 0, hashlib.sha256()
