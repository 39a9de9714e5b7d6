"""How fast is a training step, and how near to what the arithmetic allows?

`python -m benchmarks.step` measures front end, network and optimiser of each method from waveforms that lie on the
device already, in turns with the same step done naively (on a CPU ours is float32 as well, so that `x fp32` is near 1);
counts the operations and the bytes kept a clip of the published models; and compares patchout, and the local decoder,
with what the operations promise. On a CPU the models that are timed are small (published lengths, fewer and narrower
blocks), on a GPU they are the published ones. Operations of attention's backward pass include the logits computed anew.

    python -m benchmarks.step                                        --quick: a minute or two
    python -m benchmarks.step --device cuda --compile --batch 128    the published sizes
    python -m benchmarks.step --parts patchout --hops 10             one part alone: step count patchout decoder
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from audiossl.parts import blocks
from audiossl.planning.memory import memory_of, remembered_bytes, sizes_of
from benchmarks.common import (
    Report,
    Spread,
    forget_peak_memory,
    matmul_flops,
    parser_of,
    peak_memory_bytes,
    prepared,
    progress,
    take_turns,
)
from benchmarks.recipes import EXPERIMENTS, Step, build, clip_cost, config_of

PEAK, MEMORY_GB = 788e12, 141.0  # of an H200 in bf16, as measured on one; of its memory
STATED = {"audiomae": 210, "atst_clip": 209, "atst_frame": 358, "passt": 266}  # GFLOP of training, as estimated before
SMALL = ["model.width=192", "model.num_heads=3", "model.depth=2"]
SMALL_DECODER = ["model.decoder_width=128", "model.decoder_num_heads=4", "model.decoder_depth=4"]
PATCHOUT = {"10": (40, 4, 2.86), "5": (100, 6, 5.4), "3.125": (150, 6, 5.7)}  # columns, rows, FLOP ratio stated
WITHOUT_PATCHOUT = ("model.patchout_time=0", "model.patchout_frequency=0")
NAIVE = ("fp32", "AMP", "unfused", "full")


def small_of(method: str, arguments) -> list[str]:
    """Choose the overrides for what is timed: none on a GPU."""
    if arguments.device != "cpu":
        return []
    return SMALL + (SMALL_DECODER if method == "audiomae" else [])


def clock_of(arguments) -> str:
    """Choose the seconds that ratios are of: where others use the machine's CPU, only its seconds are ours."""
    return "wall" if arguments.device != "cpu" else "cpu"


def whole_step(arguments, report: Report) -> None:
    """Time each method's step against the naive ones, and the peak of the device."""
    device, is_gpu = arguments.device, arguments.device != "cpu"
    peak = matmul_flops(device, torch.bfloat16 if is_gpu else torch.float32, quick=arguments.quick)
    columns = {"step": 12, "clips/s": 24, "GFLOP": 7, "MFU": 6} | {f"x {way}": 18 for way in NAIVE} | {"GB": 6}
    title = f"training steps of {arguments.batch} clips; peak {peak / 1e12:.3g} TFLOP/s of a matrix product"
    report.table(columns, title, "step")
    with progress(sum(4 + (name == "passt") for name in arguments.methods) * (arguments.rounds + 1), "step") as bar:
        for name in arguments.methods:
            config = config_of(name, *small_of(name, arguments))
            cost = clip_cost(build(config))
            forget_peak_memory(device)
            steps = {"ours": Step(config, arguments.batch, device, half=is_gpu, compile=arguments.compile)}
            for _ in range(2):  # the second has the optimiser's state
                steps["ours"]()
            memory = peak_memory_bytes(device) if is_gpu else None  # of a CPU it would be the process's
            steps |= naive_steps(name, config, arguments)
            turns = take_turns(steps, rounds=arguments.rounds, device=device, bar=bar)
            rate = turns["ours"].rate()
            ratios = {way: turns["ours"].times_as_fast_as(turns[way], clock_of(arguments)) for way in steps}
            mfu = rate.median * cost.flops_training / peak
            cells = [name, f"{rate:.2f}", f"{cost.flops_training / 1e9:.3g}", f"{mfu:.2f}"]
            cells += [f"{ratios[way]:.2f}" if way in ratios else "-" for way in NAIVE]
            cells += [f"{memory / 1e9:.2f}" if memory else "-"]
            flops = cost.flops_training
            report.row(cells, method=name, rate=rate, mfu=mfu, ratios=ratios, memory=memory, peak=peak, flops=flops)


def naive_steps(name: str, config: dict[str, Any], arguments) -> dict[str, Step]:
    """Build the steps that ours takes turns with: eager, in float32, in bf16, with the whole matrix of attention.

    PaSST's `full` is without patchout.
    """
    is_gpu = arguments.device != "cpu"
    ways: dict[str, dict[str, Any]] = {"fp32": {}, "AMP": dict(half=True)}
    ways["unfused"] = dict(half=is_gpu, naive_attention=True)
    steps = {way: Step(config, arguments.batch, arguments.device, **how) for way, how in ways.items()}
    if name == "passt":
        full = config_of(name, *small_of(name, arguments), *WITHOUT_PATCHOUT)
        steps["full"] = Step(full, arguments.batch, arguments.device, half=is_gpu)
    return steps


def count(arguments, report: Report) -> None:
    """Count operations and kept bytes of the published models, and what batch fits."""
    columns = {"model": 16, "size": 6, "forward": 8, "training": 9, "stated": 7, "clips/s at most": 16}
    columns |= {"MB a clip": 10, "checkpointed": 13, "largest batch": 14}
    title = f"GFLOP a clip, and what fits {MEMORY_GB:g} GB in bf16 (peak {PEAK / 1e12:g} TFLOP/s)"
    report.table(columns, title, "count")
    for name in arguments.methods:
        for size in arguments.sizes:
            config = config_of(name, *(small_of(name, arguments) if arguments.quick else [f"size={size}"]))
            method = build(config)
            costs = [clip_cost(method, torch.bfloat16)]
            blocks.checkpoint_blocks(method)
            costs.append(clip_cost(method, torch.bfloat16))
            how = dict(devices=1, optim=config["optim"], strategy="auto", is_half=True)
            how |= dict(remembered_bytes=remembered_bytes(method))
            each, largest = [], []
            for cost in costs:
                fixed = sum(memory_of(sizes_of(method), cost, batch_size=0, **how).values())
                each.append(cost.saved_bytes + cost.recomputed_bytes)
                largest.append(int((MEMORY_GB * 1e9 - fixed) // each[-1]))
            size = "small" if arguments.quick else size
            cells = [name, size, f"{costs[0].flops_forward / 1e9:.1f}", f"{costs[0].flops_training / 1e9:.1f}"]
            cells += [STATED[name] if size == "base" else "-", f"{PEAK / costs[0].flops_training:.0f}"]
            cells += [f"{each[0] / 1e6:.1f}", f"{each[1] / 1e6:.1f}", " / ".join(map(str, largest))]
            found = dict(cost=vars(costs[0]), checkpointed=vars(costs[1]), bytes_a_clip=each, largest=largest)
            report.row(cells, method=name, size=size, **found)


def patchout(arguments, report: Report) -> None:
    """Hold the time that patchout saves against the operations it saves, on fused attention and on unfused."""
    columns = {"hop, ms": 8, "tokens": 12, "FLOP ratio": 11, "stated": 7, "time ratio": 20, "share": 6, "unfused": 20}
    report.table(columns, "PaSST: a step without patchout against one with it", "patchout")
    sizes = [f"model.depth={arguments.depth}"] if arguments.device == "cpu" else []
    sizes += ["model.depth=1", "model.width=192", "model.num_heads=3"] if arguments.quick else []
    for hop in arguments.hops:
        time_columns, rows, stated = PATCHOUT[hop]
        given = [*sizes, f"frontend.hop_ms={hop}"]
        kept = [f"model.patchout_time={time_columns}", f"model.patchout_frequency={rows}"]
        configs = {"kept": config_of("passt", *given, *kept), "all": config_of("passt", *given, *WITHOUT_PATCHOUT)}
        costs = {way: clip_cost(build(config)) for way, config in configs.items()}
        found = {}
        for naive in (False, True):
            how = dict(half=arguments.device != "cpu", compile=arguments.compile and not naive, naive_attention=naive)
            found[naive] = compared("all", "kept", configs, arguments, **how)
        flops = costs["all"].flops_training / costs["kept"].flops_training
        tokens = " / ".join(str(sum(cost.encoded.values())) for cost in costs.values())
        share = found[False].median / flops
        shown = "-" if arguments.quick else stated
        row = [hop, tokens, f"{flops:.2f}", shown, f"{found[False]:.2f}", f"{share:.0%}", f"{found[True]:.2f}"]
        report.row(row, hop=hop, flops=flops, stated=stated, fused=found[False], unfused=found[True], share=share)


def compared(slow: str, fast: str, configs: dict[str, Any], arguments, **how: Any) -> Spread:
    """Let steps of two configs take turns: how many times as fast one is as the other."""
    steps = {way: Step(configs[way], arguments.batch, arguments.device, **how) for way in (slow, fast)}
    turns = take_turns(steps, rounds=arguments.rounds, device=arguments.device)
    return turns[fast].times_as_fast_as(turns[slow], clock_of(arguments))


def decoder(arguments, report: Report) -> None:
    """Compare Audio-MAE's local decoder with the global one at equal depth."""
    columns = {"depth": 6, "local GFLOP": 12, "global GFLOP": 12, "FLOP ratio": 11, "time ratio": 20, "share": 6}
    report.table(columns, "Audio-MAE's step: global decoder against local at equal depth", "decoder")
    for depth in (2, 4) if arguments.device == "cpu" else (8, 16):
        shallow = ["model.depth=1"] if arguments.device == "cpu" else []  # of the published width
        sizes = small_of("audiomae", arguments) if arguments.quick else shallow
        given = [*sizes, f"model.decoder_depth={depth}"]
        configs = {kind: config_of("audiomae", *given, f"model.decoder={kind}") for kind in ("local", "global")}
        flops = {kind: clip_cost(build(config)).flops_training for kind, config in configs.items()}
        how = dict(half=arguments.device != "cpu", compile=arguments.compile)
        times = compared("global", "local", configs, arguments, **how)
        ratio = flops["global"] / flops["local"]
        cells = [depth, f"{flops['local'] / 1e9:.3g}", f"{flops['global'] / 1e9:.3g}", f"{ratio:.2f}", f"{times:.2f}"]
        report.row([*cells, f"{times.median / ratio:.0%}"], depth=depth, gflops=flops, flops=ratio, fused=times)


def draw_steps(rows: list[dict], axes: Axes) -> None:
    """Draw how many times as fast as each naive way ours is, method by method."""
    for number, way in enumerate(NAIVE):
        shown = [(place, row["ratios"][way]) for place, row in enumerate(rows) if way in row["ratios"]]
        draw_bars(axes, [(place + (number - 1.5) * 0.2, ratio) for place, ratio in shown], way, number)
    axes.axhline(1, color="0.5", lw=0.8)
    names = [f"{row['method']}\n{row['rate'].median:.3g} clips/s\nMFU {row['mfu']:.2f}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set(ylabel="times as fast", title="our step against")


def draw_counts(rows: list[dict], axes: Axes) -> None:
    """Draw what a clip keeps for the backward pass, without and with checkpointing."""
    for number, name in enumerate(("kept", "checkpointed")):
        sizes = [row["bytes_a_clip"][number] / 1e6 for row in rows]
        axes.bar([place + (number - 0.5) * 0.4 for place in range(len(rows))], sizes, 0.38, label=name)
    axes.set_xticks(range(len(rows)), [f"{row['method']}\n{row['size']}" for row in rows], fontsize=7)
    axes.set(ylabel="MB a clip, bf16", title="activations")


def draw_ratios(label: str, key: str, title: str, rows: list[dict], axes: Axes) -> None:
    """Draw what is saved in operations and in time."""
    ways = {"flops": "FLOPs", "fused": "time", "unfused": "time, unfused attention"}
    ways = {name: shown for name, shown in ways.items() if name in rows[0]}
    for number, (name, shown) in enumerate(ways.items()):
        values = [row[name] if isinstance(row[name], Spread) else Spread.of([row[name]]) for row in rows]
        places = [place + (number - (len(ways) - 1) / 2) * 0.25 for place in range(len(rows))]
        draw_bars(axes, list(zip(places, values, strict=True)), shown, number, 0.24)
    axes.set_xticks(range(len(rows)), [str(row[key]) for row in rows])
    axes.set(xlabel=label, ylabel="ratio", title=title)


def draw_bars(axes: Axes, shown: list[tuple[float, Spread]], label: str, number: int, width: float = 0.19) -> None:
    """Draw bars of medians with the lowest and the highest."""
    places, values = [place for place, _ in shown], [value for _, value in shown]
    ends = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
    heights = [v.median for v in values]
    axes.bar(places, heights, width, yerr=ends if shown else None, label=label, color=f"C{number}", capsize=2)


PARTS = {"step": whole_step, "count": count, "patchout": patchout, "decoder": decoder}
PANELS = {
    "step": draw_steps,
    "count": draw_counts,
    "patchout": partial(draw_ratios, "hop, ms", "hop", "patchout saves"),
    "decoder": partial(draw_ratios, "blocks", "depth", "local decoder saves"),
}


def picture_of(rows: list[dict], figure: Figure) -> None:
    """Draw a panel for each part that was run."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
        PANELS[part]([row for row in rows if row["part"] == part], axes)
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.legend(frameon=False, fontsize=7, ncols=2)


def main(argv: list[str] | None = None) -> None:
    """Run the parts that are asked for."""
    parser = parser_of("step", __doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--methods", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--sizes", nargs="+", default=["base", "large"], help="that are counted (%(default)s)")
    parser.add_argument("--hops", nargs="+", default=list(PATCHOUT), choices=list(PATCHOUT), help="PaSST's, ms")
    parser.add_argument("--batch", type=int, default=2, help="clips a step (%(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="PaSST's blocks, on a CPU (%(default)s; published 12)")
    parser.add_argument("--compile", action="store_true", help="ours compiled: minutes more")
    arguments = prepared(parser, argv)
    if arguments.quick:
        arguments.sizes, arguments.hops = arguments.sizes[:1], arguments.hops[:1]
    report = Report(arguments)
    for part in arguments.parts:
        PARTS[part](arguments, report)
    report.draw(lambda figure: picture_of(report.rows, figure), (1 + 4.5 * len(arguments.parts), 4.2))


if __name__ == "__main__":
    main()
