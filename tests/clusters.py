"""A real SLURM of two nodes on this machine, for tests and to try job scripts.

`python tests/clusters.py` opens a shell in it, and ends it with the shell. Both nodes are this host, each a slurmd with
a port of its own. Needs root and Debian's slurm-wlm and munge. Every daemon is known by the pid file of this cluster
alone, so that ending it touches no other.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
CONF = """ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait={kill_wait}
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 Gres={gres} State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str:
    """Say what keeps a SLURM from being started here, "" when nothing does."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge"
    return ""


def claim_ports(count: int) -> tuple[list[int], IO]:
    """Find `count` free TCP ports that follow each other; no other cluster here takes them while the file is open.

    Between the look and the daemons' start another one may look too, so a lock on a file stands for each row of ports.
    """
    for first in range(16800, 30000, count):
        claim = open(Path(tempfile.gettempdir(), f"slurm-ports-{first}.lock"), "a")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with ExitStack() as sockets:
                for port in range(first, first + count):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count)), claim
        except OSError:
            claim.close()
    raise RuntimeError("no free ports")


class Cluster:
    """Two nodes, n1 and n2, of four CPUs each; partition `urgent` pre-empts `main` after `grace` seconds.

    `gpus` is a number of GPUs that each node pretends to have.
    """

    def __init__(self, *, grace: int = 20, kill_wait: int = 30, gpus: int = 0):
        self.home = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))  # short: a socket's path has 107 characters
        self.home.chmod(0o755)
        (self.home / "state").mkdir()
        gres = f"gpu:{gpus}" if gpus else "(null)"
        ports, self._claim = claim_ports(3)
        about = {"host": socket.gethostname(), "home": self.home, "ports": ports, "grace": grace}
        about["first_job"] = 1000 + secrets.randbelow(
            60_000
        )  # a job's port comes from its number, also in other clusters
        conf = CONF.format(**about, kill_wait=kill_wait, gres=gres)
        (self.home / "slurm.conf").write_text(conf if gpus else conf.replace(" Gres=(null)", ""))
        files = [self.home / f"gpu{number}" for number in range(gpus)]
        for file in files:
            file.touch()
        devices = ",".join(map(str, files))
        (self.home / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={devices}\n" if gpus else "")
        self.environment = os.environ | {
            "SLURM_CONF": str(self.home / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        munge = self.home / "munge"
        munge.mkdir(mode=0o700)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        places = {"socket": self.home / "munge.socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        places |= {"seed-file": munge / "seed", "key-file": key}
        self.run("munged", "--force", *(f"--{name}={place}" for name, place in places.items()))
        self.run("slurmctld")
        for node in ("n1", "n2"):
            self.start_node(node)
        end = time.monotonic() + 30
        while self.run("sinfo", "-h", "-p", "main", "-o", "%T").strip() != "idle":
            assert time.monotonic() < end, (self.home / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        (self.home / f"spool-{node}").mkdir(exist_ok=True)
        self.run("slurmd", "-N", node)

    def pid(self, name: str) -> int | None:
        """Give the process of a daemon: slurmctld, slurmd-n1, slurmd-n2 or munged."""
        file = self.home / ("munge/pid" if name == "munged" else f"{name}.pid")
        return int(file.read_text()) if file.exists() and file.read_text().strip() else None

    def run(self, *command: str, **options) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=60, **options)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{done.stdout}"
        return done.stdout

    def start_now(self, job: str) -> None:
        """Let a requeued job start without SLURM's pause of two minutes.

        Not at once: a start within a second of the requeue fails, the nodes having revoked the job's credential.
        """
        time.sleep(3)
        self._update(f"JobId={job}", "StartTime=now", unless="no longer pending")  # it may have started by itself

    def repair_node(self, name: str) -> None:
        """Start the daemon of a node that is down, and let the node work again."""
        self.start_node(name)
        self._update(f"NodeName={name}", "State=RESUME", unless="Invalid node state")  # it may have come back by itself

    def _update(self, *words: str, unless: str) -> None:
        done = subprocess.run(
            ["scontrol", "update", *words], env=self.environment, text=True, capture_output=True, timeout=60
        )
        assert done.returncode == 0 or unless in done.stderr, f"scontrol update {' '.join(words)}: {done.stderr}"

    def stop(self) -> None:
        """Cancel all jobs and end the daemons that this cluster started."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        end = time.monotonic() + 40  # until the tasks have gone, which may save first
        while subprocess.run(["squeue", "-h"], env=self.environment, capture_output=True).stdout.strip():
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):  # nothing of them is to be kept
            if pid := self.pid(name):
                try:
                    os.kill(pid, signal.SIGTERM if name == "munged" else signal.SIGKILL)
                except ProcessLookupError:
                    continue
                end = time.monotonic() + 10
                while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
                    time.sleep(0.05)
        self._claim.close()
        shutil.rmtree(self.home, ignore_errors=True)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    cluster = Cluster()
    try:
        print(cluster.run("sinfo"), end="")
        subprocess.run([os.environ.get("SHELL", "/bin/sh")], env=cluster.environment | {"PS1": "(slurm) $ "})
    finally:
        cluster.stop()
