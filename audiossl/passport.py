"""What is in a corpus, and is it the corpus that a paper, or another laboratory, trained on?

`python -m audiossl passport SHARDS` writes `passport.json`: exact counts from the index, and statistics of the audio
over a seeded sample of clips. The log-mel's mean and standard deviation in it are what `data.mean` and `data.std`
should be. No audio and no key leaves the machine with it, except the keys of clips that cannot be decoded and of
duplicates. `--compare` says in words how it differs from another (`passports/compare.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import write_whole
from audiossl.packing.writer import num_cores

FORMAT = 1
NAME = "passport.json"
DEFAULT_CLIPS = 3000
MAX_LISTED = 100
MAX_PASSPORT_BYTES = 2**28


def make_passport(
    index: Index,
    *,
    split: str | None = None,
    num_clips: int | None = DEFAULT_CLIPS,
    rate_hz: int | None = None,
    workers: int = 1,
    seed: int = 0,
    max_listed: int = MAX_LISTED,
) -> dict:
    """Collect everything that is known of a corpus; plain types, the same whatever `workers` and the shards' order.

    `num_clips` are decoded (0: none, None: all); `rate_hz` is `data.rate_hz` of the run it is for. Raises UserError for
    an unknown split, an empty corpus and one of which no clip can be decoded.
    """
    from audiossl.passports.corpusfacts import corpus_facts, key_hashes

    if not len(index):
        raise UserError(f"{index.path}: 0 clips; nothing to say")
    rows = index.select(split=split)
    hashes = key_hashes(index, rows)
    passport = {"format": FORMAT, "split": split, **corpus_facts(index, rows, hashes), "versions": _versions()}
    if num_clips == 0:
        return passport
    from audiossl.passports.clipfacts import Measure
    from audiossl.passports.corpusaudio import audio_facts, choose, duplicate_facts

    rate_hz = rate_hz or _common_rate(index.rate_hz[rows])
    chosen = choose(hashes, num_clips, seed)
    sizes = dict(population=len(rows), what=Measure(rate_hz), workers=workers, seed=seed)
    audio = audio_facts(index, rows[chosen], hashes[chosen], **sizes)
    audio["failures"]["listed"] = audio["failures"]["listed"][:max_listed]
    duplicates = duplicate_facts(index, rows, hashes, num_clips, seed)
    duplicates["keys"] = duplicates["keys"][:max_listed]
    return passport | {"audio": audio | {"duplicates": duplicates}}


def read_passport(path: Path) -> dict:
    """Read a passport.json; raise UserError where it is none of ours."""
    try:
        if path.stat().st_size > MAX_PASSPORT_BYTES:
            raise ValueError("too large")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"clips", "hashes", "durations", "labels"} <= found.keys():
            raise ValueError("keys are missing")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no passport ({str(error)[:80]}); make one: python -m audiossl passport SHARDS"
        ) from error
    if found.get("format") != FORMAT:
        raise UserError(f"{path} has format {found.get('format')}, this version reads {FORMAT}; make it again")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl passport`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Say what is in a corpus: counts from its index, statistics of the audio from a sample of clips.\n"
        "Writes passport.json and passport.png beside the index and prints a table with the data.mean and\n"
        "data.std to train with."
    )
    parser.epilog = (
        "exit code: 0; with --compare 1 when something differs that changes what a model learns; 2 for wrong\n"
        "input. Differences within the error of the sample count as equal.\n\n"
        "examples:\n"
        "  python -m audiossl passport SHARDS --split train\n"
        "  python -m audiossl passport SHARDS --compare audioset\n"
        "  python -m audiossl passport mine/passport.json --compare theirs/passport.json"
    )
    parser.add_argument(
        "shards", metavar="SHARDS", help="a packed folder, its index, a glob of shards, or a passport.json"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the passport (default: passport.json beside the index)"
    )
    parser.add_argument("--split", help="this split only, as data.split of the run (default: all clips)")
    parser.add_argument(
        "--clips", type=parse_clips, default=DEFAULT_CLIPS, metavar="N",
        help=f"decode so many clips, 'all', or 0 for the index alone (default: {DEFAULT_CLIPS})",
    )  # fmt: skip
    parser.add_argument("--rate", type=int, metavar="HZ", help="data.rate_hz of the run (default: null, as there)")
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument(
        "--list", type=int, default=MAX_LISTED, metavar="N", dest="listed",
        help=f"list so many clips that cannot be decoded, and so many duplicates (default: {MAX_LISTED})",
    )  # fmt: skip
    parser.add_argument(
        "--compare", metavar="OTHER", help="another passport.json, another corpus, or 'audioset' for what is published"
    )


def parse_clips(text: str) -> int | None:
    """Read a number of clips; None for `all`."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of clips; give one, or 'all'")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Make or read a passport, write it, print it, compare it; return 1 when an important thing differs."""
    _refuse(args)
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("stopped")
        return 130


def _run(args: argparse.Namespace) -> int:
    index, passport = _passport_of(args.shards, args)
    if index is not None or args.out:
        out = args.out or index.path.parent / NAME
        _write(passport, out)
    from audiossl.passports.table import print_comparison, print_passport

    print_passport(passport, args.shards)
    if index is not None or args.out:
        print(f"\nwritten: {out} and {out.with_suffix('.png').name}")
    if args.compare is None:
        return 0
    from audiossl.passports.compare import compare
    from audiossl.passports.published import with_audioset

    if args.compare == "audioset":
        differences = with_audioset(passport)
    else:
        other_index, other = _passport_of(args.compare, args)
        keys = None if index is None or other_index is None else _keys(index, other_index, args.split)
        differences = compare(passport, other, keys)
    print_comparison(differences, args.shards, args.compare)
    return int(any(difference.is_important for difference in differences))


def _refuse(args: argparse.Namespace) -> None:
    for name, value, least in (("--workers", args.workers, 1), ("--seed", args.seed, 0), ("--list", args.listed, 0)):
        if value < least:
            raise UserError(f"{name} {value}: must be {least} or more")
    if args.rate is not None and not 1000 <= args.rate <= 384_000:
        raise UserError(f"--rate {args.rate}: Hz between 1000 and 384000")
    if args.out is not None and (args.out.suffix != ".json" or not args.out.parent.is_dir()):
        raise UserError(f"--out {args.out}: must be a .json file in a folder that exists")


def _passport_of(source: str, args: argparse.Namespace) -> tuple[Index | None, dict]:
    if source.endswith(".json"):
        return None, read_passport(Path(source))
    index = Index.load(source)
    out = args.out or index.path.parent / NAME
    if source == args.shards and not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UserError(f"{out} cannot be written; say where with --out FILE.json")
    what = dict(split=args.split, num_clips=args.clips, rate_hz=args.rate)
    return index, make_passport(index, **what, workers=args.workers, seed=args.seed, max_listed=args.listed)


def _write(passport: dict, out: Path) -> None:
    from audiossl.passports.plots import passport_figure

    text = json.dumps(passport, indent=1, ensure_ascii=False)
    write_whole(out, (text + "\n").encode("utf-8", "surrogateescape"))
    passport_figure(passport, out.with_suffix(".png"))


def _keys(mine: Index, theirs: Index, split: str | None) -> tuple[list[str], list[str]]:
    """List the keys that only one of two corpora has: (only in mine, only in theirs), in the order of their hashes."""
    from audiossl.passports.corpusfacts import key_hashes

    rows = [index.select(split=split) for index in (mine, theirs)]
    hashes = [key_hashes(index, chosen) for index, chosen in zip((mine, theirs), rows, strict=True)]
    only = []
    for index, chosen, own, others in ((mine, rows[0], *hashes), (theirs, rows[1], *hashes[::-1])):
        only.append([index.key(i) for i in chosen[~np.isin(own, others)].tolist()])
    return tuple(only)


def _common_rate(rates_hz: np.ndarray) -> int | None:
    rates = np.unique(rates_hz)
    return int(rates[0]) if len(rates) == 1 else None


def _versions() -> dict:
    from audiossl.running.provenance import PACKAGES, version_of
    from audiossl.version import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    names = [name for name in PACKAGES if name in ("torch", "torchaudio", "numpy", "soundfile", "soxr")]
    import soundfile

    libraries = {name: version_of(name) for name in names} | {"libsndfile": soundfile.__libsndfile_version__}
    return {"audiossl": __version__, "python": python, **libraries}
