"""What does one GPU machine without a network do? `python -m benchmarks.on_gpu --minutes 9 --out DIR`.

Runs the benchmarks one after the other, the most important first, each in a process of its own that is ended when its
time is up; what it had found by then stays in its json. After each, SUMMARY.md is written anew: a table of the training
steps for the README (clips/s, MFU, memory, hours for AudioSet's 2,084,320 clips times 32 epochs), then each benchmark's
own output. `--dry-run` does the same on a CPU at tiny sizes. `--wheels` prints what such a machine must be brought, at
the versions of constraints.txt, beyond torch, torchaudio, lightning, timm and what those need (antlr4 comes as source
alone: `pip wheel` makes one); --compile needs a C compiler for Triton too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT

AUDIOSET_CLIPS, EPOCHS = 2_084_320, 32
WHEELS = {  # distribution: the module that shows whether it is there
    **{name: name for name in ("omegaconf", "soundfile", "cffi", "pycparser", "soxr", "einops", "matplotlib", "rich")},
    **{name: name for name in ("contourpy", "cycler", "kiwisolver", "pyparsing", "six", "mdurl")},
    **{"hydra-core": "hydra", "antlr4-python3-runtime": "antlr4", "fonttools": "fontTools", "Pygments": "pygments"},
    **{"python-dateutil": "dateutil", "markdown-it-py": "markdown_it"},
}


@dataclass(frozen=True)
class Job:
    """Name a benchmark, its options on a GPU, and how many minutes it may take at most."""

    name: str
    options: tuple[str, ...]
    minutes: float
    on_device: bool = True
    part: str | None = None  # of benchmarks.step

    @property
    def title(self) -> str:
        return self.part or self.name


JOBS = (
    Job("step", ("--batch", "128", "--compile"), 4, part="step"),
    Job("step", ("--batch", "64"), 1, part="patchout"),
    Job("frontend", (), 0.7),
    Job("embed", ("--sizes", "base", "--windows-ms", "160", "--at-once", "64", "256"), 1),
    Job("loader", ("--clips", "100", "--rounds", "3"), 2, on_device=False),
    Job("probing", ("--size", "base"), 1),
    Job("scale", (), 1, on_device=False),
)


def pinned() -> dict[str, str]:
    """Read the versions of `WHEELS` off constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    return {name: versions[name] for name in WHEELS}


def missing() -> list[str]:
    """Name the distributions that have to be brought and are not here."""
    return [name for name, module in WHEELS.items() if importlib.util.find_spec(module) is None]


def run(job: Job, arguments: argparse.Namespace, seconds: float) -> str:
    """Run a benchmark for at most so long; returns how it ended."""
    command = [sys.executable, "-m", f"benchmarks.{job.name}", "--out", str(arguments.out / job.title)]
    command += ["--parts", job.part] if job.part else []
    command += ["--device", arguments.device] if job.on_device else []
    command += ["--quick"] if arguments.dry_run else job.options
    with open(arguments.out / f"{job.title}.txt", "w") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
    return "done" if done.returncode == 0 else f"failed with {done.returncode}, see {job.title}.txt"


def steps_table(out: Path) -> list[str]:
    """Make the README's table of the steps that were measured; nothing where there are none."""
    path = out / "step" / "step.json"
    found = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    lines = []
    for row in [row for row in found["rows"] if row["part"] == "step"]:
        (rate, *_), memory = row["rate"], row["memory"]
        hours, held = AUDIOSET_CLIPS * EPOCHS / rate / 3600, "-" if memory is None else f"{memory / 1e9:.1f}"
        cells = [row["method"], f"{rate:.{0 if rate >= 100 else 2}f}", f"{row['flops'] / 1e9:.4g}", f"{row['mfu']:.0%}"]
        lines.append("| " + " | ".join([*cells, held, f"{hours:,.{0 if hours >= 100 else 1}f}"]) + " |")
    head = ["| step | clips/s | GFLOP | MFU | memory, GB | hours of AS-2M x 32 epochs |", "|---|---|---|---|---|---|"]
    about = ["Small models on a CPU: these figures show nothing but that it runs.", ""] if found.get("quick") else []
    return [*about, *head, *lines, ""] if lines else []


def write_summary(out: Path, ended: dict[str, str]) -> str:
    """Write SUMMARY.md: when and on which machine, the table of steps, and what each benchmark printed."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*/*.json"))]
    facts = found[0] if found else {}
    keys = ("date", "device", "cpu", "cores", "torch", "commit")
    parts = ["# Benchmarks", "", ", ".join(f"{key} {facts[key]}" for key in keys if key in facts), ""]
    parts += [f"- {name}: {how}" for name, how in ended.items()] + ["", *steps_table(out)]
    for name in ended:
        log = out / f"{name}.txt"
        lines = log.read_text().replace("\r", "\n").splitlines() if log.is_file() else []
        shown = [line for line in lines if line.strip() and "%|" not in line]
        parts += [f"## {name}", "", "```", *shown, "```", ""]
    text = "\n".join(parts)
    (out / "SUMMARY.md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> int:
    """Run what there is time for; returns 1 where a benchmark failed, 2 where something has to be brought first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9, help="for everything (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench_on_gpu")
    parser.add_argument("--only", nargs="+", choices=[job.title for job in JOBS], help="some of them")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--wheels", action="store_true", help="print what has to be brought, and end")
    arguments = parser.parse_args(argv)
    if arguments.wheels:
        print("\n".join(f"{name}=={version}" for name, version in pinned().items()))
        return 0
    if away := missing():
        print(f"not installed: {' '.join(f'{name}=={pinned()[name]}' for name in away)}", file=sys.stderr)
        return 2
    arguments.out, arguments.device = arguments.out.resolve(), "cpu" if arguments.dry_run else "cuda"
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline, ended = time.monotonic() + 60 * arguments.minutes, {}
    for job in [job for job in JOBS if arguments.only is None or job.title in arguments.only]:
        left = deadline - time.monotonic() - 5
        if importlib.util.find_spec(f"benchmarks.{job.name}") is None:
            ended[job.title] = "not in this checkout"
        elif left < 10:
            ended[job.title] = "no time left"
        else:
            ended[job.title] = run(job, arguments, min(left, 60 * job.minutes))
        print(f"{job.title}: {ended[job.title]}", flush=True)
        write_summary(arguments.out, ended)
    print(f"\n{write_summary(arguments.out, ended)}\n{arguments.out}/SUMMARY.md")
    return int(any(how.startswith("failed") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
