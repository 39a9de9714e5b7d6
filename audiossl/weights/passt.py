"""How do the PaSST authors' weights become ours?

Their files are flat: tokens and positions beside the blocks. Class and distillation token become one tensor, position
tables lose their channel-first layout; blocks and patches keep their names. A file tells neither its heads nor
its strides; those of the published family are known. Layout of kkoutini/PaSST (2110.05069).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from audiossl.errors import UserError
from audiossl.patches import grid_of
from audiossl.weights.published import PASST, PASST_LICENCE, PASST_MEL
from audiossl.weights.reading import read_torch_file
from audiossl.weights.translation import Action, Row, Settings, Translation, count_blocks, row

log = logging.getLogger(__name__)

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # of DeiT's widths; shapes do not tell
STRIDES = (16, 14, 12, 10)  # published; a file tells only how many rows they leave
TOKENS = ("cls_token", "new_pos_embed", "freq_new_pos_embed", "time_new_pos_embed")
BLOCK = re.compile(r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)")
LEFT_OUT = ("head_dist.weight", "head_dist.bias")  # no forward pass of theirs uses them

RENAMED = {"new_pos_embed": "positions.class_table"} | {
    f"head.{n}.{kind}": f"head.{part}.{kind}"
    for n, part in enumerate(("norm", "linear"))
    for kind in ("weight", "bias")
}
LONGER_HOPS = {"stfthop160": 5, "stfthop100": 3.125}  # samples in a file's name: ms at 32 kHz


def import_pretrained(
    source: str | Path | dict[str, Tensor],
    *,
    num_mels: int = 128,
    num_heads: int | None = None,
    stride: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Translate a checkpoint: (state dict for `PaSST`, geometry).

    `source` is a file or a state dict with the authors' names; prefixes of their Lightning checkpoints and of compiled
    models are taken off, and of `net` and its average `net_swa` the average is taken. Geometry holds `num_mels` and
    those arguments of `PaSST` that shapes tell. Heads of unpublished widths must be given, and `stride` (mel bands,
    frames) where it is none of the published 10, 12, 14 and 16.

    Raises `UserError` for a file that is no such checkpoint, naming the keys it lacks or does not know.
    """
    name = "the state dict" if isinstance(source, dict) else str(source)
    theirs = bare_names(source if isinstance(source, dict) else read_torch_file(source))
    _check_names(theirs, name)
    geometry = read_geometry(theirs, num_mels, num_heads, stride)
    ours = {f"encoder.{key}": value for key, value in import_encoder(theirs).items()}
    left_out = [key for key in theirs if key in LEFT_OUT]
    if left_out:
        log.info("%s: %s left out, which no forward pass uses", name, " and ".join(left_out))
    return ours | {f"head.{key}": value for key, value in import_head(theirs).items()}, geometry


def import_head(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the head, a layer norm and a linear layer, for `LinearHead.load_state_dict`."""
    parts = {"norm.": "head.0.", "linear.": "head.1."}
    return {ours + kind: theirs[prefix + kind] for ours, prefix in parts.items() for kind in ("weight", "bias")}


def import_encoder(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the encoder's part of a state dict with bare names, for `Encoder.load_state_dict`."""
    tokens = [theirs[key] for key in ("cls_token", "dist_token") if key in theirs]
    ours = {
        "class_token": torch.cat(tokens, dim=1),
        "positions.class_table": theirs["new_pos_embed"],
        "positions.frequency": theirs["freq_new_pos_embed"][0].permute(1, 2, 0).contiguous(),
        "positions.time": theirs["time_new_pos_embed"][0].permute(1, 2, 0).contiguous(),
    }
    return ours | {key: value for key, value in theirs.items() if key.startswith(("blocks.", "norm.", "patch_embed."))}


def translate(theirs: dict[str, Tensor], settings: Settings, *, file_name: str = "") -> Translation:
    """Translate an encoder and its classifier from a state dict with bare names.

    `file_name` tells the hop of the published variants; otherwise a time table of 320 columns does, and `hop_ms=`.
    """
    geometry = read_geometry(theirs, settings.num_mels or PASST_MEL["num_mels"], settings.num_heads, settings.stride)
    columns, stride = theirs["time_new_pos_embed"].shape[3], geometry["stride_time"]
    classes, width = theirs["head.1.weight"].shape if "head.1.weight" in theirs else (None, geometry["width"])
    hop_ms, notes = _hop_of(columns * stride, file_name, settings)
    seconds = round(columns * stride * hop_ms / 1000)
    frames, cells = geometry["position_frames"], ((geometry["patch"],) * 2, (geometry["stride"], stride))
    if seconds == 0 or grid_of(geometry["num_mels"], round(seconds * 1000 / hop_ms), *cells)[1] > columns:
        seconds = frames * hop_ms / 1000
    sizes = {key: geometry[key] for key in ("num_mels", "width", "depth", "num_heads", "mlp_ratio")}
    cut = dict(frames=frames, patch=[geometry["patch"]] * 2, stride=[geometry["stride"], stride])
    tokens = dict(positions="time+frequency", num_class_tokens=2 if geometry["distilled"] else 1)
    result = Translation(
        method=PASST,
        encoder=import_encoder(theirs),
        geometry=sizes | cut | tokens | dict(drop_path=0.0),
        frontend=PASST_MEL | {"seconds": seconds, "hop_ms": hop_ms},
        licence=PASST_LICENCE,
        rows=[_row(key, has_head=classes is not None) for key in theirs],
        notes=notes,
    )
    if classes is not None:
        result.head = dict(width_in=width, num_classes=classes, pooling="class", norm="layer", eps=1e-5)
        result.head_weights = import_head(theirs)
    return result


def _hop_of(frames: int, file_name: str, settings: Settings) -> tuple[float, list[str]]:
    """Tell the hop in ms: given, in the name of the published file, or the only one its table fits."""
    if "hop_ms" in settings.frontend:
        return settings.frontend["hop_ms"], []
    for name, hop_ms in LONGER_HOPS.items():
        if name in file_name:
            return hop_ms, [f"hop_ms={hop_ms:g}, as {name} in the file's name says"]
    if frames == 3200:
        return 3.125, ["hop_ms=3.125: the published table of 320 columns is that of 10 s in steps of 100 samples"]
    if frames == 2000:
        return 10, [
            "a table of 200 columns is that of 20 s, or of 10 s at hop_ms=5: 20 s are taken, as no name says otherwise"
        ]
    return 10, []


def _row(key: str, *, has_head: bool) -> Row:
    if key in ("head.0.weight", "head.0.bias") and not has_head:
        return Row(key, Action.DROPPED, why="norm of a classifier that is not there")
    if key in ("cls_token", "dist_token"):
        return Row(key, Action.CHANGED, "class_token", "class and distillation token side by side")
    if key in ("freq_new_pos_embed", "time_new_pos_embed"):
        ours = "positions.frequency" if key.startswith("freq") else "positions.time"
        return Row(key, Action.TRANSPOSED, ours, "(1, D, rows, columns) to (rows, columns, D)")
    if key in RENAMED:
        return row(key, key, RENAMED[key])
    if key in LEFT_OUT:
        return Row(key, Action.DROPPED, why="no forward pass of theirs uses it")
    return row(key, key, key) if key.startswith(("blocks.", "norm.", "patch_embed.")) else Row(key, Action.UNKNOWN)


def is_passt(state: dict[str, Tensor]) -> bool:
    """Tell whether a state dict with bare names has PaSST's positions."""
    return state.keys() >= set(TOKENS)


def bare_names(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Find the model in a checkpoint, flat or of Lightning, and take prefixes off; the average goes before the last."""
    state = checkpoint.get("state_dict", checkpoint)
    for prefix in ("net_swa.", "net."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            log.info("the weights named %s* are taken", prefix)
            break
    return {key.replace("_orig_mod.", ""): value for key, value in state.items()}


def split_image_positions(table: Tensor, grid: tuple[int, int], num_tokens: int) -> dict[str, Tensor]:
    """Split a square image model's table (1, num_tokens + n * n, D) into ours for (rows, columns), as published.

    Its picture is stretched to the grid (bicubic); a row's vector is the mean over its columns and the reverse.
    """
    image = table[:, num_tokens:]
    side = round(image.shape[1] ** 0.5)
    if side * side != image.shape[1]:
        raise UserError(f"image positions of {image.shape[1]} patches: only square image models can be split")
    picture = image.mT.unflatten(2, (side, side))
    picture = interpolate(picture, size=grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    return {"positions.frequency": picture.mean(1, keepdim=True), "positions.time": picture.mean(0, keepdim=True)}


def _check_names(theirs: dict[str, Tensor], name: str) -> None:
    needed = {*TOKENS, *(f"{part}.{kind}" for part in ("patch_embed.proj", "norm") for kind in ("weight", "bias"))}
    needed |= {f"head.{part}.{kind}" for part in (0, 1) for kind in ("weight", "bias")}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = {int(key.split(".")[1]) for key in theirs if BLOCK.fullmatch(key)}
    depth = range(max(blocks, default=0) + 1)
    needed |= {f"blocks.{b}.{part}.{kind}" for b in depth for part in parts for kind in ("weight", "bias")}
    if "new_pos_embed" in theirs and theirs["new_pos_embed"].shape[1] == 2:
        needed.add("dist_token")
    missing = sorted(needed - theirs.keys())
    if missing:
        raise UserError(f"{name} is no PaSST checkpoint: it lacks {len(missing)} tensors ({', '.join(missing[:4])})")
    unknown = sorted(theirs.keys() - needed - set(LEFT_OUT))
    if unknown:
        raise UserError(f"{name} holds {len(unknown)} tensors that PaSST has not ({', '.join(unknown[:4])})")


def read_geometry(
    theirs: dict[str, Tensor], num_mels: int, num_heads: int | None, stride: tuple[int, int] | None
) -> dict[str, Any]:
    """Read sizes off the shapes of a state dict with bare names."""
    width, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    rows, columns = theirs["freq_new_pos_embed"].shape[2], theirs["time_new_pos_embed"].shape[3]
    if stride is None:
        fitting = [step for step in STRIDES if step <= patch and (num_mels - patch) // step + 1 == rows]
        if not fitting:
            raise UserError(f"{rows} rows of {num_mels} mel bands fit no published stride: give stride=(mels, frames)")
        if len(fitting) > 1:  # never at the published 128 bands
            steps = " or ".join(map(str, fitting))
            raise UserError(f"{rows} rows of {num_mels} mel bands may have a stride of {steps}: give stride=...")
        stride = (fitting[0], fitting[0])
    position_frames = (columns - 1) * stride[1] + patch
    if grid_of(num_mels, position_frames, (patch, patch), tuple(stride))[0] != rows:
        raise UserError(f"a table of {rows} rows does not fit num_mels={num_mels} and a stride of {stride[0]}")
    if num_heads is None and width not in HEADS:
        raise UserError(f"a width of {width} is not a published one, and a checkpoint does not tell: give num_heads")
    return {
        "num_mels": num_mels,
        "position_frames": position_frames,
        "patch": patch,
        "stride": stride[0],
        "stride_time": stride[1],
        "width": width,
        "depth": count_blocks(theirs),
        "num_heads": HEADS[width] if num_heads is None else num_heads,
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "distilled": "dist_token" in theirs,
        "num_classes": len(theirs["head.1.weight"]) if "head.1.weight" in theirs else None,
    }
