"""Are the features of a recording those of the encoder, whatever its length, its rate and its neighbours in a batch?"""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from exported import METHODS, OVERLAPPING, encoder_of, noise, write
from torch.nn.functional import pad

import audiossl
from audiossl.errors import UserError
from audiossl.features.chunks import valid_tokens
from audiossl.features.windows import Layout, cut
from audiossl.index import Index
from audiossl.sound.waveform import resample, resample_blocks, resampled_samples

pytestmark = pytest.mark.filterwarnings("error")


def window_of(model, seed: int = 0) -> torch.Tensor:
    """Make a clip (S,) of exactly one window at the model's rate."""
    length = model.frontend.samples_for(model.frontend.frames)
    return torch.from_numpy(noise(length / model.rate_hz, model.rate_hz, seed))


def column_seconds(model) -> float:
    return model.encoder.stride[1] * model.frontend.hop_samples / model.rate_hz


@pytest.mark.parametrize("model", [*METHODS, OVERLAPPING])
@pytest.mark.parametrize(("seconds", "rate_hz"), [(0, 44100), (0.01, 4000), (1, 192000), (2.6, 32000), (65, 22050)])
def test_any_length_at_any_rate_gives_finite_features_for_every_moment(model, seconds, rate_hz):
    model = encoder_of(model)
    found = model.embed(noise(seconds, rate_hz), rate_hz)
    count, column = found.frames.shape[1], column_seconds(model)
    assert found.clip.shape == (1, model.width) and found.frames.shape == (1, count, model.width)
    assert found.clip.isfinite().all() and found.frames.isfinite().all()
    assert found.timestamps_seconds.shape == (count,) and found.num_frames.tolist() == [count]
    torch.testing.assert_close(found.timestamps_seconds.diff(), torch.full((count - 1,), column, dtype=torch.float64))
    assert count == pytest.approx(max(1, seconds / column), abs=1.5)
    assert 0 < found.timestamps_seconds[0] <= column and found.timestamps_seconds[-1] < max(seconds, column)


@pytest.mark.parametrize("model", [*METHODS, OVERLAPPING])
def test_a_clip_of_one_window_gives_the_tokens_of_the_model(model):
    model = encoder_of(model)
    clip = window_of(model)
    with torch.no_grad():
        spectrogram = model.frontend(clip[None])
        tokens = model.tokens(spectrogram)[0]
    classes, patches = tokens.tensor_split([model.encoder.num_class_tokens])
    expected = {"mean": patches.mean(0), "max": patches.amax(0)}
    if len(classes):
        expected |= {"class": classes.mean(0), "class+mean": torch.cat([classes.mean(0), patches.mean(0)])}
    for pooling, values in expected.items():
        torch.testing.assert_close(model.embed(clip, model.rate_hz, pooling=pooling).clip[0], values, rtol=0, atol=1e-5)
    grid = patches.unflatten(0, model.encoder.grid_for(spectrogram))
    for rows, frames in (("mean", grid.mean(0)), ("concat", grid.transpose(0, 1).flatten(1))):
        found = model.embed(clip, model.rate_hz, rows=rows)
        torch.testing.assert_close(found.frames[0], frames, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.clip[0], frames.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [*METHODS, OVERLAPPING])
def test_every_moment_of_a_long_clip_comes_from_the_window_nearest_to_it(model):
    """Windows are laid out anew here, over the whole clip; the last begins earlier, where a column does."""
    model = encoder_of(model)
    length, column = len(window_of(model)), model.encoder.stride[1] * model.frontend.hop_samples
    columns = model.encoder.grid_for(model.frontend(window_of(model)[None]))[1]
    clip = torch.from_numpy(noise((3 * length - 7) / model.rate_hz, model.rate_hz))
    hop = round(columns / 2)
    last = -(-(len(clip) - length) // column)
    starts = [*range(0, last, hop), last]
    pieces = [clip[start * column :][:length] for start in starts]
    num_samples = torch.tensor([len(piece) for piece in pieces])
    num_frames = (1 + num_samples // model.frontend.hop_samples).clamp(max=model.frontend.frames)
    with torch.no_grad():
        spectrogram = model.frontend(torch.stack([pad(some, (0, length - len(some))) for some in pieces]), num_samples)
        tokens = model.tokens(spectrogram, num_frames)[:, model.encoder.num_class_tokens :]
    frames = tokens.unflatten(1, (-1, columns)).mean(1)
    found = model.embed(clip, model.rate_hz).frames[0]
    assert last + columns - 1 <= len(found) <= last + columns
    for number, features in enumerate(found):
        near = min(reversed(range(len(starts))), key=lambda w: abs(starts[w] + columns / 2 - number - 0.5))
        torch.testing.assert_close(features, frames[near, number - starts[near]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", [*METHODS, OVERLAPPING])
def test_a_batch_is_its_clips_one_by_one_and_what_lies_behind_them_never_counts(model):
    model = encoder_of(model)
    lengths = [30000, 1, 200000, 9000]
    batch = torch.full((4, 200000), torch.nan)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.from_numpy(noise(length / 44100, 44100, row))[:length]
    together = model.embed(batch, 44100, num_samples=lengths, batch_size=3)
    for row, length in enumerate(lengths):
        alone = model.embed(batch[row, :length], 44100, batch_size=7)
        count = int(together.num_frames[row])
        torch.testing.assert_close(together.clip[row], alone.clip[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.frames[row, :count], alone.frames[0], rtol=0, atol=1e-5)
        assert not together.frames[row, count:].any()


@pytest.mark.parametrize("model", ["atst_clip", "atst_frame"])
def test_nothing_attends_to_the_padding_of_a_short_clip_where_the_model_masks_it(model):
    model = encoder_of(model)
    clip = window_of(model)[: len(window_of(model)) // 3]
    spectrogram = model.frontend(pad(clip, (0, 2 * len(clip) + 9))[None], torch.tensor([len(clip)]))
    num_frames = torch.tensor([1 + (len(clip) - 1) // model.frontend.hop_samples])
    valid = valid_tokens(model.encoder, num_frames, model.encoder.grid_for(spectrogram))
    with torch.no_grad():
        tokens = model.encoder(spectrogram, valid=valid)[:, model.encoder.num_class_tokens :]
    found = model.embed(clip, model.rate_hz)
    torch.testing.assert_close(found.frames[0], tokens[valid], rtol=0, atol=1e-5)
    assert (model.encoder(spectrogram)[:, model.encoder.num_class_tokens :][valid] - found.frames[0]).abs().max() > 1e-3


def test_a_front_end_without_a_length_of_its_own_pads_no_short_clip():
    model = copy.deepcopy(encoder_of("audiomae"))
    model.frontend.frames = None
    short, full = (torch.from_numpy(noise(seconds, 16000)) for seconds in (1.1, 9))
    with torch.no_grad():
        tokens = model.tokens(model.frontend(short[None]))[0, 1:]
    found = model.embed(pad(torch.stack([full[:17600], short]), (0, 9)), 16000, num_samples=[17600, 17600])
    torch.testing.assert_close(found.clip[1], tokens.mean(0), rtol=0, atol=1e-5)
    expected = encoder_of("audiomae").embed(full, 16000).clip  # but for the last window, all are whole
    torch.testing.assert_close(model.embed(full, 16000).clip, expected, rtol=0, atol=0.02)
    assert model.embed(np.zeros(1), 16000).frames.isfinite().all()


@pytest.mark.parametrize("model", METHODS)
def test_layers_are_those_asked_for_each_with_the_final_norm(model):
    model = encoder_of(model)
    clip = window_of(model)
    with torch.no_grad():
        tokens = model.encoder.embed(model.frontend(clip[None]))
        both = [model.encoder.norm(layer) for layer in model.encoder.encode_layers(tokens, num_layers=2, normed=False)]
    first, last = (layer[0, model.encoder.num_class_tokens :].mean(0) for layer in both)
    for layers, expected in (
        ("last", [last]),
        (1, [last]),
        (2, [first, last]),
        ([1, 0], [last, first]),
        ([-2], [first]),
    ):
        found = model.embed(clip, model.rate_hz, layers=layers).clip[0]
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [*METHODS, OVERLAPPING])
def test_the_features_of_a_click_stand_out_at_its_time(model):
    model = encoder_of(model)
    quiet = 0.01 * np.random.default_rng(0).normal(size=9 * 48000).astype(np.float32)
    before = model.embed(quiet, 48000)
    for seconds in (0.3, 4.4, 8.6):
        clip = quiet.copy()
        clip[round(seconds * 48000) :][:960] += noise(0.02, 48000) * 5
        change = (model.embed(clip, 48000).frames - before.frames)[0].norm(dim=-1)
        time = float(before.timestamps_seconds[change.argmax()])
        assert time == pytest.approx(seconds + 0.01, abs=column_seconds(model) / 2 + 0.05)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(44100, 16000), (192000, 32000), (4000, 16000), (16000, 16000), (8000, 44100)]
)
def test_a_recording_resampled_in_blocks_is_the_recording_resampled(from_hz, to_hz):
    waveform = torch.from_numpy(noise(3.3, from_hz))
    whole = resample(waveform[None], from_hz, to_hz)[0]
    for sizes in ([len(waveform)], [1, 2, 5000, 17], [1000]):
        blocks = (
            list(waveform.split(sizes[0]))
            if len(sizes) == 1
            else list(waveform.split([*sizes, len(waveform) - sum(sizes)]))
        )
        torch.testing.assert_close(torch.cat(list(resample_blocks(blocks, from_hz, to_hz))), whole, rtol=0, atol=1e-6)


def test_rates_without_a_common_divisor_take_no_giant_filter():
    clip = np.sin(2 * np.pi * 440 * np.arange(22255) / 22255).astype(np.float32)
    found = torch.cat(list(resample_blocks(torch.from_numpy(clip).split(5000), 22255, 16001)))
    expected = np.sin(2 * np.pi * 440 * np.arange(16001) / 16001)
    assert abs(len(found) - 16001) <= 1
    np.testing.assert_allclose(found[500:15500], expected[500:15500], atol=1e-3)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(22254, 16000), (16000, 22254), (44101, 16000)])
def test_rates_that_soxr_resamples_give_as_many_samples_as_any_other_rate(from_hz, to_hz):
    for num_samples in (0, *range(1, 24), 100, 12345):
        blocks = torch.randn(num_samples, generator=torch.Generator().manual_seed(0)).split(7)
        found = torch.cat(list(resample_blocks(blocks, from_hz, to_hz)))
        assert len(found) == resampled_samples(num_samples, from_hz, to_hz) and found.isfinite().all(), num_samples


def test_whoever_holds_the_samples_the_features_are_the_same(tmp_path):
    model = encoder_of("audiomae")
    samples = (noise(3, 44100) * 32767).astype(np.int16)
    expected = model.embed(samples.astype(np.float32) / 32768, 44100)
    path = write(tmp_path / "a.wav", np.stack([samples, samples], 1), 44100, subtype="PCM_16")
    waveform, rate_hz = audiossl.read(path)
    for found in (
        model.embed(samples, 44100),
        model.embed(torch.from_numpy(samples)[None], 44100.0),
        model.embed(path),
        model.embed(str(path)),
        model.embed(waveform.double(), rate_hz),
    ):
        torch.testing.assert_close(found.frames, expected.frames, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.clip, expected.clip, rtol=0, atol=1e-6)
    assert model.embed(path, with_frames=False).frames is None


def test_real_clips_are_told_apart():
    model, demo = encoder_of("audiomae"), Index.load(ROOT / "demo" / "shards")
    clips = [audiossl.sound.audio.decode(demo.read(clip)) for clip in (0, 40, 80)]
    found = torch.cat([model.embed(waveform, rate_hz).clip for waveform, rate_hz in clips])
    assert torch.pdist(found).min() > 1e-3


def test_embedding_leaves_modes_random_states_and_gradients_alone():
    model = encoder_of("passt").train()
    model.encoder.blocks[0].eval()
    modes, states = [m.training for m in model.modules()], (random.getstate(), torch.get_rng_state().tolist())
    first, again = (model.embed(noise(4, 16000), 16000) for _ in range(2))
    assert [m.training for m in model.modules()] == modes
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    assert torch.equal(first.frames, again.frames) and not first.clip.requires_grad
    model.eval()


def test_no_more_of_a_recording_is_held_than_a_window_and_a_block():
    model = encoder_of("audiomae")
    layout = Layout.of(model.encoder, model.frontend, 0.5)
    blocks = (torch.zeros(16000) for _ in range(600))
    held = [piece.samples.untyped_storage().nbytes() / 4 for piece in cut(0, blocks, layout)]
    assert len(held) > 400 and max(held) <= layout.length + layout.hop + 16000


WRONG = [
    (np.zeros(0), 16000, {}, "clip 0: no samples"),
    (np.array([0.0, np.nan]), 16000, {}, "clip 0: NaN or Inf samples"),
    (np.array([[0.0, 0.1], [0.0, np.inf]]), 16000, {}, "clip 1: NaN or Inf samples"),
    (noise(1, 16000) * 1e30, 16000, {}, "clip 0: features are not finite"),
    (np.zeros(9), None, {}, "sample_rate=None: whole Hz between"),
    (np.zeros(9), 0, {}, "sample_rate=0: whole Hz between"),
    (np.zeros((2, 2, 9)), 16000, {}, r"shape \(2, 2, 9\): give \(S,\) or \(B, S\)"),
    (np.zeros(9, np.int32), 16000, {}, "a waveform of int32: give float"),
    (np.zeros(9), 16000, {"layers": 3}, r"layers=3: last, the number of last blocks \(1 to 2\)"),
    (np.zeros(9), 16000, {"layers": [2]}, r"layers=\[2\]: last"),
    (np.zeros(9), 16000, {"pooling": "sum"}, "pooling=sum"),
    (np.zeros(9), 16000, {"overlap": 1.0}, "overlap=1.0: windows share"),
    (np.zeros((2, 9)), 16000, {"num_samples": [9]}, "one for each of 2 clips"),
    (np.zeros(9), float("nan"), {}, "sample_rate=nan: whole Hz"),
    (np.zeros(9), 16000, {"layers": [0.5]}, r"layers=\[0.5\]: last"),
    (np.zeros(9), 16000, {"overlap": None}, "overlap=None: windows share"),
    (np.zeros(9), 16000, {"batch_size": 0}, "batch_size=0: how many"),
    (np.zeros(9), 16000, {"num_samples": ["all"]}, "one for each of 1 clips"),
    ("/nowhere.wav", None, {}, "/nowhere.wav: cannot be read: No such file"),
]


@pytest.mark.parametrize(("waveform", "rate_hz", "choices", "message"), WRONG)
def test_what_cannot_be_meant_is_one_clear_line(waveform, rate_hz, choices, message):
    with pytest.raises(UserError, match=message) as caught:
        encoder_of("audiomae").embed(waveform, rate_hz, **choices)
    assert "\n" not in str(caught.value)


def test_arrays_of_any_order_and_numpys_numbers_are_taken():
    model, clip = encoder_of("audiomae"), noise(1, 16000)
    expected = model.embed(clip, 16000, layers=[0, 1]).clip
    for same in (clip[::-1].copy()[::-1], clip.astype(">f4"), np.frombuffer(clip.tobytes(), np.float32)):
        assert torch.equal(model.embed(same, np.int64(16000), layers=np.arange(2)).clip, expected)


def test_class_tokens_of_an_encoder_without_any_are_refused():
    with pytest.raises(UserError, match="pooling=class: this encoder has no class token"):
        encoder_of("atst_frame").embed(np.zeros(9), 16000, pooling="class")


def test_a_model_in_half_precision_gives_about_the_same_in_float32():
    model = encoder_of("audiomae")
    found = copy.deepcopy(model).bfloat16().embed(noise(4, 16000), 16000).clip
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.embed(noise(4, 16000), 16000).clip, rtol=0, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("model", METHODS)
def test_a_gpu_gives_what_the_cpu_gives(model):
    model, clip = encoder_of(model), noise(30, 44100)
    expected = model.embed(clip, 44100)
    found = copy.deepcopy(model).cuda().embed(clip, 44100)
    torch.testing.assert_close(found.frames, expected.frames, rtol=0, atol=2e-2)
    assert found.frames.device.type == "cpu"


@pytest.mark.parametrize("model", METHODS)
def test_silence_and_no_clips_at_all_are_described_too(model):
    model = encoder_of(model)
    assert model.embed(np.zeros(50000), 16000).frames.isfinite().all()
    for rows in ("mean", "concat"):
        none = model.embed(np.zeros((0, 50000)), 16000, rows=rows)
        some = model.embed(np.zeros(900), 16000, rows=rows)
        assert none.clip.shape == (0, some.clip.shape[1]) and none.frames.shape == (0, 0, some.frames.shape[2])
