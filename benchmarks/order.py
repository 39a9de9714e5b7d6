"""How long does a rank of an AudioSet-size run take to start or resume? `python -m benchmarks.order`.

A synthetic index of two million clips (their shards are holes: nothing is decoded) is opened in a fresh process once
per way of drawing clips, and the stream is entered at 90 % of the second epoch. Prints the seconds until the index is
open and the clips chosen, and until the first batch of requests is there; the peak memory of the whole process, and how
much of it came on top of the imports (torch, lightning and the rest). Some batches of requests are then compared with
those of another rank: no crop may come twice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from matplotlib.axes import Axes

from benchmarks import ROOT
from benchmarks.common import Report, parser_of, prepared, progress

NUM_LABELS = 527
MODES = {
    "each once": {},
    "validation held out": {"validation_clips": 512},
    "with labels": {"needs_labels": True},
    "audiomae": {"sampling": "audiomae"},
    "passt, 100 k of all": {"sampling": "passt", "draws_per_epoch": 100_000},
    "passt, half of all": {"sampling": "passt", "draws_per_epoch": 0.5},
    "fraction": {"fraction": 0.1},
    "fraction by class": {"fraction": 0.1, "fraction_by": "class"},
    "shard windows": {"shuffle_shards": 8},
    "mixture": {"sources": {"a": {"weight": 1}, "b": {"weight": 3}}},
    "mixture, audiomae": {"sources": {"a": {"weight": 1}, "b": {"weight": 3}}, "sampling": "audiomae"},
    "all at once": {
        "sources": {"a": {"weight": 1, "fraction": 0.5}, "b": {"weight": 3}},
        "fraction_by": "class",
        "sampling": "atst",
        "validation_clips": 512,
    },
}
PLAIN = yaml.safe_load((ROOT / "conf" / "data" / "folder.yaml").read_text())["data"]
PLAIN |= dict(batch_size=64, num_workers=0, crop_seconds=10.0, padding="zeros", split="train")
PLAIN |= dict(default_rate_hz=32_000, run_dir=None, needs_labels=False)
del PLAIN["shards"], PLAIN["sources"]


def write_corpus(folder: Path, num_clips: int) -> None:
    """Write an index of clips with a few labels each, common and rare, and shards as long as it says."""
    import numpy as np

    from audiossl.indexing.indexfile import write_index

    per_shard, size = 5_000, 200_000
    rng = np.random.default_rng(0)

    def shard(number: int) -> dict:
        path = folder / f"shard-{number:06d}.tar"
        with open(path, "wb") as file:
            os.truncate(file.fileno(), per_shard * size)
        labels = (NUM_LABELS * rng.random((per_shard, 3)) ** 4).astype(int).tolist()
        rows = [
            [f"Y{number:06d}{i:05d}", "flac", i * size, size, 320_000, 32_000, 1]
            + [sorted({f"/m/{label:04x}" for label in labels[i]}), "train", None]
            for i in range(per_shard)
        ]
        return {"name": path.name, "bytes": per_shard * size, "sha256": f"{number:064x}", "rows": rows}

    folder.mkdir()
    write_index(folder / "index.safetensors", map(shard, range(num_clips // per_shard)))


def measure(folder: str, num_clips: int, changes: dict) -> dict[str, float]:
    """Open the corpora in `folder` as `changes` say, and enter the stream late in the second epoch."""
    import audiossl.training  # noqa: F401  what a rank imports before anything else
    from audiossl.shards import ShardData

    before, started = memory("VmRSS"), time.perf_counter()
    sources = {name: {**source, "shards": f"{folder}/{name}"} for name, source in changes.pop("sources", {}).items()}
    if isinstance(changes.get("draws_per_epoch"), float):
        changes["draws_per_epoch"] = round(changes["draws_per_epoch"] * num_clips)
    data = ShardData(**{"shards": None if sources else f"{folder}/all", **PLAIN, **changes, "sources": sources or None})
    opened = time.perf_counter() - started
    step = int(1.9 * data.clips_per_epoch) // (8 * data.batch_size)
    settings = dict(world_size=8, accumulate=1, start_step=step, max_steps=step + 5, seed=0)
    started = time.perf_counter()
    loader = data.train_loader(rank=3, **settings)
    requests = [loader.loader.batch_sampler.batch(step)]
    resumed = time.perf_counter() - started
    peak = memory("VmHWM")
    for rank in (3, 4):
        requests += list(data.train_loader(rank=rank, **settings).loader.batch_sampler)[rank == 3 :]
    draws = [request.draw for batch in requests for request in batch]
    assert len(draws) == len(set(draws)) == 2 * 5 * data.batch_size, "a crop came twice"
    return {"open": opened, "resume": resumed, "peak": peak, "data": peak - before}


def memory(what: str) -> float:
    """Give the process' memory in GB: now (VmRSS) or at most (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1e6


def main(argv: list[str] | None = None) -> None:
    """Open the corpora once per way of drawing, each time in a process of its own."""
    parser = parser_of("order", __doc__)
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the corpora are, or are written to; default: a temporary one")
    arguments = prepared(parser, argv)
    num_clips = 20_000 if arguments.quick else arguments.clips
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.clips, json.loads(arguments.measure))))
        return
    modes = dict(list(MODES.items())[:2] if arguments.quick else MODES.items())
    report = Report(arguments, {f"{num_clips:,} clips": 22, "open, s": 7, "resume, s": 9, "peak, GB": 8, "data, GB": 8})
    with tempfile.TemporaryDirectory() as temporary, progress(len(modes), "way") as bar:
        folder = str(Path(arguments.folder or temporary).resolve())
        for name, some in (("all", num_clips), ("a", num_clips // 4), ("b", num_clips - num_clips // 4)):
            if not Path(folder, name).exists():
                write_corpus(Path(folder, name), some)
        for name, changes in modes.items():
            command = [sys.executable, "-m", "benchmarks.order", "--clips", f"{num_clips}", "--folder", folder]
            command += ["--measure", json.dumps(changes), "--out", str(arguments.out)]
            found = json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout)
            cells = [f"{found[key]:.{digits}f}" for key, digits in zip(found, (1, 1, 2, 2), strict=True)]
            report.row([name, *cells], way=name, **found)
            bar.update()
    report.draw(lambda figure: picture_of(figure.subplots(), report.rows), (8, 4.2))


def picture_of(axes: Axes, rows: list[dict]) -> None:
    """Draw the seconds until the first requests, way by way."""
    names, opened = [row["way"] for row in rows], [row["open"] for row in rows]
    axes.barh(names, opened, label="index open, clips chosen")
    axes.barh(names, [row["resume"] for row in rows], left=opened, label="first batch of requests")
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
