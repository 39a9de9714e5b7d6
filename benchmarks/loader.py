"""How many clips a second does one core read, decode and cut? `python -m benchmarks.loader`.

Ten-second pieces of the demo set are packed as FLAC and as Vorbis at 32 kHz; crops of 2.56 s and whole clips are then
read through the loader in one process, as one worker would. Prints clips/s and the ratio to the first row, and at the
end what the look at each clip's tar header costs: clips/s without it and with it, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import yaml

from audiossl.index import Index
from audiossl.pack import Settings, pack
from audiossl.packing import tarfiles
from audiossl.shards import ShardData
from audiossl.sound.audio import decode, resample, to_int16
from benchmarks import ROOT

RATE = 32_000
ROWS = (  # codec, clip seconds, crop seconds, rate delivered, cache
    ("flac", 10, 2.56, RATE, False),
    ("flac", 10, 10.0, RATE, False),
    ("flac", 5, 2.56, RATE, False),
    ("flac", 10, 2.56, 16_000, False),
    ("flac", 10, 2.56, RATE, True),
    ("ogg", 10, 2.56, RATE, False),
    ("ogg", 10, 10.0, RATE, False),
    ("ogg", 5, 2.56, RATE, False),
    ("ogg", 10, 2.56, 16_000, False),
    ("ogg", 10, 2.56, RATE, True),
    ("ogg", 10, 2.56, 16_000, True),
)


def write_clips(folder: Path, codec: str, seconds: int, num_clips: int) -> None:
    """Cut the demo set's audio, strung together, into clips."""
    index = Index.load(ROOT / "demo" / "shards")
    audio = np.concatenate([resample(*decode(index.read(i)), RATE) for i in range(min(len(index), num_clips))])
    folder.mkdir(parents=True)
    for number in range(num_clips):
        piece = np.take(audio, number * seconds * RATE + np.arange(seconds * RATE), mode="wrap")
        subtype = "PCM_16" if codec == "flac" else "VORBIS"
        soundfile.write(folder / f"{number:04d}.{codec}", to_int16(piece), RATE, subtype=subtype)


def clips_per_second(shards: Path, crop_seconds: float, rate_hz: int, has_cache: bool, num_clips: int) -> float:
    """Time the second epoch, so that a cache is full."""
    settings = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
    settings |= dict(shards=str(shards), rate_hz=rate_hz, batch_size=num_clips // 10, num_workers=0)
    settings |= dict(crop_seconds=crop_seconds, cache_mb=1024 if has_cache else 0)
    data = ShardData(**settings, default_rate_hz=rate_hz, run_dir=None, needs_labels=False)
    batches = iter(data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=20, seed=0))
    for _ in range(10):
        next(batches)
    started = time.perf_counter()
    seen = sum(len(batch) for batch in batches)
    return seen / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    args = parser.parse_args()
    first = None
    print("codec  clip s  crop s  out Hz  cache  clips/s  ratio")
    with tempfile.TemporaryDirectory() as folder:
        for codec, seconds, crop_seconds, rate_hz, has_cache in ROWS:
            source, shards = Path(folder, f"{codec}{seconds}"), Path(folder, f"{codec}{seconds}_shards")
            if not source.exists():
                write_clips(source, codec, seconds, args.clips)
                pack(source, shards, Settings("keep", None, 10**9), workers=1)
            rate = clips_per_second(shards, crop_seconds, rate_hz, has_cache, args.clips)
            first = first or rate
            cache = "yes" if has_cache else "no"
            print(
                f"{codec:5}  {seconds:6}  {crop_seconds:6.2f}  {rate_hz:6}  {cache:5}  {rate:7.0f}  {rate / first:5.2f}"
            )
        print(f"without / with the check of tar headers: {header_check(Path(folder, 'flac10_shards'), args.clips):.3f}")


def header_check(shards: Path, num_clips: int) -> float:
    """Take turns, and compare the best of each."""
    real, best = tarfiles._check_member, {True: 0.0, False: 0.0}
    for turn in range(10):
        is_checked = bool(turn % 2)
        tarfiles._check_member = real if is_checked else lambda *_: None
        best[is_checked] = max(best[is_checked], clips_per_second(shards, 2.56, RATE, False, num_clips))
    tarfiles._check_member = real
    return best[False] / best[True]


if __name__ == "__main__":
    main()
