"""Which clips does one look at, to see whether a model has learned anything?"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from audiossl.index import Index
from audiossl.sound.audio import AudioError, decode, resample

log = logging.getLogger(__name__)

MAX_SECONDS = 30.0
NUM_CONSIDERED = 1000


def pick(index: Index, clips: Sequence[int], num_clips: int, *, rate_hz: int) -> list[tuple[str, Tensor]]:
    """Pick `num_clips` of some clips, one of each kind in turn: name and waveform (S,) float32 at `rate_hz`.

    The kind is what the clip's json says (`kind`), else its labels. At most 30 s of each; an unreadable clip is passed
    over with a line in the log.
    """
    by_kind: dict[str, list[int]] = {}
    for i in clips if num_clips else []:
        kind = index.read_meta(i).get("kind") or ", ".join(index.labels(i))
        by_kind.setdefault(str(kind), []).append(i)
    depth = max(map(len, by_kind.values()), default=0)
    turns = [(kind, i) for turn in range(depth) for kind, those in by_kind.items() for i in those[turn : turn + 1]]
    examples: list[tuple[str, Tensor]] = []
    for kind, i in turns:
        if len(examples) == num_clips:
            break
        try:
            examples.append((f"{kind}: {index.key(i)}".removeprefix(": "), _waveform(index, i, rate_hz)))
        except AudioError as error:
            log.warning("%s in %s makes no picture: %s", index.key(i), index.shard_path(i), error)
    return examples


def _waveform(index: Index, i: int, rate_hz: int) -> Tensor:
    stored_hz = int(index.rate_hz[i])
    num_frames = min(int(index.num_frames[i]), int(MAX_SECONDS * stored_hz))
    waveform, stored_hz = decode(index.read(i), 0, num_frames)
    return torch.from_numpy(resample(waveform, stored_hz, rate_hz))
