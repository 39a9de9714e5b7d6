"""Does a job that was asked to leave come back?

It requeues itself, once, while SLURM counts it as running; a job that was cancelled is let go, and one that SLURM
requeues itself (pre-emption, a lost node) needs no help. A job that brings nothing to disk between two requeues would
go round for ever, so it is stopped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from audiossl.checkpoints.signals import PREEMPTED
from audiossl.cluster.allocation import Allocation, scontrol

RECORD = "slurm.json"
FRUITLESS = "AUDIOSSL_FRUITLESS"  # the variable that says how many requeues in a row may bring nothing


def state_of(job: Allocation) -> tuple[str, str]:
    """Ask SLURM for the state of the job and its reason; "" where it does not answer."""
    found = dict(re.findall(r"\b(JobState|Reason)=(\S+)", scontrol("show", "job", "--oneliner", str(job.job_id))))
    return found.get("JobState", ""), found.get("Reason", "")


def explain(state: str, reason: str) -> str:
    """Say in words why SLURM ends a job."""
    if reason == "TimeLimit":
        return "its time is over; the ranks should have heard USR1 before: ask for more of it, --signal=USR1@300"
    if state == "RUNNING":
        return "it is to make room for another job, or was signalled"
    return "it was cancelled, pre-empted or lost a node; SLURM requeues it if it is to come back"


def progress_of(folder: Path) -> list[str]:
    """List what a run has brought to disk: its newest checkpoint in each folder, and the results it has finished."""
    newest: dict[Path, str] = {}
    for path in folder.rglob("step=*.ckpt"):
        newest[path.parent] = max(newest.get(path.parent, ""), path.name)
    found = [*(place / name for place, name in newest.items()), *folder.rglob("results.json")]
    return sorted(str(path.relative_to(folder)) for path in found)


def may_return(folder: Path, job: Allocation, environ: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Decide whether the job may be requeued, and note it in the folder; returns the decision and its reason."""
    path, progress = folder / RECORD, progress_of(folder)
    known = json.loads(path.read_text()) if path.exists() else {}
    before = known if known.get("job") == job.name else {"requeues": 0, "fruitless": 0, "progress": None}
    fruitless = before["fruitless"] + 1 if before["progress"] == progress else 0
    allowed = int(environ.get(FRUITLESS, "0"))
    if fruitless > allowed:
        return False, (
            f"nothing has come to disk since requeue {before['requeues']}, so it is not requeued again; is there time "
            f"for a checkpoint (checkpoint.every_steps, --time, --signal)? ({FRUITLESS}={allowed})"
        )
    now = {"job": job.name, "requeues": before["requeues"] + 1, "fruitless": fruitless, "progress": progress}
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(now, indent=1) + "\n")
    part.replace(path)
    return True, f"requeue {now['requeues']}"


def come_back(folder: Path, job: Allocation) -> tuple[int, str]:
    """Requeue a job whose ranks have saved and left; returns only where it stays away, with exit code and reason."""
    state, reason = state_of(job)
    if state not in ("RUNNING", "") and reason != "TimeLimit":
        return PREEMPTED, f"the ranks have left and this script does not requeue ({state}): {explain(state, reason)}"
    may, why = may_return(folder, job)
    if not may:
        return 1, why
    print(f"slurm: the ranks have saved and left: {why}", flush=True)
    return PREEMPTED, f"it could not be requeued: {_requeue(job)}; submit it again, it goes on where it was"


def _requeue(job: Allocation, seconds: float = 60.0) -> str:
    """Put the job back into the queue and wait until SLURM ends this process; returns what went wrong instead."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the end that was asked for needs no explanation
    done = subprocess.run(["scontrol", "requeue", str(job.job_id)], text=True, capture_output=True)
    if done.returncode:
        return (done.stderr or done.stdout).strip() or f"scontrol: exit code {done.returncode}"
    time.sleep(seconds)
    return "SLURM took the requeue but did not end the job"
