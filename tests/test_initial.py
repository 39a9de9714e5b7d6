"""An encoder can start from a run, from the authors' file, or from an image model."""

import logging

import pytest
import timm
import torch
from atsts import build as build_atst
from atsts import large_cases
from conftest import golden_cases
from maes import audiomae
from methods import build, compose_for
from passts import passt
from safetensors.torch import save_file

from audiossl.errors import UserError
from audiossl.running.build import load_initial_weights, start_from
from audiossl.weights.export import export_encoder
from audiossl.weights.origins import LICENCES, join_licences, published_frontend
from audiossl.weights.publishing import publish


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


def test_the_authors_file_of_other_mel_bands_gives_its_encoder(tmp_path):
    donor = audiomae(frames=64, num_mels=64, width=64, depth=2, num_heads=4)
    torch.save(publish(donor, "audiomae").content, tmp_path / "theirs.pth")
    method = audiomae(frames=64, num_mels=64, width=64, depth=2, num_heads=4)
    load_initial_weights(method, str(tmp_path / "theirs.pth"))
    for key, value in donor.encoder.state_dict().items():
        assert torch.equal(method.encoder.state_dict()[key], value), key


@pytest.mark.faults("C10")
def test_weights_of_another_size_are_one_line_with_both_shapes(image_model, tmp_path):
    torch.save(image_model.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"\[96, .*instead of|instead of \[96"):
        load_initial_weights(audiomae(width=96, depth=2, num_heads=3), str(tmp_path / "vit.pth"))


def test_something_else_is_named(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth.*keys"):
        load_initial_weights(audiomae(), str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="init=.*none.pth: no such file or folder; give"):
        load_initial_weights(audiomae(), str(tmp_path / "none.pth"))


def config_for(model: str, source, *, mode: str = "check", **frontend) -> dict:
    config = compose_for(model)
    return {"init": str(source), "init_frontend": mode, "frontend": config["frontend"] | frontend}


@pytest.fixture
def exported(tmp_path):
    """Export a small Audio-MAE whose own start came under a licence."""
    config = compose_for("audiomae") | {"data": {"shards": "x", "mean": -8.0, "std": 5.0}}
    about = dict(provenance={"licence": LICENCES["audiomae"]})
    export_encoder(build("audiomae"), config, tmp_path / "encoder.safetensors", **about)
    return tmp_path


@pytest.mark.parametrize("key, value", [("hop_ms", 5), ("num_mels", 64), ("fmax_hz", 7000), ("rate_hz", 32000)])
def test_weights_that_heard_through_another_front_end_are_refused(exported, caplog, key, value):
    theirs = compose_for("audiomae")["frontend"][key]
    shown = "null" if theirs is None else theirs
    with pytest.raises(UserError) as raised:
        start_from(build("audiomae"), config_for("audiomae", exported, **{key: value}))
    said = f"its weights heard frontend.{key}={shown}, this run's is {value}; give frontend.{key}={shown}, or init_fr"
    assert said in str(raised.value) and str(raised.value).startswith(f"init={exported}: ")
    with caplog.at_level(logging.WARNING):
        started = start_from(build("audiomae"), config_for("audiomae", exported, mode="ignore", **{key: value}))
    assert "encoder starts from" in started["init"] and f"heard frontend.{key}={shown}" in caplog.text


def test_another_class_of_front_end_is_refused_with_the_name_to_give(exported):
    other = {"init": str(exported), "init_frontend": "check", "frontend": compose_for("atst_clip")["frontend"]}
    with pytest.raises(UserError, match="give frontend=kaldi_fbank, or init_frontend=ignore"):
        start_from(build("audiomae"), other)


def test_a_corpus_of_its_own_is_a_warning_and_another_length_is_none(exported, caplog):
    with caplog.at_level(logging.WARNING):
        start_from(build("audiomae"), config_for("audiomae", exported, seconds=10.24))
        assert not caplog.text
        start_from(build("audiomae"), config_for("audiomae", exported, mean=-1.0))
    assert "heard frontend.mean=" in caplog.text and "this run's is -1.0" in caplog.text


def test_a_checkpoint_of_ours_is_compared_as_an_export_is(tmp_path):
    method, config = build("audiomae"), compose_for("audiomae")
    weights = {f"method.{key}": value for key, value in method.state_dict().items()}
    about = {"config": config, "provenance": {"licence": LICENCES["passt"]}}
    torch.save({"audiossl": about, "state_dict": weights, "global_step": 7}, tmp_path / "x.ckpt")
    started = start_from(method, config_for("audiomae", tmp_path / "x.ckpt"))
    assert "(step 7)" in started["init"] and started["licence"] == LICENCES["passt"]
    with pytest.raises(UserError, match="frontend.preemphasis=0.97, this run's is 0.5"):
        start_from(method, config_for("audiomae", tmp_path / "x.ckpt", preemphasis=0.5))


def test_an_authors_file_is_held_to_what_they_published_and_brings_its_licence():
    (case,) = [c for c in golden_cases("mae_pt_esc512")]
    method = audiomae(frames=512, width=64, depth=2, num_heads=4)
    started = start_from(method, config_for("audiomae", case / "official.pth"))
    assert started["licence"]["name"] == "CC-BY-NC-4.0"
    with pytest.raises(UserError, match="heard frontend.window_ms=25, this run's is 20"):
        start_from(method, config_for("audiomae", case / "official.pth", window_ms=20))


def test_each_of_several_published_settings_will_do():
    (case,) = [c for c in golden_cases("passt_s16_short_mixed")]
    method = passt(seconds=10, width=64, depth=2, num_heads=4, stride=16, position_frames=998, num_classes=13)
    for hop_ms in (10, 5, 3.125):
        assert start_from(method, config_for("passt", case / "official.pth", hop_ms=hop_ms))["licence"]
    with pytest.raises(UserError, match="frontend.hop_ms=10 or 5 or 3.125, this run's is 20"):
        start_from(method, config_for("passt", case / "official.pth", hop_ms=20))


@pytest.mark.parametrize("file", ["official.ckpt", "finetuned.ckpt"])
@pytest.mark.parametrize("case", large_cases("atst_*_features"))
def test_a_run_starts_from_the_atst_authors_teacher_or_fine_tuned_encoder(case, file):
    model = "atst_clip" if "clip" in case.name else "atst_frame"
    method = build_atst(model, width=48, depth=4, num_heads=3)
    started = start_from(method, config_for(model, case / file))
    assert "(ATST" in started["init"] and started["licence"]["name"] == "MIT"
    state = torch.load(case / file, weights_only=True)["state_dict"]
    theirs = state.get("model.teacher.encoder.blocks.1.attn.qkv.weight")
    theirs = state["encoder.encoder.blocks.1.attn.qkv.weight"] if theirs is None else theirs
    for encoder in method.encoders:
        assert torch.equal(encoder.blocks[1].attn.qkv.weight, theirs)


@pytest.mark.parametrize("family, model", [("audiomae", "audiomae"), ("atst", "atst_frame"), ("passt", "passt")])
def test_the_published_front_end_is_the_one_that_is_shipped(family, model):
    shipped = compose_for(model)["frontend"]
    published = published_frontend(family)
    assert published.keys() == shipped.keys()
    alike = {k for k, v in published.items() if shipped[k] == v or (isinstance(v, tuple) and shipped[k] in v)}
    assert shipped.keys() - alike <= {"mean", "std", "seconds"}


def test_every_licence_holds_of_what_was_made_from_several():
    both = join_licences(LICENCES["passt"], None, LICENCES["atst"], LICENCES["passt"])
    assert both["name"] == "CC-BY-4.0; MIT" and both["source"].count("https://") == 2
    assert join_licences(None, LICENCES["atst"]) == LICENCES["atst"] and join_licences(None, None) is None
