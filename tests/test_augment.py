"""Do the augmentations change what they say, by as much as they say?"""

import json

import pytest
import torch
from conftest import golden_cases
from maes import real_clips
from safetensors.torch import load_file
from scipy import stats
from torch.nn.functional import binary_cross_entropy_with_logits

from audiossl.augment import (
    SpectrogramAugmentation,
    WaveformAugmentation,
    amplify,
    another,
    beta,
    draw_share,
    mix,
    mix_waveforms,
    num_tries,
    roll,
)
from audiossl.errors import UserError
from audiossl.noise import Noise

NO_WAVES = dict(gain_db=0, roll_samples=0, mixup_probability=0.0, mixup_alpha=2.0)
NO_MASKS = dict(widest_bands=0, widest_frames=0, per_clip=False, fill=0.9, mixup_alpha=None)


def noise(clips, step=0):
    return Noise.for_batch(0, step, clips)


def spectrograms(clips=4, bands=128, frames=300):
    return torch.randn(clips, 1, bands, frames, generator=torch.Generator().manual_seed(0))


def targets(clips, classes=3):
    return torch.rand(clips, classes, generator=torch.Generator().manual_seed(1)).round()


@pytest.mark.parametrize("folder", golden_cases("wavemix_passt*"))
def test_waveforms_mix_as_the_published_code_mixes_them(folder):
    inputs, expected = load_file(folder / "input.safetensors"), load_file(folder / "expected.safetensors")
    draws = json.loads((folder / "case.json").read_text())["draws"]
    waveform = torch.cat([inputs[f"wave{clip}"] for clip in draws])
    label = torch.stack([inputs[f"label{clip}"] for clip in draws])
    partner = torch.tensor([draw["partner"] for draw in draws.values()])
    share = torch.tensor([max(draw["beta"], 1 - draw["beta"]) for draw in draws.values()])
    for ours, theirs in ((mix_waveforms(waveform, partner, share), "wave"), (mix(label, partner, share), "label")):
        found = torch.stack([expected[f"{theirs}.{clip}"].flatten() for clip in draws])
        torch.testing.assert_close(ours, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", golden_cases("mixup_passt*"))
def test_spectrograms_mix_as_the_published_code_mixes_them(folder):
    inputs, expected = load_file(folder / "input.safetensors"), load_file(folder / "expected.safetensors")
    target = mix(inputs["y"], inputs["perm"], inputs["lam"])
    torch.testing.assert_close(mix(inputs["x"], inputs["perm"], inputs["lam"]), expected["x_mixed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(target, expected["y_mixed"], rtol=0, atol=1e-6)
    loss = binary_cross_entropy_with_logits(inputs["logits"], target)
    torch.testing.assert_close(loss, expected["bce"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.3, 1.0, 2.0, 5.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha):
    tries = num_tries(alpha)
    drawn = beta(noise(8000).uniform(tries, 2) if tries < 2000 else noise(1000).uniform(tries, 2), alpha)
    assert stats.kstest(drawn.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert drawn.isfinite().all() and (drawn >= 0).all() and (drawn <= 1).all()


def test_the_larger_share_is_the_clips_own():
    share = draw_share(noise(8000), 2.0)
    assert share.min() >= 0.5
    assert stats.kstest(share.numpy(), lambda x: 2 * stats.beta(2, 2).cdf(x) - 1).pvalue > 0.01


def test_gain_is_a_whole_decibel_within_the_published_range():
    waveform = torch.full((3000, 1), 0.5)
    louder, _ = WaveformAugmentation(**NO_WAVES | dict(gain_db=7))(waveform, targets(3000), noise(3000))
    decibels = 20 * (louder[:, 0] / 0.5).log10()
    assert sorted(set(decibels.round(decimals=3).tolist())) == list(range(-7, 7))
    assert stats.chisquare(decibels.round().int().add(7).bincount().numpy()).pvalue > 0.01


def test_every_clip_is_moved_by_its_own_shift_and_nothing_is_lost():
    waveform = real_clips(4, seconds=1)
    shift = torch.tensor([0, 17, -50, 50])
    moved = roll(waveform, shift)
    assert all(torch.equal(new, old.roll(int(by))) for new, old, by in zip(moved, waveform, shift, strict=True))


def test_shifts_reach_both_ends_of_their_range():
    waveform = torch.zeros(3000, 200)
    waveform[:, 100] = 1.0
    moved, _ = WaveformAugmentation(**NO_WAVES | dict(roll_samples=50))(waveform, targets(3000), noise(3000))
    shift = moved.argmax(1) - 100
    assert set(shift.tolist()) == set(range(-50, 51))


def test_half_of_the_clips_are_mixed_and_the_others_left_alone():
    waveform, target = torch.randn(400, 50, generator=torch.Generator().manual_seed(2)), torch.eye(400)
    augmentation = WaveformAugmentation(**NO_WAVES | dict(mixup_probability=0.5))
    mixed, mixed_target = augmentation(waveform, target, noise(400))
    untouched = (mixed == waveform).all(1)
    assert torch.equal(untouched, (mixed_target == target).all(1))
    assert 150 < int(untouched.sum()) < 250
    own = mixed_target.diagonal()[~untouched]
    assert (own >= 0.5).all() and (own < 1).all()
    torch.testing.assert_close(mixed_target.sum(1), torch.ones(400))


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_partner_is_another_clip_and_any_of_them(count):
    seen = {(i, int(p)) for step in range(200) for i, p in enumerate(another(noise(count, step).uniform()))}
    others = {(i, j) for i in range(count) for j in range(count) if i != j}
    assert seen == (others or {(0, 0)})


def test_mixed_spectrograms_take_their_partners_from_the_micro_batch():
    spectrogram, target = spectrograms(12, 8, 10), torch.eye(12)
    mixed, mixed_target = SpectrogramAugmentation(**NO_MASKS | dict(mixup_alpha=0.3))(spectrogram, target, noise(12))
    torch.testing.assert_close(mixed.flatten(1), mixed_target @ spectrogram.flatten(1))
    assert (mixed_target.diagonal() >= 0.5).all()


def hidden_of(augmentation, spectrogram, step=0):
    out, _ = augmentation(spectrogram, targets(len(spectrogram)), noise(len(spectrogram), step))
    hidden = out != spectrogram
    assert (out[hidden] == augmentation.fill).all()
    return hidden[:, 0]


@pytest.mark.parametrize("per_clip", [False, True])
def test_masks_are_spans_of_bands_and_frames_shared_as_asked(per_clip):
    augmentation = SpectrogramAugmentation(**NO_MASKS | dict(widest_bands=48, widest_frames=192, per_clip=per_clip))
    spectrogram, widths = spectrograms(), []
    shared = []
    for step in range(200):
        hidden = hidden_of(augmentation, spectrogram, step)
        bands, frames = hidden.all(2), hidden.all(1)
        assert torch.equal(hidden, bands[:, :, None] | frames[:, None, :])
        for marked in (bands, frames):  # at most one run
            assert (marked[:, 1:] & ~marked[:, :-1]).sum(1).add(marked[:, 0]).max() <= 1
        widths.append(torch.stack([bands.sum(1), frames.sum(1)]))
        shared.append(bool((hidden == hidden[:1]).all()))
    widths = torch.stack(widths)
    assert all(shared) if not per_clip else sum(shared) < 10
    assert widths[:, 0].max() <= 47 and widths[:, 1].max() <= 191
    assert widths[:, 0].float().mean() == pytest.approx(23.5, abs=3)
    assert widths[:, 1].float().mean() == pytest.approx(95.5, abs=12)


def test_masks_fit_clips_shorter_than_the_widest_mask():
    augmentation = SpectrogramAugmentation(**NO_MASKS | dict(widest_frames=192))
    widths = [int(hidden_of(augmentation, spectrograms(2, frames=40), step)[0, 0].sum()) for step in range(100)]
    assert 0 < max(widths) < 40


def test_a_clips_level_does_not_depend_on_who_shares_its_batch():
    waveform = real_clips(4, seconds=0.5)
    augmentation = WaveformAugmentation(**NO_WAVES | dict(gain_db=7, roll_samples=50))
    together, _ = augmentation(waveform, targets(4), noise(4))
    alone, _ = augmentation(waveform[2:], targets(2), Noise(0, 0, torch.tensor([2, 3]), 4))
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together, waveform)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (WaveformAugmentation, dict(gain_db=-1), "model.gain_db=-1"),
        (WaveformAugmentation, dict(mixup_probability=1.5), "model.waveform_mixup=1.5"),
        (WaveformAugmentation, dict(mixup_alpha=0.0), "model.waveform_mixup_alpha=0.0"),
        (SpectrogramAugmentation, dict(mixup_alpha=50.0), "model.spectrogram_mixup_alpha=50.0"),
        (SpectrogramAugmentation, dict(widest_frames=-3), "model.mask_frames=-3"),
    ],
)
def test_settings_outside_their_range_are_named(kind, changes, said):
    defaults = NO_WAVES if kind is WaveformAugmentation else NO_MASKS
    with pytest.raises(UserError, match=said):
        kind(**defaults | changes)


def test_decibels_are_of_amplitude():
    louder = amplify(torch.ones(2, 1), torch.tensor([20.0, -6.0]))[:, 0]
    torch.testing.assert_close(louder, torch.tensor([10.0, 0.501187]))
