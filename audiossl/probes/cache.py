"""Features of every clip, once: where do they lie, and what happens when the command is killed?

A folder in the user's cache holds what one source says of one set: memory-mapped arrays, ragged over the clips. Its
name is a hash of all that decides them, so that nothing is ever stale. Blocks of clips are written as they come and
survive a kill; the whole is there when `complete.json` is. The folder used longest ago goes first when room
is short.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from audiossl.config.secrets import mask
from audiossl.errors import UserError
from audiossl.features.source import Source
from audiossl.indexing.indexfile import write_whole
from audiossl.probes.blocks import ClipFeatures, block_path, describe_block, gather, opened, size_of
from audiossl.probes.segments import Wanted, segment_samples, segments_of
from audiossl.remote.shardcache import GB, default_folder

if TYPE_CHECKING:
    from audiossl.tasks import Task

log = logging.getLogger(__name__)

REVISION = 2  # of what is kept
BLOCK_CLIPS = 64  # a kill loses no more
READERS = 4


class FeatureCache:
    """Keep features in `folder`, at most `max_bytes` together."""

    def __init__(self, folder: str | os.PathLike | None, gb: float):
        base = default_folder() if folder is None else Path(folder).expanduser().absolute()
        self.folder, self.max_bytes = base / "features", int(gb * GB)

    def features(self, source: Source, task: Task, wanted: Wanted, *, batch_size: int = 16) -> ClipFeatures:
        """Give the features of all clips of a task, computed where they are not here yet.

        Clips that cannot be decoded or described are named in `bad`. Raises `UserError` where the cache cannot be
        written, has no room, or no clip can be used.
        """
        about = {"source": source.hash, "task": task.hash, "clip_seconds": task.clip_seconds, "revision": REVISION}
        for other in _that_serve(wanted, source.num_layers):
            if (self._place(about, other) / "complete.json").is_file():
                wanted = other
                break
        place = self._place(about, wanted)
        name, about = place.name, about | asdict(wanted)
        with self._claimed(name):
            is_new = not (place / "complete.json").is_file()
            if is_new:
                try:
                    self._fill(place, source, task, wanted, about, batch_size)
                except OSError as error:
                    raise UserError(f"{place}: {error.strerror or error}; set probe.cache_dir, or free room") from error
            with suppress(OSError):  # used last; the folder may be another user's
                os.utime(place / "complete.json")
            return opened(place, is_new)

    def _place(self, about: dict, wanted: Wanted) -> Path:
        whole = json.dumps(about | asdict(wanted), sort_keys=True)
        return self.folder / hashlib.sha256(whole.encode()).hexdigest()[:32]

    def _fill(self, place: Path, source: Source, task: Task, wanted: Wanted, about: dict, batch_size: int) -> None:
        self._make_room(place, expected_bytes(source, task, wanted))
        place.mkdir(parents=True, exist_ok=True)
        blocks = [range(first, min(first + BLOCK_CLIPS, len(task))) for first in range(0, len(task), BLOCK_CLIPS)]
        done = sum(len(block) for number, block in enumerate(blocks) if block_path(place, number).is_file())
        length = segment_samples(source, wanted.support_seconds)
        bar = tqdm(total=len(task), initial=done, unit="clip", desc=f"features: {source.name[-40:]}", mininterval=0.5)
        with bar, ThreadPoolExecutor(READERS) as readers:
            for number, block in enumerate(blocks):
                if not block_path(place, number).is_file():
                    content = describe_block(source, task, block, length, wanted, batch_size, readers, bar)
                    write_whole(block_path(place, number), content)
        gather(place, len(blocks), about | {"name": mask(source.name), "set": task.name})

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        """Be the only process that makes these features; others wait, and then find them."""
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "locks" / name, "w")
        except OSError as error:
            raise UserError(
                f"{self.folder}: {error.strerror}; set probe.cache_dir to a folder you may write"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process computes these features (%s); waiting for it", self.folder / "locks" / name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, place: Path, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise UserError(
                f"these features take about {num_bytes / GB:.3g} GB, more than probe.cache_gb={self.max_bytes / GB:g}; "
                "allow more, or keep less with probe.cached_layers=1"
            )
        entries = [(p.stat().st_mtime, size_of(p.parent), p.parent) for p in self.folder.glob("*/complete.json")]
        used = num_bytes + sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if used <= self.max_bytes:
                break
            if folder != place:
                (folder / "complete.json").unlink(missing_ok=True)  # first: half an entry must not look whole
                shutil.rmtree(folder, ignore_errors=True)
                used -= size


def _that_serve(wanted: Wanted, num_layers: int) -> list[Wanted]:
    """List what holds all that is wanted, itself first: entries with moments hold what those without do."""
    if wanted.with_moments:
        return [wanted]
    more = [replace(wanted, with_moments=True, moment_layers=n) for n in (None, *range(1, num_layers + 1))]
    return [wanted, *more]


def expected_bytes(source: Source, task: Task, wanted: Wanted) -> int:
    """Estimate the size of the features from the clips' lengths; of moments, 25 a second are assumed."""
    length = segment_samples(source, wanted.support_seconds)
    seconds = task.seconds if task.clip_seconds is None else np.minimum(task.seconds, task.clip_seconds)
    samples = (seconds * source.rate_hz).astype(np.int64)
    num_segments = sum(len(segments_of(int(count), length)) for count in samples)
    moments = float(seconds.sum()) * 25 if wanted.with_moments else 0.0
    layers = wanted.layers or source.num_layers
    return int((3 * num_segments * layers + moments * (wanted.moment_layers or layers)) * source.width * 4)


def name_bad(task: Task, bad: dict[int, str], limit: int = 5) -> Sequence[str]:
    """Say in a few lines which clips are left out of the scores, and why."""
    lines = [f"left out: {task.keys[clip]}: {reason}" for clip, reason in sorted(bad.items())[:limit]]
    return lines + ([f"... and {len(bad) - limit} more"] if len(bad) > limit else [])
