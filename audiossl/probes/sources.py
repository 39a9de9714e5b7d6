"""Whatever can describe a clip: how is it opened, and what does it give?

An encoder of ours, one of others, the same encoder untrained, the statistics of the log-mel, or several of them side by
side are all a `Source`: waveform in, every layer's features of every moment out. What comes after (cache, heads,
tables) knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from audiossl.encoder import init_truncated_normal
from audiossl.errors import UserError
from audiossl.features.levels import free_length
from audiossl.features.source import Described, Source, hash_of_weights
from audiossl.features.statistics import logmel_statistics
from audiossl.features.windows import Layout, Piece, speaks_for, valid_frames, windows_for
from audiossl.pretrained import PretrainedEncoder
from audiossl.probes.sidebyside import SideBySide
from audiossl.sound.frontend import FrontEnd
from audiossl.spectrogram import KaldiFbank
from audiossl.weights.reading import newest_checkpoint

DEFAULT_LOGMEL = dict(
    rate_hz=16000, window_ms=25, hop_ms=10, num_mels=128, fmin_hz=20, fmax_hz=None, preemphasis=0.97,
    mean=0.0, std=0.5, seconds=None,
)  # fmt: skip
Padding = Literal["model", "none"]
REVISION = 2  # of what sources give: raised when the same weights would give other features


class EncoderSource(nn.Module):
    """Describe clips by an encoder of ours: a column of patches is a moment, and each block a layer.

    Patches above each other are averaged; every block's output passes the final norm. `padding` model brings a short
    clip to the length of training, as the front end has it; none pads no more than a patch needs, so that a short clip
    costs less. A clip's features do not depend on what else is in the batch: without padding, only clips of one length
    share a pass.
    """

    def __init__(self, model: PretrainedEncoder, name: str, padding: Padding = "model"):
        super().__init__()
        if padding == "none":
            model = PretrainedEncoder(
                model.encoder, free_length(model.frontend), model.head, model.description, model.attention
            )
        self.model, self.name = model.eval().requires_grad_(False), name
        encoder, frontend = model.encoder, model.frontend
        self.rate_hz, self.width, self.num_layers = model.rate_hz, model.width, len(encoder.blocks)
        self.layout = Layout.of(encoder, frontend, 0.0)
        self.max_seconds = self.layout.length / self.rate_hz
        self.column_seconds = self.layout.column / self.rate_hz
        about = [REVISION, encoder.geometry, model.description["frontend"], model.mask_padding, frontend.frames]
        self.hash = hash_of_weights(encoder, about)

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe clips as `Source` says; raise `UserError` for clips longer than `max_seconds`."""
        encoder, counts = self.model.encoder, num_samples.tolist()
        if counts and max(counts) > self.layout.length:
            seconds = max(counts) / self.rate_hz
            raise UserError(f"{self.name}: a clip of {seconds:.2f} s for a model of {self.max_seconds:.2f} s; cut it")
        rows = sorted(range(len(counts)), key=lambda row: counts[row])
        taken = range(self.layout.num_columns)
        pieces = [Piece(row, 0, waveform[row, : counts[row]], taken, True) for row in rows]
        parts = list(windows_for(encoder, self.model.frontend, self.layout, pieces, max(len(pieces), 1)))
        longest = max((encoder.grid_for(part.spectrogram)[1] for part in parts), default=0)
        shape = (len(rows), self.num_layers, longest, self.width)
        columns = torch.zeros(shape, device=waveform.device)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool, device=waveform.device)
        classes = torch.zeros(len(rows), self.num_layers, self.width, device=waveform.device)
        highest = torch.zeros_like(classes)
        for part in parts:
            grid = encoder.grid_for(part.spectrogram)
            layers = self.model.layers(part.spectrogram, part.valid_frames, num_layers=self.num_layers)
            tokens = torch.stack(layers, dim=1).float()
            of_class, patches = tokens.tensor_split([encoder.num_class_tokens], dim=2)
            where = part.clip.to(waveform.device)
            patches = patches.unflatten(2, grid)
            columns[where, :, : grid[1]] = patches.mean(2)
            is_audio = speaks_for(part, encoder, mask_padding=self.model.mask_padding).to(waveform.device)
            valid[where, : grid[1]] = is_audio
            highest[where] = patches.masked_fill(~is_audio[:, None, None, :, None], -torch.inf).amax((2, 3))
            if encoder.num_class_tokens:
                classes[where] = of_class.mean(2)
        return Described(columns, valid, classes if encoder.num_class_tokens else None, highest)


class LogMelSource(nn.Module):
    """Describe clips by the statistics of their log-mel: what an encoder has to beat.

    One moment, the whole clip, with mean, deviation, maximum and deviation of the deltas of every band (4 F,); or, with
    `column_seconds`, one for each such stretch, for tasks that ask when something is heard.
    """

    def __init__(self, frontend: FrontEnd, name: str, column_seconds: float | None = None):
        super().__init__()
        self.frontend, self.name = frontend.eval(), name
        self.rate_hz, self.num_layers, self.width, self.max_seconds = frontend.rate_hz, 1, 4 * frontend.num_mels, None
        hop = frontend.hop_samples / frontend.rate_hz
        self.column_frames = None if column_seconds is None else max(1, round(column_seconds / hop))
        self.column_seconds = None if column_seconds is None else self.column_frames * hop
        sizes = [getattr(frontend, key) for key in ("rate_hz", "window_samples", "hop_samples", "n_fft", "num_mels")]
        bounds = [frontend.fmin_hz, frontend.fmax_hz, type(frontend).__name__, getattr(frontend, "preemphasis", None)]
        self.hash = hash_of_weights(None, [REVISION, "logmel", self.column_frames, *sizes, *bounds])

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe clips as `Source` says."""
        natural = self.frontend.denormalise(self.frontend(waveform, num_samples=num_samples))[:, 0]
        frames = valid_frames(self.frontend, num_samples.cpu()).clamp(max=natural.shape[-1]).tolist()
        found = []
        for clip, count in zip(natural, frames, strict=True):
            parts = clip[:, :count].split(self.column_frames or count, dim=1)
            found.append(torch.stack([logmel_statistics(part) for part in parts]))
        columns = nn.utils.rnn.pad_sequence(found, batch_first=True)
        lengths = torch.tensor([len(some) for some in found], device=columns.device)
        valid = torch.arange(columns.shape[1], device=columns.device) < lengths[:, None]
        return Described(columns[:, None], valid, None)


def device_of(source: Source) -> torch.device:
    """Say where a source computes."""
    tensors = chain(source.parameters(), source.buffers()) if isinstance(source, nn.Module) else ()
    return next((value.device for value in tensors), torch.device(getattr(source, "device", "cpu")))


def open_source(
    init: str | Sequence[str], *, seed: int = 0, moments: bool = False, padding: Padding = "model"
) -> Source:
    """Open what describes clips; a list is several side by side.

    `init`: a path or hub id of an exported encoder, a run's folder (finished or not) or checkpoint; `untrained:PATH`,
    its geometry with fresh weights drawn from `seed`; `logmel`, or `logmel:PATH` with the front end of an encoder;
    `hf:NAME_OR_FOLDER`, `byola:FILE`, `beats:FILE`, models of others. `moments` says that the task asks when something
    is heard: the log-mel then has many moments instead of one. `padding` is that of `EncoderSource`. Raises
    `UserError` for what is none of these.
    """
    if not isinstance(init, str):
        found = [open_source(one, seed=seed, moments=moments, padding=padding) for one in init]
        if not found:
            raise UserError("init=[]: name at least one encoder")
        if len(found) == 1:
            return found[0]
        return SideBySide(found)
    kind, colon, rest = init.partition(":")
    if kind == "logmel":
        frontend = open_model(rest).frontend if colon else KaldiFbank(**DEFAULT_LOGMEL)
        return LogMelSource(free_length(frontend), "log-mel statistics", 0.16 if moments else None)
    if colon and kind in ("hf", "byola", "beats"):
        return _foreign(kind, rest)
    if colon and kind == "untrained":
        return EncoderSource(untrained(open_model(rest), seed), f"{_titled(rest)}, untrained", padding)
    return EncoderSource(open_model(init), _titled(init), padding)


def open_model(path: str) -> PretrainedEncoder:
    """Load an exported encoder, or the newest checkpoint of a run that is not finished."""
    import audiossl
    from audiossl.running.build import load_method
    from audiossl.weights.export import describe

    place = Path(path)
    is_unfinished = (place / "checkpoints").is_dir() and not (place / "encoder.safetensors").exists()
    if not is_unfinished and place.suffix != ".ckpt":
        return audiossl.load(path)
    checkpoint = newest_checkpoint(place) if is_unfinished else place
    method, config = load_method(checkpoint)
    about = describe(method.encoder, None, config["frontend"], None) | {
        "method": config["model"]["_target_"],
        "mask_padding": getattr(method, "mask_padding", False),
    }
    return PretrainedEncoder(method.encoder, method.frontend, None, about).eval()


def untrained(model: PretrainedEncoder, seed: int) -> PretrainedEncoder:
    """Build the same encoder with the weights its method would start from, drawn from `seed`; no head.

    Audio-MAE starts Xavier-uniform, the other families from a truncated normal of .02.
    """
    from audiossl.encoder import Encoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(**model.encoder.geometry)
        if "audiomae" not in str(model.description.get("method", "audiomae")).lower():
            encoder.apply(init_truncated_normal)
    return PretrainedEncoder(encoder, model.frontend, None, model.description | {"head": None}).eval()


def _titled(path: str) -> str:
    """Name a path by its last two parts."""
    return "/".join(Path(path.rstrip("/").removesuffix("/encoder.safetensors")).parts[-2:])


def _foreign(kind: str, rest: str) -> Source:
    try:
        from audiossl.foreign import open_foreign
    except ImportError as error:
        raise UserError(f"init={kind}:{rest}: {error}") from error
    return open_foreign(kind, rest)
