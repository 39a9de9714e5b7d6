"""Are crops, mixtures and stretched crops those of the published code, and do resumed banks mix as before?"""

import json

import pytest
import torch
from conftest import golden_cases
from frontends import front_end
from maes import real_clips
from safetensors.torch import load_file
from torch.nn import functional

from audiossl.noise import Noise
from audiossl.parts.views import FREQUENCY_WARP, MixupBank, RandomResizedCrop, crop, crop_starts, log_mixup
from audiossl.spectrogram import to_float


def load_case(folder):
    parts = [load_file(folder / f"{part}.safetensors") for part in ("input", "expected")]
    return json.loads((folder / "case.json").read_text()), *parts


def numbered(names, prefix: str) -> list[str]:
    return sorted((name for name in names if name.startswith(prefix)), key=lambda name: int(name.split(".")[-1]))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", golden_cases("aug_atst*"))
def test_log_mixup_equals_the_published_one_at_equal_and_unequal_lengths(folder):
    case, inputs, expected = load_case(folder)
    names = numbered(expected, "log_mixup.")
    assert names
    for name in names:
        drawn = case["params"][name]
        background = inputs["z" + name.split(".")[-1]]
        start = None if drawn["start"] is None else torch.tensor([drawn["start"]])
        share = torch.tensor([drawn["alpha_foreground"]])
        assert_close(log_mixup(inputs["x"][None], background[None], share, start)[0], expected[name])


@pytest.mark.parametrize("folder", golden_cases("aug_atst*"))
def test_resized_crops_equal_the_published_ones_all_in_one_batch(folder):
    case, inputs, expected = load_case(folder)
    for kind in [name for name in case["params"] if name.startswith("rrc.")]:
        drawn = case["params"][kind]
        scales = {"canvas_scale": drawn.get("virtual_crop_scale"), "time_scale": drawn.get("time_scale")}
        scales["frequency_scale"] = drawn.get("freq_scale")
        resized = RandomResizedCrop(**{name: tuple(scale) for name, scale in scales.items() if scale})
        assert list(resized.canvas(tuple(inputs["x"].shape[1:]))) == drawn["virtual_crop_size"]
        names = numbered(expected, kind + ".")
        assert len(names) == len(drawn["params_i_j_h_w"])
        clips = inputs["x"].expand(len(names), 1, -1, -1)
        got = resized.apply(clips, torch.tensor(drawn["params_i_j_h_w"]))
        assert_close(got, torch.stack([expected[name] for name in names]))


@pytest.mark.parametrize("folder", golden_cases("aug_atst*"))
def test_centre_crops_equal_the_published_ones(folder):
    _, _, expected = load_case(folder)
    names = [name for name in expected if name.startswith("center_crop_")]
    (ramp,) = [expected.pop(name) for name in names if name.endswith("_nopad")]  # whole, since it is the shorter
    for name in expected.keys() & names:
        length = expected[name].shape[1]
        start = torch.tensor([max(0, (ramp.shape[1] - length) // 2)])
        assert torch.equal(crop(ramp, start, length), expected[name])


@pytest.mark.parametrize("folder", golden_cases("aug_atst*"))
def test_the_front_ends_range_is_the_published_one(folder):
    _, inputs, expected = load_case(folder)
    frontend = front_end("atst_mel")
    assert_close((inputs["db"] - frontend.centre) / frontend.scale, expected["minmax"])


@pytest.mark.parametrize("folder", golden_cases("views_atst*"))
def test_whole_views_equal_the_published_ones_from_waveform_to_spectrogram(folder):
    case, inputs, expected = load_case(folder)
    wave = to_float(inputs["wav_i16"])[None]
    frontend = front_end("atst_mel", seconds=None)
    for kind, views in (("clip", RandomResizedCrop()), ("frame", FREQUENCY_WARP)):
        drawn = case["params"][kind]
        length = (drawn["lengths"][0] - 1) * frontend.hop_samples
        starts = torch.tensor(drawn["crop_starts"])
        spectrograms = frontend(crop(wave.expand(len(starts), -1), starts, length))
        assert spectrograms.shape[-1] == drawn["lengths"][0]
        got = views.apply(spectrograms, torch.tensor(drawn["rrc_i_j_h_w"]))
        if kind == "frame":
            got = torch.cat([spectrograms, got])
        for number, view in enumerate(got):
            torch.testing.assert_close(view, expected[f"{kind}.view{number}"], rtol=0, atol=1.5e-4)  # 10 x the mel's


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("resized", [RandomResizedCrop(), FREQUENCY_WARP, RandomResizedCrop((1.25, 1.0))])
@pytest.mark.parametrize("size", [(64, 101), (7, 33), (1, 5)])
def test_a_batch_of_different_boxes_equals_interpolating_each_alone(resized, size):
    clips = noise(40, 1, *size)
    boxes = resized.boxes(Noise.for_batch(1, 0, 40).uniform(4), size)
    rows, columns = resized.canvas(size)
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    canvas = functional.pad(clips, (left, columns - size[1] - left, top, rows - size[0] - top))
    cut = [one[None, :, i : i + h, j : j + w] for one, (i, j, h, w) in zip(canvas, boxes.tolist(), strict=True)]
    alone = [functional.interpolate(one, size, mode="bicubic", align_corners=True) for one in cut]
    assert len({tuple(box) for box in boxes.tolist()}) > 5 or size[0] == 1
    torch.testing.assert_close(resized.apply(clips, boxes), torch.cat(alone), rtol=0, atol=1e-5)


def test_boxes_follow_the_published_rule():
    resized, size = RandomResizedCrop(), (64, 121)
    first_row, first_column, rows, columns = resized.boxes(Noise.for_batch(0, 0, 20000).uniform(4), size).T
    assert resized.canvas(size) == (64, 181)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (38, 64, 72, 181)
    assert (first_row + rows).max() == 64 and (first_column + columns).max() == 181
    assert (rows == 64).float().mean() == pytest.approx(0.5 / 0.9, abs=0.015)
    assert (first_column[columns == 180].float().mean()) == pytest.approx(0.5, abs=0.15)  # 0 and 1, both possible
    room = 181 - columns
    assert ((first_column + 0.5) / (room + 1)).mean() == pytest.approx(0.5, abs=0.01)


def test_frequency_warping_zooms_in_and_leaves_time_and_half_of_the_clips_alone():
    clips = front_end("atst_mel", seconds=1.0)(real_clips(12, 1)).repeat(20, 1, 1, 1)
    warped = FREQUENCY_WARP(clips, Noise.for_batch(0, 0, len(clips)))
    same = (warped == clips).all((1, 2, 3))
    assert same.float().mean() == pytest.approx(0.5 / 0.9, abs=0.1)
    order = torch.randperm(clips.shape[-1], generator=torch.Generator().manual_seed(0))
    moved = FREQUENCY_WARP(clips[..., order], Noise.for_batch(0, 0, len(clips)))
    torch.testing.assert_close(moved, warped[..., order])


def test_a_clip_keeps_its_view_in_any_split_of_the_batch():
    clips, rows = noise(6, 1, 16, 40), torch.tensor([4, 1])
    whole = RandomResizedCrop()(clips, Noise.for_batch(3, 7, 6))
    assert torch.equal(RandomResizedCrop()(clips[rows], Noise(3, 7, rows, 6)), whole[rows])


def test_crops_start_anywhere_evenly_and_end_within_the_clip():
    draws = Noise.for_batch(0, 0, 30000).uniform()
    starts = crop_starts(draws, torch.full((30000,), 12), 10)
    assert starts.bincount().tolist() == pytest.approx([10000] * 3, rel=0.05)
    assert crop_starts(torch.full((2,), 1 - 2**-24), torch.tensor([12, 4]), 10).tolist() == [2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_a_crop_holds_the_clips_own_samples_then_zeros(dtype):
    wave = torch.arange(1, 31).reshape(3, 10).to(dtype)
    got = crop(wave, torch.tensor([6, 0, 2]), 4, torch.tensor([10, 3, 5]))
    assert got.tolist() == [[7, 8, 9, 10], [11, 12, 13, 0], [23, 24, 25, 0]] and got.dtype == dtype
    assert crop(wave, torch.tensor([0, 0, 0]), 12)[1].tolist() == [*range(11, 21), 0, 0]


def test_a_mixture_starts_at_its_own_place_in_each_clip():
    clips, long, short = noise(3, 1, 4, 20), noise(3, 1, 4, 26, seed=1), noise(3, 1, 4, 9, seed=2)
    share, start = torch.tensor([0.9, 0.6, 0.75]), torch.tensor([0, 5, 3])
    for others in (long, short):
        got = log_mixup(clips, others, share, start)
        for number in range(3):
            one = slice(number, number + 1)
            assert torch.equal(log_mixup(clips[one], others[one], share[one], start[one]), got[one])
    assert_close(log_mixup(clips, short, share, start)[1, :, :, 14:], clips[1, :, :, 14:])


def filled(bank: MixupBank, steps: range) -> MixupBank:
    for step in steps:
        bank.push(noise(3, 1, 4, 5, seed=step), [f"{step}-{row}" for row in range(3)])
    return bank


def test_the_bank_forgets_the_oldest_and_mixes_with_what_it_says():
    bank = filled(MixupBank(size=7), range(4))
    assert bank.keys() == ["1-2", "2-0", "2-1", "2-2", "3-0", "3-1", "3-2"] and len(bank) == 7
    clips = noise(7, 1, 4, 5, seed=99)
    known = torch.cat([noise(3, 1, 4, 5, seed=step) for step in range(4)])[-7:]
    alpha = torch.linspace(0, 0.99, 7)
    got = bank.mix(clips, alpha, torch.arange(7) / 7 + 0.01)
    assert_close(got, log_mixup(clips, known, 1 - 0.4 * alpha))
    assert not torch.allclose(got[3], clips[3], atol=1e-3)


def test_the_first_batch_passes_unmixed_and_a_batch_is_not_mixed_with_itself():
    bank, clips = MixupBank(size=8), noise(3, 1, 4, 5)
    assert torch.equal(bank.mix(clips, torch.ones(3), torch.rand(3)), clips)
    bank.push(clips, ["a", "b", "c"])
    clips.zero_()
    mixed = bank.mix(noise(3, 1, 4, 5, seed=1), torch.full((3,), 0.5), torch.full((3,), 0.5))
    assert_close(mixed, log_mixup(noise(3, 1, 4, 5, seed=1), noise(3, 1, 4, 5)[[1, 1, 1]], torch.full((3,), 0.8)))


def test_a_bank_rebuilt_from_its_last_clips_mixes_bit_for_bit_as_before():
    old = filled(MixupBank(size=7), range(9))
    new = filled(MixupBank(size=7), range(6, 9))  # another place in the ring
    assert new.keys() == old.keys()
    clips, draws = noise(5, 1, 4, 5, seed=50), torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(new.mix(clips, *draws), old.mix(clips, *draws))
    old.clear()
    assert old.keys() == [] and torch.equal(old.mix(clips, *draws), clips)


def test_a_batch_larger_than_the_bank_leaves_its_last_clips():
    bank = MixupBank(size=2)
    bank.push(noise(5, 1, 4, 5), list("abcde"))
    assert bank.keys() == ["d", "e"]
    got = bank.mix(noise(2, 1, 4, 5, seed=1), torch.full((2,), 0.5), torch.tensor([0.0, 0.99]))
    assert_close(got, log_mixup(noise(2, 1, 4, 5, seed=1), noise(5, 1, 4, 5)[3:], torch.full((2,), 0.8)))


def test_the_bank_is_no_part_of_the_state_nor_of_what_ranks_share():
    bank = filled(MixupBank(size=4), range(2))
    assert not bank.state_dict() and not list(bank.buffers()) and not list(bank.parameters())
