"""How does a trained classifier become a teacher?

From an export with a head (a run's folder, its encoder.safetensors), or from the ATST authors' fine-tuned file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead
from audiossl.weights.atst import PATCH, import_finetuned
from audiossl.weights.export import load_encoder
from audiossl.weights.origins import LICENCES

CLIP_FRAMES, FRAME_FRAMES = 601, 1001  # that the authors fine-tuned with


def load_classifier(
    source: str, *, num_classes: int, num_heads: int | None = None
) -> tuple[nn.ModuleDict, int, dict[str, Any]]:
    """Load `encoder` and `head` of a fine-tuned ATST, the frames it was trained with, its description.

    Raises `UserError` for what is no such classifier, and for one of another number of classes.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"model.teacher={source}: no such file; give a run's folder, its export or a .ckpt")
    if path.is_dir() or path.suffix == ".safetensors":
        model = load_encoder(path)
        if model.head is None or model.encoder.geometry["positions"] != "learned":
            raise UserError(f"model.teacher={source}: holds no ATST classifier, only an encoder or another method's")
        encoder, head, frames, description = model.encoder, model.head, model.frontend.frames, model.description
    else:
        weights, head_weights, sizes = import_finetuned(path, num_heads=num_heads)
        frames = CLIP_FRAMES if sizes["num_class_tokens"] else FRAME_FRAMES
        places = dict(num_mels=PATCH[0], frames=sizes.pop("position_frames"), positions="learned")
        encoder, description = Encoder(**places, drop_path=0.0, **sizes), {"licence": LICENCES["atst"]}
        encoder.load_state_dict(weights)
        classes, width = head_weights["linear.weight"].shape
        head = LinearHead(width, classes, pooling="class+mean" if sizes["num_class_tokens"] else "mean")
        head.load_state_dict(head_weights)
    if head.geometry["num_classes"] != num_classes:
        raise UserError(
            f"model.teacher={source}: names {head.geometry['num_classes']} classes, the shards have {num_classes}"
        )
    return nn.ModuleDict({"encoder": encoder, "head": head}).train(), frames, description
