"""What happens in one run of `finetune.py`?

For every fold and seed: an index of the fold's clips, a training by the engine that `train.py` has (so that it resumes,
is pre-empted and recovers the same way), the weights of the best validation, and the test clips through them. Then one
table of all folds. A fold that is finished stays as it is when the run goes on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from audiossl.config.secrets import mask
from audiossl.errors import UserError
from audiossl.finetuning import FineTuning
from audiossl.indexing.shardpaths import QUERY_VARIABLE
from audiossl.pretrained import PretrainedEncoder
from audiossl.probes.results import differing
from audiossl.running.ranks import is_first_rank, others_wait
from audiossl.tasks import Task, load_task
from audiossl.training import fit as train
from audiossl.tuning.choosing import chosen, metric_of
from audiossl.tuning.judging import check_kind, classifier_of, judge_fold
from audiossl.tuning.predictions import ARRAYS, read_tested
from audiossl.tuning.start import Init, start_of, write_start
from audiossl.tuning.targets import ClipTargets, EventTargets
from audiossl.tuning.testing import Testing
from audiossl.tuning.writing import write_run
from audiossl.weights.export import load_encoder

log = logging.getLogger(__name__)

SETTINGS = "finetune.yaml"
DECIDING = (  # what all folds of a run have in common, also those that were finished before it was resumed
    *("init", "seed", "seeds", "evaluate", "model", "task", "frontend", "data", "optim", "swa", "stopping", "test"),
    *("trainer.max_steps", "trainer.max_epochs", "checkpoint.metric", "validate_every_steps"),
)
MAY_CHANGE = (  # besides sizes of batches and places of caches
    *("data.num_workers", "data.cache_mb", "data.timeout_seconds", "data.damaged_shards", "data.resident"),
    *("task.about", "task.published", "test.bootstrap"),
)


def fit(config: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune and test as `config` (plain, resolved, checked) says; give what `results.json` holds.

    Raises `UserError` for what the user can mend, `Preempted` (a `SystemExit` with code 75 or 130) when asked to leave.
    """
    run_dir, testing, init = Path(config["run_dir"]), Testing(**config["test"]), Init(config["init"])
    if config["ckpt"] is None or not start_of(config, run_dir, _seeds(config)[0]).exists():
        init.open()  # before the set is packed, which may take hours
    task = load_task(**config["task"])
    if config["model"]["loss"] == "auto":
        one_of_many = task.kind == "multiclass" and config["model"]["level"] == "clip"
        config["model"]["loss"] = "ce" if one_of_many else "bce"
    goes_on = _goes_on(config, task, run_dir)
    _check_test_clips(task, testing)
    if not config["evaluate"]:
        check_kind(config["model"], task)
    elif len(task.divisions) > 1:
        log.warning("evaluate=true tests every fold, also what the classifier may have learned from; see task.folds")
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        return _fit(config, task, testing, init, run_dir, goes_on=goes_on)
    except UserError:
        if is_first_rank() and not _has_begun(run_dir):
            (run_dir / SETTINGS).unlink(missing_ok=True)  # it is no run, and the mended command takes the same folder
        raise


def _seeds(config: dict[str, Any]) -> list[int]:
    return config["seeds"] or [config["seed"]]


def _fit(
    config: dict[str, Any],
    task: Task,
    testing: Testing,
    init: Init,
    run_dir: Path,
    *,
    goes_on: bool,
) -> dict[str, Any]:
    tested, seeds = [], _seeds(config)
    starts = {seed: start_of(config, run_dir, seed) for seed in seeds}
    with others_wait():
        if is_first_rank():
            for start, seed in {start: seed for seed, start in starts.items()}.items():
                write_start(config, init, start, seed, clip_seconds=usual_seconds(task), keep=goes_on)
    init.close()
    for seed, start in starts.items():
        model = load_encoder(start)
        if is_first_rank() and seed == seeds[0]:
            about = yaml.safe_dump(mask(config) | {"task_hash": task.hash}, sort_keys=False)
            (run_dir / SETTINGS).write_text(about, encoding="utf-8")
        for division in task.divisions:
            parts = [division.name] if len(task.divisions) > 1 else []
            folder = run_dir.joinpath(*parts, *([f"seed{seed}"] if len(seeds) > 1 else []))
            found = read_tested(folder, division.name, seed) if config["ckpt"] else None
            if found is None:
                if config["evaluate"]:
                    method, *known = classifier_of(config, model, task)
                else:
                    method, known = _trained(config, model, start, task, division, folder, seed, goes_on), [None, None]
                with others_wait():
                    if is_first_rank():
                        found = judge_fold(config, testing, method, *known, task, division, folder, seed)
            tested.append(found)
    return write_run(config, task, tested, run_dir, testing) if is_first_rank() else {}


def _goes_on(config: dict[str, Any], task: Task, run_dir: Path) -> bool:
    """Tell whether the folder's run goes on, so that its start and its index of clips stay.

    One that was begun with other settings, or on another set, does not, and nothing of it is taken. Raises `UserError`
    where it has trained or tested, and where such a folder is taken with ckpt=null.
    """
    path = run_dir / SETTINGS
    if config["ckpt"] is None and is_first_rank() and _has_begun(run_dir):
        raise UserError(f"{run_dir}: holds a run already; give this one a name=..., or go on with ckpt=last")
    if config["ckpt"] is None or not path.is_file():
        return False
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = differing(before, json.loads(json.dumps(mask(config))))
    changed = sorted(k for k in found if f"{k}.".startswith(tuple(f"{d}." for d in DECIDING)) and k not in MAY_CHANGE)
    is_other_set = before.get("task_hash", task.hash) != task.hash
    if (changed or is_other_set) and not _has_begun(run_dir):
        return False
    if changed:
        raise UserError(
            f"ckpt={config['ckpt']}: {run_dir} was begun with other settings ({', '.join(changed[:5])}); give this one "
            "a name=..."
        )
    if is_other_set:
        raise UserError(f"ckpt={config['ckpt']}: the clips or labels of task={task.name} have changed since {run_dir}")
    return True


def _has_begun(run_dir: Path) -> bool:
    """Tell whether a run has left anything to go on with: a checkpoint, or a fold that was tested."""
    return any(next(run_dir.rglob(left), None) is not None for left in ("checkpoints/*", ARRAYS))


def _check_test_clips(task: Task, testing: Testing) -> None:
    """Refuse to ask when things happen in clips of which nobody knows, or that are not heard whole."""
    if task.kind == "events" and testing.overlap is None:
        raise UserError("test.overlap=null: hears the middle of a clip, and events are anywhere; give 0.5")
    task.check_times()


def _trained(
    config: dict[str, Any],
    model: PretrainedEncoder,
    start: Path,
    task: Task,
    division,
    folder: Path,
    seed: int,
    goes_on: bool,
) -> FineTuning:
    """Train on a division, unless that is done, and give the method with the weights that are to be tested."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.safetensors"
    if any("://" in str(shard) and mask(str(shard)) != str(shard) for shard in task.index.shards):
        raise UserError(
            f"task={task.name}: its shards' addresses hold a secret, and this run's folder keeps an index of them; "
            f"leave it out of the address and export {QUERY_VARIABLE}, or use a .netrc"
        )
    with others_wait():
        if is_first_rank() and not (goes_on and index.exists()):
            task.shards_of(division, index)
    engine = _engine_config(config, model, start, index, folder, seed, has_validation=len(division.validation) > 0)
    engine["checkpoint"]["metric"] = metric_of(config, task, has_validation=len(division.validation) > 0)

    def prepare(method: FineTuning) -> None:
        if task.kind == "events":
            events = {key: own for key, own in zip(task.keys, task.events, strict=True) if own is not None}
            method.relabel = EventTargets(events, num_classes=len(task.classes))
        elif task.known is not None:
            judged = torch.from_numpy(np.where(task.known, task.targets, np.nan).astype(np.float32))
            method.relabel = ClipTargets(dict(zip(task.keys, judged, strict=True)))

    name = f"{division.name}, " if division.name else ""
    log.info("%s%d clips to train on, %d to validate, %d to test, %d classes", name, len(division.train),
             len(division.validation), len(division.test), len(task.classes))  # fmt: skip
    if not _is_trained(folder):
        train(engine, prepare=prepare)
    return chosen(folder, config["test"]["weights"], engine)


def usual_seconds(task: Task) -> float:
    """Say how long the clips are: all but the longest twentieth are no longer."""
    seconds = float(np.quantile(task.seconds, 0.95))
    return seconds if task.clip_seconds is None else min(seconds, task.clip_seconds)


def _engine_config(
    config: dict[str, Any], model: PretrainedEncoder, start: Path, index: Path, folder: Path, seed: int, *,
    has_validation: bool,
) -> dict[str, Any]:  # fmt: skip
    """Say a fold in the words of `train.py`, so that its checkpoints are whole without this run."""
    frontend = model.description["frontend"]
    data = config["data"] | {
        "shards": str(index),
        "sources": None,
        "split": "train",
        "validation_split": "val" if has_validation else None,
        "validation_clips": 0,
        "mean": frontend.get("mean") or 0.0,
        "std": frontend.get("std") or 1.0,
    }
    if data["crop_seconds"] is None and frontend.get("seconds") is None:
        data["crop_seconds"] = config["task"]["clip_seconds"] or _reach_seconds(model)
    same = ("trace", "root", "validate_every_steps", "optim", "trainer", "checkpoint", "swa", "stopping", "logger")
    return {name: config[name] for name in same} | {
        "name": f"{config['name']}_{folder.name}" if folder.name != config["name"] else config["name"],
        "seed": seed,
        "ckpt": "last" if config["ckpt"] else None,
        "init": str(start),
        "init_frontend": "check",
        "run_dir": str(folder),
        "model": config["model"] | {"geometry": model.encoder.geometry},
        "frontend": frontend,
        "data": data,
        "checkpoint": dict(config["checkpoint"]),
    }


def _reach_seconds(model: PretrainedEncoder) -> float:
    frames = model.encoder.geometry["frames"]
    return model.frontend.samples_for(frames) / model.rate_hz


def _is_trained(folder: Path) -> bool:
    path = folder / "results.json"  # which a failed job of a sweep leaves too
    return path.is_file() and json.loads(path.read_bytes()).get("status") == "finished"
