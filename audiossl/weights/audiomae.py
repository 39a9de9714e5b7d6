"""How do the Audio-MAE authors' weights become ours?

Their spectrograms are (time, frequency), ours (frequency, time). So kernels are transposed, position tables and the
rows of the last layer reordered, and the two inputs of the relative-position MLP swapped; nothing else differs. Sizes
are read from the shapes. Layout of facebookresearch/AudioMAE (2207.06405): `{"model": state_dict}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiossl.errors import UserError
from audiossl.parts.positions import sincos_table
from audiossl.weights.reading import read_torch_file

HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published widths; shapes do not tell
DECODER_HEADS = {512: 16}
ENCODER = {"cls_token": "class_token", "pos_embed": "positions.table", "patch_embed.": "", "blocks.": "", "norm.": ""}
DECODER = {
    "mask_token": "mask_token",
    "decoder_pos_embed": "positions.table",
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "predict.",
}
LEFT_OVER = ("encoder_emb.", "decoder_emb_pixel.")  # unused parts that old files hold


def import_pretrained(
    source: str | Path | dict[str, Tensor],
    *,
    num_mels: int = 128,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Translate a pre-training checkpoint: (state dict for `AudioMAE`, geometry).

    Geometry holds `num_mels` and `frames` of the front end and those arguments of `AudioMAE` that shapes tell.
    `source` is a file or a state dict with the authors' names. The heads of unpublished widths must be given;
    `decoder_shift` is "time", as published. Load the result with `load_state_dict`; a front end adds no weights.

    Raises `UserError` for a file that is no such checkpoint, naming the keys it lacks or does not know.
    """
    name = "the state dict" if isinstance(source, dict) else str(source)
    theirs = source if isinstance(source, dict) else read_torch_file(source).get("model", {})
    _check_names(theirs, name)
    geometry = read_geometry(theirs, num_mels, num_heads, decoder_num_heads)
    grid = geometry.pop("grid")
    ours = {f"encoder.{key}": value for key, value in import_encoder(theirs, num_mels=num_mels).items()}
    for key, value in theirs.items():
        if key.startswith(tuple(DECODER)):
            ours[our_name(key)] = _reorder(key, value, geometry["patch"], grid)
    return ours, geometry


def import_encoder(theirs: dict[str, Tensor], *, num_mels: int = 128) -> dict[str, Tensor]:
    """Translate the encoder's part of a pre-training or fine-tuning state dict, for `Encoder.load_state_dict`.

    Fine-tuned files have no `norm`: their head normalises the mean instead.
    """
    patch = theirs["patch_embed.proj.weight"].shape[-1]
    _, grid = _read_grid(theirs["pos_embed"], patch, num_mels)
    found = {key: _reorder(key, value, patch, grid) for key, value in theirs.items() if key.startswith(tuple(ENCODER))}
    # the class token's place in the table is zero; adding it keeps a stranger's table right too
    found["cls_token"] = theirs["cls_token"] + theirs["pos_embed"][:, :1]
    return {our_name(key).removeprefix("encoder."): value for key, value in found.items()}


def is_audiomae(state: dict[str, Tensor]) -> bool:
    """Tell whether a state dict has the names and the one-channel kernel of the authors' encoder."""
    kernel = state.get("patch_embed.proj.weight")
    one_channel = isinstance(kernel, Tensor) and kernel.ndim == 4 and kernel.shape[1] == 1
    return one_channel and {"cls_token", "pos_embed", "blocks.0.attn.qkv.bias"} <= state.keys()


def _check_names(theirs: dict[str, Tensor], name: str) -> None:
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    needed += ("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.weight")
    missing = [key for key in needed if key not in theirs]
    if missing:
        raise UserError(f"{name} is no Audio-MAE pre-training checkpoint: it lacks {', '.join(missing[:4])}")
    known = (*ENCODER, *DECODER, *LEFT_OVER)
    unknown = [key for key in theirs if not key.startswith(known)]
    if unknown:
        raise UserError(f"{name} holds {len(unknown)} tensors that Audio-MAE has not, {unknown[0]} for example")


def our_name(key: str) -> str:
    """Translate the name of one of the authors' tensors to that of `AudioMAE`."""
    part, names = ("encoder", ENCODER) if key.startswith(tuple(ENCODER)) else ("decoder", DECODER)
    prefix = next(prefix for prefix in names if key.startswith(prefix))
    renamed = (names[prefix] or prefix) + key.removeprefix(prefix)
    return f"{part}.{renamed}".replace(".meta_mlp.", ".position_mlp.")


def _reorder(key: str, value: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    if key.endswith("pos_embed"):
        return frequency_first(value, *grid)
    if key == "patch_embed.proj.weight":
        value = value.transpose(2, 3)
    elif key.startswith("decoder_pred."):
        value = rearrange(value, "(t f) ... -> (f t) ...", t=patch)
    elif key.endswith(".meta_mlp.fc1.weight"):
        value = value.flip(1)
    return value.contiguous()


def frequency_first(table: Tensor, rows: int, columns: int) -> Tensor:
    """Reorder a position table (1, 1 + N, D), time-major behind its class token, to ours: (rows, columns, D)."""
    return rearrange(table[0, 1:], "(column row) d -> row column d", row=rows, column=columns).contiguous()


def read_geometry(
    theirs: dict[str, Tensor], num_mels: int, num_heads: int | None, decoder_num_heads: int | None
) -> dict[str, Any]:
    """Read sizes off the shapes; `grid` (rows, columns) comes with them."""
    width, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    decoder_width = theirs["mask_token"].shape[-1]
    stride, grid = _read_grid(theirs["pos_embed"], patch, num_mels)
    tau = theirs.get("decoder_blocks.0.attn.tau")
    overlapping = stride != patch
    frames = patch * -(-((grid[1] - 1) * stride + patch) // patch)  # overlap leaves a remainder: 101 columns of 1024
    return {
        "num_mels": num_mels,
        "frames": frames,
        "grid": grid,
        "patch": patch,
        "stride": stride,
        "width": width,
        "depth": _count(theirs, "blocks."),
        "num_heads": _heads(num_heads, HEADS, width, "num_heads"),
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "positions": _read_positions(theirs["pos_embed"], grid, overlapping),
        "decoder": "global" if tau is None else "local",
        "decoder_width": decoder_width,
        "decoder_depth": _count(theirs, "decoder_blocks."),
        "decoder_num_heads": len(tau)
        if tau is not None
        else _heads(decoder_num_heads, DECODER_HEADS, decoder_width, "decoder_num_heads"),
        "decoder_window": 6 if overlapping else 4,
        "decoder_shift": "time",
    }


def _count(theirs: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in theirs if key.startswith(prefix))


def _heads(given: int | None, published: dict[int, int], width: int, name: str) -> int:
    if given is None and width not in published:
        raise UserError(
            f"a checkpoint does not tell its heads, and a width of {width} is not a published one: give {name}"
        )
    return published[width] if given is None else given


def _read_grid(table: Tensor, patch: int, num_mels: int) -> tuple[int, tuple[int, int]]:
    """Tell stride and (rows, columns) from the number of tokens.

    Plain patches have num_mels / patch rows. Otherwise they overlap: the codes' first half repeats every `rows`
    tokens.
    """
    num_tokens, half = table.shape[1] - 1, table.shape[2] // 2
    first = table[0, 1:, :half]
    repeats = (first[1:] - first[0]).abs().amax(1) < 1e-6
    period = int(repeats.nonzero()[0]) + 1 if bool(repeats.any()) else num_tokens
    rows = num_mels // patch
    if num_tokens % rows == 0 and period in (num_tokens // rows, rows):
        return patch, (rows, num_tokens // rows)
    stride = (num_mels - patch) // max(period - 1, 1)
    if num_tokens % period or not 1 <= stride < patch or (num_mels - patch) // stride + 1 != period:
        raise UserError(f"a position table of {num_tokens} tokens does not fit num_mels={num_mels}: give the right one")
    return stride, (period, num_tokens // period)


def _read_positions(table: Tensor, grid: tuple[int, int], overlapping: bool) -> str:
    ours = frequency_first(table.float(), *grid)
    for name in ("published", "corrected"):
        if torch.allclose(sincos_table(grid, table.shape[2], positions=name, overlapping=overlapping), ours, atol=1e-5):
            return name
    raise UserError("the position table is no sine-cosine code of this grid: was it trained with another num_mels?")


def cut_positions(table: Tensor, rows: int, columns: int, kept_columns: int) -> Tensor:
    """Shorten the authors' table (1, 1 + rows * columns, D) as their fine-tuning code does: keeps the class token.

    It views the table as (frequency, time) and keeps the first `kept_columns` of the second axis. Their tokens run the
    other way, so a kept row stands for another cell than it was trained for: `corrected` tables have no such trouble.
    """
    cells = table[:, 1:].unflatten(1, (rows, columns))[:, :, :kept_columns].flatten(1, 2)
    return torch.cat([table[:, :1], cells], dim=1)


def resize_image_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Stretch a square image model's table (1, 1 + n * n, D) to a grid (1, 1 + rows * columns, D), bicubic."""
    side = round((table.shape[1] - 1) ** 0.5)
    image = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=side)
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(image, "1 d h w -> 1 (h w) d")], dim=1)


def rgb_to_mono(kernel: Tensor) -> Tensor:
    """Sum a patch kernel (D, 3, p, p) over the colours: (D, 1, p, p)."""
    return kernel.sum(1, keepdim=True)
