"""How many clips a second does one core read, decode and cut, beside bare decoding and beside what repositories do?

`python -m benchmarks.loader`. Pieces of the demo set are packed as FLAC at 32 and at 16 kHz. Four ways take turns on
the same clips; seconds of the CPU, of all processes, stand beside the clock:

- raw: libsndfile seeks and decodes the same crops from bytes in memory, and nothing else: what no loader on it can
  pass but one that finds the frames of a FLAC by itself, as ours does (`sound/flac.py`);
- ours: the loader in one process, from the tar to the batch, in the epochs after the first;
- worker: the same by one worker process, handed over to the trainer. Workers go on while others take their turn: their
  seconds of the CPU are counted from turn to turn, and the clock flatters them by what they had fetched ahead;
- naive: a data set's item a clip, in a worker: the file is opened, decoded whole, resampled, cut, and torchaudio's
  Kaldi fbank is computed, as published repositories do (written anew); ours leaves the log-mel to the device.

Then a step that takes as long as a batch (it sleeps: a GPU's step costs the host nothing) is put behind each batch:
where loading and steps overlap, an epoch takes the longer of both, and not their sum.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
import yaml
from matplotlib.figure import Figure
from torchaudio.compliance.kaldi import fbank

from audiossl.index import Index
from audiossl.loading.clips import ClipRequest
from audiossl.loading.loader import Loader
from audiossl.pack import Settings, pack
from audiossl.shards import ShardData
from audiossl.sound.audio import decode, resample, to_int16
from benchmarks import ROOT
from benchmarks.common import (
    Report,
    Turns,
    cpu_seconds_of,
    parser_of,
    prepared,
    progress,
    say,
    take_turns,
)

RATE = 32_000
CASES = ((32_000, 10.0), (32_000, 2.56), (16_000, 10.0), (16_000, 2.56))  # of the shards, crop seconds
CLIP_SECONDS, MODEL_HZ = 10, 16_000
WAYS = ("raw", "ours", "worker", "naive")


def write_clips(folder: Path, codec: str, seconds: int, num_clips: int, rate_hz: int = RATE) -> None:
    """Cut the demo set's audio, strung together, into clips."""
    index = Index.load(ROOT / "demo" / "shards")
    audio = np.concatenate([resample(*decode(index.read(i)), rate_hz) for i in range(min(len(index), num_clips))])
    folder.mkdir(parents=True)
    for number in range(num_clips):
        piece = np.take(audio, number * seconds * rate_hz + np.arange(seconds * rate_hz), mode="wrap")
        subtype = "PCM_16" if codec == "flac" else "VORBIS"
        soundfile.write(folder / f"{number:04d}.{codec}", to_int16(piece), rate_hz, subtype=subtype)


def make_shards(folder: Path, rate_hz: int, num_clips: int) -> Path:
    """Write clips as files and pack them; returns the shards, beside which the files lie in `files`."""
    write_clips(folder / "files", "flac", CLIP_SECONDS, num_clips, rate_hz)
    pack(folder / "files", folder / "shards", Settings("keep", None, 10**9), workers=1)
    return folder / "shards"


def loader_of(shards: Path, crop_seconds: float, *, batch_size: int, num_batches: int, workers: int) -> Loader:
    """Serve `num_batches` of crops as a training would have them, at the rate of the shards."""
    settings = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
    settings |= dict(shards=str(shards), batch_size=batch_size, num_workers=workers, crop_seconds=crop_seconds)
    data = ShardData(**settings, default_rate_hz=RATE, run_dir=None, needs_labels=False)
    return data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=num_batches, seed=0)


def batches_of(loader: Loader) -> tuple[Iterator, list[int]]:
    """Begin to iterate: the batches, and the processes that make them."""
    before = {child.pid for child in torch.multiprocessing.active_children()}
    batches = iter(loader)
    first = next(batches)
    pids = [child.pid for child in torch.multiprocessing.active_children() if child.pid not in before]
    return _with_first(first, batches), pids


def _with_first(first, batches: Iterator) -> Iterator:
    yield first
    yield from batches


class Served:
    """Take batches that worker processes make; `with_workers` adds what those took of the CPU for them."""

    def __init__(self, loader, num_batches: int):
        self.batches, self.pids = batches_of(loader)
        self.num_batches = num_batches
        self.readings: list[float] = []

    def __call__(self) -> int:
        self.readings.append(cpu_seconds_of(self.pids))
        return sum(len(next(self.batches)) for _ in range(self.num_batches))

    def with_workers(self, turns: Turns, num_clips: int) -> Turns:
        """Add to each turn but the last what the workers took until the next one began."""
        taken = np.diff(self.readings)[-(len(turns.cpu) - 1) :] / num_clips
        return Turns(turns.wall[:-1], [ours + theirs for ours, theirs in zip(turns.cpu, taken, strict=False)])


def raw_way(requests: list[ClipRequest], loader: Loader, crop_seconds: float) -> Callable[[], int]:
    """Decode the crops of some requests from their bytes, read before."""
    dataset = loader.loader.dataset
    data = [dataset.data_of(request) for request in requests]

    def work() -> int:
        for encoded, request in zip(data, requests, strict=True):
            num_frames = min(request.num_frames, round(crop_seconds * request.rate_hz))
            with soundfile.SoundFile(io.BytesIO(encoded)) as file:
                file.seek(request.draw * (request.num_frames - num_frames + 1) >> 63)
                file.read(num_frames, dtype="int16")
        return len(requests)

    return work


class NaiveClips(torch.utils.data.Dataset):
    """Do for each clip what repositories do: open, decode, resample, cut, Kaldi fbank, all on the CPU."""

    def __init__(self, folder: Path, crop_seconds: float, num_items: int):
        self.files, self.crop_seconds, self.num_items = sorted(folder.glob("*.flac")), crop_seconds, num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, item: int) -> torch.Tensor:
        waveform, rate_hz = soundfile.read(self.files[item % len(self.files)], dtype="float32")
        waveform = torch.from_numpy(waveform)[None]
        if rate_hz != MODEL_HZ:
            waveform = torchaudio.functional.resample(waveform, rate_hz, MODEL_HZ)
        num_samples = round(self.crop_seconds * MODEL_HZ)
        start = int(torch.randint(waveform.shape[1] - num_samples + 1, ()))
        waveform = waveform[:, start : start + num_samples]
        kaldi = dict(htk_compat=True, sample_frequency=MODEL_HZ, use_energy=False, window_type="hanning")
        return fbank(waveform - waveform.mean(), **kaldi, num_mel_bins=128, dither=0.0, frame_shift=10)


def compare(folder: Path, crop_seconds: float, arguments: argparse.Namespace, bar) -> dict[str, Turns]:
    """Let the ways take turns on the shards in `folder`; the first epoch, with its looks at clips' ends, is over."""
    per_turn = arguments.clips // arguments.batch  # batches: an epoch
    kind = dict(batch_size=arguments.batch, num_batches=(arguments.rounds + 4) * per_turn)
    alone = loader_of(folder / "shards", crop_seconds, workers=0, **kind)
    naive = NaiveClips(folder / "files", crop_seconds, kind["num_batches"] * arguments.batch)
    requests = [request for number in range(per_turn) for request in alone.loader.batch_sampler.batch(number)]
    in_workers = dict(num_workers=1, multiprocessing_context="forkserver")
    ways = {
        "raw": raw_way(requests, alone, crop_seconds),
        "ours": Served(alone, per_turn),
        "worker": Served(loader_of(folder / "shards", crop_seconds, workers=1, **kind), per_turn),
        "naive": Served(torch.utils.data.DataLoader(naive, arguments.batch, **in_workers), per_turn),
    }
    # a turn more, which ends the one before; the first two are for the epoch that looks at clips' ends
    found = take_turns(ways, rounds=arguments.rounds + 1, warm_up=2, bar=bar)
    turns = {name: Turns(way.wall[:-1], way.cpu[:-1]) for name, way in found.items()}
    return turns | {name: ways[name].with_workers(found[name], arguments.clips) for name in ("worker", "naive")}


def overlap(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Let epochs of loading alone and epochs with a step as long as a batch take turns: seconds a batch, medians."""
    per_turn = min(25, arguments.clips)  # many times what is fetched ahead
    kind = dict(batch_size=arguments.clips // per_turn, num_batches=(2 * arguments.rounds + 3) * per_turn)
    loader = loader_of(folder / "shards", 10.0, workers=1, **kind)
    batches, _ = batches_of(loader)

    def epoch(pause: float) -> float:
        started = time.perf_counter()
        for _ in range(per_turn):
            next(batches)
            time.sleep(pause)
        return (time.perf_counter() - started) / per_turn

    epoch(0.0)
    pause = epoch(0.0)
    turns = [(epoch(0.0), epoch(pause)) for _ in range(arguments.rounds)]
    loading, both = (statistics.median(turn[way] for turn in turns) for way in (0, 1))
    return {"loading": loading, "step": pause, "both": both, "sum": loading + pause}


def main(argv: list[str] | None = None) -> None:
    """Measure the four ways at two rates and two lengths, then the overlap."""
    parser = parser_of("loader", __doc__, rounds=5)
    parser.add_argument("--clips", type=int, default=200, help="of ten seconds, in an epoch and a turn (%(default)s)")
    parser.add_argument("--batch", type=int, default=20, help="clips (%(default)s)")
    arguments = prepared(parser, argv)
    cases = CASES
    if arguments.quick:
        arguments.clips, arguments.batch, cases = 8, 4, CASES[:1]
    titles = {"shards, crop": 20} | {f"{way}/s": 8 for way in WAYS}
    report = Report(arguments, titles | {"ours/raw": 18, "worker/raw": 18, "worker/naive": 18})
    with tempfile.TemporaryDirectory() as temporary:
        for rate_hz in dict.fromkeys(rate for rate, _ in cases):
            make_shards(Path(temporary, str(rate_hz)), rate_hz, arguments.clips)
        with progress(len(cases) * len(WAYS) * (arguments.rounds + 3)) as bar:
            for rate_hz, crop_seconds in cases:
                turns = compare(Path(temporary, str(rate_hz)), crop_seconds, arguments, bar)
                add_row(report, f"{rate_hz // 1000} kHz, {crop_seconds:g} s", turns)
        found = overlap(Path(temporary, str(cases[0][0])), arguments)
    hidden = (found["sum"] - found["both"]) / min(found["step"], found["loading"])
    worded = ", ".join(f"{name} {1e3 * taken:.1f}" for name, taken in found.items())
    say(f"ms a batch by one worker, with a step about as long: {worded}; {hidden:.0%} of the shorter is hidden")
    report.write(overlap=found)
    report.draw(lambda figure: picture_of(report.rows, figure))


def add_row(report: Report, case: str, turns: dict[str, Turns]) -> None:
    """Put CPU rates into the table, and both clocks into the json."""
    ratios = {
        "ours_to_raw": turns["ours"].times_as_fast_as(turns["raw"], "cpu"),
        "worker_to_raw": turns["worker"].times_as_fast_as(turns["raw"], "cpu"),
        "worker_to_naive": turns["worker"].times_as_fast_as(turns["naive"], "cpu"),
    }
    rates = {f"{way}_{clock}": turns[way].rate(clock) for way in turns for clock in ("wall", "cpu")}
    cells = [f"{turns[way].rate('cpu').median:.0f}" for way in WAYS]
    report.row([case, *cells, *(f"{ratio:.2f}" for ratio in ratios.values())], case=case, **ratios, **rates)


def picture_of(rows: list[dict], figure: Figure) -> None:
    """Draw each way's clips a second of a core, case by case."""
    axes = figure.subplots()
    for number, way in enumerate(WAYS):
        places = np.arange(len(rows)) + (number - 1.5) * 0.2
        rates = [row[f"{way}_cpu"] for row in rows]
        ends = [[r.median - r.low for r in rates], [r.high - r.median for r in rates]]
        axes.bar(places, [r.median for r in rates], 0.19, yerr=ends, label=way, color=f"C{number}", capsize=2)
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylabel("clips a second of one core's time")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
