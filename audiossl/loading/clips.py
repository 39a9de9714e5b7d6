"""How does a clip in a shard become a crop of fixed length?

By one `pread` of its bytes, a seek, and decoding what is needed. A worker knows neither the corpus nor the order: a
request says where the bytes lie and carries the number its random crop is drawn from, so a crop is the same in any
process, with any cache, and a worker costs no memory per clip of the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from audiossl.batch import Skipped
from audiossl.loading.handover import Crop, Crops, Samples, Slots
from audiossl.loading.shardfiles import ShardFiles
from audiossl.packing.tarfiles import read_member
from audiossl.remote.location import RemoteShard
from audiossl.sound.audio import AudioError, decode_int16, probe, resample, to_int16
from audiossl.sound.flac import decode_from

Padding = Literal["cyclic", "zeros"]
SEEKS_EXACTLY = ("flac", "wav", "aiff", "aif")
MAX_SKIP_SECONDS = 60.0  # of a compressed clip that are decoded only to get to the crop
MP3_SLACK_FRAMES = 2 * 1152  # versions of mpg123 count the encoder's padding or do not
MAX_CLIP_BYTES = 2**30  # of encoded audio
MAX_CACHED_FRAMES = 2**23  # of one clip: a tiny file may decode to hours
DRAW_BITS = 63  # of a request's `draw`


class ClipRequest(NamedTuple):
    """Say where a clip lies and which crop of it is wanted; `draw` is a 63-bit random number, None for the centre."""

    row: int
    clip: int  # its number in the index
    draw: int | None
    key: str
    member: str  # its name in the tar
    shard: str
    offset: int
    size: int
    num_frames: int  # at rate_hz, as the index has it
    rate_hz: int
    extension: str
    labels: tuple[int, ...] | None = None  # positions in the vocabulary, for a method that needs them


class ClipDataset(torch.utils.data.Dataset):
    """Answer a `ClipRequest` with a crop of `crop_samples` at `rate_hz`: mono int16.

    A longer clip is cut where `draw` says, at its own rate; a shorter one is repeated from a random start ("cyclic") or
    followed by zeros ("zeros"). A clip of another rate is resampled after the cut, by soxr. `cache_bytes` bounds the
    decoded int16 clips that each process keeps: first come, never evicted, because an epoch meets every clip once and
    would turn over any cache that forgets. `remote` holds the shards, by name, that have to be downloaded; `resident`
    clips that are decoded already, by shard and offset, on any device (`resident.py`).
    """

    def __init__(
        self,
        *,
        rate_hz: int,
        crop_samples: int,
        padding: Padding,
        cache_bytes: int,
        remote: Mapping[str, RemoteShard] | None = None,
        resident: Mapping[tuple[str, int], Samples] | None = None,
    ):
        assert crop_samples > 0 and rate_hz > 0 and cache_bytes >= 0
        self.rate_hz = rate_hz
        self.crop_samples = crop_samples
        self.padding = padding
        self.cache_bytes = cache_bytes
        self.remote = remote or {}
        self.resident = resident or {}
        self.slots: Slots | None = None  # a worker has some
        self._forget()

    def __getitem__(self, request: ClipRequest) -> Crop:
        return self._answer(request, None)

    def __getitems__(self, requests: list[ClipRequest]) -> Crops:
        """Answer the requests of a batch; what can be read becomes the first rows of memory made for all."""
        if self.resident:  # and perhaps on a device
            return Crops([self[request] for request in requests])
        crops, num_read = Crops(), 0
        room = crops.make_room(len(requests), self.crop_samples, self.slots)
        for request in requests:
            crops.append(self._answer(request, room[num_read]))
            num_read += crops[-1].waveform is not None
        return crops

    def _answer(self, request: ClipRequest, out: np.ndarray | None) -> Crop:
        try:
            waveform, num_samples, start_seconds = self._crop(request, out)
        except AudioError as error:
            skipped = Skipped(request.key, request.shard, str(error), request.row)
            return Crop(request.row, request.key, None, 0, skipped)
        if out is not None and not np.may_share_memory(waveform, out):
            out[:] = waveform
        return Crop(request.row, request.key, waveform, num_samples, None, request.labels, start_seconds)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._shards = ShardFiles(self.remote)
        self._cache: dict[tuple[str, int], Samples] = dict(self.resident)
        self._room = self.cache_bytes
        self._complete = bytearray()  # 1 for each clip of the index whose end proved to be there

    def _crop(self, request: ClipRequest, out: np.ndarray | None) -> tuple[Samples, int, float]:
        """Cut what is asked for; what needs no more than to be decoded is decoded into `out`."""
        available = request.num_frames
        wanted = min(available, self._frames_wanted(request.rate_hz))
        start = _scaled(request.draw, available - wanted + 1)
        if out is None or len(out) != wanted:
            out = np.empty(wanted, np.int16)
        waveform = self._frames(request, start, out)
        if request.rate_hz != self.rate_hz:
            resampled = resample(waveform.astype(np.float32) / 32768, request.rate_hz, self.rate_hz)
            waveform = to_int16(resampled)
        waveform = waveform[: self.crop_samples]
        if len(waveform) == self.crop_samples:
            return waveform, self.crop_samples, start / request.rate_hz
        if len(waveform) == 0:
            raise AudioError(f"no samples left at {self.rate_hz} Hz")
        if self.padding == "zeros":
            return _with_zeros(waveform, self.crop_samples), len(waveform), 0.0
        first = _scaled(request.draw, len(waveform)) if request.draw is not None else 0
        return waveform[(first + np.arange(self.crop_samples)) % len(waveform)], self.crop_samples, math.nan

    def _frames_wanted(self, rate_hz: int) -> int:
        if rate_hz == self.rate_hz:
            return self.crop_samples
        return math.ceil(self.crop_samples * rate_hz / self.rate_hz) + 1  # resampling may round down

    def _frames(self, request: ClipRequest, start: int, out: np.ndarray) -> Samples:
        """Give frames from `start` on, as many as `out` holds, from the cache where the whole clip fits into it."""
        place, wanted = (request.shard, request.offset), len(out)
        if place in self._cache:
            return self._cache[place][start : start + wanted]
        data = self.data_of(request)
        fits = 2 * request.num_frames <= self._room and request.num_frames <= MAX_CACHED_FRAMES
        if fits and (whole := decode_whole(data, request)) is not None:
            self._cache[place] = whole
            self._room -= whole.nbytes
            return whole[start : start + wanted]
        waveform = _piece(data, start, out, request)
        if start + wanted < request.num_frames and not self._is_complete(request.clip):
            _refuse_cut(data, request)
            self._complete[request.clip] = True
        return waveform

    def _is_complete(self, clip: int) -> bool:
        if clip >= len(self._complete):
            self._complete.extend(bytes(clip + 1 - len(self._complete)))
        return bool(self._complete[clip])

    def data_of(self, request: ClipRequest) -> bytes:
        """Read a clip's bytes together with the tar header before them, which has to bear the clip's name."""
        if request.size > MAX_CLIP_BYTES:
            raise AudioError(f"{request.size} bytes, more than the limit of {MAX_CLIP_BYTES}")
        return read_member(partial(self._shards.read, request.shard), request.member, request.offset, request.size)


def decode_whole(data: bytes, request: ClipRequest) -> np.ndarray | None:
    """Decode a clip to keep it; None for a damaged one, because damage outside the crop must not count only here.

    None too for long ones of formats whose crops may lie elsewhere when they are sought.
    """
    if _is_long(request):
        return None
    try:
        return _decoded(data, 0, request.num_frames, request)
    except AudioError:
        return None


def _piece(data: bytes, start: int, out: np.ndarray, request: ClipRequest) -> np.ndarray:
    """Decode some frames, equal to the same frames of the whole clip, into `out` where they are int16 as they lie.

    libsndfile (1.2.2) seeks exactly in FLAC and PCM; in Ogg and MP3 it may come out elsewhere, so what lies before the
    crop is decoded too. Long clips of those are never cached, and their crops may lie elsewhere, but always there.
    """
    num_frames = len(out)
    is_inside = start + num_frames < request.num_frames  # at the end, what the header announces is to be tried as well
    if request.extension == "flac" and is_inside and decode_from(data, start, request.rate_hz, out):
        return out
    if start == 0 or request.extension in SEEKS_EXACTLY:
        return _decoded(data, start, num_frames, request, out)
    if _is_long(request):
        try:
            return _decoded(data, start, num_frames, request)
        except AudioError:  # the wrong place may lie too near to the end
            return _decoded(data, 0, start + num_frames, request)[start:]
    return _decoded(data, 0, start + num_frames, request)[start:]


def _is_long(request: ClipRequest) -> bool:
    return request.extension not in SEEKS_EXACTLY and request.num_frames > MAX_SKIP_SECONDS * request.rate_hz


def _refuse_cut(data: bytes, request: ClipRequest) -> None:
    """Find the cut of a clip whose crop lay before it: a clip is bad whatever its crop."""
    if request.extension in SEEKS_EXACTLY:
        _decoded(data, request.num_frames - 1, 1, request)
    elif (announced := probe(data).num_frames) < request.num_frames - MP3_SLACK_FRAMES:
        raise AudioError(f"cut: {announced} of {request.num_frames} frames")


def _decoded(
    data: bytes, start: int, num_frames: int, request: ClipRequest, out: np.ndarray | None = None
) -> np.ndarray:
    waveform, rate_hz = decode_int16(data, start, num_frames, out=out)
    if rate_hz != request.rate_hz:
        raise AudioError(f"has {rate_hz} Hz where the index says {request.rate_hz} Hz")
    return waveform


def _with_zeros(waveform: Samples, num_samples: int) -> Samples:
    missing = (0, num_samples - len(waveform))
    return np.pad(waveform, missing) if isinstance(waveform, np.ndarray) else functional.pad(waveform, missing)


def _scaled(draw: int | None, choices: int) -> int:
    """Pick one of `choices` by a 63-bit number, the middle one without."""
    return (choices - 1) // 2 if draw is None else draw * choices >> DRAW_BITS
