"""An encoder goes to a hub and comes back, in processes of their own, from a server that speaks the hub's protocol."""

import json

import pytest
import torch
import yaml
from hubs import Hub, python
from methods import CLASSES, build, compose_for
from servers import Server

import audiossl
from audiossl.errors import UserError
from audiossl.weights.export import export_encoder
from audiossl.weights.modelcard import model_card
from audiossl.weights.origins import LICENCES

PUSH = 'import audiossl; print(audiossl.load("exported").push_to_hub("someone/tiny"))'
LOAD = """
import audiossl, torch
from audiossl.errors import UserError
for name, revision in {}:
    try:
        model = audiossl.load(name, revision=revision)
        print(model(torch.linspace(-0.5, 0.5, 32000)[None], 16000).double().sum().item(), model.description["audiossl"])
    except UserError as error:
        print("refused:", error)
"""
TINY = ("someone/tiny", None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Write the export of a small classifier, as a run that started from the authors' weights does."""
    folder = tmp_path_factory.mktemp("hub") / "exported"
    folder.mkdir()
    config = compose_for("passt") | {"data": {"shards": "/home/someone/corpus/shards", "mean": -8.0, "std": 5.0}}
    provenance = {"init": "encoder starts from PaSST's /home/someone/passt.pt: 9 tensors", "licence": LICENCES["passt"]}
    about = dict(vocabulary=CLASSES, provenance=provenance)
    export_encoder(build("passt"), config, folder / "encoder.safetensors", **about)
    return folder


@pytest.fixture(scope="module")
def hub(exported):
    """Start a hub and push the export to it from another process."""
    folder = exported.parent / "models"
    folder.mkdir()
    server = Server(folder, Hub)
    done = python(PUSH, server, exported.parent)
    assert done.returncode == 0 and "/someone/tiny/commit/" in done.stdout, done.stderr
    yield server
    server.stop()


def test_a_pushed_model_is_an_export_with_a_card_that_loads_it(hub, exported):
    pushed = hub.folder / "someone" / "tiny" / "main"
    assert {path.name for path in pushed.iterdir()} == {"encoder.safetensors", "encoder.json", "README.md"}
    assert (pushed / "encoder.safetensors").read_bytes() == (exported / "encoder.safetensors").read_bytes()
    assert "audiossl.load('someone/tiny')" in (pushed / "README.md").read_text()


def test_a_model_on_the_hub_loads_and_says_what_it_said_here(hub, exported, tmp_path):
    waveform = torch.linspace(-0.5, 0.5, 32000)[None]
    with torch.no_grad():
        here = audiossl.load(exported)(waveform, 16000).double().sum().item()
    hub.asked.clear()
    done = python(LOAD.format([TINY]), hub, tmp_path)
    assert done.stdout.split() == [str(here), audiossl.__version__], done.stderr
    assert hub.asked["encoder.safetensors"] and not hub.asked["README.md"], "only what is needed is fetched"
    offline = python(LOAD.format([TINY]), hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout, "what was loaded once loads without a network"


def test_a_folder_of_that_name_goes_before_the_hub(hub, exported, tmp_path):
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "tiny").symlink_to(exported)
    hub.asked.clear()
    loaded, refused = python(LOAD.format([TINY, ("someone/tiny", "main")]), hub, tmp_path).stdout.splitlines()
    assert audiossl.__version__ in loaded and not hub.asked
    assert refused == "refused: someone/tiny: is a path here, and revision=main is for models on the hub"


def test_what_cannot_be_loaded_is_one_line(hub, tmp_path):
    other = hub.folder / "someone" / "other" / "main"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"x")
    asked = {
        ("someone/none", None): "no such folder or file here, and no such model on http://localhost",
        ("someone/tiny", "none"): "has no revision none",
        ("someone/other", None): "audiossl did not export it: it holds no encoder.safetensors",
        ("runs/mine.safetensors", None): "no such file",
    }
    done = python(LOAD.format(list(asked)), hub, tmp_path)
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == len(asked), done.stdout + done.stderr
    for line, (who, said) in zip(lines, asked.items(), strict=True):
        assert line.startswith(f"refused: {who[0]}: ") and said in line


def test_a_hub_that_cannot_be_reached_is_one_line(hub, tmp_path):
    done = python(LOAD.format([TINY]), hub, tmp_path, HF_ENDPOINT="http://localhost:9")
    said = "refused: someone/tiny: no such folder or file here; http://localhost:9 cannot be reached"
    assert done.stdout.startswith(said) and done.stdout.count("\n") == 1, done.stdout + done.stderr


def test_a_saved_model_loads_as_it_was_and_its_card_tells_what_it_is(exported, tmp_path):
    model = audiossl.load(exported)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "encoder.safetensors").read_bytes() == (exported / "encoder.safetensors").read_bytes()
    again = type(model).from_pretrained(tmp_path / "saved")
    assert again.description == model.description and not again.training
    card = (tmp_path / "saved" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], head["license"], head["pipeline_tag"]) == (
        "audiossl",
        "cc-by-4.0",
        "audio-classification",
    )
    for said in (
        "LEARNED FROM LABELS",
        "rate_hz | 32000",
        f"{len(CLASSES)} classes",
        model.description["frontend_hash"],
    ):
        assert said in card
    assert "/home/someone" not in card and "corpus/shards" in card


def test_the_lines_of_the_card_run_as_they_stand(exported, tmp_path, monkeypatch):
    import soundfile

    soundfile.write(tmp_path / "clip.wav", torch.randn(44100, 2).numpy() * 0.1, 44100)
    monkeypatch.chdir(tmp_path)
    card = model_card(json.loads((exported / "encoder.json").read_text()), str(exported))
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)  # noqa: S102 (our own words)
    assert names["found"].frames.isfinite().all()


def test_a_card_without_a_known_licence_says_so(exported):
    description = json.loads((exported / "encoder.json").read_text()) | {"licence": None}
    assert "None is recorded" in model_card(description) and "license:" not in model_card(description)
    strange = {"name": "My own; terms", "source": None, "note": None}
    assert "license_name: My own-and-terms" in model_card(description | {"licence": strange})


def test_a_revision_of_a_path_is_refused(exported):
    with pytest.raises(UserError, match="revision=v1 is for models on the hub"):
        audiossl.load(exported, revision="v1")
