"""What tells results apart that would stand in one cell of a table?

Every `task=folder` is called folder, and a sweep over layers gives rows of one encoder and head. Where that happens,
and only there, names get what differs behind them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

TESTED = ("metric", "folds", "test_clips", "clips", "kind", "classes")
LEARNED_FROM = ("validation", "train_splits", "validation_splits")  # of the task's settings
NOT_SAID = (  # what decides no score, or stands elsewhere in the table
    *("temporal_support", "heads", "baselines", "num_resamples", "bootstrap", "with_cost", "device", "*cache*"),
    *("domains*", "normalise_by", "protocol", "num_workers", "timeout_seconds", "resident", "*bad*", "damaged_shards"),
)


def told_apart(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name tasks and heads by what differs where results of different sets or settings would stand in one cell.

    Sets of one name (`folder`) are told apart by where they lie and what of them is tested, rows by the settings of the
    probe or the fine-tuning. Results with the same settings are one cell, of which the last counts, with a warning.
    """
    contents = [
        content | {"task": dict(content["task"]), "rows": [dict(r) for r in content["rows"]]} for content in contents
    ]
    for group in _by(contents, lambda content: content["task"]["name"]):
        places: dict[str | None, str | None] = {}  # of equal sets, the first
        sets = [_set(content, places) for content in group]
        for content, said in zip(group, _differences(sets), strict=True):
            content["task"]["name"] += said and f": {said}"
    cells = [(content, row) for content in contents for row in content["rows"]]
    for group in _by(cells, lambda cell: _cell(cell[1])):
        clashes = [names for names in _by(group, lambda cell: cell[0]["task"]["name"]) if len(names) > 1]
        if not clashes:
            continue
        said = _differences([_settings(content, row) for content, row in group])
        for (_, row), words in zip(group, said, strict=True):
            row["head"] += words and f", {words}"
        for clash in clashes:
            heads = [row["head"] for _, row in clash]
            if len(set(heads)) < len(heads):
                log.warning("%s, %s: several results with the same settings; the last counts", row["source"], heads[-1])
    return contents


def _by(items: Sequence[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _cell(row: dict[str, Any]) -> tuple:
    return row["source"], row.get("support_seconds"), row["head"]


def _set(content: dict[str, Any], places: dict[str | None, str | None]) -> dict[str, Any]:
    """Say which set is tested, and what of it; `classes` last, which is long."""
    task, given = content["task"], content.get("config", {}).get("task", {})
    place = places.setdefault(task.get("hash"), given.get("root") or given.get("shards"))
    return {"": place} | {key: task.get(key) for key in TESTED}


def _settings(content: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Flatten what decides a row's score, the task apart."""
    found: dict[str, Any] = {}
    for section, values in content.get("config", {}).items():
        if section == "init":
            found["init"] = None if row.get("source_hash") else values
        elif section == "heads":
            found |= _flat(values.get(row["head"], {}))
        elif section == "task":
            found |= {f"task.{key}": values.get(key) for key in LEARNED_FROM}
        else:
            found |= _flat(values) if section == "probe" else _flat({section: values})
    found |= {"hash": (row.get("source_hash") or "")[:8], "audiossl": content.get("audiossl")}
    return {key: v for key, v in found.items() if not any(fnmatchcase(key.rpartition(".")[2], p) for p in NOT_SAID)}


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _differences(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Word what tells each of several settings from the others, and no more; "" where all are the same."""
    keys = dict.fromkeys(key for one in settings for key in one)
    telling = next((key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1), None)
    if telling is None:
        return [""] * len(settings)
    values = [one.get(telling) for one in settings]
    shorts = [_short(value, values) for value in values]
    words = [""] * len(settings)
    for number, group in enumerate(_by(range(len(settings)), lambda place: json.dumps(values[place]))):
        short = shorts[group[0]]
        is_told = len({json.dumps(value) for value, said in zip(values, shorts, strict=True) if said == short}) == 1
        here = f"{telling}={short}".lstrip("=") + ("" if is_told else f" ({number + 1})")
        for place, more in zip(group, _differences([settings[place] for place in group]), strict=True):
            words[place] = ", ".join(filter(None, (here, more)))
    return words


def _short(value: Any, among: Sequence[Any]) -> str:
    """Word a value; a path by its last part, where that tells it from the others; a long one by its beginning."""
    if isinstance(value, str) and "/" in value:
        others = {Path(other).name for other in among if isinstance(other, str) and other != value}
        value = value if Path(value).name in others else Path(value).name
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = "+".join(value) or "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
