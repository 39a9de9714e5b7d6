"""On how many processes does a run train?

`trainer.devices` is the number of devices in all, and Lightning counts them per node. Where SLURM or torchrun has
started the processes, their account of the job decides and the settings must agree with it; elsewhere the devices must
be in this machine. What does not fit is refused with the command that would, never rounded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from audiossl.errors import UserError
from audiossl.planning.jobs import Job, job_of, sbatch_command, split_over_nodes


@dataclass(frozen=True)
class Layout:
    """Say how Lightning is started: accelerator, devices a node, nodes, and what was decided, in words."""

    accelerator: str
    devices: int
    num_nodes: int
    note: str

    @property
    def total(self) -> int:
        """Count the devices of all nodes."""
        return self.devices * self.num_nodes


class NotHereError(UserError):
    """Report devices that are not here; `layout` is how a cluster would have them, `lack` what this machine has."""

    def __init__(self, message: str, layout: Layout, lack: str):
        super().__init__(message)
        self.layout, self.lack = layout, lack


def layout_of(trainer: Mapping[str, Any], *, gpus_per_node: int = 8) -> Layout:
    """Plan for this machine and this job; `trainer` is the config's section. Raises `UserError` as `plan` does."""
    accelerator, has_gpu = trainer["accelerator"], torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu and trainer["devices"] in (1, "auto", -1, "-1"):
        lack = "no CUDA device is to be seen here"
        message = f"trainer.accelerator={accelerator}: {lack}; take trainer=cpu"
        raise NotHereError(message, Layout("gpu", 1, 1, ""), lack)
    if accelerator == "auto":
        accelerator = "gpu" if has_gpu else "cpu"
    is_cpu_by_choice = trainer["accelerator"] == "cpu"
    available = (os.cpu_count() or 1) if accelerator == "cpu" else torch.cuda.device_count()
    sizes = dict(available=available, gpus_per_node=gpus_per_node, is_cpu_by_choice=is_cpu_by_choice)
    return plan(accelerator, trainer["devices"], trainer["num_nodes"], **sizes)


def plan(
    accelerator: str,
    devices: int | str,
    num_nodes: int | None = None,
    *,
    available: int,
    environ: Mapping[str, str] = os.environ,
    gpus_per_node: int = 8,
    is_cpu_by_choice: bool = False,
) -> Layout:
    """Split `devices` into nodes x devices.

    `available` is the number of devices (GPUs, or CPU cores for gloo) of this machine, `gpus_per_node` what a cluster's
    nodes are taken to have. Raises `UserError` when the job has other processes than devices are asked for, when the
    nodes do not divide them, and when this machine has fewer.
    """
    job = job_of(environ)
    if devices in ("auto", -1, "-1"):
        here = available if accelerator != "cpu" else 1
        devices = job.tasks if job else here * (num_nodes or 1)
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices={devices}: give a count of at least 1, or auto")
    unit = "GPU" if accelerator != "cpu" else "CPU process"
    if job:
        _check_job(job, devices, num_nodes, available if accelerator != "cpu" else None)
        return Layout(accelerator, devices // job.nodes, job.nodes, _words(devices, unit, job.nodes, f" ({job.name})"))
    if num_nodes and devices % num_nodes:
        raise UserError(
            f"trainer.devices={devices}: the total does not divide by trainer.num_nodes={num_nodes}; take "
            f"trainer.devices={-(-devices // num_nodes) * num_nodes}, or leave trainer.num_nodes out"
        )
    nodes = num_nodes or 1
    is_one_of_several = nodes > 1 and "NODE_RANK" in environ and "MASTER_ADDR" in environ  # started by hand on each
    if devices // nodes > available or (nodes > 1 and not is_one_of_several):
        raise _too_many(accelerator, devices, num_nodes, available, environ, gpus_per_node, is_cpu_by_choice)
    return Layout(accelerator, devices // nodes, nodes, _words(devices, unit, nodes, ""))


def _words(devices: int, unit: str, nodes: int, where: str) -> str:
    if devices == 1:
        return ""
    units = f"{devices} {unit}{'es' if unit.endswith('s') else 's'}"
    return f"{units} = {nodes} node{'s' if nodes > 1 else ''} x {devices // nodes}{where}"


def _check_job(job: Job, devices: int, num_nodes: int | None, gpus_seen: int | None) -> None:
    """Compare what is asked for with the processes that a launcher has started; `gpus_seen` None on CPUs."""
    nodes, per_node = job.nodes, job.tasks_on
    if num_nodes and num_nodes != nodes:
        raise UserError(f"trainer.num_nodes={num_nodes}: {job.name} has {nodes}; leave trainer.num_nodes out")
    if len(set(per_node)) > 1:
        held = ", ".join(map(str, per_node[:8])) + (", ..." if len(per_node) > 8 else "")
        raise UserError(
            f"trainer.devices={devices}: {job.name} has {held} tasks on its {nodes} nodes, and every node must have as "
            f"many; {job.ask(split_over_nodes(devices, max(per_node)))}"
        )
    if devices != job.tasks:
        layout = split_over_nodes(devices, -(-devices // nodes)) if devices % nodes else (nodes, devices // nodes)
        raise UserError(
            f"trainer.devices={devices}: {job.name} has {job.tasks} task{'s' if job.tasks > 1 else ''} ({nodes} "
            f"node{'s' if nodes > 1 else ''} x {per_node[0]}), one a device; set trainer.devices={job.tasks}, "
            f"or {job.ask(layout)}"
        )
    if gpus_seen is None:
        return
    if job.gpus_here is not None and job.gpus_here < per_node[0]:
        raise UserError(
            f"trainer.devices={devices}: {job.name} has {per_node[0]} tasks a node and only {job.gpus_here} of its "
            f"GPUs; submit it with --gpus-per-node={per_node[0]}"
        )
    if gpus_seen < per_node[0]:
        raise UserError(
            f"trainer.devices={devices}: a task sees {gpus_seen} GPU{'s' if gpus_seen != 1 else ''} and its node has "
            f"{per_node[0]} tasks; give all tasks of a node all its GPUs: --gpus-per-node={per_node[0]}, and neither "
            "--gpus-per-task nor --gpu-bind"
        )


def _too_many(
    accelerator: str, devices: int, num_nodes: int | None, available: int, environ, gpus_per_node: int, cpu_chosen: bool
) -> UserError:
    """Word what this machine lacks, and the command that asks a cluster for it."""
    has = f"{available} GPU{'s' if available != 1 else ''}"
    if accelerator == "cpu":
        cores = f"{available} CPU core{'s' if available != 1 else ''}"
        has = cores if cpu_chosen else f"0 GPUs and {cores}"
    here = f"trainer.devices={max(1, available)}" if accelerator != "cpu" or cpu_chosen else "trainer.devices=1"
    if int(environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1"))) > 1:
        return UserError(
            f"trainer.devices={devices}: this machine has {has}; the SLURM job has more nodes, but this was not "
            f"started on them: srun --ntasks-per-node={gpus_per_node} python train.py ..., or set {here}"
        )
    nodes, per_node = (num_nodes, devices // num_nodes) if num_nodes else split_over_nodes(devices, gpus_per_node)
    asked = f"trainer.devices={devices}" + (f" trainer.num_nodes={num_nodes}" if num_nodes else "")
    lack = f"this machine has {has}"
    is_cpu = accelerator == "cpu" and cpu_chosen
    message = (
        f"{asked}: {lack}; take {here} here, or submit {nodes} node{'s' if nodes > 1 else ''} x {per_node}: "
        f"{sbatch_command(nodes, per_node, on_gpus=not is_cpu)}"
    )
    words = _words(devices, "CPU process" if is_cpu else "GPU", nodes, "")
    return NotHereError(message, Layout("cpu" if is_cpu else "gpu", per_node, nodes, words), lack)
