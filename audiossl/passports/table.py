"""How does a passport read on a terminal, 80 columns wide or more?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from audiossl.passports.difference import Difference

MOST = 3  # classes, reasons and duplicates named in a row


def print_passport(passport: dict, source: str, console: Console | None = None) -> None:
    """Print what a reader decides by in three tables: facts, distributions, front ends; the rest is in the file."""
    console = console or Console()
    console.print(Text(f"passport of {source}" + (f", split {passport['split']}" if passport["split"] else "")))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in [*_index_rows(passport), *_audio_rows(passport)]:
        facts.add_row(name, Text(value))
    console.print(facts)
    spreads = _grid("", "min", "5 %", "median", "95 %", "max")
    for name, found, form in _spreads(passport):
        if found is not None:
            spreads.add_row(name, *(form.format(found[p]) for p in ("min", "p5", "p50", "p95", "max")))
    console.print(Text())
    console.print(spreads)
    if "audio" in passport:
        console.print(Text())
        console.print(_front_ends(passport["audio"]["frontends"]))


def _grid(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", style=None if i else "bold", no_wrap=True)
    return table


def _front_ends(front_ends: dict) -> Table:
    table = _grid("log-mel", "mean", "± error", "std", "min", "max")
    table.add_column("in a config")
    for name, facts in front_ends.items():
        error = "" if facts["error_of_mean"] is None else f"{facts['error_of_mean']:.3f}"
        numbers = [f"{facts[key]:.2f}" for key in ("std", "min", "max")]
        settings = "\n".join(f"{key}={value:.4f}" for key, value in facts["config"].items())
        table.add_row(name, f"{facts['mean']:.2f}", error, *numbers, settings)
    return table


def _spreads(passport: dict) -> Iterable[tuple[str, dict | None, str]]:
    yield "seconds", passport["durations"]["seconds"], "{:.2f}"
    if "audio" in passport:
        levels = passport["audio"]["levels"]
        yield "peak (dB)", levels["peak_db"], "{:.1f}"
        yield "RMS (dB)", levels["rms_db"], "{:.1f}"
        yield "DC offset", levels["dc"], "{:.4f}"
        yield "99 % energy (Hz)", levels["rolloff_hz"], "{:,.0f}"
        yield "band edge (Hz)", levels["edge_hz"], "{:,.0f}"


def print_comparison(differences: list[Difference], mine: str, other: str, console: Console | None = None) -> None:
    """Print what differs, what changes a model first, and then what is equal, in one line."""
    console = console or Console()
    console.print(Text(f"\ncompared with {other}"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    apart = [d for d in differences if d.text]
    for difference in sorted(apart, key=lambda d: not d.is_important):
        mark = "!" if difference.is_important else "-"
        table.add_row(mark, difference.subject, Text(difference.text))
    console.print(table)
    if equal := [d.subject for d in differences if not d.text]:
        console.print(Text(f"equal, or within the error of the sample: {', '.join(equal)}"))
    num_important = sum(d.is_important for d in apart)
    console.print(
        Text(
            f"{num_important} of {len(differences)} things compared differ so that a model would notice (!)"
            if num_important
            else "nothing differs that a model would notice"
        )
    )


def _index_rows(passport: dict) -> Iterable[tuple[str, str]]:
    labels, durations = passport["labels"], passport["durations"]
    yield "clips", f"{passport['clips']:,} in {passport['shards']:,} shards, {_bytes(passport['shard_bytes'])}"
    yield "hours", f"{passport['hours']:,.2f}"
    for name in ("corpus", "keys", "labels"):
        yield f"{name} hash", passport["hashes"][name][:16]
    for name in ("splits", "folds"):
        if set(passport[name]) != {"none"}:
            yield name, _counts(passport[name])
    yield "labels", _labels(labels)
    if labels["labels"]:
        yield "", _classes(labels)
    yield "rates (Hz)", _counts(passport["rates_hz"])
    yield "channels", _counts(passport["channels"])
    yield "extensions", _counts(passport["extensions"])
    yield "short", f"{durations['share_below_10_s']:.1%} below 10 s"


def _audio_rows(passport: dict) -> Iterable[tuple[str, str]]:
    audio = passport.get("audio")
    if audio is None:
        yield "audio", "not measured (--clips 0)"
        return
    levels, failures, duplicates = audio["levels"], audio["failures"], audio["duplicates"]
    which = "all clips" if audio["clips"] == passport["clips"] else f"a sample of {audio['clips']:,} clips"
    yield "measured", f"{which}, {audio['hours']:,.2f} h (seed {audio['seed']})"
    yield "not decodable", _failures(failures)
    yield "duplicates", _duplicates(duplicates)
    silent = f"{levels['share_silent']:.2%} of the time, {levels['clips_silent']} clips throughout"
    yield "digital silence", silent
    yield (
        "full scale",
        f"{levels['share_clipped']:.3%} of the samples, in {levels['clips_with_clipping']:.1%} of the clips",
    )
    if levels["clips_half_empty"]:
        yield (
            "empty band",
            f"the upper half holds nothing in {levels['clips_half_empty']:.1%} of the clips (upsampled?)",
        )


def _labels(labels: dict) -> str:
    if not labels["labels"]:
        return f"none ({labels['classes']} classes in the vocabulary)"
    several = {int(n): clips for n, clips in labels["clips_by_number_of_labels"].items()}
    unlabelled = f", {several[0]:,} clips unlabelled" if several.get(0) else ""
    empty = labels["classes_without_a_clip"]
    per_clip = f"{labels['labels_per_clip']:.2f} a clip ({min(several)} to {max(several)})"
    return f"{labels['classes']} classes, {empty} without a clip; {per_clip}{unlabelled}"


def _classes(labels: dict) -> str:
    counts = sorted(((n, name) for name, n in labels["counts"].items() if n), key=lambda pair: (-pair[0], pair[1]))
    if counts[0][0] == counts[-1][0]:
        return f"{counts[0][0]:,} clips in every class"
    most, least = (", ".join(f"{name} {n:,}" for n, name in some) for some in (counts[:MOST], counts[-MOST:]))
    return f"most: {most}; fewest: {least}; imbalance {labels['imbalance']:,.1f}"


def _failures(failures: dict) -> str:
    if not failures["clips"]:
        return "none"
    first = "; ".join(f"{f['key']} in {f['shard']}: {f['reason']}" for f in failures["listed"][:MOST])
    return f"{failures['clips']:,} ({failures['share']:.2%}): {first}" + (" ..." if failures["clips"] > MOST else "")


def _duplicates(duplicates: dict) -> str:
    read = "" if duplicates["share_read"] == 1 else f" among {duplicates['share_read']:.1%} of the suspects"
    if not duplicates["extra"]:
        return f"none{read}"
    first = "; ".join(" = ".join(keys) for keys in duplicates["keys"][:MOST])
    estimate = f", about {duplicates['estimate']:,.0f} in all" if read else ""
    return f"{duplicates['extra']:,} clips more than once{read}{estimate}: {first}"


def _counts(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    if len(counts) == 1:
        return next(iter(counts))
    shown = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = f", {len(shown) - 8} more" if len(shown) > 8 else ""
    return ", ".join(f"{name}: {n:,} ({n / total:.1%})" for name, n in shown[:8]) + rest


def _bytes(number: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
