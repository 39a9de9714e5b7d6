"""Do published checkpoints, whatever their layout, become encoders that give the published numbers?"""

import argparse
import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from commands import environment
from conftest import ROOT
from imports import atst_head, cases_with_weights, imported, official, renamed, run, under
from safetensors.torch import save_file

import audiossl
from audiossl.weights import published
from benchmarks import parity


@pytest.mark.parametrize("folder", cases_with_weights(parity.PATTERNS))
def test_every_published_number_that_an_imported_checkpoint_can_give_is_given(folder, tmp_path):
    result = parity.measure(folder, tmp_path)
    assert result.is_met, f"{result.worst}: {result.difference:.1e} over {result.bound:.1e}"


def test_the_parity_command_prints_a_table_and_fails_where_a_number_is_off(tmp_path):
    folder = tmp_path / "golden" / "passt_s16_short_mixed"
    (source,) = cases_with_weights((folder.name,))
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "benchmarks.parity", "--golden", str(tmp_path / "golden")]
    kind = dict(env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    done = subprocess.run([*command, "--page", str(tmp_path / "page.md")], **kind)
    assert done.returncode == 0 and "passt_s16_short_mixed" in done.stdout, done.stdout + done.stderr
    assert "1 of 1 cases met" in (tmp_path / "page.md").read_text()
    expected = parity.load_file(folder / "expected.safetensors")
    save_file(expected | {"logits": expected["logits"] + 1e-3}, folder / "expected.safetensors")
    done = subprocess.run(command, **kind)
    assert done.returncode == 1 and "NO" in done.stdout


def test_the_command_reports_every_tensor_and_the_licence_and_what_it_wrote_loads(tmp_path):
    state, heads = official("mae_pt_esc512")
    torch.save({"model": state, "epoch": 3}, tmp_path / "theirs.pth")
    command = [sys.executable, "-m", "audiossl", "import", "theirs.pth", "ours", f"num_heads={heads}"]
    kind = dict(cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    done = subprocess.run(command, **kind)
    assert done.returncode == 0, done.stderr
    for said in ("blocks.{0..1}.attn.qkv.weight", "transposed", "decoder_", "0 missing", "CC-BY-NC-4.0", "epoch (int)"):
        assert said in done.stdout
    model = audiossl.load(tmp_path / "ours")
    assert model.description["licence"]["name"] == "CC-BY-NC-4.0"
    assert model.description["provenance"]["layout"] == "Audio-MAE, pre-trained with the global decoder"
    assert model(torch.zeros(1, 22050), rate_hz=44100).isfinite().all()
    again = subprocess.run(command, **kind)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "overwrite=true" in again.stderr


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("mae_pt_*", ()), ("atst_clip_*", ()), ("atst_frame_*", ("part=student",)), ("passt_s*", ())],
)
def test_the_report_has_a_row_for_every_tensor_and_a_reason_for_each_that_is_dropped(pattern, words, tmp_path):
    state, heads = official(pattern)
    model, report, _ = imported({"state_dict": state}, tmp_path, f"num_heads={heads}", *words)
    rows = report["tensors"]
    assert sorted(row["source"] for row in rows) == sorted(state)
    assert all(row["why"] for row in rows if row["action"] == "dropped")
    ours = {name for row in rows for name in row["ours"].split(", ") if name}
    wanted = set(model.encoder.state_dict())
    assert ours == wanted | {key for key in model.state_dict() if key.startswith("head.")}
    same = {row["ours"]: state[row["source"]] for row in rows if row["action"] in ("used as is", "renamed")}
    weights = model.encoder.state_dict() | {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    assert same and all(torch.equal(value.flatten(), weights[name].flatten()) for name, value in same.items())


@pytest.mark.parametrize("part", ["teacher", "student"])
@pytest.mark.parametrize("wrapper", ["module.", ""])
def test_the_dino_style_file_of_clip_base_gives_the_encoder_asked_for(part, wrapper, tmp_path):
    state, heads = official("atst_clip_*")
    content = {"optimizer": {}, "epoch": 3, "args": argparse.Namespace(arch="ast_base", anchor_len=[9.0, 9.0])}
    for who in ("teacher", "student"):
        parts = renamed(under(state, f"model.{who}.encoder."), f"{wrapper}backbone.")
        content[who] = parts | renamed(under(state, f"model.{who}.projector."), f"{wrapper}head.")
    model, report, out = imported(content, tmp_path, f"num_heads={heads}", f"part={part}")
    theirs = state[f"model.{part}.encoder.blocks.0.attn.qkv.weight"]
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, theirs)
    assert model.description["provenance"]["layout"] == "ATST-Clip, pre-trained (DINO-style)"
    assert model.frontend.frames == 901, "the file says 9 s"
    assert f"arch=ast_base, width 768 and depth 12; its weights, which are taken, have width {model.width}" in " ".join(
        out.split()
    )
    assert {row["why"] for row in report["tensors"] if ".head." in row["source"]} != {""}


def test_a_fine_tuned_atst_brings_its_classifier(tmp_path):
    state, heads = official("atst_clip_*")
    clip, width = under(state, "model.teacher.encoder."), state["model.teacher.encoder.norm.weight"].shape[0]
    head = atst_head(2 * width, 5)
    content = {"state_dict": renamed(clip, "encoder.encoder.") | renamed(head, "head.")}
    (tmp_path / "names.txt").write_text("dog\ncat\nrain\nsiren\nbell\n")
    model, _, _ = imported(content, tmp_path, f"num_heads={heads}", f"labels={tmp_path / 'names.txt'}")
    spectrogram = torch.randn(2, 1, 64, 601, generator=torch.Generator().manual_seed(0))
    tokens = model.tokens(spectrogram)
    features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    scaled = (features - head["norm.running_mean"]) / (head["norm.running_var"] + 1e-5).sqrt()
    expected = scaled @ head["linear.weight"].T + head["linear.bias"]
    torch.testing.assert_close(model.logits(spectrogram), expected, rtol=0, atol=1e-4)
    assert model.labels == ["dog", "cat", "rain", "siren", "bell"] and model.mask_padding


def test_a_classifier_of_moments_scores_every_token(tmp_path):
    state, heads = official("atst_frame_*")
    frame = under(state, "model.teacher.encoder.")
    head = atst_head(frame["norm_frame.weight"].shape[0], 4, normed=False)
    content = {"state_dict": renamed(frame, "encoder.encoder.") | renamed(head, "head.")}
    model, _, _ = imported(content, tmp_path, f"num_heads={heads}")
    spectrogram = torch.randn(1, 1, 64, 401, generator=torch.Generator().manual_seed(0))
    expected = model.tokens(spectrogram) @ head["linear.weight"].T + head["linear.bias"]
    torch.testing.assert_close(model.logits(spectrogram), expected, rtol=0, atol=1e-5)


def test_a_distilled_file_gives_its_student_or_its_teacher(tmp_path):
    clip, heads = official("atst_clip_*")
    clip = under(clip, "model.teacher.encoder.")
    frame = under(official("atst_frame_train3")[0], "model.student.encoder.")
    width = frame["norm_frame.weight"].shape[0]
    linear, head = atst_head(width, 4), atst_head(2 * width, 4)
    state = renamed(clip, "model.teacher.encoder.") | renamed(head, "model.teacher.head.")
    state |= renamed(frame, "model.student.") | renamed(linear, "model.linear.")
    student, report, _ = imported({"state_dict": state}, tmp_path, f"num_heads={heads}")
    teacher, _, _ = imported({"state_dict": state}, tmp_path, f"num_heads={heads}", "part=teacher")
    assert student.encoder.num_class_tokens == 0 and student.head.pooling == "mean"
    assert torch.equal(student.head.linear.weight, linear["linear.weight"])
    assert teacher.encoder.num_class_tokens == 1 and torch.equal(teacher.head.linear.weight, head["linear.weight"])
    assert any("part=teacher takes it" in row["why"] for row in report["tensors"])
    frames = renamed(frame, "encoder.encoder.frame_encoder.") | renamed(clip, "encoder.encoder.teacher_module.encoder.")
    frames |= renamed(atst_head(width, 4, normed=False), "head.")
    moments, _, _ = imported({"state_dict": frames}, tmp_path, f"num_heads={heads}")
    assert moments.head.pooling == "tokens" and moments.encoder.num_class_tokens == 0
    clips = renamed(clip, "encoder.encoder.clip_encoder.") | renamed(frame, "encoder.encoder.teacher_module.encoder.")
    clips |= renamed(atst_head(width, 4, normed=False), "head.")
    moments, _, _ = imported({"state_dict": clips}, tmp_path, f"num_heads={heads}")
    assert moments.logits(torch.zeros(1, 1, 64, 401)).shape == (1, 100, 4) and moments.encoder.num_class_tokens == 1


@pytest.mark.parametrize("prefix", ["net.", "net_swa.", "net._orig_mod.", "net_swa._orig_mod."])
def test_a_users_lightning_checkpoint_of_passt_gives_the_average_where_there_is_one(prefix, tmp_path):
    state, heads = official("passt_s*")
    flat, _, _ = imported(state, tmp_path, f"num_heads={heads}", name="flat.pt")
    content = renamed(state, prefix)
    if "swa" in prefix:
        content |= renamed({key: torch.full_like(value, 9.0) for key, value in state.items()}, "net.")
    model, report, _ = imported({"state_dict": content, "epoch": 3}, tmp_path, f"num_heads={heads}")
    for name, value in flat.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    dropped = [row for row in report["tensors"] if row["why"] == "the average, net_swa.*, is taken"]
    assert len(dropped) == (len(state) if "swa" in prefix else 0)


@pytest.mark.parametrize("is_tuned", [True, False])
def test_timms_port_of_audiomae_gives_what_timm_gives(is_tuned, tmp_path):
    state, heads = official("mae_pt_esc512")
    shape = dict(img_size=(512, 128), in_chans=1, embed_dim=state["cls_token"].shape[-1], depth=2, num_heads=heads)
    pooling = dict(num_classes=6, global_pool="avg") if is_tuned else dict(num_classes=0, global_pool="token")
    theirs = timm.models.vision_transformer.VisionTransformer(**shape, **pooling).eval()
    with torch.no_grad():
        theirs.pos_embed.copy_(state["pos_embed"])
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    code, _, err = run(tmp_path / "model.safetensors", tmp_path / "ours", f"num_heads={heads}")
    assert code == 0, err
    model = audiossl.load(tmp_path / "ours")
    assert model.description["licence"]["name"] == "CC-BY-4.0"
    spectrogram = torch.randn(2, 1, 512, 128, generator=torch.Generator().manual_seed(1))
    ours = model.logits(spectrogram.mT) if is_tuned else model.tokens(spectrogram.mT)[:, 0]
    torch.testing.assert_close(ours, theirs(spectrogram), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("like", "tokens"), [("passt", 2), ("audiomae", 1)])
def test_an_image_model_becomes_what_it_is_asked_to_be_like(like, tokens, tmp_path):
    size = dict(embed_dim=48, depth=2, num_heads=3)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", **size).state_dict()
    model, _, out = imported({"model": theirs}, tmp_path, "num_heads=3", f"like={like}", "seconds=2.56")
    assert model.encoder.num_class_tokens == tokens and model.description["licence"]["name"] == "Apache-2.0"
    summed = theirs["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.encoder.patch_embed.proj.weight, summed, rtol=0, atol=0)
    assert "has heard nothing yet" in out and model(torch.zeros(1, 16000), rate_hz=16000).isfinite().all()


@pytest.mark.parametrize(
    ("file", "ours"),
    [("kaldi_fbank", published.KALDI_FBANK), ("atst_mel", published.ATST_MEL), ("passt_mel", published.PASST_MEL)],
)
def test_front_ends_of_imported_weights_are_those_of_the_configs(file, ours):
    shipped = yaml.safe_load((ROOT / f"conf/frontend/{file}.yaml").read_text())
    statistics = yaml.safe_load((ROOT / "conf/data/audioset.yaml").read_text())
    statistics = json.loads(json.dumps(statistics.get("data", statistics)))
    shipped = {key: statistics[key] if str(value).startswith("${data.") else value for key, value in shipped.items()}
    assert shipped == ours
