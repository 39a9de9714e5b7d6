"""What does a corpus look like: how long, how loud, of what, and in which bands?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from audiossl.plots import LINE_COLOURS
from audiossl.sound.mel import band_centres_hz

GRID = "#e4e6ea"
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600)


def passport_figure(passport: dict, path: Path | None = None) -> Figure:
    """Draw durations, clips per class, levels and the mean log-mel of each front end; panels without data say so."""
    figure = Figure(figsize=(12, 7.4), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    _durations(axes[0, 0], passport["durations"]["histogram"])
    _classes(axes[0, 1], passport["labels"])
    audio = passport.get("audio")
    if audio is None:
        for axis, what in ((axes[1, 0], "levels"), (axes[1, 1], "log-mels")):
            _say(axis, f"{what} not measured (--clips 0)")
    else:
        _levels(axes[1, 0], audio["levels"])
        _bands(axes[1, 1], audio["frontends"])
    split = f", split {passport['split']}" if passport["split"] else ""
    measured = f"; audio of {audio['clips']:,}" if audio else ""
    figure.suptitle(f"{passport['clips']:,} clips, {passport['hours']:,.2f} h{split}{measured}", fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _durations(axis: Axes, histogram: dict) -> None:
    edges, clips = np.array(histogram["edges_seconds"]), histogram["clips"]
    axis.bar(edges[:-1], clips, width=np.diff(edges), align="edge", color=LINE_COLOURS[0])
    axis.set_xscale("log")
    low, high = edges[0] / 1.3, edges[-1] * 1.3
    ticks = [s for s in SECONDS if low <= s <= high] or [edges[0]]
    axis.set_xlim(low, high)
    axis.set_xticks(ticks, [f"{s:g}" for s in ticks])
    axis.minorticks_off()
    axis.set_xlabel("duration (s)")
    axis.set_ylabel("clips")


def _classes(axis: Axes, labels: dict) -> None:
    counts = sorted(labels["counts"].items(), key=lambda pair: (-pair[1], pair[0]))
    if not labels["labels"]:
        return _say(axis, "no labels")
    values = [n for _, n in counts]
    axis.bar(range(len(values)), values, width=0.8 if len(values) < 60 else 1.0, color=LINE_COLOURS[2])
    if values[0] > 20 * max(values[-1], 1):
        axis.set_yscale("log")
    if len(values) <= 30:
        axis.set_xticks(range(len(values)), [name[:18] for name, _ in counts], rotation=40, ha="right", fontsize=8)
    else:
        axis.set_xlabel("class, most frequent first")
    axis.set_ylabel("clips")
    if labels["classes_without_a_clip"]:
        axis.set_title(f"{labels['classes_without_a_clip']} classes without a clip", fontsize=10)


def _levels(axis: Axes, levels: dict) -> None:
    for colour, (name, said) in zip(LINE_COLOURS, (("rms_db", "RMS"), ("peak_db", "peak")), strict=False):
        histogram = levels[f"histogram_{name}"]
        clips = np.array(histogram["clips"])
        edges = histogram["first_edge"] + histogram["width"] * np.arange(len(clips) + 1)
        axis.stairs(clips, edges, fill=True, alpha=0.55, color=colour, label=said)
    used = np.flatnonzero(levels["histogram_rms_db"]["clips"])
    if len(used):
        axis.set_xlim(levels["histogram_rms_db"]["first_edge"] + 2 * used[0] - 4, 3)
    axis.set_xlabel("level (dB, 0 is full scale)")
    axis.set_ylabel("clips measured")
    axis.legend(frameon=False)


def _bands(axis: Axes, front_ends: dict) -> None:
    """Draw natural-log units; ATST's decibels are converted, so that one axis holds all three."""
    for colour, (name, facts) in zip(LINE_COLOURS, front_ends.items(), strict=False):
        values = np.array(facts["bands"]) * (np.log(10) / 10 if name == "atst_mel" else 1.0)
        centres = band_centres_hz(len(values), facts["fmin_hz"], facts["fmax_hz"])
        axis.plot(centres, values, color=colour, linewidth=1.6, label=name)
    axis.set_xscale("log")
    axis.set_xticks([50, 100, 250, 500, 1000, 2000, 4000, 8000, 16000], "50 100 250 500 1k 2k 4k 8k 16k".split())
    axis.minorticks_off()
    axis.set_xlabel("frequency (Hz)")
    axis.set_ylabel("mean log-mel (natural log of power)")
    axis.legend(frameon=False)


def _say(axis: Axes, text: str) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
