"""What is left of a run for everyone else: the encoder, its front end, and nothing to guess.

`encoder.safetensors` holds the tensors (no pickle); `encoder.json` beside it, and the same text in the tensors' header,
says how to build encoder and front end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from audiossl.config.settings import instantiate
from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.spectrogram import resample
from audiossl.version import __version__

FORMAT = 1


class LoadedEncoder(nn.Module):
    """Hold an encoder with the front end it was trained with.

    `model(waveform, rate_hz)` gives tokens (B, 1 + N, D), the class token first, from waveform (B, S) in [-1, 1] at any
    rate; clips longer than the model's length are cut to it, shorter ones padded as in training. Use
    `audiossl.probing.clip_features` for clips of any length.
    """

    def __init__(self, encoder: Encoder, frontend: nn.Module, description: dict[str, Any]):
        super().__init__()
        self.encoder = encoder
        self.frontend = frontend
        self.description = description

    def forward(self, waveform: Tensor, rate_hz: int) -> Tensor:
        return self.encoder(self.frontend(resample(waveform, rate_hz, self.frontend.rate_hz)))


def export_encoder(
    method: nn.Module, config: dict[str, Any], path: Path, *, vocabulary: list[str] | None = None
) -> None:
    """Write `method.encoder` to `path` (.safetensors) and its description to the .json beside it, both atomically.

    `vocabulary` names the classes that the method was trained on, if it was.
    """
    text = json.dumps(describe(method, config, vocabulary), indent=2)
    write_safetensors(method.encoder.state_dict(), path, text)
    part = path.with_suffix(".json.part")
    part.write_text(text + "\n")
    os.replace(part, path.with_suffix(".json"))


def write_safetensors(weights: dict[str, Tensor], path: Path, description: str) -> None:
    """Write tensors and a description to `path`, atomically, readable by whom the user's umask lets."""
    part = path.with_name(path.name + ".part")
    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    part.write_bytes(save(plain, metadata={"description": description}))  # save_file would keep it to the user alone
    os.replace(part, path)


def describe(method: nn.Module, config: dict[str, Any], vocabulary: list[str] | None) -> dict[str, Any]:
    """Say how encoder and front end are rebuilt, what they were trained on, and on which classes if on any."""
    description = {
        "format": FORMAT,
        "audiossl": __version__,
        "method": config["model"]["_target_"],
        "geometry": method.encoder.geometry,
        "frontend": config["frontend"],
        "corpus": {
            "shards": config["data"].get("shards") or config["data"].get("sources"),
            "mean": config["data"]["mean"],
            "std": config["data"]["std"],
        },
    }
    return description | ({} if vocabulary is None else {"vocabulary": vocabulary})


def load_encoder(path: str | Path) -> LoadedEncoder:
    """Load what `export_encoder` wrote: the file, or the run's folder; eval mode, on the CPU.

    Raises `UserError` when the file is missing or no export of ours.
    """
    path = Path(path)
    path = path / "encoder.safetensors" if path.is_dir() else path
    description, weights = read_export(path)
    encoder = Encoder(**description["geometry"])
    encoder.load_state_dict(weights)
    return LoadedEncoder(encoder, instantiate(description["frontend"]), description).eval()


def read_export(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read description and tensors of an exported encoder."""
    metadata, weights = read_safetensors(path)
    if "description" not in metadata:
        raise UserError(
            f"{path}: a safetensors file, but not one that audiossl exported (no description in its header)"
        )
    description = json.loads(metadata["description"])
    if description["format"] > FORMAT:
        raise UserError(
            f"{path}: written by audiossl {description['audiossl']}, newer than this {__version__}; upgrade"
        )
    return description, weights


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read header texts and tensors; raise `UserError` naming a file that is missing or broken."""
    if not path.exists():
        raise UserError(f"{path}: no such file; a finished run leaves encoder.safetensors in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
