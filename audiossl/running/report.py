"""What does a run tell its reader before and after?"""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from audiossl.plots import loss_figure
from audiossl.probes.intraining import ProbeCallback
from audiossl.reconstruct import write_reconstructions
from audiossl.running.classscores import ClassScores
from audiossl.weights.export import export_encoder


def sizes_of(method: nn.Module) -> dict[str, int | None]:
    """Count a method's trained parameters, its encoder's, and the tokens of a clip where it says so."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in method.encoder.parameters())
    tokens = getattr(method, "tokens_per_clip", None)
    return {"parameters": trained, "encoder_parameters": encoder, "tokens": tokens}


def announce(log: logging.Logger, method: nn.Module, data, layout, max_steps: int, global_batch: int, run_dir) -> None:
    """Log size, data and length of the run, and whether it learns from labels, a line each."""
    model = type(method).__name__
    sizes = sizes_of(method)
    log.info(
        "%s: %.1f M parameters to train (encoder %.1f M), %s tokens a clip",
        model,
        sizes["parameters"] / 1e6,
        sizes["encoder_parameters"] / 1e6,
        sizes["tokens"] or "?",
    )
    if getattr(method, "needs_labels", False) and type(method).__module__.startswith("audiossl.methods"):
        log.warning("%s LEARNS FROM LABELS: compare it with methods that do, not with self-supervised ones", model)
    log.info(
        "%d clips (%.2f h)%s; %d steps x %d clips = %.1f epochs%s%s; everything goes to %s",
        data.num_clips,
        data.hours,
        f", {data.num_validation_clips} to validate on" if data.num_validation_clips else "",
        max_steps,
        global_batch,
        max_steps * global_batch / data.clips_per_epoch,
        data.describe_epoch(),
        f"; {layout.note}" if layout.note else "",
        run_dir,
    )


def finish(
    method: nn.Module,
    averages: dict[str, nn.Module],
    config: dict[str, Any],
    run_dir: Path,
    clips: list,
    probe: ProbeCallback | None,
    step: int,
    classes: list[ClassScores],
    vocabulary: list[str] | None,
) -> dict[str, Any]:
    """Export the encoder, and those of averages of it; draw pictures and sound, print the closing tables.

    Returns what goes into `results.json`.
    """
    about = dict(vocabulary=vocabulary, provenance=json.loads((run_dir / "provenance.json").read_text()))
    about["provenance"]["steps"] = step
    for name, exported in {"encoder": method, **{f"encoder_{name}": m for name, m in averages.items()}}.items():
        export_encoder(exported, config, run_dir / f"{name}.safetensors", **about)
    if clips and hasattr(method, "reconstruct"):
        write_reconstructions(method, clips, run_dir, seed=config["seed"])
    steps, loss, validation = read_losses(run_dir / "metrics.csv")
    loss_figure(steps, loss, validation, run_dir / "loss.png")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(_files_table(run_dir))
    results = {"model": sizes_of(method)}
    results |= {"loss": loss[-1] if loss else None, "val_loss": validation[-1][1] if validation else None}
    for scores in classes:
        console.print(scores.table())
        results |= scores.results()
    if probe is None:
        return results
    probe.complete(method, step)
    console.print(_scores_table(probe.table()))
    history = {str(step): scores for step, scores in probe.history.items()}
    scores = probe.history[max(probe.history)] | results.get("scores", {})
    return results | {"scores": scores, "history": history, "baseline": probe.baseline}


def reconcile(log: logging.Logger, results: dict[str, Any]) -> None:
    """Say in one line what became of every clip of the index; the numbers add up."""
    clips, visits = results["clips"], results["visits"]
    parts = [f"{number} {name.replace('_', ' ')}" for name, number in list(clips.items())[1:-1] if number]
    listed = " (listed in bad_clips*.csv)" if clips["skipped"] or clips["lost"] or clips["held_out_unreadable"] else ""
    asked = visits["trained"] + visits["skipped"]
    log.info(
        "%d clips in the index = %s%s; %d crops = %d trained + %d skipped",
        clips["in_the_index"],
        " + ".join(parts),
        listed,
        asked,
        visits["trained"],
        visits["skipped"],
    )


def read_losses(path: Path) -> tuple[list[int], list[float], list[tuple[int, float]]]:
    """Read steps, training loss and (step, validation loss) pairs from a `metrics.csv`."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [(int(r["step"]), float(r["loss"])) for r in rows if r.get("loss")]
    validated = [(int(r["step"]), float(r["val_loss"])) for r in rows if r.get("val_loss")]
    return [s for s, _ in trained], [x for _, x in trained], validated


FILES = (
    ("checkpoints/last.ckpt", "the whole training state; ckpt=last goes on from here"),
    ("encoder.safetensors", "the encoder, and its head if it has one, for audiossl.load(); encoder.json describes it"),
    ("encoder_swa.safetensors", "the same with weights averaged over training (swa.start)"),
    ("reconstruction.png", "original, masked, reconstructed"),
    ("reconstruction.wav", "original, then reconstruction (Griffin-Lim)"),
    ("loss.png", "training and validation loss"),
    ("per_class.csv", "how well each class is known: clips, AP, AUC, d'"),
    ("metrics.csv", "every number of the run"),
    ("config.yaml", "the resolved settings; provenance.json: versions, commit, corpus"),
)


def _files_table(run_dir: Path) -> Table:
    table = Table(title=f"{run_dir}/", title_justify="left")
    table.add_column("file")
    table.add_column("MB", justify="right")
    table.add_column("what it is")
    for name, what in FILES:
        if (run_dir / name).exists():
            files = [run_dir / name, *(run_dir / name).rglob("*")]  # of many ranks it is a folder
            num_bytes = sum(path.stat().st_size for path in files if path.is_file())
            table.add_row(name, f"{num_bytes / 1e6:.2f}", what)
    return table


def _scores_table(scores: dict[str, Any]) -> Table:
    table = Table(title=f"frozen features, {scores['task']}: accuracy (95 % interval)", title_justify="left")
    for column in ("features", "kNN", "linear", *(f"linear, fold {f}" for f in scores["folds"])):
        table.add_column(column, justify="left" if column == "features" else "right")
    for row in scores["rows"]:
        table.add_row(row["name"], *row["cells"])
    return table
