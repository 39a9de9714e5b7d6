"""Files that claim what they do not hold, places that cannot be written, and sizes nobody published."""

import re
import zipfile

import torch
from imports import example, imported, official, refused, run
from safetensors.torch import save_file

import audiossl

PASST, AUDIOMAE, CLIP = "passt_s16_short_mixed", "mae_pt_esc512", "atst_clip_varlen_train1"


def test_a_setting_given_twice_is_refused(tmp_path):
    assert "num_heads is given twice" in refused(tmp_path, example(PASST), "num_heads=4", "num_heads=2")


def test_shapes_that_claim_more_than_the_file_holds_build_no_model(tmp_path):
    state, heads = official(AUDIOMAE)
    wide = torch.zeros(1, 1, 1, 1).expand(10_000_000, 1, 16, 16)
    deep = {key.replace("blocks.1.", "blocks.100000000."): value for key, value in state.items()}
    kinds = (torch.ones(64).to_sparse(), torch.ones(64, device="meta"), torch.ones(64).cfloat())
    contents = {"claims shape": [state | {"patch_embed.proj.weight": wide}], "blocks.100000000.": [deep]}
    contents |= {"not a plain tensor": [state | {"norm.bias": value} for value in kinds]}
    contents |= {"holds int32": [state | {"norm.bias": torch.zeros_like(state["norm.bias"], dtype=torch.int32)}]}
    for said, files in contents.items():
        for content in files:
            torch.save({"model": content}, tmp_path / "odd.pth")
            assert said in refused(tmp_path, tmp_path / "odd.pth", f"num_heads={heads}")


def test_a_file_that_unpacks_to_far_more_than_it_is_is_not_unpacked(tmp_path):
    torch.save(official(PASST)[0], tmp_path / "ours.pt")
    with zipfile.ZipFile(tmp_path / "ours.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name) + bytes(10**7), compress_type=zipfile.ZIP_DEFLATED)
    assert "unpacks to more than it is" in refused(tmp_path, tmp_path / "bomb.pt")
    packed = bytearray((tmp_path / "bomb.pt").read_bytes())
    for entry in re.finditer(b"PK\x01\x02", bytes(packed)):
        packed[entry.start() + 6] = 99  # a zip version that Python cannot read and torch does not look at
    (tmp_path / "disguised.pt").write_bytes(packed)
    assert "damaged" in refused(tmp_path, tmp_path / "disguised.pt")


def test_nobody_is_told_to_let_a_broken_file_run_its_code(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "misnamed.pth")
    assert "weights_only" not in refused(tmp_path, tmp_path / "misnamed.pth")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("taken")
    for target in (tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        code, _, err = run(example(PASST), target, f"num_heads={official(PASST)[1]}")
        assert code == 2 and "cannot be made" in err and err.count("\n") == 1


def test_of_two_models_in_a_file_the_first_is_taken_and_the_other_named(tmp_path):
    state, heads = official(AUDIOMAE)
    other = {key: value + 1 for key, value in state.items()}
    model, _, out = imported({"model": state, "state_dict_ema": other}, tmp_path, f"num_heads={heads}")
    assert torch.equal(model.encoder.norm.bias, state["norm.bias"]) and "state_dict_ema" in out
    compiled = {f"_orig_mod.module.{key}": value for key, value in state.items()}
    assert torch.equal(
        imported({"model": compiled}, tmp_path, f"num_heads={heads}")[0].encoder.norm.bias, state["norm.bias"]
    )
    own = {f"net.{key}": value for key, value in official(PASST)[0].items()}
    twice = own | {key.replace("net.", "net._orig_mod."): value for key, value in own.items()}
    torch.save({"state_dict": twice}, tmp_path / "twice.ckpt")
    assert "net.cls_token" in refused(tmp_path, tmp_path / "twice.ckpt", f"num_heads={official(PASST)[1]}")


def test_positions_follow_a_shorter_hop(tmp_path):
    _, heads = official(CLIP)
    code, out, err = run(example(CLIP), tmp_path / "ours", f"num_heads={heads}", "hop_ms=2.5")
    assert code == 0 and "interpolated" in out, err
    model = audiossl.load(tmp_path / "ours")
    assert model(torch.zeros(1, 16000 * 8), rate_hz=16000).isfinite().all()


def test_a_stride_that_rows_do_not_tell_is_asked_for(tmp_path):
    state, heads = official(PASST)
    width = state["cls_token"].shape[-1]
    torch.save(state | {"freq_new_pos_embed": torch.zeros(1, width, 5, 1)}, tmp_path / "five.pt")
    words = (tmp_path / "five.pt", f"num_heads={heads}", "num_mels=64")
    assert "a stride of 12 or 10" in refused(tmp_path, *words)
    assert run(words[0], tmp_path / "ours", *words[1:], "stride=10")[0] == 0
