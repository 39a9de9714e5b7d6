"""How is any audio file read a block at a time, so that an hour takes no more memory than a minute?

By libsndfile, and by the program ffmpeg where the name says that only it can: m4a, mp4, webm, aac. Both check every
claim of the header against a limit and refuse what is cut, or not finite, with a reason of one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from audiossl.errors import UserError
from audiossl.sound import audio, ffmpeg

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """Hold an open file: its rate, the frames it announces (None where only the end tells) and its mono blocks (S,)."""

    rate_hz: int
    num_frames: int | None
    blocks: Iterator[np.ndarray]


@contextmanager
def open_audio(path: str | Path, max_seconds: float = audio.MAX_SECONDS) -> Iterator[Stream]:
    """Open a file of any rate, length and number of channels, which are averaged; samples are float32 in [-1, 1].

    Raises `AudioError` where it is opened, or where its blocks are taken, for what cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        raise audio.AudioError("is a folder")
    if ffmpeg.extension_of(path.name):
        with ffmpeg.stream(path, max_seconds) as (rate_hz, blocks):
            yield Stream(rate_hz, None, blocks)
    else:
        with audio.stream(path, max_seconds) as (info, blocks):
            yield Stream(info.rate_hz, info.num_frames, blocks)


def read(path: str | Path) -> tuple[Tensor, int]:
    """Read a whole file: its waveform (S,), float32 in [-1, 1], channels averaged, and its rate in Hz.

    Raises `UserError` that names the file and what is wrong with it.
    """
    import torch

    try:
        with open_audio(path) as stream:
            return torch.from_numpy(np.concatenate(list(stream.blocks))), stream.rate_hz
    except audio.AudioError as error:
        raise UserError(f"{path}: {error}") from error


def is_audio(name: str) -> bool:
    """Tell by its extension whether a file in a folder is one to read."""
    return (audio.extension_of(name) or ffmpeg.extension_of(name)) is not None
