"""What is left of a run for everyone else: the encoder, its front end, its head if it has one, and nothing to guess.

`encoder.safetensors` holds the tensors (no pickle), a head's under `head.*`, those that weigh its moments under
`attention.*`; its header holds the description: how
encoder, front end and head are rebuilt, on what they were trained, by which code, under which licence. `encoder.json`
beside it is the same text for readers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from audiossl.config.secrets import mask
from audiossl.config.settings import find_target, instantiate
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead
from audiossl.pretrained import PretrainedEncoder
from audiossl.scoring.pooling import AttentionWeights
from audiossl.sound.frontend import FrontEnd
from audiossl.version import __version__

FORMAT = 2  # 1: no head, no hash
log = logging.getLogger(__name__)


def export_encoder(
    method: nn.Module,
    config: dict[str, Any],
    path: Path,
    *,
    vocabulary: list[str] | None = None,
    provenance: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a method's `encoder`, and its `head` if it is a `LinearHead`, to `path` (.safetensors).

    Another kind of head stays behind, since nothing here could rebuild it. `vocabulary` names the classes that the
    method was trained on, if it was; `provenance` is the run's; `extra` joins the description.
    """
    head = getattr(method, "head", None)
    if head is not None and not isinstance(head, LinearHead):
        log.warning("%s: a head of type %s is not exported, only a LinearHead is", path, type(head).__name__)
        head = None
    description = describe(method.encoder, head, config["frontend"], vocabulary)
    description |= {
        "method": config["model"]["_target_"],
        "mask_padding": getattr(method, "mask_padding", False),
        "corpus": {
            "shards": mask(config["data"].get("shards") or config["data"].get("sources")),
            "mean": config["data"]["mean"],
            "std": config["data"]["std"],
        },
        "licence": (provenance or {}).get("licence"),
        "provenance": mask(provenance),
    }
    description |= getattr(method, "listening", {}) | (extra or {})
    attention = None if head is None else getattr(method, "attention", None)
    write_export(method.encoder, head, description, path, attention=attention)


def describe(
    encoder: Encoder, head: LinearHead | None, frontend: dict[str, Any], vocabulary: list[str] | None
) -> dict[str, Any]:
    """Say how encoder, front end (its settings) and head are rebuilt, and which classes the head knows."""
    return {
        "format": FORMAT,
        "audiossl": __version__,
        "geometry": encoder.geometry,
        "frontend": frontend,
        "frontend_hash": hash_of(frontend),
        "head": None if head is None else head.geometry,
    } | ({} if vocabulary is None else {"vocabulary": list(vocabulary)})


def hash_of(settings: dict[str, Any]) -> str:
    """Hash settings, whatever the order of their keys: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_export(
    encoder: Encoder, head: LinearHead | None, description: dict[str, Any], path: Path, *,
    attention: AttentionWeights | None = None,
) -> None:  # fmt: skip
    """Write tensors and description to `path` (.safetensors), and the description to the .json beside it, atomically.

    Readable by whom the user's umask lets.
    """
    weights, parts = encoder.state_dict(), {"head": head, "attention": attention}
    for name, part in parts.items():
        weights |= {} if part is None else {f"{name}.{key}": value for key, value in part.state_dict().items()}
    description = {key: value for key, value in description.items() if key != "attention"}
    description |= {} if attention is None else {"attention": attention.geometry}
    text = json.dumps(description, indent=2)
    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    for target, content in (
        (path, save(plain, metadata={"description": text})),  # save_file would keep it to the user alone
        (path.with_suffix(".json"), (text + "\n").encode()),
    ):
        part = target.with_name(target.name + ".part")
        part.write_bytes(content)
        os.replace(part, target)


def load_encoder(path: str | Path) -> PretrainedEncoder:
    """Load what `export_encoder` wrote: the file, or the folder it lies in; eval mode, on the CPU.

    Raises `UserError` when the file is missing, no export of ours, or has been tampered with.
    """
    path = Path(path)
    path = path / "encoder.safetensors" if path.is_dir() else path
    description, weights = read_export(path)
    check_target_of(description["frontend"], path)
    try:
        encoder, frontend = Encoder(**description["geometry"]), instantiate(description["frontend"])
        head = LinearHead(**description["head"]) if description.get("head") else None
        attention = AttentionWeights(**description["attention"]) if description.get("attention") else None
        for part, own in zip((encoder, head, attention), parts_of(weights).values(), strict=True):
            if part is not None:
                part.load_state_dict(own)
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its tensors and its description do not belong together ({reason})") from error
    return PretrainedEncoder(encoder, frontend, head, description, attention).eval()


def parts_of(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tell an export's tensors apart, under the names they have in their own modules: encoder, head, attention."""
    found: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}, "attention": {}}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        found[part if part in found else "encoder"][name if part in found else key] = value
    return found


def check_target_of(frontend: dict[str, Any], path: Path) -> None:
    """Refuse a description whose front end is none: it names what gets called, and may come from a stranger."""
    target = find_target(str(frontend.get("_target_")))
    is_frontend = inspect.isclass(target) and issubclass(target, FrontEnd)
    if not is_frontend or any(isinstance(value, dict) for value in frontend.values()):
        raise UserError(f"{path}: frontend._target_={frontend.get('_target_')} is no front end; do not trust this file")


def read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read description and tensors of an exported encoder; refuse a front end that is not the one it was made with."""
    metadata, weights = read_safetensors(path)
    if "description" not in metadata:
        raise UserError(
            f"{path}: a safetensors file, but not one that audiossl exported (no description in its header)"
        )
    description = _parsed(metadata["description"], path)
    if missing := [key for key in ("format", "audiossl", "geometry", "frontend") if key not in description]:
        raise UserError(f"{path}: its description lacks {', '.join(missing)}; export it again")
    if description["format"] > FORMAT:
        raise UserError(
            f"{path}: written by audiossl {description['audiossl']}, newer than this {__version__}; upgrade"
        )
    if description.get("frontend_hash", hash_of(description["frontend"])) != hash_of(description["frontend"]):
        raise UserError(f"{path}: its front end was changed after the export (another hash); export it again")
    beside = path.with_suffix(".json")
    if beside.exists() and _parsed(beside.read_text(encoding="utf-8"), beside) != description:
        raise UserError(
            f"{beside}: differs from the header of {path.name}, which alone counts; restore it or delete it"
        )
    return description, weights


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its description is no JSON ({error}); restore it, or export it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: its description is no mapping; restore it, or export it again")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read header texts and tensors; raise `UserError` naming a file that is missing or broken."""
    if not path.exists():
        raise UserError(f"{path}: no such file; a finished run leaves encoder.safetensors in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        kinds = "another kind is never opened here"
        raise UserError(f"{path}: not a readable safetensors file ({error}); {kinds}") from None
