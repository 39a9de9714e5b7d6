"""How is a plan shown?

One table for a run: what, how much, and how it is known; one line a job for a sweep, with what all of it takes. Below
it stands what will go wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Plan = Mapping[str, Any]
ROUGH = 0.9  # of a device's memory; the rest goes to the allocator and to kernels


def of_run(plan: Plan) -> Table:
    """Tabulate one run."""
    title = f"dry run of {plan['name']} ({plan['method']}): nothing is trained"
    table = Table(title=escape(title), title_justify="left", show_lines=False)
    table.add_column("what", no_wrap=True)
    table.add_column("how much", no_wrap=True)
    table.add_column("how that is known")
    sections = (_devices, _model, _length, _memory, _speed, _data, _disk)
    for number, section in enumerate(sections):
        if number:
            table.add_section()
        for row in section(plan):
            table.add_row(*map(escape, row))
    return table


def _devices(plan: Plan) -> list[tuple[str, str, str]]:
    on = plan["devices"]
    words = on["note"] or f"1 {'GPU' if on['accelerator'] != 'cpu' else 'CPU process'}"
    where = "all here" if on["here"] else f"{on['why']}; nodes of assume.gpus_per_node or trainer.num_nodes"
    return [("devices", words, where), ("precision", on["precision"], "trainer.precision; auto: what the device has")]


def _model(plan: Plan) -> list[tuple[str, str, str]]:
    size, clip = plan["parameters"], plan["clip"]
    encoded = clip["encoded"]
    words = ", ".join(f"{name} {count}" if len(encoded) > 1 else str(count) for name, count in encoded.items())
    rows = [
        ("parameters", f"{_millions(size['trained'])} trained", f"of {_millions(size['whole'])}; the encoder has "
         f"{_millions(size['encoder'])}"),
        ("tokens a clip", f"{clip['tokens'] or '?'} seen", f"encoded: {words} (all views, with class tokens)"),
        ("a clip forward", _flops(clip["flops_forward"]), "counted in a step of one clip: matrix products, "
         "convolutions, attention"),
        ("a clip in training", _flops(clip["flops_training"]), "forward and backward"),
    ]  # fmt: skip
    return rows


def _length(plan: Plan) -> list[tuple[str, str, str]]:
    run, on = plan["run"], plan["devices"]
    product = f"data.batch_size={run['batch_size']} x {on['total']} device{'s' if on['total'] > 1 else ''}"
    product += f" x {run['accumulate']} accumulated" if run["accumulate"] > 1 else ""
    epochs = f"{run['epochs']:,.1f} epochs of {run['clips_per_epoch']:,} clips"
    epochs += " (assume.clips)" if run["clips_are_assumed"] else f" ({run['hours_of_sound']:,.1f} h)"
    rate = f"after {run['warmup_steps']:,.0f} steps of warm-up; by the global batch where optim.base_lr is set"
    return [
        ("global batch", f"{run['global_batch']:,} clips", product),
        ("steps", f"{run['steps']:,}", epochs),
        ("peak learning rate", f"{run['peak_lr']:.3g}", rate),
    ]


def _memory(plan: Plan) -> list[tuple[str, str, str]]:
    found, clip, batch = plan["memory"], plan["clip"], plan["run"]["batch_size"]
    notes = {
        "weights": "float32, counted",
        "gradients": "counted",
        "optimiser state": "counted",
        "teacher, tables": "not trained; counted",
        "DDP's buckets": "gradients on their way to the other devices",
        "clips remembered": "mixed with later ones",
        "kept for backward": f"measured on the CPU: {_bytes(clip['saved_bytes'])} a clip x {batch} + "
        f"{_bytes(clip['fixed_bytes'])}",
        "a block run again": f"trainer.checkpoint_activations; {_bytes(clip['recomputed_bytes'])} a clip x {batch}",
    }
    rows = [(f"  {name}", _bytes(size), notes[name]) for name, size in found["parts"].items()]
    share = f"{found['needed'] / found['device']:.0%} of {_bytes(found['device'])} ({found['device_is']}); "
    return [("memory a device", _bytes(found["needed"]), share + "without kernels' work space"), *rows]


def _speed(plan: Plan) -> list[tuple[str, str, str]]:
    speed, time, on = plan["speed"], plan["time"], plan["devices"]
    if speed["steps"]:
        one = "" if on["total"] == 1 else f"on one of them x {on['total']}, exchange of gradients not included; "
        how = f"measured: {speed['steps']} step{'s' if speed['steps'] > 1 else ''} here, reading included; {one}"
    else:
        how = f"ASSUMED: assume.mfu={speed['mfu']:g} of {speed['peak_tflops']:g} TFLOP/s (assume.peak_tflops"
        how += "_32)" if "16" not in on["precision"] else ")"
    hours = "GPU-hours" if on["accelerator"] != "cpu" else "core-hours"
    return [
        (
            "clips/s",
            f"{speed['clips_per_second']:,.{0 if speed['clips_per_second'] >= 10 else 1}f}",
            how.removesuffix("; "),
        ),
        ("wall time", _duration(time["hours"]), "training alone: no validation, probe or checkpoints"),
        (hours, f"{time['device_hours']:,.1f}" if time["device_hours"] >= 1 else f"{time['device_hours']:.2g}", ""),
    ]


def _data(plan: Plan) -> list[tuple[str, str, str]]:
    shares, speed = plan["balance"], plan["speed"]
    (low, high), (few, many) = shares["clips_per_worker"], shares["shards_per_worker"]
    return [
        ("clips a worker", _span(low, high), f"in the first epoch; workers in all: {shares['workers']:,}"),
        ("shards a worker", _span(few, many), f"opens of {shares['shards']:,}; clips are dealt out one by one"),
        ("a worker decodes", f"{speed['decoded_by_a_worker']:,.0f} clips/s", "measured here on one core; asked for: "
         f"{speed['asked_of_a_worker']:,.1f}"),
    ]  # fmt: skip


def _disk(plan: Plan) -> list[tuple[str, str, str]]:
    disk = plan["checkpoint"]
    kept = f"{disk['kept']} kept and one being written: {_bytes(disk['disk'])}; free here: {_bytes(disk['free'])}"
    return [("a checkpoint", _bytes(disk["bytes"]), kept)]


def of_sweep(plans: Sequence[Plan]) -> Table:
    """Tabulate the jobs of a sweep, and what they take together."""
    table = Table(title=f"dry run of {len(plans)} jobs: nothing is trained", title_justify="left", show_footer=True)
    hours = totals(plans)
    own = [set(plan["overrides"]) for plan in plans]
    common = set.intersection(*own)
    table.add_column("job", footer="all")
    table.add_column("overrides")
    for name in ("GFLOP a clip", "steps", "global batch", "memory a device"):
        table.add_column(name, justify="right")
    table.add_column("clips/s", justify="right")
    table.add_column("device-hours", justify="right", footer=f"{hours['device_hours']:,.2f}")
    for number, plan in enumerate(plans):
        words = " ".join(text for text in plan["overrides"] if text not in common)
        speed = f"{plan['speed']['clips_per_second']:,.0f}{'' if plan['speed']['steps'] else ' (assumed)'}"
        cells = [f"{plan['clip']['flops_training'] / 1e9:,.1f}", f"{plan['run']['steps']:,}"]
        cells += [f"{plan['run']['global_batch']:,}", _bytes(plan["memory"]["needed"]), speed]
        table.add_row(str(number), escape(words), *cells, f"{plan['time']['device_hours']:,.2f}")
    return table


def totals(plans: Sequence[Plan]) -> dict[str, float]:
    """Add up the hours of several runs, one after another."""
    return {name: sum(plan["time"][name] for plan in plans) for name in ("hours", "device_hours")}


def warnings_of(plan: Plan) -> list[str]:
    """Say what will go wrong, a line each, with what to change."""
    memory, disk, speed, run = plan["memory"], plan["checkpoint"], plan["speed"], plan["run"]
    found = []
    if memory["needed"] > ROUGH * memory["device"]:
        fits = int(memory["largest_batch_size"] * ROUGH)
        way = f"data.batch_size={fits} with trainer.accumulate_grad_batches would" if fits else "try trainer=deepspeed"
        found.append(f"{_bytes(memory['needed'])} will hardly fit into {_bytes(memory['device'])}: {way}")
    if disk["disk"] > disk["free"]:
        found.append(f"checkpoints need {_bytes(disk['disk'])}, and {_bytes(disk['free'])} are free: another run_dir")
    if speed["asked_of_a_worker"] > speed["decoded_by_a_worker"]:
        more = -(-speed["per_device"] // speed["decoded_by_a_worker"])
        found.append(f"the devices wait for sound: data.num_workers={more:.0f} would do, of cores like these")
    if run["global_batch"] > run["clips_per_epoch"]:
        found.append(f"a step of {run['global_batch']:,} clips is more than an epoch of {run['clips_per_epoch']:,}")
    return found


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _flops(count: float) -> str:
    return f"{count / 1e12:,.2f} TFLOP" if count >= 1e12 else f"{count / 1e9:,.2f} GFLOP"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB" if count else "0"


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours >= 1 / 30 else f"{hours * 3600:.0f} s"
