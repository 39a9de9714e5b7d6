"""What does it cost to ask something of two million clips? `python -m benchmarks.tasks [--clips N]`

Writes an index as large as AudioSet's (527 classes, about two labels a clip; no audio), loads it, then loads it as a
task and writes the index of its training, and prints the seconds and the peak of the process's memory after each.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from safetensors.numpy import save_file

from audiossl.index import Index
from audiossl.indexing.indexfile import COLUMNS, FORMAT, RAGGED
from audiossl.tasks import load_task
from benchmarks import ROOT
from benchmarks.common import Report, parser_of, peak_memory_bytes, prepared

BYTES, SHARD_CLIPS, NUM_CLASSES, NUM_TEST = 200_000, 5_000, 527, 20_000


def write_synthetic(folder: Path, num_clips: int, seed: int = 0) -> None:
    """Write the index of `num_clips` clips that are not there, and shards of the right length, all holes."""
    draw = np.random.default_rng(seed)
    of_shard = np.arange(num_clips, dtype=np.int32) // SHARD_CLIPS
    num_labels = draw.integers(1, 4, num_clips)
    is_test = np.arange(num_clips) >= num_clips - min(NUM_TEST, num_clips // 4)
    columns = {
        "shard": of_shard,
        "offset": (np.arange(num_clips) % SHARD_CLIPS) * BYTES,
        "size": np.full(num_clips, BYTES - 512),
        "num_frames": np.full(num_clips, 320_000),
        "seconds": np.full(num_clips, 10.0),
        "rate_hz": np.full(num_clips, 32_000),
        "channels": np.ones(num_clips),
        "extension": np.zeros(num_clips),
        "split": np.where(is_test, 0, 1),
        "fold": np.full(num_clips, -1),
        "key_ends": 12 * np.arange(1, num_clips + 1),
        "label_ends": num_labels.cumsum(),
        "key_bytes": np.frombuffer(b"".join(b"Y%011d" % clip for clip in range(num_clips)), np.uint8),
        "label_ids": (np.repeat(draw.integers(0, NUM_CLASSES, num_clips), num_labels)
                      + np.arange(num_labels.sum()) * 7) % NUM_CLASSES,
    }  # fmt: skip
    shards = []
    for number in range(int(of_shard[-1]) + 1):
        name, size = f"shard-{number:06d}.tar", SHARD_CLIPS * BYTES
        with open(folder / name, "wb") as file:
            file.truncate(size)
        clips = int((of_shard == number).sum())
        shards.append({"name": name, "bytes": size, "sha256": f"{number:064x}", "clips": clips})
    vocabulary = [f"class {number:03d}" for number in range(NUM_CLASSES)]
    meta = {"format": FORMAT, "shards": shards, "vocabulary": vocabulary, "splits": ["test", "train"]}
    meta["counts"] = {"clips": num_clips, "seconds": 10.0 * num_clips}
    arrays = {name: np.ascontiguousarray(columns[name], dtype) for name, dtype in (COLUMNS | RAGGED).items()}
    save_file(arrays, folder / "index.safetensors", metadata={"audiossl": json.dumps(meta)})


def main(argv: list[str] | None = None) -> int:
    """Measure once, in a process that has not written the index."""
    parser = parser_of("tasks", __doc__)
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, help="of an index that was written before (default: writes one)")
    arguments = prepared(parser, argv)
    if arguments.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            write_synthetic(Path(folder), 20_000 if arguments.quick else arguments.clips)
            command = [sys.executable, "-m", "benchmarks.tasks", "--folder", folder, *["--quick"] * arguments.quick]
            return subprocess.run([*command, "--out", str(arguments.out)], cwd=ROOT).returncode
    report, begin = Report(arguments, {"done": 48, "after, s": 8, "peak, MB": 8}), time.perf_counter()

    def done(what: str, **facts) -> None:
        seconds, peak = time.perf_counter() - begin, peak_memory_bytes("cpu")
        report.row([what, f"{seconds:.1f}", f"{peak / 1e6:.0f}"], what=what, seconds=seconds, peak_bytes=peak, **facts)

    done("torch and audiossl imported")
    index = Index.load(arguments.folder)
    done(f"index of {len(index):,} clips")
    settings = yaml.safe_load((ROOT / "conf" / "task" / "folder.yaml").read_text())
    settings |= {"root": None, "shards": str(arguments.folder), "kind": "multilabel", "validation": 0.01}
    task = load_task(**settings)
    done("task")
    test = task.divisions[0].test
    targets = task.targets_of(test)
    done(f"targets of its {len(test):,} test clips", num_targets=int(targets.sum()))
    digest = task.hash
    done("hash", hash=digest)
    written = task.shards_of(task.divisions[0], arguments.folder / "of_task.safetensors")
    done(f"index of its training ({written.stat().st_size / 1e6:.0f} MB)")
    report.draw(lambda figure: picture_of(figure.subplots(), report.rows), (8, 4.2))
    return 0


def picture_of(axes: Axes, rows: list[dict]) -> None:
    """Draw the peak of the process's memory after each thing that was asked."""
    axes.barh([row["what"] for row in rows], [row["peak_bytes"] / 1e6 for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("peak of the process, MB")


if __name__ == "__main__":
    sys.exit(main())
