"""What does it bring to have a small corpus lie on the device? `python -m benchmarks.resident [--workers 2]`.

The demo set is packed as ten-second FLAC clips at 32 kHz. The same batches of 2.56 s crops are then asked of the
workers' loader, without a cache and with one that is full, and of the resident one: clips/s of the loader alone, and of
training steps of a tiny Audio-MAE on the device there is. All in one process and one run; ratios to the first row.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
import yaml

from audiossl.config.settings import instantiate
from audiossl.noise import Noise
from audiossl.pack import Settings, pack
from audiossl.running.build import method_from_config
from audiossl.shards import ShardData
from benchmarks import ROOT
from benchmarks.loader import RATE, write_clips

BATCH = 32
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def batches_of(shards: Path, num_steps: int, **changes):
    """Serve `num_steps` batches without end of the corpus."""
    settings = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
    settings |= dict(
        shards=str(shards), rate_hz=RATE, batch_size=BATCH, crop_seconds=2.56, cache_mb=0, validation_clips=0
    )
    settings |= dict(mean=0.0, std=1.0, split=None) | changes
    data = ShardData(**settings, default_rate_hz=RATE, run_dir=None, needs_labels=False)
    return iter(
        data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=num_steps, seed=0, device=DEVICE)
    )


def clips_per_second(batches, num_warm: int, num_timed: int, use) -> float:
    """Time `num_timed` batches, handed to `use`, after the first ones."""
    for batch in itertools.islice(batches, num_warm):
        use(batch)
    synchronise()
    started, num_clips = time.perf_counter(), 0
    for batch in itertools.islice(batches, num_timed):
        use(batch)
        num_clips += len(batch)
    synchronise()
    return num_clips / (time.perf_counter() - started)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tiny_step():
    """Build a tiny Audio-MAE; returns a function that trains it on a batch."""
    frontend = yaml.safe_load((ROOT / "conf" / "frontend" / "kaldi_fbank.yaml").read_text())
    model = yaml.safe_load((ROOT / "conf" / "model" / "audiomae.yaml").read_text())
    tiny = dict(width=64, depth=2, num_heads=4, decoder_width=32, decoder_depth=1, decoder_num_heads=2)
    frontend = instantiate(frontend | dict(seconds=2.56, mean=0.0, std=1.0))
    method = method_from_config({"model": model | tiny, "frontend": {}}, frontend=frontend, vocabulary=None).to(DEVICE)
    optimiser = torch.optim.AdamW(method.parameters(), 1e-4)

    def step(batch) -> None:
        batch = batch.to(DEVICE, non_blocking=True)
        batch.waveform = batch.waveform.float() / 32768
        batch.waveform = batch.waveform[
            :, ::2
        ]  # the front end hears 16 kHz; what a resampler costs is not the question
        loss = method(batch, generator=Noise.for_batch(0, 0, len(batch), DEVICE))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clips", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder) / "clips", "flac", 10, args.clips)
        pack(Path(folder) / "clips", Path(folder) / "shards", Settings("keep", None, 10**9), workers=1)
        epoch = -(-args.clips // BATCH)
        ways = {
            f"{args.workers} worker(s), no cache": dict(num_workers=args.workers),
            f"{args.workers} worker(s), full cache": dict(num_workers=args.workers, cache_mb=4096 * args.workers),
            "resident": dict(resident=True),
        }
        print(f"device: {DEVICE}; {args.clips} clips of 10 s; crops of 2.56 s in batches of {BATCH}")
        print(f"{'':28}{'loader':>16}{'with a tiny step':>26}")
        first = []
        for name, way in ways.items():
            alone = clips_per_second(batches_of(Path(folder) / "shards", 20 * epoch, **way), 8 * epoch, 12 * epoch, len)
            step = tiny_step()
            both = clips_per_second(batches_of(Path(folder) / "shards", 14 * epoch, **way), 8 * epoch, 6 * epoch, step)
            first = first or [alone, both]
            ratios = [f"{alone:.0f}/s ({alone / first[0]:.1f}x)", f"{both:.0f}/s ({both / first[1]:.1f}x)"]
            print(f"{name:28}{ratios[0]:>16}{ratios[1]:>26}")


if __name__ == "__main__":
    main()
