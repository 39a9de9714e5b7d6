"""What does it bring to have a small corpus lie on the device? `python -m benchmarks.resident [--workers 2]`.

The demo set is packed as ten-second FLAC clips at 32 kHz. The same batches of 2.56 s crops are then asked of the
workers' loader, without a cache and with one that is full, and of the resident one: clips/s of the loader alone, and of
training steps of a tiny Audio-MAE on the device there is. All in one process and one run; ratios to the first row.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from matplotlib.axes import Axes

from audiossl.config.settings import instantiate
from audiossl.noise import Noise
from audiossl.pack import Settings, pack
from audiossl.running.build import method_from_config
from audiossl.shards import ShardData
from benchmarks import ROOT
from benchmarks.common import Report, parser_of, prepared, progress, synchronize
from benchmarks.loader import RATE, write_clips

BATCH = 32


def batches_of(shards: Path, num_steps: int, *, device: torch.device, **changes):
    """Serve `num_steps` batches without end of the corpus."""
    settings = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
    settings |= dict(
        shards=str(shards), rate_hz=RATE, batch_size=BATCH, crop_seconds=2.56, cache_mb=0, validation_clips=0
    )
    settings |= dict(mean=0.0, std=1.0, split=None) | changes
    data = ShardData(**settings, default_rate_hz=RATE, run_dir=None, needs_labels=False)
    return iter(
        data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=num_steps, seed=0, device=device)
    )


def clips_per_second(batches, device: torch.device, num_warm: int, num_timed: int, use) -> float:
    """Time `num_timed` batches, handed to `use`, after the first ones."""
    for batch in itertools.islice(batches, num_warm):
        use(batch)
    synchronize(device.type)
    started, num_clips = time.perf_counter(), 0
    for batch in itertools.islice(batches, num_timed):
        use(batch)
        num_clips += len(batch)
    synchronize(device.type)
    return num_clips / (time.perf_counter() - started)


def tiny_step(device: torch.device):
    """Build a tiny Audio-MAE; returns a function that trains it on a batch."""
    frontend = yaml.safe_load((ROOT / "conf" / "frontend" / "kaldi_fbank.yaml").read_text())
    model = yaml.safe_load((ROOT / "conf" / "model" / "audiomae.yaml").read_text())
    tiny = dict(width=64, depth=2, num_heads=4, decoder_width=32, decoder_depth=1, decoder_num_heads=2)
    frontend = instantiate(frontend | dict(seconds=2.56, mean=0.0, std=1.0))
    method = method_from_config({"model": model | tiny, "frontend": {}}, frontend=frontend, vocabulary=None).to(device)
    optimiser = torch.optim.AdamW(method.parameters(), 1e-4)

    def step(batch) -> None:
        batch = batch.to(device)
        batch.waveform = batch.waveform.float() / 32768
        batch.waveform = batch.waveform[:, ::2]  # 16 kHz; what a resampler costs is not the question
        loss = method(batch, generator=Noise.for_batch(0, 0, len(batch), device))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def main(argv: list[str] | None = None) -> None:
    """Serve the same batches in three ways, alone and to a tiny training."""
    parser = parser_of("resident", __doc__, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clips", type=int, default=128)
    arguments = prepared(parser, argv)
    num_clips = 32 if arguments.quick else arguments.clips
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder) / "clips", "flac", 10, num_clips)
        shards = Path(folder) / "shards"
        pack(Path(folder) / "clips", shards, Settings("keep", None, 10**9), workers=1)
        epoch, workers = -(-num_clips // BATCH), arguments.workers
        ways = {
            f"{workers} worker(s), no cache": dict(num_workers=workers),
            f"{workers} worker(s), full cache": dict(num_workers=workers, cache_mb=4096 * workers),
            "resident": dict(resident=True),
        }
        title = f"{device}; {num_clips} clips of 10 s; crops of 2.56 s in batches of {BATCH}"
        report = Report(arguments)
        report.table({"clips/s": 26, "loader": 9, "ratio": 7, "with a tiny step": 17, "ratio ": 7}, title)
        with progress(len(ways), "way") as bar:
            for name, way in ways.items():
                served = partial(batches_of, shards, device=device, **way)
                alone = clips_per_second(served(20 * epoch), device, 8 * epoch, 12 * epoch, len)
                both = clips_per_second(served(14 * epoch), device, 8 * epoch, 6 * epoch, tiny_step(device))
                first = report.rows[0] if report.rows else dict(loader=alone, step=both)
                ratios = [alone / first["loader"], both / first["step"]]
                cells = [f"{alone:.0f}", f"{ratios[0]:.1f}", f"{both:.0f}", f"{ratios[1]:.1f}"]
                report.row([name, *cells], way=name, loader=alone, step=both, ratios=ratios)
                bar.update()
    report.draw(lambda figure: picture_of(figure.subplots(), report.rows))


def picture_of(axes: Axes, rows: list[dict]) -> None:
    """Draw clips a second of each way, alone and with a tiny step."""
    for number, (key, label) in enumerate((("loader", "loader alone"), ("step", "with a tiny step"))):
        places = [place + (number - 0.5) * 0.4 for place in range(len(rows))]
        axes.bar(places, [row[key] for row in rows], 0.38, label=label)
    axes.set_xticks(range(len(rows)), [row["way"] for row in rows])
    axes.set(yscale="log", ylabel="clips/s")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
