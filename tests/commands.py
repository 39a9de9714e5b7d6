"""Run the product's commands as a user does: real subprocesses in a folder of their own."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT
from warm import Process, server

from audiossl.__main__ import main
from audiossl.index import Index

TINY = [  # a model of seconds, on whatever data is asked for
    "model.width=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "frontend.num_mels=64",
    "frontend.seconds=0.64",
    "data.batch_size=4",
    "data.num_workers=0",
    "probe=none",
    "pictures.clips=0",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
]


def pack_folder(folder: Path, num_clips: int = 40) -> Path:
    """Pack real clips of the demo set into shards of their own; returns the folder of the shards."""
    source, shards = folder / "audio", folder / "shards"
    source.mkdir(parents=True)
    demo = Index.load(ROOT / "demo" / "shards")
    for clip in range(0, num_clips * 9, 9):
        (source / f"{demo.key(clip)}.{demo.extension(clip)}").write_bytes(demo.read(clip))
    assert main(["pack", str(source), "--out", str(shards), "--rate", "16000", "--shard-size", "2MB"]) == 0
    return shards


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE"))}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def start(
    *arguments: str, cwd: Path, script: Path = ROOT / "train.py", fresh: bool = False, **extra: str
) -> Process | subprocess.Popen:
    """Start `python train.py ...` from `cwd`: forked from a process with the libraries, or in a fresh interpreter."""
    if not fresh:
        return server().start(script, list(arguments), cwd, environment(**extra))
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def train(*arguments: str, cwd: Path, expect: int = 0, **how) -> str:
    """Run `python train.py ...` to its end; returns what it printed."""
    process = start(*arguments, cwd=cwd, **how)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == expect, f"exit code {process.returncode}\n{output[-6000:]}"
    return output


def kill_when(process: Process | subprocess.Popen, path: Path, sig: int = signal.SIGKILL, timeout: float = 120) -> int:
    """Send `sig` as soon as `path` exists; returns the exit code."""
    deadline = time.time() + timeout
    while not path.exists():
        assert process.poll() is None, f"ended before {path.name} was there:\n{process.communicate()[0][-4000:]}"
        assert time.time() < deadline, f"{path} did not appear"
        time.sleep(0.005)
    process.send_signal(sig)
    process.communicate(timeout=60)
    return process.returncode


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
