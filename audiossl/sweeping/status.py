"""What has become of each point of a sweep?

Every point has a folder below the sweep's, found by the overrides that Hydra wrote into it; one of another sweep, which
somebody has put there, names another place. `results.json` says how it ended. A point that a kill or a pre-emption
stopped has none, and goes on when the sweep does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from audiossl.sweeping.plan import Overrides, as_dict, what_counts

FINISHED = "finished"
MISSING = "missing"
STOPPED = "no results"
Job = dict[str, Any]


def read_jobs(folder: Path, points: Sequence[Sequence[str]] | None = None) -> dict[int, Job]:
    """Read what every point asked for and what came out of it, by number.

    Without `points` the folders say which there are. A job has overrides and status, and, once it has ended, what its
    results say: loss, scores, seconds.
    """
    planned = [as_dict(point) for point in points or ()]
    jobs: dict[int, Job] = {n: {"overrides": overrides, "status": MISSING} for n, overrides in enumerate(planned)}
    counting = what_counts(planned)
    for path in sorted(folder.rglob(".hydra/overrides.yaml")):
        number = _number(path, planned, counting) if _is_of(folder, path.parent) else None
        if number is not None:
            jobs[number] = _read_job(path.parent.parent)
    return dict(sorted(jobs.items()))


def has_ended(job: Job) -> bool:
    """Tell whether a point has finished or failed, so that nothing more comes of it by itself."""
    return job["status"] not in (MISSING, STOPPED)


def forget_failure(folder: Path) -> None:
    """Let a point that failed before count as running, now that it does."""
    path = folder / "results.json"
    if path.is_file() and _results_in(path).get("status", "failed") == "failed":
        path.unlink()


def _is_of(folder: Path, hydra: Path) -> bool:
    """Tell whether a run lies where the sweep in `folder` has put it, as far as its own `hydra.yaml` says."""
    try:
        about = OmegaConf.load(hydra / "hydra.yaml")
        if OmegaConf.select(about, "hydra.mode") == "RUN":
            return False
        place = OmegaConf.select(about, "hydra.sweep.subdir")
    except (OmegaConfBaseException, yaml.YAMLError, OSError):  # named by what is no part of it, or just being written
        return True
    return place is None or hydra.parent == folder / str(place)


def _number(path: Path, planned: Sequence[Overrides], counting: Callable[[Mapping[str, str]], Overrides]) -> int | None:
    """Find the point that a folder belongs to: the one it is named after, else the first that asked for the same."""
    if not planned:
        about = yaml.safe_load(path.with_name("hydra.yaml").read_text(encoding="utf-8"))
        return int(about["hydra"]["job"]["num"])
    try:
        overrides = counting(as_dict(yaml.safe_load(path.read_text(encoding="utf-8")) or []))
    except yaml.YAMLError:  # another task of an array is writing it
        return None
    keys, name = list(map(counting, planned)), path.parent.parent.name
    if name.isdecimal() and int(name) < len(keys) and keys[int(name)] == overrides:
        return int(name)
    return keys.index(overrides) if overrides in keys else None


def _results_in(path: Path) -> dict[str, Any]:
    """Read a point's results; of a file that lost power has left empty, none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_job(folder: Path) -> Job:
    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
    job: Job = {"overrides": as_dict(overrides), "status": STOPPED, "folder": folder}
    path = folder / "results.json"
    if path.exists():
        results = _results_in(path)
        if "status" not in results:
            return job
        if results["status"] == FINISHED and (folder / "finetune.yaml").exists() and "format" not in results:
            return job  # trained, and not yet tested
        scores = {k: v for k, v in (results.get("scores") or {}).items() if isinstance(v, int | float)}
        job |= {k: v for k, v in results.items() if k in ("loss", "seconds", "status")} | {"scores": scores}
        job["status"] += f": {results['error']}" if results.get("error") else ""
    return job
