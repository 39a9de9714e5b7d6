"""How does a resolved config become a method, and a file a method again?"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from audiossl.config.secrets import mask, masked_in
from audiossl.config.settings import find_target, instantiate
from audiossl.errors import UserError
from audiossl.sharded.folders import read_state
from audiossl.weights.initial import Start, describe_mismatch, encoder_weights
from audiossl.weights.origins import check_frontend
from audiossl.weights.reading import newest_checkpoint, read_torch_file

log = logging.getLogger(__name__)

FIXED = {  # what a resumed run must have in common with the run it resumes; None: all of the section
    "model": None,
    "frontend": None,
    "data": (
        *("split", "validation_clips", "validation_split", "crop_seconds", "padding", "rate_hz"),
        *("fraction", "fraction_by", "fraction_seed", "sampling", "sampling_offset", "sampling_reduce"),
        *("replacement", "draws_per_epoch", "shuffle_shards"),
    ),
    "optim": (
        *("optimizer", "momentum", "adamw", "betas", "eps", "weight_decay", "final_weight_decay", "decay"),
        *("layer_decay", "layer_decay_rule", "head_lr_scale"),
    ),
}

UNSAID = {  # what checkpoints from before these keys were made with
    **{"fraction": 1.0, "fraction_by": "random", "fraction_seed": 0, "sampling_reduce": "sum"},
    **{"adamw": "torch", "decay": "matrices", "optimizer": "adamw", "momentum": 0.9},
    **{"layer_decay": None, "layer_decay_rule": "audiomae", "head_lr_scale": 1.0},
}


def needs_labels(config: dict[str, Any]) -> bool:
    """Tell whether the config's method learns from labels: its class says so by an attribute `needs_labels`."""
    return bool(getattr(find_target(config["model"]["_target_"]), "needs_labels", False))


def takes_classes(config: dict[str, Any]) -> bool:
    """Tell whether the config's method wants to know the number of classes, as `num_classes`."""
    return "num_classes" in inspect.signature(find_target(config["model"]["_target_"])).parameters


def method_from_config(
    config: dict[str, Any], *, frontend: nn.Module | None = None, vocabulary: Sequence[str] | None = None
) -> nn.Module:
    """Build the front end, unless it is given, and the method around it; `config` is plain and resolved.

    A method that takes `num_classes` gets the length of `vocabulary`, the labels of the shards.
    Raises UserError where it takes one and there are no labels.
    """
    code_args: dict[str, Any] = {"frontend": instantiate(config["frontend"]) if frontend is None else frontend}
    if takes_classes(config):
        if not vocabulary:
            raise UserError(f"model={config['model']['_target_']}: needs classes, and the shards have no label")
        code_args["num_classes"] = len(vocabulary)
    method = instantiate(config["model"], **code_args)
    _check_teacher(getattr(method, "teacher_description", {}), config, vocabulary)
    return method


def _check_teacher(teacher: dict[str, Any], config: dict[str, Any], vocabulary: Sequence[str] | None) -> None:
    """Refuse a teacher that names other classes, or hears through another front end, than the run."""
    source = config["model"].get("teacher")
    if teacher.get("vocabulary", vocabulary) != vocabulary:
        raise UserError(f"model.teacher={source}: was trained on other classes than the shards have")
    for key, value in teacher.get("frontend", {}).items():
        if key != "seconds" and config["frontend"].get(key) != value:
            raise UserError(
                f"model.teacher={source}: was trained with frontend.{key}={value}, not {config['frontend'].get(key)}"
            )


def load_method(path: str | Path, config: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load a method with its weights from a run's folder or a checkpoint; returns it in eval mode with its config.

    `config` is the run's own, where it is known: that in the checkpoint has no secrets. Raises `UserError` naming the
    file when it is not a checkpoint of ours, and the key where a secret is missing.
    """
    path = Path(path)
    path = newest_checkpoint(path) if path.is_dir() else path
    checkpoint = read_torch_file(path)
    if "audiossl" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of audiossl's train.py (it holds {', '.join(list(checkpoint)[:5])})")
    config = checkpoint["audiossl"]["config"] if config is None else config
    if missing := next(masked_in({name: config[name] for name in ("model", "frontend")}), None):
        raise UserError(
            f"{path}: {missing} was a secret, which no checkpoint keeps, and the model cannot be built without it; "
            "take the encoder.safetensors that a finished run leaves"
        )
    method = method_from_config(config, vocabulary=checkpoint["audiossl"].get("provenance", {}).get("vocabulary"))
    weights = {k.removeprefix("method."): v for k, v in checkpoint["state_dict"].items() if k.startswith("method.")}
    method.load_state_dict(weights)
    return method.eval(), config


def load_initial_weights(method: nn.Module, source: str) -> str:
    """Start `method.encoder` from `source`; say what was taken.

    `source`: a run's folder, a checkpoint, `encoder.safetensors`, the authors' `.pth`, or `timm:NAME` for ImageNet
    weights. Position tables are taken only when the grids agree. Raises `UserError` listing the first mismatches.
    """
    return _take(method, encoder_weights(source, method.encoder), source)


def start_from(method: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Start `method.encoder` from `config["init"]`; give what goes into the provenance: `init` and `licence`.

    Raises `UserError` as `load_initial_weights` does, and for weights that heard through another front end than the
    run's, unless `init_frontend` is "ignore".
    """
    start = encoder_weights(config["init"], method.encoder)
    check_frontend(config["init"], start.frontend, config["frontend"], mode=config["init_frontend"])
    return {"init": _take(method, start, config["init"]), "licence": start.licence}


def _take(method: nn.Module, start: Start, source: str) -> str:
    weights, own = start.weights, method.encoder.state_dict()
    if not method.encoder.geometry["final_norm"]:  # the head normalises instead (Audio-MAE's fine-tuning)
        weights = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    problem = describe_mismatch(weights, own)
    if problem:
        raise UserError(f"init={source}: {problem}")
    for encoder in getattr(method, "encoders", (method.encoder,)):
        encoder.load_state_dict(weights)
    said = f"encoder starts from {start.origin}: {len(weights)} tensors"
    log.info(said)
    return said


def check_same_run(path: Path, config: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """Refuse to resume from a checkpoint of another run: model, front end, seed, clips or global batch differ.

    So do the optimiser's settings that its saved state would silently put back. Learning rate, length, workers, ranks,
    loggers and the like may change. Returns the provenance saved in it; raises `UserError` that
    names each key that changed, saved and now.
    """
    saved = (read_state(path)["run"] if path.is_dir() else read_torch_file(path)).get("audiossl")
    if saved is None:
        raise UserError(f"ckpt={path}: not a checkpoint of train.py; to start from its weights use init={path}")
    config, provenance = mask(config), mask(provenance)  # as what was saved
    pairs = {"seed": (saved["config"]["seed"], config["seed"])}
    for section, fixed in FIXED.items():
        before, now = saved["config"][section], config[section]
        names = sorted({*before, *now}) if fixed is None else fixed
        pairs |= {f"{section}.{k}": (before.get(k, UNSAID.get(k)), now.get(k)) for k in names}
    before, now = _source_settings(saved["config"]), _source_settings(config)
    pairs |= {key: (before.get(key), now.get(key)) for key in sorted({*before, *now})}
    for key in ("corpus_hash", "global_batch"):
        pairs[key] = (saved["provenance"][key], provenance[key])
    pairs["vocabulary"] = (saved["provenance"].get("vocabulary"), provenance.get("vocabulary"))
    changed = [f"{k}: {_short(a)} -> {_short(b)}" for k, (a, b) in pairs.items() if a != b]
    if changed:
        raise UserError(
            f"ckpt={path}: is of another run, saved -> now: {', '.join(changed[:6])}; give the settings it was made "
            f"with{_batch_size_for(pairs['global_batch'], config)}, or start a new run from its weights: init={path}"
        )
    return saved["provenance"]


def _batch_size_for(global_batch: tuple[int, int], config: dict[str, Any]) -> str:
    """Say which batch size keeps the saved global batch on as many devices as there are now."""
    saved, now = global_batch
    shares = now // config["data"]["batch_size"]
    if saved == now:
        return ""
    if saved % shares == 0:
        return f" (here data.batch_size={saved // shares} keeps the global batch of {saved})"
    return f" (a global batch of {saved} needs devices x accumulation to divide it; here they are {shares})"


def _source_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten what a mixture is made of, but for where it lies: the corpus hash knows what lies there."""
    sources = config["data"].get("sources") or {}
    return {f"data.sources.{n}.{k}": v for n, entry in sources.items() for k, v in entry.items() if k != "shards"}


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 24 else f"{str(value)[:12]}..."
