"""What became of every tensor of a checkpoint?

A table with one line for each kind of tensor (the blocks' count as one), and the same in full, tensor by tensor, for
programs. Nothing is dropped without a reason in it. Where a file's own words contradict its weights, that is said too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiossl.weights.translation import Action, Row, Translation

ARCHITECTURES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}
NUMBER = re.compile(r"(blocks|layers)\.(\d+)\.")


def summarise(rows: Sequence[Row]) -> list[tuple[str, str, str, str, int]]:
    """Put rows that differ only in the number of their block into one: (source, action, ours, why, tensors)."""
    kinds: dict[tuple[str, str, str, str], list[int]] = {}
    counts: Counter = Counter()
    for row in rows:
        found = NUMBER.search(row.source)
        kind = (_without_number(row.source), row.action, _without_number(row.ours), row.why)
        kinds.setdefault(kind, []).extend([int(found.group(2))] if found else [])
        counts[kind] += 1
    return [
        (_with_numbers(source, numbers), action, _with_numbers(ours, numbers), why, counts[kind])
        for kind, numbers in kinds.items()
        for source, action, ours, why in [kind]
    ]


def fold_dropped(lines: Sequence[tuple[str, str, str, str, int]]) -> list[tuple[str, str, str, str, int]]:
    """Put neighbours dropped for the same reason into one line under a prefix that nothing else has."""
    folded: list[tuple[str, str, str, str, int]] = []
    names: dict[tuple[str, str], list[str]] = {}
    for source, action, _, why, _ in lines:
        names.setdefault((action, why), []).append(source)
    for line in lines:
        source, action, ours, why, count = line
        before = folded[-1] if folded else None
        if before and action == Action.DROPPED and before[1:4] == (action, ours, why):
            shared = _shared_prefix(before[0], source)
            others = [name for kind, of in names.items() if kind != (action, why) for name in of]
            if shared and not any(name.startswith(shared) for name in others):
                folded[-1] = (f"{shared}*", action, ours, why, before[4] + count)
                continue
        folded.append(line)
    return folded


def _shared_prefix(one: str, other: str) -> str:
    """Give what two names share, up to a dot or an underscore; nothing where that is less than four letters."""
    one = one.removesuffix("*")
    shared = one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]
    shared = shared[: max(shared.rfind("."), shared.rfind("_")) + 1]
    return shared if len(shared) >= 4 else ""


def _without_number(name: str) -> str:
    return NUMBER.sub(r"\1.{}.", name)


def _with_numbers(name: str, numbers: list[int]) -> str:
    if "{}" not in name:
        return name
    low, high = min(numbers), max(numbers)
    return name.replace("{}", str(low) if low == high else f"{{{low}..{high}}}")


def print_report(rows: Sequence[Row], missing: Sequence[str], console: Console) -> None:
    """Print what became of every tensor, and which of ours the file did not have."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for name in ("in the file", "tensors", "", "here", "why"):
        is_name = name in ("in the file", "here") and console.width >= 120  # reasons are wrapped first
        table.add_column(name, justify="right" if name == "tensors" else "left", overflow="fold", no_wrap=is_name)
    for source, action, ours, why, count in fold_dropped(summarise(rows)):
        colour = {Action.UNKNOWN: "red", Action.DROPPED: "yellow"}.get(action, "")
        table.add_row(
            Text(source), str(count), Text(action, style=colour), Text(ours if ours != source else "="), Text(why)
        )
    console.print(table)
    counts = Counter(row.action for row in rows)
    console.print(
        Text(", ".join(f"{count} {action}" for action, count in counts.items()) + f", {len(missing)} missing")
    )
    for name in missing:
        console.print(Text(f"missing: {name}", style="red"))


def as_dict(rows: Sequence[Row], missing: Sequence[str]) -> dict[str, Any]:
    """Give the report in full, for a .json."""
    full = [dict(source=row.source, action=row.action, ours=row.ours, why=row.why) for row in rows]
    return {"tensors": full, "missing": list(missing)}


def contradictions(hints: Mapping[str, Any], found: Translation) -> list[str]:
    """Say where a file's own words contradict its weights, which are taken: one line each."""
    geometry, said = found.geometry, []
    name = str(hints.get("arch", hints.get("model", "")))
    for size, (width, depth) in ARCHITECTURES.items():
        if re.search(rf"(^|_){size}(_|$)", name) and (width, depth) != (geometry["width"], geometry["depth"]):
            key = "arch" if "arch" in hints else "model"
            said.append(
                f"the file says {key}={name}, width {width} and depth {depth}; its weights, which are taken, have "
                f"width {geometry['width']} and depth {geometry['depth']}"
            )
    patch, head = geometry["patch"], found.head or {}
    facts = {
        **dict.fromkeys(("embed_dim", "width"), geometry["width"]),
        "depth": geometry["depth"],
        **dict.fromkeys(("patch_h", "patch_height"), patch[0]),
        **dict.fromkeys(("patch_w", "patch_width"), patch[1]),
        "n_mels": geometry["num_mels"],
        "num_heads": geometry["num_heads"],
        **dict.fromkeys(("num_labels", "num_classes", "nb_classes"), head.get("num_classes")),
    }
    for key, true in facts.items():
        if true is not None and isinstance(hints.get(key), int) and hints[key] != true:
            whose = "the family's or yours" if key == "num_heads" else "its weights'"
            said.append(f"the file says {key}={hints[key]}; {true}, {whose}, is taken")
    return said
