"""Which setting was best, once a sweep has ended?

Training leaves a `results.json` in each job's folder; a Hydra callback gathers them into `summary.csv` and
`summary.png` beside the jobs. The picture shows a probe score: losses at different mask ratios, hops or front ends are
averages over different patches, and cannot be compared. A job that failed or never ran keeps its row, with its status,
and the table ends with the command that runs those alone.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from audiossl.errors import UserError
from audiossl.planning.jobs import is_first_process
from audiossl.sweeping.picture import Look, Row, draw
from audiossl.sweeping.plan import (
    RECORD,
    array_has_ended,
    array_task,
    as_dict,
    chosen,
    command_for,
    locked,
    planned_points,
    read_record,
)
from audiossl.sweeping.status import FINISHED, has_ended, read_jobs

MAX_SHOWN = 12  # columns of the table that is printed; the csv has all
SUMMARIES = {"audiossl.sweeps.Summary", "audiossl.probes.support.Summary"}


class Summary(Callback):
    """End a multirun with a table of its jobs; the process ends with 1 when one of its own did not finish.

    The settings say how the picture looks (`sweeping.picture.Look`); conf/sweep gives them beside what is swept.
    """

    def __init__(self, **look: Any):
        self.look = Look.of(**look)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the summary into the sweep's folder and print it; see `hydra.experimental.callback.Callback`."""
        end_sweep(config, self.summarise)

    def summarise(self, folder: Path, points: Sequence[Sequence[str]] | None) -> None:
        """Write and print what the sweep in a folder has come to."""
        summarise(folder, points, self.look)


def end_sweep(config: DictConfig, summarise: Callable[[Path, list[tuple[str, ...]]], Any]) -> None:
    """Summarise the sweep that a process has run, or its part of it; of an array's tasks the last one does.

    Raises `SystemExit(1)` where one of the points that this process ran did not finish.
    """
    if not is_first_process():
        return
    folder, points = Path(config.hydra.sweep.dir), planned_points(config)
    with locked(folder):
        jobs = read_jobs(folder, points)
        own = chosen(config, len(points)) if points else list(jobs)
        ahead = [number for number, job in jobs.items() if not has_ended(job)]
        is_last = array_has_ended([number for number in jobs if number not in ahead], os.environ)
        if array_task(config) is None or not ahead or is_last:
            summarise(folder, points)
            if ahead and array_task(config) is not None:
                numbers = ",".join(map(str, ahead))
                ways = f"--array={numbers} and hydra.sweep.dir={folder}"
                print(f"the array had no task for points {numbers}; submit the same command with {ways}")
        else:
            print(f"point {own[0]}: {jobs[own[0]]['status']}; still to end: {', '.join(map(str, ahead))} of {folder}")
    if any(jobs[number]["status"] != FINISHED for number in own):
        raise SystemExit(1)


def summarise(folder: Path, points: Sequence[Sequence[str]] | None = None, look: Look | None = None) -> list[Row]:
    """Write `summary.csv` of the jobs in a sweep's folder and draw `summary.png`, print the table, return its rows.

    A row holds job, the keys that differ between jobs, loss, one column a score, seconds and status, ordered by job
    number. `points` lists the overrides of every job that should be there.
    """
    jobs = read_jobs(folder, points)
    keys = _swept_keys([as_dict(point) for point in points] if points else [job["overrides"] for job in jobs.values()])
    scores = list(dict.fromkeys(name for job in jobs.values() for name in job.get("scores", {})))
    rows = []
    for number, job in jobs.items():
        row: Row = {"job": number} | {key: job["overrides"].get(key, "") for key in keys}
        row |= {"loss": job.get("loss", "")} | {name: job.get("scores", {}).get(name, "") for name in scores}
        rows.append(row | {"seconds": job.get("seconds", ""), "status": job["status"]})
    _write_csv(folder / "summary.csv", rows)
    is_drawn = draw(folder / "summary.png", rows, keys, scores, look or Look())
    _print(folder, rows, ["summary.csv"] + ["summary.png"] * is_drawn)
    return rows


def _swept_keys(jobs: list[dict[str, str]]) -> list[str]:
    """List the keys that differ between jobs, those with most values first, a seed last."""
    keys = dict.fromkeys(key for job in jobs for key in job)
    values = {key: {job.get(key) for job in jobs} for key in keys}
    swept = [key for key in keys if len(values[key]) > 1]
    return sorted(swept, key=lambda key: (key == "seed", -len(values[key])))


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["job"])
        writer.writeheader()
        writer.writerows(rows)


def _print(folder: Path, rows: list[Row], files: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = [name for name in (rows[0] if rows else ()) if not re.search(r"_(low|high|fold\w+|neighbours|l2)$", name)]
    shown = shown[: MAX_SHOWN - 2] + shown[-2:] if len(shown) > MAX_SHOWN else shown
    table = Table(*(escape(name) for name in shown))
    for row in rows:
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in shown]
        table.add_row(*map(escape, cells))
    console = Console()
    console.print(table)
    plain = dict(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} jobs in {folder}: {', '.join(files)}", **plain)
    open_ones = [row for row in rows if row["status"] != FINISHED]
    if open_ones:
        console.print(f"{len(open_ones)} of {len(rows)} did not finish:", **plain)
        for row in open_ones:
            console.print(f"  {row['job']}: {row['status']}", **plain)
        if command := command_for(folder, [row["job"] for row in open_ones]):
            console.print(f"to run those alone:\n  {command}", **plain)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m audiossl sweep`."""
    parser.add_argument("folder", type=Path, help="the folder of a sweep, running or ended (hydra.sweep.dir)")


def main(args: argparse.Namespace) -> int:
    """Write and print the summary of a sweep as far as it has come, with the command for what is left."""
    about = read_record(args.folder)
    if about is None:
        raise UserError(f"{args.folder}: holds no sweep ({RECORD} is missing)")
    path = args.folder / "multirun.yaml"  # written after the record: a kill may have come between
    config = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    settings = dict(config.get("hydra", {}).get("callbacks", {}).get("summary") or {})
    target = settings.pop("_target_", "audiossl.sweeps.Summary")
    if target not in SUMMARIES:
        raise UserError(f"{args.folder}: ends with {target}, which is none of ours")
    module, _, name = target.rpartition(".")
    getattr(importlib.import_module(module), name)(**settings).summarise(args.folder, about["points"])
    return 0
