"""What did BYOL-A learn from two augmented halves of a moment, without negatives?

A small convolutional net over a 64-band log-mel and an MLP over each column of its last map: the features of a moment.
A clip is the mean plus the maximum over its moments. Version 1 (arXiv 2103.06695) has three convolutions and a moment
every 80 ms; version 2 (arXiv 2204.07402) has two, a moment every 40 ms, and puts the map's column beside the MLP's
output. The names of modules are those of the published files.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from audiossl.errors import UserError
from audiossl.features.source import Described, hash_of_weights
from audiossl.foreign.described import by_length, clips_of
from audiossl.sound.frontend import FrontEnd
from audiossl.sound.mel import htk_mel_matrix
from audiossl.weights.reading import read_weights

CHANNELS = 64
NUM_MELS = 64
# what the authors' READMEs divide by in their examples; they measure it anew on the audio of each task
STATISTICS = {1: (-5.4919195, 5.0389895), 2: (-9.660292, 4.7219563)}
PART = re.compile(r"^(?:(.*)\.)?((?:features|fc)\.\d+\.\w+)$")


class ByolaMel(FrontEnd):
    """Compute BYOL-A's log-mel: 64 ms windows every 10 ms, 60 to 7,800 Hz, ln(x + eps), then (x - mean) / std.

    Version 1 hears HTK's triangles (torchaudio), version 2 Slaney's with their area normalised (nnAudio).
    """

    def __init__(self, version: int, mean: float, std: float):
        self.version = version
        sizes = dict(rate_hz=16000, window_ms=64, hop_ms=10, n_fft=1024, num_mels=NUM_MELS, fmin_hz=60, fmax_hz=7800)
        super().__init__(**sizes, seconds=None, centre=mean, scale=std, periodic=True)

    def mel_matrix(self) -> Tensor:
        if self.version == 1:
            return htk_mel_matrix(self.num_mels, self.n_fft, self.rate_hz, self.fmin_hz, self.fmax_hz)
        scale = dict(norm="slaney", mel_scale="slaney")
        bins = self.n_fft // 2 + 1
        matrix = melscale_fbanks(bins, self.fmin_hz, self.fmax_hz, self.num_mels, self.rate_hz, **scale)
        return matrix.T.contiguous()

    def samples_for(self, frames: int) -> int:
        return max((frames - 1) * self.hop_samples, 1)

    def log(self, mel_power: Tensor) -> Tensor:
        return (mel_power + torch.finfo(torch.float32).eps).log()

    def natural_log(self, log_mel: Tensor) -> Tensor:
        return log_mel


class AudioNTT(nn.Module):
    """Turn log-mels (B, 1, 64, T) into features (B, T', D) of moments, each of 2 ** num_convs frames.

    The MLP gives `last` numbers; `is_stacked` puts the map's column before them. Version 1 is the published
    AudioNTT2020 (three convolutions), version 2 AudioNTT2022 (two, stacked).
    """

    def __init__(self, *, num_convs: int, hidden: int, last: int, is_stacked: bool):
        super().__init__()
        self.num_convs, self.is_stacked = num_convs, is_stacked
        layers: list[nn.Module] = []
        for channels in [1] + [CHANNELS] * (num_convs - 1):
            layers += [nn.Conv2d(channels, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        column = CHANNELS * (NUM_MELS >> num_convs)
        self.fc = nn.Sequential(
            nn.Linear(column, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, last), nn.ReLU()
        )
        self.width = column + last if is_stacked else last

    def forward(self, log_mel: Tensor) -> Tensor:
        columns = self.features(log_mel).permute(0, 3, 2, 1).flatten(2)  # the published MLP reads band by band
        found = self.fc(columns)
        return torch.cat([columns, found], dim=-1) if self.is_stacked else found


class ByolaSource(nn.Module):
    """Describe clips by BYOL-A: one layer; `classes` is the published vector of a clip, mean + maximum of its moments.

    Only clips of one length share a pass: the convolutions see the padding of a batch.
    """

    rate_hz, num_layers, max_seconds = 16000, 1, None

    def __init__(self, net: AudioNTT, frontend: ByolaMel, name: str):
        super().__init__()
        self.net, self.frontend, self.name = net, frontend, name
        self.eval().requires_grad_(False)
        self.width = net.width
        self.shortest = max(frontend.shortest(), frontend.samples_for(2**net.num_convs))
        about = ["byola", frontend.version, frontend.centre, frontend.scale, net.num_convs, net.is_stacked]
        self.hash = hash_of_weights(net, about)

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe (B, S) in [-1, 1] at 16 kHz, of which `num_samples` (B,) are audio; a moment lasts 80 or 40 ms."""

        def described(clips: Tensor) -> tuple[Tensor, Tensor]:
            moments = self.net(self.frontend(clips))
            return moments[:, None], (moments.mean(1) + moments.amax(1))[:, None]

        return by_length(clips_of(waveform, num_samples, self.shortest), described)


def open_byola(file: str, mean: float | None = None, std: float | None = None) -> ByolaSource:
    """Open a file of BYOL-A's weights, version 1 or 2: told by what is in it.

    `mean` and `std` are those of the log-mel of the audio to be described; None takes those of the authors' example.
    Raises `UserError` for a file that is missing, unsafe or not BYOL-A's.
    """
    weights = weights_of(read_weights(file), file)
    try:
        hidden, last = (weights[f"fc.{layer}.weight"].shape[0] for layer in (0, 3))
    except (KeyError, IndexError):
        raise UserError(f"{file}: not a file of BYOL-A's weights: it has no fc.0.weight and fc.3.weight") from None
    version = 1 if "features.8.weight" in weights else 2
    with torch.device("meta"):
        net = AudioNTT(num_convs=4 - version, hidden=hidden, last=last, is_stacked=version == 2)
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise UserError(f"{file}: not the BYOL-A that was published ({what[:300]})") from None
    usual = STATISTICS[version]
    frontend = ByolaMel(version, usual[0] if mean is None else mean, usual[1] if std is None else std)
    return ByolaSource(net.float(), frontend, f"byola v{version}, {net.width}-d ({file})")


def weights_of(content: dict, file: str) -> dict[str, Tensor]:
    """Take the encoder's tensors out of a checkpoint, whatever wraps them: `features.*` and `fc.*`.

    Projectors and predictors of a training checkpoint are left; two encoders in one file (online and target) are
    refused.
    """
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content.get(key), dict) else content
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and (match := PART.match(str(key))):
            found.setdefault(match[1] or "", {})[match[2]] = value
    if not found:
        raise UserError(f"{file}: not a file of BYOL-A's weights: no tensor is called features.* or fc.*")
    if len(found) > 1:
        raise UserError(f"{file}: holds {len(found)} encoders, {', '.join(sorted(found))}: save the tensors of one")
    return found.popitem()[1]
