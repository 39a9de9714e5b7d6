"""How do the ATST authors' weights become ours?

Their patches are a Linear over 64 bands x 4 frames, ours the convolution that it is; their position table has a place
for the class token in front, ours keeps that apart; nothing else differs. Sizes are read from the shapes. Layout of
Audio-WestlakeU/audiossl (2204.12076, 2306.04186): a Lightning file with `model.student.*` and `model.teacher.*`, or,
fine-tuned, `encoder.encoder.*` and `head.*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from audiossl.errors import UserError
from audiossl.weights.published import ATST, ATST_LICENCE, ATST_MEL, ATST_SECONDS
from audiossl.weights.reading import read_torch_file
from audiossl.weights.translation import Action, Row, Settings, Translation, count_blocks, heads_of, row

HEADS = {384: 6, 768: 12, 1024: 16}  # of the published widths; shapes do not tell
PATCH = (64, 4)  # mel bands, frames
HEAD = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "linear.weight", "linear.bias")
LEFT_OUT = {  # what the file holds beside the encoder asked for
    r"(model\.)?(student|teacher)\.(projector|predictor)\..*": "projector and predictor, which only pre-training uses",
    r"(student|teacher)\.(module\.)?head\..*": "projector and predictor, which only pre-training uses",
    r"(model\.)?teacher\..*": "the teacher; part=teacher takes it",
    r"(model\.)?student\..*": "the student; part=student takes it",
    r"model\.(projector|project_linear)\..*": "what the student was distilled through",
    r"model\.linear\..*": "the student's classifier; part=student takes it",
    r"encoder\.encoder\.teacher_module\..*": "the teacher that it was distilled from",
}
RENAMED = {"patch_embed.patch_embed.": "patch_embed.proj.", "norm_frame.": "norm.", "norm.": "", "blocks.": ""}


def import_pretrained(
    source: str | Path | Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Translate a pre-training checkpoint: (state dict for `ATSTClip` or `ATSTFrame`, geometry).

    Geometry holds those arguments of the two that shapes tell, and `num_class_tokens`, 1 for Clip and 0 for Frame.
    `source` is a file or its `state_dict`. What has no counterpart here has no effect there: the teacher's mask token,
    Clip's mask token, the position of the class token that Frame has not.

    Raises `UserError` for a file that is no such checkpoint, naming what it lacks or what is not known.
    """
    theirs, name = read_state(source)
    theirs = {key.removeprefix("model."): value for key, value in theirs.items()}
    parts = ("student.encoder.", "student.projector.", "student.predictor.", "teacher.encoder.", "teacher.projector.")
    missing = [part for part in parts if not any(key.startswith(part) for key in theirs)]
    if missing:
        raise UserError(f"{name} is no ATST pre-training checkpoint: it has no {missing[0]}*")
    if unknown := [key for key in theirs if not key.startswith(parts)]:
        raise UserError(f"{name} holds {len(unknown)} tensors that ATST has not, {unknown[0]} for example")
    ours = {key: value for key, value in theirs.items() if ".encoder." not in key}
    for who in ("student", "teacher"):
        found = import_encoder(with_prefix(theirs, f"{who}.encoder."), name)
        ours |= {f"{who}.encoder.{key}": value for key, value in found.items()}
    geometry = read_geometry(with_prefix(theirs, "teacher.encoder."), num_heads)
    geometry["projector_width"], _ = theirs["student.projector.0.weight"].shape
    geometry["projection_width"], _ = theirs["student.projector.3.weight"].shape
    if not geometry["num_class_tokens"]:
        ours["mask_token"] = theirs["student.encoder.mask_embed"]
    return ours, geometry


def import_finetuned(
    source: str | Path | Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Translate a fine-tuned checkpoint: (state dict for `Encoder`, state dict for `LinearHead`, geometry).

    Geometry is the encoder's as in `import_pretrained`. The head's sizes are the shape of its `linear.weight`; that of
    frame-level detection has no `norm.*`. `source` is a file or its `state_dict`. Raises `UserError` as
    `import_pretrained` does.
    """
    theirs, name = read_state(source)
    lacking = [key for key in ("encoder.encoder.pos_embed", "head.linear.weight") if key not in theirs]
    if lacking:
        raise UserError(f"{name} is no fine-tuned ATST: it has no {lacking[0]}")
    head = with_prefix(theirs, "head.")
    known = {f"head.{key}" for key in HEAD}
    if unknown := [key for key in theirs if not key.startswith("encoder.encoder.") and key not in known]:
        raise UserError(f"{name} holds {len(unknown)} tensors that a fine-tuned ATST has not, {unknown[0]} for example")
    theirs = with_prefix(theirs, "encoder.encoder.")
    return import_encoder(theirs, name), head, read_geometry(theirs, num_heads)


def import_encoder(theirs: Mapping[str, Tensor], name: str = "the state dict") -> dict[str, Tensor]:
    """Translate an encoder's tensors, their prefix taken off, for `Encoder.load_state_dict`."""
    lacking = [key for key in ("pos_embed", "patch_embed.patch_embed.weight") if key not in theirs]
    if lacking:
        raise UserError(f"{name}: an ATST encoder needs {lacking[0]}; was it trained with a CNN for patches?")
    is_clip, table = "cls_token" in theirs, theirs["pos_embed"]
    ours = {"positions.table": table[:, 1:].contiguous()}
    if is_clip:
        ours |= {"positions.class_table": table[:, :1].contiguous(), "class_token": theirs["cls_token"]}
    for key, value in theirs.items():
        if key in ("pos_embed", "cls_token", "mask_embed"):
            continue
        prefix = next((prefix for prefix in RENAMED if key.startswith(prefix)), None)
        if prefix is None:
            raise UserError(f"{name}: an ATST encoder has no {key}")
        ours[(RENAMED[prefix] or prefix) + key.removeprefix(prefix)] = value
    kernel = ours["patch_embed.proj.weight"]
    ours["patch_embed.proj.weight"] = kernel.unflatten(1, (1, *PATCH))
    return ours


def read_geometry(theirs: Mapping[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    """Read an encoder's sizes off its shapes; raise `UserError` for unpublished widths without `num_heads`."""
    places, width = theirs["pos_embed"].shape[1:]
    return {
        "patch": list(PATCH),
        "stride": list(PATCH),
        "width": width,
        "depth": count_blocks(theirs),
        "num_heads": heads_of(num_heads, HEADS, width),
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in theirs,
        "position_frames": (places - 1) * PATCH[1] + 1,  # 1001 of 10 s
        "num_class_tokens": int("cls_token" in theirs),
    }


def read_state(source: str | Path | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """Read a file's `state_dict`, or take one; return it and what errors call it."""
    if isinstance(source, Mapping):
        return source, "the state dict"
    return read_torch_file(source).get("state_dict", {}), str(source)


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors under a prefix, and the prefix off their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def translate(
    tensors: Mapping[str, Tensor], prefix: str, head: str | None, settings: Settings, hints: Mapping[str, Any]
) -> Translation:
    """Translate the encoder under `prefix`, and the classifier under `head`, None where there is none to take.

    `hints` are the file's own words (`hyper_parameters`, `args`): window and clip length, which shapes do not tell.
    """
    theirs = with_prefix(tensors, prefix)
    rows = [_row(key, prefix, head, f"{prefix}cls_token" in tensors) for key in tensors]
    taken = {row.source.removeprefix(prefix) for row in rows if not row.is_unknown and row.source.startswith(prefix)}
    theirs = {key: value for key, value in theirs.items() if key in taken}
    geometry = read_geometry(theirs, settings.num_heads)
    classes = geometry["num_class_tokens"]
    frames = geometry.pop("position_frames")
    found = Translation(
        method=ATST[classes],
        encoder=import_encoder(theirs),
        geometry=geometry | dict(num_mels=PATCH[0], frames=frames, positions="learned", drop_path=0.0),
        frontend=ATST_MEL | {"seconds": min(ATST_SECONDS[classes], frames / 100)},
        licence=ATST_LICENCE,
        rows=rows,
        mask_padding=True,
    )
    _hear_hints(found, hints)
    if head is not None:
        _add_head(found, with_prefix(tensors, head))
    return found


def _row(key: str, prefix: str, head: str | None, is_clip: bool) -> Row:
    if key.startswith(prefix):
        bare = key.removeprefix(prefix)
        if bare == "pos_embed":
            if is_clip:
                ours = "positions.table, positions.class_table"
                return Row(key, Action.REORDERED, ours, "the first place, the class token's, is kept apart")
            return Row(key, Action.REORDERED, "positions.table", "without the first place, which Frame never uses")
        if bare == "mask_embed":
            return Row(key, Action.DROPPED, why="mask token, which only pre-training uses")
        if bare == "cls_token":
            return row(key, key, "class_token")
        known = next((known for known in RENAMED if bare.startswith(known)), None)
        if known is not None:
            ours = (RENAMED[known] or known) + bare.removeprefix(known)
            why = "a Linear over 64 x 4 cells as the convolution it is" if ours == "patch_embed.proj.weight" else ""
            return row(key, key, ours, why=why)
    elif head is not None and key.startswith(head):
        bare = key.removeprefix(head)
        if bare in HEAD:
            return row(key, key, f"head.{bare}")
    else:
        for pattern, why in LEFT_OUT.items():
            if re.fullmatch(pattern, key):
                return Row(key, Action.DROPPED, why=why)
    return Row(key, Action.UNKNOWN)


def _hear_hints(found: Translation, hints: Mapping[str, Any]) -> None:
    """Take from the file's own words what shapes do not tell, and say so."""
    window, own = hints.get("win_length"), found.frontend["window_ms"] * found.frontend["rate_hz"] / 1000
    if isinstance(window, int) and window > 0 and window != own:
        found.frontend["window_ms"] = window * 1000 / found.frontend["rate_hz"]
        found.notes.append(f"window_ms={found.frontend['window_ms']:g}: the file says win_length={window}")
    length = hints.get("train_len", hints.get("anchor_len"))
    length = length[0] if isinstance(length, list | tuple) and length else length
    if isinstance(length, int | float) and 1 <= length <= found.geometry["frames"] / 100:
        seconds = round(length + 0.01, 2)
        if seconds != found.frontend["seconds"]:
            found.frontend["seconds"] = seconds
            found.notes.append(f"seconds={seconds:g}: the file was trained on clips of {length:g} s")
    if hints.get("pos_type", "cut") != "cut":
        found.warnings.append(
            f"the file says pos_type={hints['pos_type']}: give positions=interpolated and seconds=..."
        )


def _add_head(found: Translation, weights: dict[str, Tensor]) -> None:
    weights = {key: value for key, value in weights.items() if key in HEAD}
    if "linear.weight" not in weights:
        return
    classes, width_in = weights["linear.weight"].shape
    width, is_clip = found.geometry["width"], found.geometry["num_class_tokens"]
    is_normed = "norm.running_mean" in weights
    poolings = {width: ("class" if is_clip else "mean") if is_normed else "tokens"}
    poolings |= {2 * width: "class+mean"} if is_clip else {}
    if width_in not in poolings:
        raise UserError(
            f"a classifier of {width_in} features on an encoder of width {width}: of several blocks, as none of ours"
        )
    norm = "batch" if is_normed else "none"
    found.head = dict(width_in=width_in, num_classes=classes, pooling=poolings[width_in], norm=norm, eps=1e-5)
    found.head_weights = weights
