"""How do features of clips become files, a block of clips at a time, and one set of arrays in the end?

A block is an npz, there completely or not at all; put together they are memory-mapped arrays, ragged over the clips.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.features.source import Source
from audiossl.indexing.indexfile import write_whole
from audiossl.probes.segments import Heard, Segment, Wanted, hear, segments_of
from audiossl.sound.audio import AudioError

if TYPE_CHECKING:
    from audiossl.tasks import Task

ARRAYS = ("pooled", "moments", "middles_seconds", "segments", "num_moments")


@dataclass(frozen=True)
class ClipFeatures:
    """Hold what a source says of n clips, memory-mapped.

    `pooled` (all segments, L, P, D) float32: mean, maximum and, where there are any, class tokens; clip i has those
    from `offsets[i]` to `offsets[i + 1]`. `moments` (all, L, D) and their `middles_seconds` likewise by
    `moment_offsets`, None where not asked for. `bad` maps clips that cannot be used, which have none, to the reason.
    """

    pooled: NDArray[np.float32]
    offsets: NDArray[np.int64]
    moments: NDArray[np.float32] | None
    middles_seconds: NDArray[np.float32] | None
    moment_offsets: NDArray[np.int64] | None
    bad: dict[int, str]
    num_bytes: int
    is_new: bool

    @property
    def has_classes(self) -> bool:
        return self.pooled.shape[2] == 3


def describe_block(
    source: Source, task: Task, clips: range, length: int | None, wanted: Wanted, batch_size: int,
    readers: ThreadPoolExecutor, bar: tqdm,
) -> bytes:  # fmt: skip
    """Describe some clips; returns an npz of their arrays and of the reasons for those that cannot be used."""
    found: dict[int, list[Heard]] = {}
    bad: dict[int, str] = {}
    batch: list[tuple[int, NDArray, Segment]] = []

    def flush(count: int) -> None:
        some, batch[:count] = batch[:count], []
        laid, segments, begin = [], [], 0
        for _, waveform, piece in some:
            laid.append(waveform[piece.start : piece.stop])
            stop = begin + piece.stop - piece.start
            segments.append(Segment(begin, stop, begin + piece.new_from - piece.start))
            begin = stop
        heard = hear(source, np.concatenate(laid), segments, wanted)
        for (clip, _, piece), one in zip(some, heard, strict=True):
            if one.middles_seconds is not None:
                middles = (one.middles_seconds + piece.start / source.rate_hz).astype(np.float32)
                one = Heard(one.pooled, one.moments, middles)
            found.setdefault(clip, []).append(one)

    for clip, waveform in zip(clips, readers.map(lambda clip: _read(task, clip, source.rate_hz), clips), strict=True):
        bar.update(1)
        if isinstance(waveform, str):
            bad[clip] = waveform
            continue
        batch += [(clip, waveform, segment) for segment in segments_of(len(waveform), length)]
        while len(batch) >= batch_size:
            flush(batch_size)
    if batch:
        flush(len(batch))
    for clip in [clip for clip, parts in found.items() if not all(np.isfinite(one.pooled).all() for one in parts)]:
        bad[clip] = "features are not finite: are its samples far beyond [-1, 1]?"
        del found[clip]
    return _to_npz(clips, found, bad, wanted.with_moments)


def _read(task: Task, clip: int, rate_hz: int) -> NDArray[np.float32] | str:
    try:
        waveform = task.waveform(clip, rate_hz)
    except AudioError as error:
        return str(error)
    return waveform if len(waveform) else "no samples"


def _to_npz(clips: range, found: dict[int, list[Heard]], bad: dict[int, str], with_moments: bool) -> bytes:
    parts = [one for clip in clips for one in found.get(clip, [])]
    arrays: dict[str, Any] = {"segments": np.array([len(found.get(clip, [])) for clip in clips], np.int64)}
    if parts:
        arrays["pooled"] = np.stack([one.pooled for one in parts])
    if parts and with_moments:
        arrays["moments"] = np.concatenate([one.moments for one in parts])
        arrays["middles_seconds"] = np.concatenate([one.middles_seconds for one in parts])
    lengths = [sum(len(one.moments) for one in found.get(clip, [])) if with_moments else 0 for clip in clips]
    target = io.BytesIO()
    np.savez(target, **arrays, num_moments=np.array(lengths, np.int64), bad=np.array(json.dumps(bad)))
    return target.getvalue()


def block_path(place: Path, number: int) -> Path:
    """Name the file of a block of clips."""
    return place / f"block-{number:06d}.npz"


def gather(place: Path, num_blocks: int, about: dict[str, Any]) -> None:
    """Put the blocks together as memory-mapped arrays, mark the entry whole, and remove the blocks."""
    bad: dict[str, str] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    dtypes: dict[str, np.dtype] = {}
    for number in range(num_blocks):
        with np.load(block_path(place, number), allow_pickle=False) as block:
            bad |= json.loads(str(block["bad"]))
            for name in set(ARRAYS) & set(block.files):
                shapes.setdefault(name, []).append(block[name].shape)
                dtypes[name] = block[name].dtype
    if "pooled" not in shapes:
        reasons = sorted(set(bad.values()))
        shutil.rmtree(place)
        raise UserError(f"none of the {len(bad)} clips can be used: {reasons[0] if reasons else 'there are none'}")
    for name, sizes in shapes.items():
        shape = (sum(size[0] for size in sizes), *sizes[0][1:])
        part = place / f"{name}.npy.part"
        target, row = np.lib.format.open_memmap(part, mode="w+", dtype=dtypes[name], shape=shape), 0
        for number in range(num_blocks):
            with np.load(block_path(place, number), allow_pickle=False) as block:
                if name in block.files:
                    target[row : row + len(block[name])] = block[name]
                    row += len(block[name])
        target.flush()
        os.replace(part, place / f"{name}.npy")
    write_whole(place / "complete.json", json.dumps(about | {"bad": bad}, indent=1).encode())
    for number in range(num_blocks):
        block_path(place, number).unlink()


def opened(place: Path, is_new: bool) -> ClipFeatures:
    """Map what `gather` wrote; `is_new` is passed on."""
    about = json.loads((place / "complete.json").read_bytes())

    def array(name: str) -> NDArray | None:
        path = place / f"{name}.npy"
        return np.load(path, mmap_mode="c") if path.is_file() and path.stat().st_size else None

    offsets = np.concatenate([[0], np.cumsum(array("segments"))]).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(array("num_moments"))]).astype(np.int64)
    bad = {int(clip): reason for clip, reason in about["bad"].items()}
    moments = array("moments")
    of_moments = (moments, array("middles_seconds"), None if moments is None else ends)
    return ClipFeatures(array("pooled"), offsets, *of_moments, bad, size_of(place), is_new)


def size_of(folder: Path) -> int:
    """Add up the files of a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
