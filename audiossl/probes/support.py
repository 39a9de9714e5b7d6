"""How much sound does an encoder need at a time, and what does it cost?

The temporal-support study of Quelennec et al. (arXiv 2312.14005): clips are cut into segments of 0.5 to 20 s, described
one by one and put together again. `python probe.py -m probe.temporal_support=0.5,1,3 init=A,B` is a sweep, and ends
here with one table and one plot of score, operations and speed against support. Every other sweep of probes ends with
its jobs side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audiossl import sweeps


class Summary(sweeps.Summary):
    """End a multirun of probes with their tables; the process ends with 1 when a job did not finish."""

    def summarise(self, folder: Path, points: Sequence[Sequence[str]] | None) -> None:
        """Write what every sweep ends with, then the probes side by side."""
        super().summarise(folder, points)
        write_summary(folder)


def write_summary(folder: Path) -> list[Path]:
    """Write compare.md and compare.png of a sweep's results, and support.md and .png for each task of several supports.

    Returns the files written; nothing where no job finished.
    """
    from audiossl.probes.compare import read_results, write_comparison

    contents = read_results(sorted(folder.glob("*/results.json")), is_sweep=True)
    if not contents:
        return []
    written = write_comparison(contents, folder)
    for name in dict.fromkeys(content["task"]["name"] for content in contents):
        mine = [content for content in contents if content["task"]["name"] == name]
        supports = {row["support_seconds"] for content in mine for row in content["rows"]}
        if len(supports - {None}) > 1:
            written += write_support(mine, folder, "support" if len(contents) == len(mine) else f"support_{name}")
    print(f"{folder}: {', '.join(path.name for path in written)}")
    return written


def write_support(contents: list[dict[str, Any]], folder: Path, stem: str) -> list[Path]:
    """Write the table and the plot of one task's scores and cost against support."""
    from audiossl.indexing.indexfile import write_whole
    from audiossl.probes.pictures import support_figure
    from audiossl.probes.results import markdown_table, with_interval

    unique = {
        (row["source"], row["head"], row["support_seconds"]): row
        for content in contents
        for row in content["rows"]
        if row["support_seconds"] is not None
    }
    rows = sorted(unique.values(), key=lambda row: (row["source"], row["head"], row["support_seconds"]))
    task = contents[0]["task"]
    titles = ["features", "head", "support (s)", "heard (s)", "segments", f"{task['metric']} (95 %)", "GFLOP a clip"]
    titles += ["clips/s"]
    cells = []
    for row in rows:
        cost = [f"{row[key]:.3g}" if key in row else "" for key in ("segment_seconds", "segments")]
        speed = [f"{row[key]:.3g}" if key in row else "" for key in ("gflops", "clips_per_second")]
        support = f"{row['support_seconds']:g}"
        cells.append([row["source"], row["head"], support, *cost, with_interval(row), *speed])
    title = f"{task['name']}: score and cost against the temporal support"
    lines = [f"## {title}", "", *markdown_table(titles, cells), ""]
    lines += ["Segments are cut without overlap; clips/s of the model alone, without reading and decoding."]
    write_whole(folder / f"{stem}.md", ("\n".join(lines) + "\n").encode())
    support_figure(rows, task["metric"], title, folder / f"{stem}.png")
    return [folder / f"{stem}.md", folder / f"{stem}.png"]
