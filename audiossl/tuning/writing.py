"""What is left of a fine-tuning: how good is what was said of the test clips?

All folds together, whose predictions are in `tuning/predictions.py`, leave `results.json` in the form of a probe's, so
that `python -m audiossl compare` sets them side by side.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audiossl.config.secrets import mask
from audiossl.indexing.indexfile import write_whole
from audiossl.plots import LINE_COLOURS
from audiossl.probes.pictures import confusion_figure, per_class_figure
from audiossl.probes.results import markdown_table, plain, with_interval
from audiossl.probes.scores import Tested, confusion, per_class, summarise
from audiossl.version import __version__

if TYPE_CHECKING:
    from audiossl.tasks import Task
    from audiossl.tuning.testing import Testing

log = logging.getLogger(__name__)

SAID = ("init", "seed", "seeds", "task", "frontend", "model", "optim", "data", "swa", "stopping", "test")  # sections


def write_run(
    config: Mapping[str, Any], task: Task, tested: Sequence[Tested], run_dir: Path, testing: Testing
) -> dict[str, Any]:
    """Score all folds together; write results.json, .csv, .md and pictures, print the table, and give the results."""
    summary = summarise(task, tested, num_resamples=testing.bootstrap, folder=run_dir)
    about = {"name": task.name, "kind": task.kind, "metric": task.metric, "classes": task.classes, "hash": task.hash}
    about |= {"clips": len(task), "folds": [division.name for division in task.divisions]}
    about |= {"test_clips": sum(len(division.test) for division in task.divisions), "published": task.published}
    role = "untrained" if config["init"].startswith("untrained:") else "encoder"
    head = "evaluated" if config["evaluate"] else "fine-tuned"
    row = {"source": mask(config["init"]), "head": head, "role": role, "support_seconds": None, **summary}
    results = {"format": "audiossl finetune 1", "status": "finished", "audiossl": __version__, "task": about}
    results |= {"scores": {"score": summary["score"], **summary["numbers"]}, "rows": [row]}
    results["bad_clips"] = {key: reason for one in tested for key, reason in one.bad_clips.items()}
    lasting = {key: config["trainer"][key] for key in ("max_steps", "max_epochs")}
    results |= {"config": mask({key: config[key] for key in SAID} | {"trainer": lasting})}
    if curve := _noise_curve(run_dir, task.metric):
        results["noise"] = curve
    run_dir.mkdir(parents=True, exist_ok=True)
    _draw(task, tested, results, run_dir)
    write_whole(run_dir / "results.md", _markdown(results).encode())
    write_whole(run_dir / "results.csv", _numbers_text(summary).encode())
    _show(results, run_dir)
    path = run_dir / "results.json"
    if path.is_file():  # of the training, where the set is divided in one way only
        of_training = json.loads(path.read_bytes())
        results = of_training | results | {"scores": of_training.get("scores", {}) | results["scores"]}
    write_whole(path, json.dumps(plain(results), indent=1).encode())
    return results


def _noise_curve(run_dir: Path, metric: str) -> dict[str, float]:
    """Average the folds' scores with noise, by dB."""
    found: dict[str, list[float]] = {}
    for path in [*run_dir.glob("noise.json"), *run_dir.glob("*/noise.json"), *run_dir.glob("*/*/noise.json")]:
        for snr_db, numbers in json.loads(path.read_bytes()).items():
            found.setdefault(snr_db, []).append(numbers[metric])
    return {snr_db: float(np.mean(values)) for snr_db, values in found.items()}


def _draw(task: Task, tested: Sequence[Tested], results: Mapping[str, Any], run_dir: Path) -> None:
    title = f"{task.name}, {results['rows'][0]['head']}"
    if task.kind == "multiclass":
        confusion_figure(confusion(task, tested), task.classes, title, run_dir / "confusion.png")
    elif task.kind == "multilabel":
        per_class_figure(
            per_class(task, tested), _holding(task, tested), task.classes, title, run_dir / "per_class.png"
        )
    if task.kind != "events":
        _write_classes(task, tested, run_dir / "per_class.csv")
    if results.get("noise"):
        _noise_figure(results, run_dir / "noise.png")


def _write_classes(task: Task, tested: Sequence[Tested], path: Path) -> None:
    """Write a row a class: test clips of all folds, AP and AUC averaged over folds; empty where nothing can be said."""
    counts, columns = _holding(task, tested), [per_class(task, tested, of) for of in ("average_precision", "auc")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "clips", "AP", "AUC"])
    for number, name in enumerate(task.classes):
        values = [column[number] for column in columns]
        writer.writerow([name, int(counts[number]), *("" if math.isnan(v) else f"{v:.6g}" for v in values)])
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _holding(task: Task, tested: Sequence[Tested]) -> NDArray[np.float32]:
    """Count the test clips that are known to hold each class: (C,)."""
    clips = np.unique(np.concatenate([one.clips for one in tested]))
    return (task.targets_of(clips) if task.known is None else task.targets_of(clips) * task.known[clips]).sum(0)


def _noise_figure(results: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    curve = sorted((float(snr_db), score) for snr_db, score in results["noise"].items())
    row, metric = results["rows"][0], results["task"]["metric"]
    figure = Figure(figsize=(5.5, 3.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.plot(*zip(*curve, strict=True), marker="o", color=LINE_COLOURS[0], label="with noise")
    axis.axhline(row["score"], color=LINE_COLOURS[1], linewidth=1.2, label="as recorded")
    axis.set_xlabel("signal to noise (dB)")
    axis.set_ylabel(metric)
    axis.set_title(f"{results['task']['name']}: white noise added to the test clips", fontsize=10)
    axis.grid(color="#e4e6ea", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    row, metric = results["rows"][0], results["task"]["metric"]
    lines = [[metric, with_interval(row)]]
    lines += [[f"{metric}, {fold}", f"{score:.3f}"] for fold, score in row["folds"].items() if fold]
    lines += [[f"{metric}, deviation over seeds", f"{row['std']:.3f}"]] if row["std"] is not None else []
    lines += [[name, f"{value:.3f}"] for name, value in row["numbers"].items() if name != metric]
    lines += [[f"{metric} at {snr_db} dB", f"{score:.3f}"] for snr_db, score in results.get("noise", {}).items()]
    lines += [[f"published, {name}", str(score)] for name, score in results["task"]["published"].items()]
    return ["test clips", "score"], lines


def _markdown(results: Mapping[str, Any]) -> str:
    task, row = results["task"], results["rows"][0]
    title = f"## {task['name']}: {row['source']}, {row['head']}; {task['test_clips']} test clips"
    return "\n".join([title, "", *markdown_table(*_table(results))]) + "\n"


def _numbers_text(summary: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "value"])
    writer.writerows([("score", summary["score"]), ("low", summary["low"]), ("high", summary["high"])])
    writer.writerows([(f"score_{fold}", score) for fold, score in summary["folds"].items() if fold])
    writer.writerows(summary["numbers"].items())
    return text.getvalue()


def _show(results: Mapping[str, Any], run_dir: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    titles, lines = _table(results)
    task, row = results["task"], results["rows"][0]
    table = Table()
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for line in lines:
        table.add_row(*map(escape, line))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(f"{task['name']}: {row['source']}, {row['head']}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"everything in {run_dir}", markup=False, highlight=False, soft_wrap=True)
