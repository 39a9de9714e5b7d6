"""What do HuggingFace's audio transformers say of every moment, layer by layer?

The speech models turn the waveform into a frame every 20 ms by convolutions; AST, like our own encoders, cuts a mel
spectrogram of fixed length into patches. What enters the first block is the first layer; of the last block, the output
with the final norm, `last_hidden_state`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from audiossl.errors import UserError
from audiossl.features.source import Described, hash_of_weights
from audiossl.foreign.described import by_length, clips_of, first

AST = "audio-spectrogram-transformer"
WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010  # Kaldi's, which AST's feature extractor does not let one choose


def layers_of(found: Any) -> Tensor:
    """Stack a model's answer: (B, L + 1, N, D) float32, the last with the final norm."""
    return torch.stack([*found.hidden_states[:-1], found.last_hidden_state], dim=1).float()


def masks_hide_padding(config: Any) -> bool:
    """Say whether a batch with attention masks gives each clip what it gets alone.

    A group norm over time ("group": the base models, trained without masks) hears padding through every frame, and so
    does what follows a convolution for positions by more layers (data2vec) or by a batch norm.
    """
    is_by_frame = getattr(config, "feat_extract_norm", None) == "layer"
    return config.model_type != "data2vec-audio" and is_by_frame and not getattr(config, "conv_pos_batch_norm", False)


class TransformerSource(nn.Module):
    """Hold what both kinds share: the model, frozen, and its feature extractor, which hears each clip alone."""

    def __init__(self, model: nn.Module, extractor: Any, name: str):
        super().__init__()
        self.model, self.extractor, self.name = model, extractor, name
        self.eval().requires_grad_(False)
        self.rate_hz = extractor.sampling_rate
        self.num_layers, self.width = model.config.num_hidden_layers + 1, model.config.hidden_size
        settings = [model.config.to_dict(), extractor.to_dict()]
        for some in settings:  # where and by which version it was written
            for key in ("_name_or_path", "transformers_version", "dtype", "architectures"):
                some.pop(key, None)
        self.hash = hash_of_weights(model, ["hf", *settings])

    def prepared(self, clip: Tensor) -> Tensor:
        """Hand one clip (S,) to the feature extractor."""
        heard = self.extractor(clip.cpu().numpy(), sampling_rate=self.rate_hz, return_tensors="pt")
        return heard["input_values"][0].to(clip.device, torch.float32)


class SpeechSource(TransformerSource):
    """Describe clips by wav2vec 2.0, HuBERT, WavLM or data2vec: frames of 20 ms, no class token.

    Where masks hide padding, the batch goes through at once; elsewhere only clips of one length share a pass.
    """

    max_seconds = None

    def __init__(self, model: nn.Module, extractor: Any, name: str):
        super().__init__(model, extractor, name)
        config = model.config
        self.convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.shortest = 1
        for kernel, stride in reversed(self.convolutions):
            self.shortest = (self.shortest - 1) * stride + kernel
        self.is_masked = masks_hide_padding(config)

    def frames_of(self, samples: int) -> int:
        """Count the frames that the convolutions make of `samples`."""
        for kernel, stride in self.convolutions:
            samples = (samples - kernel) // stride + 1
        return samples

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe (B, S) in [-1, 1] at `rate_hz`, of which `num_samples` (B,) are audio."""
        clips = [self.prepared(clip) for clip in clips_of(waveform, num_samples, self.shortest)]
        if not self.is_masked:
            return by_length(clips, lambda some: (layers_of(self.model(some, output_hidden_states=True)), None))
        batch = nn.utils.rnn.pad_sequence(clips, batch_first=True)
        mask = first([len(clip) for clip in clips], batch.device).long()
        with warnings.catch_warnings():  # WavLM hands torch masks of two types, one of them of numbers
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            columns = layers_of(self.model(batch, attention_mask=mask, output_hidden_states=True))
        return Described(columns, first([self.frames_of(len(clip)) for clip in clips], batch.device), None)


class AstSource(TransformerSource):
    """Describe clips by AST: a column of patches is a moment, the class and the distillation token are `classes`.

    Patches above each other are averaged. Every clip is brought to the length the extractor says (`max_length` frames
    of 10 ms), as in training, where padding was heard; what is not wholly audio is not `valid`.
    """

    def __init__(self, model: nn.Module, extractor: Any, name: str):
        super().__init__(model, extractor, name)
        config = model.config
        for key in ("max_length", "num_mel_bins"):
            said, asked = getattr(extractor, key, None), getattr(config, key)
            if said != asked:
                raise UserError(f"{name}: {key} is {said} in preprocessor_config.json and {asked} in config.json")
        self.window, self.hop = int(self.rate_hz * WINDOW_SECONDS), int(self.rate_hz * HOP_SECONDS)
        self.longest = self.window + (config.max_length - 1) * self.hop
        self.max_seconds = self.longest / self.rate_hz
        rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        self.grid = (rows, self.columns_of(config.max_length))

    def columns_of(self, frames: int) -> int:
        """Count the columns of patches that `frames` fill."""
        return (frames - self.model.config.patch_size) // self.model.config.time_stride + 1

    @torch.no_grad()
    def describe(self, waveform: Tensor, num_samples: Tensor) -> Described:
        """Describe (B, S) in [-1, 1] at `rate_hz`, of which `num_samples` (B,) are audio, at most `max_seconds`."""
        clips = clips_of(waveform, num_samples, self.window)
        longest = max(len(clip) for clip in clips)
        if longest > self.longest:
            raise UserError(
                f"{self.name}: a clip of {longest / self.rate_hz:.2f} s for a model of {self.max_seconds:.2f} s; cut it"
            )
        mels = torch.stack([self.prepared(clip) for clip in clips])
        tokens = layers_of(self.model(mels, output_hidden_states=True))
        of_class, patches = tokens.tensor_split([2], dim=2)
        frames = [(len(clip) - self.window) // self.hop + 1 for clip in clips]
        filled = [max(self.columns_of(count), 1) for count in frames]
        return Described(
            patches.unflatten(2, self.grid).mean(2), first(filled, mels.device, self.grid[1]), of_class.mean(2)
        )
