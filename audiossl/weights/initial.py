"""Where can an encoder start from?

From a run, a checkpoint or an exported encoder of ours, from the authors' files, or from an image model of timm: their
blocks have the same names, the three colour kernels of the patch embedding are summed (as Audio-MAE and PaSST do). Its
image positions are split into rows and columns where ours are (PaSST), and left behind where ours are another table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.parts.positions import AxisPositions, SinCosPositions
from audiossl.weights import atst, passt
from audiossl.weights.audiomae import import_encoder, is_audiomae
from audiossl.weights.export import read_export, read_safetensors
from audiossl.weights.origins import LICENCES, published_frontend
from audiossl.weights.reading import newest_checkpoint, read_torch_file


@dataclass(frozen=True)
class Start:
    """Hold weights under our names, words that say what they are, what they heard (None: images), their licence."""

    weights: dict[str, Tensor]
    origin: str
    frontend: dict[str, Any] | None = None
    licence: dict[str, Any] | None = None


def encoder_weights(source: str, encoder: Encoder) -> Start:
    """Read weights for `encoder` from `source`.

    `source`: `timm:NAME` (ImageNet weights, downloaded by timm), a run's folder, a `.ckpt`, `.safetensors` or `.pth`.
    """
    if source.startswith("timm:"):
        state, licence = _download(source.removeprefix("timm:"))
        return Start(from_timm(state, encoder), f"ImageNet weights {source}", licence=licence)
    path = Path(source)
    path = path / "encoder.safetensors" if path.is_dir() and (path / "encoder.safetensors").exists() else path
    if path.suffix == ".safetensors":
        if _is_timm(tensors := read_safetensors(path)[1]):
            return Start(from_timm(tensors, encoder), f"image weights {path}")
        description, own = read_export(path)
        own = _fit_positions({k: v for k, v in own.items() if not k.startswith("head.")}, encoder)
        return Start(own, f"encoder {path}", description["frontend"], description.get("licence"))
    path = newest_checkpoint(path) if path.is_dir() else path
    checkpoint = read_torch_file(path)
    if "audiossl" in checkpoint:
        return _from_checkpoint(checkpoint, path, encoder)
    return _from_authors(checkpoint, path, encoder)


def _from_checkpoint(checkpoint: dict[str, Any], path: Path, encoder: Encoder) -> Start:
    """Take the encoder of one of our training checkpoints, a teacher's where the method has one."""
    for prefix in ("method.encoder.", "method.teacher.encoder."):
        found = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        if found:
            break
    said = checkpoint["audiossl"]
    heard, licence = said["config"].get("frontend"), said.get("provenance", {}).get("licence")
    origin = f"checkpoint {path} (step {checkpoint['global_step']})"
    return Start(_fit_positions(found, encoder), origin, heard, licence)


def _from_authors(checkpoint: dict[str, Any], path: Path, encoder: Encoder) -> Start:
    """Take the encoder of a published file, or of an image model; raise `UserError` for what is neither."""
    state = checkpoint.get("model", checkpoint)
    if is_audiomae(state):
        family, name, found = "audiomae", "Audio-MAE", import_encoder(state)
    elif _is_timm(state):
        return Start(from_timm(state, encoder), f"image weights {path}")
    elif passt.is_passt(theirs := passt.bare_names(checkpoint)):
        family, name, found = "passt", "PaSST", passt.import_encoder(theirs)
    elif theirs := _atst_encoder(checkpoint):
        family, name, found = "atst", "ATST", atst.import_encoder(theirs, str(path))
    else:
        raise UserError(
            f"init={path}: neither ours, Audio-MAE's, ATST's, PaSST's nor a timm vision transformer: "
            f"keys {list(state)[:4]}"
        )
    fitted = _fit_positions(found, encoder)
    return Start(fitted, f"{name}'s {path}", published_frontend(family), LICENCES[family])


def _atst_encoder(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Find an ATST encoder in a Lightning file, the teacher's before the student's as published; empty without one."""
    state = checkpoint.get("state_dict", {})
    for prefix in ("model.teacher.encoder.", "encoder.encoder."):
        if f"{prefix}patch_embed.patch_embed.weight" in state:
            return atst.with_prefix(state, prefix)
    return {}


def from_timm(state: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """Turn a timm vision transformer's state dict into ours: RGB kernels summed, resized to our patch if need be."""
    kernel = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    if tuple(kernel.shape[-2:]) != encoder.patch:
        kernel = interpolate(kernel, encoder.patch, mode="bicubic", antialias=True)
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
    return own | passt.split_image_positions(table, encoder.grid, num_tokens)


def describe_mismatch(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """Say in one line how two state dicts differ, first five of each kind; None when they fit."""
    lines = []
    for what, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            lines.append(f"{len(names)} {what} ({', '.join(sorted(names)[:5])})")
    shapes = [k for k in sorted(wanted.keys() & found.keys()) if wanted[k].shape != found[k].shape]
    if shapes:
        pairs = (f"{k} {list(found[k].shape)} instead of {list(wanted[k].shape)}" for k in shapes[:5])
        lines.append(f"{len(shapes)} of another size ({', '.join(pairs)}); a model of that size: size=...")
    return "the weights do not fit the model: " + "; ".join(lines) if lines else None


def _fit_positions(found: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """Make positions of another grid fit where that loses nothing.

    A fixed table is a function of the grid: the model keeps its own. A learned one that reaches further is cut.
    """
    own = encoder.positions.state_dict()
    for name in ("time", "table"):
        key = f"positions.{name}"
        if name not in own or key not in found or found[key].shape == own[name].shape:
            continue
        is_fixed = isinstance(encoder.positions, SinCosPositions)
        columns = own[name].shape[1]
        found = found | {key: own[name].detach().clone() if is_fixed else found[key][:, :columns].contiguous()}
    return found


def _is_timm(state: dict[str, Any]) -> bool:
    kernel = state.get("patch_embed.proj.weight")
    return isinstance(kernel, torch.Tensor) and kernel.ndim == 4 and kernel.shape[1] == 3 and "cls_token" in state


def _download(name: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Get an image model's weights and licence by timm."""
    import timm

    try:
        model = timm.create_model(name, pretrained=True)
        said = model.pretrained_cfg.get("license")
        licence = {"name": said, "source": f"timm:{name}", "note": "as timm tells it"} if said else None
        return model.state_dict(), licence
    except Exception as error:
        raise UserError(
            f"init=timm:{name}: timm could not give these weights ({str(error).splitlines()[0][:120]}); on a machine "
            "without network save them as .safetensors elsewhere and give the file"
        ) from None
