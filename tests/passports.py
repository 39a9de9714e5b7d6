"""Corpora for the tests of the passport: real clips of the demo set, repacked louder, duller, fewer or broken."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
import soxr
from packing import DEMO
from tiny_shards import write_shards

from audiossl.__main__ import main
from audiossl.index import Index

DEMO_CLIPS = range(0, 361, 9)  # 41 clips of speech, music and environmental sound


def repack(
    folder: Path, clips=DEMO_CLIPS, *, gain_db=0.0, by_way_of_hz=None, labels=None, split=None, broken=()
) -> str:
    """Write clips of the demo set as FLAC at their own rate into shards of 12, changed as asked."""
    demo = Index.load(DEMO)
    rows = []
    for number, i in enumerate(clips):
        wave, rate_hz = soundfile.read(io.BytesIO(demo.read(i)), dtype="float64")
        wave = wave * 10 ** (gain_db / 20) * 0.9
        if by_way_of_hz:
            wave = soxr.resample(soxr.resample(wave, rate_hz, by_way_of_hz), by_way_of_hz, rate_hz)
        file = io.BytesIO()
        soundfile.write(file, wave, rate_hz, format="FLAC", subtype="PCM_16")
        data = file.getvalue()[: 3000 if number in broken else None]
        names = demo.labels(i) if labels is None else labels(demo.key(i), demo.labels(i))
        rows.append((demo.key(i), data, "flac", len(wave), rate_hz, names, split))
    return write_shards(folder, [rows[first : first + 12] for first in range(0, len(rows), 12)])


def reordered(folder: Path, source: str) -> str:
    """Write the clips of shards in another order, into other shards."""
    index = Index.load(source)
    rows = [
        (index.key(i), index.read(i), "flac", int(index.num_frames[i]), int(index.rate_hz[i]), index.labels(i), None)
        for i in np.random.default_rng(0).permutation(len(index)).tolist()
    ]
    return write_shards(folder, [rows[:5], rows[5:6], rows[6:]])


def passport(source: str, *options: str, expect: int = 0, out: Path | None = None) -> dict:
    """Run the command in this process; returns the passport that it wrote."""
    where = Path(source if out is None else out.parent)
    target = where / "passport.json" if out is None else out
    arguments = ["passport", source, "--workers", "1", *options] + (["--out", str(out)] if out else [])
    assert main(arguments) == expect
    return json.loads(target.read_text(encoding="utf-8"))


def plain(text: str) -> str:
    """Take line breaks and columns out of what was printed."""
    return " ".join(text.split())
