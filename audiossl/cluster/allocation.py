"""What did SLURM give this job, and where do its ranks meet?

Nodes, tasks and GPUs come from SLURM's variables. The ranks meet at rank 0's machine: its node's name often is no
host name, and may be the loopback address on that very machine, so the name is tried and its result looked at.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from audiossl.errors import UserError

FIRST_PORT, NUM_PORTS = 12_000, 20_000  # below the range from which systems take ports for themselves


@dataclass(frozen=True)
class Allocation:
    """Say what the job has: `restarts` counts how often SLURM has started it anew, `gpus_per_node` is 0 without any."""

    job_id: int
    restarts: int
    array: tuple[int, int] | None  # of the array and of the task in it
    nodes: tuple[str, ...]
    tasks: int
    tasks_per_node: int
    gpus_per_node: int

    @property
    def name(self) -> str:
        """Write the job's number as SLURM's commands take and show it."""
        return "_".join(map(str, self.array)) if self.array else str(self.job_id)

    @property
    def port(self) -> int:
        """Choose the port where the ranks meet, so that two jobs on one node have two."""
        return FIRST_PORT + self.job_id % NUM_PORTS

    def free_port(self, tries: int = 50) -> int:
        """Take `port`, or the next one that nobody listens at on this machine, which has to be the first node."""
        for port in range(self.port, self.port + tries):
            with socket.socket() as listener:
                try:
                    listener.bind(("", port))
                    return port
                except OSError:
                    continue
        raise UserError(f"ports {self.port} to {self.port + tries - 1} of {self.nodes[0]} are taken; set MASTER_PORT")


def read_allocation(environ: Mapping[str, str], list_nodes: Callable[[str], Sequence[str]] | None = None) -> Allocation:
    """Read SLURM's variables; raises UserError outside of a job, and where tasks and GPUs do not pair off."""
    if "SLURM_JOB_ID" not in environ:
        raise UserError("no SLURM job; submit it: sbatch slurm/run.sbatch train.py ...")
    nodes = tuple((list_nodes or hostnames)(environ["SLURM_JOB_NODELIST"]))
    tasks = int(environ.get("SLURM_NTASKS", len(nodes)))
    per_node = int(environ.get("SLURM_NTASKS_PER_NODE", max(1, tasks // len(nodes))))
    gpus = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    if tasks != per_node * len(nodes):
        raise UserError(f"the job has {tasks} tasks on {len(nodes)} nodes; submit with --nodes and --ntasks-per-node")
    if gpus and gpus != per_node:
        raise UserError(
            f"the job has {gpus} GPUs but {per_node} tasks a node, and each task trains on one; submit with "
            f"--gpus-per-node={gpus} --ntasks-per-node={gpus}"
        )
    array = None
    if environ.get("SLURM_ARRAY_TASK_ID"):
        array = (int(environ["SLURM_ARRAY_JOB_ID"]), int(environ["SLURM_ARRAY_TASK_ID"]))
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return Allocation(int(environ["SLURM_JOB_ID"]), restarts, array, nodes, tasks, per_node, gpus)


def meeting_address(
    nodes: Sequence[str],
    resolve: Callable[[str], str | None] | None = None,
    address_of: Callable[[str], str] | None = None,
    seen_from: Callable[[str], str | None] | None = None,
) -> str:
    """Give the address by which every node reaches the first one, on which this runs.

    A name that means the loopback address there (Debian's 127.0.1.1) means another machine elsewhere: then it is the
    address by which this machine reaches the second node; where that is loopback too, all nodes are this machine.
    Raises UserError where a node can be found neither by its name nor by SLURM's address of it.
    """
    resolve, address_of, seen_from = resolve or resolved, address_of or node_address, seen_from or own_address_towards
    if len(nodes) == 1:
        return "127.0.0.1"
    first, second = (resolve(node) or resolve(address_of(node)) for node in nodes[:2])
    if first is None or second is None:
        lost = nodes[0] if first is None else nodes[1]
        raise UserError(f"node {lost}: neither its name nor SLURM's NodeAddr of it is known here; set MASTER_ADDR")
    if first.startswith("127."):
        first = seen_from(second) or first
    return "127.0.0.1" if first.startswith("127.") else first


def resolved(name: str) -> str | None:
    """Look up a host's IPv4 address."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError:
        return None


def own_address_towards(address: str) -> str | None:
    """Find the address from which this machine would send to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def node_address(node: str) -> str:
    """Ask SLURM for the address by which it knows a node."""
    found = re.search(r"\bNodeAddr=(\S+)", scontrol("show", "node", "--oneliner", node))
    return found[1] if found else node


def hostnames(nodelist: str) -> list[str]:
    """Write out SLURM's list of nodes, such as n[1-2]."""
    return scontrol("show", "hostnames", nodelist).split()


def scontrol(*arguments: str) -> str:
    """Run scontrol; returns what it printed, nothing where it failed."""
    done = subprocess.run(["scontrol", *arguments], text=True, capture_output=True)
    return done.stdout if done.returncode == 0 else ""
