"""Small corpora as real tar shards with an index, which may hold anything that claims to be audio."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from audiossl.batch import Batch
from audiossl.indexing.indexfile import sha256_of, write_index
from audiossl.shards import ShardData

RATE = 8000
RAGGED = (10, 3, 10, 7, 10, 1)  # clips per shard
SUBTYPES = {"flac": "PCM_16", "wav": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


def audio(waveform, rate_hz: int = RATE, extension: str = "flac", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate_hz, format=extension.upper(), subtype=subtype or SUBTYPES[extension])
    return file.getvalue()


def noise(seed: int, num_frames: int, channels: int = 1) -> np.ndarray:
    shape = num_frames if channels == 1 else (num_frames, channels)
    return np.random.default_rng(seed).integers(-9000, 9000, shape, dtype=np.int16)


def write_shards(folder: Path, shards: list[list[tuple]]) -> str:
    """Write clips (key, bytes, extension, frames, rate, labels, split) as tars with an index that believes them."""
    folder.mkdir(exist_ok=True)
    described = []
    for number, clips in enumerate(shards):
        path = folder / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for key, data, extension, *_ in clips:
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        rows = [
            [key, extension, offsets[f"{key}.{extension}"], len(data), frames, rate, 1, labels, split, None]
            for key, data, extension, frames, rate, labels, split in clips
        ]
        described.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "rows": rows})
    write_index(folder / "index.safetensors", described)
    return str(folder)


def clip(
    key: str, data: bytes, frames: int, extension: str = "flac", rate_hz: int = RATE, split="train", labels=None
) -> tuple:
    return (key, data, extension, frames, rate_hz, [key[0]] if labels is None else labels, split)


EVERY_CLIP_ONCE = dict(  # the settings of `ShardData` that choose and order clips, as the shipped configs have them
    sources=None,
    fraction=1.0,
    fraction_by="random",
    fraction_seed=0,
    sampling=None,
    sampling_offset=None,
    sampling_reduce="sum",
    replacement=None,
    draws_per_epoch=None,
    shuffle_shards=None,
)


NO_DAMAGE = dict(  # and those for what may be wrong with shards, or far away
    damaged_shards="stop",
    max_bad_fraction=0.01,
    max_bad_in_a_row=100,
    timeout_seconds=180.0,
    cache_dir=None,
    cache_gb=50.0,
)


def data_of(shards: str | None, **changes) -> ShardData:
    settings = dict(rate_hz=None, batch_size=4, num_workers=0, crop_seconds=0.1, padding="cyclic", validation_clips=0)
    settings |= NO_DAMAGE | dict(max_bad_fraction=1.0)
    settings |= dict(split=None, cache_mb=0, mean=0.0, std=1.0, default_rate_hz=16000, run_dir=None)
    settings |= dict(validation_split=None, needs_labels=False)
    return ShardData(shards=shards, **{**EVERY_CLIP_ONCE, **settings, **changes})


def train_batches(data: ShardData, **changes) -> list[Batch]:
    settings = dict(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=12, seed=5)
    return list(data.train_loader(**{**settings, **changes}))


def digest(batches: list[Batch]) -> list:
    return [(b.key, b.rows.tolist(), b.num_samples.tolist(), b.waveform.numpy().tobytes()) for b in batches]


def ragged_corpus(folder: Path) -> str:
    """Write 41 clips of noise, c00 to c40, of 0.2 to 0.6 s in six ragged shards."""
    lengths = iter([(i, 1600 + 80 * i) for i in range(sum(RAGGED))])
    shards = [[next(lengths) for _ in range(num_clips)] for num_clips in RAGGED]
    return write_shards(folder, [[clip(f"c{i:02d}", audio(noise(i, n)), n) for i, n in shard] for shard in shards])


def long_loader(shards: str) -> Iterator[Batch]:
    """Iterate with two workers, for longer than any test."""
    data = data_of(shards, num_workers=2)
    return iter(data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=20_000, seed=0))


def many_clips(folder: Path, count: int) -> str:
    """Write shards of as many clips of a fifth of a second, a hundred a shard."""
    made = [clip(f"c{i:05d}", audio(noise(i, 1600)), 1600) for i in range(count)]
    return write_shards(folder, [made[first : first + 100] for first in range(0, count, 100)])
