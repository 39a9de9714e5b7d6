"""What happens in one run of `train.py`?

Build front end, method and data from the resolved config, find out where to start from (a checkpoint, other weights,
nothing), train, then leave in the run's folder what a reader wants: checkpoints, the encoder, pictures, sound, scores.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from audiossl.checkpointing import Checkpointing, resolve_ckpt
from audiossl.checkpoints.files import step_of
from audiossl.checkpoints.generators import seed_generators
from audiossl.checkpoints.preemption import Preemption
from audiossl.checkpoints.runlock import locked
from audiossl.checkpoints.signals import PREEMPTED, Preempted
from audiossl.config.commands import check_global_batch
from audiossl.config.secrets import mask
from audiossl.config.settings import instantiate
from audiossl.errors import UserError
from audiossl.loading.ledger import Accounts
from audiossl.optim import OptimSettings
from audiossl.parts.blocks import choose_ways
from audiossl.parts.memory import Memory
from audiossl.pretraining import Pretraining
from audiossl.probes.intraining import Probe, ProbeCallback
from audiossl.running import report
from audiossl.running.alarm import CollapseAlarm
from audiossl.running.averaging import Averaging
from audiossl.running.build import check_same_run, method_from_config, needs_labels, start_from, takes_classes
from audiossl.running.callbacks import Forensics, Pictures, Progress, Rows, Throughput
from audiossl.running.classscores import score_classes_of
from audiossl.running.devices import Layout, layout_of
from audiossl.running.lastwords import LastWords, users_errors_of_all_ranks
from audiossl.running.loggers import MetricsCsv, build_loggers
from audiossl.running.provenance import provenance_of
from audiossl.running.ranks import others_wait
from audiossl.running.rundata import RunData, crop_samples, max_steps_of
from audiossl.running.stopping import EarlyStopping
from audiossl.running.trace import Trace
from audiossl.running.trainer import build_trainer
from audiossl.sharded.stage_three import has_whole_weights, put_together
from audiossl.sharded.topology import check_layout
from audiossl.shards import ShardData
from audiossl.weights.origins import join_licences

log = logging.getLogger(__name__)

PASST_SHARES = "optim.warmup_ratio=0.04 optim.ramp_down=[0.4,0.4]"  # 5, 50 and 50 of some 130 epochs


def fit(config: dict[str, Any], *, prepare: Callable[[nn.Module], None] | None = None) -> dict[str, Any]:
    """Train as `config` (plain, resolved, checked) says; give the results that `results.json` holds.

    Without the sections `probe`, `alarm` and `pictures` there is none. `prepare` is shown the method first.
    Raises `UserError` for what the user can mend, `Preempted` (a `SystemExit` with code 75 or 130) when asked to leave.
    """
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        return _fit(config, run_dir, prepare)


def _fit(config: dict[str, Any], run_dir: Path, prepare: Callable[[nn.Module], None] | None) -> dict[str, Any]:
    started = time.time()
    _quieten()
    layout = layout_of(config["trainer"], gpus_per_node=config.get("assume", {}).get("gpus_per_node", 8))
    data, method, vocabulary = _build(config, run_dir)
    (prepare or _as_it_is)(method)
    choose_ways(method, config["trainer"], layout.accelerator)
    global_batch = _global_batch(config, data, layout)
    max_steps = max_steps_of(config["trainer"], data.clips_per_epoch, global_batch)
    optim = warmed_up(OptimSettings(**config["optim"]), data.clips_per_epoch / global_batch, max_steps)
    provenance = provenance_of(config, data.corpus_hash) | {"global_batch": global_batch, "vocabulary": vocabulary}
    ckpt = _start(config, method, run_dir, provenance, layout.devices * layout.num_nodes)
    module, run_data = _module(config, method, data, optim, max_steps)
    probe = _probe(config.get("probe"))
    clips = data.example_clips(config["pictures"]["clips"]) if hasattr(method, "reconstruct") else []
    loggers = build_loggers(**mask(config["logger"]), run_dir=run_dir, name=mask(config["name"]))
    accounts = Accounts(data.bad_clips, held_out=data.held_out)
    averaging = Averaging(**config["swa"], steps_per_epoch=data.clips_per_epoch / global_batch, max_steps=max_steps)
    classes = score_classes_of(method, data, vocabulary, run_dir, averaging.averages)
    memory = [Memory(run_data.replay)] if hasattr(method, "memory") else []
    stopping = EarlyStopping(**config["stopping"], metric=config["checkpoint"]["metric"], folder=run_dir)
    first = [accounts, *memory, averaging, *classes, stopping]
    callbacks = first + _callbacks(config, method, run_dir, clips, probe, provenance, loggers[0])
    trainer = build_trainer(config, layout, max_steps, loggers, callbacks, has_validation=data.num_validation_clips > 0)
    if trainer.is_global_zero:
        _write_provenance(run_dir, config, provenance)
        report.announce(log, method, data, layout, max_steps, global_batch, run_dir)
    loggers[0].start_at(0 if ckpt is None else step_of(ckpt))
    with users_errors_of_all_ranks(callbacks):
        trainer.fit(module, run_data, ckpt_path=ckpt, weights_only=True)
    if trainer.global_step < max_steps and not stopping.has_stopped:
        log.warning("stopped at step %d of %d; ckpt=last goes on", trainer.global_step, max_steps)
        raise Preempted(PREEMPTED)
    results = {"status": "finished", "steps": trainer.global_step, "seconds": time.time() - started}
    results["flops_per_clip"] = next(c.flops_per_clip for c in callbacks if isinstance(c, Throughput))
    results |= accounts.add_up()
    for scores in classes:
        scores.complete(trainer, module, run_data.val_dataloader)
    with others_wait():
        if trainer.is_global_zero:
            about = (config, run_dir, clips, probe, trainer.global_step, classes, vocabulary)
            results |= report.finish(put_together(method, config, vocabulary), averaging.averages(), *about)
            report.reconcile(log, results)
            _write_json(run_dir / "results.json", results)
    return results


def _as_it_is(method: nn.Module) -> None:
    """Change nothing."""


def _global_batch(config: dict[str, Any], data: ShardData, layout: Layout) -> int:
    """Count the clips of an optimiser step on all devices; raises `UserError` where the config asks for others."""
    accumulate = config["trainer"]["accumulate_grad_batches"]
    sizes = {"data.batch_size": data.batch_size, "trainer.accumulate_grad_batches": accumulate}
    check_global_batch({"global_batch": config.get("global_batch"), "trainer.devices": layout.total, **sizes})
    return data.batch_size * accumulate * layout.total


def _probe(settings: dict[str, Any] | None) -> ProbeCallback | None:
    return ProbeCallback(probe=Probe(**settings)) if settings and settings["shards"] is not None else None


def _build(config: dict[str, Any], run_dir: Path) -> tuple[ShardData, nn.Module, list[str] | None]:
    """Build front end, data and method; the vocabulary is None for a method that wants to know of none."""
    frontend = instantiate(config["frontend"])
    with_labels = needs_labels(config)
    data = ShardData(**config["data"], default_rate_hz=frontend.rate_hz, run_dir=run_dir, needs_labels=with_labels)
    vocabulary = data.index.vocabulary if with_labels or takes_classes(config) else None
    seed_generators(config["seed"])  # the initial weights, and what users' callbacks draw
    return data, method_from_config(config, frontend=frontend, vocabulary=vocabulary), vocabulary


def _module(
    config: dict[str, Any], method: nn.Module, data: ShardData, optim: OptimSettings, max_steps: int
) -> tuple[Pretraining, RunData]:
    """Wrap the method for the trainer, and the data in crops as long as the method wants."""
    sizes = dict(batch_size=data.batch_size, waveform_rate_hz=data.rate_hz)
    module = Pretraining(method, optim=optim, max_steps=max_steps, **sizes, seed=config["seed"])
    samples = crop_samples(config["data"], method, data.rate_hz)
    return module, RunData(data, max_steps=max_steps, seed=config["seed"], crop_samples=samples)


def _start(config: dict[str, Any], method, run_dir: Path, provenance: dict[str, Any], num_ranks: int) -> Path | None:
    """Find the checkpoint to resume from, else load the weights to start from; note their origin in `provenance`."""
    ckpt = resolve_ckpt(config["ckpt"], run_dir)
    if ckpt is not None:
        check_layout(ckpt, config["trainer"]["strategy"], num_ranks)
        saved = check_same_run(ckpt, config, provenance)
        provenance |= {key: saved.get(key) for key in ("init", "licence")}
        return ckpt
    if config["init"]:
        provenance |= start_from(method, config)
    taught = getattr(method, "teacher_description", {}).get("licence")
    provenance["licence"] = join_licences(provenance["licence"], taught)
    return ckpt


def _quieten() -> None:
    """Let Lightning speak through our log only, and only when something is wrong; its advertising is left out."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    if not os.environ.get("SLURM_JOB_ID"):  # inside a job it is worth hearing
        warnings.filterwarnings("ignore", r"The `srun` command is available on your system but is not used")
    warnings.filterwarnings("ignore", r".*LeafSpec.*|.*not resumable.*|.*does not have many workers.*")


def warmed_up(optim: OptimSettings, steps_per_epoch: float, max_steps: int) -> OptimSettings:
    """Put the schedule's lengths into steps; raises `UserError` for a warm-up longer than the run."""
    settled = optim.in_steps(steps_per_epoch, max_steps)
    if settled.warmup_steps > max_steps:
        shares = "optim.warmup_ratio=0.1" if optim.ramp_down is None else PASST_SHARES
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs} is {settled.warmup_steps:g} steps here, more than the run's "
            f"{max_steps}; for a short one take optim.warmup_epochs=null {shares}"
        )
    return settled


def _callbacks(
    config: dict[str, Any],
    method: nn.Module,
    run_dir: Path,
    clips: list,
    probe: ProbeCallback | None,
    provenance: dict[str, Any],
    metrics: MetricsCsv,
) -> list:
    if not has_whole_weights(config, method):
        clips, probe = [], None
    about = mask({"config": config, "provenance": provenance})
    checkpoint = Checkpointing(**config["checkpoint"], folder=run_dir / "checkpoints", provenance=about)
    callbacks = [
        LastWords(run_dir, config["trainer"]["timeout_seconds"]),
        Throughput(config["trainer"]["log_every_n_steps"]),
        Forensics(run_dir),
        Rows(metrics),
        *([CollapseAlarm(**config["alarm"])] if "alarm" in config else []),
        checkpoint,
        Preemption(checkpoint),
    ]
    if config["trainer"].get("enable_progress_bar", True):
        callbacks.append(Progress(refresh_rate=5))
    if config["trace"]:
        callbacks.append(Trace(run_dir))  # before the pictures, which use the encoder too
    if clips:
        every_steps = config["pictures"]["every_steps"]
        callbacks.append(Pictures(every_steps=every_steps, clips=clips, folder=run_dir / "pictures"))
    return callbacks + ([] if probe is None else [probe])


def _write_provenance(run_dir: Path, config: dict[str, Any], provenance: dict[str, Any]) -> None:
    (run_dir / "config.yaml").write_text(yaml.safe_dump(mask(config), sort_keys=False))
    _write_json(run_dir / "provenance.json", mask(provenance))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
