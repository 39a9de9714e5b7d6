"""How do the ATST authors' weights become ours?

Their patches are a Linear over 64 bands x 4 frames, ours the convolution that it is; their position table has a place
for the class token in front, ours keeps that apart; nothing else differs. Sizes are read from the shapes. Layout of
Audio-WestlakeU/audiossl (2204.12076, 2306.04186): a Lightning file with `model.student.*` and `model.teacher.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from audiossl.errors import UserError
from audiossl.weights.reading import read_torch_file

HEADS = {384: 6, 768: 12, 1024: 16}  # of the published widths; shapes do not tell
PATCH = (64, 4)  # mel bands, frames
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
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    theirs = source if isinstance(source, Mapping) else read_torch_file(source).get("state_dict", {})
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
    if num_heads is None and width not in HEADS:
        raise UserError(
            f"a checkpoint does not tell its heads, and a width of {width} is not a published one: give num_heads"
        )
    return {
        "patch": list(PATCH),
        "stride": list(PATCH),
        "width": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in theirs if key.startswith("blocks.")),
        "num_heads": num_heads or HEADS[width],
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in theirs,
        "position_frames": (places - 1) * PATCH[1] + 1,  # 1001 of 10 s
        "num_class_tokens": int("cls_token" in theirs),
    }


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors under a prefix, and the prefix off their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
