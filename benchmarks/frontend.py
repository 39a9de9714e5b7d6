"""How long do the front ends take, beside torchaudio's Kaldi fbank called clip by clip, and which share of a step?

`python -m benchmarks.frontend [--device cuda]`. All take turns on the same clips (random numbers, float32), in batches;
torchaudio's loop is what published repositories run, there in workers on the CPU. A second table is of what comes
before where clips are packed at 32 kHz and the model hears 16: resampling, beside torchaudio's `Resample` with the same
filter. The share of a step is that of --step-clips-per-second: what the work takes of the time that such a step has for
a clip. The goals on an H200 are 30,000 clips of ten seconds a second, and 3 % of a step at 1,500.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor
from torchaudio.compliance.kaldi import fbank
from torchaudio.transforms import Resample

from audiossl.sound.waveform import FILTER, resample
from benchmarks import ROOT
from benchmarks.common import Report, parser_of, prepared, progress, take_turns

LOOP, TORCHAUDIO = "torchaudio kaldi.fbank, looped", "torchaudio Resample"
NAMES = ("kaldi_fbank", "atst_mel", "passt_mel")


def front_end(name: str, device: str):
    """Build a published setting for clips of any length."""
    config = OmegaConf.create({"data": {"mean": -4.27, "std": 4.57}})
    config.frontend = OmegaConf.load(ROOT / "conf" / "frontend" / f"{name}.yaml")
    config.frontend.seconds = None
    return instantiate(config.frontend).to(device)


def torchaudio_loop(clips: torch.Tensor) -> torch.Tensor:
    """Compute the log-mel of clips (B, S) one after the other."""
    options = dict(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, sample_frequency=16000)
    return torch.stack([fbank((clip - clip.mean())[None], **options) for clip in clips])


def main(argv: list[str] | None = None) -> None:
    """Measure clips a second of each front end at two lengths, and the ratio to torchaudio's loop."""
    parser = parser_of("frontend", __doc__, rounds=9)
    parser.add_argument("--batch", type=int, default=None, help="clips (cpu 32, cuda 512)")
    parser.add_argument("--step-clips-per-second", type=float, default=1500.0, help="for the share (%(default)s)")
    arguments = prepared(parser, argv)
    device, is_gpu = arguments.device, arguments.device.startswith("cuda")
    batch = arguments.batch or (4 if arguments.quick else 512 if is_gpu else 32)
    lengths = (0.5,) if arguments.quick else (2.56, 10.0)
    report = Report(arguments)
    clips = {
        (seconds, rate): torch.rand(batch, int(seconds * rate), device=device) - 0.5
        for seconds in lengths
        for rate in (16_000, 32_000)
    }
    front_ends = {name: front_end(name, device) for name in NAMES}
    works = {LOOP: (torchaudio_loop, 16_000)} | {name: (work, work.rate_hz) for name, work in front_ends.items()}
    resampling = {
        TORCHAUDIO: (Resample(32_000, 16_000, **FILTER).to(device), 32_000),
        "resampled": (lambda waveform: resample(waveform, 32_000, 16_000), 32_000),
    }
    tables = {"front end": (works, LOOP), "32 to 16 kHz": (resampling, TORCHAUDIO)}
    turns_in_all = len(lengths) * (len(works) + len(resampling)) * (arguments.rounds + 3)
    with progress(turns_in_all) as bar, torch.no_grad():
        for part, (ways, naive) in tables.items():
            report.table({part: 32, "s": 5, "clips/s": 24, "ratio": 22, "of a step": 9}, part=part)
            for seconds in lengths:
                runs = {
                    name: repeated(work, clips[seconds, rate], 8 if is_gpu and name != LOOP else 1)
                    for name, (work, rate) in ways.items()
                }
                turns = take_turns(runs, rounds=arguments.rounds, device=device, warm_up=3, bar=bar)
                for name, found in turns.items():
                    ratio, rate = found.times_as_fast_as(turns[naive]), found.rate()
                    share = f"{arguments.step_clips_per_second / rate.median:.1%}" if is_gpu else "-"
                    cells = [name, f"{seconds:g}", f"{rate:.0f}", f"{ratio:.1f}", share]
                    facts = dict(clips_per_second=rate, cpu=found.rate("cpu"), ratio=ratio)
                    report.row(cells, name=name, seconds=seconds, batch=batch, **facts)
    report.draw(lambda figure: picture_of(report.rows, figure))


def repeated(work: Callable[[Tensor], Tensor], clips: Tensor, repeats: int) -> Callable[[], int]:
    """Do a work some times over, and say for how many clips that was."""

    def run() -> int:
        for _ in range(repeats):
            work(clips)
        return repeats * len(clips)

    return run


def picture_of(rows: list[dict], figure: Figure) -> None:
    """Draw how many times as fast as torchaudio's way each is."""
    axes = figure.subplots()
    shown = [row for row in rows if row["name"] not in (LOOP, TORCHAUDIO)]
    middles = [row["ratio"].median for row in shown]
    ends = [
        [row["ratio"].median - row["ratio"].low for row in shown],
        [row["ratio"].high - row["ratio"].median for row in shown],
    ]
    axes.barh([f"{row['name']}, {row['seconds']:g} s" for row in shown], middles, xerr=ends, capsize=3, color="C0")
    axes.axvline(1, color="0.6", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torchaudio: Kaldi fbank clip by clip; its Resample")


if __name__ == "__main__":
    main()
