"""What stands in the way of an import ends in one line, runs no code and leaves nothing half written."""

import argparse
import os
import pickle

import pytest
import torch
from imports import example, imported, official, refused, run
from safetensors.torch import save_file

import audiossl
from audiossl.importing.lengths import cut_positions
from audiossl.parts.positions import interpolate_positions

PASST, AUDIOMAE, CLIP = "passt_s16_short_mixed", "mae_pt_esc512", "atst_clip_varlen_train1"


class Payload:
    """Leave a mark when it is unpickled, as code in a stranger's file would."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.faults("S1")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("where", ["beside the weights", "among them", "alone"])
def test_a_file_that_would_run_code_does_not_get_to_and_its_wish_is_named(is_zip, where, tmp_path):
    state, payload = official(PASST)[0], Payload(tmp_path / "mark")
    content = {"beside the weights": {"state_dict": state, "args": payload}, "among them": state | {"x": payload}}
    torch.save(content.get(where, payload), tmp_path / "evil.pth", _use_new_zipfile_serialization=is_zip)
    said = refused(tmp_path, tmp_path / "evil.pth", f"num_heads={official(PASST)[1]}")
    assert "evil.pth" in said and "run code" in said and "mkdir" in said
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "mark").exists(), "the payload works where it is let"


@pytest.mark.faults("S1")
def test_a_bare_pickle_does_not_run_either(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    assert "evil.pkl" in refused(tmp_path, tmp_path / "evil.pkl")
    assert not (tmp_path / "mark").exists()


@pytest.mark.faults("C10", "S12")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.pth", lambda whole: b"", "is empty"),
        ("text.pth", lambda whole: b"hello, this is no checkpoint\n", "no PyTorch checkpoint|broken"),
        ("cut.pth", lambda whole: whole[:5000], "cut short or damaged"),
        ("cut_late.pth", lambda whole: whole[:-100], "cut short or damaged"),
        ("cut.safetensors", lambda whole: b"\x10\x00\x00\x00\x00\x00\x00\x00{", "not a readable safetensors"),
        ("empty.safetensors", lambda whole: b"", "not a readable safetensors"),
    ],
)
def test_a_broken_file_is_named_in_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content(example(PASST).read_bytes()))
    err = refused(tmp_path, tmp_path / name)
    assert name in err and any(part in err for part in said.split("|"))


def test_folders_missing_files_and_files_without_weights_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    assert "is a TorchScript program" in refused(tmp_path, tmp_path / "program.pt")
    assert "a folder, not a file; it holds program.pt" in refused(tmp_path, tmp_path)
    assert "no such file" in refused(tmp_path, tmp_path / "missing.pth")
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "bare.pth")
    assert "holds no tensors" in refused(tmp_path, tmp_path / "bare.pth")
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert "layer.weight" in refused(tmp_path, tmp_path / "other.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert "a list" in refused(tmp_path, tmp_path / "list.pth")


def test_unknown_tensors_are_refused_unless_allowed_and_then_reported(tmp_path):
    state, heads = official(PASST)
    state |= {"prompt": torch.zeros(3), "blocks.0.attn.scale": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pt")
    said = refused(tmp_path, tmp_path / "more.pt", f"num_heads={heads}")
    assert "2 tensors are not known (blocks.0.attn.scale, prompt)" in said or "prompt" in said
    _, report, _ = imported(state, tmp_path, f"num_heads={heads}", "allow_unknown=true", name="more.pt")
    dropped = {row["source"] for row in report["tensors"] if row["why"] == "not known, and allow_unknown=true"}
    assert dropped == {"prompt", "blocks.0.attn.scale"}


@pytest.mark.faults("C10")
@pytest.mark.parametrize("pattern", [PASST, AUDIOMAE, CLIP])
def test_a_missing_misshapen_or_damaged_tensor_is_named(pattern, tmp_path):
    state, heads = official(pattern)
    name = next(key for key in state if key.endswith("blocks.1.mlp.fc1.bias") and "student" not in key)
    changes = {"lack": None, "size": torch.zeros(3), "nan": state[name] * torch.nan}
    for what, value in changes.items():
        changed = {key: tensor for key, tensor in (state | {name: value}).items() if tensor is not None}
        torch.save({"state_dict": changed}, tmp_path / f"{what}.pth")
        said = refused(tmp_path, tmp_path / f"{what}.pth", f"num_heads={heads}")
        assert "blocks.1.mlp.fc1.bias" in said, said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("num_head=3", "did you mean num_heads?"),
        ("num_heads", "key=value"),
        ("num_heads=many", "a whole number"),
        ("num_heads=7", "does not split into 7 heads"),
        ("part=mother", "choose teacher, student"),
        ("part=teacher", "means nothing"),
        ("hop_ms=0", "above 0"),
        ("hop_ms=nan", "must be a number"),
        ("num_mels=64", "num_mels|mel bands"),
        ("floor_db=3", "no such setting"),
        ("positions=corrected", "choose cut or interpolated"),
        ("positions=cut", "give seconds"),
        ("overwrite=maybe", "true or false"),
        ("labels=none.txt", "no such file"),
        ("stride=7,7", "stride of 7"),
        ("seconds=100000", "more than 1000 times"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(word, said, tmp_path):
    words = [word] if word.startswith("num_heads") else [word, f"num_heads={official(PASST)[1]}"]
    err = refused(tmp_path, example(PASST), *words)
    assert any(part in err for part in said.split("|")), err


def test_an_export_is_never_half_replaced(tmp_path):
    state, heads = official(PASST)
    imported(state, tmp_path, f"num_heads={heads}", name="a.pt")
    (target,) = tmp_path.glob("ours-*")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    torch.save(state | {"prompt": torch.zeros(3)}, tmp_path / "b.pt")
    for words in ((tmp_path / "a.pt",), (tmp_path / "b.pt", "overwrite=true")):
        assert run(words[0], target, f"num_heads={heads}", *words[1:])[0] == 2
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert run(tmp_path / "a.pt", target, f"num_heads={heads}", "overwrite=true", "std=5")[0] == 0
    assert audiossl.load(target).frontend.scale == 10
    assert "needs no import" in run(target / "encoder.safetensors", tmp_path / "c")[2]


def test_what_a_file_says_of_itself_and_its_weights_contradict_is_said(tmp_path):
    state, heads = official(AUDIOMAE)
    args = argparse.Namespace(model="mae_vit_large_patch16", decoder_mode=1, patch_w=8, nb_classes=527)
    model, _, out = imported({"model": state, "args": args}, tmp_path, f"num_heads={heads}")
    said = " ".join(out.split())
    for part in ("width 1024 and depth 24", f"width {model.width} and depth 2", "patch_w=8; 16", "decoder_mode=1"):
        assert part in said
    assert "nb_classes" not in said, "without a classifier there is nothing to contradict"
    assert len(model.description["provenance"]["warnings"]) == 3


def test_audiomaes_positions_are_cropped_as_published_or_kept_cell_by_cell(tmp_path):
    state, heads = official(AUDIOMAE)
    source, words = example(AUDIOMAE), (f"num_heads={heads}", "seconds=2.56")
    for positions in ("published", "corrected"):
        assert run(source, tmp_path / positions, *words, f"positions={positions}")[0] == 0
    assert "have moved" in run(source, tmp_path / "default", *words)[1]
    tables = {name: audiossl.load(tmp_path / name).encoder.positions.table for name in ("published", "corrected")}
    table = state["pos_embed"]
    cropped = cut_positions(table, 8, 32, 16)[0, 1:].reshape(16, 8, -1).transpose(0, 1)
    kept = table[0, 1:].reshape(32, 8, -1)[:16].transpose(0, 1)
    torch.testing.assert_close(tables["published"], cropped, rtol=0, atol=1e-6)
    torch.testing.assert_close(tables["corrected"], kept, rtol=0, atol=0)
    assert not torch.allclose(cropped, kept)
    longer = run(source, tmp_path / "longer", f"num_heads={heads}", "seconds=10.24")
    assert longer[0] == 0 and audiossl.load(tmp_path / "longer").encoder.grid == (8, 64)


def test_learned_positions_are_cut_or_stretched(tmp_path):
    state, heads = official(CLIP)
    table = state["model.teacher.encoder.pos_embed"][:, 1:]
    words = (example(CLIP), f"num_heads={heads}")
    asked = {"cut": ("seconds=5",), "long": ("seconds=20",), "bent": ("seconds=5", "positions=interpolated")}
    for name, given in asked.items():
        assert run(words[0], tmp_path / name, words[1], *given)[0] == 0
    ours = {name: audiossl.load(tmp_path / name).encoder.positions.table for name in ("cut", "long", "bent")}
    assert torch.equal(ours["cut"], table[:, :125])
    torch.testing.assert_close(ours["bent"], interpolate_positions(table, 125), rtol=0, atol=0)
    torch.testing.assert_close(ours["long"], interpolate_positions(table, 500), rtol=0, atol=0)
    _, _, err = run(words[0], tmp_path / "no", words[1], "seconds=20", "positions=cut")
    assert "positions=interpolated" in err


@pytest.mark.parametrize(
    ("name", "columns", "words", "hop_ms", "frames"),
    [
        ("passt-s-f128-stfthop160-p16-s10.pt", 200, (), 5, 2000),
        ("passt-s-f128-stfthop100-p16-s10.pt", 320, (), 3.125, 3200),
        ("mine.pt", 320, (), 3.125, 3200),
        ("passt-s-f128-20sec-p16-s10.pt", 200, (), 10, 2000),
        ("mine.pt", 200, ("hop_ms=5",), 5, 2000),
        ("passt-s-f128-p16-s10.pt", 99, (), 10, 1000),
        ("mine.pt", 99, ("seconds=5",), 10, 500),
    ],
)
def test_the_variants_of_passt_with_shorter_hops_get_their_front_end(name, columns, words, hop_ms, frames, tmp_path):
    state, heads = official(PASST)
    width = state["cls_token"].shape[-1]
    state |= {
        "time_new_pos_embed": torch.randn(1, width, 1, columns),
        "freq_new_pos_embed": torch.zeros(1, width, 12, 1),
    }
    model, _, _ = imported(state, tmp_path, f"num_heads={heads}", *words, name=name)
    assert model.frontend.hop_samples == hop_ms * 32 and model.frontend.frames == frames
    assert model.encoder.stride == (10, 10)
    assert model(torch.zeros(1, 32000), rate_hz=32000).isfinite().all()


def test_half_precision_weights_become_single(tmp_path):
    state, heads = official(AUDIOMAE)
    half = {key: value.half() for key, value in state.items()}
    model, _, _ = imported({"model": half}, tmp_path, f"num_heads={heads}")
    assert {value.dtype for value in model.encoder.state_dict().values()} == {torch.float32}
    whole, _, _ = imported({"model": state}, tmp_path, f"num_heads={heads}")
    spectrogram = torch.randn(1, 1, 128, 512, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.tokens(spectrogram), whole.tokens(spectrogram), rtol=0, atol=0.05)


@pytest.mark.faults("C5")
def test_class_names_must_be_as_many_as_the_classes(tmp_path):
    state, heads = official(PASST)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    said = refused(tmp_path, example(PASST), f"num_heads={heads}", f"labels={tmp_path / 'names.txt'}")
    assert f"2 names, the classifier knows {state['head.1.weight'].shape[0]} classes" in said
    classes = ["index,mid,display_name", *(f'{n},/m/{n},"Sound, {n}"' for n in range(len(state["head.1.weight"])))]
    (tmp_path / "class_labels_indices.csv").write_text("\n".join(classes) + "\n")
    words = (f"num_heads={heads}", f"labels={tmp_path / 'class_labels_indices.csv'}")
    assert imported(state, tmp_path, *words)[0].labels[:2] == ["Sound, 0", "Sound, 1"]
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "of no layout that is known" in refused(tmp_path, tmp_path / "a.safetensors")
