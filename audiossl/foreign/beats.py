"""How are BEATs's weights opened, and what does it hear?

BEATs (arXiv 2212.09058) was trained to predict the labels that a tokenizer gives to patches it does not see. A
published file holds its own sizes (`cfg`) and tensors (`model`); a column of eight patches, 160 ms, is a moment.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from audiossl.errors import UserError
from audiossl.features.source import Described, hash_of_weights
from audiossl.foreign.beatsnet import BeatsNet, Sizes
from audiossl.foreign.described import clips_of, first
from audiossl.spectrogram import KaldiFbank
from audiossl.weights.reading import read_torch_file

MEAN, STD = 15.41663, 6.55582
SCALE = 2.0**15  # Kaldi hears 16-bit integers
WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class BeatsFbank(KaldiFbank):
    """Compute BEATs's log-mel: Kaldi's 128 bands of the waveform times 2 ** 15, Povey's window, then (x - m) / (2 s).

    Equals `torchaudio.compliance.kaldi.fbank` as it is by default, for a whole batch.
    """

    def __init__(self):
        sizes = dict(rate_hz=16000, window_ms=25, hop_ms=10, num_mels=128, fmin_hz=20, fmax_hz=None)
        super().__init__(**sizes, preemphasis=0.97, mean=MEAN, std=STD, seconds=None)
        self.window = self.window**0.85

    def level(self, waveform: Tensor, num_samples: Tensor) -> Tensor:
        return waveform * SCALE


class BeatsSource(nn.Module):
    """Describe clips by BEATs: what enters the first block is the first layer, each block's output another.

    Patches above each other are averaged. Clips of a batch are masked by what is audio, to the frame, so that each is
    described as if alone.

    Differs: the published code divides the batch's samples into as many parts as there are tokens, so that the last
    moment of a padded clip is audio in its low bands and padding in its high ones. A clip alone is the same to both.
    """

    rate_hz, max_seconds = 16000, None

    def __init__(self, net: BeatsNet, name: str):
        super().__init__()
        self.net, self.frontend, self.name = net, BeatsFbank(), name
        self.eval().requires_grad_(False)
        self.num_layers, self.width = net.sizes.encoder_layers + 1, net.sizes.encoder_embed_dim
        self.hash = hash_of_weights(net, ["beats", net.sizes, MEAN, STD, SCALE])

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe (B, S) in [-1, 1] at 16 kHz, of which `num_samples` (B,) are audio; shorter than a patch: padded."""
        patch = self.net.sizes.input_patch_size
        clips = clips_of(waveform, num_samples, self.frontend.samples_for(patch))
        frames = [(len(clip) - self.frontend.window_samples) // self.frontend.hop_samples + 1 for clip in clips]
        valid = first([count // patch for count in frames], waveform.device)
        longest = max(len(clip) for clip in clips)
        batch = torch.stack([functional.pad(clip, (0, longest - len(clip))) for clip in clips])
        layers = self.net(self.frontend(batch), valid)
        columns = torch.stack(layers, dim=1).unflatten(2, (valid.shape[1], -1)).mean(3)
        return Described(columns, valid, None)


def open_beats(file: str) -> BeatsSource:
    """Open a published file of BEATs, pre-trained or fine-tuned; a fine-tuned one's classifier is left.

    Raises `UserError` for a file that is missing, unsafe, a tokenizer's or not BEATs's.
    """
    content = read_torch_file(file)
    cfg, weights = content.get("cfg"), content.get("model")
    if not isinstance(cfg, dict) or not isinstance(weights, dict):
        raise UserError(f"{file}: not a file of BEATs: it holds {', '.join(map(str, content))[:80]}, not cfg and model")
    if any(str(key).startswith("quantize") for key in weights):
        raise UserError(f"{file}: a tokenizer of BEATs, not an encoder; give BEATs_iter*.pt")
    with torch.device("meta"):
        net = BeatsNet(Sizes.of(cfg, file))
    renamed = {_published_name(str(key)): value for key, value in weights.items()}
    kept = {key: value for key, value in renamed.items() if not key.startswith("predictor.")}
    try:
        net.load_state_dict(kept, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"{file}: not the BEATs that its cfg describes ({' '.join(str(error).split())[:300]})"
        ) from None
    return BeatsSource(net.float(), f"beats ({file})")


def _published_name(key: str) -> str:
    for new, old in WEIGHT_NORM.items():
        key = key.replace(new, old)
    return key
