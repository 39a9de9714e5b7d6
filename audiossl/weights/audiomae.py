"""How do the Audio-MAE authors' weights become ours?

Their spectrograms are (time, frequency), ours (frequency, time). So kernels are transposed, position tables and the
rows of the last layer reordered, and the two inputs of the relative-position MLP swapped; nothing else differs. Sizes
are read from the shapes. Layout of facebookresearch/AudioMAE (2207.06405): `{"model": state_dict}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audiossl.errors import UserError
from audiossl.parts.positions import sincos_table
from audiossl.weights.published import AUDIOMAE, AUDIOMAE_LICENCE, AUDIOMAE_PORT_LICENCE, KALDI_FBANK
from audiossl.weights.reading import read_torch_file
from audiossl.weights.translation import Action, Row, Settings, Translation, count_blocks, heads_of, row

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
HEAD = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (("fc_norm", "norm"), ("head", "linear"))
    for kind in ("weight", "bias")
}


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
    geometry = encoder_geometry(theirs, num_mels, num_heads)
    decoder_width, stride, patch = theirs["mask_token"].shape[-1], geometry["stride"], geometry["patch"]
    tau = theirs.get("decoder_blocks.0.attn.tau")
    decoder_heads = len(tau) if tau is not None else decoder_num_heads or DECODER_HEADS.get(decoder_width)
    if decoder_heads is None:
        raise UserError(
            f"a checkpoint does not tell its heads, and a decoder of width {decoder_width} is not a published one: "
            "give decoder_num_heads"
        )
    return geometry | {
        "decoder": "global" if tau is None else "local",
        "decoder_width": decoder_width,
        "decoder_depth": count_blocks(theirs, "decoder_blocks."),
        "decoder_num_heads": decoder_heads,
        "decoder_window": 6 if stride != patch else 4,
        "decoder_shift": "time",
    }


def encoder_geometry(theirs: dict[str, Tensor], num_mels: int, num_heads: int | None) -> dict[str, Any]:
    """Read the encoder's sizes off the shapes; `grid` (rows, columns) comes with them."""
    width, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    stride, grid = _read_grid(theirs["pos_embed"], patch, num_mels)
    return {
        "num_mels": num_mels,
        "frames": patch * -(-((grid[1] - 1) * stride + patch) // patch),  # overlap leaves a rest: 101 columns of 1024
        "grid": grid,
        "patch": patch,
        "stride": stride,
        "width": width,
        "depth": count_blocks(theirs),
        "num_heads": heads_of(num_heads, HEADS, width),
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "positions": _read_positions(theirs["pos_embed"], grid, stride != patch),
    }


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
        raise UserError(f"a position table of {num_tokens} tokens does not fit num_mels={num_mels}: give num_mels=...")
    return stride, (period, num_tokens // period)


def _read_positions(table: Tensor, grid: tuple[int, int], overlapping: bool) -> str:
    ours = frequency_first(table.float(), *grid)
    atol = 1e-5 if table.dtype in (torch.float32, torch.float64) else 1e-2
    for name in ("published", "corrected"):
        if torch.allclose(sincos_table(grid, table.shape[2], positions=name, overlapping=overlapping), ours, atol=atol):
            return name
    raise UserError("the position table is no sine-cosine code of this grid: was it trained with another num_mels?")


def translate(theirs: dict[str, Tensor], settings: Settings, *, is_port: bool) -> Translation:
    """Translate a pre-trained or fine-tuned encoder, with its classifier if it has one; `is_port`: timm's names for it.

    What has no counterpart stays behind, and the rows say why. Raises `UserError` for sizes that do not fit.
    """
    frontend = KALDI_FBANK | settings.frontend
    geometry = encoder_geometry(theirs, frontend["num_mels"], settings.num_heads)
    patch, stride = ([geometry.pop(key)] * 2 for key in ("patch", "stride"))
    del geometry["grid"]
    geometry |= dict(patch=patch, stride=stride, drop_path=0.0, final_norm="norm.weight" in theirs)
    has_head, is_mean = "head.weight" in theirs, "fc_norm.weight" in theirs
    found = Translation(
        method=AUDIOMAE,
        encoder=import_encoder(theirs, num_mels=frontend["num_mels"]),
        geometry=geometry,
        frontend=KALDI_FBANK | {"seconds": geometry["frames"] * frontend["hop_ms"] / 1000},
        licence=AUDIOMAE_PORT_LICENCE if is_port else AUDIOMAE_LICENCE,
        rows=[_row(key, theirs, has_head) for key in theirs],
    )
    if has_head:
        classes, width = theirs["head.weight"].shape
        pooling = dict(pooling="mean", norm="layer") if is_mean else dict(pooling="class", norm="none")  # timm's rule
        found.head = dict(width_in=width, num_classes=classes, eps=1e-6, **pooling)
        found.head_weights = {ours: theirs[key] for key, ours in HEAD.items() if key in theirs}
    elif is_mean:
        found.warnings.append("fc_norm, which normalises the mean of the tokens for a classifier, is left out")
    if not {"mean", "std"} <= settings.frontend.keys():
        found.notes.append(
            "mean and std are AudioSet's; weights tuned elsewhere need mean=... std=... (ESC-50: -6.6268077, 5.358466)"
        )
    return found


def _row(key: str, theirs: dict[str, Tensor], has_head: bool) -> Row:
    if key in HEAD:
        return row(key, key, f"head.{HEAD[key]}") if has_head else Row(key, Action.DROPPED, why="no classifier")
    if key == "pos_embed":
        return Row(key, Action.REORDERED, "positions.table", "time-major to frequency-major; first place: cls_token")
    if key == "cls_token":
        added = float(theirs["pos_embed"][:, 0].abs().max())
        return Row(key, Action.CHANGED, "class_token", f"plus the first place of pos_embed, at most {added:.3g}")
    if key == "patch_embed.proj.weight":
        return Row(key, Action.TRANSPOSED, key, "(time, frequency) to (frequency, time)")
    if key.startswith(tuple(DECODER)):
        return Row(key, Action.DROPPED, why="decoder, which only pre-training uses")
    if key.startswith(LEFT_OVER):
        return Row(key, Action.DROPPED, why="no forward pass of the published code uses it")
    return row(key, key, key) if key.startswith(tuple(ENCODER)) else Row(key, Action.UNKNOWN)
