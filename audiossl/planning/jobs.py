"""Who has started this process, with how many others, and how would a cluster be asked for more?

SLURM and torchrun tell their processes in the environment how many there are and on which nodes. A step started by
`srun` has counts of its own, which go before the job's: without `--ntasks` a job has none. Nothing here needs torch.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from audiossl.errors import UserError

USUAL_GPUS = 8  # a node, as the header of slurm/run.sbatch asks for
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")  # before any process group exists
SHELLS = ("bash", "interactive")  # names of jobs that Lightning takes for a terminal, not for a launcher


def is_first_process() -> bool:
    """Tell whether no launcher (torchrun, srun, Lightning) has given this process a rank above 0."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)


@dataclass(frozen=True)
class Job:
    """Say what a launcher has started: on each node so many tasks; `gpus_here` of this node, None where nobody says."""

    name: str
    tasks_on: tuple[int, ...]
    gpus_here: int | None
    launcher: str

    @property
    def nodes(self) -> int:
        """Count the nodes."""
        return len(self.tasks_on)

    @property
    def tasks(self) -> int:
        """Count the tasks of all nodes."""
        return sum(self.tasks_on)

    def ask(self, layout: tuple[int, int]) -> str:
        """Say how to start (nodes, tasks a node) of them."""
        nodes, per_node = layout
        if self.launcher == "torchrun":
            return f"start torchrun with --nnodes={nodes} --nproc-per-node={per_node}"
        return f"submit it with --nodes={nodes} --ntasks-per-node={per_node} --gpus-per-node={per_node}"


def job_of(environ: Mapping[str, str]) -> Job | None:
    """Read SLURM's or torchrun's account of the processes; None where this one was started alone.

    A shell in an allocation (a job named bash or interactive) counts as alone, as it does for Lightning. Raises
    `UserError` for a job of several tasks of which only this process was started, without srun.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        world, local = int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_WORLD_SIZE", "1"))
        groups = int(environ.get("GROUP_WORLD_SIZE", max(world // local, 1)))
        others = [local] * (groups - 1) if local * groups == world else _spread(world - local, groups - 1)
        return Job("torchrun", (local, *others), None, "torchrun")
    if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in SHELLS:
        return None
    name = f"SLURM job {environ.get('SLURM_JOB_ID', '')}".strip()
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"]))
    is_step = "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    has_step_counts = "SLURM_STEP_NUM_TASKS" in environ
    is_batch_script = "SLURM_JOB_ID" in environ and "SLURMD_NODENAME" in environ and not is_step
    if is_batch_script and tasks > 1:
        raise UserError(
            f"{name}: has {tasks} tasks, and this process was started once, not by srun; start it with srun python ..."
        )
    nodes = int(environ.get("SLURM_STEP_NUM_NODES" if has_step_counts else "SLURM_NNODES", "1"))
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE" if has_step_counts else "SLURM_TASKS_PER_NODE")
    tasks_on = _expand(listed) if listed else []
    if len(tasks_on) != nodes or sum(tasks_on) != tasks:
        asked = environ.get("SLURM_NTASKS_PER_NODE", "")
        is_even = asked.isdigit() and int(asked) * nodes == tasks
        tasks_on = [int(asked)] * nodes if is_even else _spread(tasks, nodes)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    return Job(name, tuple(tasks_on), int(gpus) if gpus.isdigit() else None, "SLURM")


def _expand(listed: str) -> list[int]:
    """Write out SLURM's counts: "2(x3),1" is [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in listed.split(",")]
    return [int(m[1]) for m in parts if m for _ in range(int(m[2] or 1))] if all(parts) else []


def _spread(tasks: int, nodes: int) -> list[int]:
    """Share tasks out as evenly as they go."""
    return [tasks // nodes + (node < tasks % nodes) for node in range(nodes)]


def split_over_nodes(devices: int, gpus_per_node: int) -> tuple[int, int]:
    """Split devices into (nodes, devices a node), as full as `gpus_per_node` allows and all nodes alike."""
    per_node = max(count for count in range(1, min(devices, gpus_per_node) + 1) if devices % count == 0)
    return devices // per_node, per_node


def command_line() -> tuple[str, list[str]]:
    """Give the program and the overrides that this run was started with, as the user wrote them."""
    program = Path(sys.argv[0]).name if sys.argv[0].endswith(".py") else "train.py"
    if HydraConfig.initialized():
        return program, list(HydraConfig.get().overrides.task)
    return program, []


def sbatch_command(
    nodes: int,
    per_node: int,
    program: str | None = None,
    overrides: Sequence[str] | None = None,
    *,
    on_gpus: bool = True,
) -> str:
    """Write the command that submits this run on so many nodes; by default with the user's own program and overrides.

    The header of `slurm/run.sbatch` asks for eight GPUs and tasks a node; other counts stand in the command.
    """
    own_program, own_overrides = command_line()
    overrides = own_overrides if overrides is None else overrides
    sizes = [f"--nodes={nodes}"]
    if per_node != USUAL_GPUS:
        sizes += [f"--ntasks-per-node={per_node}"]
    if per_node != USUAL_GPUS or not on_gpus:
        sizes += [f"--gpus-per-node={per_node * on_gpus}"]
    return shlex.join(["sbatch", *sizes, "slurm/run.sbatch", program or own_program, *overrides])
