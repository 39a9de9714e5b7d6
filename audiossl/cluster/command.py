"""What does a job run, and in which folder, so that it finds itself again after a requeue?

The command line is composed and checked as the entry point itself does, before any rank starts. What a job needs in
order to go on is added: `ckpt=last`, the number of devices, a sweep's folder that does not change with the time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiossl.cluster.allocation import Allocation
from audiossl.config.cli import CONF, first_lines
from audiossl.config.commands import refuse_plan_of
from audiossl.config.overrides import Composer, has_key, settle_runtime
from audiossl.config.settings import check
from audiossl.config.specs import SPECS
from audiossl.errors import UserError


@dataclass(frozen=True)
class Command:
    """Say what every rank runs: an entry point and its `arguments`, the run's `folder`, its shards by their keys.

    `damaged_shards` is what the run does about damaged ones: stop or skip.
    """

    program: Path
    arguments: tuple[str, ...]
    folder: Path
    shards: dict[str, str]
    damaged_shards: str = "stop"


def settle(program: str, arguments: list[str], job: Allocation) -> Command:
    """Check a command line and add what the job needs; raises UserError in a line for what is wrong.

    In an array job a sweep (`-m`) is its task's point alone; elsewhere one job runs all of them, one after the other.
    """
    path = Path(program).resolve()
    if path.stem not in SPECS:
        raise UserError(f"{program}: is none of {', '.join(f'{name}.py' for name in SPECS)}")
    if not path.is_file():
        raise UserError(
            f"{program}: is not in {path.parent}, where you submitted; submit from the repository, or give the whole "
            f"path: {CONF.parent / path.name}"
        )
    is_sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if odd := next((word for word in overrides if word.startswith("-")), None):
        raise UserError(f"{odd}: a job takes KEY=VALUE, and -m for a sweep")
    if job.array and not is_sweep:
        raise UserError("an array job runs a point of a sweep each: give -m and several values, or no --array")
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    added = []
    if is_sweep and not job.array and "hydra.sweep.dir" not in given:
        added.append(f"hydra.sweep.dir=runs/sweep_{job.job_id}")
    number = job.array[1] if job.array else 0
    cfg = _compose(path.stem, overrides + added, is_sweep, number)
    if "ckpt" in cfg and "ckpt" not in given and cfg.ckpt is None:
        added.append("ckpt=last")
    added += _devices(path.stem, cfg, job, is_given="trainer.devices" in given)
    folder = settle_runtime(cfg, number)  # of a single run
    if is_sweep:
        folder = f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" if job.array else str(cfg.hydra.sweep.dir)
    else:
        _refuse_clock(cfg)
    HydraConfig.instance().cfg = None
    flag = ("-m",) * is_sweep
    damaged = str(OmegaConf.select(cfg, "data.damaged_shards", default="stop"))
    return Command(path, (*flag, *overrides, *added), Path(folder).resolve(), _shards(cfg), damaged)


def _compose(name: str, overrides: list[str], is_sweep: bool, number: int) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=name):
            composer = Composer(name, SPECS[name], [], is_sweep)
            jobs = composer.jobs(overrides)
            first = next(jobs)
            found = first if number == 0 else next(itertools.islice(jobs, number - 1, None), None)
            if found is None:
                last = len(composer.points) - 1
                raise UserError(f"--array: the sweep has no point {number}; submit it with --array=0-{last}")
            check(found, SPECS[name])
            if found.get("dry_run"):
                refuse_plan_of(name)  # before the run's folder is made
            return found
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(first_lines(error)[:300]) from error


def _devices(name: str, cfg: DictConfig, job: Allocation, is_given: bool) -> list[str]:
    """Train on all tasks of the job; raises UserError where another number is asked for, or only one is of use."""
    if not has_key(cfg, "trainer.devices"):
        if job.tasks > 1:  # each would do all of it, and write the same files
            gpus = min(1, job.gpus_per_node)
            raise UserError(
                f"the job has {job.tasks} tasks, and {name}.py runs on one; submit with --nodes=1 --ntasks-per-node=1 "
                f"--gpus-per-node={gpus}"
            )
        return []
    devices = cfg.trainer.devices
    if not is_given and devices in (1, "auto") and job.tasks > 1:
        return [f"trainer.devices={job.tasks}"]
    if isinstance(devices, int) and devices not in (-1, job.tasks):
        raise UserError(
            f"trainer.devices={devices}: the job has {job.tasks} tasks, {len(job.nodes)} nodes x {job.tasks_per_node}; "
            "submit with other --nodes and --ntasks-per-node, or leave it out"
        )
    return []


def _refuse_clock(cfg: DictConfig) -> None:
    """Refuse a folder named by the time: a requeued job would not find it."""
    places = (cfg.hydra.run._get_node("dir"), cfg._get_node("name") if "name" in cfg else None)
    if any("${now:" in str(node._value()) for node in places if node is not None):
        raise UserError("hydra.run.dir: a folder named by the time is another one after a requeue; give name=...")


def _shards(cfg: DictConfig) -> dict[str, str]:
    """Collect where the run reads shards from, by key."""
    data = cfg.get("data") if isinstance(cfg.get("data"), DictConfig) else None
    if data is None:
        return {}
    found = {"data.shards": data.get("shards")}
    sources = data.get("sources")
    for name in sources or {}:
        found[f"data.sources.{name}.shards"] = OmegaConf.select(sources, f"{name}.shards")
    return {key: str(value) for key, value in found.items() if value}
