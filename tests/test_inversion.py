"""Does the inverted waveform have the spectrogram that it was made from?"""

import numpy as np
import pytest
import soundfile
import torch
from frontends import front_end

from audiossl.sound.inversion import DB_PER_NEPER, inversion_error_db, linear_power, waveform_from_log_mel, write_wav

# over 30 recordings of speech, music and noises: median 0.27, 0.50, 0.23 dB, at most 0.34, 0.54, 0.31 dB
MEDIAN_ERROR_DB = {"kaldi_fbank": 0.4, "atst_mel": 0.6, "passt_mel": 0.4}


@pytest.fixture(params=MEDIAN_ERROR_DB)
def frontend(request):
    return front_end(request.param, seconds=2.56)


def syllables(frontend) -> torch.Tensor:
    """A gliding voice: harmonics that start and stop, over soft noise."""
    rate = frontend.rate_hz
    time = torch.arange(frontend.samples_for(frontend.frames)) / rate
    phase = 2 * torch.pi * torch.cumsum(140 + 60 * torch.sin(2 * torch.pi * 0.7 * time), 0) / rate
    voice = sum(torch.sin(k * phase) / k for k in range(1, 25))
    envelope = torch.sin(2 * torch.pi * 1.5 * time).clamp(min=0)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.1 * voice * envelope + 0.002 * noise


def log_mel_of(frontend, waveform) -> torch.Tensor:
    return frontend.denormalise(frontend(waveform[None]))[0, 0]


def test_the_log_mel_of_the_inverted_waveform_is_the_one_it_was_made_from(frontend, request):
    log_mel = log_mel_of(frontend, syllables(frontend))
    inverted = waveform_from_log_mel(log_mel, frontend)
    assert len(inverted) == frontend.samples_for(frontend.frames)
    assert inversion_error_db(inverted, log_mel, frontend) < MEDIAN_ERROR_DB[request.node.callspec.params["frontend"]]


def test_the_level_is_kept(frontend):
    waveform = syllables(frontend)
    inverted = waveform_from_log_mel(log_mel_of(frontend, waveform), frontend)
    assert 20 * torch.log10(inverted.std() / waveform.std()).abs() < 0.5


def test_a_click_stays_where_it_was(frontend):
    waveform = torch.zeros(frontend.samples_for(frontend.frames))
    place = int(0.4567 * len(waveform))
    waveform[place] = 0.5
    energy = waveform_from_log_mel(log_mel_of(frontend, waveform), frontend).square()
    centre = float((energy * torch.arange(len(energy))).sum() / energy.sum())
    assert abs(centre - place) / frontend.rate_hz < 0.003


def test_inversion_repeats_itself_and_leaves_the_random_state_alone(frontend):
    log_mel = log_mel_of(frontend, syllables(frontend))
    state = torch.get_rng_state()
    first = waveform_from_log_mel(log_mel, frontend, num_iterations=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(waveform_from_log_mel(log_mel, frontend, num_iterations=4, seed=3), first)
    assert not torch.equal(waveform_from_log_mel(log_mel, frontend, num_iterations=4, seed=4), first)


def test_bin_powers_are_non_negative_and_add_up_to_the_bands(frontend):
    mel_power = log_mel_of(frontend, syllables(frontend)).exp()
    matrix = frontend.mel_matrix()
    power = linear_power(mel_power, matrix)
    assert power.shape == (matrix.shape[1], mel_power.shape[1]) and (power >= 0).all()
    heard = matrix.sum(1) > 0  # Kaldi's lowest triangles may hold no bin
    loud = mel_power[heard] > mel_power.max() * 1e-6
    error = ((matrix @ power)[heard].clamp_min(1e-12).log() - mel_power[heard].log()).abs()[loud]
    assert float(error.median() * DB_PER_NEPER) < 0.3


def test_a_silent_spectrogram_gives_silence(frontend):
    inverted = waveform_from_log_mel(torch.full((frontend.num_mels, 40), -25.0), frontend, num_iterations=4)
    assert inverted.isfinite().all() and inverted.abs().max() < 1e-3


def test_a_wav_keeps_the_order_and_relative_level_of_its_parts(tmp_path):
    loud, quiet = torch.full((800,), 2.0), torch.full((400,), -1.0)
    write_wav(tmp_path / "parts.wav", [loud, quiet], 8000, gap_seconds=0.1)
    waveform, rate = soundfile.read(tmp_path / "parts.wav")
    assert (len(waveform), rate) == (800 + 800 + 400, 8000)
    assert soundfile.info(tmp_path / "parts.wav").subtype == "PCM_16"
    np.testing.assert_allclose([waveform[:800].mean(), waveform[1600:].mean()], [0.99, -0.495], atol=1e-4)
    assert not waveform[800:1600].any()
