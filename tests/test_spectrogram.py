"""Do the three front ends give the numbers of the published code?"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from conftest import golden_cases
from frontends import front_end, noise_clips, recorded_clip
from safetensors.torch import load_file
from torch.nn import functional
from torchaudio.compliance import kaldi

from audiossl.spectrogram import to_float


def load_case(case: Path):
    tensors = [load_file(case / f"{part}.safetensors") for part in ("input", "expected")]
    return json.loads((case / "case.json").read_text()), *tensors


def assert_within(got, expected, tolerance: dict, key: str, fallback: dict) -> None:
    """Allow ten times the distance the published code has from itself in float64, at most and for 99.9 % of cells."""
    stated = tolerance.get(key, fallback)
    difference = (got - expected).abs().flatten()
    assert got.shape == expected.shape, key
    assert difference.max() <= 10 * stated["max_abs_diff_f32_vs_f64"], key
    assert difference.double().quantile(0.999) <= 10 * stated["p99.9"], key


# Where a case states no tolerance, the widest that a case of the same front end states is taken: the arithmetic is the
# same, only the input differs. Kaldi: fe_mae_audioset, PaSST: fe_passt_eval, ATST: fe_atst.
FALLBACK = {
    "kaldi_fbank": {"max_abs_diff_f32_vs_f64": 4.7e-4, "p99.9": 1.1e-4},
    "passt_mel": {"max_abs_diff_f32_vs_f64": 9.4e-5, "p99.9": 2.1e-5},
    "atst_mel": {"max_abs_diff_f32_vs_f64": 1.5e-5, "p99.9": 6.2e-6},
}


def mix(first: torch.Tensor, second: torch.Tensor, ratio: float) -> torch.Tensor:
    """Mix as the published loader does: both without their mean, the second cut or padded to the first."""
    first, second = first - first.mean(), second - second.mean()
    return ratio * first + (1 - ratio) * functional.pad(second, (0, first.shape[-1] - second.shape[-1]))


@pytest.mark.parametrize("case", golden_cases("fe_mae_*"))
def test_kaldi_fbank_equals_the_published_loader(case):
    meta, inputs, expected = load_case(case)
    config, waves = meta["config"], {name.removeprefix("wav_i16."): to_float(w) for name, w in inputs.items()}
    seconds = config["target_length"] / 100
    frontend = front_end("kaldi_fbank", mean=config["norm_mean"], std=config["norm_std"], seconds=seconds)
    checked = 0
    for key in [name for name in expected if name.startswith("fbank.")]:
        clip = key.split(".")[1:]
        options = meta["per_clip"].get("+".join(clip[1:]) if clip[0] == "mix" else clip[0], {})
        if clip[0] == "mix":
            wave = mix(waves[clip[1]], waves[clip[2]], options["mix_lambda"])
        else:
            wave = waves[clip[0]] * options.get("magnitude", 1.0)
        if wave.ndim == 2:  # the published code removes the mean of both channels, then hears the first
            wave = (wave - wave.mean())[0]
        got = frontend(wave[None])[0, 0].T
        assert_within(got, expected[key], meta.get("tolerance", {}), key, FALLBACK["kaldi_fbank"])
        checked += 1
    assert checked


def centre_crop(wave: torch.Tensor, samples: int) -> torch.Tensor:
    start = max(0, (len(wave) - samples) // 2)
    return wave[start : start + samples]


@pytest.mark.parametrize("case", golden_cases("fe_atst*"))
def test_atst_mel_equals_the_published_transform(case):
    meta, inputs, expected = load_case(case)
    window_ms = meta["config"]["win_length"] / 16
    natural = front_end("atst_mel", window_ms=window_ms, seconds=None)
    one_second = front_end("atst_mel", window_ms=window_ms, seconds=1.01)
    for key, target in expected.items():
        if key == "mel_batched":
            batch = meta["per_clip"][key]
            got = natural(torch.stack([inputs[f"wav_i16.{clip}"][: batch["samples"]] for clip in batch["clips"]]))
        elif key.startswith("mel_centercrop1s"):
            frontend = one_second if "pad1" in key else natural
            got = frontend(centre_crop(inputs["wav_i16." + key.split(".")[1]], 16000)[None])[0]
        else:
            got = natural(centre_crop(inputs["wav_i16." + key.split(".")[1]], 12 * 16000)[None])[0]
        assert_within(got, target, meta["tolerance"], key, FALLBACK["atst_mel"])


@pytest.mark.parametrize("case", golden_cases("fe_passt*"))
def test_passt_mel_equals_the_published_module(case):
    meta, inputs, expected = load_case(case)
    for key, target in expected.items():
        _, clip, hop = key.split(".")
        frontend = front_end("passt_mel", hop_ms=int(hop.removeprefix("hop")) / 32, seconds=None)
        drawn = meta["per_clip"].get(f"{clip}.{hop}")
        mel = frontend.mel_matrix(drawn["fmin"], drawn["fmax"]) if drawn else frontend.mel_matrix()
        got = frontend.spectrogram(inputs[f"wav_i16.{clip}"][None], None, mel)[0, 0]
        assert_within(got, target, meta.get("tolerance", {}), key, FALLBACK["passt_mel"])


def reference_wave(rate_hz: int) -> torch.Tensor:
    """Make ten seconds of a tone in noise, the same everywhere: the last 32 bits of wrapping integers."""
    n = np.arange(10 * rate_hz, dtype=np.uint64)
    hashed = n * n * np.uint64(747796405) + n * np.uint64(2891336453) + np.uint64(12345)
    noise = (hashed % np.uint64(2**32)).astype(np.float64) / 2**32
    wave = 0.4 * np.sin(2 * np.pi * 440 * n.astype(np.float64) / rate_hz) + 0.1 * (noise - 0.5)
    return torch.from_numpy(wave).float()[None]


PLAIN = {"mean": 0.0, "std": 0.5}  # the Kaldi log itself
DECIBELS = {"min_db": -1.0, "max_db": 1.0}  # ATST's decibels themselves
REFERENCE = [  # front end, changes, shape, mean, standard deviation, cells (band, frame): value
    ("kaldi_fbank", PLAIN | {"seconds": None}, (128, 998), -2.86721, 3.47537,
     {(0, 0): -11.4134, (10, 0): -6.1579, (20, 100): -0.8337, (60, 500): -2.6723, (127, 997): 1.1628}),
    ("kaldi_fbank", {}, (128, 1024), 0.16123, 0.37869, {(64, 1000): 0.46704}),
    ("atst_mel", DECIBELS, (64, 1001), 3.98184, 7.96535, {(0, 0): 16.2964, (20, 100): 0.9086, (63, 1000): 6.3611}),
    ("atst_mel", {}, (64, 1001), 0.28333, 0.12223, {(0, 0): 0.47231, (30, 500): 0.25020, (63, 1000): 0.31985}),
    ("atst_mel", DECIBELS | {"window_ms": 40}, (64, 1001), 1.94163, 8.27595, {(0, 0): 16.1558, (20, 100): -2.7025}),
    ("atst_mel", {"window_ms": 40}, (64, 1001), 0.25203, 0.12700, {}),
    ("passt_mel", {}, (128, 1000), 0.48357, 0.69141, {(0, 0): 0.02021, (60, 500): 0.47259, (127, 999): 1.42223}),
    ("passt_mel", {"hop_ms": 5}, (128, 2000), 0.48354, 0.69162, {(20, 100): 1.55491, (127, 999): 1.32028}),
    ("passt_mel", {"hop_ms": 3.125}, (128, 3200), 0.48359, 0.69159, {(20, 100): 1.55669, (127, 999): 1.35916}),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, shape, mean, deviation, cells", REFERENCE)
def test_a_tone_in_noise_gives_the_recorded_numbers(name, changes, shape, mean, deviation, cells):
    frontend = front_end(name, **changes)
    spectrogram = frontend(reference_wave(frontend.rate_hz))[0, 0]
    assert spectrogram.shape == shape
    assert spectrogram.mean().item() == pytest.approx(mean, abs=2e-5)
    assert spectrogram.std().item() == pytest.approx(deviation, abs=2e-5)
    for cell, value in cells.items():
        assert spectrogram[cell].item() == pytest.approx(value, abs=1e-4), cell


def test_kaldi_fbank_equals_torchaudio_clip_by_clip():
    clips = torch.cat([recorded_clip(), noise_clips(24000)])
    options = dict(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0)
    expected = [kaldi.fbank(clip[None] - clip.mean(), sample_frequency=16000, **options) for clip in clips]
    got = front_end("kaldi_fbank", seconds=None, mean=0.0, std=0.5)(clips)[:, 0].mT
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-3)


def test_atst_mel_equals_torchaudio():
    clips = torch.cat([recorded_clip(), noise_clips(24000)])
    mel = torchaudio.transforms.MelSpectrogram(16000, 1024, f_min=60, f_max=7800, hop_length=160, n_mels=64)
    expected = torchaudio.transforms.AmplitudeToDB("power", top_db=80)(mel(clips)[:, None])
    got = front_end("atst_mel", seconds=None, min_db=-1.0, max_db=1.0)(clips)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
