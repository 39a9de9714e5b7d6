"""Which points of a sweep are still to be run, and how are they handed to a launcher?

Finished points are left out, whatever the launcher; those that failed or were stopped are run again, and their runs
find their own checkpoints (`ckpt=last`). A launcher of a cluster gets them all at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from audiossl.config.secrets import mask
from audiossl.planning.jobs import is_first_process
from audiossl.sweeping import plan
from audiossl.sweeping.status import FINISHED, read_jobs

log = logging.getLogger(__name__)


def launch_points(launcher: Launcher, config: DictConfig, max_batch_size: int | None) -> list[Sequence[JobReturn]]:
    """Run the points that this process is to run and that are not finished; returns what the launcher does, by batch.

    A signal's exit code leaves as the `SystemExit` it is, after the command that goes on. What a cluster's launcher
    raises, when a job vanished, is a line on stderr: the other points have ended, and the table is to be written.
    """
    folder = Path(config.hydra.sweep.dir)
    points = plan.planned_points(config)
    numbers = plan.chosen(config, len(points))
    if is_first_process():
        plan.write_record(folder, points, config)
        with plan.locked(folder):
            OmegaConf.save(OmegaConf.create(mask(OmegaConf.to_container(config))), folder / "multirun.yaml")
    if plan.is_going_on(config):
        done = {number for number, job in read_jobs(folder, points).items() if job["status"] == FINISHED}
        if skipped := [number for number in numbers if number in done]:
            log.info("%d of %d points are finished already: %s", len(skipped), len(points), _ranges(skipped))
        numbers = [number for number in numbers if number not in done]
    size = max_batch_size or len(points)
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    try:
        return [returned for batch in batches for returned in _launched(launcher, config, points, batch)]
    except (SystemExit, KeyboardInterrupt):
        if is_first_process() and plan.array_task(config) is None:
            print(f"the sweep has stopped; to go on: {plan.command_for(folder)}", file=sys.stderr)
        raise


def _launched(
    launcher: Launcher, config: DictConfig, points: Sequence[Sequence[str]], numbers: list[int]
) -> list[Sequence[JobReturn]]:
    if type(launcher).__name__ == "BasicLauncher":
        return [launcher.launch([points[number]], initial_job_idx=number) for number in numbers]
    subdir = str(OmegaConf.to_container(config.hydra.sweep)["subdir"])
    named = []
    for number in numbers:  # a launcher counts on from one number
        place = subdir.replace("${hydra.job.num}", str(number))
        named.append([*points[number]] + ([f"hydra.sweep.subdir='{place}'"] if place != subdir else []))
    try:
        return [launcher.launch(named, initial_job_idx=numbers[0])]
    except Exception as error:
        print(f"a job did not end by itself: {type(error).__name__}: {error}", file=sys.stderr)
        return []


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers shortly: 0-3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
