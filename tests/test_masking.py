"""Is what stays of a clip what the masking's name says?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiossl.errors import UserError
from audiossl.masking import (
    Masking,
    hidden,
    keep_columns_and_rows,
    keep_random,
    keep_to_mask,
    mask_to_keep,
    num_kept,
    take,
)
from audiossl.noise import Noise

GRID = (8, 64)
NAMES = ["random", "time", "frequency", "time+frequency"]


def draw(name, ratio=0.8, clips=5, grid=GRID, ratio_time=None, ratio_frequency=None, step=0):
    masking = Masking(name, ratio, ratio_time, ratio_frequency)
    keep = masking.keep(Noise.for_batch(0, step, clips), grid)
    assert keep.shape == (clips, masking.num_kept(grid))
    return keep, keep_to_mask(keep, grid[0] * grid[1]).unflatten(1, grid)


@pytest.mark.parametrize(
    ("count", "ratio", "kept"), [(512, 0.8, 102), (64, 0.7, 19), (8, 0.3, 5), (256, 0.75, 64), (64, 0.8, 12)]
)
def test_counts_are_cut_off_as_published(count, ratio, kept):
    assert num_kept(count, ratio) == kept


@given(clips=st.integers(0, 4), count=st.integers(1, 40), ratio=st.floats(0, 0.99), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_keep_and_mask_are_two_faces_of_one_decision(clips, count, ratio, seed):
    noise = torch.rand(clips, count, generator=torch.Generator().manual_seed(seed))
    keep = keep_random(noise, ratio)
    mask = keep_to_mask(keep, count)
    gaps = hidden(keep, count)
    assert keep.dtype == torch.int64 and keep.shape == (clips, num_kept(count, ratio))
    assert torch.equal(keep, keep.sort(1).values)
    assert torch.equal(mask_to_keep(mask), keep) or not clips
    assert torch.equal(torch.cat([keep, gaps], 1).sort(1).values, torch.arange(count).expand(clips, -1))
    assert torch.equal(mask_to_keep(~mask), gaps) or not clips


def test_the_smallest_numbers_stay():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.0, 0.2, 0.1, 0.8]])
    assert keep_random(noise, 0.5).tolist() == [[1, 3], [0, 2]]


def test_time_masking_hides_whole_columns():
    _, mask = draw("time")
    assert torch.equal(mask.all(1), mask.any(1)) and (mask.any(1).sum(1) == 52).all()


def test_frequency_masking_hides_whole_rows():
    _, mask = draw("frequency", 0.5)
    assert torch.equal(mask.all(2), mask.any(2)) and (mask.any(2).sum(1) == 4).all()


def test_time_and_frequency_masking_keeps_a_grid_of_crossings():
    _, mask = draw("time+frequency", ratio_time=0.7, ratio_frequency=0.3)
    shown = ~mask
    assert torch.equal(shown, shown.any(2, keepdim=True) & shown.any(1, keepdim=True))
    assert (shown.any(2).sum(1) == 5).all() and (shown.any(1).sum(1) == 19).all()


def test_one_ratio_is_split_evenly_between_the_axes():
    masking = Masking("time+frequency", 0.75, None, None)
    assert masking.ratio_time == masking.ratio_frequency == 0.5
    assert masking.num_kept((8, 64)) == 4 * 32


def test_crossings_use_each_axis_own_noise():
    keep = keep_columns_and_rows(torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([[0.3, 0.1]]), (2, 3), 1 / 3, 0.5)
    assert keep.tolist() == [[4, 5]]


@pytest.mark.parametrize("name", NAMES)
def test_masks_differ_between_clips_and_steps_and_return_with_their_seed(name):
    keep, mask = draw(name, 0.6, grid=(16, 64))
    assert not all(torch.equal(mask[0], other) for other in mask[1:])
    assert not torch.equal(keep, draw(name, 0.6, grid=(16, 64), step=1)[0])
    assert torch.equal(keep, draw(name, 0.6, grid=(16, 64))[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_keeps_its_mask_in_any_split_of_the_batch(name):
    masking = Masking(name, 0.6, None, None)
    rows = torch.tensor([3, 1])
    assert torch.equal(draw(name, 0.6)[0][rows], masking.keep(Noise(0, 0, rows, 5), GRID))


@pytest.mark.parametrize("name", NAMES)
def test_no_clips_give_no_masks(name):
    none = torch.zeros(0, dtype=torch.int64)
    assert len(Masking(name, 0.6, None, None).keep(Noise(0, 0, none, 4), GRID)) == 0


def test_every_patch_is_hidden_about_equally_often():
    _, mask = draw("random", clips=2000)
    share = mask.float().mean(0)
    assert share.mean() == pytest.approx(410 / 512) and share.std() < 0.012 and share.min() > 0.7


def test_taking_follows_the_index():
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(take(tokens, torch.tensor([[0, 2], [1, 3]]))[1], tokens[1, [1, 3]])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("random", 1.2, None, None), r"model.mask_ratio=1.2: .*\[0, 1\)"),
        (("random", -0.1, None, None), "model.mask_ratio=-0.1"),
        (("random", 1.0, None, None), "model.mask_ratio=1.0"),
        (("random", float("nan"), None, None), "model.mask_ratio=nan"),
        (("time+frequency", 0.8, 1.0, None), "model.mask_ratio_time=1.0"),
        (("time", 0.8, 0.7, 0.3), "takes one model.mask_ratio"),
        (("block", 0.8, None, None), "choose random, time, frequency or time.frequency"),
    ],
)
def test_a_wrong_setting_is_named(arguments, said):
    with pytest.raises(UserError, match=said):
        Masking(*arguments)


def test_a_ratio_that_keeps_nothing_is_refused():
    with pytest.raises(UserError, match="model.mask_ratio=0.9 .* keeps none of 8 x 64"):
        Masking("frequency", 0.9, None, None).keep(Noise.for_batch(0, 0, 2), GRID)


def test_what_is_hidden_is_listed_in_order_without_asking_how_much_it_is():
    keep = torch.stack([torch.randperm(40)[:9].sort().values for _ in range(3)])
    for row, gaps in zip(keep, hidden(keep, 40), strict=True):
        assert gaps.tolist() == [cell for cell in range(40) if cell not in row.tolist()]
    assert hidden(torch.arange(5).expand(2, -1), 5).shape == (2, 0)
