"""A start that failed binds nobody: the mended command takes the same folder, and nothing of the failed one."""

import pytest
from finetunes import clips_folder, encoder, predictions, run
from test_weak_exports import of_model
from tunings import FRAME, MAE, batch

from audiossl import load
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.weights.export import read_export

MOMENTS = ["model.level=frame", "model.pooling=columns"]
FAILS = ["optim.warmup_ratio=null", "optim.warmup_epochs=99"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Write a set twice; the second tests on what the first trains on."""
    place = tmp_path_factory.mktemp("sets")
    one, other = clips_folder(place / "one"), clips_folder(place / "other")
    text = (other / "meta.csv").read_text()
    (other / "meta.csv").write_text(text.replace("test", "?").replace("train", "test").replace("?", "train"))
    return one, other


@pytest.mark.parametrize("again", ["null", "last"])
def test_a_start_that_failed_leaves_neither_settings_nor_clips_nor_weights_behind(sets, tmp_path, again):
    (one, other), folder = sets, tmp_path / "run"
    first, second = encoder(tmp_path / "first", MAE), encoder(tmp_path / "second", MAE | {"depth": 2})
    with pytest.raises(UserError, match="warmup_epochs"):
        run(folder, first, one, *FAILS)
    assert (folder / "index.safetensors").exists() and not (folder / "finetune.yaml").exists()
    run(folder, second, other, f"ckpt={again}")
    index = Index.load(folder / "index.safetensors")
    tested = {index.key(clip) for clip in range(len(index)) if index.splits[index.column("split")[clip]] == "test"}
    assert "dog0" in tested and "dog2" not in tested
    assert read_export(folder / "start.safetensors")[0]["geometry"]["depth"] == 2 != MAE["depth"]
    with pytest.raises(UserError, match="was begun with other settings"):
        run(folder, second, one, "ckpt=last")


def test_moments_pooled_to_one_label_a_clip_learn_by_bce_unasked_and_say_so_on_their_card(sets, tmp_path):
    folder = tmp_path / "run"
    run(folder, encoder(tmp_path / "start", FRAME), sets[0], *MOMENTS, "model.weak_pooling=attention")
    model = load(folder)
    assert model.weak_pooling == "attention" and of_model(model, batch(2, num_classes=3)).shape == (2, 3)
    model.save_pretrained(tmp_path / "hub")
    assert "pools those of a clip (attention)" in (tmp_path / "hub" / "README.md").read_text()
    for init in (folder, tmp_path / "hub"):
        run(tmp_path / init.name / "again", init, sets[0], "evaluate=true")
        again = predictions(tmp_path / init.name / "again")
        assert (again["probabilities"] == predictions(folder)["probabilities"]).all()
