"""On how many processes does a run train?

`trainer.devices` is the number of devices in all. Lightning counts them per node, so it is split here: by SLURM's or
torchrun's account of the job where there is one, else it must fit this machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from audiossl.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Say how Lightning is started: accelerator, devices a node, nodes, and what was decided, in words."""

    accelerator: str
    devices: int
    num_nodes: int
    note: str


def plan(accelerator: str, devices: int | str, num_nodes: int, *, available: int, environ=os.environ) -> Layout:
    """Split `devices` into nodes x devices.

    `available` is the number of devices (GPUs, or CPU cores for gloo) of this machine. Raises `UserError` when more are
    asked for than exist, or when they do not divide by the nodes.
    """
    unit = "GPU" if accelerator != "cpu" else "CPU core"
    if devices in ("auto", -1, "-1"):
        devices = available * num_nodes if accelerator != "cpu" else 1
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices={devices}: give a count of at least 1, or auto")
    nodes = _nodes_of_the_job(environ) or num_nodes
    if devices % nodes:
        raise UserError(f"trainer.devices={devices} does not divide by {nodes} nodes; take a multiple of {nodes}")
    per_node = devices // nodes
    tasks = _tasks_per_node(environ)
    if tasks and per_node != tasks:
        raise UserError(
            f"trainer.devices={devices} on {nodes} nodes needs {per_node} tasks a node, but the job has {tasks}; "
            f"submit with --ntasks-per-node={per_node} or set trainer.devices={tasks * nodes}"
        )
    if per_node > available:
        raise UserError(
            f"trainer.devices={devices}: this machine has {available} {unit}{'s' if available != 1 else ''}"
            f"{f' and the job {nodes} nodes' if nodes > 1 else ''}; set trainer.devices={max(1, available * nodes)}, "
            "or submit the job to SLURM with enough nodes"
        )
    return Layout(accelerator, per_node, nodes, f"{devices} {unit}s = {nodes} nodes x {per_node}" if nodes > 1 else "")


def _nodes_of_the_job(environ) -> int | None:
    if "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(environ.get("SLURM_NNODES", 1))
    if "GROUP_WORLD_SIZE" in environ:
        return int(environ["GROUP_WORLD_SIZE"])
    return None


def _tasks_per_node(environ) -> int | None:
    if "SLURM_NTASKS_PER_NODE" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(environ["SLURM_NTASKS_PER_NODE"])
    return int(environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in environ else None
