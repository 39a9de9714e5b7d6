"""What if the whole corpus fits into memory?

Then it is decoded once, before the first batch, and lies as int16 on the device; clips of another rate than the one
delivered lie in the host's memory and are resampled as they are cut. Requests, crops, batches and the ledger are those
of the ordinary loader, bit for bit: all that differs is where a clip's samples come from. What cannot be decoded whole
is read from its shard each time, so that a damaged clip is judged by its crop, as always.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.loading.clips import ClipDataset, ClipRequest, decode_whole
from audiossl.loading.handover import Samples
from audiossl.remote.location import RemoteShard
from audiossl.running.ranks import is_first_rank
from audiossl.sound.audio import AudioError

if TYPE_CHECKING:
    from audiossl.loading.loader import Requests

log = logging.getLogger(__name__)

MAX_SHARE = 0.5  # of the free memory: the rest is for training
CHUNK = 64  # clips read before they are decoded
GB = 1e9


class Resident:
    """Decode every clip of `requests` and keep it on `device`, or on the host where its rate is not `rate_hz`.

    Attributes: clips, int16 (S,) by (shard, offset), at their own rates; device. Raises `UserError` where they would
    take more than half of the free memory, which `num_sharing` ranks share on a host.
    """

    def __init__(
        self,
        requests: Requests,
        remote: Mapping[str, RemoteShard],
        *,
        rate_hz: int,
        device: torch.device | str,
        num_sharing: int,
    ):
        self.device = torch.device(device)
        self.clips: dict[tuple[str, int], Samples] = {}
        asked = (requests.request(0, 0, clip) for clip in range(len(requests.clips)))
        wanted = list({(request.shard, request.offset): request for request in asked}.values())  # sources may share
        is_device = self.device.type == "cuda"
        here = np.array([request.rate_hz == rate_hz and is_device for request in wanted], bool)
        num_bytes = 2 * np.array([request.num_frames for request in wanted], np.int64)
        on_device, on_host = int(num_bytes[here].sum()), int(num_bytes[~here].sum())
        _refuse(on_device, torch.cuda.mem_get_info(self.device)[0] if is_device else 0, str(self.device))
        _refuse(on_host * num_sharing, free_host_bytes(), f"this host ({num_sharing} ranks share it)")
        reader = ClipDataset(rate_hz=rate_hz, crop_samples=1, padding="zeros", cache_bytes=0, remote=remote)
        with tqdm(total=len(wanted), unit="clip", desc="corpus", disable=not is_first_rank(), leave=False) as bar:
            for (request, whole), is_here in zip(_decoded(reader, wanted), here, strict=True):
                bar.update()
                if whole is not None:
                    samples = torch.from_numpy(whole).to(self.device) if is_here else whole
                    self.clips[request.shard, request.offset] = samples
        where = f"{on_device / GB:.2f} GB on {self.device}, " if is_device else ""
        log.info("%d clips are resident: %s%.2f GB in the host's memory", len(self.clips), where, on_host / GB)
        if len(self.clips) < len(wanted):
            log.warning("%d clips cannot be resident and are read each time", len(wanted) - len(self.clips))


def _decoded(reader: ClipDataset, requests: list[ClipRequest]) -> Iterator[tuple[ClipRequest, np.ndarray | None]]:
    """Decode clips on all cores, in order; None for those that have to be read each time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(requests), CHUNK):
            chunk = requests[first : first + CHUNK]
            yield from zip(chunk, pool.map(_decode, [_bytes(reader, request) for request in chunk], chunk), strict=True)


def _bytes(reader: ClipDataset, request: ClipRequest) -> bytes | None:
    try:
        return reader.data_of(request)
    except AudioError:
        return None


def _decode(data: bytes | None, request: ClipRequest) -> np.ndarray | None:
    return None if data is None else decode_whole(data, request)


def _refuse(needed: int, free: int, where: str) -> None:
    if needed > MAX_SHARE * free:
        raise UserError(
            f"data.resident=true: the clips take {needed / GB:.2f} GB as int16, more than half of the {free / GB:.2f} "
            f"GB that are free on {where}; take data.resident=false, or fewer clips (data.fraction)"
        )


def free_host_bytes() -> int:
    """Say how much memory programs may still take here, within the limit of a container or job."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kilobytes = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(kilobytes["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free
