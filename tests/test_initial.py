"""An encoder can start from a run, from the authors' file, or from an image model."""

import pytest
import timm
import torch
from conftest import golden_cases
from maes import audiomae
from safetensors.torch import save_file

from audiossl.errors import UserError
from audiossl.running.build import load_initial_weights


@pytest.fixture(scope="module")
def image_model():
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_image_weights_keep_their_blocks_and_sum_their_colours(image_model, tmp_path, suffix):
    path, state = tmp_path / f"vit{suffix}", image_model.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    method = audiomae(width=48, depth=2, num_heads=3)
    table = method.encoder.positions.table.clone()
    said = load_initial_weights(method, str(path))
    assert str(path) in said
    kernel = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(method.encoder.patch_embed.proj.weight, kernel)
    assert torch.equal(method.encoder.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(method.encoder.positions.table, table), "the grid's own positions stay"


def test_the_authors_file_gives_its_encoder():
    (case,) = [c for c in golden_cases("mae_pt_esc512")]
    method = audiomae(frames=512, width=64, depth=2, num_heads=4)
    before = method.encoder.blocks[0].attn.qkv.weight.clone()
    said = load_initial_weights(method, str(case / "official.pth"))
    assert "Audio-MAE" in said and not torch.equal(method.encoder.blocks[0].attn.qkv.weight, before)


def test_weights_of_another_size_are_one_line_with_both_shapes(image_model, tmp_path):
    torch.save(image_model.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"\[96, .*instead of|instead of \[96"):
        load_initial_weights(audiomae(width=96, depth=2, num_heads=3), str(tmp_path / "vit.pth"))


def test_something_else_is_named(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth.*keys"):
        load_initial_weights(audiomae(), str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="no such file"):
        load_initial_weights(audiomae(), str(tmp_path / "none.pth"))
