"""Does Audio-MAE keep its promises where the published code has no numbers?"""

import math
from collections import ChainMap

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from maes import TINY, audiomae, kaldi_fbank, real_clips
from torch.nn.functional import one_hot

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.masking import keep_to_mask
from audiossl.methods.audiomae import AudioMAE
from audiossl.noise import Noise
from audiossl.patches import patchify

DECODERS = {
    "global": dict(decoder="global"),
    "local": dict(decoder="local", decoder_shift="both"),
    "hybrid": dict(decoder="hybrid", decoder_depth=6),
    "overlapping": dict(decoder="local", stride=10, decoder_window=6),
}


@pytest.fixture(params=DECODERS)
def decoder(request):
    return DECODERS[request.param]


def clips(count=2, frames=128, seed=0):
    return torch.randn(count, 1, 128, frames, generator=torch.Generator().manual_seed(seed))


def run(model, spectrogram, step=0):
    return model(Batch(spectrogram=spectrogram), generator=Noise.for_batch(0, step, len(spectrogram)))["loss"]


def keep_for(model, spectrogram):
    noise = Noise.for_batch(0, 0, len(spectrogram))
    return model.masking.keep(noise, model.encoder.grid_for(spectrogram))


def test_every_parameters_gradient_is_the_slope_of_the_loss(decoder):
    model, spectrogram = audiomae(**decoder, norm_target=False).double().eval(), clips().double()
    step, generator = 1e-5, torch.Generator().manual_seed(1)
    with torch.no_grad():  # off the zeros of the start, where a ReLU has no slope
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    run(model, spectrogram).backward()
    for name, parameter in model.named_parameters():
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        way = way / way.norm()
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * step * way
                losses.append(float(run(model, spectrogram)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert parameter.grad is not None, name
        assert float((parameter.grad * way).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize(("norm_target", "level_weight"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_what_is_hidden_never_reaches_the_picture(decoder, norm_target, level_weight):
    model, spectrogram = audiomae(**decoder, norm_target=norm_target, level_weight=level_weight).eval(), clips()
    keep = keep_for(model, spectrogram)
    honest = model.reconstruct(spectrogram, keep=keep)
    other = spectrogram.clone()
    gaps = honest["hidden"]
    other[..., : gaps.shape[2], : gaps.shape[3]][gaps] = 100.0
    again = model.reconstruct(other, keep=keep)
    assert gaps.any() and all(torch.equal(honest[name], again[name]) for name in honest)


def test_a_reconstruction_shows_visible_cells_as_they_are(decoder):
    model, spectrogram = audiomae(**decoder).eval(), clips()
    picture = model.reconstruct(spectrogram, keep=keep_for(model, spectrogram))
    covered = spectrogram[..., : picture["hidden"].shape[2], : picture["hidden"].shape[3]]
    seen = ~picture["hidden"]
    assert torch.equal(picture["filled"][seen], covered[seen])
    assert torch.equal(picture["filled"][~seen], picture["prediction"][~seen])


def test_a_normalised_prediction_takes_its_level_from_its_visible_neighbours():
    model = audiomae(norm_target=True).eval()
    torch.nn.init.zeros_(model.decoder.predict.weight)  # predicts the mean of every patch
    levels = torch.arange(8.0)[:, None].expand(8, 8)
    spectrogram = levels.repeat_interleave(16, 0).repeat_interleave(16, 1)[None, None]
    keep = torch.arange(0, 64, 2)[None]  # every other column: each hidden patch has neighbours of its own row
    prediction = model.reconstruct(spectrogram, keep=keep)["prediction"]
    assert float((prediction - spectrogram).abs().max()) < 0.35


def test_the_loss_reads_the_hidden_patches():
    model, spectrogram = audiomae(norm_target=False).eval(), clips()
    keep = keep_for(model, spectrogram)
    gaps = keep_to_mask(keep, 64).reshape(2, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    moved = torch.where(gaps, spectrogram + 1.0, spectrogram)
    prediction = model.reconstruct(spectrogram, keep=keep)["prediction"]
    for heard in (spectrogram, moved):
        expected = (prediction - heard)[gaps].square().mean()
        torch.testing.assert_close(model.loss(heard, keep), expected)


def test_predicted_levels_give_normalised_patches_their_loudness():
    model, spectrogram = audiomae(norm_target=True, level_weight=3.0).eval(), clips()
    keep = keep_for(model, spectrogram)
    patches = patchify(spectrogram, model.encoder.patch, model.encoder.stride)
    mean, std = patches.mean(2, keepdim=True), patches.std(2, keepdim=True)
    values = model.decoder.values(model.decode(spectrogram, keep))
    shape, levels = values[..., :-2], values[..., -2:]
    gaps = keep_to_mask(keep, 64)
    error = (shape - (patches - mean) / std)[gaps].square().mean()
    error = error + 3 * (levels - torch.cat([mean, std], 2))[gaps].square().mean()
    torch.testing.assert_close(model.loss(spectrogram, keep), error, rtol=1e-4, atol=0)
    expected = shape * levels[..., 1:].clamp(min=0) + levels[..., :1]
    prediction = patchify(model.reconstruct(spectrogram, keep=keep)["prediction"], model.encoder.patch, (16, 16))
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="level_weight=1.*norm_target=true"):
        audiomae(norm_target=False, level_weight=1.0)


def test_a_batch_without_clips_has_a_zero_loss_and_gradients_everywhere():
    model = audiomae(decoder="local")
    empty = Batch(waveform=torch.zeros(0, 16000), num_samples=torch.zeros(0, dtype=torch.long))
    loss = model(empty, generator=Noise(0, 0, torch.zeros(0, dtype=torch.long), 4))["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_clips_mask_does_not_depend_on_who_shares_its_batch():
    model, spectrogram = audiomae().eval(), clips(4)
    losses = [
        model(Batch(spectrogram=spectrogram[rows]), generator=Noise(0, 3, rows, 4))["loss"]
        for rows in (torch.arange(4), torch.tensor([0, 1]), torch.tensor([2, 3]))
    ]
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)


def test_training_halves_the_loss_on_four_recordings():
    spoken = real_clips(4, seconds=2.56)
    model = audiomae(256, width=48, num_heads=3, decoder_width=32, norm_target=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses = []
    for step in range(100):
        loss = model(Batch(waveform=spoken), generator=Noise.for_batch(0, step, 4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


def test_the_local_decoder_is_random_in_training_only():
    model, spectrogram = audiomae(decoder="local"), clips()
    with torch.no_grad():
        assert run(model, spectrogram) != run(model, spectrogram)
        model.eval()
        assert run(model, spectrogram) == run(model, spectrogram)


@pytest.mark.parametrize("mask", ["random", "time", "frequency", "time+frequency"])
def test_every_masking_gives_a_loss(mask):
    assert math.isfinite(run(audiomae(mask=mask, mask_ratio=0.6), clips()).detach())


@pytest.mark.parametrize("frames", [64, 128, 192, 256])
def test_shorter_clips_go_through_the_model_of_longer_ones(frames):
    model = audiomae(256, decoder="local")
    assert math.isfinite(run(model, clips(frames=frames)).detach())


def test_low_precision_stays_close_to_full_precision(decoder):
    model, spectrogram = audiomae(**decoder).eval(), clips()
    with torch.no_grad():
        exact = float(run(model, spectrogram))
        with torch.autocast("cpu", torch.bfloat16):
            assert float(run(model, spectrogram)) == pytest.approx(exact, rel=0.02)


def test_a_window_reaches_across_time_only_when_it_is_shifted_over_time():
    reached = {}
    for shift in ("none", "time", "both"):
        model = audiomae(256, decoder="local", decoder_shift=shift, norm_target=False).eval()
        tokens = one_hot(torch.arange(128), 128)[None, :, :16].float().requires_grad_()
        model.decoder._local(tokens, (8, 16))[0, 3 * 16 + 3].sum().backward()
        reached[shift] = tokens.grad[0].abs().sum(1).reshape(8, 16) > 0
    for shift, (rows, columns) in {"none": (4, 4), "time": (4, 8), "both": (8, 8)}.items():
        expected = torch.zeros(8, 16, dtype=torch.bool)
        expected[:rows, :columns] = True
        assert torch.equal(reached[shift], expected), shift


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(mask_ratio=1.2), "model.mask_ratio=1.2"),
        (dict(mask_ratio=0.0), "hides none"),
        (dict(mask_ratio=0.999), "keeps none"),
        (dict(patch=24, stride=24), "model.patch=24"),
        (dict(stride=17), "model.stride=17"),
        (dict(frames=100), "96 and 112"),
        (dict(frames=8), "shorter than one patch"),
        (dict(frames=None), "frontend.seconds"),
        (dict(frames=80, decoder="local"), "8 x 5"),
        (dict(decoder="hybrid", decoder_depth=4), "model.decoder_depth=4"),
        (dict(decoder="globl"), "global, local or hybrid"),
        (dict(decoder_shift="up", decoder="local"), "model.decoder_shift"),
        (dict(num_heads=7), "7 heads"),
        (dict(width=50, num_heads=2), "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, said):
    with pytest.raises(UserError, match=said) as error:
        audiomae(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", sorted((ROOT / "conf/size").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_size_builds(size):
    own = ROOT / "conf" / "model_size" / f"audiomae_{size.stem}.yaml"
    files = [ROOT / "conf/model/audiomae.yaml", size, *([own] if own.exists() else [])]
    settings = dict(ChainMap(*(yaml.safe_load(file.read_text()) for file in reversed(files))))
    del settings["_target_"]
    with torch.device("meta"):
        model = AudioMAE(frontend=kaldi_fbank(1024), **settings)
    millions = {"tiny": 2.3, "small": 72, "base": 137, "large": 355, "huge": 682}[size.stem]
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.05), f"{size.stem}: {count}"
    assert model.tokens_per_clip == 512 and set(TINY) <= set(settings)
