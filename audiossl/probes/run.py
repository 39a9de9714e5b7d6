"""What does `python probe.py` do, from its settings to the folder of results?

The encoder that was asked for, the same encoder untrained and the statistics of the log-mel go through the same cache
and the same heads; the table sets them side by side, with what others have published.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from audiossl.errors import UserError
from audiossl.features.source import Source
from audiossl.heads.examples import Layers, Pooling, take_layers
from audiossl.heads.fitting import NetSettings
from audiossl.probes import pictures, results
from audiossl.probes.cache import FeatureCache, name_bad
from audiossl.probes.cost import cost_of
from audiossl.probes.evaluation import Head, Judged, Reading, check_heads, judge, wanted_of
from audiossl.probes.scores import summarise
from audiossl.probes.sources import open_source
from audiossl.tasks import Task, load_task

log = logging.getLogger(__name__)
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold the section `probe` of conf/probe.yaml, which explains every key."""

    heads: list[Literal["linear", "knn", "sgd", "mlp", "attention", "weighted"]]
    seeds: list[int]
    baselines: list[Literal["untrained", "logmel"]]
    layers: Layers
    pooling: Pooling
    temporal_support: float | None
    aggregate: Literal["embeddings", "predictions"]
    padding: Literal["model", "none"] | None
    held_out: float
    thresholds: float | Literal["validation"]
    num_resamples: int
    with_cost: bool
    batch_size: int
    device: str
    cache_dir: str | None
    cache_gb: float
    cached_layers: int | None
    protocol: str
    domains: dict[str, list[str]]
    normalise_by: str | None


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Probe as `config` (plain, resolved and checked) says; write the results and return what `results.json` holds.

    Raises `UserError` for what the user can mend: a set that is not there, a head of another kind than the task, an
    encoder without what is asked of it.
    """
    begin, folder = time.perf_counter(), Path(config["run_dir"])
    settings = Settings(**config["probe"])
    if settings.thresholds != "validation" and not 0 < settings.thresholds < 1:
        raise UserError(f"probe.thresholds={settings.thresholds}: a probability above 0 and below 1, or validation")
    heads = heads_of(settings.heads, config["heads"])
    results.refuse_other(folder, config)
    _check_source(open_source(config["init"]), "encoder", settings)  # before the set is packed, which may take hours
    task = load_task(**config["task"])
    check_heads(task, heads)
    task.check_times()
    divisions = ", ".join(division.name for division in task.divisions if division.name)
    log.info("%s: %d clips, %d classes, %s", task.name, len(task), len(task.classes), divisions or "one split")
    rows, kept, bad = [], {}, {}
    for role, init in inits_of(config["init"], settings.baselines):
        found = _probed(task, role, init, settings, heads)
        for row, judged in found.rows:
            rows.append(row)
            kept[role, row["head"]] = judged
        bad |= {task.keys[clip]: reason for clip, reason in found.bad.items()}
    content = results.content(task, config, settings, rows, bad, time.perf_counter() - begin)
    folder.mkdir(parents=True, exist_ok=True)
    first = kept["encoder", settings.heads[0]]
    pictures.draw(task, content, first.tested, folder)
    results.write(content, folder)
    results.show(content, folder)
    return content


@dataclass(frozen=True)
class _Probed:
    rows: list[tuple[dict[str, Any], Judged]]
    bad: dict[int, str]


def _probed(task: Task, role: str, init: str | list[str], settings: Settings, heads: dict[str, Head]) -> _Probed:
    """Put a source through the cache and every head."""
    source = _open(task, init, settings)
    support = settings.temporal_support
    if support is not None and source.max_seconds is not None and support > source.max_seconds + 0.1:
        log.warning("%s hears %.2f s at most: a support of %g s is cut to it", source.name, source.max_seconds, support)
    reading = _check_source(source, role, settings)
    wanted = wanted_of(task, heads, support, reading.layers, settings.cached_layers)
    cache = FeatureCache(settings.cache_dir, settings.cache_gb)
    features = cache.features(source, task, wanted, batch_size=settings.batch_size)
    origin = "computed" if features.is_new else "from the cache"
    log.info("%s: features %s, %.3g GB in %s", source.name, origin, features.num_bytes / GB, cache.folder)
    for line in name_bad(task, features.bad):
        log.warning(line)
    seconds = float(task.seconds.mean()) if task.clip_seconds is None else task.clip_seconds
    cost = cost_of(source, seconds, support, settings.batch_size)._asdict() if settings.with_cost else {}
    step = getattr(source, "column_seconds", None)
    how = dict(seeds=settings.seeds, column_seconds=step, device=settings_device(settings))
    found = []
    for name, head in heads.items():
        judged = judge(task, features, name, head, reading, **how)
        summary = summarise(task, judged.tested, num_resamples=settings.num_resamples)
        log.info("%s, %s: %s %.4g", source.name, name, task.metric, summary["score"])
        about = {"role": role, "source": source.name, "source_hash": source.hash, "head": name}
        choices = {"chosen": judged.chosen, "head_seconds": round(judged.seconds, 2)}
        found.append((about | {"support_seconds": support} | summary | choices | cost, judged))
    return _Probed(found, features.bad)


def _check_source(source: Source, role: str, settings: Settings) -> Reading:
    """Say how a source is read; raise `UserError` where it has not the layers."""
    reading = _reading(settings, role)
    take_layers(np.empty((0, settings.cached_layers or source.num_layers)), reading.layers)
    return reading


def _open(task: Task, init: str | list[str], settings: Settings) -> Source:
    padding = settings.padding or ("model" if settings.temporal_support is None else "none")
    source = open_source(init, seed=settings.seeds[0], moments=task.kind == "events", padding=padding)
    return source.to(settings_device(settings))


def settings_device(settings: Settings) -> torch.device:
    """Choose the device: auto is a GPU where there is one; raise `UserError` for one that is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"probe.device={name}: not here ({str(error).splitlines()[0]}); take cpu") from error


def _reading(settings: Settings, role: str) -> Reading:
    """Say how a source is read; the log-mel has one layer and no class token, whatever is asked of encoders."""
    layers, pooling = settings.layers, settings.pooling
    if role == "log-mel":
        layers, pooling = "last", "max" if pooling == "max" else "mean"
    how = dict(aggregate=settings.aggregate, held_out=settings.held_out, thresholds=settings.thresholds)
    return Reading(layers=layers, pooling=pooling, **how)


def inits_of(init: str | list[str], baselines: Sequence[str]) -> list[tuple[str, str | list[str]]]:
    """List what is probed, (role, init): the encoder, then the baselines that it has.

    Models of others have no untrained twin here; of several side by side, all are untrained.
    """
    found: list[tuple[str, str | list[str]]] = [("encoder", init)]
    parts = [init] if isinstance(init, str) else list(init)
    is_ours = all(part.partition(":")[0] not in ("hf", "byola", "beats", "logmel", "untrained") for part in parts)
    if "untrained" in baselines and is_ours:
        twins = [f"untrained:{part}" for part in parts]
        found.append(("untrained", twins[0] if len(twins) == 1 else twins))
    if "logmel" in baselines and parts != ["logmel"]:
        found.append(("log-mel", f"logmel:{parts[0]}" if is_ours else "logmel"))
    return found


def heads_of(names: Sequence[str], sections: dict[str, dict[str, Any]]) -> dict[str, Head]:
    """Make each head's settings of its section."""
    if not names:
        raise UserError("probe.heads=[]: name at least one head")
    is_closed = ("linear", "knn")
    return {name: dict(sections[name]) if name in is_closed else NetSettings(**sections[name]) for name in names}
