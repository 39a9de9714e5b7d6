"""Do two corpora sound alike, and where not: is it the gain, the band, or the sounds themselves?"""

from __future__ import annotations

import math

from audiossl.passports.difference import (
    DB_PER_NEPER,
    IMPORTANT_SHARE,
    IMPORTANT_STDS,
    SURE,
    Difference,
    error_of_share,
    percent,
)

RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
LEAST_DB = 0.5  # of level
IMPORTANT_DB = 3.0
LEAST_MEAN = 0.02  # of the log-mel's mean, in its standard deviations
LEAST_EDGE = 0.8  # of the band's edge


def compare_sound(mine: dict, other: dict) -> list[Difference]:
    """Compare what was measured of two corpora."""
    a, b = mine["audio"], other["audio"]
    is_same_sample = a["hash"] == b["hash"]
    found = [_level(a, b, is_same_sample), _band(a["levels"], b["levels"])]
    found += [_log_mel(name, a, b, is_same_sample) for name in a["frontends"] if name in b["frontends"]]
    found.append(_share("digital silence", a["levels"]["share_silent"], b["levels"]["share_silent"], "of the time"))
    clipping = a["levels"]["clips_with_clipping"], b["levels"]["clips_with_clipping"]
    error = 0.0 if is_same_sample else error_of_share(clipping, (a["clips"], b["clips"]))
    if abs(clipping[0] - clipping[1]) > max(0.02, SURE * error):
        said = f"{percent(clipping[0])} of the clips reach full scale (there {percent(clipping[1])})"
        found.append(Difference("clipping", said, abs(clipping[0] - clipping[1]) > 0.1))
    else:
        found.append(Difference("clipping"))
    found.append(_failures(a["failures"], b["failures"]))
    found.append(_duplicates(mine, other))
    return found


def _level(a: dict, b: dict, is_same_sample: bool) -> Difference:
    here, there = a["levels"], b["levels"]
    if here["rms_db"] is None or there["rms_db"] is None:
        return Difference("level", "nothing but silence in one of the two", True)
    shift = _level_shift(a, b)
    spread = [(s["rms_db_std"] or 0.0) ** 2 / x["clips"] for s, x in ((here, a), (there, b))]
    error = 0.0 if is_same_sample else 1.25 * math.sqrt(sum(spread))  # of a median
    if abs(shift) <= max(LEAST_DB, SURE * error):
        return Difference("level")
    sure = "" if is_same_sample else f" (± {error:.1f} dB standard error)"
    peaks = f"peaks {here['peak_db']['p50']:.1f} dB, there {there['peak_db']['p50']:.1f} dB"
    text = f"{abs(shift):.1f} dB {'louder' if shift > 0 else 'quieter'}{sure} by the median RMS; {peaks}"
    return Difference("level", text, abs(shift) > IMPORTANT_DB)


def _level_shift(a: dict, b: dict) -> float:
    pair = a["levels"]["rms_db"], b["levels"]["rms_db"]
    return 0.0 if None in pair else pair[0]["p50"] - pair[1]["p50"]


def _band(here: dict, there: dict) -> Difference:
    """Compare the edge below which 95 % of the clips lie: a cut moves it, another mixture of sounds hardly."""
    if here["edge_hz"] is None or there["edge_hz"] is None:
        return Difference("bandwidth")
    pair = here["edge_hz"]["p95"], there["edge_hz"]["p95"]
    half = here["clips_half_empty"] or 0.0, there["clips_half_empty"] or 0.0
    if min(pair) >= LEAST_EDGE * max(pair):
        return Difference("bandwidth")
    here_hz, there_hz = (f"{hz / 1000:.1f} kHz" for hz in pair)
    if pair[0] > pair[1]:
        return Difference("bandwidth", f"reaches up to {here_hz} here, only {there_hz} there: that one was cut", True)
    rate = next((r for r in RATES_HZ if 0.9 * r <= 2 * pair[0] <= 1.08 * r), None)
    cause = (
        f"upsampled from {rate / 1000:g} kHz, or low-passed" if rate else "low-passed, or upsampled from a lower rate"
    )
    text = f"95 % of the clips hold nothing above {here_hz} (there {there_hz}): {cause}; the bands above are empty"
    half_text = (
        f", and the upper half of the band is empty in {percent(half[0])} of the clips (there {percent(half[1])})"
    )
    return Difference("bandwidth", text + (half_text if abs(half[0] - half[1]) > 0.01 else ""), True)


def _log_mel(name: str, a: dict, b: dict, is_same_sample: bool) -> Difference:
    here, there = a["frontends"][name], b["frontends"][name]
    shift, wider = here["mean"] - there["mean"], here["std"] - there["std"]
    errors = [
        0.0 if is_same_sample else math.hypot(here[k] or 0, there[k] or 0) for k in ("error_of_mean", "error_of_std")
    ]
    scale = there["std"] or 1.0
    moved = abs(shift) > max(LEAST_MEAN * scale, SURE * errors[0])
    spread = abs(wider) > max(LEAST_MEAN * scale, SURE * errors[1])
    if not (moved or spread):
        return Difference(name)
    words = []
    if moved:
        words.append(
            f"mean of the log-mel {abs(shift):.2f} {'higher' if shift > 0 else 'lower'} ({here['mean']:.3f}, "
            f"there {there['mean']:.3f})"
        )
    if spread:
        words.append(f"standard deviation {here['std']:.3f} (there {there['std']:.3f})")
    is_important = max(abs(shift) * moved, abs(wider) * spread) > IMPORTANT_STDS * scale
    cause = _cause(name, shift, a, b) if moved else ""
    return Difference(name, "; ".join(words) + cause + (_remedy(here) if is_important else ""), is_important)


def _cause(name: str, shift: float, a: dict, b: dict) -> str:
    expected = _level_shift(a, b) * (1.0 if name == "atst_mel" else 1 / DB_PER_NEPER)
    if a["rate_hz"] != b["rate_hz"]:
        return f": another --rate ({a['rate_hz']}, there {b['rate_hz']}) or other sounds"
    if _band(a["levels"], b["levels"]).text:
        return ": the bandwidth differs"
    if abs(expected) > 0.1 and 0.5 < shift / expected < 1.5:
        return f": as the level explains ({_level_shift(a, b):+.1f} dB would give {expected:+.2f})"
    return ": other clips with other sounds" if a["hash"] != b["hash"] else ": another level, or other sounds"


def _remedy(here: dict) -> str:
    settings = " ".join(f"{key}={value:.4f}" for key, value in here["config"].items())
    return f"; set {settings}" + ("" if "data.mean" in here["config"] else " where no published weights are used")


def _share(subject: str, here: float, there: float, of: str) -> Difference:
    if abs(here - there) <= 0.02:
        return Difference(subject)
    return Difference(subject, f"{percent(here)} {of} (there {percent(there)})", abs(here - there) > 0.05)


def _failures(here: dict, there: dict) -> Difference:
    if here["clips"] == there["clips"] or abs(here["share"] - there["share"]) <= 1e-3:
        return Difference("decoding")
    there_too = f"there {there['clips']:,}, {percent(there['share'])}"
    said = f"{here['clips']:,} clips ({percent(here['share'])}) cannot be decoded ({there_too})"
    return Difference("decoding", said, abs(here["share"] - there["share"]) > IMPORTANT_SHARE)


def _duplicates(mine: dict, other: dict) -> Difference:
    counts = [p["audio"]["duplicates"]["estimate"] or 0.0 for p in (mine, other)]
    shares = [count / p["clips"] for count, p in zip(counts, (mine, other), strict=True)]
    if abs(shares[0] - shares[1]) <= 1e-3:
        return Difference("duplicates")
    there_too = f"there {counts[1]:,.0f}, {percent(shares[1])}"
    said = f"{counts[0]:,.0f} clips are copies of another ({percent(shares[0])}; {there_too})"
    return Difference("duplicates", said, abs(shares[0] - shares[1]) > IMPORTANT_SHARE)
