"""Which points does a sweep have, and which of them does this process run?

A point is one combination of the values given, by its number in Hydra's order. All points, those that
`hydra.sweeper.only` names, or, in a SLURM array job, the one of its index: every task of the array has the same
command line, composes the same points and takes its own. The plan is kept in the sweep's folder (`sweep.json`), so
that whoever goes on with it goes on with the same points.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from audiossl.config.overrides import combinations, is_grid
from audiossl.config.secrets import mask
from audiossl.errors import UserError

log = logging.getLogger(__name__)

RECORD = "sweep.json"
OURS = ".PointSweeper"
MAY_CHANGE = (  # between the parts of a sweep that is run in parts
    "ckpt",
    *("data.num_workers", "data.cache_mb", "data.cache_dir", "data.cache_gb", "data.timeout_seconds", "data.resident"),
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.enable_progress_bar"),
    *("probe.device", "probe.cache_dir", "probe.cache_gb"),
)
Overrides = dict[str, str]


def planned_points(config: DictConfig) -> list[tuple[str, ...]]:
    """List the overrides of every point of a grid, in Hydra's order; other sweepers choose as they go: none."""
    if not is_grid(config):
        return []
    parser = OverridesParser.create()
    texts = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    last = {o.get_key_element(): o for o in parser.parse_overrides(texts + list(config.hydra.overrides.task))}
    return list(combinations(list(last.values()), every=True))


def is_ours(config: DictConfig) -> bool:
    """Tell whether the sweeper is `PointSweeper`, which goes on with sweeps and shares them out."""
    return str(config.hydra.sweeper._target_).endswith(OURS)


def as_dict(overrides: Sequence[str]) -> Overrides:
    """Split `+key=value` texts into keys without prefix and values, secrets masked as they are where it is kept."""
    return {key.lstrip("+~"): value for key, _, value in (text.partition("=") for text in mask(overrides))}


def what_counts(points: Sequence[Overrides]) -> Callable[[Mapping[str, str]], Overrides]:
    """Give a function that leaves out of a point's overrides what may change between the parts of a sweep."""
    swept = {key for point in points for key, value in point.items() if value != points[0].get(key)}
    free = set(MAY_CHANGE) - swept

    def counting(overrides: Mapping[str, str]) -> Overrides:
        return {k: v for k, v in overrides.items() if k not in free and not k.startswith(("hydra.", "hydra/"))}

    return counting


def array_task(config: DictConfig) -> int | None:
    """Give the index within the SLURM array that this process belongs to, where the sweep is shared out by it."""
    sweeper = config.hydra.sweeper
    text = os.environ.get("SLURM_ARRAY_TASK_ID")
    if not text or not is_ours(config) or not sweeper.get("by_array", True):
        return None
    if sweeper.get("only") is not None:
        raise UserError("hydra.sweeper.only: an array job runs the point of its index; choose with sbatch --array=...")
    return int(text)


def chosen(config: DictConfig, num_points: int) -> list[int]:
    """List the numbers of the points that this process runs; raises `UserError` for one that there is not."""
    task, only = array_task(config), config.hydra.sweeper.get("only")
    if task is not None:
        if not 0 <= task < num_points:
            raise UserError(
                f"SLURM_ARRAY_TASK_ID={task}: the sweep has {num_points} points; submit it with "
                f"--array=0-{num_points - 1}"
            )
        return [task]
    for number in only or ():
        if not isinstance(number, int) or not 0 <= number < num_points:
            raise UserError(f"hydra.sweeper.only: {number} is no point of the sweep; it has 0 to {num_points - 1}")
    return list(range(num_points)) if only is None else sorted(set(only))


def array_has_ended(numbers: Collection[int], environ: Mapping[str, str]) -> bool:
    """Tell whether no task of this SLURM array has still to end, where `numbers` are the points that have ended.

    An array may have fewer tasks than the sweep has points, the others being none of its business.
    """
    texts = [environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("MIN", "MAX", "COUNT")]
    if not all(text.isdecimal() for text in texts):
        return False
    first, last, count = map(int, texts)
    return sum(first <= number <= last for number in numbers) >= count


def is_going_on(config: DictConfig) -> bool:
    """Tell whether a sweep that is there may be gone on with: asked for by `ckpt`; probes keep nothing half done."""
    return "ckpt" not in config or config.ckpt is not None


def check_sweep(config: DictConfig, points: Sequence[Sequence[str]]) -> None:
    """Raise `UserError` where the sweep's folder holds another sweep, or this one without being asked to go on."""
    folder = Path(config.hydra.sweep.dir)
    numbers = chosen(config, len(points))
    before = read_record(folder)
    if before is None:
        return
    if array_task(config) is None and not is_going_on(config):
        raise UserError(f"{folder}: holds a sweep already; give another hydra.sweep.dir=..., or go on with ckpt=last")
    old, new = ([as_dict(point) for point in plan] for plan in (before["points"], points))
    old, new = (list(map(what_counts(plan), plan)) for plan in (old, new))
    if old != new:
        differing = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        raise UserError(
            f"{folder}: holds a sweep of {len(old)} other points (this one has {len(new)}; they differ from number "
            f"{differing} on); repeat its command, or give another hydra.sweep.dir=..."
        )
    if is_going_on(config):
        return
    own = folder / str(numbers[0])
    if any((own / name).exists() for name in ("results.json", "config.yaml", "finetune.yaml", "checkpoints")):
        raise UserError(f"{own}: holds a run already; go on with ckpt=last, or give another hydra.sweep.dir=...")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the points and the command of the sweep in a folder; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(text, str) for point in about["points"] for text in point) and "command" in about:
            return {"takes_ckpt": True} | about
    except (ValueError, KeyError, TypeError):
        log.debug("%s cannot be read", path, exc_info=True)
    raise UserError(f"{path}: is no record of a sweep, or a broken one; give another folder, or remove it")


def write_record(folder: Path, points: Sequence[Sequence[str]], config: DictConfig) -> None:
    """Keep the points and the command; of several array jobs the first one does."""
    with locked(folder):
        if read_record(folder) is None:
            part = folder / f"{RECORD}.part"
            planned = mask([list(point) for point in points])
            about = {"command": mask(sys.argv), "takes_ckpt": "ckpt" in config, "points": planned}
            part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            part.replace(folder / RECORD)


def command_for(folder: Path, numbers: Sequence[int] | None = None) -> str:
    """Write the command line that goes on with the sweep in a folder; with `numbers` of points, with those alone."""
    about = read_record(folder)
    if about is None:
        return ""
    ours = ("ckpt=", "hydra.sweep.dir=", "hydra.sweeper.only=")
    words = [word for word in about["command"] if not word.lstrip("+").startswith(ours)]
    words += [f"hydra.sweep.dir={folder}"] + ["ckpt=last"] * about["takes_ckpt"]
    if numbers is not None:
        words.append(f"hydra.sweeper.only=[{','.join(map(str, numbers))}]")
    return shlex.join(["python", *words])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the sweep's own files, on any node whose file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_name() -> str:
    """Name a sweep's folder: by the array that shares it, else by the time."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"sweep_{array}" if array else time.strftime("sweep_%Y-%m-%d_%H-%M-%S")
