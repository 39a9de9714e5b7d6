"""How many clips a second does one core pack, and how long does AudioSet take? `python -m benchmarks.pack`.

Ten-second pieces of the demo set, stereo as YouTube has them, are written in the forms that AudioSet lies on disks in
and packed by `audiossl.pack.pack` with one worker into mono FLAC at 32 kHz: reading, decoding, resampling, encoding,
hashing and writing. Prints clips per second of processor time (children included, so that neighbours on the machine do
not count), MB/s read, the ratio to the first row, and hours for AudioSet's 2,084,320 segments. One process writes what
the others encode, so what it can take is measured too and limits the hours. That the disk keeps up and that cores scale
is assumed, not measured.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from matplotlib.axes import Axes

from audiossl.index import Index
from audiossl.pack import Settings, pack
from audiossl.sound.audio import decode, resample, to_int16
from benchmarks import ROOT
from benchmarks.common import Report, parser_of, prepared, progress, say

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


def picture_of(axes: Axes, rows: list[dict], ceiling: float) -> None:
    """Draw hours over cores, one line for each form."""
    cores = [1, 2, 4, 8, 16, 32, 64]
    for row in rows:
        projected = [hours(row["clips_a_core"], n, ceiling) for n in cores]
        axes.loglog(cores, projected, marker=".", label=f"{row['source']} ({row['clips_a_core']:.0f} clips/s a core)")
    axes.set(xlabel="cores", ylabel="hours for 2,084,320 clips", title="Packing AudioSet, projected from one core")
    axes.set_xticks(cores, cores)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def main(argv: list[str] | None = None) -> None:
    """Pack the same clips in the forms they come in."""
    parser = parser_of("pack", __doc__, rounds=3)
    parser.add_argument("--clips", type=int, default=300)
    arguments = prepared(parser, argv)
    num_clips, forms = (20, FORMS[:2]) if arguments.quick else (arguments.clips, FORMS)
    columns = {"source": 16, "clips/s a core": 14, "MB/s": 6, "ratio": 6} | {f"{n} cores": 9 for n in CORES}
    report, ceiling = Report(arguments, columns), 0.0
    with tempfile.TemporaryDirectory() as folder, progress(len(forms), "form") as bar:
        for extension, rate_hz in forms:
            name = f"{extension} {rate_hz / 1000:g} kHz"
            bar.update()
            if extension == "m4a" and shutil.which("ffmpeg") is None:
                say(f"{name}: the program ffmpeg is not installed")
                continue
            source = Path(folder, f"{extension}{rate_hz}")
            write_clips(source, extension, rate_hz, num_clips)
            rate, read = measure(source, Path(folder, "out"), arguments.rounds)
            ceiling = ceiling or measure_writer(source, Path(folder, "out"))
            projected = [hours(rate, n, ceiling) for n in CORES]
            ratio = rate / (report.rows[0]["clips_a_core"] if report.rows else rate)
            cells = [name, f"{rate:.0f}", f"{read:.0f}", f"{ratio:.2f}", *(f"{taken:.1f} h" for taken in projected)]
            report.row(cells, source=name, clips_a_core=rate, megabytes_a_second=read, hours=projected)
            shutil.rmtree(source)
    report.write(writer_clips=ceiling)
    say(f"the writing process takes {ceiling:.0f} clips/s, {hours(ceiling, 1, ceiling):.1f} h at least")
    report.draw(lambda figure: picture_of(figure.subplots(), report.rows, ceiling))


if __name__ == "__main__":
    main()
