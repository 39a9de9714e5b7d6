"""Does PaSST compute what the published code computes, and take its weights?"""

import json

import pytest
import torch
from conftest import SHARED, golden_cases
from passts import PLAIN, PaSSTGolden, passt
from safetensors.torch import load_file

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.masking import keep_cells
from audiossl.noise import Noise
from audiossl.patches import grid_of
from audiossl.running.build import load_initial_weights
from audiossl.weights.passt import import_pretrained, split_image_positions
from audiossl.weights.reading import read_torch_file


def in_mode(mode):
    """List the cases of the transformer alone; both modes are committed."""
    folders = golden_cases("passt_s*")
    return [f for f in folders if json.loads((f / "case.json").read_text())["mode"].startswith(mode)]


def of_the_full_set(pattern):
    """List cases of which none is committed."""
    folders = list((SHARED / "golden").glob(pattern))
    return folders or [pytest.param(None, marks=pytest.mark.skip(reason="the full golden set is not here"))]


EXAMPLE = in_mode("train")[0]


def example():
    """Give the authors' state dict of one case, and its number of heads."""
    return read_torch_file(EXAMPLE / "official.pth"), PaSSTGolden(EXAMPLE).config["num_heads"]


@pytest.mark.parametrize("folder", in_mode("eval"))
def test_clips_of_every_length_are_named_as_published(folder):
    golden = PaSSTGolden(folder)
    model = golden.model.eval()
    lengths = [int(name.removeprefix("logits.")) for name in golden.expected if name.startswith("logits.")]
    assert lengths
    with torch.no_grad():
        for frames in lengths:
            spectrogram = golden.input["x"][..., :frames]
            golden.same(model.features(spectrogram), f"embedding.{frames}")
            golden.same(model.logits(Batch(spectrogram=spectrogram)), f"logits.{frames}")
        for name in [name for name in golden.expected if name.startswith("cls_")]:
            frames = name.removeprefix("cls_")
            spectrogram = golden.input["x"][..., : int(frames)]
            golden.same(model.encoder(model.cut(spectrogram))[:, 0], name)
            golden.same(model.encoder(model.cut(spectrogram))[:, 1], f"dist_{frames}")
            patches = model.encoder.patch_embed.proj(model.cut(spectrogram))
            golden.same(patches[:, : golden.expected[f"patch_embed_{frames}"].shape[1]], f"patch_embed_{frames}")


@pytest.mark.parametrize("folder", in_mode("eval"))
def test_the_loss_and_its_gradients_are_the_published_ones(folder):
    golden = PaSSTGolden(folder)
    (name,) = [name for name in golden.expected if name.startswith("bce_")]
    spectrogram = golden.input["x"][..., : int(name.removeprefix("bce_"))]
    batch = Batch(spectrogram=spectrogram, target=golden.input["labels"])
    loss = golden.model.eval()(batch, generator=Noise.for_batch(0, 0, len(batch)))["loss"]
    loss.backward()
    golden.same(loss.detach(), name)
    golden.same_gradients()


@pytest.mark.parametrize("folder", in_mode("train"))
def test_what_patchout_keeps_is_named_as_published(folder):
    golden = PaSSTGolden(folder)
    model, expected = golden.model.train(), golden.expected
    spectrogram = golden.input["x"]
    rows, columns = grid_of(*spectrogram.shape[-2:], model.encoder.patch, model.encoder.stride)
    columns = min(columns, model.encoder.grid[1])
    kept_t = expected.get("kept_t", torch.arange(columns)).long()
    kept_f = expected.get("kept_f", torch.arange(rows)).long()
    keep = keep_cells(kept_f[None], kept_t[None], columns)
    if "kept_u" in expected:
        keep = keep[:, expected["kept_u"].long()]
    first_column = golden.case.get("rng", {}).get("time_encoding_offset", 0)
    keep = keep.expand(len(spectrogram), -1)
    golden.same(model.features(spectrogram, keep, first_column).detach(), "embedding")
    logits = model.classify(spectrogram, keep, first_column)
    golden.same(logits.detach(), "logits")
    loss = model.loss(logits, golden.input["labels"])
    golden.same(loss.detach(), "bce")
    loss.backward()
    golden.same_gradients()


@pytest.mark.parametrize("folder", in_mode("train"))
def test_patchout_draws_as_many_as_published(folder):
    golden = PaSSTGolden(folder)
    told, (rows, columns) = golden.config, golden.model.encoder.grid
    counts = {"time": "s_patchout_t", "frequency": "s_patchout_f", "random": "u_patchout"}
    ours = {f"patchout_{name}": told.get(theirs, 0) for name, theirs in counts.items()}
    seen = golden.case["rng"]
    grid = (seen.get("n_patches_f", rows), seen.get("n_patches_t", columns))
    model = passt(10, **PLAIN | ours)
    kept = model.patchout.keep(Noise.for_batch(0, 0, 2), grid)
    expected = len(golden.expected.get("kept_f", range(grid[0]))) * len(golden.expected.get("kept_t", range(grid[1])))
    expected = len(golden.expected["kept_u"]) if "kept_u" in golden.expected else expected
    assert kept.shape == (2, expected) and model.patchout.num_kept(grid) == expected


@pytest.mark.parametrize("folder", of_the_full_set("passt_deit_import*"))
def test_an_image_model_becomes_a_start_as_published(folder):
    case = json.loads((folder / "case.json").read_text())
    config, expected = case["config"], load_file(folder / "expected.safetensors")
    sizes = dict(width=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"])
    frames, stride = config["img_size"][1], config["stride"]
    model = passt(10, **PLAIN, **sizes, position_frames=frames, stride=stride[0], stride_time=stride[1]).eval()
    assert "image weights" in load_initial_weights(model, str(folder / "official.pth"))
    ours = model.encoder.state_dict()
    theirs = {
        "positions.class_table": expected["new_pos_embed"],
        "positions.frequency": expected["freq_new_pos_embed"][0].permute(1, 2, 0),
        "positions.time": expected["time_new_pos_embed"][0].permute(1, 2, 0),
        "patch_embed.proj.weight": expected["patch_embed.proj.weight"],
    }
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    spectrogram = load_file(folder / "input.safetensors")["x"]
    torch.testing.assert_close(model.features(spectrogram), expected["embedding"], rtol=0, atol=1e-5)


def test_image_positions_become_means_over_columns_and_over_rows():
    picture = torch.arange(6.0)[:, None, None] + torch.arange(6.0)[None, :, None] * 100  # rows count ones, columns 100
    table = torch.cat([torch.tensor([[[-7.0]]]), picture.reshape(1, 36, 1)], dim=1)
    split = split_image_positions(table, (6, 12), num_tokens=1)
    frequency, time = split["positions.frequency"][:, 0, 0], split["positions.time"][0, :, 0]
    torch.testing.assert_close(frequency, torch.arange(6.0) + 250)
    inner = time.unflatten(0, (6, 2)).mean(1)[1:-1]  # at the ends bicubic interpolation bends a line
    torch.testing.assert_close(inner, 2.5 + 100 * torch.arange(1.0, 5.0), rtol=0, atol=3)
    with pytest.raises(UserError, match="only square image models"):
        split_image_positions(table, (6, 12), num_tokens=2)


def test_the_authors_file_gives_an_encoder_its_start():
    golden = PaSSTGolden(EXAMPLE)
    config = golden.config
    sizes = dict(width=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"])
    stride = dict(stride=config["stride"][0], stride_time=config["stride"][1])
    shorter = passt(2.56, **PLAIN, **sizes, **stride)
    assert "PaSST" in load_initial_weights(shorter, str(EXAMPLE / "official.pth"))
    columns = shorter.encoder.grid[1]
    assert torch.equal(shorter.encoder.positions.time, golden.model.encoder.positions.time[:, :columns])
    spectrogram = golden.input["x"][..., :256]
    with torch.no_grad():
        torch.testing.assert_close(shorter.features(spectrogram), golden.model.features(spectrogram))


@pytest.mark.parametrize("prefix", ["", "net.", "net._orig_mod.", "net_swa."])
def test_checkpoints_of_users_are_read_under_any_prefix(prefix, tmp_path):
    flat, num_heads = example()
    state = {prefix + key: value for key, value in flat.items()}
    if prefix == "net_swa.":  # the average goes before the last
        state |= {f"net.{key}": torch.zeros_like(value) for key, value in flat.items()}
    torch.save({"state_dict": state, "epoch": 3} if prefix else state, tmp_path / "theirs.ckpt")
    weights, geometry = import_pretrained(tmp_path / "theirs.ckpt", num_heads=num_heads)
    told = PaSSTGolden(EXAMPLE).config
    assert [geometry["stride"], geometry["stride_time"]] == told["stride"]
    assert geometry["num_classes"] == told["num_classes"] and geometry["depth"] == told["depth"]
    assert torch.equal(weights["head.linear.weight"], flat["head.1.weight"])
    assert torch.equal(weights["encoder.class_token"], torch.cat([flat["cls_token"], flat["dist_token"]], 1))
    assert not any("head_dist" in name for name in weights)


def test_the_head_that_no_forward_pass_uses_is_said_to_be_left_out(caplog):
    with caplog.at_level("INFO"):
        import_pretrained(EXAMPLE / "official.pth", num_heads=example()[1])
    assert "head_dist.weight and head_dist.bias left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "lacks 1 tensors .blocks.1.attn.qkv.bias"),
        (lambda s: s.pop("dist_token"), "lacks 1 tensors .dist_token"),
        (lambda s: s.update(prompt=torch.zeros(1)), "1 tensors that PaSST has not .prompt"),
        (lambda s: s.clear(), "no PaSST checkpoint"),
    ],
)
def test_a_file_that_is_not_passts_is_refused_by_the_names_it_lacks_or_has_too_many(change, said):
    state, num_heads = example()
    change(state)
    with pytest.raises(UserError, match=said):
        import_pretrained(state, num_heads=num_heads)


def test_what_a_file_does_not_tell_must_be_given():
    state, num_heads = example()
    with pytest.raises(UserError, match="give num_heads"):
        import_pretrained(state)
    with pytest.raises(UserError, match="stride of 7"):
        import_pretrained(state, num_heads=num_heads, stride=(7, 7))
