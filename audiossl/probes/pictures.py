"""What do the scores look like: side by side, class by class, and against the temporal support?"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from audiossl.plots import LINE_COLOURS
from audiossl.probes.scores import Tested, confusion, per_class

if TYPE_CHECKING:
    from audiossl.tasks import Task

ROLE_COLOURS = {"encoder": LINE_COLOURS[0], "untrained": LINE_COLOURS[1], "log-mel": LINE_COLOURS[5]}
MAX_NAMED = 60  # classes with a name in a picture


def draw(task: Task, content: dict[str, Any], tested: Sequence[Tested], folder: Path) -> None:
    """Write results.png, and confusion.png or per_class.png of the encoder's first head."""
    scores_figure([content], folder / "results.png")
    head = content["rows"][0]["head"]
    if task.kind == "multiclass":
        confusion_figure(confusion(task, tested), task.classes, f"{task.name}, {head}", folder / "confusion.png")
    elif task.kind == "multilabel":
        clips = np.unique(np.concatenate([one.clips for one in tested]))
        known = 1.0 if task.known is None else task.known[clips]
        counts, title = (task.targets_of(clips) * known).sum(0), f"{task.name}, {head}"
        per_class_figure(per_class(task, tested), counts, task.classes, title, folder / "per_class.png")


def scores_figure(contents: Sequence[dict[str, Any]], path: Path | None = None) -> Figure:
    """Draw every score with its interval: a panel a task, a line a source and head, those of one head together."""
    tasks = list(dict.fromkeys(content["task"]["name"] for content in contents))
    names = list(dict.fromkeys(label_of(row) for content in contents for row in content["rows"]))
    columns = min(len(tasks), 4)
    rows = math.ceil(len(tasks) / columns)
    size = (2.6 + 3.2 * columns, 0.9 + (0.34 * len(names) + 0.5) * rows)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(tasks) :]:
        panel.remove()
    for name, panel in zip(tasks, panels.flat, strict=False):
        mine = [content for content in contents if content["task"]["name"] == name]
        for content in mine:
            for row in content["rows"]:
                _dot(panel, names.index(label_of(row)), row)
        _finish(panel, names, f"{name}: {mine[0]['task']['metric']}")
    return _saved(figure, path)


def label_of(row: dict[str, Any]) -> str:
    """Name a row: its source, its support and its head."""
    support = "" if row.get("support_seconds") is None else f", {row['support_seconds']:g} s"
    return f"{short(row['source'])}{support} · {row['head']}"


def short(name: str, length: int = 44) -> str:
    """Shorten a name from its middle."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def _dot(panel: Axes, place: int, row: dict[str, Any]) -> None:
    colour = ROLE_COLOURS.get(row["role"], LINE_COLOURS[0])
    if row["low"] is not None and np.isfinite(row["low"]):
        panel.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.2, alpha=0.45)
    panel.plot(row["score"], place, "o", color=colour, markersize=6)
    panel.annotate(
        f"{row['score']:.3f}", (row["score"], place), (0, 5), textcoords="offset points", fontsize=7, ha="center"
    )


def _finish(panel: Axes, names: Sequence[str], title: str) -> None:
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.4, -0.7)
    panel.set_title(textwrap.fill(title, 36), fontsize=10)
    panel.grid(axis="x", color="#e4e6ea", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="x", labelsize=8)


def confusion_figure(counts: NDArray, classes: Sequence[str], title: str, path: Path | None = None) -> Figure:
    """Draw how often each class (row) was taken for each (column), as shares of the row; counts stand in the cells."""
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    side = min(16, 2.6 + 0.42 * len(classes))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", facecolor="white")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MAX_NAMED:
        axis.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
    if len(classes) <= 25:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "#33383f"
            axis.text(column, row, f"{counts[row, column]:.3g}", ha="center", va="center", color=colour, fontsize=7)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    axis.set_title(f"{title}: test clips of all folds", fontsize=10)
    figure.colorbar(image, ax=axis, label="share of the class's clips", shrink=0.8)
    return _saved(figure, path)


def per_class_figure(
    precisions: NDArray, counts: NDArray, classes: Sequence[str], title: str, path: Path | None = None
) -> Figure:
    """Draw each class's average precision, the best first, and the share of clips that chance would give."""
    order = np.argsort(-np.nan_to_num(precisions, nan=-1))
    is_named = len(classes) <= MAX_NAMED
    height = 1.1 + (0.26 * len(classes) if is_named else 8)
    figure = Figure(figsize=(7, min(height, 18)), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.barh(range(len(order)), np.nan_to_num(precisions[order]), color=LINE_COLOURS[0], height=0.75)
    if is_named:
        names = [f"{classes[i]} ({counts[i]:.0f})" for i in order]
        axis.set_yticks(range(len(order)), names, fontsize=8)
    axis.axvline(np.nanmean(precisions), color=LINE_COLOURS[1], linewidth=1.2)
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.set_xlabel("average precision (line: mean; in brackets: test clips with the class)")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def support_figure(rows: Sequence[dict[str, Any]], metric: str, title: str, path: Path | None = None) -> Figure:
    """Draw score, operations and speed over the temporal support: a line a source and head."""
    figure = Figure(figsize=(13, 4.2), layout="constrained", facecolor="white")
    score, operations, speed = figure.subplots(1, 3)
    lines = list(dict.fromkeys((row["source"], row["head"]) for row in rows))
    sources, heads = (list(dict.fromkeys(line[part] for line in lines)) for part in (0, 1))
    for line in lines:
        mine = sorted((r for r in rows if (r["source"], r["head"]) == line), key=lambda r: r["support_seconds"])
        colour = LINE_COLOURS[sources.index(line[0]) % len(LINE_COLOURS)]
        marker, style = "osD^v<"[heads.index(line[1]) % 6], ("-", "--", ":", "-.")[heads.index(line[1]) % 4]
        x = [row["support_seconds"] for row in mine]
        label = f"{short(line[0], 34)} · {line[1]}"
        score.plot(x, [row["score"] for row in mine], marker=marker, linestyle=style, color=colour, label=label)
        bounds = [[row[end] if row[end] is not None else np.nan for row in mine] for end in ("low", "high")]
        score.fill_between(x, *bounds, color=colour, alpha=0.12, linewidth=0)
        if line[1] == next(head for source, head in lines if source == line[0]) and "gflops" in mine[0]:
            operations.plot(x, [row["gflops"] for row in mine], marker=marker, color=colour)
            speed.plot(x, [row["clips_per_second"] for row in mine], marker=marker, color=colour)
    for axis, name in ((score, f"{metric} (band: 95 %)"), (operations, "GFLOP a clip"), (speed, "clips/s")):
        axis.set_xscale("log")
        ticks = sorted({row["support_seconds"] for row in rows})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("temporal support (s)")
        axis.set_title(name, fontsize=10)
        axis.grid(color="#e4e6ea", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (operations, speed):
        axis.set_ylim(bottom=0)
    score.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=11)
    return _saved(figure, path)


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
