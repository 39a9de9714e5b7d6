"""Real clips of the demo set under AudioSet's names, and its csv files in the published syntax."""

from pathlib import Path

import soundfile
from packing import DEMO

from audiossl.index import Index
from audiossl.sound.audio import decode, to_int16

REAL_CLASSES = {  # as published
    0: ("/m/09x0r", "Speech"),
    1: ("/m/05zppz", "Male speech, man speaking"),
    74: ("/m/0bt9lr", "Dog"),
    131: ("/m/01h3n", "Bee, wasp, etc."),
    137: ("/m/04rlf", "Music"),
    526: ("/m/07hvw1", "Field recording"),
}
MIDS = {index: mid for index, (mid, _) in REAL_CLASSES.items()}
SPLITS = ("balanced_train", "unbalanced_train", "eval")


def write_classes(folder: Path) -> Path:
    """Write 527 classes, those above as published and the others invented, in the published order."""
    rows = [REAL_CLASSES.get(index, (f"/t/dd{index:05d}", f"Class {index}, invented")) for index in range(527)]
    path = folder / "class_labels_indices.csv"
    lines = (f'{index},{mid},"{name}"\n' for index, (mid, name) in enumerate(rows))
    path.write_text("index,mid,display_name\n" + "".join(lines), encoding="utf-8")
    return path


def write_segments(folder: Path, split: str, rows: list[tuple[str, float, list[int | str]]]) -> Path:
    """Write (id, start, classes by index or mid) as Google does: three comments, blanks after commas, quoted labels."""
    path = folder / f"{split}_segments.csv"
    lines = ["# Segments csv created Sun Mar  5 10:54:25 2017\n"]
    lines += [f"# num_ytids={len(rows)}, num_segs={len(rows)}, num_unique_labels=527, num_positive_labels=9\n"]
    lines += ["# YTID, start_seconds, end_seconds, positive_labels\n"]
    for name, start, labels in rows:
        mids = ",".join(MIDS.get(label, label) for label in labels)
        lines.append(f'{name}, {start:.3f}, {start + 10:.3f}, "{mids}"\n')
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_clip(path: Path, number: int = 0, **options) -> Path:
    """Write a clip of the demo set as a file of the extension that `path` has."""
    index = Index.load(DEMO)
    waveform, rate_hz = decode(index.read(number))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, to_int16(waveform), rate_hz, **options)
    return path


def write_audioset(folder: Path, num_per_split: int) -> Path:
    """Write the three splits as they lie on many a disk: a folder each, `Y<id>.wav`."""
    write_classes(folder)
    for number, split in enumerate(SPLITS):
        rows = [(f"-{split[:4]}_{clip:05d}", 30.0, [137, 0]) for clip in range(num_per_split)]
        write_segments(folder, split, rows)
        for clip, (name, _, _) in enumerate(rows):
            write_clip(folder / f"{split}_segments" / f"Y{name}.wav", 3 * (clip * len(SPLITS) + number))
    return folder
