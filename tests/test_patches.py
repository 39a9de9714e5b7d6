"""Do patches tile the spectrogram, and do positions say where they lie?"""

import pytest
import torch
from conftest import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from maes import audiomae, published
from safetensors.torch import load_file

from audiossl.errors import UserError
from audiossl.importing.lengths import cut_positions
from audiossl.parts.positions import SinCosPositions, sincos_table
from audiossl.patches import (
    PatchEmbed,
    grid_of,
    normalise_patches,
    patchify,
    spread_from_visible,
    unpatchify,
)
from audiossl.weights.timm import resize_image_positions, rgb_to_mono

POSITIONS = golden_cases("posembed_mae")


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
    overlap=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_patches_laid_out_again_give_the_spectrogram(rows, columns, patch, seed, overlap):
    stride = tuple(max(1, side // 2) for side in patch) if overlap else patch
    size = ((rows - 1) * stride[0] + patch[0], (columns - 1) * stride[1] + patch[1])
    spectrogram = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(seed))
    grid = grid_of(*size, patch, stride)
    patches = patchify(spectrogram, patch, stride)
    assert grid == (rows, columns) and patches.shape == (2, rows * columns, patch[0] * patch[1])
    torch.testing.assert_close(unpatchify(patches, grid, patch, stride), spectrogram)


def test_frequency_comes_before_time_among_patches_and_within_one():
    band, frame = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    patches = patchify((1000 * band + frame)[None, None], (16, 16), (16, 16))
    row, column, f, t = 1, 2, 5, 7
    assert patches[0, row * 3 + column, f * 16 + t] == 1000 * (row * 16 + f) + column * 16 + t


def test_embedding_is_one_linear_map_of_every_patch():
    embed = PatchEmbed(patch=(16, 16), stride=(10, 10), width=8)
    spectrogram = torch.randn(2, 1, 36, 56)
    by_hand = patchify(spectrogram, (16, 16), (10, 10)) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(embed(spectrogram), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_mels", "frames", "patch", "stride", "grid"),
    [
        (128, 1024, 16, 16, (8, 64)),
        (128, 512, 16, 16, (8, 32)),
        (128, 128, 16, 16, (8, 8)),
        (128, 1024, 16, 10, (12, 101)),
        (128, 998, 16, 10, (12, 99)),
        (128, 998, 16, 12, (10, 82)),
        (128, 16, 16, 16, (8, 1)),
        (64, 96, 8, 8, (8, 12)),
    ],
)
def test_grids_are_the_published_ones(num_mels, frames, patch, stride, grid):
    assert grid_of(num_mels, frames, (patch, patch), (stride, stride)) == grid


@pytest.mark.parametrize(
    ("num_mels", "frames", "stride", "said"),
    [
        (100, 1024, 16, "frontend.num_mels gives 100 mel bands, .* 96 and 112"),
        (128, 15, 10, "frontend.seconds gives 15 frames, shorter than one patch: model.patch=16"),
        (128, 1024, 0, "model.stride=0"),
        (128, 1024, 20, "model.stride=20"),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest_that_do(num_mels, frames, stride, said):
    with pytest.raises(UserError, match=said):
        grid_of(num_mels, frames, (16, 16), (stride, stride))


@pytest.mark.parametrize(
    "num_mels, frames, patch, stride, grid",
    [
        (64, 1001, (64, 4), (64, 4), (1, 250)),  # ATST: 10 s
        (64, 601, (64, 4), (64, 4), (1, 150)),
        (128, 998, (16, 16), (16, 16), (8, 62)),  # PaSST, no overlap
        (128, 998, (16, 16), (10, 10), (12, 99)),
        (128, 1000, (16, 16), (12, 12), (10, 83)),
        (128, 998, (16, 16), (14, 14), (9, 71)),
    ],
)
def test_frames_behind_the_last_column_are_left_out_as_published(num_mels, frames, patch, stride, grid):
    assert grid_of(num_mels, frames, patch, stride) == grid
    embedded = PatchEmbed(patch=patch, stride=stride, width=4)(torch.randn(1, 1, num_mels, frames))
    assert embedded.shape[1] == grid[0] * grid[1]


def test_a_method_that_predicts_every_frame_refuses_a_remainder():
    with pytest.raises(UserError, match="frontend.seconds gives 1000 frames, which model.patch=16 .* 992 and 1008"):
        audiomae(1000)


def test_normalised_patches_have_mean_0_and_unbiased_variance_1():
    patches = normalise_patches(3 + 5 * torch.randn(2, 7, 256))
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 7), atol=1e-6, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 7), atol=1e-5, rtol=0)
    assert torch.equal(normalise_patches(torch.full((1, 1, 4), 2.0)), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("case", POSITIONS)
def test_position_tables_equal_the_published_ones(case):
    tables = {k: v for k, v in load_file(case / "expected.safetensors").items() if k.startswith("sincos.")}
    assert tables
    for name, expected in tables.items():
        grid = tuple(map(int, name.removeprefix("sincos.").split("x")))
        scrambled = sincos_table(grid, 48, positions="published", overlapping=False)
        torch.testing.assert_close(
            published(scrambled.flatten(0, 1)[None], grid)[0].double(), expected[1:], rtol=0, atol=6e-8
        )
        # as the published code does where it numbers axes right: overlapping patches, (time, frequency)
        for positions, overlapping in (("corrected", False), ("published", True), ("corrected", True)):
            right = sincos_table(grid[::-1], 48, positions=positions, overlapping=overlapping)
            theirs = published(right.flatten(0, 1)[None], grid[::-1])[0].double()
            torch.testing.assert_close(theirs, expected[1:], rtol=0, atol=6e-8)


@pytest.mark.parametrize("case", POSITIONS)
def test_tables_are_cut_and_stretched_as_published(case):
    expected = load_file(case / "expected.safetensors")
    cut = cut_positions(expected["src_audio"], 8, 64, 32)
    assert torch.equal(cut, expected["audio_cut_to_32"])
    stretched = [name for name in expected if name.startswith("img2audio_bicubic.")]
    for name in stretched:
        grid = tuple(map(int, name.split(".")[1].split("x")))
        torch.testing.assert_close(resize_image_positions(expected["src_square14"], grid), expected[name])
    torch.testing.assert_close(rgb_to_mono(expected["src_rgb_patch"]), expected["patch_rgb_to_mono"])
    assert stretched


def test_a_corrected_code_tells_frequency_and_time_apart():
    table = sincos_table((8, 64), 32, positions="corrected", overlapping=False)
    assert torch.equal(table[:, :1, :16].expand(-1, 64, -1), table[:, :, :16])
    assert torch.equal(table[:1, :, 16:].expand(8, -1, -1), table[:, :, 16:])


@pytest.mark.parametrize("positions", ["published", "corrected"])
def test_every_cell_has_a_code_of_its_own(positions):
    table = sincos_table((8, 64), 32, positions=positions, overlapping=False).flatten(0, 1)
    nearest = torch.cdist(table, table).fill_diagonal_(1.0).min()
    assert nearest > 0.01


def test_shorter_clips_use_the_first_columns():
    positions = SinCosPositions(grid=(4, 6), width=8, positions="corrected", overlapping=False)
    added = positions(torch.zeros(2, 4 * 3, 8)).unflatten(1, (4, 3))
    assert torch.equal(added, positions.table[:, :3].expand(2, -1, -1, -1))


def test_positions_travel_with_the_weights():
    positions = SinCosPositions(grid=(2, 3), width=8, positions="corrected", overlapping=False)
    assert list(positions.state_dict()) == ["table"] and not list(positions.parameters())


def test_visible_patches_keep_their_own_level_and_hidden_ones_get_their_neighbours():
    visible = torch.stack([torch.full((256,), 1.0), torch.full((256,), 9.0)])[None] + torch.randn(1, 2, 256) * 0.01
    mean, std = spread_from_visible(visible, torch.tensor([[0, 9]]), (1, 10))
    assert mean[0, 0] == pytest.approx(1.0, abs=0.01) and mean[0, 9] == pytest.approx(9.0, abs=0.01)
    assert mean[0, 1] < 2 and mean[0, 8] > 8 and mean[0].diff(dim=0).min() > -1e-3
    assert std.max() < 0.02
