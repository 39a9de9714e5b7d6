"""How do timm's image models become encoders of spectrograms?

Blocks keep their names. The three colour kernels of the patch embedding are summed, and positions on a square image
become what the target has: PaSST (2110.05069) takes their means along rows and columns, Audio-MAE (2207.06405) has
fixed codes and leaves them behind. The classifier of images stays behind, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.parts.positions import AxisPositions
from audiossl.weights.passt import split_image_positions
from audiossl.weights.published import AUDIOMAE, KALDI_FBANK, PASST, PASST_MEL
from audiossl.weights.translation import Action, Licence, Row, Settings, Translation, count_blocks, heads_of, row

LICENCE = Licence(
    "Apache-2.0", "https://github.com/huggingface/pytorch-image-models", "DeiT and timm; see the model's own card"
)
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
LEFT_OUT = ("head.", "head_dist.", "fc_norm.", "pre_logits.")
PATCH = 16


def is_image_model(state: dict[str, Tensor]) -> bool:
    """Tell whether a state dict is a vision transformer's with three colours."""
    kernel = state.get("patch_embed.proj.weight")
    return isinstance(kernel, Tensor) and kernel.ndim == 4 and kernel.shape[1] == 3 and "cls_token" in state


def translate(theirs: dict[str, Tensor], settings: Settings) -> Translation:
    """Translate an image model into the start of a PaSST or an Audio-MAE encoder, as `like=` says."""
    if settings.like is None:
        raise UserError("an image model: say what it shall become, like=passt or like=audiomae")
    method, published = {"passt": (PASST, PASST_MEL), "audiomae": (AUDIOMAE, KALDI_FBANK)}[settings.like]
    frontend = published | settings.frontend
    if frontend["seconds"] is None:
        raise UserError("seconds=null: positions of an image model are made for a length, which must be given")
    width, tokens = theirs["patch_embed.proj.weight"].shape[0], 1
    is_passt = settings.like == "passt"
    if is_passt and "dist_token" in theirs:
        tokens = 2
    stride = settings.stride or ((10, 10) if is_passt else (PATCH, PATCH))
    geometry = dict(
        num_mels=frontend["num_mels"],
        frames=round(frontend["seconds"] * 1000 / frontend["hop_ms"]),
        patch=[PATCH, PATCH],
        stride=list(stride),
        width=width,
        depth=count_blocks(theirs),
        num_heads=heads_of(settings.num_heads, HEADS, width),
        mlp_ratio=theirs["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in theirs,
        positions="time+frequency" if is_passt else settings.positions or "published",
        num_class_tokens=tokens,
        drop_path=0.0,
        final_norm="norm.weight" in theirs,
    )
    return Translation(
        method=method,
        encoder=from_timm(theirs, Encoder(**geometry)),
        geometry=geometry,
        frontend=dict(published),
        licence=LICENCE,
        rows=[_row(key, theirs, is_passt, tokens) for key in theirs],
        warnings=["weights of an image model: a start for training, which has heard nothing yet"],
    )


def from_timm(state: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """Turn a timm vision transformer's state dict into ours: RGB kernels summed, resized to our patch if need be."""
    kernel = rgb_to_mono(state["patch_embed.proj.weight"])
    if tuple(kernel.shape[-2:]) != encoder.patch:
        kernel = F.interpolate(kernel, encoder.patch, mode="bicubic", antialias=True)
    ours = {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": state["patch_embed.proj.bias"]}
    if encoder.num_class_tokens:
        tokens = [state["cls_token"], state.get("dist_token", state["cls_token"])]
        ours["class_token"] = torch.cat(tokens[: encoder.num_class_tokens], dim=1)
    ours |= _image_positions(state, encoder)
    ours |= {k: v for k, v in state.items() if k.startswith(("blocks.", "norm."))}
    return ours


def _image_positions(state: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """Take what the model's positions can use of a square image's.

    Where the image model has no distillation token, ours starts as a copy of its class token, position included.
    """
    own = {f"positions.{name}": value.detach().clone() for name, value in encoder.positions.state_dict().items()}
    if not isinstance(encoder.positions, AxisPositions):
        return own
    table, num_tokens = state["pos_embed"], 2 if "dist_token" in state else 1
    if encoder.num_class_tokens:
        own["positions.class_table"] = table[:, [0, num_tokens - 1][: encoder.num_class_tokens]]
    return own | split_image_positions(table, encoder.grid, num_tokens)


def _row(key: str, theirs: dict[str, Tensor], is_passt: bool, num_class_tokens: int) -> Row:
    if key == "patch_embed.proj.weight":
        size = "" if tuple(theirs[key].shape[-2:]) == (PATCH, PATCH) else f", resized to {PATCH} x {PATCH}"
        return Row(key, Action.CHANGED, key, f"summed over the colours{size}")
    if key == "cls_token":
        return row(key, key, "class_token")
    if key == "dist_token":
        if num_class_tokens == 2:
            return Row(key, Action.CHANGED, "class_token", "joined to the class token")
        return Row(key, Action.DROPPED, why="Audio-MAE has no distillation token")
    if key == "pos_embed" and is_passt:
        ours = "positions.frequency, positions.time, positions.class_table"
        return Row(key, Action.CHANGED, ours, "stretched to the grid (bicubic), then means over columns and over rows")
    if key == "pos_embed":
        return Row(key, Action.DROPPED, why="fixed sine-cosine codes of the spectrogram's grid replace the image's")
    if key.startswith(LEFT_OUT):
        return Row(key, Action.DROPPED, why="classifier of images")
    return row(key, key, key) if key.startswith(("blocks.", "norm.", "patch_embed.")) else Row(key, Action.UNKNOWN)


def resize_image_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Stretch a square image model's table (1, 1 + n * n, D) to a grid (1, 1 + rows * columns, D), bicubic."""
    side = round((table.shape[1] - 1) ** 0.5)
    image = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=side)
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(image, "1 d h w -> 1 (h w) d")], dim=1)


def rgb_to_mono(kernel: Tensor) -> Tensor:
    """Sum a patch kernel (D, 3, p, p) over the colours: (D, 1, p, p)."""
    return kernel.sum(1, keepdim=True)
