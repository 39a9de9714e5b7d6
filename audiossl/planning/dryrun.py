"""What would this run need, before any of it is spent?

`dry_run=true` builds the method and the loader that a run would have, takes a training step of one clip on the CPU, and
multiplies: operations, memory, hours, shares of the corpus, checkpoints, and the command that submits it. It works for
64 GPUs where there is none, starts no other process and leaves one file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from audiossl.config.commands import check_global_batch
from audiossl.config.settings import instantiate
from audiossl.errors import UserError
from audiossl.optim import OptimSettings
from audiossl.parts.blocks import checkpoint_blocks
from audiossl.planning import memory, table
from audiossl.planning.balance import balance_of
from audiossl.planning.cost import Cost, cost_of
from audiossl.planning.jobs import sbatch_command
from audiossl.planning.known import Known
from audiossl.planning.speed import Assumptions, decoding_rate, measure
from audiossl.running.build import method_from_config, needs_labels, takes_classes
from audiossl.running.devices import Layout, NotHereError, layout_of
from audiossl.running.rundata import crop_samples, max_steps_of
from audiossl.shards import ShardData
from audiossl.training import warmed_up

Plan = dict[str, Any]
FILE = "dry_run.json"
MEASURED = 3  # settings of a sweep whose speed is measured; that of the others follows from their operations


def show(program: str, jobs: Sequence[tuple[list[str], dict[str, Any]]]) -> int:
    """Plan the run, or each run of a sweep, print a table and write `dry_run.json`; gives the exit code.

    `jobs` are (overrides, checked config). One run's file lies in the folder it will have, which it does not keep the
    run from using; a sweep's in the sweep's folder. Raises `UserError` for what the run itself would refuse.
    """
    console, plans, known = Console(), [], Known(MEASURED)
    console = console if console.is_terminal else Console(width=120)
    for overrides, config in tqdm(jobs, desc="planning", unit="job", mininterval=1, leave=False, delay=2):
        plans.append(plan_of(config, program, overrides, known))
    folder = Path(jobs[0][1]["run_dir"])
    path = (folder if len(jobs) == 1 else folder.parent) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = plans[0] if len(plans) == 1 else {"jobs": plans, "total": table.totals(plans)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    console.print(table.of_run(plans[0]) if len(plans) == 1 else table.of_sweep(plans))
    for line in [line for plan in plans for line in plan["warnings"]] if len(plans) == 1 else ():
        console.print(f"  ! {line}", markup=False, highlight=False, soft_wrap=True)
    for what, line in (("submit", plans[0]["submit"]), ("here", plans[0]["command"]))[
        : 1 + plans[0]["devices"]["here"]
    ]:
        if len(plans) == 1:
            console.print(f"{what + ':':8}{line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def plan_of(
    config: Mapping[str, Any], program: str = "train.py", overrides: Sequence[str] = (), known: Known | None = None
) -> Plan:
    """Plan one run: plain values, as `dry_run.json` holds them (bytes, seconds and clips, where no name says else).

    What was found out for other jobs is in `known`, and is not found out again.
    """
    known = known or Known(1)
    assume, trainer = Assumptions(**config["assume"]), config["trainer"]
    layout, is_here, why = _layout(trainer, assume)
    precision = _precision(trainer["precision"], layout, is_here)
    half = torch.bfloat16 if "16" in precision else None
    frontend = instantiate(config["frontend"])
    labels = needs_labels(config)
    data, problem = _data(config["data"], frontend.rate_hz, labels)
    vocabulary = data.index.vocabulary if labels or takes_classes(config) else None
    torch.manual_seed(config["seed"])
    method = method_from_config(dict(config), frontend=frontend, vocabulary=vocabulary)
    if trainer["checkpoint_activations"]:
        checkpoint_blocks(method)
    crop = crop_samples(config["data"], method, data.rate_hz)
    samples = -(-crop * frontend.rate_hz // data.rate_hz)
    ways = (precision, trainer["checkpoint_activations"])
    heard = (config["model"], config["frontend"], samples, len(vocabulary or ()), *ways)
    num_classes = len(vocabulary) if labels else None
    cost = known.once(("cost", *heard), lambda: cost_of(method, samples=samples, num_classes=num_classes, half=half))
    sizes, run = memory.sizes_of(method), _run(config, data, layout, assume.clips)
    needed = memory.memory_of(
        sizes, cost, batch_size=data.batch_size, devices=layout.total, optim=config["optim"],
        strategy=trainer["strategy"], is_half=half is not None, remembered_bytes=memory.remembered_bytes(method),
    )  # fmt: skip
    order, shares = data.order(config["seed"]), dict(devices=layout.total, workers=data.num_workers)
    shares |= dict(batch_size=data.batch_size, accumulate=trainer["accumulate_grad_batches"])
    plan: Plan = {
        "name": config["name"],
        "method": type(method).__name__,
        "command": f"python {program} {' '.join(_without_dry_run(overrides))}".strip(),
        "overrides": list(overrides),
        "devices": asdict(layout) | {"total": layout.total, "here": is_here, "why": why, "precision": precision},
        "parameters": {name: getattr(sizes, name) for name in ("encoder", "whole", "trained")},
        "clip": asdict(cost),
        "run": run,
        "memory": _memory(needed, cost, data.batch_size, layout, is_here, assume),
        "balance": asdict(balance_of(order, data.index.shard[data.clips], **shares)),
        "checkpoint": _checkpoint(config, memory.checkpoint_bytes(method, sizes, config["optim"])),
        "submit": sbatch_command(
            *(layout.num_nodes, layout.devices, program, _without_dry_run(overrides)),
            on_gpus=layout.accelerator != "cpu",
        ),
    }
    plan["speed"] = _speed(config, method, data, cost, layout, assume, is_here, half, crop, precision, heard, known)
    plan["time"] = _time(run, plan["speed"], layout)
    return plan | {"warnings": problem + table.warnings_of(plan)}


def _data(settings: dict[str, Any], rate_hz: int, needs_labels: bool) -> tuple[ShardData, list[str]]:
    """Open the corpus; one too small to hold clips out, which may stand for another, is planned without."""
    how = dict(default_rate_hz=rate_hz, run_dir=None, needs_labels=needs_labels)
    try:
        return ShardData(**settings, **how), []
    except UserError as error:
        if not str(error).startswith("data.validation_clips="):
            raise
        return ShardData(**settings | {"validation_clips": 0}, **how), [f"{error}; planned without, and refused later"]


def _without_dry_run(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if text.lstrip("+").partition("=")[0] != "dry_run"]


def _layout(trainer: Mapping[str, Any], assume: Assumptions) -> tuple[Layout, bool, str]:
    """Lay the devices out as the run would, or as a cluster would where they are not here: (layout, here, why not)."""
    try:
        return layout_of(trainer, gpus_per_node=assume.gpus_per_node), True, ""
    except NotHereError as error:
        return error.layout, False, error.lack


def _precision(asked: str, layout: Layout, is_here: bool) -> str:
    if asked != "auto":
        return str(asked)
    if layout.accelerator == "cpu":
        return "32-true"
    return "bf16-mixed" if not is_here or torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _run(config: Mapping[str, Any], data: ShardData, layout: Layout, assumed_clips: int | None) -> dict[str, Any]:
    accumulate = config["trainer"]["accumulate_grad_batches"]
    global_batch = data.batch_size * accumulate * layout.total
    sizes = {"data.batch_size": data.batch_size, "trainer.accumulate_grad_batches": accumulate}
    check_global_batch({"global_batch": config.get("global_batch"), "trainer.devices": layout.total, **sizes})
    epoch = assumed_clips or data.clips_per_epoch
    steps = max_steps_of(config["trainer"], epoch, global_batch)
    optim = warmed_up(OptimSettings(**config["optim"]), epoch / global_batch, steps)
    return {
        "clips": data.num_clips,
        "hours_of_sound": data.hours,
        "clips_per_epoch": epoch,
        "clips_are_assumed": assumed_clips is not None,
        "batch_size": data.batch_size,
        "accumulate": accumulate,
        "global_batch": global_batch,
        "steps": steps,
        "epochs": steps * global_batch / epoch,
        "peak_lr": optim.peak_lr(global_batch),
        "warmup_steps": optim.warmup_steps,
    }


def _memory(
    parts: dict[str, int], cost: Cost, batch_size: int, layout: Layout, is_here: bool, assume: Assumptions
) -> dict[str, Any]:
    needed, has = sum(parts.values()), int(assume.memory_gb * 1e9)
    if layout.accelerator == "cpu":
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // min(layout.devices, os.cpu_count() or 1)
    elif is_here:
        has = torch.cuda.get_device_properties(0).total_memory
    each = cost.saved_bytes + cost.recomputed_bytes
    spare = has - (needed - batch_size * each)
    return {
        "parts": parts,
        "needed": needed,
        "device": has,
        "device_is": "of this machine" if is_here or layout.accelerator == "cpu" else "assume.memory_gb",
        "largest_batch_size": max(spare // each, 0) if each else None,
    }


def _speed(
    config, method, data: ShardData, cost: Cost, layout: Layout, assume: Assumptions, is_here, half, crop, precision,
    heard: tuple, known: Known,
) -> dict[str, Any]:  # fmt: skip
    how: dict[str, Any] = {"mfu": None, "peak_tflops": None, "steps": None}
    if is_here or layout.accelerator == "cpu":
        device = torch.device("cuda" if layout.accelerator != "cpu" else "cpu")
        what = dict(device=device, half=half, crop_samples=crop, seed=config["seed"])
        reading = ("reading", crop, {k: v for k, v in config["data"].items() if k != "validation_clips"})
        optimizer = config["optim"]["optimizer"]
        each, how["steps"] = known.speed(
            (heard, reading, optimizer), cost, lambda: measure(method, data, config["optim"], **what)
        )
    else:
        how |= {"mfu": assume.mfu, "peak_tflops": assume.peak(precision)}
        each = assume.clips_per_second(cost.flops_training, precision)
    decoded = known.once(
        ("decoding", crop, config["data"]["shards"], config["data"].get("sources")),
        lambda: decoding_rate(data, crop_samples=crop, seed=config["seed"]),
    )
    workers = max(data.num_workers, 1)
    at_once = layout.total if layout.accelerator != "cpu" else min(layout.total, os.cpu_count() or 1)
    rates = {"clips_per_second": each * at_once, "per_device": each}
    return rates | how | {"decoded_by_a_worker": decoded, "asked_of_a_worker": each / workers}


def _time(run: Mapping[str, Any], speed: Mapping[str, Any], layout: Layout) -> dict[str, float]:
    hours = run["steps"] * run["global_batch"] / speed["clips_per_second"] / 3600
    return {"hours": hours, "device_hours": hours * layout.total}


def _checkpoint(config: Mapping[str, Any], size: int) -> dict[str, int]:
    kept = config["checkpoint"]["keep_last"] + config["checkpoint"]["keep_best"]
    folder = Path(config["run_dir"]).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return {"bytes": size, "kept": kept, "disk": size * (kept + 1), "free": free}  # one more while it is written
