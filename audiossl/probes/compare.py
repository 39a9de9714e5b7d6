"""How do any results stand side by side?

`python -m audiossl compare RESULTS... [--out DIR]` takes the results of probes (and of whatever else writes the same
file): a row a source and head, a column a task, and where the results belong to a suite, averages per domain (ARCH) or
of scores normalised by the best of 2021 (HEAR).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audiossl.errors import UserError
from audiossl.probes.differences import told_apart
from audiossl.probes.results import markdown_table, with_interval

NEEDED = ("task", "rows")


def read_results(paths: Sequence[Path], *, is_sweep: bool = False) -> list[dict[str, Any]]:
    """Read results.json files, or the folders that hold them (or jobs with them).

    In a sweep, jobs without rows (failed) are left out; else they raise `UserError`, as does what is no such file.
    """
    contents = []
    for path in (found for given in paths for found in _files(given)):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable results.json ({error})") from error
        if not isinstance(content, dict) or not all(key in content for key in NEEDED):
            if is_sweep:
                continue
            raise UserError(f"{path}: not results of a probe (they have {', '.join(NEEDED)}); run probe.py first")
        contents.append(content)
    return told_apart(contents)


def _files(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UserError(f"{given}: no such file or folder; give results.json files or the folders they lie in")
    here = given / "results.json"
    found = [here] if here.is_file() else sorted(given.glob("*/results.json"))
    if not found:
        raise UserError(f"{given}: holds no results.json, nor do the folders in it")
    return found


def comparison(contents: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[dict[str, Any]]]:
    """Lay results out: titles, cells, and flat rows of plain values for a csv.

    A row is a source, head and support; a task's cell is its score with its interval. Where two results say something
    of the same cell, the last counts.
    """
    tasks = {c["task"]["name"]: c["task"] for c in contents}
    domains = {c["task"]["name"]: c["domain"] for c in contents if c.get("domain")}
    lines: dict[tuple, dict[str, dict]] = {}
    for content in contents:
        for row in content["rows"]:
            key = (row["source"], row.get("support_seconds"), row["head"])
            lines.setdefault(key, {})[content["task"]["name"]] = row
    has_support = any(support is not None for _, support, _ in lines)
    averages = _averages(tasks, domains, lines)
    titles = ["features", *(["support (s)"] if has_support else []), "head"]
    titles += [f"{name} ({task['metric']})" for name, task in tasks.items()] + list(averages)
    cells, flat = [], []
    for key, by_task in lines.items():
        source, support, head = key
        line = [source, *([f"{support:g}" if support is not None else ""] if has_support else []), head]
        line += [with_interval(by_task[name]) if name in by_task else "" for name in tasks]
        line += [f"{found[key]:.3f}" if key in found else "" for found in averages.values()]
        cells.append(line)
        values = {"features": source, "support_seconds": support, "head": head}
        for name, row in by_task.items():
            values |= {name: row["score"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
        flat.append(values | {name: found[key] for name, found in averages.items() if key in found})
    return titles, cells, flat


def _averages(
    tasks: dict, domains: dict[str, str], lines: dict[tuple, dict[str, dict]]
) -> dict[str, dict[tuple, float]]:
    """Average each row's scores over the tasks of a domain, and its normalised scores; only where all are there."""
    found: dict[str, dict[tuple, float]] = {}
    for domain in dict.fromkeys(domains.values()):
        names = [name for name in tasks if domains.get(name) == domain]
        found[f"mean of {domain} ({len(names)})"] = {
            key: sum(by_task[name]["score"] for name in names) / len(names)
            for key, by_task in lines.items()
            if all(name in by_task for name in names)
        }
    normalised = {
        key: [row["normalised"] for row in by_task.values() if row.get("normalised") is not None]
        for key, by_task in lines.items()
    }
    most = max(map(len, normalised.values()), default=0)
    if most:
        found[f"normalised, mean of {most}"] = {k: sum(v) / most for k, v in normalised.items() if len(v) == most}
    return found


def write_comparison(contents: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write compare.md, compare.csv and compare.png; returns their paths."""
    from audiossl.indexing.indexfile import write_whole
    from audiossl.probes.pictures import scores_figure

    titles, cells, flat = comparison(contents)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give --out a folder you may write") from error
    lines = ["## Frozen features side by side", "", *markdown_table(titles, cells), "", *_published(contents)]
    write_whole(folder / "compare.md", ("\n".join(lines) + "\n").encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_whole(folder / "compare.csv", text.getvalue().encode())
    scores_figure(contents, folder / "compare.png")
    return [folder / "compare.md", folder / "compare.csv", folder / "compare.png"]


def _published(contents: Sequence[dict[str, Any]]) -> list[str]:
    tasks = {content["task"]["name"]: content["task"] for content in contents}
    return [
        f"{name}, published: " + ", ".join(f"{model} {score}" for model, score in task["published"].items()) + "."
        for name, task in tasks.items()
        if task.get("published")
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl compare`."""
    parser.add_argument("results", metavar="RESULTS", type=Path, nargs="+", help="results.json files or their folders")
    parser.add_argument("--out", type=Path, help="also write compare.md, compare.csv and compare.png into this folder")


def main(args: argparse.Namespace) -> int:
    """Print the table, and write it where asked."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    contents = read_results(args.results)
    titles, cells, _ = comparison(contents)
    table = Table()
    for number, title in enumerate(titles):
        table.add_column(escape(title), justify="left" if number < 2 else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for line in _published(contents):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if args.out is not None:
        written = write_comparison(contents, args.out)
        console.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)
    if not any(math.isfinite(row["score"]) for content in contents for row in content["rows"]):
        raise UserError("none of these results has a score")
    return 0
