"""Where can an encoder start from?

From a run, a checkpoint or an exported encoder of ours, from any file that `audiossl import` recognises, or from an
image model of timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.importing.layouts import checkpoint_of, translate
from audiossl.parts.positions import AxisPositions, SinCosPositions
from audiossl.weights.export import parts_of, read_export, read_safetensors
from audiossl.weights.origins import family_of, published_frontend
from audiossl.weights.reading import newest_checkpoint, read_torch_file
from audiossl.weights.timm import from_timm, is_image_model
from audiossl.weights.translation import Settings


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
    if not path.exists():
        raise UserError(f"init={source}: no such file or folder; give a run, a checkpoint, an export or timm:NAME")
    path = path / "encoder.safetensors" if path.is_dir() and (path / "encoder.safetensors").exists() else path
    if path.suffix == ".safetensors":
        header, tensors = read_safetensors(path)
        if "description" not in header:
            return _from_authors(path, tensors, encoder)
        description, own = read_export(path)
        own = _fit_positions(parts_of(own)["encoder"], encoder)
        return Start(own, f"encoder {path}", description["frontend"], description.get("licence"))
    path = newest_checkpoint(path) if path.is_dir() else path
    content = read_torch_file(path)
    if "audiossl" in content:
        return _from_checkpoint(content, path, encoder)
    return _from_authors(path, content, encoder)


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


def _from_authors(path: Path, content: Mapping[str, Any], encoder: Encoder) -> Start:
    """Take the encoder of a published file, or of an image model; raise `UserError` for what is neither."""
    checkpoint = checkpoint_of(path, content)
    if is_image_model(checkpoint.tensors):
        return Start(from_timm(checkpoint.tensors, encoder), f"image weights {path}")
    stride = encoder.stride if isinstance(encoder.positions, AxisPositions) else None
    sizes = encoder.geometry
    bands = {"num_mels": sizes["num_mels"]} if sizes["positions"] != "learned" else {}
    settings = Settings(num_heads=sizes["num_heads"], stride=stride, frontend=bands)
    layout, found = translate(checkpoint, settings)
    heard = published_frontend(family_of(found.frontend))
    return Start(_fit_positions(found.encoder, encoder), f"{path} ({layout})", heard, asdict(found.licence))


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
