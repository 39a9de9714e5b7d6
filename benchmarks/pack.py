"""How many clips a second does one core pack, and how long does AudioSet take? `python -m benchmarks.pack`.

Ten-second pieces of the demo set, stereo as YouTube has them, are written in the forms that AudioSet lies on disks in
and packed by `audiossl.pack.pack` with one worker into mono FLAC at 32 kHz: reading, decoding, resampling, encoding,
hashing and writing. Prints clips per second of processor time (children included, so that neighbours on the machine do
not count), MB/s read, the ratio to the first row, and hours for AudioSet's 2,084,320 segments. One process writes what
the others encode, so what it can take is measured too and limits the hours. That the disk keeps up and that cores scale
is assumed, not measured.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from audiossl.index import Index
from audiossl.pack import Settings, pack
from audiossl.sound.audio import decode, resample, to_int16
from benchmarks import ROOT

SECONDS = 10
NUM_SEGMENTS = 2_041_789 + 22_160 + 20_371  # unbalanced, balanced, eval, as their csv files announce
CORES = (8, 16, 32)
FORMS = (("wav", 44_100), ("wav", 48_000), ("wav", 32_000), ("flac", 44_100), ("flac", 48_000), ("m4a", 44_100))


def write_clips(folder: Path, extension: str, rate_hz: int, num_clips: int) -> None:
    """Cut the demo set's audio, strung together, into clips of two channels."""
    index, pieces, length = Index.load(ROOT / "demo" / "shards"), [], 0
    folder.mkdir(parents=True)
    for i in range(len(index)):
        if length >= num_clips * SECONDS * rate_hz:
            break
        waveform, from_hz = decode(index.read(i))
        pieces.append(to_int16(resample(waveform, from_hz, rate_hz)))
        length += len(pieces[-1])
    audio = np.concatenate(pieces)
    for number in range(num_clips):
        piece = np.take(audio, number * SECONDS * rate_hz + np.arange(SECONDS * rate_hz), mode="wrap")
        path = folder / f"{number:04d}.{'wav' if extension == 'm4a' else extension}"
        soundfile.write(path, np.stack([piece, piece // 2], axis=1), rate_hz, subtype="PCM_16")
        if extension == "m4a":
            command = ["ffmpeg", "-nostdin", "-v", "error", "-i", path, "-b:a", "128k", path.with_suffix(".m4a")]
            subprocess.run(command, check=True)
            path.unlink()
    names = [f"{path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "meta.csv").write_text("filename\n" + "".join(names))


def measure(source: Path, out: Path, repeats: int) -> tuple[float, float]:
    """Return clips and MB of source per second of processor time, the fastest of some repeats."""
    best = 0.0
    for _ in range(repeats):
        started = processor_seconds()
        summary = pack(source, out, Settings("flac", 32_000, 10**9), workers=1)
        best = max(best, summary.num_clips / (processor_seconds() - started))
        shutil.rmtree(out)
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    return best, best * num_bytes / summary.num_clips / 1e6


def measure_writer(source: Path, out: Path) -> float:
    """Return clips per second of the writing process's own time, while two others encode."""
    started = time.process_time()
    summary = pack(source, out, Settings("flac", 32_000, 10**9), workers=2)
    rate = summary.num_clips / (time.process_time() - started)
    shutil.rmtree(out)
    return rate


def hours(rate: float, cores: int, ceiling: float) -> float:
    """Project the hours for AudioSet on some cores, each of which packs `rate` clips a second."""
    return NUM_SEGMENTS / min(rate * cores, ceiling) / 3600


def processor_seconds() -> float:
    """Return the time that cores spent on this process and on its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def draw(rows: list[tuple[str, float]], ceiling: float, path: Path) -> None:
    """Draw hours over cores, one line for each form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    cores = [1, 2, 4, 8, 16, 32, 64]
    for name, rate in rows:
        projected = [hours(rate, n, ceiling) for n in cores]
        axes.loglog(cores, projected, marker=".", label=f"{name} ({rate:.0f} clips/s a core)")
    axes.set(xlabel="cores", ylabel="hours for 2,084,320 clips", title="Packing AudioSet, projected from one core")
    axes.set_xticks(cores, cores)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (default: 3)")
    parser.add_argument("--picture", type=Path, help="draw hours over cores into this file")
    args = parser.parse_args()
    print("source           clips/s   MB/s  ratio  " + "".join(f"{f'{n} cores':>10}" for n in CORES))
    rows: list[tuple[str, float]] = []
    ceiling = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for extension, rate_hz in FORMS:
            name = f"{extension} {rate_hz / 1000:g} kHz"
            if extension == "m4a" and shutil.which("ffmpeg") is None:
                print(f"{name:<16} (the program ffmpeg is not installed)")
                continue
            source = Path(folder, f"{extension}{rate_hz}")
            write_clips(source, extension, rate_hz, args.clips)
            rate, read = measure(source, Path(folder, "out"), args.repeats)
            ceiling = ceiling or measure_writer(source, Path(folder, "out"))
            rows.append((name, rate))
            projected = "".join(f"{hours(rate, n, ceiling):8.1f} h" for n in CORES)
            print(f"{name:<16} {rate:7.0f}  {read:5.0f}  {rate / rows[0][1]:5.2f}  {projected}", flush=True)
            shutil.rmtree(source)
    print(f"the writing process takes {ceiling:.0f} clips/s, {hours(ceiling, 1, ceiling):.1f} h at least")
    if args.picture:
        draw(rows, ceiling, args.picture)


if __name__ == "__main__":
    main()
