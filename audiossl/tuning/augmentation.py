"""What may change in a labelled clip, and what becomes of its labels?

The fine-tuning recipes of Audio-MAE (2207.06405), PaSST (2110.05069) and ATST (2204.12076) in one place: level, roll
and mixture of waveforms, then hidden bands and frames, mixture and stretching of spectrograms. Whatever is mixed takes
its labels along in the same shares: two clips that share a label keep all of it, since targets add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from audiossl import augment
from audiossl.augment import another, check_alpha, draw_beta, draw_share, mix
from audiossl.errors import UserError
from audiossl.features.windows import valid_frames
from audiossl.noise import Noise
from audiossl.parts.views import FREQUENCY_WARP, RandomResizedCrop
from audiossl.sound.frontend import beyond

CROPS = {"clip": RandomResizedCrop(), "frame": FREQUENCY_WARP}


@dataclass(frozen=True)
class Sounds:
    """Hold what augmentation turns into something else: B clips, how long they are, and their targets.

    `values` (B, S) waveforms or (B, 1, F, T) spectrograms, of which `length` (B,) samples or frames are audio; `target`
    (B, C) and `frame_target` (B, T', C) in [0, 1], NaN for unknown, or None.
    """

    values: Tensor
    length: Tensor
    target: Tensor | None = None
    frame_target: Tensor | None = None

    def mixed(self, values: Tensor, length: Tensor, partner: Tensor, share: Tensor, chosen: Tensor) -> Sounds:
        """Take the mixed `values` where `chosen` (B,), with targets in shares: what either does not know is unknown."""

        def where(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(chosen.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        targets = [None if t is None else where(mix(t, partner, share), t) for t in (self.target, self.frame_target)]
        return Sounds(where(values, self.values), where(length, self.length), *targets)


class Augmentation(nn.Module):
    """Draw what changes in each clip; every number 0, every choice none: nothing does.

    Waveforms, in this order. gain_db: whole decibels from -gain_db to gain_db - 1 (PaSST: 7). roll_samples: circular
    shifts up to that many (PaSST: 50). roll_magnitude, Audio-MAE's roll_mag: `published` multiplies by Beta(10, 10) +
    .5 and rolls nothing, since it drew the shift from the number of channels; `corrected` rolls the clip by any of its
    samples too. waveform_mixup: the share of clips that are mixed with another, waveform_mixup_alpha its Beta.
    waveform_mixup_rule: `audiomae` takes the share as it is drawn and cuts the partner to the clip's length, `passt`
    the larger of it and its rest, and mixes padding too.

    Spectrograms. resized_crop: stretch a random part, `clip` in time and frequency, `frame` in frequency alone (ATST).
    mask_bands, mask_frames: the widest hidden span of each kind; mask_fill: `raw_zero`, what a zero before the
    normalisation becomes (Audio-MAE, PaSST), or `zero` after it (ATST); mask_draws: `published` hides the same of all
    clips of a batch (PaSST), `corrected` something else of each (Audio-MAE, ATST). spectrogram_mixup,
    spectrogram_mixup_alpha: as for waveforms; spectrogram_mixup_rule: `passt`, the larger share stays and the partner
    comes from a permutation, masks first; `atst`, the share is what was drawn and only where both clips are audio they
    are mixed, before stretching and masks.

    Differs: published partners come from the whole data set (ATST: a memory of 5,000), ours from the micro-batch. ATST
    mixes labels by the share even where only a part was mixed; so do we.
    """

    def __init__(
        self,
        *,
        gain_db: int,
        roll_samples: int,
        roll_magnitude: Literal["none", "published", "corrected"],
        waveform_mixup: float,
        waveform_mixup_alpha: float,
        waveform_mixup_rule: Literal["audiomae", "passt"],
        resized_crop: Literal["none", "clip", "frame"],
        mask_bands: int,
        mask_frames: int,
        mask_fill: Literal["raw_zero", "zero"],
        mask_draws: Literal["published", "corrected"],
        spectrogram_mixup: float,
        spectrogram_mixup_alpha: float,
        spectrogram_mixup_rule: Literal["passt", "atst"],
    ):
        super().__init__()
        settings = {name: value for name, value in locals().items() if name not in ("self", "settings", "__class__")}
        for name in ("gain_db", "roll_samples", "mask_bands", "mask_frames"):
            if settings[name] < 0:
                raise UserError(f"model.augment.{name}={settings[name]}: must be at least 0, which leaves it out")
        for name in ("waveform_mixup", "spectrogram_mixup"):
            if not 0 <= settings[name] <= 1:
                raise UserError(f"model.augment.{name}={settings[name]}: the share of mixed clips lies in [0, 1]")
            check_alpha(f"augment.{name}_alpha", settings[f"{name}_alpha"])
        for name, choices in CHOICES.items():
            if settings[name] not in choices:
                raise UserError(f"model.augment.{name}={settings[name]!r}: choose {' or '.join(choices)}")
        vars(self).update(settings)

    @property
    def moves_time(self) -> bool:
        """Whether events come to lie elsewhere."""
        return self.roll_magnitude == "corrected" or self.resized_crop == "clip"

    def waveforms(self, clips: Sounds, generator: Noise) -> Sounds:
        """Change waveforms (B, S), zeros where there is no audio."""
        wave, length = clips.values, clips.length
        wave = wave.masked_fill(beyond(length[:, None], wave.shape[1]), 0.0)
        if self.gain_db:
            wave = augment.amplify(wave, (generator.uniform() * 2 * self.gain_db).floor() - self.gain_db)
        if self.roll_samples:
            shift = (generator.uniform() * (2 * self.roll_samples + 1)).long() - self.roll_samples
            wave, length = augment.roll(wave, shift), torch.full_like(length, wave.shape[1])
        if self.roll_magnitude == "corrected":
            wave = augment.roll_within(wave, (generator.uniform() * length).long(), length)
        if self.roll_magnitude != "none":
            wave = wave * (draw_beta(generator, MAGNITUDE_ALPHA)[:, None] + 0.5).to(wave.dtype)
        clips = Sounds(wave, length, clips.target, clips.frame_target)
        return self._mix_waveforms(clips, generator) if self.waveform_mixup else clips

    def _mix_waveforms(self, clips: Sounds, generator: Noise) -> Sounds:
        chosen = generator.uniform() < self.waveform_mixup
        is_passt = self.waveform_mixup_rule == "passt"
        share = (draw_share if is_passt else draw_beta)(generator, self.waveform_mixup_alpha)
        partner, wave = another(generator.uniform()), clips.values
        if is_passt:
            whole = torch.full_like(clips.length, wave.shape[1])
            return clips.mixed(augment.mix_waveforms(wave, partner, share), whole, partner, share, chosen)
        mixture = augment.mix_clips(wave, clips.length, partner, share)
        return clips.mixed(mixture, clips.length, partner, share, chosen)

    def spectrograms(self, clips: Sounds, generator: Noise, frontend: nn.Module) -> Sounds:
        """Change spectrograms (B, 1, F, T), normalised as `frontend` does it."""
        if self.spectrogram_mixup and self.spectrogram_mixup_rule == "atst":
            clips = self._mix_spectrograms(clips, generator)
        values, length = clips.values, clips.length
        if self.resized_crop != "none":
            values = CROPS[self.resized_crop](values, generator)
            length = torch.full_like(length, values.shape[-1]) if self.resized_crop == "clip" else length
        fill = -frontend.centre / frontend.scale if self.mask_fill == "raw_zero" else 0.0
        for axis, widest in ((2, self.mask_bands), (3, self.mask_frames)):
            if widest:
                uniform = generator.uniform(2) if self.mask_draws == "corrected" else generator.shared(1, 2)
                start, width = augment.span(uniform, widest, values.shape[axis])
                values = augment.mask_span(values, start, width, axis=axis, fill=fill)
        clips = Sounds(values, length, clips.target, clips.frame_target)
        if self.spectrogram_mixup and self.spectrogram_mixup_rule == "passt":
            clips = self._mix_spectrograms(clips, generator)
        return clips

    def _mix_spectrograms(self, clips: Sounds, generator: Noise) -> Sounds:
        chosen, values = generator.uniform() < self.spectrogram_mixup, clips.values
        if self.spectrogram_mixup_rule == "passt":
            share, partner = draw_share(generator, self.spectrogram_mixup_alpha), generator.uniform().argsort()
            length = clips.length.maximum(clips.length[partner])
            return clips.mixed(mix(values, partner, share), length, partner, share, chosen)
        share, partner = draw_beta(generator, self.spectrogram_mixup_alpha), another(generator.uniform())
        place = generator.uniform()
        if clips.frame_target is not None:  # events stay where they are
            place = torch.zeros_like(place)
        mixture = augment.mix_overlap(values, clips.length, partner, share, place)
        return clips.mixed(mixture, clips.length, partner, share, chosen)


MAGNITUDE_ALPHA = 10.0
CHOICES = {
    "roll_magnitude": ("none", "published", "corrected"),
    "waveform_mixup_rule": ("audiomae", "passt"),
    "resized_crop": ("none", "clip", "frame"),
    "mask_fill": ("raw_zero", "zero"),
    "mask_draws": ("published", "corrected"),
    "spectrogram_mixup_rule": ("passt", "atst"),
}


def frames_of(frontend: nn.Module, waveforms: Sounds, spectrogram: Tensor) -> Sounds:
    """Put the spectrogram (B, 1, F, T) of waveforms in their place."""
    length = valid_frames(frontend, waveforms.length).clamp(max=spectrogram.shape[-1])
    return Sounds(spectrogram, length, waveforms.target, waveforms.frame_target)
