"""What would 8 and 64 GPUs do, on paper, and does gradient synchronisation hide behind a backward pass, in fact?

`python -m benchmarks.scale`. The paper is arithmetic on assumptions, all of which are printed: a step runs at half its
floor, however few clips it has; gradients go round a ring in float32, each GPU sending 2 (N - 1) / N of them, by NVLink
within a node and by one network card a GPU between nodes; they hide behind the backward pass (two thirds of a step) but
for the last bucket; each clip is read from the disk once and decoded on the host. Trained weights are counted on the
models at their published size (a teacher has no gradients), operations by `benchmarks.step --parts count`; the
published global batch is shared out over the GPUs, and the step is that of the GPU with most clips.

Beside it two ranks on this machine (gloo) train a small network with synchronisation in buckets, in one bucket (which
nothing can hide), and without (`no_sync`). Gloo computes on the very cores that the backward pass needs, so what is
seen here is probably less than what a GPU hides.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile
import torch
from matplotlib.figure import Figure
from torch import nn

from audiossl.index import Index
from audiossl.sound.audio import decode, resample, to_int16
from benchmarks import ROOT
from benchmarks.common import Report, Spread, parser_of, prepared, say, take_turns
from benchmarks.recipes import build, config_of

GPUS = (1, 8, 64)
GFLOPS = {"audiomae": 210.2, "atst_clip": 213.3, "atst_frame": 372.7, "passt": 271.0}  # training a clip, as counted
RATES = (32_000, 16_000)
WAYS = ("in buckets", "one bucket", "no_sync")


@dataclass(frozen=True)
class Assumptions:
    """Hold what the paper assumes; each is an option of the command."""

    tflops: float = 788.0  # bf16 matrix products of an H200, measured
    share_of_floor: float = 0.5  # that a step reaches
    nvlink_gb_s: float = 360.0  # a GPU and direction, of 450 nominal
    network_gb_s: float = 40.0  # a GPU, of 50 nominal (400 Gbit/s)
    gradient_bytes: float = 4.0  # a weight
    bucket_mb: float = 25.0  # of DistributedDataParallel
    backward_share: float = 2 / 3  # of a step
    decode_clips_s: float = 364.0  # a worker, ten seconds of FLAC at 32 kHz (benchmarks.loader, an idle AMD EPYC)
    cores_gpu: float = 16.0
    disk_gb_s: float = 5.0  # a node of eight, guessed
    clip_kb: float = 0.0  # ten seconds of FLAC; 0: as measured on the demo set at 32 kHz


@dataclass(frozen=True)
class Model:
    """Hold what a published recipe trains with: operations a clip, weights with gradients, clips of all GPUs a step."""

    gflops: float
    weights: int
    global_batch: int


def projected(model: Model, num_gpus: int, clip_bytes: float, by: Assumptions) -> dict[str, float]:
    """Work out step, synchronisation, speed and what the loaders must bring; efficiency is against a single GPU."""
    most = math.ceil(model.global_batch / num_gpus)
    a_clip = model.gflops * 1e9 / (by.tflops * 1e12 * by.share_of_floor)
    step = most * a_clip
    wire = (by.nvlink_gb_s if num_gpus <= 8 else by.network_gb_s) * 1e9
    share = 2 * (num_gpus - 1) / num_gpus
    reduce = share * model.weights * by.gradient_bytes / wire
    last_bucket = share * by.bucket_mb * 2**20 / wire
    exposed = min(max(reduce - by.backward_share * step, 0.0) + last_bucket, reduce)
    clips = model.global_batch / (step + exposed)
    nodes = max(num_gpus / 8, 1)
    return {
        "most_clips": most,
        "step_seconds": step,
        "reduce_seconds": reduce,
        "exposed_seconds": exposed,
        "efficiency": clips * a_clip / num_gpus,
        "clips_per_second": clips,
        "disk_share": clips / nodes * clip_bytes / (by.disk_gb_s * 1e9),
        "cores_share": clips / num_gpus / by.decode_clips_s / by.cores_gpu,
    }


def counted() -> dict[str, Model]:
    """Build the models at their published size, and count the weights that gradients are exchanged of."""
    models = {}
    for name, gflops in GFLOPS.items():
        config = config_of(name)
        trained = sum(weight.numel() for weight in build(config).parameters() if weight.requires_grad)
        models[name] = Model(gflops, trained, config["global_batch"])
    return models


def flac_of_ten_seconds(num_clips: int) -> dict[int, Spread]:
    """Code the demo's clips of 32 kHz (Vorbis, which takes noise away) as 16-bit FLAC: bytes of ten seconds."""
    index = Index.load(ROOT / "demo" / "shards")
    found: dict[int, list[float]] = {rate: [] for rate in RATES}
    for clip in range(len(index)):
        waveform, rate_hz = decode(index.read(clip))
        if rate_hz == RATES[0] and len(found[rate_hz]) < num_clips:
            for rate, sizes in found.items():
                file, samples = io.BytesIO(), to_int16(resample(waveform, rate_hz, rate))
                soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
                sizes.append(10 * rate * file.getbuffer().nbytes / len(samples))
    return {rate: Spread.of(sizes) for rate, sizes in found.items()}


def rank_of_two(rank: int, folder: str, rounds: int, width: int, depth: int, batch: int) -> None:
    """Time a step of each way on one of two ranks; rank 0 writes what it found."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    net = nn.Sequential(*layers)
    clips, everything = torch.randn(batch, width), torch.cat([weight.detach().flatten() for weight in net.parameters()])
    megabytes = everything.numel() * 4 / 2**20
    parallel = nn.parallel.DistributedDataParallel
    nets = {"in buckets": parallel(net, bucket_cap_mb=megabytes / 8)}
    nets["one bucket"] = parallel(copy.deepcopy(net), bucket_cap_mb=2 * megabytes)

    def step(way: str):
        def run() -> None:
            with nets["in buckets"].no_sync() if way == "no_sync" else torch.enable_grad():
                nets.get(way, nets["in buckets"])(clips).square().mean().backward()
            for both in nets.values():
                both.zero_grad()
            torch.distributed.barrier()

        return run

    def reduce() -> None:
        torch.distributed.all_reduce(everything)
        torch.distributed.barrier()

    turns = take_turns({way: step(way) for way in WAYS} | {"all-reduce alone": reduce}, rounds=rounds, warm_up=3)
    if rank == 0:
        found = {name: taken.wall for name, taken in turns.items()} | {"megabytes": megabytes}
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(arguments: argparse.Namespace) -> dict:
    """Run the two ranks, and say which part of the all-reduce was hidden."""
    width, depth, batch = (256, 4, 64) if arguments.quick else (1024, 8, 512)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (folder, arguments.rounds, width, depth, batch)
        torch.multiprocessing.start_processes(rank_of_two, sizes, nprocs=2, start_method="spawn")
        found = json.loads(Path(folder, "found.json").read_text())
    turns = [found[name] for name in ("in buckets", "one bucket", "no_sync", "all-reduce alone")]
    hidden = [1 - (some - none) / alone for some, _, none, alone in zip(*turns, strict=True)]
    saved = [(one - some) / alone for some, one, _, alone in zip(*turns, strict=True)]
    seconds = {name: Spread.of(found[name]) for name in (*WAYS, "all-reduce alone")}
    return {"seconds": seconds, "hidden": Spread.of(hidden), "saved": Spread.of(saved), "megabytes": found["megabytes"]}


def main(argv: list[str] | None = None) -> None:
    """Print the assumptions, what follows of them, and what two ranks did."""
    parser = parser_of("scale", __doc__, rounds=15)
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"({value:.3g})")
    arguments = prepared(parser, argv)
    by = Assumptions(**{name: getattr(arguments, name) for name in asdict(Assumptions())})
    models, sizes = counted(), flac_of_ten_seconds(4 if arguments.quick else 1000)
    clip_bytes = 1e3 * by.clip_kb or sizes[RATES[0]].median
    say("assumed: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(by).items()))
    for rate, size in sizes.items():
        worded = f"{Spread(*(value / 1e3 for value in (size.median, size.low, size.high))):.0f} kB"
        say(f"measured: {worded} for ten seconds of 16-bit FLAC at {rate // 1000} kHz ({rate / 50:.0f} kB raw)")
    for name, model in models.items():
        counts = f"{model.gflops} GFLOP a clip to train, {model.weights / 1e6:.1f} M weights with gradients"
        say(f"counted: {name} {counts}; published: {model.global_batch} clips a step")
    columns = {"method": 12, "GPUs": 4, "clips a GPU": 11, "step, ms": 9, "all-reduce, ms": 14, "shown, ms": 9}
    report = Report(arguments, columns | {"efficiency": 10, "clips/s": 8, "of the disk": 11, "of the cores": 12})
    for name, model in models.items():
        for num_gpus in GPUS:
            found = projected(model, num_gpus, clip_bytes, by)
            times = [f"{1e3 * found[f'{part}_seconds']:.1f}" for part in ("step", "reduce", "exposed")]
            loads = [f"{found['clips_per_second']:.0f}", f"{found['disk_share']:.0%}", f"{found['cores_share']:.0%}"]
            cells = [name, num_gpus, found["most_clips"], *times, f"{found['efficiency']:.0%}", *loads]
            report.row(cells, method=name, gpus=num_gpus, **found)
    seen = measure(arguments)
    say(f"two ranks (gloo, CPU), {seen['megabytes']:.0f} MB of gradients:")
    for name, taken in seen["seconds"].items():
        say(f"  {name:18} {Spread(*(1e3 * value for value in (taken.median, taken.low, taken.high))):.1f} ms")
    alone, noise = seen["seconds"]["all-reduce alone"].median, seen["seconds"]["no_sync"]
    if noise.high - noise.low > alone:
        say("  steps vary by more than an all-reduce takes: what is hidden cannot be told here; more --rounds, idle")
    else:
        say(
            f"  of an all-reduce, {seen['hidden']:.2f} was hidden; buckets hid {seen['saved']:.2f} more than one bucket"
        )
    counts = {name: asdict(model) for name, model in models.items()}
    report.write(assumptions=asdict(by), models=counts, flac_bytes=sizes, two_ranks=seen)
    report.draw(lambda figure: picture_of(report.rows, seen, figure), (10, 4.2))


def picture_of(rows: list[dict], seen: dict, figure: Figure) -> None:
    """Draw clips a second over GPUs on paper, and the two ranks' steps."""
    paper, ranks = figure.subplots(1, 2)
    for method in GFLOPS:
        mine = [row for row in rows if row["method"] == method]
        paper.loglog([r["gpus"] for r in mine], [r["clips_per_second"] for r in mine], marker="o", ms=4, label=method)
    paper.set_xticks(GPUS, [str(count) for count in GPUS])
    paper.set(xlabel="GPUs", ylabel="clips a second", title="on paper")
    paper.legend(frameon=False)
    names, taken = list(seen["seconds"]), list(seen["seconds"].values())
    ends = [[1e3 * (t.median - t.low) for t in taken], [1e3 * (t.high - t.median) for t in taken]]
    ranks.bar(names, [1e3 * t.median for t in taken], yerr=ends, capsize=3, color=["C0", "C0", "0.6", "C1"])
    ranks.set(ylabel="ms", title="measured: two ranks, gloo")


if __name__ == "__main__":
    main()
