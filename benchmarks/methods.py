"""What does each method learn from the same clips? `python -m benchmarks.methods --probe SHARDS`.

Trains every method by `python train.py model=...` on the demo audio for equally many clips, each from several seeds,
and prints parameters, tokens, FLOPs, clips/s and steps, and how a frozen encoder scores (kNN, linear) on labelled
shards with folds, beside the same encoder untrained and the statistics of the log-mel. Methods that learn from labels
have rows of their own: of the labelled clips they see fewer, more often. Writes methods.json, methods.md and
methods.png; a run that was stopped goes on where it was, and one that is finished is only read.

    python -m benchmarks.methods --probe demo/shards                             the demo's own 60 test clips
    python -m audiossl pack ESC10 --out esc10 --codec keep && python -m benchmarks.methods --probe esc10 --seeds 0 1
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import ROOT

NAMES = {
    "audiomae": "Audio-MAE",
    "atst_clip": "ATST-Clip",
    "atst_frame": "ATST-Frame",
    "atst_c2f": "ATST-C2F",
    "passt": "PaSST",
}
WITH_LABELS = ("atst_c2f", "passt")
HEADS = ("knn", "linear")


def train(method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Train one method from one seed, unless that is done; returns its folder."""
    folder = arguments.out / f"{method}_seed{seed}"
    if (folder / "results.json").exists():
        return folder
    steps = arguments.clips // arguments.batch
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"model={method}",
        f"seed={seed}",
        f"run_dir={folder}",
        "ckpt=last",
    ]
    command += [f"data.batch_size={arguments.batch}", f"trainer.max_steps={steps}", f"name={folder.name}"]
    command += [f"probe.shards={arguments.probe.resolve()}", f"probe.every_steps={max(steps // arguments.points, 1)}"]
    print(" ".join(command[1:]), flush=True)
    subprocess.run([*command, *arguments.overrides], check=True, cwd=ROOT)
    return folder


def read(folder: Path, probe: Path) -> dict:
    """Read what a run says of itself: its cost, its scores by step; and score it with the mean over tokens as well."""
    results = json.loads((folder / "results.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    history = {int(step): {head: scores[head] for head in HEADS} for step, scores in results["history"].items()}
    folds = {head: [v for k, v in results["scores"].items() if k.startswith(f"{head}_fold")] for head in HEADS}
    facts = dict(results["model"], steps=results["steps"], gflops=results["flops_per_clip"] / 1e9)
    speed = statistics.median([float(row["clips_per_second"]) for row in rows if row.get("clips_per_second")] or [0.0])
    baseline = {head: results["baseline"][head] for head in HEADS}
    found = dict(facts, clips_per_second=speed, history=history, folds=folds, baseline=baseline)
    return found | {"mean_pooled": score_means(folder, probe)}


def score_means(folder: Path, probe: Path) -> dict[str, dict[str, float]]:
    """Score the mean over patch tokens, untrained and trained; kept beside the run, since it takes half a minute."""
    kept = folder / "mean_pooled.json"
    if not kept.exists():
        import torch

        from audiossl.probes.intraining import Probe
        from audiossl.running.build import load_method, method_from_config

        trained, config = load_method(folder)
        scorer = Probe(**config["probe"] | {"shards": str(probe), "pooling": "mean"})
        torch.manual_seed(config["seed"])
        vocabulary = json.loads((folder / "encoder.json").read_text()).get("vocabulary")
        untrained = method_from_config(config, vocabulary=vocabulary)
        both = {"untrained": untrained, "trained": trained}
        scores = {name: scorer.run(method.encoder, method.frontend) for name, method in both.items()}
        kept.write_text(json.dumps({name: {head: of[head] for head in HEADS} for name, of in scores.items()}))
    return json.loads(kept.read_text())


def spread(values: list[float]) -> str:
    """Word several seeds' scores, or one's."""
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def row_of(method: str, runs: list[dict]) -> list[str]:
    """Put the runs of one method into a row of the table."""
    first, last = min(runs[0]["history"]), max(runs[0]["history"])
    cells = [f"{runs[0]['parameters'] / 1e6:.1f}", f"{runs[0]['encoder_parameters'] / 1e6:.1f}", str(runs[0]["tokens"])]
    cells += [f"{runs[0]['gflops']:.2f}", str(runs[0]["steps"])]
    cells.append(f"{statistics.median(run['clips_per_second'] for run in runs):.0f}")
    for head in HEADS:
        before, after = ([run["history"][step][head] for run in runs] for step in (first, last))
        folds = [fold for run in runs for fold in run["folds"][head]]
        cells.append(f"{spread(before)} → {spread(after)} ({min(folds):.2f}-{max(folds):.2f})")
    for head in HEADS:
        pair = ([run["mean_pooled"][when][head] for run in runs] for when in ("untrained", "trained"))
        cells.append(" → ".join(map(spread, pair)))
    return [NAMES.get(method, method) + (" (labels)" if method in WITH_LABELS else ""), *cells]


def table_of(found: dict[str, list[dict]]) -> str:
    """Write the table in Markdown, methods that learn from labels last."""
    head = ["method", "M trained", "M encoder", "tokens", "GFLOP a clip", "steps", "clips/s"]
    head += [f"{name}, {pooled}" for pooled in ("max (test folds)", "mean") for name in ("kNN", "linear")]
    baseline = next(iter(found.values()))[0]["baseline"]
    rows = [["log-mel statistics", *[""] * 6, *(f"{baseline[head]:.3f}" for head in HEADS), "", ""]]
    rows += [row_of(method, found[method]) for method in sorted(found, key=lambda method: method in WITH_LABELS)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def picture_of(found: dict[str, list[dict]], batch: int, path: Path) -> None:
    """Draw each head's score against the clips that were trained on: mean of the seeds, and their range."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, head, title in zip(figure.subplots(1, 2, sharey=True), HEADS, ("kNN", "linear"), strict=True):
        baseline = next(iter(found.values()))[0]["baseline"][head]
        axes.axhline(baseline, color="0.6", linestyle=":", label="log-mel statistics")
        for number, (method, runs) in enumerate(found.items()):
            steps = sorted(set.intersection(*(set(run["history"]) for run in runs)))
            scores = [[run["history"][step][head] for run in runs] for step in steps]
            clips, style = [step * batch / 1000 for step in steps], "--" if method in WITH_LABELS else "-"
            name = NAMES.get(method, method) + (" (labels)" if method in WITH_LABELS else "")
            axes.plot(
                clips, list(map(statistics.mean, scores)), style, color=f"C{number}", marker="o", ms=3, label=name
            )
            axes.fill_between(
                clips, list(map(min, scores)), list(map(max, scores)), color=f"C{number}", alpha=0.15, lw=0
            )
        axes.set_title(f"{title} on frozen features", loc="left", fontsize=10)
        axes.set_xlabel("thousand clips trained on")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", type=Path, default=ROOT / "demo" / "shards", help="labelled shards with folds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "methods", help="where runs and tables go")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), help="which, and in which order")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--clips", type=int, default=28_800, help="trained on by each (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="clips a step (%(default)s)")
    parser.add_argument("--points", type=int, default=6, help="scores along the way (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="settings for all of them, KEY=VALUE")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    folders = {m: [train(m, seed, arguments) for seed in arguments.seeds] for m in arguments.methods}
    found = {method: [read(folder, arguments.probe) for folder in seeds] for method, seeds in folders.items()}
    table = table_of(found)
    (arguments.out / "methods.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "methods.md").write_text(table)
    picture_of(found, arguments.batch, arguments.out / "methods.png")
    print(table)


if __name__ == "__main__":
    main()
