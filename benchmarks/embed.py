"""How much faster are PaSST's timestamp embeddings in batches than one window at a time, as its authors' code has them?

`python -m benchmarks.embed [--device cuda]`. Both ways take turns on the same audio in the same process, so that a busy
machine slows both: the ratio is the median of the turns, with the lowest and the highest. On a CPU that others use,
CPU seconds tell more than the clock. --bfloat16 computes the batches in another precision, so its numbers are not the
same, against float32 one at a time. Writes embed.json and embed.png to --out.

Seen on an AMD EPYC (AVX-512), windows of 160 ms, 64 at once: base is 2.3 times as fast on one shared core (CPU time),
2.8 times on two free ones, tiny 3.2 and 3.7, base in bfloat16 6.4; of 640 ms 1.2 to 1.8. On a CPU, batches are bound by
arithmetic: nine tenths of base's time are matrix products, at the 100 GFLOP/s that PyTorch's float32 reaches on a core,
and no batch makes them fewer. Ten times as fast needs a device that one window cannot keep busy; that is not measured
yet. With more threads than free cores the windows alone wait for their threads, and the ratio flatters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.features.classifier import LinearHead, pool_tokens
from audiossl.features.levels import LevelReader, Levels, free_length
from audiossl.pretrained import PretrainedEncoder
from benchmarks import ROOT
from benchmarks.common import machine_of, parser_of, prepared, write_json

RATE, HOP = 32_000, 1600


def passt(size: str) -> PretrainedEncoder:
    """Build a PaSST of a size in conf/size, with random weights, 527 classes and patches every 10 cells."""
    sizes = yaml.safe_load((ROOT / "conf" / "size" / f"{size}.yaml").read_text())
    frontend = instantiate(yaml.safe_load((ROOT / "conf" / "frontend" / "passt_mel.yaml").read_text()))
    places = dict(num_mels=128, frames=998, patch=(16, 16), stride=(10, 10), positions="time+frequency")
    encoder = Encoder(**places, **sizes, mlp_ratio=4.0, drop_path=0.0, num_class_tokens=2)
    return PretrainedEncoder(encoder, frontend, LinearHead(sizes["width"], 527, pooling="class", norm="layer"), {})


def one_at_a_time(model: PretrainedEncoder, audio: Tensor, window: int) -> Tensor:
    """Describe (1, S) as the published wrapper does: every window for itself through mel, encoder and classifier."""
    frontend = free_length(model.frontend)
    padded = functional.pad(audio[:, None], (window // 2, window // 2), mode="reflect")[:, None]
    described = []
    with torch.no_grad():
        for piece in functional.unfold(padded, (1, window), stride=(1, HOP)).permute(2, 0, 1):
            features = pool_tokens(model.tokens(frontend(piece)), "class", 2)
            described.append(torch.cat([model.head(features), features], dim=1))
    return torch.stack(described, dim=1)


def timed(work: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Take the seconds of the clock and of the CPU, a moment each."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = work().shape[1]
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def compare(size: str, window_ms: int, at_once: int, arguments: argparse.Namespace, bar: tqdm) -> dict:
    """Let both ways take turns; say what a moment takes and how the ratios spread."""
    device, rounds = arguments.device, arguments.rounds
    model = passt(size).to(device).eval()
    reader = LevelReader(model, Levels((window_ms,)), "all", batch_seconds=at_once * window_ms / 1000).to(device)
    moments = 16 if size == "base" and device == "cpu" else 64  # alone, each takes the same time
    moments = 4 if arguments.quick else moments
    audio = torch.randn(1, max(at_once, moments) * HOP - 1, device=device) * 0.1
    few = audio[:, : moments * HOP - 1]
    half = torch.autocast(device, torch.bfloat16) if arguments.bfloat16 else nullcontext()

    def batched() -> Tensor:
        with half:
            return reader.moments(audio)[0]

    ways = {"alone": lambda: one_at_a_time(model, few, window_ms * RATE // 1000), "batched": batched}
    turns = []
    for turn in range(rounds + 1):
        taken = {name: timed(way, device) for name, way in ways.items()}
        turns += [taken] if turn else []  # the first is for warming up
        bar.update()
    found = dict(size=size, window_ms=window_ms, windows_at_once=at_once)
    for number, clock in enumerate(("wall", "cpu")):
        found |= {f"{way}_{clock}_ms": 1e3 * statistics.median(t[way][number] for t in turns) for way in ways}
        ratios = [t["alone"][number] / t["batched"][number] for t in turns]
        found[f"ratio_{clock}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def picture_of(found: list[dict], clock: str, path: Path) -> None:
    """Draw the ratio against the windows that go through at once; bars from the lowest to the highest turn."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = list(dict.fromkeys((row["size"], row["window_ms"]) for row in found))
    for colour, (size, window_ms) in enumerate(lines):
        rows = [row for row in found if (row["size"], row["window_ms"]) == (size, window_ms)]
        middle, low, high = zip(*(row[f"ratio_{clock}"] for row in rows), strict=True)
        below, above = ([abs(m - e) for m, e in zip(middle, ends, strict=True)] for ends in (low, high))
        at_once, name = [row["windows_at_once"] for row in rows], f"{size}, {window_ms} ms"
        axes.errorbar(at_once, middle, (below, above), marker="o", ms=4, capsize=3, color=f"C{colour}", label=name)
    axes.axhline(1, color="0.6", linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["windows_at_once"] for row in found})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0)
    axes.set_xlabel("windows at once")
    axes.set_ylabel("times as fast as one at a time")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="PaSST, window")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    """Compare the two ways, case by case."""
    parser = parser_of("embed", __doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", default=["base", "tiny"], help="of conf/size; PaSST's is base")
    parser.add_argument("--windows-ms", nargs="+", type=int, default=[160, 640])
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 4, 16, 64], help="windows")
    parser.add_argument("--bfloat16", action="store_true", help="batches in bfloat16, against float32 one at a time")
    arguments = prepared(parser, argv)
    if arguments.quick:
        arguments.sizes, arguments.windows_ms, arguments.at_once = ["tiny"], [160], [4]
    cases = [(s, w, n) for s in arguments.sizes for w in arguments.windows_ms for n in arguments.at_once]
    found, clock = [], "wall" if arguments.device == "cuda" else "cpu"
    print("size   window  at once   alone, ms   batched, ms   ratio (lowest .. highest)   by CPU time")
    with tqdm(total=len(cases) * (arguments.rounds + 1), unit="turn", leave=False) as bar:
        for case in cases:
            row = compare(*case, arguments, bar)
            wall, cpu = (
                "{:5.1f} ({:.1f} .. {:.1f})".format(*row[f"ratio_{clock}"]).ljust(28) for clock in ("wall", "cpu")
            )
            times = f"{row['alone_wall_ms']:10.2f}{row['batched_wall_ms']:14.2f}"
            tqdm.write(f"{case[0]:6}{case[1]:5} ms{case[2]:8}  {times}   {wall}{cpu}", file=sys.stdout)
            found.append(row)
            said = machine_of(arguments) | dict(bfloat16=arguments.bfloat16, rows=found)
            write_json(said, arguments.out / "embed.json")
    picture_of(found, clock, arguments.out / "embed.png")
    print(f"{arguments.out}/embed.json, embed.png")


if __name__ == "__main__":
    main()
