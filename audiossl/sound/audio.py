"""How does one audio file, whoever wrote it, become a mono waveform, without trusting what its header says?

Everything is decoded in blocks by libsndfile, and each claim of the header (length, rate, channels) is checked against
a limit before memory is asked for: a 5 kB FLAC can announce 2^63 frames. What cannot be used raises `AudioError` with a
reason short enough for a column of `rejected.csv`.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

# an index stores positions in this tuple: append only
EXTENSIONS = ("flac", "wav", "ogg", "mp3", "opus", "aiff", "aif", "oga")
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 384_000
MAX_SECONDS = 3600.0  # of one clip
MAX_CHANNELS = 64
_BLOCK_VALUES = 2**20  # frames times channels decoded at a time
_MP3_SLACK_FRAMES = 2 * 1152  # encoder padding, which some headers count and some do not

Source = bytes | bytearray | memoryview | Path


class AudioError(Exception):
    """Say why a clip cannot be used."""


@dataclass(frozen=True)
class AudioInfo:
    """Describe what a header announces: frames per channel, rate, channels."""

    num_frames: int
    rate_hz: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.num_frames / self.rate_hz


def probe(source: Source, max_seconds: float = MAX_SECONDS) -> AudioInfo:
    """Read the header of encoded audio (bytes or a path) without decoding it.

    Raises AudioError for what is not audio and for a length, rate or channel count out of bounds.
    """
    with _open(source, max_seconds) as file:
        return _info(file)


def decode(
    source: Source, start: int = 0, num_frames: int | None = None, max_seconds: float = MAX_SECONDS
) -> tuple[np.ndarray, int]:
    """Decode frames [start, start + num_frames), to the end if None, as mono float32 (S,) and the rate in Hz.

    Seeks to `start`, so a crop costs what it is long; channels are averaged. `max_seconds` bounds what is decoded (a
    crop of a longer clip is fine). Raises AudioError for what cannot be decoded, non-finite samples and a cut file.
    """
    with _sought(source, start, num_frames, max_seconds) as (file, wanted):
        return _joined(_mono_blocks(file, wanted)), file.samplerate


def decode_int16(
    source: Source, start: int = 0, num_frames: int | None = None, out: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Decode as `decode` does and round to int16; mono 16-bit audio, as packed, is taken as it lies, with no detour.

    That is written to `out` (num_frames,) where there is one, and `out` returned.
    """
    with _sought(source, start, num_frames, MAX_SECONDS) as (file, wanted):
        if file.channels != 1 or file.subtype != "PCM_16":
            return to_int16(_joined(_mono_blocks(file, wanted))), file.samplerate
        out = np.empty(wanted, np.int16) if out is None else out
        for _ in _mono_blocks(file, wanted, "int16", out):
            pass
        return out, file.samplerate


@contextmanager
def _sought(
    source: Source, start: int, num_frames: int | None, max_seconds: float
) -> Iterator[tuple[soundfile.SoundFile, int]]:
    """Open audio at frame `start`; gives it with how many frames are wanted."""
    with _open(source, None if num_frames is not None else max_seconds) as file:
        info = _info(file)
        wanted = max(0, info.num_frames - start) if num_frames is None else num_frames
        if start + wanted > info.num_frames:
            raise AudioError(f"frames {start}..{start + wanted} asked of {info.num_frames}")
        if wanted > max_seconds * info.rate_hz:
            raise AudioError(f"{wanted / info.rate_hz:.0f} s asked, more than the limit of {max_seconds:.0f} s")
        if start:
            _guard(file.seek, start)
        yield file, wanted


def _joined(blocks: Iterator[np.ndarray]) -> np.ndarray:
    blocks = list(blocks)
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros(0, np.float32), *blocks])


@contextmanager
def stream(source: Source, max_seconds: float = MAX_SECONDS) -> Iterator[tuple[AudioInfo, Iterator[np.ndarray]]]:
    """Open encoded audio to be decoded in mono float32 blocks (S,), all of it in bounded memory.

    Raises AudioError as `check` does, for a file cut on its way before the first block where its header tells.
    """
    with _open(source, max_seconds) as file:
        _refuse_cut(source)
        info = _info(file)
        yield info, _mono_blocks(file, info.num_frames)


def check(source: Source, max_seconds: float = MAX_SECONDS) -> AudioInfo:
    """Decode everything in bounded memory and forget it; return what the header says once it has proved true."""
    with _open(source, max_seconds) as file:
        info = _info(file)
        for _ in _mono_blocks(file, info.num_frames):
            pass
    _refuse_cut(source)
    return info


def to_flac(source: Source, rate_hz: int, max_seconds: float = MAX_SECONDS) -> tuple[bytes, AudioInfo, bool]:
    """Turn encoded audio into mono 16-bit FLAC at `rate_hz` (soxr HQ).

    Returns its bytes, what is in them, and whether the waveform was far over full scale and clipped. Memory stays
    at one block plus the result, whatever the length. Raises AudioError as `check` does.
    """
    with _open(source, max_seconds) as file:
        info = _info(file)
        found = encode_flac(_mono_blocks(file, info.num_frames), info.rate_hz, rate_hz)
    _refuse_cut(source)
    return found


def encode_flac(blocks: Iterator[np.ndarray], from_hz: int, to_hz: int) -> tuple[bytes, AudioInfo, bool]:
    """Resample mono float blocks and write them as 16-bit FLAC; returns what `to_flac` does."""
    target, clipped, written = io.BytesIO(), False, 0
    resampler = None
    if from_hz != to_hz:
        resampler = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")
    with soundfile.SoundFile(target, "w", to_hz, 1, format="FLAC", subtype="PCM_16") as flac:
        end = [np.zeros(0, np.float32)] if resampler else []
        for block in chain(blocks, end):
            if resampler:
                block = resampler.resample_chunk(block, last=len(block) == 0)
            # resampling overshoots a full-scale square wave by some 10 %: only more than that is worth a word
            clipped = clipped or bool(len(block) and np.abs(block).max() > 1.5)
            flac.write(to_int16(block))
            written += len(block)
    if written == 0:
        raise AudioError("no samples")
    return target.getvalue(), AudioInfo(written, to_hz, 1), clipped


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Round a float waveform in [-1, 1] to int16, clipping; 16-bit sources come back bit for bit."""
    scaled = waveform * np.float32(32768)
    return np.clip(np.rint(scaled, out=scaled), -32768, 32767, out=scaled).astype(np.int16)


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample a mono waveform (S,) by soxr HQ; the same array when the rates are equal."""
    return waveform if from_hz == to_hz else soxr.resample(waveform, from_hz, to_hz, quality="HQ")


def extension_of(name: str) -> str | None:
    """Return the audio extension of a file name in lower case, or None when it is not one we read."""
    extension = name.rpartition(".")[2].lower()
    return extension if "." in name and extension in EXTENSIONS else None


@contextmanager
def _open(source: Source, max_seconds: float | None) -> Iterator[soundfile.SoundFile]:
    try:
        stream = open(source, "rb") if isinstance(source, Path) else io.BytesIO(source)
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error
    with stream:
        if not stream.read(1):
            raise AudioError("zero bytes")
        stream.seek(0)
        with _guard(soundfile.SoundFile, stream) as file:
            _refuse_impossible(file, max_seconds)
            yield file


def _guard(call, *args, **kwargs):
    """Call into libsndfile; its errors name a Python object where we want a reason."""
    try:
        return call(*args, **kwargs)
    except (soundfile.SoundFileError, RuntimeError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise AudioError(f"cannot be decoded: {' '.join(reason.split())}") from error


def _info(file: soundfile.SoundFile) -> AudioInfo:
    return AudioInfo(file.frames, file.samplerate, file.channels)


def _refuse_impossible(file: soundfile.SoundFile, max_seconds: float | None) -> None:
    if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
        raise AudioError(f"rate {file.samplerate} Hz is outside {MIN_RATE_HZ}..{MAX_RATE_HZ} Hz")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise AudioError(f"{file.channels} channels, more than the limit of {MAX_CHANNELS}")
    if file.frames <= 0:
        raise AudioError("no samples")
    if file.frames >= 2**48:  # libsndfile's way to say that a streamed FLAC does not know its length
        raise AudioError("announces no length")
    if max_seconds is not None and file.frames > max_seconds * file.samplerate:
        seconds = file.frames / file.samplerate
        raise AudioError(f"announces {seconds:.0f} s, more than the limit of {max_seconds:.0f} s")


def _mono_blocks(
    file: soundfile.SoundFile,
    wanted: int,
    dtype: Literal["float32", "int16"] = "float32",
    out: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield `wanted` frames as mono blocks, those of `out` if given; raise AudioError for fewer, and for NaN or Inf."""
    slack = _MP3_SLACK_FRAMES if file.format.startswith("MP") else 0
    left = wanted
    while left > 0:
        into = None if out is None else out[wanted - left :, None]
        block = _guard(file.read, min(left, _BLOCK_VALUES // file.channels), dtype=dtype, always_2d=True, out=into)
        if not len(block):
            if left <= slack:
                return
            raise AudioError(f"cut: {wanted - left} of {wanted} frames")
        with np.errstate(invalid="ignore"):  # Inf and -Inf on two channels
            mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        if dtype == "float32" and not np.isfinite(mono).all():
            raise AudioError("NaN or Inf samples")
        left -= len(block)
        yield mono


def _refuse_cut(source: Source) -> None:
    """Find the cut that libsndfile hides: it shortens WAV, AIFF and Ogg to what is there and reports no error."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            head, size = file.read(8), source.stat().st_size
            file.seek(max(0, size - 2**17))
            tail = file.read()
    else:
        head, size, tail = bytes(source[:8]), len(source), bytes(source[-(2**17) :])
    announced = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big") + 8
    # 0 and 2^32 - 1 are what a writer leaves who could not go back to fill the length in
    if head[:4] in (b"RIFF", b"FORM") and size < announced < 2**32 - 1:
        raise AudioError(f"cut: {size} of {announced} bytes")
    if head[:4] == b"OggS":
        page = tail[tail.rfind(b"OggS") :]
        table = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if len(page) < 27 or len(page) < 27 + page[26] + sum(table):
            raise AudioError("cut: the last Ogg page is not whole")
