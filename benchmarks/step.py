"""How fast is a training step, and how near to what the arithmetic allows?

`python -m benchmarks.step` measures front end, network and optimiser of each method from waveforms that lie on the
device already, in turns with the same step done naively; counts the operations and the bytes kept a clip of the
published models; and compares patchout, and the local decoder, with what the operations promise. On a CPU the models
that are timed are small (published lengths, fewer and narrower blocks), on a GPU they are the published ones.

    python -m benchmarks.step                                        --quick: a minute or two
    python -m benchmarks.step --device cuda --compile --batch 128    the published sizes
    python -m benchmarks.step --parts patchout --hops 10             one part alone: step count patchout decoder
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from audiossl.batch import Batch
from audiossl.config import cli  # noqa: F401 - brings the resolvers of the config
from audiossl.noise import Noise
from audiossl.optim import OptimSettings, build_optimizer
from audiossl.parts import blocks
from audiossl.planning.cost import Cost, cost_of
from audiossl.planning.memory import memory_of, remembered_bytes, sizes_of
from audiossl.planning.speed import STEADY
from audiossl.running.build import method_from_config
from benchmarks import ROOT
from benchmarks.common import (
    Report,
    Spread,
    forget_peak_memory,
    matmul_flops,
    parser_of,
    peak_memory_bytes,
    prepared,
    progress,
    say,
    take_turns,
)

PEAK, MEMORY_GB = 788e12, 141.0  # of an H200 in bf16, as measured on one; of its memory
METHODS = {  # experiment, GFLOP of training a clip as we had estimated them
    "audiomae": ("audiomae_base_as2m", 210),
    "atst_clip": ("atst_clip_base_as2m", 209),
    "atst_frame": ("atst_frame_base_as2m", 358),
    "passt": ("passt_s_as2m", 266),
}
SMALL = ["model.width=192", "model.num_heads=3", "model.depth=2"]
SMALL_DECODER = ["model.decoder_width=128", "model.decoder_num_heads=4", "model.decoder_depth=4"]
PATCHOUT = {"10": (40, 4, 2.86), "5": (100, 6, 5.4), "3.125": (150, 6, 5.7)}  # columns, rows, FLOP ratio stated
CLASSES = [f"class {number}" for number in range(527)]


def config_of(method: str, *overrides: str) -> dict[str, Any]:
    """Compose the published recipe of a method."""
    about = [f"experiment={METHODS[method][0]}", f"root={ROOT}", "run_dir=x", "name=x", "data.shards=x", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("train", overrides=about)
    return {part: OmegaConf.to_container(config[part], resolve=True) for part in ("model", "frontend", "optim")}


def build(config: dict[str, Any]) -> nn.Module:
    """Build a method from random numbers, the same every time."""
    torch.manual_seed(0)
    return method_from_config(config, vocabulary=CLASSES)


def samples_of(method: nn.Module) -> int:
    """Count the samples of the crop that a method wants of a clip."""
    frontend = method.frontend
    return getattr(method, "crop_samples", None) or frontend.samples_for(frontend.frames)


class Step:
    """Take training steps of `clips` waveforms of noise on a device; each call is a step and gives the clips.

    `half` computes in bf16, `compile` the blocks; `naive_attention` writes the whole matrix of attention.
    """

    def __init__(
        self, config: dict[str, Any], clips: int, device: str, *, half=False, compile=False, naive_attention=False
    ):
        self.method = build(config).to(device).train()
        self.clips, self.device, self.half, self.number = clips, device, half, 0
        if compile:
            blocks.compile_blocks(self.method, device.split(":")[0])
        optim = OptimSettings(**{**config["optim"], **STEADY})
        self.optimizer = build_optimizer(self.method, optim, lr=1e-6)
        samples = samples_of(self.method)
        waveform = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(1))
        target = (torch.rand(clips, len(CLASSES), generator=torch.Generator().manual_seed(2)) < 0.01).float()
        rows, key = torch.arange(clips), [str(row) for row in range(clips)]
        batch = Batch(waveform, torch.full((clips,), samples), rows=rows, key=key, target=target)
        self.batch = batch.to(device)
        self.attention: Callable[[], AbstractContextManager] = nullcontext
        if naive_attention:
            self.attention = lambda: sdpa_kernel(SDPBackend.MATH)

    def __call__(self) -> int:
        noise = Noise(0, self.number, self.batch.rows, self.clips, self.device)
        autocast = torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.half)
        with self.attention(), noise.of_this_step(), blocks.compiled():
            with autocast:
                loss: Tensor = self.method(self.batch, generator=noise)["loss"]
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.method, "after_step"):
            self.method.after_step(self.number, 10**6)
        self.number += 1
        return self.clips


@contextmanager
def advanced(bar: Any) -> Iterator[None]:
    """Count a piece of work that is done."""
    yield
    bar.update()


def small_of(method: str, arguments) -> list[str]:
    """Choose the overrides for what is timed: none on a GPU."""
    if arguments.device != "cpu":
        return []
    return SMALL + (SMALL_DECODER if method == "audiomae" else [])


def whole_step(arguments) -> None:
    """Time each method's step against the naive ones, and the peak of the device."""
    device, is_gpu = arguments.device, arguments.device != "cpu"
    peak = matmul_flops(device, torch.bfloat16 if is_gpu else torch.float32, quick=arguments.quick)
    columns = {
        "step": 12,
        "clips/s": 24,
        "GFLOP": 7,
        "MFU": 6,
        "x fp32": 18,
        "x AMP": 18,
        "x unfused": 18,
        "x full": 18,
        "GB": 6,
    }
    report = Report(arguments, columns, f"training steps; peak {peak / 1e12:.3g} TFLOP/s of a matrix product")
    with progress(len(arguments.methods) * 5 * (arguments.rounds + 1), "step") as bar:
        for name in arguments.methods:
            config = config_of(name, *small_of(name, arguments))
            ways: dict[str, dict[str, Any]] = {"ours": dict(half=is_gpu, compile=arguments.compile)}
            ways |= {"fp32": {}, "AMP": dict(half=True), "unfused": dict(half=is_gpu, naive_attention=True)}
            steps = {way: Step(config, arguments.batch, device, **how) for way, how in ways.items()}
            if name == "passt":
                full = [f"model.patchout_{axis}=0" for axis in ("time", "frequency")]
                steps["full"] = Step(
                    config_of(name, *small_of(name, arguments), *full), arguments.batch, device, half=is_gpu
                )
            forget_peak_memory(device)
            steps["ours"]()
            memory = peak_memory_bytes(device)
            turns = take_turns(steps, rounds=arguments.rounds, device=device, bar=bar)
            cost = _cost(build(config), half=None)
            rate = turns["ours"].rate()
            ratios = {
                way: turns["ours"].times_as_fast_as(other, "wall" if is_gpu else "cpu") for way, other in turns.items()
            }
            cells = [f"{ratios[way]:.2f}" if way in ratios else "" for way in ("fp32", "AMP", "unfused", "full")]
            mfu = rate.median * cost.flops_training / peak
            row = [name, f"{rate:.2f}", f"{cost.flops_training / 1e9:.3g}", f"{mfu:.2f}", *cells, f"{memory / 1e9:.2f}"]
            report.row(row, method=name, rate=rate, mfu=mfu, ratios=ratios, memory=memory, peak=peak)


def _cost(method: nn.Module, half: torch.dtype | None) -> Cost:
    classes = len(CLASSES) if getattr(method, "needs_labels", False) else None
    return cost_of(method, samples=samples_of(method), num_classes=classes, half=half)


def count(arguments) -> None:
    """Count operations and kept bytes of the published models, and what batch fits."""
    columns = {
        "model": 16,
        "size": 6,
        "forward": 8,
        "training": 9,
        "stated": 7,
        "clips/s at most": 16,
        "MB a clip": 10,
        "checkpointed": 13,
        "largest batch": 14,
    }
    arguments.name = "step_count"
    report = Report(
        arguments, columns, f"GFLOP a clip, and what fits {MEMORY_GB:g} GB in bf16 (peak {PEAK / 1e12:g} TFLOP/s)"
    )
    for name in arguments.methods:
        for size in arguments.sizes:
            overrides = [*(small_of(name, arguments) if arguments.quick else [f"size={size}"])]
            config = config_of(name, *overrides)
            method = build(config)
            cost, sizes = _cost(method, torch.bfloat16), sizes_of(method)
            blocks.checkpoint_blocks(method)
            trained = sum(isinstance(m, blocks.Regional) and m.norm1.weight.requires_grad for m in method.modules())
            again = _cost(method, torch.bfloat16)
            how = dict(devices=1, optim=config["optim"], strategy="auto", is_half=True)
            fixed = sum(memory_of(sizes, cost, batch_size=0, **how, remembered_bytes=remembered_bytes(method)).values())
            kept = [
                cost.saved_bytes,
                again.saved_bytes + cost.saved_bytes // trained,
            ]  # and one block, while it runs again
            largest = [int((MEMORY_GB * 1e9 - fixed) // each) for each in kept]
            most = PEAK / cost.flops_training
            stated = METHODS[name][1] if size == "base" else ""
            row = [
                name,
                size,
                f"{cost.flops_forward / 1e9:.1f}",
                f"{cost.flops_training / 1e9:.1f}",
                stated,
                f"{most:.0f}",
            ]
            row += [f"{cost.saved_bytes / 1e6:.0f}", f"{again.saved_bytes / 1e6:.0f}", " / ".join(map(str, largest))]
            report.row(row, method=name, size=size, cost=vars(cost), checkpointed=vars(again), largest=largest)


def patchout(arguments) -> None:
    """Hold the time that patchout saves against the operations it saves, on fused attention and on unfused."""
    columns = {"hop, ms": 8, "tokens": 12, "FLOP ratio": 11, "stated": 7, "time ratio": 20, "share": 6, "unfused": 20}
    arguments.name = "step_patchout"
    report = Report(arguments, columns, "PaSST: a step without patchout against one with it")
    sizes = [] if arguments.device != "cpu" else ["model.depth=1"]
    sizes += ["model.width=192", "model.num_heads=3"] if arguments.quick else []
    for hop in arguments.hops:
        time_columns, rows, stated = PATCHOUT[hop]
        given = [
            *sizes,
            f"frontend.hop_ms={hop}",
            f"model.patchout_time={time_columns}",
            f"model.patchout_frequency={rows}",
        ]
        configs = [
            config_of("passt", *given),
            config_of("passt", *given, "model.patchout_time=0", "model.patchout_frequency=0"),
        ]
        costs = [_cost(build(config), half=None) for config in configs]
        found = {}
        for naive in (False, True):
            how = dict(half=arguments.device != "cpu", compile=arguments.compile, naive_attention=naive)
            steps = {
                w: Step(c, arguments.batch, arguments.device, **how)
                for w, c in zip(("kept", "all"), configs, strict=True)
            }
            turns = take_turns(steps, rounds=arguments.rounds, device=arguments.device)
            found[naive] = turns["kept"].times_as_fast_as(turns["all"], "wall" if arguments.device != "cpu" else "cpu")
        flops = costs[1].flops_training / costs[0].flops_training
        tokens = "/".join(str(sum(cost.encoded.values())) for cost in costs)
        share = found[False].median / flops
        row = [hop, tokens, f"{flops:.2f}", stated, f"{found[False]:.2f}", f"{share:.0%}", f"{found[True]:.2f}"]
        report.row(row, hop=hop, flops=flops, fused=found[False], unfused=found[True], share=share)


def decoder(arguments) -> None:
    """Compare Audio-MAE's local decoder with the global one at equal depth."""
    columns = {"depth": 6, "local GFLOP": 12, "global GFLOP": 12, "global / local FLOP": 20, "time": 20}
    arguments.name = "step_decoder"
    report = Report(arguments, columns, "Audio-MAE's step: global decoder against local at equal depth")
    for depth in (2, 4) if arguments.device == "cpu" else (8, 16):
        kinds = {}
        for kind in ("local", "global"):
            given = [*small_of("audiomae", arguments), f"model.decoder={kind}", f"model.decoder_depth={depth}"]
            kinds[kind] = config_of("audiomae", *given)
        flops = {kind: _cost(build(config), None).flops_training for kind, config in kinds.items()}
        how = dict(half=arguments.device != "cpu", compile=arguments.compile)
        steps = {kind: Step(config, arguments.batch, arguments.device, **how) for kind, config in kinds.items()}
        turns = take_turns(steps, rounds=arguments.rounds, device=arguments.device)
        times: Spread = turns["local"].times_as_fast_as(turns["global"], "wall" if arguments.device != "cpu" else "cpu")
        local, whole = flops["local"], flops["global"]
        row = [depth, f"{local / 1e9:.3g}", f"{whole / 1e9:.3g}", f"{whole / local:.2f}", f"{times:.2f}"]
        report.row(row, depth=depth, flops=flops, ratio=times)


PARTS = {"step": whole_step, "count": count, "patchout": patchout, "decoder": decoder}


def main(argv: list[str] | None = None) -> None:
    """Run the parts that are asked for."""
    parser = parser_of("step", __doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sizes", nargs="+", default=["base", "large"], help="that are counted (%(default)s)")
    parser.add_argument("--hops", nargs="+", default=list(PATCHOUT), choices=list(PATCHOUT), help="PaSST's, ms")
    parser.add_argument("--batch", type=int, default=2, help="clips a step (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="ours compiled: minutes more")
    arguments = prepared(parser, argv)
    if arguments.quick:
        arguments.sizes, arguments.hops = arguments.sizes[:1], arguments.hops[:1]
    for part in arguments.parts:
        PARTS[part](arguments)
        say("")


if __name__ == "__main__":
    main()
