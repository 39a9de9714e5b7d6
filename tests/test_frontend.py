"""Do the front ends keep their promises for any clip, rate, hop and precision?"""

import math

import numpy as np
import pytest
import torch
from frontends import NAMES, front_end, noise_clips, settings
from hydra.utils import get_class
from omegaconf import OmegaConf
from torchaudio.transforms import Resample

from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.sound.waveform import FILTER, Resampler, resampler
from audiossl.spectrogram import resample, resampled_samples, to_float


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_gives_the_same_alone_in_a_batch_as_int16_and_behind_padding(name):
    frontend = front_end(name, seconds=1.28)
    clips = (noise_clips(16000) * 32768).to(torch.int16)
    junk = torch.full((3, 9000), 32767, dtype=torch.int16)
    together = frontend(torch.cat([clips, junk], 1), torch.tensor([16000, 12345, 300]))
    alone = [frontend(to_float(clip[None, :n])) for clip, n in zip(clips, (16000, 12345, 300), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)
    at_once = frontend.transform(to_float(clips), torch.full((3, 1), 16000), frontend.mel)  # as on a GPU
    torch.testing.assert_close(at_once, frontend(clips), rtol=0, atol=2e-5)


def test_kaldi_padding_is_the_published_constant_from_the_first_frame_without_audio():
    frontend = front_end("kaldi_fbank")
    spectrogram = frontend(noise_clips(160000), torch.tensor([160000, 400 + 159, 399]))
    for row, real in zip(spectrogram, (998, 1, 1), strict=True):
        assert torch.all((row[0, :, real:] - 0.46704).abs() < 1e-5)
        assert (row[0, :, real - 1] - 0.46704).abs().max() > 0.1


def test_the_kaldi_mean_is_that_of_the_valid_samples():
    clip = noise_clips(399, 1)  # shorter than a window, so an offset left in would show as a step at its end
    frontend, padding = front_end("kaldi_fbank", seconds=0.16), torch.full((1, 4000), 9.0)
    shifted = frontend(torch.cat([clip + 0.5, padding], 1), torch.tensor([399]))
    torch.testing.assert_close(shifted, frontend(clip), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seconds", [None, 0.5])
@pytest.mark.parametrize("samples", [1, 399, 400, 512, 513, 514])
@pytest.mark.parametrize("name", NAMES)
def test_clips_shorter_than_a_window_are_padded(name, samples, seconds):
    spectrogram = front_end(name, seconds=seconds)(noise_clips(samples))
    assert spectrogram.isfinite().all()
    fewest = {"kaldi_fbank": 1, "atst_mel": 4, "passt_mel": 2}  # what 400, 513 and 514 samples give
    assert spectrogram.shape[-1] == (50 if seconds else fewest[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_waveform(name):
    frontend = front_end(name, seconds=0.32)
    waveform, step = noise_clips(16000, 1), 1e-3 * noise_clips(16000, 1, seed=1)
    waveform.requires_grad_()
    (slope,) = torch.autograd.grad(frontend(waveform).mean(), waveform)
    with torch.no_grad():
        rise = frontend(waveform + step).double().mean() - frontend(waveform - step).double().mean()
    assert (slope * 2 * step).sum().item() == pytest.approx(rise.item(), rel=0.05, abs=1e-6)
    silence = torch.zeros(1, 16000, requires_grad=True)
    frontend(silence).sum().backward()
    assert silence.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_precision_stays_float32_under_autocast_and_in_a_bfloat16_model(name):
    clips, frontend = noise_clips(16000), front_end(name)
    expected, slower = frontend(clips), resample(clips, 32000, 16000)
    restored = frontend.denormalise(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert expected.dtype == torch.float32 and torch.equal(frontend(clips), expected)
        assert torch.equal(resample(clips, 32000, 16000), slower)
        assert torch.equal(frontend.denormalise(expected), restored)
    assert torch.equal(torch.nn.Sequential(frontend).bfloat16()(clips), expected)
    assert not frontend.state_dict(), "a front end adds nothing to a checkpoint"


@pytest.mark.parametrize(
    "name, hops", [("kaldi_fbank", [5, 10, 20]), ("atst_mel", [5, 10]), ("passt_mel", [3.125, 5, 10])]
)
def test_a_sweep_over_the_hop_keeps_the_seconds(name, hops):
    for hop_ms in hops:
        frontend = front_end(name, hop_ms=hop_ms)
        assert frontend.frames * hop_ms / 1000 == pytest.approx(settings(name).seconds)
        assert frontend(noise_clips(1000)).shape == (3, 1, frontend.num_mels, frontend.frames)


@pytest.mark.parametrize("hop_ms", [3.125, 5, 10])
@pytest.mark.parametrize("name", NAMES)
def test_samples_for_gives_exactly_that_many_real_frames(name, hop_ms):
    natural, fixed = front_end(name, hop_ms=hop_ms, seconds=None), front_end(name, hop_ms=hop_ms, seconds=hop_ms * 0.2)
    for frames in (16, 64, 200):
        assert natural(noise_clips(natural.samples_for(frames), 1)).shape[-1] == frames
    longer = noise_clips(fixed.samples_for(200) + 5000, 1)
    shorter = longer[:, : fixed.samples_for(200)]  # Kaldi's mean is another, which its frames hardly feel
    torch.testing.assert_close(fixed(longer), natural(shorter), rtol=0, atol=2e-3)


@pytest.mark.faults("C4")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("from_hz", [16000, 32000, 44100])
def test_a_tone_lands_in_its_band_whatever_the_rate_it_came_with(name, from_hz):
    frontend = front_end(name, seconds=None)
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(from_hz) / from_hz)[None]
    loudest = frontend(resample(tone, from_hz, frontend.rate_hz))[0, 0].mean(-1).argmax().item()
    low, high, heard = (1127 * math.log(1 + f / 700) for f in (frontend.fmin_hz, frontend.fmax_hz, 1000))
    assert loudest == round((heard - low) / (high - low) * (frontend.num_mels + 1)) - 1


def windowed_by_hand(name: str, wave: np.ndarray, frontend, frame: int) -> np.ndarray:
    """Cut and weigh one frame in float64, from the definitions."""
    size, start = frontend.window_samples, frame * frontend.hop_samples
    if name == "kaldi_fbank":
        cut = wave[start : start + size] - wave[start : start + size].mean()
        return (cut - 0.97 * np.concatenate([cut[:1], cut[:-1]])) * np.hanning(size)
    if name == "passt_mel":
        return (wave[1:] - 0.97 * wave[:-1])[start - size // 2 : start + size // 2] * np.hanning(size)
    return wave[start - size // 2 : start + size // 2] * np.hanning(size + 1)[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_denormalise_returns_the_natural_logarithm_of_mel_power(name):
    frontend, clip = front_end(name, seconds=None), noise_clips(32000, 1)
    restored = frontend.denormalise(frontend(clip))
    frame = windowed_by_hand(name, clip[0].double().numpy(), frontend, 40)
    power = np.abs(np.fft.rfft(frame, frontend.n_fft)) ** 2
    by_hand = np.log(frontend.mel_matrix().double().numpy() @ power + 1.1920929e-07)
    assert np.abs(restored[0, 0, :, 40].double().numpy() - by_hand).max() < 2e-3
    assert frontend.denormalise(torch.full((1, 1, 2, 2), -5.0)).isfinite().all(), (
        "a model may predict less than silence"
    )
    silence = frontend.denormalise(frontend(torch.zeros(1, 32000)))
    assert silence.isfinite().all() and silence.max() < -15


def test_the_range_of_passt_is_drawn_once_for_the_global_batch_and_only_in_training():
    frontend, clips, rows = front_end("passt_mel", seconds=1), noise_clips(32000).repeat(2, 1)[:4], torch.arange(4)
    expected = frontend(clips)
    assert torch.equal(frontend(clips, generator=Noise(1, 2, rows, 4)), expected)
    frontend.train()
    assert torch.equal(frontend(clips), expected)
    together = frontend(clips, generator=Noise(1, 2, rows, 4))
    halves = [frontend(clips[half], generator=Noise(1, 2, half, 4)) for half in (rows[:2], rows[2:])]
    assert not torch.equal(together, expected) and torch.allclose(torch.cat(halves), together, atol=1e-5)
    drawn = [frontend.draw_range(Noise.for_batch(0, step, 1)) for step in range(3000)]
    assert {low for low, _ in drawn} == set(range(10))
    assert min(h for _, h in drawn) in range(14001, 14011) and max(h for _, h in drawn) in range(15991, 16001)


def test_resampling_keeps_a_tone_and_counts_its_samples():
    tone = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(44100) / 44100)[None]
    resampler.cache_clear()
    with torch.inference_mode():
        resample(tone[:, :44], 44100, 16000)
    waveform = tone[:, :44000].clone().requires_grad_()
    resampled = resample(waveform, 44100, 16000)
    assert (
        resampled.shape[-1]
        == resampled_samples(44000, 44100, 16000)
        == resampled_samples(torch.tensor(44000), 44100, 16000)
    )
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(resampled.shape[-1]) / 16000)
    assert (resampled[0] - expected)[100:-100].abs().max() < 2e-3
    resampled.square().sum().backward()
    assert waveform.grad.abs().max() > 0
    assert torch.equal(resample((tone * 32768).to(torch.int16), 16000, 16000), to_float((tone * 32768).to(torch.int16)))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("kaldi_fbank", {"hop_ms": 3.3}, ["frontend.hop_ms=3.3", "3.3125 (53 samples)"]),
        ("passt_mel", {"hop_ms": 3.1}, ["frontend.hop_ms=3.1", "3.09375 (99 samples)"]),
        ("atst_mel", {"window_ms": 25.01}, ["frontend.window_ms=25.01", "25 (400 samples)"]),
        ("kaldi_fbank", {"hop_ms": 3.125}, ["frontend.seconds=10.24", "10.240625 (3277 frames)"]),
        ("atst_mel", {"hop_ms": 20}, ["frontend.seconds=10.01", "10 (500 frames)"]),
        ("kaldi_fbank", {"seconds": 0}, ["frontend.seconds=0", "0.01 (1 frames)"]),
        ("kaldi_fbank", {"hop_ms": -10}, ["frontend.hop_ms=-10", "0.0625 (1 samples)"]),
        ("atst_mel", {"fmin_hz": 7800}, ["frontend.fmin_hz=7800", "frontend.fmax_hz=7800"]),
        ("kaldi_fbank", {"fmax_hz": 16000}, ["frontend.fmax_hz=16000", "8000"]),
        ("kaldi_fbank", {"num_mels": 400}, ["frontend.num_mels=400", "255"]),
        ("atst_mel", {"n_fft": 512}, ["frontend.n_fft=512", "1024 does"]),
        ("kaldi_fbank", {"std": 0.0}, ["frontend.std"]),
        ("passt_mel", {"fmax_hz": 15500}, ["frontend.fmax_jitter_hz=2000", "16000"]),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_met_is_named_with_the_nearest_that_can(name, changes, words):
    values = OmegaConf.to_container(settings(name, **changes), resolve=True)
    with pytest.raises(UserError) as error:
        get_class(values.pop("_target_"))(**values)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_computes_what_the_cpu_does(name):
    frontend, clips, lengths = front_end(name), noise_clips(44100), torch.tensor([44100, 20000, 300])
    expected = frontend(resample(clips, 44100, frontend.rate_hz), lengths)
    on_device = frontend.cuda()(resample(clips.cuda(), 44100, frontend.rate_hz), lengths)
    torch.testing.assert_close(on_device.cpu(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "rates", [(32_000, 16_000), (8_000, 16_000), (44_100, 16_000), (22_050, 32_000), (96_000, 16_000)]
)
def test_resampling_is_torchaudios_however_many_periods_are_taken_at_once(rates):
    theirs = Resample(*rates, **FILTER)
    for num_clips, num_samples in ((1, 1), (1, 999), (2, 7), (3, 2 * rates[0] + 1)):
        clips = 2 * torch.rand(num_clips, num_samples, generator=torch.Generator().manual_seed(0)) - 1
        ours, expected = resample(clips, *rates), theirs(clips)
        assert ours.shape == expected.shape and torch.allclose(ours, expected, atol=2e-6)
    assert torch.equal(torch.cat([resample(clip[None], *rates) for clip in clips]), ours)
    clips.requires_grad_()
    gradients = [torch.autograd.grad(work(clips).square().sum(), clips)[0] for work in (theirs, Resampler(*rates))]
    assert torch.allclose(*gradients, atol=2e-5)
