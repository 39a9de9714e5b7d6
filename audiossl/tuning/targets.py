"""What is a method told of a clip that its shard does not say?

When each event happens, for heads that score every moment; or which labels somebody has judged. Both are looked up by
the clip's key in the trainer's process, so that shards, index and loader know nothing of them. Events are rastered as
DCASE does (2306.04186's downstream code): an onset belongs to the column it falls into, an offset to the last one it
touches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.scoring.events import raster
from audiossl.stepping.hostcopy import send

Event = tuple[float, float, int]  # onset and offset in seconds from the clip's start, position in the vocabulary


def frame_targets(
    events: Iterable[Event], num_columns: int, column_seconds: float, start_seconds: float = 0.0, *, num_classes: int
) -> Tensor:
    """Raster events on columns of `column_seconds` from `start_seconds` of the clip on: (num_columns, C) of 0 and 1.

    Onsets are rounded down and offsets up to whole columns; what lies outside is cut off. Raises `UserError` for an
    event that ends before it begins, or whose label does not exist.
    """
    events = list(events)
    for onset, offset, label in events:
        if not 0 <= onset <= offset < math.inf:
            raise UserError(
                f"an event from {onset:g} s to {offset:g} s: it must begin at 0 or later, and before it ends"
            )
        if not 0 <= label < num_classes:
            raise UserError(f"an event of label {label}: there are {num_classes} classes")
    how = dict(num_frames=num_columns, frame_seconds=column_seconds, start_seconds=start_seconds)
    return torch.from_numpy(raster(events, **how, num_classes=num_classes)).float()


class EventTargets:
    """Give a batch its `frame_target` (B, T', C): NaN, for unknown, in clips without an entry of `events`.

    `events` maps a clip's key to its events; an empty list says that nothing happens in it. Where the crop of a clip
    begins is the batch's `start_seconds`; a clip that was repeated to fill its crop counts as unknown.
    """

    def __init__(self, events: Mapping[str, Sequence[Event]], *, num_classes: int):
        self.events, self.num_classes = events, num_classes

    def __call__(self, batch: Batch, num_columns: int, column_seconds: float) -> Batch:
        """Return the batch with targets for `num_columns` moments of `column_seconds` each."""
        starts = [0.0] * len(batch) if batch.start_seconds is None else batch.start_seconds.tolist()
        rows = [torch.zeros(0, num_columns, self.num_classes)]
        for key, start in zip(batch.key, starts, strict=True):
            if key in self.events and not math.isnan(start):
                raster = (num_columns, column_seconds, start)
                rows.append(frame_targets(self.events[key], *raster, num_classes=self.num_classes)[None])
            else:
                rows.append(torch.full((1, num_columns, self.num_classes), math.nan))
        return replace(batch, frame_target=send(torch.cat(rows), _device_of(batch)))


class ClipTargets:
    """Give a batch the `target` (B, C) that `targets` has of its keys, NaN where nobody has judged a label.

    Clips without an entry keep what the shard says.
    """

    def __init__(self, targets: Mapping[str, Tensor]):
        self.targets = targets

    def __call__(self, batch: Batch, num_columns: int = 0, column_seconds: float = 0.0) -> Batch:
        """Return the batch with other targets; the number and length of its columns play no part."""
        if not len(batch):
            return batch
        given = [self.targets.get(key) for key in batch.key]
        unknown = torch.zeros(batch.target.shape[1])
        rows = torch.stack([unknown if row is None else row.to(unknown) for row in given])
        device = batch.target.device
        is_given = send(torch.tensor([[row is not None] for row in given]), device)
        return replace(batch, target=torch.where(is_given, send(rows, device), batch.target))


def _device_of(batch: Batch) -> torch.device:
    first = batch.waveform if batch.waveform is not None else batch.spectrogram
    return torch.device("cpu") if first is None else first.device
