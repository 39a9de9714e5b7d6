"""Whose file is this?

Every published checkpoint is recognised by its keys, whatever it is called: an entry of `LAYOUTS` says how, and which
family's module translates it. What lies beside the tensors (optimizer, epoch, args) is named, and what the file says
about itself is compared with its weights, which win.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiossl.errors import UserError
from audiossl.importing.report import contradictions
from audiossl.weights import atst, audiomae, passt, timm
from audiossl.weights.published import ATST_DISTILLED
from audiossl.weights.reading import read_weights
from audiossl.weights.translation import Action, Row, Settings, Translation

WRAPPERS = ("module.", "_orig_mod.")  # of data parallel and of compiled models, around every key
MODELS = (
    "state_dict",
    "model",
    "model_state_dict",
    "state_dict_ema",
)  # of the weights: the first one counts
ATST_ENCODERS = {  # prefix of the encoder: (layout, whose part, prefix of its classifier)
    r"model\.(student|teacher)\.encoder\.": ("ATST, pre-trained", None),
    r"(student|teacher)\.(?:module\.)?backbone\.": ("ATST-Clip, pre-trained (DINO-style)", None),
    r"model\.student\.": ("ATST-C2F, distilled", "model.linear."),
    r"encoder\.encoder\.(?:frame|clip)_encoder\.": ("ATST, distilled on frames", "head."),
    r"encoder\.encoder\.": ("ATST, fine-tuned", "head."),
    r"": ("ATST, the encoder alone", None),
}


@dataclass(frozen=True)
class Checkpoint:
    """Hold a file's tensors by full name, what it says about itself, and what else lies in it, by name."""

    path: Path
    tensors: dict[str, Tensor]
    hints: dict[str, Any]
    beside: dict[str, str]
    is_flat: bool  # whether the tensors are the whole file, under no name


@dataclass(frozen=True)
class Layout:
    """Name one way of writing a checkpoint, how it is told from the others, and what translates it."""

    name: str
    fits: Callable[[Checkpoint], bool]
    translate: Callable[[Checkpoint, Settings], Translation]
    settings: tuple[str, ...] = ()  # of those that not every layout has


def read_checkpoint(path: Path, *, runs_code: bool = False) -> Checkpoint:
    """Read a file, without running code in it unless told; raise `UserError` where it holds no tensors, or is ours."""
    return checkpoint_of(path, read_weights(path, runs_code=runs_code))


def checkpoint_of(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """Sort what was read from `path` into tensors, words about them and the rest; raise as `read_checkpoint` does."""
    if "audiossl" in content and "state_dict" in content:
        raise UserError(
            f"{path}: a checkpoint of ours; its run's folder has encoder.safetensors, which needs no import"
        )
    tensors, beside, hints = {}, {}, {}
    model = next((name for name in MODELS if _is_state(content.get(name))), None)
    for name, value in content.items():
        name = str(name)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif name in (model, "student", "teacher") and _is_state(value):
            prefix = f"{name}." if name in ("student", "teacher") else ""
            tensors |= {prefix + key: tensor for key, tensor in value.items() if _is_weight(key, tensor)}
        elif name in ("args", "hyper_parameters"):
            said = vars(value) if isinstance(value, argparse.Namespace) else value
            hints |= said if isinstance(said, Mapping) else {}
        else:
            beside[name] = type(value).__name__
    if not tensors:
        raise UserError(f"{path}: holds no tensors, only {', '.join(list(content)[:5]) or 'nothing'}")
    _refuse_unreal(tensors, path)
    is_flat = all(str(name) in tensors for name in content)
    while wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in tensors)), None):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return Checkpoint(path, tensors, hints, beside, is_flat)


def _refuse_unreal(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what is no plain tensor, or claims more values than lie in the file: sizes are read off shapes."""
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            raise UserError(f"{path}: {key} is sparse, quantised, complex or without values: not a plain tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {key} claims shape {list(value.shape)}, and its values are not in the file")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_weight(key, tensor) for key, tensor in value.items())


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def translate(checkpoint: Checkpoint, settings: Settings) -> tuple[str, Translation]:
    """Recognise a checkpoint and translate it: (name of its layout, translation).

    Raises `UserError` for a layout that is not known, and whatever the family's module raises.
    """
    layout = next((layout for layout in LAYOUTS if layout.fits(checkpoint)), None)
    if layout is None:
        known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        keys = ", ".join(list(checkpoint.tensors)[:4])
        raise UserError(f"{checkpoint.path}: its keys ({keys}) are of no layout that is known: {known}")
    for key in ("part", "stride", "like"):
        if getattr(settings, key) and key not in layout.settings:
            raise UserError(f"{key}: means nothing for {checkpoint.path}, which is {layout.name}")
    try:
        found = layout.translate(checkpoint, settings)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    except (
        KeyError,
        ValueError,
        IndexError,
        TypeError,
        RuntimeError,
    ) as error:  # tensors missing or of another shape
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{checkpoint.path}: looks like {layout.name}, but {what}") from error
    name = layout.name
    if layout.name == "ATST":
        name = _atst_part(checkpoint, settings)[0]
    found.warnings += contradictions(checkpoint.hints, found)
    return name, found


def _bare_audiomae(checkpoint: Checkpoint) -> bool:
    return audiomae.is_audiomae(checkpoint.tensors)


def _atst_prefixes(checkpoint: Checkpoint) -> list[str]:
    """List where in a file encoders of ATST lie."""
    ending = "patch_embed.patch_embed.weight"
    return [key.removesuffix(ending) for key in checkpoint.tensors if key.endswith(ending)]


def _atst_part(checkpoint: Checkpoint, settings: Settings) -> tuple[str, str, str | None]:
    """Choose the encoder of an ATST file: (layout, its prefix, that of its classifier)."""
    prefixes = _atst_prefixes(checkpoint)
    is_distilled = any(prefix.endswith(("model.student.", "frame_encoder.", "clip_encoder.")) for prefix in prefixes)
    wanted = settings.part or ("student" if is_distilled else "teacher")
    parts = {prefix: match.group(1) for prefix in prefixes if (match := re.search(r"(student|teacher)", prefix))}
    if settings.part and "teacher_module" not in "".join(prefixes) and wanted not in parts.values():
        raise UserError(f"part={wanted}: this file has {' and '.join(parts.values()) or 'one encoder'} only")
    ordered = sorted(prefixes, key=lambda prefix: (parts.get(prefix) != wanted, "teacher_module" in prefix))
    prefix = ordered[0]
    if is_distilled and wanted == "teacher":
        return "ATST-C2F, distilled", prefix, "model.teacher.head."
    for pattern, (name, head) in ATST_ENCODERS.items():
        if re.fullmatch(pattern, prefix):
            return name, prefix, head
    raise UserError(f"an encoder of ATST under {prefix}*, which is no published layout")


def _translate_atst(checkpoint: Checkpoint, settings: Settings) -> Translation:
    name, prefix, head = _atst_part(checkpoint, settings)
    found = atst.translate(checkpoint.tensors, prefix, head, settings, checkpoint.hints)
    if "distilled" in name and not found.geometry["num_class_tokens"]:
        found.method = ATST_DISTILLED
    return found


def _translate_passt(checkpoint: Checkpoint, settings: Settings) -> Translation:
    prefix = next((p for p in ("net_swa.", "net.") if any(key.startswith(p) for key in checkpoint.tensors)), "")
    full = {
        key.removeprefix(prefix).replace("_orig_mod.", ""): key for key in checkpoint.tensors if key.startswith(prefix)
    }
    theirs = {bare: checkpoint.tensors[key] for bare, key in full.items()}
    found = passt.translate(theirs, settings, file_name=checkpoint.path.name)
    found.rows = [Row(full[row.source], row.action, row.ours, row.why) for row in found.rows]
    taken, reasons = set(full.values()), {"mel": "the front end's own"}
    reasons |= {"net": "the average, net_swa.*, is taken"} if prefix == "net_swa." else {}
    for key in (key for key in checkpoint.tensors if key not in taken):
        why = reasons.get(key.split(".")[0], "")
        found.rows.append(Row(key, Action.DROPPED if why else Action.UNKNOWN, why=why))
    return found


def _is_port(checkpoint: Checkpoint) -> bool:
    return _bare_audiomae(checkpoint) and checkpoint.is_flat and not _is_pretrained(checkpoint)


def _is_pretrained(checkpoint: Checkpoint) -> bool:
    return "mask_token" in checkpoint.tensors or any(key.startswith("decoder") for key in checkpoint.tensors)


def _translate_audiomae(checkpoint: Checkpoint, settings: Settings) -> Translation:
    found = audiomae.translate(checkpoint.tensors, settings, is_port=_is_port(checkpoint))
    is_local, mode = _has_local_decoder(checkpoint), checkpoint.hints.get("decoder_mode")
    if _is_pretrained(checkpoint) and isinstance(mode, int) and bool(mode) != is_local:
        kind = "local" if is_local else "global"
        found.warnings.append(f"the file says decoder_mode={mode}; its weights have a {kind} decoder")
    return found


def _has_local_decoder(checkpoint: Checkpoint) -> bool:
    return "decoder_blocks.0.attn.tau" in checkpoint.tensors


def _is_passt(checkpoint: Checkpoint) -> bool:
    return passt.is_passt(passt.bare_names({"state_dict": checkpoint.tensors}))


def _is_image(checkpoint: Checkpoint) -> bool:
    return timm.is_image_model(checkpoint.tensors)


def _translate_image(checkpoint: Checkpoint, settings: Settings) -> Translation:
    return timm.translate(checkpoint.tensors, settings)


LAYOUTS = (
    Layout("PaSST", _is_passt, _translate_passt, ("stride",)),
    Layout("ATST", lambda c: bool(_atst_prefixes(c)), _translate_atst, ("part",)),
    Layout("Audio-MAE, timm's port", _is_port, _translate_audiomae),
    Layout(
        "Audio-MAE, pre-trained with the local decoder",
        lambda c: _bare_audiomae(c) and _has_local_decoder(c),
        _translate_audiomae,
    ),
    Layout(
        "Audio-MAE, pre-trained with the global decoder",
        lambda c: _bare_audiomae(c) and _is_pretrained(c),
        _translate_audiomae,
    ),
    Layout("Audio-MAE, fine-tuned", _bare_audiomae, _translate_audiomae),
    Layout("image model of timm", _is_image, _translate_image, ("stride", "like")),
)
