"""Does an export hold all that its encoder needs, and refuse what would make it hear something else?"""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from maes import real_clips
from methods import CLASSES, build, compose_for
from safetensors.torch import load_file, save_file

import audiossl
from audiossl.errors import UserError
from audiossl.sound.waveform import resample
from audiossl.weights.export import export_encoder, hash_of, read_export
from audiossl.weights.origins import LICENCES

METHODS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
ALONE = {"atst_c2f": dict(teacher=None, distill_weight=0.0)}
PROVENANCE = {"init": "encoder starts from ImageNet weights", "licence": LICENCES["passt"], "git": "abc"}


def export(model: str, folder: Path) -> torch.nn.Module:
    """Export a small method as a run does; returns the method."""
    method = build(model, **ALONE.get(model, {})).eval()
    config = compose_for(model) | {"data": {"shards": "x", "mean": -8.0, "std": 5.0}}
    names = CLASSES if hasattr(method, "head") else None
    export_encoder(method, config, folder / "encoder.safetensors", vocabulary=names, provenance=PROVENANCE)
    return method


@pytest.fixture
def exported(tmp_path):
    export("passt", tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes) -> None:
    """Put another description into the header and beside it; None takes a key out."""
    path = folder / "encoder.safetensors"
    description = json.loads((folder / "encoder.json").read_text()) | changes
    description = {key: value for key, value in description.items() if value is not None}
    save_file(load_file(path), path, metadata={"description": json.dumps(description)})
    (folder / "encoder.json").write_text(json.dumps(description))


@pytest.mark.parametrize("model", METHODS)
def test_encoder_head_and_front_end_come_back_as_they_were(model, tmp_path):
    method = export(model, tmp_path)
    loaded = audiossl.load(tmp_path)
    clips = real_clips(2, 2.0)
    waveform = resample(clips, 16000, method.frontend.rate_hz)
    with torch.no_grad():
        spectrogram = method.frontend.eval()(waveform)
        assert torch.equal(loaded(waveform, method.frontend.rate_hz), method.encoder(spectrogram))
    assert not loaded.training and (loaded.head is None) == (not hasattr(method, "head"))
    if loaded.head is not None:
        ours, theirs = method.head.state_dict(), loaded.head.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
        assert loaded.labels == CLASSES and loaded.logits(spectrogram).shape == (2, len(CLASSES))


@pytest.mark.parametrize("model", METHODS)
def test_the_description_leaves_nothing_to_guess(model, tmp_path):
    method = export(model, tmp_path)
    description, tensors = read_export(tmp_path / "encoder.safetensors")
    assert description == json.loads((tmp_path / "encoder.json").read_text())
    frontend = compose_for(model)["frontend"]
    assert description["frontend"] == frontend and description["frontend_hash"] == hash_of(frontend)
    assert {"rate_hz", "window_ms", "hop_ms", "num_mels", "seconds", "_target_"} <= description["frontend"].keys()
    assert {"mean", "std"} <= frontend.keys() or {"min_db", "max_db"} <= frontend.keys(), "its normalisation"
    assert description["geometry"] == method.encoder.geometry and "positions" in description["geometry"]
    assert any(key.startswith("positions.") for key in tensors), "positions lie in the file"
    assert description["corpus"] == {"shards": "x", "mean": -8.0, "std": 5.0}
    assert description["licence"] == LICENCES["passt"] and description["provenance"] == PROVENANCE
    assert description["method"] == compose_for(model)["model"]["_target_"]


def test_another_rate_is_resampled_to_the_models(exported):
    model = audiossl.load(exported)
    clips = real_clips(2, 2.0)
    with torch.no_grad():
        tokens = model(clips, 16000)
        assert torch.equal(tokens, model(resample(clips, 16000, 32000), 32000))
        assert not torch.allclose(tokens, model(clips, 32000), atol=1e-3), "a rate that is not true is heard as such"


def test_a_front_end_that_was_changed_afterwards_is_refused(exported):
    frontend = json.loads((exported / "encoder.json").read_text())["frontend"]
    rewrite(exported, frontend=frontend | {"hop_ms": 5})
    with pytest.raises(UserError, match="front end was changed after the export"):
        audiossl.load(exported)


def test_a_json_that_differs_from_the_header_is_refused_and_none_is_fine(exported):
    path = exported / "encoder.json"
    path.write_text(path.read_text().replace('"num_mels": 128', '"num_mels": 64'))
    with pytest.raises(UserError, match="encoder.json: differs from the header"):
        audiossl.load(exported)
    path.write_text("{")
    with pytest.raises(UserError, match="encoder.json: its description is no JSON"):
        audiossl.load(exported)
    path.unlink()
    assert audiossl.load(exported).rate_hz == 32000


def test_a_newer_format_asks_for_an_upgrade_and_the_first_one_still_loads(exported):
    rewrite(exported, format=3)
    with pytest.raises(UserError, match="newer than this .*; upgrade"):
        audiossl.load(exported)
    before = load_file(exported / "encoder.safetensors")
    first = {key: value for key, value in before.items() if not key.startswith("head.")}
    save_file(first, exported / "encoder.safetensors")
    old = dict(format=1, frontend_hash=None, head=None, vocabulary=None, mask_padding=None, licence=None)
    rewrite(exported, **old)
    model = audiossl.load(exported)
    assert model.head is None and model.labels is None and not model.mask_padding
    assert all(torch.equal(value, first[key]) for key, value in model.encoder.state_dict().items())


@pytest.mark.parametrize(
    "target, said",
    [
        ("audiossl.plots.loss_figure", "is not allowed"),
        ("audiossl.encoder.Encoder", "is no front end; do not trust"),
        ("os.system", "is not allowed"),
    ],
)
def test_a_strangers_file_builds_a_front_end_and_nothing_else(exported, target, said):
    frontend = {"_target_": target, "path": str(exported / "written")}
    rewrite(exported, frontend=frontend, frontend_hash=hash_of(frontend))
    with pytest.raises(UserError, match=said):
        audiossl.load(exported)
    frontend = json.loads((exported / "encoder.json").read_text())["frontend"]
    nested = compose_for("passt")["frontend"] | {"seconds": frontend}
    rewrite(exported, frontend=nested, frontend_hash=hash_of(nested))
    with pytest.raises(UserError, match="do not trust"):
        audiossl.load(exported)
    assert not (exported / "written").exists()


def test_tensors_and_description_that_do_not_belong_together_are_one_line(exported):
    geometry = json.loads((exported / "encoder.json").read_text())["geometry"]
    rewrite(exported, geometry=geometry | {"width": 32})
    with pytest.raises(UserError, match="do not belong together"):
        audiossl.load(exported)
    rewrite(exported, geometry=geometry | {"colour": "red"})
    with pytest.raises(UserError, match="do not belong together .*colour"):
        audiossl.load(exported)
    rewrite(exported, geometry=None)
    with pytest.raises(UserError, match="its description lacks geometry"):
        audiossl.load(exported)


def test_an_export_is_the_same_bytes_each_time_and_for_whom_the_umask_lets(tmp_path):
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        before = os.umask(0o027)
        try:
            export("passt", tmp_path / name)
        finally:
            os.umask(before)
        found = sorted((tmp_path / name).iterdir())
        assert [path.name for path in found] == ["encoder.json", "encoder.safetensors"], "no part file stays"
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in found)
        files.append([path.read_bytes() for path in found])
    assert files[0] == files[1]
