"""A clip sounds the same to a model however it comes: packed or from its file, whatever the rate and the format."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from exported import encoder_of
from maes import real_clips

from audiossl.embeddings import file_blocks
from audiossl.pretrained import PretrainedEncoder
from audiossl.sound import audio
from audiossl.sound.waveform import resample

SECONDS = 2.0


def heard(model: PretrainedEncoder, waveform: torch.Tensor) -> torch.Tensor:
    """Give the log-mel (F, T) of the seconds that are audio."""
    return model.frontend(waveform[None])[0, 0, :, : int(SECONDS * 100)]


def packed(path: Path, packed_hz: int, to_hz: int) -> torch.Tensor:
    """Give a file's samples as `python -m audiossl pack` stores them and training resamples them."""
    waveform, rate_hz = audio.decode(audio.to_flac(path, packed_hz)[0])
    return resample(torch.from_numpy(waveform)[None], rate_hz, to_hz)[0]


@pytest.mark.parametrize("rate_hz, ending", [(8000, "wav"), (22050, "flac"), (44100, "ogg"), (48000, "mp3")])
def test_a_file_is_heard_as_its_packed_copy(tmp_path, rate_hz, ending):
    model, apart, spread = encoder_of("audiomae"), [], []
    for number, clip in enumerate(real_clips(4, SECONDS, 32000).numpy()):
        path = tmp_path / f"{number}.{ending}"
        soundfile.write(path, audio.resample(clip, 32000, rate_hz), rate_hz)
        of_file = heard(model, torch.cat(list(file_blocks(path, model))))
        apart.append((of_file - heard(model, packed(path, 32000, model.rate_hz))).square().mean())
        spread.append(of_file.var())
    assert (torch.stack(apart).mean() / torch.stack(spread).mean()).sqrt() < 0.1


@pytest.mark.parametrize("from_hz, to_hz", [(8000, 16000), (8000, 32000), (11025, 16000), (22050, 32000)])
def test_resampling_up_leaves_nothing_where_there_was_nothing(from_hz, to_hz):
    clip = real_clips(1, SECONDS, 32000)[0] * torch.hann_window(int(SECONDS * 32000))  # no edges, which are wide
    clip = torch.from_numpy(audio.resample(clip.numpy(), 32000, from_hz))[None]
    sound = torch.stft(resample(clip, from_hz, to_hz), 1024, window=torch.hann_window(1024), return_complex=True)
    level = sound.abs().square().mean(-1)[0]
    edge = round(1024 * from_hz / 2 / to_hz)
    assert 10 * torch.log10(level[edge + 20 :].max() / level[: edge - 20].max()) < -90


def test_what_a_lossy_file_holds_below_sixteen_bits_is_not_heard(tmp_path):
    faint = np.random.default_rng(0).normal(size=32000).astype(np.float32) * 1e-6
    soundfile.write(tmp_path / "faint.wav", faint, 16000, subtype="FLOAT")
    assert not torch.cat(list(file_blocks(tmp_path / "faint.wav", encoder_of("audiomae")))).any()
