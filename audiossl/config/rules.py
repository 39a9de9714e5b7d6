"""Which values make sense, beyond their types?

A table of rules by dotted key, and the checks that need several keys: whether the patches tile the spectrogram, the
heads divide the width, and the warm-up ends before the training does. Everything is arithmetic on the config, so that a
run that cannot work ends before torch is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from audiossl.errors import UserError
from audiossl.indexing.shardpaths import refuse_scheme


class Rule(NamedTuple):
    """Bind dotted keys (a pattern) to what their numbers must be: the words and the test."""

    pattern: str
    words: str
    holds: Callable[[float], bool]


def _at_least(low: float) -> tuple[str, Callable[[float], bool]]:
    return f"at least {low:g}", lambda v: v >= low


POSITIVE = ("above 0", lambda v: v > 0)
RATIO = ("at least 0 and below 1", lambda v: 0 <= v < 1)
FRACTION = ("above 0 and at most 1", lambda v: 0 < v <= 1)

RULES = (
    Rule("data.sources.*.fraction", *FRACTION),
    Rule("data.sources.*", *POSITIVE),
    Rule("data.fraction", *FRACTION),
    Rule("data.fraction_seed", *_at_least(0)),
    Rule("data.sampling_offset", *_at_least(0)),
    Rule("data.draws_per_epoch", *_at_least(1)),
    Rule("data.shuffle_shards", *_at_least(1)),
    Rule("seed", "from 0 to 4294967295", lambda v: 0 <= v < 2**32),
    Rule("*mask_ratio*", *RATIO),
    Rule("*dropout", *RATIO),
    Rule("*drop_path", *RATIO),
    Rule("*.batch_size", *_at_least(1)),
    Rule("*.num_workers", *_at_least(0)),
    Rule("*.num_*", *_at_least(1)),
    Rule("*depth", *_at_least(1)),
    Rule("*width", *_at_least(1)),
    Rule("*heads", *_at_least(1)),
    Rule("*patchout_*", *_at_least(0)),
    Rule("*patch*", *_at_least(1)),
    Rule("*stride", *_at_least(1)),
    Rule("*mlp_ratio", *POSITIVE),
    Rule("*_ms", *POSITIVE),
    Rule("*.seconds", *POSITIVE),
    Rule("trainer.*timeout_seconds", *POSITIVE),
    Rule("*_seconds", *_at_least(0)),
    Rule("*.rate_hz", *POSITIVE),
    Rule("*.cache_gb", *POSITIVE),
    Rule("*_hz", *_at_least(0)),
    Rule("*.std", *POSITIVE),
    Rule("optim.lr", "above 0 and at most 100", lambda v: 0 < v <= 100),
    Rule("optim.base_lr", "above 0 and at most 100", lambda v: 0 < v <= 100),
    Rule("optim.min_lr", "at least 0 and at most 100", lambda v: 0 <= v <= 100),
    Rule("optim.*weight_decay", "at least 0 and at most 100", lambda v: 0 <= v <= 100),
    Rule("optim.betas", *RATIO),
    Rule("optim.momentum", *RATIO),
    Rule("optim.layer_decay", *FRACTION),
    Rule("optim.eps", *POSITIVE),
    Rule("optim.warmup_*", *_at_least(0)),
    Rule("optim.ramp_down", *_at_least(0)),
    Rule("assume.mfu", *FRACTION),
    Rule("assume.*", *POSITIVE),
    Rule("alarm.loss", *POSITIVE),
    Rule("alarm.*_share", *FRACTION),
    Rule("*.patience", *_at_least(1)),
    Rule("stopping.min_delta", *_at_least(0)),
    Rule("swa.start", *_at_least(0)),
    Rule("swa.every", *POSITIVE),
    Rule("trainer.max_steps", "at least 1", lambda v: v >= 1),
    Rule("trainer.max_epochs", "at least 1", lambda v: v >= 1),
    Rule("trainer.accumulate_grad_batches", *_at_least(1)),
    Rule("trainer.gradient_clip_val", *POSITIVE),
    Rule("trainer.log_every_n_steps", *_at_least(1)),
    Rule("trainer.devices", "at least 1, or -1 for all", lambda v: v >= 1 or v == -1),
    Rule("*every_steps", *_at_least(1)),
    Rule("*.every_minutes", *POSITIVE),
    Rule("*.keep_last", *_at_least(1)),
    Rule("*.keep_*", *_at_least(0)),
    Rule("pictures.clips", *_at_least(0)),
    Rule("probe.held_out", "above 0 and below 1", lambda v: 0 < v < 1),
    Rule("probe.temporal_support", "at least 0.01, in seconds", lambda v: v >= 0.01),
    Rule("probe.cached_layers", *_at_least(1)),
    Rule("probe.seeds", *_at_least(0)),
    Rule("heads.linear.l2_grid", *POSITIVE),
    Rule("heads.knn.neighbours", *_at_least(1)),
    Rule("heads.*.lr", *POSITIVE),
    Rule("heads.*.hidden_layers", *_at_least(0)),
    Rule("heads.*.max_epochs", *_at_least(1)),
    Rule("heads.*.check_every", *_at_least(1)),
    Rule("heads.*.weight_decay", *_at_least(0)),
)


def check_value(key: str, value: object) -> None:
    """Raise `UserError` for a number, or one of a list, that breaks the first rule for its key, and for a URL."""
    if "shards" in key.split(".") and isinstance(value, str):
        refuse_scheme(value, f"{key}=")
    rule = next((rule for rule in RULES if fnmatchcase(key, rule.pattern)), None)
    numbers = value if isinstance(value, list | tuple) else [value]
    if rule and any(type(v) in (int, float) and not rule.holds(v) for v in numbers):
        raise UserError(f"{key}={show(value)}: must be {rule.words}")


def show(value: object) -> str:
    """Write a value as it would stand on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = "[" + ",".join(map(show, value)) + "]" if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def check_pretraining(values: Mapping[str, object]) -> None:
    """Check what several keys decide together: patches and frames, heads and width, mask ratio, warm-up, bands.

    `values` maps dotted keys to plain values. A check is skipped when the config lacks one of its keys.
    """
    _check_grid(values)
    check_drawing(values)
    for prefix in ("model.", "model.decoder_"):
        width, heads = values.get(f"{prefix}width"), values.get(f"{prefix}num_heads")
        if width and heads and width % heads:
            near = max(h for h in range(1, heads + 1) if width % h == 0)
            raise UserError(
                f"{prefix}num_heads={heads}: does not divide {prefix}width={width}; {prefix}num_heads={near} would"
            )
    _check_bands(values)
    warmup, steps = values.get("optim.warmup_steps"), values.get("trainer.max_steps")
    if warmup and steps and warmup > steps:
        raise UserError(f"optim.warmup_steps={warmup}: is longer than trainer.max_steps={steps}")
    warmup, epochs = values.get("optim.warmup_epochs"), values.get("trainer.max_epochs")
    if warmup and epochs and not steps and warmup > epochs:
        raise UserError(f"optim.warmup_epochs={warmup}: is longer than trainer.max_epochs={epochs}")
    if "trainer.max_steps" in values and (steps is None) == (values.get("trainer.max_epochs") is None):
        raise UserError(
            f"trainer.max_steps={show(steps)}, trainer.max_epochs={show(values.get('trainer.max_epochs'))}: "
            "give one of them, null the other"
        )


def check_drawing(values: Mapping[str, object]) -> None:
    """Check what the keys of `data` decide together: one corpus or several, and how their clips are drawn."""
    if "data.sampling" not in values:
        return
    entries = [key.split(".")[2:] for key in values if key.startswith("data.sources.")]
    names = {entry[0] for entry in entries}
    if "data.shards" in values and not names and values["data.shards"] is None:
        raise UserError(
            "data.shards=null: say where the shards are, or mix corpora: data.sources.NAME.shards=... for each"
        )
    if names and values.get("data.shards") is not None:
        raise UserError(f"data.shards={show(values['data.shards'])}: data.sources say where the shards are; null one")
    if odd := sorted(name for name in names if not re.fullmatch(r"[\w-]+", name)):
        raise UserError(f"data.sources.{odd[0]}: a name may hold letters, digits, - and _ only")
    without = sorted(name for name in names if values.get(f"data.sources.{name}.weight") is None)
    if without and len(without) < len(names):
        raise UserError(f"data.sources.{without[0]}.weight=null: give every source a weight, or none")
    _check_validation_split(values, names)
    sampling, replacement = values["data.sampling"], values.get("data.replacement")
    if values.get("data.shuffle_shards") and (sampling or replacement):
        what = f"data.sampling={sampling}" if sampling else "data.replacement=true"
        raise UserError(f"data.shuffle_shards={values['data.shuffle_shards']}: {what} draws from all shards; null one")
    draws_without = replacement is False or (replacement is None and sampling == "passt")
    if sampling and draws_without and values.get("data.draws_per_epoch") is None:
        raise UserError(
            f"data.sampling={sampling}: without replacement, an epoch of all clips holds each once, whatever its "
            "weight; give data.draws_per_epoch=N (PaSST: 100000), or data.replacement=true"
        )


def _check_validation_split(values: Mapping[str, object], names: set[str]) -> None:
    wanted = values.get("data.validation_split")
    for key in [f"data.sources.{name}.split" for name in sorted(names)] or ["data.split"]:
        trained = values.get(key) or values.get("data.split")
        if wanted and trained and wanted in (trained, *str(trained).split("+")):
            raise UserError(
                f"data.validation_split={wanted}: {key}={trained} trains on these clips too; give two splits that "
                "share none, or null data.validation_split"
            )


def _check_bands(values: Mapping[str, object]) -> None:
    rate, low, high = (values.get(f"frontend.{name}") for name in ("rate_hz", "fmin_hz", "fmax_hz"))
    if rate and high and high > rate / 2:
        raise UserError(f"frontend.fmax_hz={high}: lies above {rate / 2:g} Hz, half of frontend.rate_hz={rate}")
    if rate and low is not None and low >= (high or rate / 2):
        raise UserError(f"frontend.fmin_hz={low}: must be below frontend.fmax_hz={high or f'{rate / 2:g} Hz'}")


def _check_grid(values: Mapping[str, object]) -> None:
    seconds, hop = values.get("frontend.seconds"), values.get("frontend.hop_ms")
    mels, rate = values.get("frontend.num_mels"), values.get("frontend.rate_hz")
    if rate and hop and abs(rate * hop / 1000 - round(rate * hop / 1000)) > 1e-6:
        raise UserError(f"frontend.hop_ms={hop}: is {rate * hop / 1000:g} samples at {rate} Hz, not a whole number")
    if not (seconds and hop and mels):
        return
    frames = seconds * 1000 / hop
    if abs(frames - round(frames)) > 1e-4:
        raise UserError(
            f"frontend.seconds={seconds}: is {frames:.2f} frames of frontend.hop_ms={hop}, not a whole number; "
            f"frontend.seconds={round(frames) * hop / 1000:g} is {round(frames)}"
        )
    patch = values.get("model.patch_size", values.get("model.patch"))
    if patch is None:
        return
    stride = values.get("model.stride") or patch
    sides = zip(
        (mels, round(frames)), _pair(patch), _pair(stride), ("frontend.num_mels", "frontend.seconds"), strict=True
    )
    grid = [_count_patches(*side, values) for side in sides]
    window = values.get("model.decoder_window")
    if window and values.get("model.decoder", "global") != "global" and any(side % window for side in grid):
        raise UserError(
            f"model.decoder_window={window}: does not divide {grid[0]} x {grid[1]} patches, as decoder="
            f"{values['model.decoder']} needs; model.decoder=global does not"
        )
    if values.get("model.mask_ratio") is not None:
        _check_ratio(values, *grid)


def _count_patches(size: int, patch: int, stride: int, key: str, values: Mapping[str, object]) -> int:
    unit, what = (values["frontend.hop_ms"] / 1000, "frames") if key.endswith("seconds") else (1, "mel bands")
    if size < patch:
        raise UserError(
            f"{key}={values[key]}: {size} {what} are less than one patch of {patch}; give at least {patch * unit:g}"
        )
    must_tile = unit == 1 or "model.decoder" in values  # a decoder predicts every frame; other methods drop a rest
    if stride == patch and size % patch and must_tile:
        fits = [n * unit for n in (size // patch * patch, -(-size // patch) * patch)]
        raise UserError(
            f"{key}={values[key]}: {size} {what} do not divide into patches of {patch}; "
            f"{fits[0]:g} or {fits[1]:g} would"
        )
    return (size - patch) // stride + 1


def _check_ratio(values: Mapping[str, object], rows: int, columns: int) -> None:
    """Some patches must stay and some must go; counts are cut off as in `masking.py`."""
    ratio, mask = values["model.mask_ratio"], values.get("model.mask", "random")
    each = 1 - math.sqrt(1 - ratio)
    time, frequency = (values.get(f"model.mask_ratio_{axis}") for axis in ("time", "frequency"))
    kept = {
        "time": rows * int(columns * (1 - ratio)),
        "frequency": int(rows * (1 - ratio)) * columns,
        "time+frequency": int(rows * (1 - (each if frequency is None else frequency)))
        * int(columns * (1 - (each if time is None else time))),
    }.get(mask, int(rows * columns * (1 - ratio)))
    what = f"model.mask_ratio={ratio}: with model.mask={mask} hides"
    if kept == 0:
        raise UserError(f"{what} all of the {rows} x {columns} patches; at least one must stay")
    if kept == rows * columns:
        raise UserError(f"{what} none of the {rows} x {columns} patches; nothing is left to predict")
