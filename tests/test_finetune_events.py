"""`finetune.py` on events: what it finds in test clips is what `detect` finds in the files."""

import csv

import numpy as np
import pytest
from finetunes import config_of, encoder, events_folder, predictions, run
from labelledsets import desed
from scipy.special import expit

from audiossl import load
from audiossl.detect import events_in
from audiossl.embeddings import file_blocks
from audiossl.scoring.events import raster, smooth
from audiossl.scoring.numbers import event_scores
from audiossl.scoring.thresholds import best_thresholds
from audiossl.tasks import load_task

EVENTS = ["tuning=events", "trainer.max_steps=30", "validate_every_steps=15", "test.median_frames=3", "optim.lr=3e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return events_folder(tmp_path_factory.mktemp("events"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("finished")
    run(place / "run", encoder(place / "encoder"), folder, *EVENTS)
    return place / "run"


@pytest.fixture(scope="module")
def task(finished, folder):
    return load_task(**config_of(finished, "x", folder, *EVENTS)["task"])


def moments(found: dict) -> list[np.ndarray]:
    assert found["logits"].dtype == np.float32
    return np.split(expit(found["logits"].astype(np.float64)), found["ends"][:-1])


def test_events_of_the_test_clips_are_those_that_detect_finds_in_the_files(finished, folder, task):
    with open(finished / "predictions.tsv", newline="") as file:
        written = {}
        for row in csv.DictReader(file, delimiter="\t"):
            written.setdefault(row["filename"], []).append((row["onset"], row["offset"], row["event_label"]))
    assert len(written) > 3
    model, found = load(finished), predictions(finished)
    for clip, probabilities in zip(found["clips"].tolist(), moments(found), strict=True):
        name = f"test/{task.keys[clip].removeprefix('test%2F')}.wav"
        events, theirs, seconds = events_in(model, file_blocks(folder / name, model), overlap=0.5)
        assert seconds == 2.0 and theirs.shape == probabilities.shape
        np.testing.assert_allclose(probabilities, theirs, rtol=0, atol=1e-5)
        told = [(f"{e.onset_seconds:.3f}", f"{e.offset_seconds:.3f}", model.labels[e.label_id]) for e in events]
        assert told == written.get(name, [])


def test_the_scores_are_those_of_the_predictions(finished, task):
    import json

    found = predictions(finished)
    events = [task.events[clip] for clip in found["clips"]]
    how = dict(frame_seconds=found["frame_seconds"], thresholds=found["thresholds"], median_frames=3)
    numbers = event_scores(moments(found), events, task.seconds[found["clips"]], **how)
    scores = json.loads((finished / "results.json").read_text())["scores"]
    assert {name: scores[name] for name in numbers} == pytest.approx(numbers, nan_ok=True)
    assert scores["score"] == scores["event_f1"] > 0.2


def test_thresholds_are_tuned_on_the_smoothed_moments_of_the_validation_clips(finished, folder, task, tmp_path):
    swapped = ["task.test_splits=[val]", "task.validation_splits=[test]", "evaluate=true", "test.median_frames=3"]
    run(tmp_path / "run", finished, folder, *swapped)
    there = predictions(tmp_path / "run")
    how = dict(frame_seconds=there["frame_seconds"], num_classes=2)
    targets = [
        raster(task.events[clip], num_frames=len(of), **how)
        for clip, of in zip(there["clips"].tolist(), moments(there), strict=True)
    ]
    smoothed = np.concatenate([smooth(of, 3) for of in moments(there)])
    np.testing.assert_allclose(predictions(finished)["thresholds"], best_thresholds(smoothed, np.concatenate(targets)))
    assert load(finished).description["decisions"]["median_frames"] == 3


def test_moments_that_are_validated_are_called_so(finished, capsys):
    import json

    about = json.loads((finished / "results.json").read_text())["validation"]
    assert about["moments"] == 6 * 6 and "clips" not in about  # six clips, six columns of a crop of .96 s
    assert (finished / "per_class.csv").read_text().startswith("class,moments,")


def test_clips_with_labels_but_no_times_teach_by_their_labels(folder, tmp_path):
    """As DESED has them."""
    desed(tmp_path / "set")
    given = ["task=desed", "task.classes=null", "task.empty_classes=allow", "task.clip_seconds=null"]
    run(tmp_path / "run", encoder(tmp_path / "encoder"), tmp_path / "set", *EVENTS, *given,
        "model.weak_pooling=linear_softmax", "trainer.max_steps=4")  # fmt: skip
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert all(float(row["weak_loss"]) > 0 and float(row["frame_loss"]) > 0 for row in rows)
