"""How does a point of a sweep that Hydra's submitit launcher has sent to SLURM survive a pre-emption?

Submitit's own handler requeues at once, without a checkpoint, and only so many times. Ours only notes the signal; the
run saves at its next step and leaves with 75, and the job is then requeued as one of `slurm/run.sbatch` is. The
requeued job runs the same pickle, so that `ckpt=last` is put into its settings here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from audiossl.checkpoints.signals import PREEMPTED, install_early_handlers
from audiossl.cluster.allocation import node_address, read_allocation, resolved
from audiossl.cluster.requeue import come_back
from audiossl.errors import UserError

SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"  # which signal submitit asks SLURM for; its own default, USR2, nobody handles here


def ask_for_our_signal() -> None:
    """Let submitit ask SLURM for the signal that a run knows; before submitit is imported."""
    os.environ.setdefault(SIGNAL, "USR1")


@contextmanager
def comes_back(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Run a point of a sweep inside, so that a signal saves it and SLURM starts it again; elsewhere change nothing.

    Raises `UserError` where it would start again for ever.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        yield
        return
    install_early_handlers()
    job = read_allocation(os.environ)
    if job.restarts and "ckpt" in cfg and cfg.ckpt is None:
        cfg.ckpt = "last"
    if resolved(job.nodes[0]) is None:  # Lightning would take the node's name for a host's
        os.environ.setdefault("MASTER_ADDR", resolved(node_address(job.nodes[0])) or job.nodes[0])
    os.environ.setdefault("MASTER_PORT", str(job.port))
    try:
        yield
    except SystemExit as error:
        if error.code == PREEMPTED and os.environ.get("SLURM_PROCID", "0") == "0":
            code, why = come_back(folder, job)
            print(f"slurm: {why}", file=sys.stderr, flush=True)
            if code != PREEMPTED:
                raise UserError(why) from error
        raise
