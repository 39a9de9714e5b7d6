"""How does a trained classifier travel, and how does it become a teacher?

`classifier.safetensors` holds encoder and head, with the description of `encoder.safetensors` in its header. A teacher
is read from there, from a run's folder, or from the ATST authors' fine-tuned file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead
from audiossl.weights.atst import PATCH, import_finetuned
from audiossl.weights.export import describe, read_export, write_safetensors

CLIP_FRAMES, FRAME_FRAMES = 601, 1001  # that the authors fine-tuned with


def export_classifier(method: nn.Module, config: dict[str, Any], vocabulary: list[str], path: Path) -> None:
    """Write `method.encoder` and `method.head` to `path` (.safetensors), atomically."""
    parts = {"encoder": method.encoder, "head": method.head}
    weights = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    write_safetensors(weights, path, json.dumps(describe(method, config, vocabulary)))


def load_classifier(
    source: str, *, num_classes: int, num_heads: int | None = None
) -> tuple[nn.ModuleDict, int, dict[str, Any]]:
    """Load `encoder` and `head` (`LinearHead`) of a fine-tuned ATST, the frames it was trained with, its description.

    Raises `UserError` for what is no such classifier, and for one of another number of classes.
    """
    path = Path(source)
    path = path / "classifier.safetensors" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"model.teacher={source}: there is no {path}; give a run's folder, its classifier or a .ckpt")
    if path.suffix == ".safetensors":
        description, weights = read_export(path)
        geometry, frames = description["geometry"], instantiate(description["frontend"]).frames
        if "head.linear.weight" not in weights:
            raise UserError(f"model.teacher={source}: holds no ATST classifier, only {', '.join(sorted(weights)[:3])}")
    else:
        description = {}
        encoder, head, sizes = import_finetuned(path, num_heads=num_heads)
        weights = {f"encoder.{k}": v for k, v in encoder.items()} | {f"head.{k}": v for k, v in head.items()}
        frames = CLIP_FRAMES if sizes["num_class_tokens"] else FRAME_FRAMES
        geometry = dict(num_mels=PATCH[0], frames=sizes.pop("position_frames"), positions="learned", drop_path=0.0)
        geometry |= sizes
    classes, width = weights["head.linear.weight"].shape
    if classes != num_classes:
        raise UserError(f"model.teacher={source}: names {classes} classes, the shards have {num_classes}")
    teacher = nn.ModuleDict({"encoder": Encoder(**geometry), "head": LinearHead(width, classes)})
    teacher.load_state_dict(weights)
    return teacher, frames, description
