"""Does the encoder do the same whatever a method keeps, cuts or exports?"""

import pytest
import torch
import yaml
from conftest import ROOT

from audiossl.encoder import Encoder
from audiossl.errors import UserError

SMALL = dict(num_mels=64, frames=96, patch=(16, 16), stride=(16, 16), width=24, depth=3, num_heads=2)


def encoder(**changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**(SMALL | dict(mlp_ratio=4.0, positions="corrected", drop_path=0.0) | changes)).eval()


@pytest.fixture
def clips():
    return torch.randn(2, 1, 64, 96, generator=torch.Generator().manual_seed(0))


def test_tokens_come_with_the_class_token_first(clips):
    model = encoder()
    assert model.grid == (4, 6) and model.width == 24
    assert model.embed(clips).shape == (2, 24, 24) and model(clips).shape == (2, 25, 24)
    torch.testing.assert_close(model.encode(model.embed(clips)), model(clips))


def test_keeping_everything_changes_nothing(clips):
    model = encoder()
    torch.testing.assert_close(model(clips, torch.arange(24).expand(2, -1)), model(clips))


def test_dropped_patches_leave_no_trace(clips):
    model, keep = encoder(), torch.tensor([[0, 5, 7], [1, 2, 20]])
    other = clips.clone()
    other[0, 0, :16, 16:32] = 99.0  # patch 1 of the first clip, which it drops
    assert torch.equal(model(clips, keep), model(other, keep))
    assert not torch.equal(model(clips), model(other))


def test_kept_patches_know_where_they_come_from(clips):
    model = encoder()
    same = torch.ones_like(clips)
    first, second = model(same, torch.tensor([[0], [1]]))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_shorter_clip_is_the_same_as_keeping_its_columns(clips):
    model = encoder()
    keep = torch.arange(24).reshape(4, 6)[:, :4].flatten().expand(2, -1)
    torch.testing.assert_close(model(clips[..., :64]), model(clips, keep))


def test_the_last_layer_is_the_output_and_layers_come_in_order(clips):
    model = encoder()
    layers = model.encode_layers(model.embed(clips), num_layers=3)
    torch.testing.assert_close(layers[-1], model(clips))
    torch.testing.assert_close(model.encode_layers(model.embed(clips), num_layers=1)[0], layers[-1])
    assert len(layers) == 3 and not torch.allclose(layers[0], layers[1])


def test_geometry_rebuilds_an_equal_encoder(clips):
    model = encoder(stride=(10, 8), positions="published")
    geometry = yaml.safe_load(yaml.safe_dump(model.geometry))  # plain enough for any file
    again = Encoder(**geometry).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(clips), model(clips))


def test_the_start_is_the_published_one():
    model = encoder(width=192, num_heads=3)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name
    kernel = model.patch_embed.proj.weight.detach()
    assert 0.95 * (6 / (256 + 192)) ** 0.5 < kernel.abs().max() <= (6 / (256 + 192)) ** 0.5
    assert float(model.class_token.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6


def test_drop_path_grows_with_depth_and_acts_in_training_only(clips):
    model = encoder(drop_path=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    assert torch.equal(model(clips), model(clips))
    model.train()
    assert not torch.equal(model(clips), model(clips))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 1, 64, 112), "112 frames for a model of at most 96"),
        ((1, 1, 64, 12), "shorter than one patch"),
        ((1, 1, 128, 96), "128 mel bands for a model of 64"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_by_its_numbers(shape, said):
    with pytest.raises(UserError, match=said):
        encoder()(torch.zeros(shape))


@pytest.mark.parametrize("size", sorted((ROOT / "conf/size").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_size_encodes_ten_seconds(size):
    told = yaml.safe_load(size.read_text())
    sizes = {name: told[name] for name in ("width", "depth", "num_heads")}
    with torch.device("meta"):
        model = encoder(num_mels=128, frames=1024, **sizes)
        tokens = model(torch.zeros(1, 1, 128, 1024), torch.zeros(1, 102, dtype=torch.int64))
    assert tokens.shape == (1, 103, told["width"])


@pytest.mark.parametrize("stride", [16, 10])
@pytest.mark.parametrize("frames", [16, 128, 512, 1024])
def test_any_length_that_fits_is_encoded(frames, stride):
    model = encoder(num_mels=128, frames=1024, stride=(stride, stride), depth=1)
    rows, columns = model.grid_for(torch.zeros(1, 1, 128, frames))
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 128, frames)).shape == (1, 1 + rows * columns, 24)


ATST_FRAME = dict(patch=(64, 4), stride=(64, 4), positions="learned", num_class_tokens=0, qkv_bias=False)
KINDS = {
    "audiomae": dict(),
    "atst_clip": ATST_FRAME | dict(num_class_tokens=1),
    "atst_frame": ATST_FRAME,
    "passt": dict(stride=(10, 10), positions="time+frequency", num_class_tokens=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_of_what_is_audio(kind, clips):
    model = encoder(**KINDS[kind])
    valid = torch.ones(2, model.grid[0] * model.grid[1], dtype=torch.bool)
    valid[0].view(model.grid)[:, 3:] = False
    tokens = model.embed(clips)
    other = torch.where(valid[:, :, None], tokens, 9.0)
    audio = torch.nn.functional.pad(valid, (model.num_class_tokens, 0), value=True)
    torch.testing.assert_close(model.encode(other, valid=valid)[audio], model.encode(tokens, valid=valid)[audio])
    assert not torch.allclose(model.encode(tokens, valid=valid)[0], model.encode(tokens)[0], atol=1e-4)
    keep = torch.arange(0, valid.shape[1], 2).expand(2, -1)
    seen = audio[:, : model.num_class_tokens + keep.shape[1]].clone()
    seen[:, model.num_class_tokens :] = valid[:, ::2]
    shown = [model.encode(t, keep, valid=valid)[seen] for t in (tokens, other)]
    torch.testing.assert_close(*shown)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_rebuilt_from_its_geometry_and_gives_its_layers(kind, clips):
    model = encoder(**KINDS[kind])
    again = Encoder(**yaml.safe_load(yaml.safe_dump(model.geometry))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(clips), model(clips))
    assert model(clips).shape[1] == model.num_class_tokens + model.grid[0] * model.grid[1]
    layers = model.encode_layers(model.embed(clips), num_layers=3)
    assert len(layers) == 3 and torch.equal(layers[-1], model(clips))


@pytest.mark.parametrize("kind", ["atst_clip", "atst_frame", "passt"])
def test_a_shorter_clip_takes_the_columns_it_is_told_to(kind, clips):
    model = encoder(**KINDS[kind])
    short = model.embed(clips[..., :48])
    moved = [model.encode(short, first_column=column) for column in (0, 1)]
    assert not torch.allclose(*moved, atol=1e-5)
    with torch.no_grad():
        for table in (getattr(model.positions, "table", None), getattr(model.positions, "time", None)):
            if table is not None:
                table.copy_(table.roll(-1, dims=1))
    torch.testing.assert_close(model.encode(short), moved[1])


def test_every_parameter_of_every_kind_is_used(clips):
    for kind, changes in KINDS.items():
        model = encoder(**changes)
        model(clips).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters()), kind
