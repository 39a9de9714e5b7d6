"""What would 8 and 64 GPUs do, on paper, and does gradient synchronisation hide behind a backward pass, in fact?

`python -m benchmarks.scale`. The paper is arithmetic on assumptions, all of which are printed: a step runs at half its
floor; gradients go round a ring in float32, each GPU sending 2 (N - 1) / N of them, by NVLink within a node and by
one network card a GPU between nodes; they hide behind the backward pass (two thirds of a step) but for the last
bucket; each clip is read from the disk once and decoded on the host. Beside it two ranks on this machine (gloo) train
a small network with synchronisation in buckets, in one bucket (which nothing can hide), and without (`no_sync`). Gloo
computes on the very cores that the backward pass needs, so what is seen here is less than what a GPU hides.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from audiossl.index import Index
from benchmarks import ROOT
from benchmarks.common import Report, Spread, parser_of, prepared, say, take_turns

GPUS = (1, 8, 64)
METHODS = {  # training GFLOP a clip, million trained weights, clips a GPU and step
    "Audio-MAE": (210, 137, 128),
    "ATST-Clip": (209, 90, 128),
    "ATST-Frame": (358, 90, 128),
    "PaSST-S": (266, 87, 128),
}
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
    decode_clips_s: float = 330.0  # a core, ten seconds of FLAC at 32 kHz (benchmarks.loader)
    cores_gpu: float = 16.0
    disk_gb_s: float = 5.0  # a node of eight


def projected(method: str, num_gpus: int, clip_bytes: float, by: Assumptions) -> dict[str, float]:
    """Work out step, synchronisation, speed and what the loaders must bring."""
    gflops, millions, batch = METHODS[method]
    step = batch * gflops * 1e9 / (by.tflops * 1e12 * by.share_of_floor)
    wire = (by.nvlink_gb_s if num_gpus <= 8 else by.network_gb_s) * 1e9
    share = 2 * (num_gpus - 1) / num_gpus
    reduce = share * millions * 1e6 * by.gradient_bytes / wire
    last_bucket = share * by.bucket_mb * 2**20 / wire
    exposed = max(reduce - by.backward_share * step, 0.0) + min(last_bucket, reduce)
    clips = num_gpus * batch / (step + exposed)
    nodes = max(num_gpus / 8, 1)
    return {
        "step_seconds": step,
        "reduce_seconds": reduce,
        "exposed_seconds": exposed,
        "efficiency": step / (step + exposed),
        "clips_per_second": clips,
        "disk_share": clips / nodes * clip_bytes / (by.disk_gb_s * 1e9),
        "cores_share": clips / num_gpus / by.decode_clips_s / by.cores_gpu,
    }


def bytes_of_ten_seconds() -> float:
    """Take the mean size of ten seconds of the demo's FLAC."""
    index = Index.load(ROOT / "demo" / "shards")
    return 10 * float(index.size.sum()) / float(index.seconds.sum())


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
    clip_bytes = bytes_of_ten_seconds()
    say("assumed: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(by).items()))
    say(f"measured: {clip_bytes / 1e3:.0f} kB for ten seconds of the demo's FLAC at 32 kHz")
    for name, (gflops, millions, batch) in METHODS.items():
        say(f"assumed: {name} {gflops} GFLOP a clip to train, {millions} M weights, {batch} clips a GPU and step")
    columns = {"method": 12, "GPUs": 4, "step, ms": 9, "all-reduce, ms": 14, "shown, ms": 9, "efficiency": 10}
    report = Report(arguments, columns | {"clips/s": 8, "of the disk": 11, "of the cores": 12})
    for method in METHODS:
        for num_gpus in GPUS:
            found = projected(method, num_gpus, clip_bytes, by)
            times = [f"{1e3 * found[f'{name}_seconds']:.1f}" for name in ("step", "reduce", "exposed")]
            loads = [f"{found['clips_per_second']:.0f}", f"{found['disk_share']:.0%}", f"{found['cores_share']:.0%}"]
            cells = [method, num_gpus, *times, f"{found['efficiency']:.1%}", *loads]
            report.row(cells, method=method, gpus=num_gpus, **found)
    seen = measure(arguments)
    say(f"two ranks (gloo, CPU), {seen['megabytes']:.0f} MB of gradients:")
    for name, taken in seen["seconds"].items():
        say(f"  {name:18} {Spread(*(1e3 * value for value in (taken.median, taken.low, taken.high))):.1f} ms")
    say(f"  of an all-reduce, {seen['hidden']:.2f} was hidden; buckets hid {seen['saved']:.2f} more than one bucket")
    report.write(assumptions=asdict(by), clip_bytes=clip_bytes, two_ranks=seen)
    report.draw(lambda figure: picture_of(report.rows, seen, figure), (10, 4.2))


def picture_of(rows: list[dict], seen: dict, figure: Figure) -> None:
    """Draw clips a second over GPUs on paper, and the two ranks' steps."""
    paper, ranks = figure.subplots(1, 2)
    for method in METHODS:
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
