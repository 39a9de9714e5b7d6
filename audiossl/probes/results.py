"""What is left of a probe: which numbers, in which files, and what does its reader see?

`results.json` holds everything, `results.csv` a line a source and head, `results.md` the table for a page. The table
says how sure a score is, what it cost, and what others have published.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiossl.config.secrets import mask
from audiossl.errors import UserError
from audiossl.indexing.indexfile import write_whole
from audiossl.scoring.classes import normalised_score
from audiossl.version import __version__

if TYPE_CHECKING:
    from audiossl.probes.run import Settings
    from audiossl.tasks import Task

FORMAT = "audiossl probe 1"
COMPARED = ("init", "task", "probe", "heads")  # what makes results of a folder another's
NOT_COMPARED = ("device", "cache_dir", "cache_gb", "batch_size")


def content(
    task: Task, config: dict[str, Any], settings: Settings, rows: list[dict], bad: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Put together what `results.json` holds; `scores` are those of the encoder, head by head, for sweeps."""
    about = {"name": task.name, "kind": task.kind, "metric": task.metric, "classes": task.classes, "hash": task.hash}
    about |= {"clips": len(task), "folds": [division.name for division in task.divisions]}
    about |= {"test_clips": sum(len(division.test) for division in task.divisions), "published": task.published}
    domains = [domain for domain, names in settings.domains.items() if task.name in names]
    best = task.published.get(settings.normalise_by or "")
    if best:
        share = best / 100 if best > 1.5 else best
        rows = [row | {"normalised": float(normalised_score(row["score"], share))} for row in rows]
    scores = {}
    for row in rows:
        if row["role"] == "encoder":
            scores |= {row["head"]: row["score"], f"{row['head']}_low": row["low"], f"{row['head']}_high": row["high"]}
    return {
        "format": FORMAT,
        "status": "finished",
        "audiossl": __version__,
        "protocol": settings.protocol,
        "domain": domains[0] if domains else None,
        "task": about,
        "scores": scores,
        "rows": mask(rows),
        "bad_clips": mask(bad),
        "seconds": round(seconds, 2),
        "config": mask({key: config[key] for key in COMPARED}),
    }


def refuse_other(folder: Path, config: dict[str, Any]) -> None:
    """Raise `UserError` where a folder holds results of other settings."""
    path = folder / "results.json"
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_bytes()).get("config")
    except ValueError:
        return
    now = mask({key: config[key] for key in COMPARED})
    if before and (changed := sorted(differing(before, now))):
        raise UserError(
            f"{folder}: holds results of other settings ({', '.join(changed[:4])}); give this one a name=..."
        )


def differing(before: Any, now: Any, key: str = "") -> Iterable[str]:
    """List the keys of which two settings say different things, as `section.key`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {*before, *now} - set(NOT_COMPARED):
            yield from differing(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif json.loads(json.dumps(now)) != before:
        yield key


def write(content: dict[str, Any], folder: Path) -> None:
    """Write results.json, results.csv and results.md."""
    write_whole(folder / "results.json", json.dumps(plain(content), indent=1).encode())
    text = io.StringIO()
    columns = ["task", "metric", "role", "source", "head", "support_seconds", "score", "low", "high", "std"]
    columns += [f"score_{fold}" for fold in content["task"]["folds"] if fold]
    columns += ["normalised", "gflops", "clips_per_second", "segments", "head_seconds"]
    numbers = list(dict.fromkeys(name for row in content["rows"] for name in row["numbers"]))
    writer = csv.DictWriter(text, columns + numbers, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in content["rows"]:
        folds = {f"score_{fold}": score for fold, score in row["folds"].items()}
        about = {"task": content["task"]["name"], "metric": content["task"]["metric"]}
        writer.writerow(about | row | folds | row["numbers"])
    write_whole(folder / "results.csv", text.getvalue().encode())
    write_whole(folder / "results.md", markdown(content).encode())


def plain(value: Any) -> Any:
    """Replace NaN, which JSON does not know, by null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(content: dict[str, Any], *, with_folds: bool = True) -> tuple[list[str], list[list[str]]]:
    """Lay the rows out as cells: titles, then a row a source and head."""
    rows = content["rows"]
    has_folds = with_folds and 1 < len(content["task"]["folds"]) <= 5
    has_seeds = any(row["std"] is not None for row in rows)
    titles = ["features", "head", f"{content['task']['metric']} (95 %)", *(["± seeds"] if has_seeds else [])]
    titles += content["task"]["folds"] if has_folds else []
    titles += ["normalised"] if any("normalised" in row for row in rows) else []
    titles += ["GFLOP a clip", "clips/s"] if any("gflops" in row for row in rows) else []
    cells = []
    for row in rows:
        line = [row["source"], row["head"], with_interval(row)]
        line += [f"{row['std']:.3f}" if row["std"] is not None else ""] if has_seeds else []
        line += [f"{score:.3f}" for score in row["folds"].values()] if has_folds else []
        line += [f"{row['normalised']:.3f}"] if "normalised" in titles else []
        line += [f"{row['gflops']:.3g}", f"{row['clips_per_second']:.3g}"] if "gflops" in row else []
        cells.append(line)
    return titles, cells


def with_interval(row: dict[str, Any]) -> str:
    """Word a score and its interval."""
    if row["low"] is None or not math.isfinite(row["low"]):
        return f"{row['score']:.3f}"
    return f"{row['score']:.3f} ({row['low']:.2f} to {row['high']:.2f})"


def markdown(content: dict[str, Any]) -> str:
    """Write the table for a page, with what it is about above and what others published below."""
    titles, cells = table(content)
    return "\n".join([f"## {_title(content)}", "", *markdown_table(titles, cells), "", *notes(content)]) + "\n"


def markdown_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Write cells as lines of a Markdown table."""
    lines = [titles, ["---"] * len(titles), *cells]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _title(content: dict[str, Any]) -> str:
    task, config = content["task"], content["config"]["probe"]
    layers = config["layers"] if isinstance(config["layers"], str) else f"{config['layers']} layers"
    support = config["temporal_support"]
    heard = "whole clips" if support is None else f"segments of {support:g} s, {config['aggregate']} averaged"
    return f"{task['name']}: frozen features, {task['clips']} clips, {len(task['classes'])} classes ({layers}, {heard})"


def notes(content: dict[str, Any]) -> list[str]:
    """Say what the table leaves open: folds, clips left out, published scores."""
    task, found = content["task"], []
    folds = [fold for fold in task["folds"] if fold]
    if len(folds) > 1:
        found.append(f"Mean of {len(folds)} folds; intervals over {task['test_clips']} test clips.")
    if task["kind"] == "events" and (said := _decided(content)):
        found.append(said)
    if content["bad_clips"]:
        names = ", ".join(list(content["bad_clips"])[:5])
        found.append(f"{len(content['bad_clips'])} clips could not be used and are left out: {names}.")
    if task["published"]:
        found.append("Published: " + ", ".join(f"{name} {score}" for name, score in task["published"].items()) + ".")
    return found


def _decided(content: dict[str, Any]) -> str:
    """Say from which probability on something is heard, which is not the same in all tables of events."""
    of_folds = [one["thresholds"] for row in content["rows"] for one in row.get("chosen", ()) if "thresholds" in one]
    if not of_folds:
        return ""
    fixed = [one for one in of_folds if not isinstance(one, list)]
    if not fixed:
        return "Thresholds per class, for the highest F1 of moments of validation clips."
    many = "" if len(fixed) == len(of_folds) else f" in {len(fixed)} of {len(of_folds)} fits"
    why = ", as there are no clips to tune it on" if content["config"]["probe"]["thresholds"] == "validation" else ""
    return f"Something is heard from a probability of {fixed[0]:g} on{many}{why}."


def show(content: dict[str, Any], folder: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    titles, cells = table(content, with_folds=False)
    printed = Table()
    for number, title in enumerate(titles):
        printed.add_column(escape(title), justify="left" if number < 2 else "right", overflow="fold")
    for row in cells:
        printed.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(_title(content), markup=False, highlight=False, soft_wrap=True)
    console.print(printed)
    for line in [*notes(content), f"everything in {folder}: results.json, .csv, .md, .png"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
