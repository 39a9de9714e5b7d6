"""How does a corpus differ from another, and what does that mean for who trains on it?

Counts are exact, so any difference in them is one. What was measured on samples is called different only beyond three
standard errors and beyond what could change a model. Where both samples are the same clips, all of a difference is in
the audio, and there is no error of sampling.
"""

from __future__ import annotations

import math

import numpy as np

from audiossl.passports.compare_sound import compare_sound
from audiossl.passports.corpusfacts import SKETCH_KEYS, read_sketch
from audiossl.passports.difference import IMPORTANT_SHARE, SURE, Difference, error_of_share, percent


def compare(mine: dict, other: dict, keys: tuple[list[str], list[str]] | None = None) -> list[Difference]:
    """Compare two passports, mine with another; `keys` are those that only one of the corpora has, where known."""
    is_same_clips = mine["hashes"]["keys"] == other["hashes"]["keys"]
    found = [_clips(mine, other, keys), _hours(mine, other), *_labels(mine, other)]
    for name, said, matters in (
        ("splits", "splits", True),
        ("folds", "folds", True),
        ("rates_hz", "sample rates", True),
        ("channels", "channels", False),
        ("extensions", "extensions", False),
    ):
        found.append(_kinds(said, mine[name], other[name], matters, is_same_clips))
    found.append(_durations(mine, other, is_same_clips))
    if "audio" in mine and "audio" in other:
        found += compare_sound(mine, other)
    else:
        found.append(Difference("audio", "not measured in one of the two; nothing is said about levels and log-mels"))
    changed = [
        f"{k} {v} (there {other['versions'].get(k)})"
        for k, v in mine["versions"].items()
        if v != other["versions"].get(k)
    ]
    return [*found, Difference("library versions", ", ".join(changed))]


def _clips(mine: dict, other: dict, keys: tuple[list[str], list[str]] | None) -> Difference:
    if mine["hashes"]["keys"] == other["hashes"]["keys"]:
        same = mine["hashes"]["corpus"] == other["hashes"]["corpus"]
        return Difference(
            "clips",
            "" if same else "the same keys, but the shards' bytes are others: packed or processed in another way",
        )
    num_missing, num_new, is_exact = _only(mine, other, keys)
    about = "" if is_exact else "about "
    only_here, only_there = keys or ([], [])
    words = [
        f"{about}{percent(number / clips)} of the clips {what} ({number:,} of {clips:,}{_such(names)})"
        for number, clips, what, names in (
            (num_missing, other["clips"], "there are missing here", only_there),
            (num_new, mine["clips"], "here are not there", only_here),
        )
        if number
    ]
    if not words:
        words.append(f"a few keys differ, too few to show among {SKETCH_KEYS}; compare the corpora themselves")
    most = max(num_missing / other["clips"], num_new / mine["clips"])
    meaning = ": expect another score, a lower one where clips are missing" if most > IMPORTANT_SHARE else ""
    return Difference("clips", "; ".join(words) + meaning, most > IMPORTANT_SHARE)


def _only(mine: dict, other: dict, keys: tuple | None) -> tuple[int, int, bool]:
    """Count clips that are only there, and only here; from sketches where the keys themselves are not at hand."""
    if keys is not None:
        return len(keys[1]), len(keys[0]), True
    a, b = read_sketch(mine["keys_sketch"]), read_sketch(other["keys_sketch"])
    if max(mine["clips"], other["clips"]) <= SKETCH_KEYS:
        return len(np.setdiff1d(b, a)), len(np.setdiff1d(a, b)), True
    limit = min(
        s[-1] if n > SKETCH_KEYS else np.uint64(2**64 - 1) for s, n in ((a, mine["clips"]), (b, other["clips"]))
    )
    a, b = a[a <= limit], b[b <= limit]  # both hold every hash of their corpus up to here
    shared = len(np.intersect1d(a, b))
    return (
        round(other["clips"] * (1 - shared / len(b))) if len(b) else other["clips"],
        round(mine["clips"] * (1 - shared / len(a))) if len(a) else mine["clips"],
        False,
    )


def _hours(mine: dict, other: dict) -> Difference:
    ratio = mine["hours"] / other["hours"]
    if abs(ratio - 1) < 1e-3:
        return Difference("hours")
    change = f"{percent(abs(ratio - 1))} {'more' if ratio > 1 else 'less'}"
    text = f"{mine['hours']:,.2f} h, there {other['hours']:,.2f} h ({change})"
    return Difference("hours", text, abs(ratio - 1) > IMPORTANT_SHARE)


def _labels(mine: dict, other: dict) -> list[Difference]:
    a, b = mine["labels"], other["labels"]
    lost = sorted(name for name, n in b["counts"].items() if n and not a["counts"].get(name))
    new = sorted(name for name, n in a["counts"].items() if n and not b["counts"].get(name))
    words = []
    if lost:
        words.append(f"{_classes(len(lost))} that {_have(lost)} clips there {_have(lost)} none here ({_some(lost)})")
    if new:
        words.append(f"{_classes(len(new))} {_have(new)} clips here and none there ({_some(new)})")
    same_clips = mine["hashes"]["keys"] == other["hashes"]["keys"]
    classes = Difference("classes", "; ".join(words), bool(words))
    if mine["hashes"]["labels"] == other["hashes"]["labels"]:
        return [classes, Difference("labels")]
    if same_clips:
        changed = _largest_changes(a["counts"], b["counts"])
        said = f": {changed}" if changed else ", though as many in each class"
        return [classes, Difference("labels", f"the same clips are labelled otherwise{said}", True)]
    text = _shifted_shares(mine, other)
    return [classes, Difference("labels", text, bool(text))]


def _largest_changes(a: dict, b: dict) -> str:
    pairs = [(a.get(name, 0), b.get(name, 0), name) for name in sorted({*a, *b})]
    changes = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -abs(pair[0] - pair[1]))
    told = ", ".join(f"{name} {here:,} clips (there {there:,})" for here, there, name in changes[:4])
    return told + (" ..." if len(changes) > 4 else "")


def _shifted_shares(mine: dict, other: dict) -> str:
    """Name classes whose share of the clips changed more than drawing clips at random would."""
    shifted = []
    for name, there in other["labels"]["counts"].items():
        p, q = mine["labels"]["counts"].get(name, 0) / mine["clips"], there / other["clips"]
        error = math.sqrt(q * (1 - q) / min(mine["clips"], other["clips"]))
        if abs(p - q) > 4 * error and abs(p - q) > 0.1 * q and p:
            shifted.append((abs(p - q) / q, f"{name} {p:.2%} (there {q:.2%})"))
    if not shifted:
        return ""
    named = ", ".join(text for _, text in sorted(shifted, reverse=True)[:3])
    return f"{_classes(len(shifted))} {_have(shifted)} another share of the clips than chance explains: {named}"


def _kinds(subject: str, mine: dict, other: dict, matters: bool, is_same_clips: bool) -> Difference:
    """Compare how clips spread over splits, rates and the like; only shares count, sizes are compared elsewhere."""
    totals = sum(mine.values()), sum(other.values())
    shares = {k: (mine.get(k, 0) / totals[0], other.get(k, 0) / totals[1]) for k in sorted({*mine, *other})}
    apart = sum(abs(p - q) for p, q in shares.values()) / 2
    chance = SURE * math.sqrt(len(shares) / min(totals)) / 2 * (not is_same_clips)
    is_new = any(min(pair) == 0 and max(pair) > IMPORTANT_SHARE for pair in shares.values())
    if apart == 0 or (apart <= chance and not is_new):
        return Difference(subject)
    told = sorted(shares.items(), key=lambda item: -abs(item[1][0] - item[1][1]))[:4]
    text = ", ".join(f"{name} {percent(p)} (there {percent(q)})" for name, (p, q) in told)
    return Difference(subject, text, matters and (apart > max(IMPORTANT_SHARE, chance) or is_new))


def _durations(mine: dict, other: dict, is_same_clips: bool) -> Difference:
    (here, there), words = (passport["durations"] for passport in (mine, other)), []
    medians = here["seconds"]["p50"], there["seconds"]["p50"]
    if abs(medians[0] - medians[1]) > 0.02 * medians[1]:
        words.append(f"half of the clips are longer than {medians[0]:.2f} s (there {medians[1]:.2f} s)")
    short = here["share_below_10_s"], there["share_below_10_s"]
    chance = 0.0 if is_same_clips else SURE * error_of_share(short, (mine["clips"], other["clips"]))
    if abs(short[0] - short[1]) > max(0.02, chance):
        words.append(f"{percent(short[0])} are shorter than 10 s (there {percent(short[1])})")
    return Difference("durations", "; ".join(words), bool(words))


def _classes(number: int) -> str:
    return f"{number:,} class{'es' if number != 1 else ''}"


def _have(things: list) -> str:
    return "have" if len(things) != 1 else "has"


def _such(names: list[str]) -> str:
    return f", such as {', '.join(names[:3])}" if names else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
