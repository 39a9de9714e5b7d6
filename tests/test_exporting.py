"""The command that hands an encoder on, after a real run that started from the authors' weights."""

import json
import subprocess
import sys

import pytest
import torch
from commands import TINY, environment, train
from conftest import golden_cases
from maes import real_clips
from methods import CLASSES, build, compose_for

import audiossl
from audiossl.__main__ import main
from audiossl.errors import UserError
from audiossl.weights import passt
from audiossl.weights.audiomae import import_pretrained
from audiossl.weights.export import export_encoder
from audiossl.weights.exporting import export
from audiossl.weights.reading import read_torch_file

SIZES = ["model.width=64", "model.depth=2", "model.num_heads=4", "model.decoder=global", "model.decoder_width=32"]
HEARD = ["frontend.num_mels=128", "frontend.seconds=0.64"]
SHORT = ["optim.warmup_epochs=null", "optim.warmup_ratio=0.1", "trainer.max_steps=2"]


def command(*arguments: str, cwd, expect: int = 0) -> str:
    """Run `python -m audiossl export ...`; returns what it printed."""
    words = [sys.executable, "-m", "audiossl", "export", *map(str, arguments)]
    env = environment(HF_HUB_OFFLINE="1")
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train two steps from the authors' file, as a user would."""
    (case,) = golden_cases("mae_pt_esc512")
    folder = tmp_path_factory.mktemp("handed_on")
    train(*TINY, *SIZES, *HEARD, *SHORT, f"init={case / 'official.pth'}", "name=mine", cwd=folder)
    return folder / "runs" / "mine"


def test_the_sources_licence_goes_with_the_run_its_export_and_what_starts_from_it(run):
    folder = run.parent.parent
    assert json.loads((run / "provenance.json").read_text())["licence"]["name"] == "CC-BY-NC-4.0"
    assert "licence: CC-BY-NC-4.0" in command(run, "out", cwd=folder)
    assert "license: cc-by-nc-4.0" in (folder / "out" / "README.md").read_text()
    train(*TINY, *SIZES, *HEARD, *SHORT, "init=out", "name=next", cwd=folder)
    description = audiossl.load(folder / "runs" / "next").description
    assert description["licence"]["name"] == "CC-BY-NC-4.0" and description["provenance"]["steps"] == 2
    said = train(*TINY, *SIZES, *HEARD, *SHORT, "init=out", "frontend.hop_ms=5", "name=no", cwd=folder, expect=2)
    assert "init=out: its weights heard frontend.hop_ms=10, this run's is 5" in said.splitlines()[-1]


def test_a_run_and_its_checkpoint_export_to_the_same_bytes(run, tmp_path):
    export(run, tmp_path / "a")
    export(run / "checkpoints" / "last.ckpt", tmp_path / "b")
    for name in ("encoder.safetensors", "encoder.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    clips = real_clips(1, 0.6)
    with torch.no_grad():
        assert torch.equal(audiossl.load(tmp_path / "a")(clips, 16000), audiossl.load(run)(clips, 16000))


def test_a_run_becomes_a_file_for_the_authors_code_decoder_and_all(run, tmp_path):
    said = command(run, "theirs.pth", "layout=audiomae", cwd=tmp_path)
    assert "decoder.predict.weight" in said and "licence: CC-BY-NC-4.0" in said
    heads = dict(num_heads=4, decoder_num_heads=2)
    weights, _ = import_pretrained(tmp_path / "theirs.pth", **heads)
    state = read_torch_file(run / "checkpoints" / "last.ckpt")["state_dict"]
    ours = {key.removeprefix("method."): value for key, value in state.items() if key.startswith("method.")}
    ours |= {key: value[:256] for key, value in ours.items() if ".predict." in key}  # the demo's model predicts levels
    assert weights.keys() == ours.keys() and all(torch.equal(value, ours[key]) for key, value in weights.items())
    said = export(run / "encoder.safetensors", tmp_path, layout="audiomae")
    assert said[0].startswith(str(tmp_path / "audiomae.pth")) and "no decoder" in said[1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["mine", "x", "layout=passt"], "layout=passt: this is an encoder of Audio-MAE; give layout=audiomae"),
        (["mine", "x", "layout=pass"], "layout=pass: choose one of audiossl, audiomae, atst, passt"),
        (["mine", "x", "kind=passt"], "kind=passt: no such setting"),
        (["mine", "mine"], "encoder.safetensors: exists already; give another place"),
        (["mine", "x.safetensors"], "give a folder"),
        (["none.ckpt", "x"], "none.ckpt: no such file"),
        (["nobody/none", "x"], "nobody/none: no such folder or file here"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(run, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(run.parent.glob("x*"))


def test_the_table_names_what_has_no_place_there(tmp_path):
    method = build("passt")
    config = compose_for("passt") | {"data": {"shards": "x", "mean": -8.0, "std": 5.0}}
    export_encoder(method, config, tmp_path / "encoder.safetensors", vocabulary=CLASSES)
    said = "\n".join(export(tmp_path, tmp_path / "theirs", layout="passt"))
    assert "head_dist.weight" in said and "no forward pass uses it" in said and "licence: none recorded" in said
    weights, _ = passt.import_pretrained(tmp_path / "theirs" / "passt.pt", num_heads=2)
    assert all(torch.equal(value, weights[key]) for key, value in method.state_dict().items())


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        export(run, tmp_path / "file" / "out")
