"""Does PaSST keep its promises where the published code has no numbers?"""

import logging

import numpy as np
import pytest
import timm
import torch
from maes import real_clips
from passts import PLAIN, passt

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.running.build import load_initial_weights
from audiossl.sound.audio import resample

SINGLES = PLAIN | dict(patchout_time=10, patchout_frequency=4, patchout_random=20)


def spectrograms(clips=2, frames=256, seed=0):
    return torch.randn(clips, 1, 128, frames, generator=torch.Generator().manual_seed(seed))


def labels(clips, classes=5):
    return torch.eye(classes)[torch.arange(clips) % classes]


def run(model, spectrogram, step=0):
    batch = Batch(spectrogram=spectrogram, target=labels(len(spectrogram)))
    return model(batch, generator=Noise.for_batch(0, step, len(batch)))["loss"]


def recordings(clips=4, seconds=2.56):
    return torch.from_numpy(np.stack([resample(clip.numpy(), 16000, 32000) for clip in real_clips(clips, seconds)]))


def test_training_halves_the_loss_on_four_recordings():
    heard = recordings()
    shifted = PLAIN | dict(patchout_time=10, patchout_frequency=4, gain_db=7, roll_samples=50)
    model = passt(width=48, num_heads=3, **shifted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(100):
        batch = Batch(waveform=heard, target=labels(4))
        loss = model(batch, generator=Noise.for_batch(0, step, 4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


@pytest.mark.parametrize("draws", ["published", "corrected"])
def test_every_parameter_gets_a_gradient_under_the_whole_recipe(draws):
    model = passt(draws=draws, patchout_random=20)
    batch = Batch(waveform=recordings(), num_samples=torch.tensor([81920, 81920, 60000, 40000]), target=labels(4))
    loss = model(batch, generator=Noise.for_batch(0, 0, 4))["loss"]
    loss.backward()
    assert loss.isfinite()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize(("draws", "are_shared"), [("published", True), ("corrected", False)])
def test_patchout_leaves_out_rows_columns_and_singles_shared_as_asked(draws, are_shared):
    model = passt(**SINGLES, draws=draws)
    rows, columns = model.encoder.grid
    kept = model.patchout.keep(Noise.for_batch(0, 0, 3), (rows, columns))
    assert kept.shape == (3, (rows - 4) * (columns - 10) - 20)
    for clip in kept:
        assert (clip[1:] > clip[:-1]).all() and clip[-1] < rows * columns
        assert len(clip.div(columns, rounding_mode="floor").unique()) <= rows - 4
        assert len((clip % columns).unique()) <= columns - 10
    assert bool((kept == kept[:1]).all()) == are_shared
    later = model.patchout.keep(Noise.for_batch(0, 1, 3), (rows, columns))
    assert not torch.equal(kept, later)


def test_evaluation_draws_nothing_and_leaves_nothing_out():
    model, heard = passt().eval(), recordings(2)
    batch = Batch(waveform=heard, num_samples=torch.tensor([81920, 50000]), target=labels(2))
    with torch.no_grad():
        first, second = (model(batch, generator=Noise.for_batch(0, step, 2))["loss"] for step in (0, 1))
        logits = model.logits(batch)
        whole = model.head(model.encoder(model.frontend(heard, batch.num_samples))[:, :2].mean(1))
    assert first == second
    torch.testing.assert_close(first, model.loss(logits, batch.target))
    torch.testing.assert_close(logits, whole)


def test_training_depends_on_the_step_alone():
    model, heard = passt(), recordings()
    batch = Batch(waveform=heard, target=labels(4))
    losses = [model(batch, generator=Noise.for_batch(0, step, 4))["loss"].item() for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_a_clips_loss_does_not_depend_on_who_shares_its_batch():
    unmixed = dict(waveform_mixup=0.0, spectrogram_mixup_alpha=None)
    for draws in ("published", "corrected"):
        model, heard = passt(**unmixed, draws=draws), recordings()
        losses = [
            model(Batch(waveform=heard[rows], target=labels(4)[rows]), generator=Noise(0, 3, rows, 4))["loss"]
            for rows in (torch.arange(4), torch.tensor([0, 1]), torch.tensor([2, 3]))
        ]
        torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)


def test_a_short_clip_takes_any_stretch_of_the_positions_in_training_and_the_first_in_evaluation(monkeypatch):
    model, seen = passt(**PLAIN, position_frames=306), []
    whole = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *a, first_column: seen.append(first_column) or whole(*a))
    for step in range(60):
        run(model, spectrograms(), step)
    assert set(seen) == set(range(6))  # 30 columns of positions, 25 of the clip
    seen.clear()
    run(model.eval(), spectrograms())
    assert seen == [0]


def test_the_stretch_of_positions_is_what_the_encoder_adds():
    model = passt(**PLAIN, position_frames=306).eval()
    spectrogram = spectrograms()
    moved = model.features(spectrogram, first_column=5)
    with torch.no_grad():
        model.encoder.positions.time[:, :25] = model.encoder.positions.time[:, 5:30].clone()
    torch.testing.assert_close(moved, model.features(spectrogram))
    assert not torch.allclose(moved, passt(**PLAIN, position_frames=306).features(spectrogram))


def test_clips_too_long_for_the_positions_are_cut_and_that_is_said_once(caplog):
    for mode in (True, False):
        model, long = passt(**SINGLES).train(mode), spectrograms(frames=400)
        with caplog.at_level(logging.WARNING), torch.no_grad():
            losses = [run(model, spectrogram) for spectrogram in (long, long, long[..., :256])]
        assert losses[0] == losses[1] == losses[2]
        assert caplog.text.count("clips of 400 frames are cut to 256") == 1
        caplog.clear()


# published: tokens of a whole clip and of a patched-out one, class and distillation token counted
VARIANTS = {
    "s10": (dict(), 1190, 474),
    "s12": (dict(stride=12), 832, 2 + 6 * 43),
    "s14": (dict(stride=14, patchout_time=30, patchout_frequency=3), 641, 2 + 6 * 41),
    "s16, no overlap": (dict(stride=16, patchout_time=20, patchout_frequency=1), 498, 2 + 7 * 42),
    "u600": (dict(patchout_time=0, patchout_frequency=0, patchout_random=600), 1190, 590),
    "light": (dict(depth=7), 1190, 474),
    "hop 5 ms": (dict(hop_ms=5, patchout_time=100, patchout_frequency=6), 2390, 596),
    "hop 3.125 ms": (dict(hop_ms=3.125, patchout_time=150, patchout_frequency=6), 3830, 1016),
    "20 s": (dict(seconds=20, position_frames=2006, patchout_time=100), 2 + 12 * 199, 2 + 8 * 99),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_run_on_as_many_tokens_as_published(name, monkeypatch):
    changes, whole, left = VARIANTS[name]
    model, seen = passt(**dict(seconds=10, patchout_time=40) | changes), []
    monkeypatch.setattr(model.encoder.norm, "forward", lambda x: seen.append(x.shape[1]) or x)
    heard = recordings(1, 10.0).repeat(1, 2)[:, : model.frontend.samples_for(model.frontend.frames)]
    batch = Batch(waveform=heard, target=labels(1))
    model(batch, generator=Noise.for_batch(0, 0, 1))["loss"].backward()
    with torch.no_grad():
        model.eval().logits(batch)
    assert seen == [left, whole]
    assert (
        model.tokens_per_clip == whole - 2
        and model.patchout.num_kept(model.encoder.grid_for(model.frontend(heard))) == left - 2
    )


def test_masked_cells_hold_what_a_raw_zero_becomes():
    model = passt()
    zero = model.frontend.denormalise(torch.tensor(model.augment_spectrogram.fill))
    assert model.augment_spectrogram.fill == pytest.approx(0.9)
    assert zero.exp() + model.frontend.log_offset == pytest.approx(1.0)


@pytest.mark.parametrize("tokens", [1, 2])
def test_an_image_model_without_a_distillation_token_lends_its_class_token_twice(tokens, tmp_path):
    torch.manual_seed(1)
    image = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3).state_dict()
    torch.save(image, tmp_path / "vit.pth")
    model = passt(**PLAIN, width=48, num_heads=3, distilled=tokens == 2)
    load_initial_weights(model, str(tmp_path / "vit.pth"))
    assert torch.equal(model.encoder.class_token, image["cls_token"].expand(-1, tokens, -1))
    assert torch.equal(model.encoder.positions.class_table, image["pos_embed"][:, :1].expand(-1, tokens, -1))
    assert run(model, spectrograms()).isfinite()


def test_a_batch_without_clips_has_a_zero_loss_and_gradients_everywhere():
    model = passt()
    empty = Batch(waveform=torch.zeros(0, 32000), target=torch.zeros(0, 5))
    loss = model(empty, generator=Noise(0, 0, torch.zeros(0, dtype=torch.long), 4))["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_low_precision_stays_close_to_full_precision():
    model = passt(**SINGLES)
    with torch.no_grad():
        exact = float(run(model, spectrograms()))
        with torch.autocast("cpu", torch.bfloat16):
            assert float(run(model, spectrograms())) == pytest.approx(exact, rel=0.02)


def test_clips_without_labels_are_refused():
    with pytest.raises(UserError, match="learns from labels"):
        passt()(Batch(spectrogram=spectrograms()), generator=Noise.for_batch(0, 0, 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(patchout_time=25), "leave nothing of 12 x 25 patches"),
        (dict(patchout_random=400), "patchout_random=400 leave nothing"),
        (dict(patchout_frequency=-1), "model.patchout_frequency=-1"),
        (dict(draws="both"), "model.draws='both'"),
        (dict(seconds=None), "model.position_frames"),
        (dict(num_heads=7), "7 heads"),
        (dict(stride=17), "model.stride=17"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, said):
    with pytest.raises(UserError, match=said) as error:
        passt(**changes)
    assert "\n" not in str(error.value)
