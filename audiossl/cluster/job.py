"""What happens in a SLURM job, from its first line to the requeue?

Settle the command line and the run's folder, say where the ranks meet, stage the shards where that is asked for, start
one rank per task with srun, and look at how they left: 0 is the end, 75 a requeue, anything else a failure.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from audiossl.checkpoints.runlock import refuse_if_held
from audiossl.checkpoints.signals import PREEMPTED
from audiossl.cluster.allocation import Allocation, meeting_address, read_allocation
from audiossl.cluster.command import Command, settle
from audiossl.cluster.rank import LEFT
from audiossl.cluster.requeue import come_back, explain, state_of
from audiossl.config.secrets import mask
from audiossl.errors import UserError

STAGE = "AUDIOSSL_STAGE"
WAIT_SECONDS = 600  # for the other ranks, once one has left by itself: a logger may still upload


def main(argv: list[str]) -> int:
    """Run `argv`, an entry point and its arguments, on all tasks of the job; returns the job's exit code."""
    try:
        if not argv:
            raise UserError("nothing to run; sbatch slurm/run.sbatch train.py [KEY=VALUE ...]")
        job = read_allocation(os.environ)
        srun = Srun(job)
        command = settle(argv[0], argv[1:], job)
        refuse_if_held(command.folder)  # before ranks wait for one that has left, and before anything is staged
        command.folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MASTER_ADDR", meeting_address(job.nodes))
        os.environ.setdefault("MASTER_PORT", str(job.free_port()))
        _announce(job, command)
        code = 0
        if disk := _disk(job):
            command, code = _stage(srun, command, disk)
            if code and code != PREEMPTED:
                say(f"staging failed with exit code {code}, for the reason above; no rank was started")
                return code
        if code == 0:
            code = _train(srun, command)
    except UserError as error:
        print(f"slurm: {error}", file=sys.stderr)
        return 2
    return _after(job, command.folder, code)


def say(text: str) -> None:
    """Write a line into the job's log, at once."""
    print(f"slurm: {text}", flush=True)


class Srun:
    """Run steps of the job, and pass on what SLURM tells the batch script meanwhile.

    SIGTERM reaches this process and the ranks at the same time. It is explained and waited out: the ranks save within
    SLURM's KillWait, and only then is there something to decide.
    """

    def __init__(self, job: Allocation):
        self.job = job
        self._process: subprocess.Popen | None = None
        signal.signal(signal.SIGTERM, self._explain)
        for signum in (signal.SIGUSR1, signal.SIGUSR2):  # scancel --full signals the script too; the ranks have theirs
            signal.signal(signum, signal.SIG_IGN)

    def run(self, options: list[str], words: list[str]) -> int:
        """Run `words` on the tasks that `options` ask for; returns the highest exit code."""
        self._process = subprocess.Popen(["srun", *options, sys.executable, "-u", *words])
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _explain(self, signum, frame) -> None:
        state, reason = state_of(self.job)
        # a handler may run in the middle of a print
        os.write(1, f"slurm: SIGTERM for job {self.job.name} ({state} {reason}): {explain(state, reason)}\n".encode())


def _announce(job: Allocation, command: Command) -> None:
    kind = f"{job.gpus_per_node} GPUs" if job.gpus_per_node else "CPU"
    again = f", start {job.restarts + 1}" if job.restarts else ""
    say(f"job {job.name}{again}: {len(job.nodes)} nodes x {job.tasks_per_node} tasks ({kind}) on {' '.join(job.nodes)}")
    say(f"python {mask(shlex.join([command.program.name, *command.arguments]))}")
    say(f"ranks meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} and write {_log(job, command)}")


def _log(job: Allocation, command: Command) -> Path:
    return command.folder / f"slurm-{job.name}-RANK.log"


def _disk(job: Allocation) -> str:
    """Read where each node's own disk is, "" where nothing is to be staged."""
    disk = os.path.expandvars(os.environ.get(STAGE, ""))
    if "$" in disk:
        raise UserError(f"{STAGE}={disk}: such a variable is not set on {job.nodes[0]}")
    if disk and not os.path.isabs(disk):
        raise UserError(f"{STAGE}={disk}: give the whole path, /tmp/shards say; this one is in a folder of all nodes")
    return disk


def _stage(srun: Srun, command: Command, disk: str) -> tuple[Command, int]:
    """Copy the shards to each node; returns the command that reads them there, and the highest exit code."""
    from audiossl.cluster.staging import place_of
    from audiossl.index import Index
    from audiossl.indexing.shardpaths import is_remote

    added = []
    for key, shards in command.shards.items():
        if is_remote(shards):
            added += [] if "data.cache_dir" in " ".join(command.arguments) else [f"data.cache_dir='{disk}'"]
            continue
        nodes = str(len(srun.job.nodes))
        step = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]
        say(f"{key}: staging on {disk} of each node")
        how = command.damaged_shards
        code = srun.run(step, ["-m", "audiossl.cluster.staging", shards, disk, how])
        if code:
            return command, code
        added.append(f"{key}='{place_of(Index.load(shards, damaged_shards=how), Path(disk))}'")
    return replace(command, arguments=(*command.arguments, *dict.fromkeys(added))), 0


def _train(srun: Srun, command: Command) -> int:
    """Run the entry point on all tasks; returns 75 where they were asked to leave, else the highest exit code."""
    job, left = srun.job, command.folder / f".left-{srun.job.job_id}-{srun.job.restarts}"
    left.unlink(missing_ok=True)
    os.environ[LEFT] = str(left)
    log = str(_log(job, command)).replace("%", "%%").replace("-RANK.log", "-%t.log")
    options = ["--kill-on-bad-exit=1", f"--wait={WAIT_SECONDS}", "--open-mode=append", f"--output={log}"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun no longer takes it from the job (22.05)
        options.append(f"--cpus-per-task={cpus}")
    code = srun.run(options, ["-m", "audiossl.cluster.rank", str(command.program), *command.arguments])
    asked = left.exists()
    left.unlink(missing_ok=True)
    return PREEMPTED if code == 0 and asked else code


def _after(job: Allocation, folder: Path, code: int) -> int:
    """Say how it ended, requeue what was asked to leave, and give the job's exit code."""
    if code == 0:
        say(f"finished: {folder}")
        return 0
    if code != PREEMPTED:
        say(f"failed with exit code {code}{_hint(code)}: see {folder}/slurm-{job.name}-*.log")
        return code
    code, why = come_back(folder, job)
    say(why)
    return code


def _hint(code: int) -> str:
    if code != 128 + signal.SIGKILL:
        return ""
    return (
        " (SIGKILL, by which srun ends the others when one rank has failed: the first it names above is the cause; "
        "if that one was killed too, the machine may have wanted memory)"
    )
