"""What does the picture of a sweep show?

A probe score over one key, a line for each combination of the other keys; categories where the values are no numbers.
What was published lies over it on an axis of its own, because it is of another set and another metric: shapes can be
compared, heights cannot. Bars are the 95 % interval of a score over the test clips, where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes

SAME_LOSS = ("optim.", "trainer.", "seed", "init")  # keys that leave the meaning of the loss alone
NAMES = {"linear": "linear probe", "knn": "kNN probe"}
PUBLISHED_COLOURS = ("#5b6470", "#9a7b1f", "#7a4fa3")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Hold a published curve: what is scored, by which metric, and its values by those of the swept key."""

    name: str
    metric: str
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Say how the picture is drawn; x: the key along it, null for the one with most values."""

    x: str | None = None
    title: str | None = None
    scale: Literal["linear", "log"] = "linear"
    published: tuple[Published, ...] = ()

    @classmethod
    def of(cls, *, published: Sequence[Mapping[str, Any]] = (), **settings: Any) -> Look:
        """Build it of a config's values."""
        curves = []
        for curve in published:
            values = {str(key): float(value) for key, value in curve["values"].items()}
            curves.append(Published(name=curve["name"], metric=curve["metric"], values=values))
        return cls(published=tuple(curves), **settings)


def draw(path: Path, rows: list[Row], keys: list[str], scores: list[str], look: Look) -> bool:
    """Draw a score over the key with most values, or the one asked for, one line for each combination of the others.

    Returns whether there was something to draw; a picture of an earlier summary goes where there is not.
    """
    y = "linear" if "linear" in scores else next(iter(scores), None)
    if y is None and keys and all(key.startswith(SAME_LOSS) for key in keys):
        y = "loss"
    if y is None or not any(row[y] != "" for row in rows):
        print("no picture of the sweep: no job has a probe score, and losses of different settings cannot be compared")
        path.unlink(missing_ok=True)
        return False
    from audiossl.plots import sweep_figure

    keys = keys or ["job"]
    x = look.x if look.x in keys else keys[0]
    others = [key for key in keys if key != x]
    line = ", ".join(others) or None
    table = [row | ({line: ", ".join(str(row[key]) for key in others)} if line else {}) for row in rows]
    figure = sweep_figure(table, x=x, y=y, line=line)
    axis = figure.axes[0]
    axis.set_ylabel(f"{NAMES.get(y, y)}, this sweep")
    values = list(dict.fromkeys(str(row[x]) for row in rows if row[y] != ""))
    numbers = [_number(value) for value in values]
    scored = [row for row in table if row[y] != ""]
    _draw_intervals(
        axis, scored, [values.index(str(row[x])) if None in numbers else float(row[x]) for row in scored], y, line
    )
    if look.scale == "log" and None not in numbers:
        axis.set_xscale("log")
        axis.set_xticks(numbers, values, minor=False)
        axis.minorticks_off()
    if look.published:
        _overlay(axis, look.published, values)
        if line is None:
            axis.lines[0].set_label("this sweep")
    _move_legend(figure.axes)
    if look.title:
        axis.set_title(look.title, fontsize=10, loc="left")
    figure.savefig(path, dpi=120)
    return True


def _draw_intervals(axis: Axes, rows: list[Row], places: list[float], y: str, line: str | None) -> None:
    """Draw the interval of each score that has one, in the colour of its line."""
    names = dict.fromkeys(row.get(line) for row in rows)
    colours = dict(zip(names, [drawn.get_color() for drawn in axis.lines], strict=True))
    for row, place in zip(rows, places, strict=True):
        if row.get(f"{y}_low") not in (None, ""):
            low, high = row[f"{y}_low"], row[f"{y}_high"]
            axis.vlines(place, low, high, colors=colours[row.get(line)], alpha=0.35, linewidth=1.5)


def _overlay(axis: Axes, published: Sequence[Published], values: list[str]) -> None:
    """Draw published curves, dashed, over the values that were swept (all of theirs where those are numbers)."""
    is_number = all(_number(value) is not None for value in values)
    twin = axis.twinx()
    for curve, colour in zip(published, PUBLISHED_COLOURS, strict=False):
        if is_number:
            points = sorted((float(key), score) for key, score in curve.values.items())
        else:
            points = [(values.index(key), score) for key, score in curve.values.items() if key in values]
        if points:
            style = dict(linestyle="--", marker="s", markersize=5, color=colour, markerfacecolor="white")
            twin.plot(*zip(*points, strict=True), label=f"published: {curve.name}", **style)
    twin.set_ylabel(f"published {', '.join(dict.fromkeys(curve.metric for curve in published))}", color="#5b6470")
    twin.tick_params(axis="y", colors="#5b6470")
    twin.spines[["top", "left"]].set_visible(False)


def _move_legend(axes: Sequence[Axes]) -> None:
    """Put what names the lines below the picture, where it covers none of them."""
    entries = [entry for axis in axes for entry in zip(*axis.get_legend_handles_labels(), strict=True)]
    if axes[0].get_legend() is not None:
        axes[0].get_legend().remove()
    if entries:
        columns = 1 if len(axes) > 1 and len(entries) < 4 else 2
        handles, labels = zip(*entries, strict=True)
        axes[0].figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=columns)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
