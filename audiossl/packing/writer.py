"""How are clips encoded by several processes and still written as one would, byte for byte?

Workers decode, resample and encode; one process takes their results in order and writes each shard to a `.part` file,
which gets its name when it is whole and on disk.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.indexing.indexfile import write_whole
from audiossl.packing.source import Clip, Source
from audiossl.packing.tarfiles import TarWriter
from audiossl.sound import audio, ffmpeg

MAX_KEPT_BYTES = 2**30  # of one file that is packed as it is


@dataclass(frozen=True)
class Settings:
    """Say what decides over the bytes of the shards."""

    codec: str
    rate_hz: int | None  # None when the sources are kept
    shard_bytes: int


def encode(path: Path, max_seconds: float, settings: Settings) -> tuple[bytes, str, audio.AudioInfo, bool] | str:
    """Return a clip's bytes, extension, header and whether it clipped, or the reason why it is rejected."""
    try:
        if settings.codec == "flac":
            to_flac = ffmpeg.to_flac if ffmpeg.extension_of(path.name) else audio.to_flac
            data, info, clipped = to_flac(path, settings.rate_hz, max_seconds)
            return data, "flac", info, clipped
        if ffmpeg.extension_of(path.name):
            return f"{ffmpeg.extension_of(path.name)} cannot be kept, only turned into FLAC (--codec flac)"
        if path.stat().st_size > MAX_KEPT_BYTES:
            return f"{path.stat().st_size} bytes, more than the limit of {MAX_KEPT_BYTES}"
        data = path.read_bytes()
        return data, audio.extension_of(path.name), audio.check(data, max_seconds), False
    except audio.AudioError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def encode_all(tasks: Iterator[tuple[Path, float]], settings: Settings, workers: int) -> Iterator[tuple | str]:
    """Yield `encode` of every (path, longest seconds), in order, with a bounded number of results waiting."""
    if workers <= 1:
        yield from (encode(path, max_seconds, settings) for path, max_seconds in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        waiting: deque = deque()
        try:
            for path, max_seconds in tasks:
                waiting.append((path, pool.submit(encode, path, max_seconds, settings)))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            names = ", ".join(path.name for path, _ in list(waiting)[:workers])
            raise UserError(
                f"a worker died (memory, or a file that crashes the decoder; near {names or path.name}); "
                "the same command goes on from the last whole shard"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def counted(results: Iterable, bar: tqdm) -> Iterator:
    """Pass results on and move the bar for each."""
    for result in results:
        bar.update()
        yield result


def num_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a killed parent can no longer tell its workers to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_shard(
    path: Path, rows_path: Path, found: Source, clips: Iterable[Clip], encoded: Iterator[tuple | str]
) -> None:
    """Take one result of `encoded` per clip and write the shard, and beside it what it holds and what was rejected.

    The rows are written first, so a shard under its final name always has them.
    """
    rows: list[tuple] = []
    rejected: list[tuple[str, str]] = []
    num_clipped = 0
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        tar = TarWriter(file)
        for clip in clips:
            result = next(encoded)
            if isinstance(result, str):
                rejected.append((clip.path, result))
                continue
            data, extension, info, clipped = result
            offset = tar.add(f"{clip.key}.{extension}", data)
            tar.add(f"{clip.key}.json", found.json_of(clip, info.seconds, info.rate_hz))
            shape = (len(data), info.num_frames, info.rate_hz, info.channels)
            rows.append((clip.key, extension, offset, *shape, clip.labels, clip.split, clip.fold))
            num_clipped += clipped
        digest = tar.close()
        file.flush()
        os.fsync(file.fileno())
    shard = {"name": path.name, "bytes": tar.num_bytes, "sha256": digest, "rows": rows}
    write_whole(rows_path, json.dumps(shard | {"rejected": rejected, "clipped": num_clipped}).encode())
    if rows:
        os.replace(part, path)
    else:
        part.unlink()
