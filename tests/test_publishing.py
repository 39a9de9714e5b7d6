"""Does what came from the authors go back to them bit for bit, and can their loaders read what was trained here?"""

import lightning.pytorch as pl
import pytest
import torch
from atsts import ATSTGolden, large_cases
from conftest import golden_cases
from maes import MAEGolden, audiomae
from methods import build
from passts import PaSSTGolden
from test_atst_c2f import C2FGolden
from torch import nn

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead
from audiossl.pretrained import PretrainedEncoder
from audiossl.weights import atst
from audiossl.weights.audiomae import import_encoder
from audiossl.weights.publishing import publish
from audiossl.weights.reading import read_torch_file


def files(*patterns: str, suffix: str = "official.*") -> list:
    return [file for pattern in patterns for case in golden_cases(pattern) for file in sorted(case.glob(suffix))]


def large_files(pattern: str, suffix: str) -> list:
    return [file for case in large_cases(pattern) for file in sorted(case.glob(suffix))]


def atst_files(*, fine_tuned: bool) -> list:
    """List published ATST files of one kind, which their names do not tell."""
    found = files("atst_clip_*", "atst_frame_*") + large_files("atst_*", "finetuned.ckpt")
    return [f for f in found if fine_tuned == ("encoder.encoder.pos_embed" in read_torch_file(f)["state_dict"])]


def audiomae_files() -> list:
    """List the pre-trained ones."""
    return [file for file in files("mae_*", suffix="official.pth") if "mask_token" in read_torch_file(file)["model"]]


def passt_files() -> list:
    """List PaSST's own; a DeiT to start from lies among them."""
    return [file for file in files("passt_*") if "new_pos_embed" in read_torch_file(file)]


def same(published, theirs: dict) -> None:
    """Demand the authors' names and shapes, and their values where nothing was filled in."""
    assert {k: v.shape for k, v in published.tensors.items()} == {k: v.shape for k, v in theirs.items()}
    for key, value in theirs.items():
        if "first place only" in published.filled.get(key, ""):
            assert torch.equal(published.tensors[key][:, 1:], value[:, 1:]), key
        else:
            assert key in published.filled or torch.equal(published.tensors[key], value), key


def without_head(encoder: Encoder) -> PretrainedEncoder:
    return PretrainedEncoder(encoder, nn.Identity(), None, {})


@pytest.mark.parametrize("file", audiomae_files(), ids=lambda file: file.parent.name)
def test_a_pretrained_audiomae_goes_back_bit_for_bit(file):
    published = publish(MAEGolden(file.parent).model, "audiomae")
    same(published, read_torch_file(file)["model"])
    assert not published.filled and not published.left_out and not published.notes


@pytest.mark.parametrize("file", large_files("mae_ft_*", "official.pth"), ids=lambda file: file.parent.name)
def test_a_fine_tuned_audiomae_goes_back_bit_for_bit(file):
    theirs = read_torch_file(file)["model"]
    ours = import_encoder(theirs)
    width, depth = ours["class_token"].shape[2], 1 + max(int(k.split(".")[1]) for k in ours if k.startswith("blocks."))
    rows, columns, _ = ours["positions.table"].shape
    stride = (128 - 16) // (rows - 1)  # 16, or 10 where patches overlap
    cut = dict(num_mels=128, frames=(columns - 1) * stride + 16, patch=(16, 16), stride=(stride, stride))
    sizes = cut | dict(width=width, depth=depth)
    encoder = Encoder(**sizes, num_heads=1, mlp_ratio=4.0, positions="published", drop_path=0.0, final_norm=False)
    encoder.load_state_dict(ours)
    head = LinearHead(width, len(theirs["head.bias"]), pooling="mean", norm="layer", eps=1e-6)
    names = {"fc_norm.": "norm.", "head.": "linear."}
    found = {o + k.removeprefix(t): v for t, o in names.items() for k, v in theirs.items() if k.startswith(t)}
    head.load_state_dict(found)
    same(publish(PretrainedEncoder(encoder, nn.Identity(), head, {}), "audiomae"), theirs)


@pytest.mark.parametrize("file", atst_files(fine_tuned=False), ids=lambda file: file.parent.name)
def test_a_pretrained_atst_goes_back_bit_for_bit(file):
    model = "atst_clip" if "clip" in file.parent.name else "atst_frame"
    published = publish(ATSTGolden(file.parent, model).model, "atst")
    same(published, read_torch_file(file)["state_dict"])
    assert all(key.endswith(("mask_embed", "pos_embed")) for key in published.filled)
    assert ("model.student.encoder.mask_embed" in published.filled) == (model == "atst_clip"), "Frame trains its own"


@pytest.mark.parametrize("file", atst_files(fine_tuned=True), ids=lambda file: file.parent.name)
def test_a_fine_tuned_atst_goes_back_bit_for_bit(file):
    theirs = read_torch_file(file)["state_dict"]
    weights, head_weights, sizes = atst.import_finetuned(theirs, num_heads=1)
    frames = sizes.pop("position_frames")
    encoder = Encoder(num_mels=64, frames=frames, positions="learned", drop_path=0.0, **sizes)
    encoder.load_state_dict(weights)
    classes, width = head_weights["linear.weight"].shape
    norm = "batch" if "norm.running_mean" in head_weights else "none"
    head = LinearHead(width, classes, pooling="class+mean" if sizes["num_class_tokens"] else "mean", norm=norm)
    head.load_state_dict(head_weights)
    same(publish(PretrainedEncoder(encoder, nn.Identity(), head, {}), "atst"), theirs)


@pytest.mark.parametrize("file", large_files("atst_c2f_*", "official.ckpt"), ids=lambda file: file.parent.name)
def test_a_distilled_atst_goes_back_bit_for_bit(file, tmp_path):
    published = publish(C2FGolden(file.parent, tmp_path).model, "atst")
    same(published, read_torch_file(file)["state_dict"])


@pytest.mark.parametrize("file", passt_files(), ids=lambda file: file.parent.name)
def test_a_passt_goes_back_bit_for_bit_but_for_the_head_that_is_never_used(file):
    published = publish(PaSSTGolden(file.parent).model, "passt")
    same(published, read_torch_file(file))
    assert published.filled == dict.fromkeys(["head_dist.weight", "head_dist.bias"], "no forward pass uses it")


class Theirs(pl.LightningModule):
    """Have a module of the given tensors, as the authors' would, with some of their arguments."""

    def __init__(self, names=None, arch="none", pos_type="none", **kwargs):
        super().__init__()
        self.save_hyperparameters(ignore=["names"])
        for name, value in names.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(last, torch.zeros_like(value))


def test_lightning_loads_a_published_atst_strictly_with_the_arguments_it_tells(tmp_path):
    published = publish(build("atst_frame"), "atst")
    torch.save(published.content, tmp_path / "frame.ckpt")
    loaded = Theirs.load_from_checkpoint(tmp_path / "frame.ckpt", names=published.tensors, strict=True)
    assert loaded.hparams.pos_type == "cut" and loaded.hparams.arch == "small"
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, published.tensors[name]), name
    read, _ = atst.import_pretrained(tmp_path / "frame.ckpt", num_heads=2)
    ours = build("atst_frame").state_dict()
    assert read.keys() == ours.keys() and all(torch.equal(v, read[k]) for k, v in ours.items())


@pytest.mark.parametrize("model, layout", [("audiomae", "passt"), ("atst_clip", "audiomae"), ("passt", "atst")])
def test_the_layout_of_another_family_is_refused_in_a_line_that_names_the_right_one(model, layout):
    with pytest.raises(UserError, match=f"layout={layout}: .*give layout={model.split('_')[0]}"):
        publish(build(model), layout)


def test_a_decoder_that_was_never_published_is_left_out_and_listed():
    method = audiomae(decoder="hybrid", decoder_depth=8, decoder_window=4)
    published = publish(method, "audiomae")
    assert not any(key.startswith("decoder") for key in published.tensors) and "norm.weight" in published.tensors
    assert published.left_out.keys() == {key for key in method.state_dict() if key.startswith("decoder.")}


def test_an_encoder_alone_says_what_their_code_will_miss():
    assert "pre-training wants a checkpoint" in publish(without_head(build("audiomae").encoder), "audiomae").notes[0]
    published = publish(without_head(build("atst_clip").encoder), "atst")
    assert all(key.startswith("model.teacher.encoder.") for key in published.tensors)
    assert any("strict=False" in note for note in published.notes)


def test_a_head_that_their_code_would_read_otherwise_is_refused():
    encoder = build("audiomae").encoder
    head = LinearHead(encoder.width, 5, pooling="mean", norm="layer")
    with pytest.raises(UserError, match="no norm but its head's"):
        publish(PretrainedEncoder(encoder, nn.Identity(), head, {}), "audiomae")
    head = LinearHead(encoder.width, 5, pooling="class", norm="batch")
    with pytest.raises(UserError, match="pooling=mean with norm=layer, this one is on class with batch"):
        publish(PretrainedEncoder(encoder, nn.Identity(), head, {}), "audiomae")
