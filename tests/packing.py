"""Helpers of the tests about packing: folders of audio with exact rate and length, and real clips of the demo set."""

import csv
from pathlib import Path

import numpy as np
import soundfile

from audiossl.__main__ import main
from audiossl.index import Index

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "shards"


def run(source: Path, out: Path, *options: str) -> int:
    return main(["pack", str(source), "--out", str(out), "--shard-size", "500kB", *options])


def write_table(path: Path, rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def read_table(path: Path) -> dict[str, str]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def tone(path: Path, rate_hz: int, seconds: float, channels: int = 1, frequency_hz: float = 1000.0, **options) -> Path:
    wave = 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(round(rate_hz * seconds)) / rate_hz)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate_hz, **options)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unpack_demo(folder: Path, step: int) -> Path:
    """Write every `step`-th clip of the demo set, and a meta.csv, into `folder`."""
    index = Index.load(DEMO)
    rows = [("filename", "labels", "split", "fold", "kind")]
    for i in range(0, len(index), step):
        name = f"{index.key(i)}.{index.extension(i)}"
        (folder / name).write_bytes(index.read(i))
        fold = index.fold[i] if index.fold[i] >= 0 else ""
        rows.append((name, ";".join(index.labels(i)), index.split(i), fold, index.read_meta(i)["kind"]))
    write_table(folder / "meta.csv", rows)
    return folder
