"""How does a batch get from a worker to the trainer without being copied?

A worker decodes straight into a slot of memory that it shares with the trainer. Slots are made once, before the workers
start, and used again as soon as the trainer has let go of the last tensor that looks at them: new shared memory for
every batch, and stacking crops into it, took a third of a worker's time, most of it for pages touched for the first
time. What finds no free slot, because the trainer keeps what it was given, travels as torch sends it.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from multiprocessing import reduction
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from audiossl.batch import Batch, Skipped, multi_hot

log = logging.getLogger(__name__)

SPARE_SLOTS = 4  # of each worker, for batches that the trainer looks at; one that is never needed takes no memory
PAGE = mmap.ALLOCATIONGRANULARITY

Samples = np.ndarray | Tensor  # int16


class Ring:
    """Share `num_workers` times `num_slots` slots of `slot_bytes` for trainer and workers; a byte each says who has it.

    Only its worker takes a slot and only the trainer frees it, so no lock is needed. The memory (`memfd`) has no name
    that could be left behind, and no limit but the memory's: /dev/shm is 64 MB in many containers. Workers get it by
    pickling, as they are started. Raises OSError where there is none to be had.
    """

    def __init__(
        self,
        num_workers: int,
        num_slots: int,
        slot_bytes: int,
        name: str | None = None,
        descriptor: reduction.DupFd | None = None,
    ):
        self.num_workers, self.num_slots, self.slot_bytes = num_workers, num_slots, _whole_pages(slot_bytes)
        self.name = name or uuid4().hex
        self._start = _whole_pages(num_workers * num_slots)
        num_bytes = self._start + num_workers * num_slots * self.slot_bytes
        if descriptor is None:
            self._descriptor = os.memfd_create("audiossl-batches", os.MFD_CLOEXEC)
        else:
            self._descriptor = descriptor.detach()
        weakref.finalize(self, os.close, self._descriptor)
        if descriptor is None:
            os.ftruncate(self._descriptor, num_bytes)
        self._memory = mmap.mmap(self._descriptor, num_bytes)
        self._is_taken = np.ndarray(num_workers * num_slots, np.uint8, self._memory)
        self._process, self._viewed, self._is_closed = os.getpid(), set(), False
        _rings[self.name] = self

    def __reduce__(self):
        descriptor = reduction.DupFd(self._descriptor)
        return Ring, (self.num_workers, self.num_slots, self.slot_bytes, self.name, descriptor)

    def take(self, worker: int) -> int | None:
        """Take a free slot of a worker, the first one, so that few are ever touched; None where there is none."""
        first = worker * self.num_slots
        free = np.flatnonzero(self._is_taken[first : first + self.num_slots] == 0)
        if not len(free):
            return None
        self._is_taken[first + free[0]] = 1
        return first + int(free[0])

    def array(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """Look at a slot as int16."""
        return np.ndarray(shape, np.int16, self._memory, self._start + slot * self.slot_bytes)

    def received(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Look at what a worker has written; the slot is free again when nothing looks at it any longer."""
        array = self.array(slot, shape)
        self._viewed.add(slot)
        weakref.finalize(array, self._free, slot).atexit = False
        return torch.from_numpy(array)

    def _free(self, slot: int) -> None:
        if os.getpid() != self._process:  # forked from the trainer, which may look at its own copy of the tensor
            return
        self._viewed.discard(slot)
        if self._is_closed:
            self._give_back(slot)
        self._is_taken[slot] = 0

    def close(self) -> None:
        """Give back what no tensor looks at now, and the rest when it is let go; the workers have ended."""
        self._is_closed = True
        for slot in range(self.num_workers * self.num_slots):
            if slot not in self._viewed:
                self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        self._memory.madvise(mmap.MADV_REMOVE, self._start + slot * self.slot_bytes, self.slot_bytes)


_rings: weakref.WeakValueDictionary[str, Ring] = weakref.WeakValueDictionary()  # of this process, by name


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def make_ring(num_workers: int, prefetch: int, slot_bytes: int) -> Ring | None:
    """Make slots for as many batches as are fetched ahead, and some; None where no such memory is to be had."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return None
    try:
        return Ring(num_workers, prefetch + SPARE_SLOTS, slot_bytes)
    except (OSError, OverflowError) as error:
        log.warning("no memory can be shared with the workers (%s): each batch is copied on its way from them", error)
        return None


class Slots:
    """Give one worker its slots of a ring."""

    def __init__(self, ring: Ring, worker: int):
        self.ring, self.worker = ring, worker

    def take(self, num_bytes: int) -> int | None:
        """Take a free slot for `num_bytes`; None where none is free or large enough."""
        return self.ring.take(self.worker) if num_bytes <= self.ring.slot_bytes else None


class Crop(NamedTuple):
    """Hold int16 samples (S,), of which `num_samples` are no padding, or the reason why there are none."""

    row: int
    key: str
    waveform: Samples | None
    num_samples: int
    skipped: Skipped | None
    labels: tuple[int, ...] | None = None
    start_seconds: float = 0.0  # where in its clip it begins; NaN for a clip that is repeated


class Crops(list[Crop]):
    """List the crops of a batch; those that could be read are the first rows of `room`, where there is one."""

    room: np.ndarray | None = None
    ring: Ring | None = None  # None but in a worker
    slot: int | None = None  # of the ring, where `room` lies in one

    def make_room(self, num_rows: int, num_samples: int, slots: Slots | None) -> np.ndarray:
        """Make room for crops, (num_rows, num_samples) int16, in a free slot where there is one."""
        shape = (num_rows, num_samples)
        if slots is not None:
            self.ring, self.slot = slots.ring, slots.take(2 * num_rows * num_samples)
        self.room = np.empty(shape, np.int16) if self.slot is None else self.ring.array(self.slot, shape)
        return self.room


class Parcel:
    """Hold a batch on its way to the trainer, where it is unpickled as the `Batch`.

    The waveforms stay in their `slot`. The other tensors are small and are copied through the pipe, which is quicker
    than to give each shared memory of its own.
    """

    def __init__(self, batch: Batch, ring: Ring, slot: int | None):
        self.batch, self.ring, self.slot = batch, ring, slot

    def __reduce__(self):
        fields = dict(vars(self.batch))
        waveform = fields.pop("waveform")
        fields = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in fields.items()}
        if self.slot is None:
            return _unpacked, (fields, waveform)
        return _unpacked, (fields, None, self.ring.name, self.slot, tuple(waveform.shape))


def _unpacked(
    fields: dict,
    waveform: Tensor | None,
    ring_name: str | None = None,
    slot: int | None = None,
    shape: tuple[int, ...] = (),
) -> Batch:
    if waveform is None and (ring := _rings.get(ring_name)) is not None:  # else the iteration is over: nobody looks
        waveform = ring.received(slot, shape)
    tensors = {name: torch.from_numpy(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    return Batch(waveform=waveform, **{**fields, **tensors})


def collate(crops: list[Crop], crop_samples: int, num_classes: int | None = None) -> Batch | Parcel:
    """Stack what could be read, (B, crop_samples) int16; B is smaller, at worst 0, where clips were skipped.

    With `num_classes` every crop has labels and the batch a `target`, float32 (B, num_classes): 1 for each of a clip's.
    In a worker that has slots the batch is a parcel, which becomes a batch on its way to the trainer.
    """
    good = [crop for crop in crops if crop.waveform is not None]
    room, ring = (crops.room, crops.ring) if isinstance(crops, Crops) else (None, None)
    if room is None:
        waveform = _stacked([crop.waveform for crop in good], crop_samples)
    else:
        waveform = torch.from_numpy(room[: len(good)])
    batch = Batch(
        waveform=waveform,
        num_samples=torch.tensor([crop.num_samples for crop in good], dtype=torch.int64),
        rows=torch.tensor([crop.row for crop in good], dtype=torch.int64),
        key=[crop.key for crop in good],
        target=None if num_classes is None else multi_hot([crop.labels for crop in good], num_classes),
        skipped=[crop.skipped for crop in crops if crop.skipped is not None],
        start_seconds=torch.tensor([crop.start_seconds for crop in good], dtype=torch.float64),
    )
    return batch if ring is None else Parcel(batch, ring, crops.slot)


def _stacked(waveforms: list[Samples], crop_samples: int) -> torch.Tensor:
    """Stack crops; where some lie on a device, all come to it."""
    devices = [waveform.device for waveform in waveforms if isinstance(waveform, torch.Tensor)]
    if devices:
        return torch.stack([torch.as_tensor(waveform, device=devices[0]) for waveform in waveforms])
    return torch.from_numpy(np.stack(waveforms) if waveforms else np.zeros((0, crop_samples), np.int16))
