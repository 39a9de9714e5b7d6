"""How does an encoder take part in HEAR, the benchmark that asks of any model the same three functions?

`heareval` and `hear-validator` import this module and call `load_model` with a path, so that all that can be chosen
may stand behind the path: `--model 'runs/passt?module=base2level'`. The API of HEAR 2021 (2203.03022).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import audiossl
from audiossl.embeddings import as_clips
from audiossl.errors import UserError
from audiossl.features.description import NOT_FINITE
from audiossl.features.levels import LevelReader, Levels
from audiossl.features.moments import ChunkReader, TokenReader
from audiossl.pretrained import PretrainedEncoder
from audiossl.spectrogram import resample, to_float

MODULES = {  # as PaSST's authors call them; hopH is for encoders of that hop, 20sec and 30sec for their long ones
    "base": Levels(),
    "base2level": Levels((160, 800)),
    "base2levelmel": Levels((160, 640), with_mel=True),
    "base20sec": Levels(scene_hop_ms=5000),
    "base30sec": Levels(scene_hop_ms=10_000),
    **{f"hop{hop}base": Levels() for hop in (160, 100)},
    **{f"hop{hop}base2lvl": Levels((160, 800)) for hop in (160, 100)},
    **{f"hop{hop}base2lvlmel": Levels((160, 800), with_mel=True) for hop in (160, 100)},
}


class HearModel(nn.Module):
    """Hold an encoder as HEAR wants it: `sample_rate`, `scene_embedding_size` and `timestamp_embedding_size` are true.

    `reader` describes moments and scenes of audio at `sample_rate`. Calling the model gives scene embeddings.
    """

    def __init__(self, reader: LevelReader | ChunkReader | TokenReader):
        super().__init__()
        self.reader = reader.eval()
        self.sample_rate: int = reader.model.rate_hz
        self.scene_embedding_size: int = reader.scene_size
        self.timestamp_embedding_size: int = reader.moment_size

    @property
    def device(self) -> torch.device:
        """Where the model is; audio is brought there, and embeddings are returned there."""
        return self.reader.frontend.window.device

    def moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Describe every moment of audio (B, S): (B, n, X), and its time (B, n) in ms."""
        return self.reader.moments(audio)

    def forward(self, audio: Tensor) -> Tensor:
        return self.reader.scenes(audio)


class Concatenation(nn.Module):
    """Put several models' embeddings of the same audio side by side, as the HEAR paper's best entries do.

    Audio comes at the highest of their rates and is resampled for the others. Moments are the first model's; of each
    other the moment nearest in time is taken.
    """

    def __init__(self, models: Sequence[HearModel]):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.sample_rate = max(model.sample_rate for model in models)
        self.scene_embedding_size = sum(model.scene_embedding_size for model in models)
        self.timestamp_embedding_size = sum(model.timestamp_embedding_size for model in models)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.models[0].device

    def moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Describe every moment of audio (B, S): (B, n, X), and its time (B, n) in ms."""
        heard = [model.moments(resample(audio, self.sample_rate, model.sample_rate)) for model in self.models]
        times = heard[0][1]
        nearest = [features[:, (times[0][:, None] - own[0]).abs().argmin(1)] for features, own in heard]
        return torch.cat(nearest, dim=-1), times

    def forward(self, audio: Tensor) -> Tensor:
        return torch.cat([m(resample(audio, self.sample_rate, m.sample_rate)) for m in self.models], dim=-1)


def load_model(model_file_path: str = "", **choices: Any) -> HearModel | Concatenation:
    """Load an export for HEAR; `choices` may stand behind the path instead: `runs/passt?module=base2level&mode=logits`.

    PaSST: `module` (base; see MODULES), `mode` (all: logits, then features; embed_only; logits), `scene_ms` and
    `scene_hop_ms` of a scene's windows. ATST: `num_layers` (all), `rules` (corrected or published). Others:
    `num_layers` (1). All: `batch_seconds`, how much audio goes through at once. Paths parted by commas give the
    embeddings of all of them, side by side. Runs on the CPU until moved. Raises `UserError` for what does not exist.
    """
    if not model_file_path:
        raise UserError("give load_model the path of an exported encoder, hear-validator and heareval: --model PATH")
    if "," in model_file_path and not Path(model_file_path).exists():
        return Concatenation([load_model(path.strip(), **choices) for path in model_file_path.split(",")])
    path, choices = read_choices(model_file_path, choices)
    return HearModel(reader_of(audiossl.load(path), **choices))


def get_timestamp_embeddings(audio: Tensor, model: HearModel | Concatenation) -> tuple[Tensor, Tensor]:
    """Describe every moment of audio (n_sounds, n_samples) in [-1, 1], at the model's rate.

    Returns embeddings (n_sounds, n_timestamps, timestamp_embedding_size), float32, and their times
    (n_sounds, n_timestamps) in ms, ascending by equal steps; both on the model's device, without gradients.
    """
    embeddings, times = model.eval().moments(_checked(audio, model))
    return _finite(embeddings), times


def get_scene_embeddings(audio: Tensor, model: HearModel | Concatenation) -> Tensor:
    """Describe audio (n_sounds, n_samples) in [-1, 1], at the model's rate: (n_sounds, scene_embedding_size), float32.

    On the model's device, without gradients.
    """
    return _finite(model.eval()(_checked(audio, model)))


def reader_of(model: PretrainedEncoder, **choices: Any) -> LevelReader | ChunkReader | TokenReader:
    """Choose how a model is read by its positions: PaSST's on levels, ATST's in chunks, any other's column by column.

    Raises `UserError` for a choice that this reader has not.
    """
    positions, is_one_row = model.encoder.geometry["positions"], model.encoder.grid[0] == 1
    if positions == "time+frequency":
        return _called(level_reader, "PaSST", model, choices)
    if positions == "learned" and is_one_row:
        return _called(ChunkReader, "ATST", model, choices)
    return _called(TokenReader, "this encoder", model, choices)


def level_reader(
    model: PretrainedEncoder,
    *,
    module: str = "base",
    mode: str | None = None,
    scene_ms: float | None = None,
    scene_hop_ms: float | None = None,
    batch_seconds: float = 40,
) -> LevelReader:
    """Read on the levels of a published module; without a classifier `mode` is embed_only if nothing else is said."""
    if module not in MODULES:
        raise UserError(f"module={module}: choose one of {', '.join(MODULES)}")
    hop = model.frontend.hop_samples
    if module.startswith("hop") and not module.startswith(f"hop{hop}base"):
        raise UserError(f"module={module}: this encoder's front end has a hop of {hop} samples")
    levels, given = MODULES[module], dict(scene_ms=scene_ms, scene_hop_ms=scene_hop_ms)
    levels = Levels(**vars(levels) | {name: float(value) for name, value in given.items() if value is not None})
    mode = ("all" if model.head else "embed_only") if mode is None else mode
    return LevelReader(model, levels, mode, batch_seconds=batch_seconds)


def read_choices(path: str, choices: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Part `path?name=value&name=value` into the path and its choices, beside those already made."""
    if "?" not in path or Path(path).exists():
        return path, choices
    path, _, words = path.rpartition("?")
    pairs = [word.partition("=") for word in words.split("&")]
    if not all(name and value for name, _, value in pairs):
        raise UserError(f"{path}?{words}: behind the question mark comes name=value, parted by &")
    read = {name: int(value) if value.isdigit() else value for name, _, value in pairs}
    return path, read | choices


def _called(reader: Callable[..., nn.Module], name: str, model: PretrainedEncoder, choices: dict[str, Any]):
    known = [name for name in inspect.signature(reader).parameters if name != "model"]
    unknown = sorted(choices.keys() - set(known))
    if unknown:
        raise UserError(f"{unknown[0]}={choices[unknown[0]]}: {name} has no such choice; it has {', '.join(known)}")
    return reader(model, **choices)


def _checked(audio: Tensor, model: HearModel | Concatenation) -> Tensor:
    clips = as_clips(audio, None)
    if audio.ndim != 2:
        raise UserError(f"audio of shape {tuple(audio.shape)}: HEAR wants (n_sounds, n_samples)")
    if not clips or not len(clips[0]):
        raise UserError(f"audio of shape {tuple(audio.shape)}: without a single sample there is no embedding")
    audio = to_float(torch.stack(clips).to(model.device))
    broken = (~audio.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise UserError(f"sound {broken[0]}: NaN or Inf samples")
    return audio


def _finite(embeddings: Tensor) -> Tensor:
    broken = (~embeddings.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise UserError(f"sound {broken[0]}: {NOT_FINITE}")
    return embeddings
