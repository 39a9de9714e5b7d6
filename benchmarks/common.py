"""How is a speed measured so that it can be held against another one?

Variants take turns in one process, after turns for warming up, so that a busy machine slows all alike; what counts is
the median of the turns with the lowest and the highest, and the ratio of two variants within the same turn. Seconds of
the clock and of the CPU stand beside each other: where neighbours use the machine, only the second are ours. Tables are
printed row by row and their json is written with each row, so a run that is killed leaves what it had found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from audiossl.running.provenance import git_commit
from benchmarks import ROOT

CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Spread:
    """Hold the median of some turns, the lowest and the highest; `f"{spread:.1f}"` words all three."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Take the median and the extremes of at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


@dataclass
class Turns:
    """Hold what one unit (a clip, a moment, a step) took of a variant's work, turn by turn, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def seconds(self, clock: str = "wall") -> Spread:
        """Say what a unit takes."""
        return Spread.of(getattr(self, clock))

    def rate(self, clock: str = "wall") -> Spread:
        """Say how many units a second are done."""
        return Spread.of(1 / taken for taken in getattr(self, clock))

    def times_as_fast_as(self, other: Turns, clock: str = "wall") -> Spread:
        """Compare turn by turn with a variant that took turns with this one."""
        pairs = zip(getattr(other, clock), getattr(self, clock), strict=True)
        return Spread.of(theirs / ours for theirs, ours in pairs)


def take_turns(
    variants: Mapping[str, Callable[[], float | None]],
    *,
    rounds: int,
    device: str = "cpu",
    warm_up: int = 1,
    bar: tqdm | None = None,
) -> dict[str, Turns]:
    """Let the variants take turns; each call does a variant's work and returns how many units that was (None: 1).

    The first `warm_up` rounds do not count. Each round begins with another variant. Seconds of the CPU are those of
    this process: what others do for it has to be added (`cpu_seconds_of`). `bar` is advanced by one each call.
    """
    names, found = list(variants), {name: Turns() for name in variants}
    for turn in range(-warm_up, rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            count = variants[name]()
            synchronize(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 0:
                found[name].wall.append(wall / (count or 1))
                found[name].cpu.append(max(cpu, 1e-9) / (count or 1))
            if bar is not None:
                bar.update()
    return found


def cpu_seconds_of(pids: Iterable[int]) -> float:
    """Read how much of the CPU other processes, such as a loader's workers, have had; they must be alive."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def device_name(device: str = "cpu") -> str:
    """Name the processor that is measured."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def peak_memory_bytes(device: str) -> int:
    """Give the most memory of the device since `forget_peak_memory`; of a CPU, that of the process since its start."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()  # rusage counts the parent's too
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak_memory(device: str) -> None:
    """Begin to watch the device's memory anew; nothing to be done on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def matmul_flops(device: str, dtype: torch.dtype, *, quick: bool = False) -> float:
    """Measure the FLOP/s of a large product of square matrices (8192, on a CPU 1024, quick 256): median of ten.

    Of random numbers: zeros run faster. This is the peak that shares (MFU) are of.
    """
    size = 256 if quick else 8192 if device.startswith("cuda") else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    turns = take_turns({"product": lambda: (left @ right) is None}, rounds=10, device=device, warm_up=3)
    return 2 * size**3 / turns["product"].seconds().median


def parser_of(name: str, doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """Make the command line that all benchmarks share; `defaults` change it (rounds=..., device=...)."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = ROOT / "runs" / f"bench_{name}"
    parser.add_argument("--out", type=Path, default=out, help=f"where {name}.json and .png go (runs/bench_{name})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="seconds, at sizes that show nothing but that it runs")
    parser.set_defaults(name=name, **defaults)
    return parser


def prepared(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and set threads and folder accordingly; --quick takes two rounds."""
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch sees no GPU here")
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 2)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.command = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    return arguments


class Report:
    """Print a table row by row, and keep its rows in NAME.json in `arguments.out` as they come.

    `columns` map the title of each column to its width; a longer title widens it. Cells are text; `facts` of a row are
    plain values (and `Spread`s) for the json alone. Where there are several tables (`table`), the rows of all are in
    the one json, and `part` says whose each is.
    """

    def __init__(self, arguments: argparse.Namespace, columns: Mapping[str, int] | None = None):
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.found = machine_of(arguments)
        if columns is not None:
            self.table(columns)

    def table(self, columns: Mapping[str, int], title: str | None = None, part: str | None = None) -> None:
        """Begin a table; what follows goes into it."""
        self.widths = [max(width, len(name)) for name, width in columns.items()]
        self.columns, self.part = list(columns), {} if part is None else {"part": part}
        self.cells: list[list[str]] = []
        if title:
            say(f"\n{title}" if self.rows else title)
        say(self._line(self.columns))

    def row(self, cells: Iterable[Any], **facts: Any) -> None:
        """Print a row, and write all so far."""
        self.cells.append([str(cell) for cell in cells])
        assert len(self.cells[-1]) == len(self.columns)
        self.rows.append(self.part | facts)
        say(self._line(self.cells[-1]))
        self.write()

    def write(self, **facts: Any) -> None:
        """Write NAME.json: the machine, the command, further `facts` and the rows."""
        self.found |= facts
        self.found["rows"] = self.rows
        write_json(self.found, self.path("json"))

    def draw(self, picture: Callable[[Figure], None], size: tuple[float, float] = (7, 4.2)) -> None:
        """Let `picture` draw into a figure, write it to NAME.png and say where all lies."""
        figure = Figure(figsize=size, layout="constrained")
        picture(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(self.path("png"), dpi=130)
        say(f"{self.path('json')}, {self.path('png').name}")

    def markdown(self) -> str:
        """Give the last table in Markdown."""
        rows = [self.columns, ["---"] * len(self.columns), *self.cells]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

    def path(self, suffix: str) -> Path:
        """Name the file of a kind."""
        return self.arguments.out / f"{self.arguments.name}.{suffix}"

    def _line(self, cells: Iterable[str]) -> str:
        first, *others = zip(cells, self.widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def machine_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what was run, when, on which machine and of which commit."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "benchmark": arguments.name,
        "command": arguments.command,
        "date": now,
        "device": device_name(arguments.device),
        "cpu": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "quick": arguments.quick,
    }


def write_json(value: Any, path: Path) -> None:
    """Write JSON so that a reader never meets half of it; a `Spread` becomes [median, lowest, highest]."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, default=astuple) + "\n")
    part.replace(path)


def progress(total: int, unit: str = "turn", desc: str | None = None) -> tqdm:
    """Show a bar with a rate and the time that is left; it goes when it is full."""
    return tqdm(total=total, unit=unit, desc=desc, leave=False, mininterval=0.5, dynamic_ncols=True)


def say(text: str) -> None:
    """Print a line above the bar, if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
