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
from contextlib import nullcontext

import torch
import yaml
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.features.classifier import LinearHead, pool_tokens
from audiossl.features.levels import LevelReader, Levels, free_length
from audiossl.pretrained import PretrainedEncoder
from benchmarks import ROOT
from benchmarks.common import CLOCKS, Report, Spread, Turns, parser_of, prepared, progress, take_turns

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


def compare(size: str, window_ms: int, at_once: int, arguments: argparse.Namespace, bar: tqdm) -> dict[str, Turns]:
    """Let both ways take turns at the same audio, counted in moments."""
    device = arguments.device
    model = passt(size).to(device).eval()
    reader = LevelReader(model, Levels((window_ms,)), "all", batch_seconds=at_once * window_ms / 1000).to(device)
    moments = 16 if size == "base" and device == "cpu" else 64  # alone, each takes the same time
    moments = 4 if arguments.quick else moments
    audio = torch.randn(1, max(at_once, moments) * HOP - 1, device=device) * 0.1
    few = audio[:, : moments * HOP - 1]
    half = torch.autocast(device, torch.bfloat16) if arguments.bfloat16 else nullcontext()

    def batched() -> int:
        with half:
            return reader.moments(audio)[0].shape[1]

    ways = {"alone": lambda: one_at_a_time(model, few, window_ms * RATE // 1000).shape[1], "batched": batched}
    return take_turns(ways, rounds=arguments.rounds, device=device, bar=bar)


def picture_of(axes: Axes, rows: list[dict], clock: str) -> None:
    """Draw the ratio against the windows that go through at once; bars from the lowest to the highest turn."""
    lines = dict.fromkeys((row["size"], row["window_ms"]) for row in rows)
    for size, window_ms in lines:
        mine = [row for row in rows if (row["size"], row["window_ms"]) == (size, window_ms)]
        ratios = [row[f"ratio_{clock}"] for row in mine]
        middle = [ratio.median for ratio in ratios]
        ends = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        at_once = [row["windows_at_once"] for row in mine]
        axes.errorbar(at_once, middle, ends, marker="o", ms=4, capsize=3, label=f"{size}, {window_ms} ms")
    axes.axhline(1, color="0.6", linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["windows_at_once"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0)
    axes.set(xlabel="windows at once", ylabel="times as fast as one at a time")
    axes.legend(frameon=False, title="PaSST, window")


def main(argv: list[str] | None = None) -> None:
    """Compare the two ways, case by case."""
    parser = parser_of("embed", __doc__)
    parser.add_argument("--sizes", nargs="+", default=["base", "tiny"], help="of conf/size; PaSST's is base")
    parser.add_argument("--windows-ms", nargs="+", type=int, default=[160, 640])
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 4, 16, 64], help="windows")
    parser.add_argument("--bfloat16", action="store_true", help="batches in bfloat16, against float32 one at a time")
    arguments = prepared(parser, argv)
    if arguments.quick:
        arguments.sizes, arguments.windows_ms, arguments.at_once = ["tiny"], [160], [4]
    cases = [(s, w, n) for s in arguments.sizes for w in arguments.windows_ms for n in arguments.at_once]
    columns = {"size": 6, "window": 8, "at once": 8, "alone, ms": 22, "batched, ms": 22}
    report = Report(arguments, columns | {"ratio": 18, "by CPU time": 18})
    report.write(bfloat16=arguments.bfloat16)
    with progress(2 * len(cases) * (arguments.rounds + 1)) as bar:
        for size, window_ms, at_once in cases:
            turns = compare(size, window_ms, at_once, arguments, bar)
            ratios = {clock: turns["batched"].times_as_fast_as(turns["alone"], clock) for clock in CLOCKS}
            cells = [size, f"{window_ms} ms", at_once, *(f"{milliseconds(turns[way]):.2f}" for way in turns)]
            facts = dict(size=size, window_ms=window_ms, windows_at_once=at_once)
            facts |= {f"{way}_{clock}_ms": milliseconds(turns[way], clock) for way in turns for clock in CLOCKS}
            facts |= {f"ratio_{clock}": ratio for clock, ratio in ratios.items()}
            report.row([*cells, *(f"{ratio:.1f}" for ratio in ratios.values())], **facts)
    clock = "cpu" if arguments.device == "cpu" else "wall"
    report.draw(lambda figure: picture_of(figure.subplots(), report.rows, clock))


def milliseconds(turns: Turns, clock: str = "wall") -> Spread:
    """Say what a moment takes."""
    return Spread.of(1e3 * taken for taken in getattr(turns, clock))


if __name__ == "__main__":
    main()
