"""Do the authors' files load, say what they are, and give their numbers?"""

import argparse
import math
import zlib

import numpy as np
import pytest
import torch
from conftest import golden_cases
from maes import audiomae

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.masking import keep_random
from audiossl.parts.positions import sincos_table
from audiossl.patches import grid_of
from audiossl.weights.audiomae import import_encoder, import_pretrained, is_audiomae
from audiossl.weights.reading import read_torch_file

CASES = golden_cases("mae_pt_*")
HEADS = dict(num_heads=2, decoder_num_heads=2)


def official(case=CASES[0]):
    return read_torch_file(case / "official.pth")["model"]


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_off_the_tensors(case):
    state = official(case)
    _, geometry = import_pretrained(state, **HEADS)
    grid = grid_of(geometry["num_mels"], geometry["frames"], (16, 16), (16, 16))
    assert grid[0] * grid[1] + 1 == state["pos_embed"].shape[1] and geometry["positions"] == "published"
    assert (geometry["decoder"] == "local") == ("decoder_blocks.0.attn.tau" in state)
    assert geometry["width"] == state["norm.weight"].shape[0]


def test_a_model_of_these_sizes_takes_every_tensor():
    weights, geometry = import_pretrained(official(), **HEADS)
    model = audiomae(geometry.pop("frames"), geometry.pop("num_mels"), **geometry)
    model.load_state_dict(weights)
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(model.encoder.positions.table, weights["encoder.positions.table"])


def test_overlapping_patches_are_recognised():
    state = official()
    width, theirs = state["cls_token"].shape[-1], {}
    for name, size in (("pos_embed", width), ("decoder_pos_embed", state["mask_token"].shape[-1])):
        kind = dict(positions="published", overlapping=True)
        table = sincos_table((12, 101), size, **kind).transpose(0, 1).flatten(0, 1)
        theirs[name] = torch.cat([torch.zeros(1, size), table])[None]
    weights, geometry = import_pretrained(state | theirs, **HEADS)
    assert (geometry["stride"], geometry["frames"]) == (10, 1024)
    model = audiomae(geometry.pop("frames"), geometry.pop("num_mels"), **geometry)
    built = model.encoder.positions.table.clone()
    model.load_state_dict(weights)
    torch.testing.assert_close(model.encoder.positions.table, built, rtol=0, atol=1e-6)


def test_the_encoder_loads_alone_from_pre_trained_and_fine_tuned_files():
    state = official()
    assert is_audiomae(state)
    weights = import_encoder(state)
    sizes = dict(num_mels=128, patch=(16, 16), stride=(16, 16), num_heads=2, mlp_ratio=4.0, drop_path=0.0)
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    frames, width = 16 * weights["positions.table"].shape[1], weights["class_token"].shape[-1]
    Encoder(**sizes, frames=frames, width=width, depth=depth, positions="published").load_state_dict(weights)
    tuned = {k: v for k, v in state.items() if not k.startswith(("norm.", "decoder", "mask_token"))}
    assert weights.keys() - import_encoder(tuned).keys() == {"norm.weight", "norm.bias"}


def test_a_file_with_a_namespace_loads_and_one_with_code_does_not(tmp_path):
    torch.save({"model": official(), "args": argparse.Namespace(lr=1.0), "epoch": np.float64(3)}, tmp_path / "a.pth")
    assert import_pretrained(tmp_path / "a.pth", **HEADS)[1]["patch"] == 16
    torch.save({"model": {}, "args": Dangerous()}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="b.pth: not read, .* asks to run code"):
        read_torch_file(tmp_path / "b.pth")


class Dangerous:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match="x.pth") as error:
        import_pretrained(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def test_wrong_checkpoints_say_what_is_wrong(tmp_path):
    state = official()
    with pytest.raises(UserError, match="no such file"):
        import_pretrained(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="lacks mask_token"):
        import_pretrained({k: v for k, v in state.items() if k != "mask_token"}, **HEADS)
    with pytest.raises(UserError, match="1 tensors .* extra.weight"):
        import_pretrained(state | {"extra.weight": torch.zeros(1)}, **HEADS)
    with pytest.raises(UserError, match="give num_heads"):
        import_pretrained(state)
    with pytest.raises(UserError, match="num_mels"):
        import_pretrained(state, num_mels=96, **HEADS)


def scramble(count: int, key: int) -> torch.Tensor:
    """Draw the deterministic numbers in [-0.5, 0.5) that the published code was measured with."""
    h = (np.arange(count, dtype=np.uint64) * 2654435761 + key).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(16)
    return torch.from_numpy(h.astype(np.float64) / 2**32 - 0.5)


def deterministic_state(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in like.items():
        numbers = scramble(value.numel(), zlib.crc32(name.encode())).reshape(value.shape)
        if name.endswith("attn.tau"):
            numbers = torch.ones_like(numbers)
        elif name.endswith(".weight") and value.ndim > 1:
            numbers = numbers * math.sqrt(12 * value.shape[0] / value.numel())
        else:
            numbers = 0.2 * numbers + (1.0 if name.endswith(".weight") else 0.0)
        state[name] = value.double() if name.endswith("pos_embed") else numbers
    return state


def their_state(decoder: str, depth: int) -> dict[str, torch.Tensor]:
    """Lay out a ViT-B checkpoint as the authors name and order it."""
    size = dict(width=768, depth=12, num_heads=12, decoder_width=512, decoder_num_heads=16)
    model = audiomae(1024, **size, decoder=decoder, decoder_depth=depth, positions="published")
    rename = {"encoder.": "", "decoder.": "decoder_", "class_token": "cls_token", "decoder_mask": "mask"}
    rename |= {"positions.table": "pos_embed", "predict": "pred", "position_mlp": "meta_mlp"}
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in rename.items():
            name = name.replace(ours, theirs)
        if name.endswith("pos_embed"):
            value = torch.cat([torch.zeros(1, value.shape[2]), value.transpose(0, 1).flatten(0, 1)])[None]
        state[name] = value
    return deterministic_state(state)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "depth", "loss"), [("local", 16, 2.08688760), ("global", 8, 2.07339379)])
def test_the_full_size_model_gives_the_published_codes_numbers(decoder, depth, loss):
    theirs = their_state(decoder, depth)
    assert len(theirs) == {"local": 430, "global": 254}[decoder]
    weights, geometry = import_pretrained(theirs)
    model = audiomae(geometry.pop("frames"), geometry.pop("num_mels"), **geometry, norm_target=True).double().eval()
    model.load_state_dict(weights)
    flat = scramble(2 * 1024 * 128, 12345) * math.sqrt(12)
    spectrogram = flat.reshape(2, 1, 1024, 128).transpose(2, 3)
    noise = (torch.arange(512) * 197 % 512 / 512).expand(2, -1)
    keep = keep_random(noise.reshape(2, 64, 8).transpose(1, 2).flatten(1), 0.8)
    with torch.no_grad():
        latent = model.encoder(spectrogram, keep)
        prediction = model.decoder.values(model.decode(spectrogram, keep))
        measured = model.loss(spectrogram, keep)
    assert latent.shape == (2, 103, 768)
    assert latent.sum().item() == pytest.approx(-314.877531, abs=1e-3)
    assert latent.abs().mean().item() == pytest.approx(0.797251, abs=2e-6)
    assert latent[0, 0, :4].tolist() == pytest.approx([0.780310, -1.418518, -0.206500, 1.527190], abs=2e-6)
    total, spread = {"local": (-23592.613383, 0.840280), "global": (1474.230326, 0.834478)}[decoder]
    assert prediction.sum().item() == pytest.approx(total, abs=5e-2)
    assert prediction.abs().mean().item() == pytest.approx(spread, abs=2e-6)
    assert measured.item() == pytest.approx(loss, abs=2e-8)
