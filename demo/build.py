"""How was the demo set made? `python demo/build.py --source FOLDER`, with esc10/ and pretrain/ in it, makes it again.

Real recordings only, with the Vorbis bytes of the source, under CC0, CC BY, CC BY-SA or in the public domain. Of ESC-10
a draw balanced over classes and folds: CC0 first, then CC BY, one clip per recording before a second, the rest by a
seeded shuffle, never by size. Folds 1-3 are `train` (pre-trained on, and the probe's labelled clips), 4 and 5 `test`.
"""

import argparse
import csv
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from audiossl import pack  # noqa: E402
from audiossl.index import Index  # noqa: E402

SEED = 0
MAX_BYTES = 15_000_000
ESC_PER_CLASS = {1: 3, 2: 3, 3: 3, 4: 3, 5: 3}  # clips of each class from each fold
LICENCES = {  # as the sources spell them: nothing non-commercial, nothing Sampling+
    "CC0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
    "CC-BY": "https://creativecommons.org/licenses/by/3.0/",
    "CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC BY-SA 3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC BY-SA 4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
}
CHUNKS = {  # a part of the recording's name in pretrain/meta.csv -> how many of its chunks, each at most 10 s
    "librosa/data audio/198-209-0000": 2,
    "librosa/data audio/3436-172162-0000": 2,
    "librosa/data audio/5703-47212-0000": 2,
    "sounds/speech-female": 1,
    "sounds/speech-male": 1,
    "asterisk-core-sounds-ru": 42,
    "asterisk-core-sounds-en": 41,
    "asterisk-core-sounds-it": 32,
    "asterisk-core-sounds-fr": 30,
    "asterisk-core-sounds-es": 22,
    "digits of george": 3,
    "digits of jackson": 3,
    "digits of lucas": 3,
    "digits of nicolas": 3,
    "sonic-pi-samples": 3,
    "VSCO-2-CE": 2,
    "samples/jazz_guitar": 1,
    "Hungarian_Dance": 2,
    "Karissa_Hobbs": 2,
    "Dance_of_the_Sugar_Plum_Fairy": 2,
    "Vibe_Ace": 2,
    "sounds/carnatic": 1,
    "sounds/singing-female": 1,
    "sounds/sax-phrase.wav": 1,
    "sounds/orchestra": 1,
    "macroform-cold_day": 8,
    "macroform-robot_dity": 8,
    "macroform-the_simplicity": 8,
    "manolo_camp-morning_coffee": 7,
    "reno_project-system": 8,
    "humpback": 1,
    "samples/crowd_cheering": 1,
}


def choose_esc(folder: Path) -> list[dict]:
    """Choose ESC_PER_CLASS clips of every class and fold."""
    groups = defaultdict(list)
    for row in read_table(folder / "esc10" / "meta.csv"):
        if row["licence"] in LICENCES:
            groups[row["label"], int(row["fold"])].append(row)
    chosen = []
    for (_, fold), rows in sorted(groups.items()):
        random.Random(f"{SEED} {rows[0]['label']} {fold}").shuffle(rows)
        takes = Counter()
        for row in rows:
            row["take"] = takes[row["source"]]
            takes[row["source"]] += 1
        rows.sort(key=lambda row: (row["licence"] != "CC0", row["take"]))
        chosen += rows[: ESC_PER_CLASS[fold]]
    for row in chosen:
        row |= {"kind": "environment", "folder": "esc10", "split": "train" if int(row["fold"]) <= 3 else "test"}
    return chosen


def choose_chunks(folder: Path) -> list[dict]:
    """Choose the chunks of CHUNKS, evenly spaced over each recording."""
    recordings = defaultdict(list)
    for row in read_table(folder / "pretrain" / "meta.csv"):
        recordings[row["source"]].append(row)
    chosen = []
    for part, number in CHUNKS.items():
        (name,) = [name for name in recordings if part in name]
        rows = recordings[name]
        chosen += [rows[i * len(rows) // number] for i in range(number)]
    for row in chosen:
        assert row["licence"] in LICENCES and row["real"] == "yes", row
        row |= {"folder": "pretrain", "split": "train", "fold": "", "label": ""}
    return chosen


def build(folder: Path, out: Path) -> None:
    """Choose, pack and describe."""
    rows = choose_esc(folder) + choose_chunks(folder)
    columns = ["filename", "label", "split", "fold", "kind", "licence"]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        for row in rows:
            path = folder / row["folder"] / row["filename"]
            row["filename"] = path.name
            shutil.copyfile(path, source / path.name)
        with open(source / "meta.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        shutil.rmtree(out / "shards", ignore_errors=True)
        pack.pack(source, out / "shards", pack.Settings("keep", None, 5_200_000), workers=1)
    (out / "SOURCES.md").write_text(describe_sources(rows), encoding="utf-8")
    print(describe_clips(Index.load(out / "shards")))
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    print(f"\n{total} bytes in {out}")
    assert total <= MAX_BYTES, f"{total - MAX_BYTES} bytes over"


TEACHER = """\
`clip_teacher.safetensors`, the default teacher of `model=atst_c2f` here, is a Clip of 0.3 M parameters trained on the
labels of folds 1 to 3 (mAP .65 on folds 4 and 5); it is what this command leaves as encoder.safetensors:

    python train.py model=atst_c2f model.student=clip model.teacher=null model.distill_weight=0 trainer.max_steps=400
        model.width=96 model.depth=2 model.num_heads=3 data.shards=demo/shards name=clip_teacher""".splitlines()


def describe_sources(rows: list[dict]) -> str:
    """Write the table of recordings: what, by whom, under which licence, where from."""
    lines = [
        "# Sources of the demo set",
        "",
        "Generated by `build.py`. The clips are cut to at most 10 s; their licences are those of the recordings.",
        "ESC-10: Piczak, ESC: Dataset for Environmental Sound Classification, ACM MM 2015 (collection: CC BY 3.0).",
        "",
        *TEACHER,
        "",
        "| recording | author | licence | clips |",
        "|--|--|--|--|",
    ]
    recordings = defaultdict(list)
    for row in rows:
        recordings[row["source"]].append(row)
    for source, group in recordings.items():
        first = group[0]
        title = first.get("source_title") or source
        names = [Path(row["filename"]).stem for row in group]
        clips = names[0] if len(names) == 1 else f"{names[0]} ... {len(names)} clips"
        cells = [f"[{plain(title)}]({link_of(source)})", plain(first.get("author", "")), first["licence"], clips]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {link}" for name, link in LICENCES.items() if name in {r["licence"] for r in rows})]
    return "\n".join(lines) + "\n"


def describe_clips(index: Index) -> str:
    """Count clips, minutes and bytes by kind, and clips by ESC-10 class and fold."""
    totals, classes = defaultdict(lambda: [0, 0.0, 0]), defaultdict(Counter)
    for i in range(len(index)):
        kind, labels = index.read_meta(i)["kind"], index.labels(i)
        groups = [kind, "all", f"{kind}, {index.rate_hz[i] // 1000} kHz"]
        if labels:
            classes[labels[0]][int(index.fold[i])] += 1
            groups += [f"ESC-10 fold {index.fold[i]} ({index.split(i)})"]
        for group in groups:
            totals[group][0] += 1
            totals[group][1] += float(index.seconds[i]) / 60
            totals[group][2] += int(index.size[i])
    lines = [f"{'':<24}{'clips':>6}{'minutes':>9}{'bytes':>10}"]
    lines += [f"{group:<24}{n:>6}{m:>9.2f}{b:>10}" for group, (n, m, b) in sorted(totals.items())]
    lines += ["", f"{'ESC-10 class':<24}" + "".join(f"{f'fold {fold}':>8}" for fold in ESC_PER_CLASS)]
    lines += [f"{name:<24}" + "".join(f"{c[fold]:>8}" for fold in ESC_PER_CLASS) for name, c in sorted(classes.items())]
    return "\n".join(lines)


def link_of(source: str) -> str:
    """Find the address of a recording from its name in meta.csv."""
    if source.startswith("http"):
        return source.replace("http://", "https://", 1)
    word = source.split()[0]
    if word.startswith("github.com/"):
        return f"https://{word}"
    if "sounds-of-ror" in source:
        return "https://github.com/adambuttrick/sounds-of-ror"
    if word == "Debian":
        return f"https://packages.debian.org/stable/{source.split()[1].rstrip(':')}"
    assert word == "fsdd", source
    return "https://github.com/Jakobovski/free-spoken-digit-dataset"


def plain(text: str) -> str:
    """Keep a text in its cell of a Markdown table."""
    return text.replace("|", "/").replace("[", "(").replace("]", ")").replace("\n", " ")


def read_table(path: Path) -> list[dict]:
    """Read a meta.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the folder that holds esc10/ and pretrain/")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    build(args.source, args.out)
