"""`audiossl.training.fit`, the real one, in forked processes that can be struck at any moment.

They are forked from `toy_training`'s server, so a run takes as long as its steps. A fault is made by wrapping a method
of the product: {"do": WHAT, "step": N, "at": PLACE, "micro": M, "rank": R}, each but the first two with a default.
"""

import csv
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

PLACES = {
    "training_step": "audiossl.pretraining.Pretraining.training_step",
    "validation": "audiossl.pretraining.Pretraining.validation_step",
    "callback": "audiossl.running.callbacks.Throughput.on_train_batch_end",
    "logger": "audiossl.running.loggers.MetricsCsv.log_metrics",
    "pictures": "audiossl.running.callbacks.Pictures._draw",
    "tensorboard": "lightning.pytorch.loggers.TensorBoardLogger.log_metrics",
    "backward": "lightning.pytorch.LightningModule.backward",
    "update": "audiossl.pretraining.Pretraining.on_before_optimizer_step",
}
TINY = (
    "trainer=cpu", "trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false", "data.num_workers=0",
    "probe=none", "pictures.clips=0", "logger=csv", "trace=true", "checkpoint.keep_best=0", "checkpoint.metric=null",
)  # fmt: skip


@functools.cache
def config_of(*overrides: str) -> dict[str, Any]:
    """Compose and resolve train.py's config; `run_dir` is for `start` to fill."""
    from conftest import ROOT
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("train", overrides=[f"root={ROOT}", "run_dir=x", "name=x", *TINY, *overrides])
    return {k: v for k, v in OmegaConf.to_container(config, resolve=True).items() if k != "hydra"}


def start(
    run_dir: Path,
    *overrides: str,
    ranks: int = 1,
    fault: dict | None = None,
    environment: dict[str, str] | None = None,
    **changes,
) -> list:
    """Start the ranks of a run as srun would, each on its own; `changes` are keys of the config's top level."""
    from toy_training import toys

    if ranks > 1:
        overrides = (*overrides, f"trainer.devices={ranks}")
    config = config_of(*overrides) | {"run_dir": str(run_dir)} | changes
    environments = [environment or {}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
        common |= {"TORCHELASTIC_RUN_ID": "fit", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        environments = [common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks)]
    given = {"config": config, "fault": fault}
    return [toys().start(run_dir, environment, fit=given) for environment in environments]


def run(run_dir: Path, *overrides: str, expect: int = 0, seconds: float = 120.0, **options) -> list:
    """Run to the end; all ranks have to end with the code `expect`."""
    runs = start(run_dir, *overrides, **options)
    codes = [one.wait(seconds) for one in runs]
    assert codes == [expect] * len(runs), f"{codes}\n" + "\n--- next rank\n".join(one.output()[-6000:] for one in runs)
    return runs


def kill_and_go_on(run_dir: Path, *overrides: str, at: tuple[int, ...], legs: list | None = None, ranks=1) -> str:
    """Kill the run (all ranks) with SIGKILL as it begins each of these steps, resuming it every time, to its end.

    `legs` gives what is otherwise in each of the processes, one more than kills: (ranks, overrides more).
    Returns what the last one printed.
    """
    legs = legs or [(ranks, [])] * (len(at) + 1)
    for number, ((size, more), step) in enumerate(zip(legs, (*at, None), strict=True)):
        fault = None if step is None else {"do": "kill", "step": step}
        expect = 0 if step is None else -signal.SIGKILL
        ckpt = "last" if number else None
        (first, *_) = run(run_dir, *overrides, *more, expect=expect, ranks=size, fault=fault, ckpt=ckpt)
    assert "resuming from" in first.output()
    return first.output()


def column(run_dir: Path, name: str) -> list[tuple[int, str]]:
    """Read a column of metrics.csv: the steps, and the values in hexadecimal digits."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row[name]).hex()) for row in csv.DictReader(file) if row.get(name)]


def name_of(rank: int) -> str:
    return f"trace-rank={rank}.csv" if rank else "trace.csv"


def trace(run_dir: Path, rank: int = 0) -> list[dict[str, str]]:
    with open(run_dir / name_of(rank), newline="") as file:
        return list(csv.DictReader(file))


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Compare all of two checkpoints bit for bit, but for what names the run's folder."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other) or torch.equal(one.isnan(), other.isnan()) and one.isnan().any(), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{where}: {one.keys() ^ other.keys()}"
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{place}]")
    else:
        assert one == other, f"{where}: {one} and {other}"


def assert_same_run(one: Path, other: Path, num_steps: int, ranks: int = 1, but: tuple[str, ...] = ()) -> None:
    """Compare losses, what every rank saw and heard, and the last checkpoints: weights, averages, optimiser, loops."""
    losses = column(one, "loss")
    assert [step for step, _ in losses] == list(range(num_steps)) and losses == column(other, "loss")
    for rank in range(ranks):
        assert trace(one, rank) == trace(other, rank)
    saved = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    assert saved[0]["global_step"] == num_steps
    for checkpoint in saved:
        for part in ("audiossl", *but):
            checkpoint.pop(part)
    assert_same(*saved)


def train(folder: Path, config: dict[str, Any], fault: dict[str, Any] | None) -> None:
    """Be one rank; called in the forked process."""
    from processes import leave_the_network, stand_in_read_only
    from toy_faults import mount_small_disk
    from watching import compare_epochs, watch

    from audiossl.checkpoints.signals import install_early_handlers
    from audiossl.errors import UserError
    from audiossl.training import fit

    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    install_early_handlers()
    if int(os.environ.get("WORLD_SIZE", 1)) > 2:
        os.cpu_count = lambda: 64  # more ranks than this machine has cores
    if fault == {"do": "compare epochs"}:
        compare_epochs()
    elif fault is not None:
        if "watch" in fault:
            watch(Path(fault.pop("watch")))
        if "disk" in fault:
            mount_small_disk(folder / "checkpoints", fault.pop("disk"))
        if fault.pop("no network", False):
            leave_the_network()
        if "read-only" in fault:
            stand_in_read_only(Path(fault.pop("read-only")))
        if fault.pop("fused", False):
            from audiossl import optim

            optim.FUSED_ON = ("cuda", "cpu")  # a look at a step is put off, as on a GPU
        if fault:
            arm(**fault)
    try:
        fit(config)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def arm(
    do: str, step: int, at: str = "training_step", micro: int = 0, rank: int | None = None, after: float = 0.0
) -> None:
    """Wrap the method at `at`: what `do` says happens as it is called at this step, micro-batch and rank, once.

    With `after`, so many seconds later, wherever the run may be then.
    """
    from audiossl.pretraining import Pretraining

    if rank is not None and rank != int(os.environ.get("RANK", 0)):
        return
    module, name = PLACES[at].rsplit(".", 1)
    owner = getattr(sys.modules[module.rpartition(".")[0]], module.rpartition(".")[2])
    original, now = getattr(owner, name), {"step": -1, "micro": -1, "left": 1}

    def strike(*args, **kwargs):
        if now["left"] and (now["step"], now["micro"]) == (step, micro):
            now["left"] = 0
            if after:
                threading.Timer(after, act, (do, args)).start()
            else:
                act(do, args)
        return original(*args, **kwargs)

    setattr(owner, name, strike)
    begun = Pretraining.training_step

    def begin(self, batch, batch_idx):
        now.update(step=self.global_step, micro=batch_idx % self.trainer.accumulate_grad_batches)
        return begun(self, batch, batch_idx)

    Pretraining.training_step = begin


def act(do: str, args: tuple) -> None:
    match do:
        case "kill" | "stop" | "term" | "int":
            os.kill(os.getpid(), getattr(signal, f"SIG{do.upper()}"))
        case "raise":
            raise ValueError("the fault of this test")
        case "user error":
            from audiossl.errors import UserError

            raise UserError("data.shards=x: the fault of this test; give another")
        case "nan":
            args[1].waveform = args[1].waveform.float() * float("nan")
        case "inf":
            next(p for p in args[0].method.parameters() if p.grad is not None).grad.fill_(float("inf"))
        case "sleep":
            time.sleep(3600)
        case "rest":
            time.sleep(9)
        case _:
            raise AssertionError(do)
