"""How is audio read that libsndfile cannot (AAC and Opus in m4a, mp4, webm), without trusting the file?

By the program `ffmpeg`, where it is installed: it reads one local file, of the containers listed here and no others (a
playlist inside an `.m4a` could name further files and addresses), and writes float samples to a pipe. What it writes
is bounded in length and time, and any error it reports rejects the clip, as a damaged FLAC is rejected.
"""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from audiossl.sound.audio import MAX_CHANNELS, MAX_RATE_HZ, MAX_SECONDS, MIN_RATE_HZ, AudioError, AudioInfo, encode_flac

EXTENSIONS = ("m4a", "mp4", "webm", "aac")
MISSING = "needs the program ffmpeg, which is not installed (apt install ffmpeg, or conda install ffmpeg)"
TIMEOUT_SECONDS = 120.0  # for up to MAX_SECONDS of sound; ten seconds take some 0.1 s
_HEADER_BYTES = 24  # of an AU file: magic, where the samples begin, their size, encoding, rate, channels
_AU_FLOAT32 = 6
_BLOCK_VALUES = 2**18
_MAX_ALLOCATION = 2**28  # bytes that ffmpeg may ask for at once


def extension_of(name: str) -> str | None:
    """Return the extension of a file name in lower case if it is one of EXTENSIONS."""
    extension = name.rpartition(".")[2].lower()
    return extension if "." in name and extension in EXTENSIONS else None


def is_installed() -> bool:
    """Tell whether the program can be found."""
    return shutil.which("ffmpeg") is not None


def to_flac(
    path: Path, rate_hz: int, max_seconds: float = MAX_SECONDS, timeout_seconds: float = TIMEOUT_SECONDS
) -> tuple[bytes, AudioInfo, bool]:
    """Turn the first audio stream of a file into mono 16-bit FLAC at `rate_hz`, as `audio.to_flac` does.

    Raises AudioError when ffmpeg is missing, reports an error, takes longer than `timeout_seconds`, or finds more than
    `max_seconds`, and for NaN or Inf.
    """
    with stream(path, max_seconds, timeout_seconds) as (source_hz, blocks):
        return encode_flac(blocks, source_hz, rate_hz)


@contextmanager
def stream(
    path: Path, max_seconds: float = MAX_SECONDS, timeout_seconds: float = TIMEOUT_SECONDS
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Open the first audio stream of a file: its rate in Hz, and its mono float32 blocks (S,) to the end.

    Raises AudioError as `to_flac` does; what the caller takes between two blocks is no time of ffmpeg's.
    """
    with _decoder(path, max_seconds, timeout_seconds) as pipe:
        source_hz, channels = _read_header(pipe)
        yield source_hz, _mono_blocks(pipe, source_hz, channels, max_seconds)


class _NoAudio(AudioError):
    """Say that the pipe ended before the first sample."""


class _Pipe:
    """Read what a process writes; it is killed once it has been waited for longer than `seconds` in all."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        self.process, self.seconds_left = process, seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        timer, started = threading.Timer(max(0.0, self.seconds_left), self.process.kill), time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.seconds_left -= time.monotonic() - started

    def read(self, num_bytes: int) -> bytes:
        with self.waiting():
            return self.process.stdout.read(num_bytes)


@contextmanager
def _decoder(path: Path, max_seconds: float, timeout_seconds: float) -> Iterator[_Pipe]:
    program = shutil.which("ffmpeg")
    if program is None:
        raise AudioError(MISSING)
    if not os.access(path, os.R_OK) or not path.is_file():
        raise AudioError("cannot be read: missing, or no permission")
    if not path.stat().st_size:
        raise AudioError("zero bytes")
    # one second more than allowed, so that too long a file is told from one that fits
    options = f"-v error -xerror -max_alloc {_MAX_ALLOCATION} -protocol_whitelist file,pipe"
    options += f" -format_whitelist mov,matroska,aac -threads 1 -t {max_seconds + 1:.3f}"
    command = [program, "-nostdin", "-hide_banner", *options.split(), "-i", f"file:{path.absolute()}"]
    command += "-map 0:a:0 -vn -sn -dn -c:a pcm_f32be -f au pipe:1".split()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
        pipe = _Pipe(process, timeout_seconds)
        try:
            with suppress(_NoAudio):  # and say below what ffmpeg says
                yield pipe
            with pipe.waiting():
                process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        _refuse_failure(process.returncode, pipe.seconds_left <= 0, said, timeout_seconds)


def _refuse_failure(code: int, timed_out: bool, said: BinaryIO, timeout_seconds: float) -> None:
    said.seek(0)
    lines = said.read(4096).decode("utf-8", "replace").splitlines()
    if timed_out:
        raise AudioError(f"ffmpeg took longer than {timeout_seconds:.0f} s")
    if code or lines:
        reason = lines[0].rpartition("] ")[2] if lines else f"exit code {code}"
        raise AudioError(f"cannot be decoded: ffmpeg: {' '.join(reason.split())[:160]}")


def _read_header(pipe: _Pipe) -> tuple[int, int]:
    header = pipe.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        raise _NoAudio("ffmpeg gave no audio")
    magic, begin, _, encoding, rate_hz, channels = np.frombuffer(header, ">u4").tolist()
    assert magic == 0x2E736E64 and encoding == _AU_FLOAT32 and begin >= _HEADER_BYTES
    pipe.read(begin - _HEADER_BYTES)
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(f"rate {rate_hz} Hz is outside {MIN_RATE_HZ}..{MAX_RATE_HZ} Hz")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels, more than the limit of {MAX_CHANNELS}")
    return rate_hz, channels


def _mono_blocks(pipe: _Pipe, rate_hz: int, channels: int, max_seconds: float) -> Iterator[np.ndarray]:
    """Yield mono float32 blocks to the end of the pipe; raise AudioError past `max_seconds` and for NaN or Inf."""
    num_frames = 0
    while data := pipe.read(4 * channels * (_BLOCK_VALUES // channels)):
        block = np.frombuffer(data[: len(data) // (4 * channels) * 4 * channels], ">f4").reshape(-1, channels)
        if not len(block):
            break  # killed within a frame
        num_frames += len(block)
        if num_frames > max_seconds * rate_hz:
            raise AudioError(f"longer than the limit of {max_seconds:.0f} s")
        mono = block.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioError("NaN or Inf samples")
        yield mono
    if not num_frames:
        raise _NoAudio("ffmpeg gave no audio")
