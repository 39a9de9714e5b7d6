"""`finetune.py` on every kind of task: several labels, unknown ones, events, weak labels, long and damaged clips."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from atsts import large_cases
from conftest import ROOT
from finetunes import (
    CLASSES,
    RATE_HZ,
    clips_folder,
    config_of,
    encoder,
    events_folder,
    predictions,
    recordings,
    results,
    run,
)
from labelledsets import table
from sklearn.metrics import average_precision_score
from tunings import FRAME

from audiossl import load
from audiossl.__main__ import main
from audiossl.errors import UserError
from audiossl.labelled.columns import Ragged
from audiossl.scoring.thresholds import best_thresholds
from audiossl.tasks import load_task

SEVERAL = ["task.kind=multilabel"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clips_folder(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    return events_folder(tmp_path_factory.mktemp("events"))


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("encoder"))


def task_of(place, init, folder, *overrides):
    return load_task(**config_of(place, init, folder, *overrides)["task"])


def openmic(root):
    """Write a set in OpenMIC's layout of which somebody judged two labels of three, each clip others."""
    rows, parts = [], {"train": [], "test": []}
    for kind, name in enumerate(CLASSES):
        for number, samples in enumerate(recordings(name)):
            key = f"{kind}{number:05d}_0"
            (root / "audio" / key[:3]).mkdir(parents=True, exist_ok=True)
            soundfile.write(root / "audio" / key[:3] / f"{key}.ogg", samples, RATE_HZ)
            rows += [(key, name, 0.9, 3), (key, CLASSES[(kind + 1 + number % 2) % 3], 0.1, 3)]
            parts["test" if number % 3 == 2 else "train"].append(key)
    table(root, "openmic-2018-aggregated-labels.csv", ("sample_key", "instrument", "relevance", "num_responses"), *rows)
    for part, keys in parts.items():
        table(root, f"partitions/split01_{part}.csv", *((key,) for key in keys))


def test_labels_that_nobody_judged_count_nowhere(init, tmp_path):
    openmic(tmp_path / "set")
    given = ["task=openmic", "task.validation=0.3"]
    content = run(tmp_path / "run", init, tmp_path / "set", *given)
    task, found = task_of(tmp_path / "run", init, tmp_path / "set", *given), predictions(tmp_path / "run")
    known, targets = task.known[found["clips"]], task.targets[found["clips"]]
    assert known.mean() == pytest.approx(2 / 3)
    aps = [average_precision_score(targets[k, c], found["probabilities"][k, c]) for c, k in enumerate(known.T)]
    assert content["scores"]["mAP"] == pytest.approx(np.mean(aps))
    blind = [average_precision_score(targets[:, c], found["probabilities"][:, c]) for c in range(3)]
    assert np.mean(blind) != pytest.approx(np.mean(aps))
    with open(tmp_path / "run" / "per_class.csv", newline="") as file:
        assert [float(row["AP"]) for row in csv.DictReader(file)] == pytest.approx(aps, rel=1e-5)


def test_what_nobody_judged_changes_neither_loss_nor_validation_nor_thresholds(init, tmp_path, monkeypatch):
    """Two sets that differ in the unknown labels alone: the same run."""
    openmic(tmp_path / "set")
    given = ["task=openmic", "task.validation=0.3"]
    run(tmp_path / "run", init, tmp_path / "set", *given)
    real = load_task

    def flipped(**settings):
        task = real(**settings)
        ids = [
            np.flatnonzero(row | ~known).astype(np.int32)
            for row, known in zip(task.targets > 0, task.known, strict=True)
        ]
        return replace(task, labels=Ragged.of(ids))

    monkeypatch.setattr("audiossl.tuning.runs.load_task", flipped)
    run(tmp_path / "flipped", init, tmp_path / "set", *given)
    ours, theirs = predictions(tmp_path / "run"), predictions(tmp_path / "flipped")
    assert np.array_equal(ours["probabilities"], theirs["probabilities"])
    assert np.array_equal(ours["thresholds"], theirs["thresholds"]) and len(set(ours["thresholds"])) > 1
    first, second = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("run", "flipped"))
    header = first[0].split(",")
    kept = [n for n, name in enumerate(header) if name.startswith(("loss", "val_"))]
    assert {"val_mAP", "val_loss"} <= {header[n] for n in kept}
    for ours, theirs in zip(first, second, strict=True):
        assert [ours.split(",")[n] for n in kept] == [theirs.split(",")[n] for n in kept]


def test_thresholds_of_several_labels_are_tuned_on_the_validation_clips(folder, init, tmp_path):
    run(tmp_path / "run", init, folder, *SEVERAL)
    task, found = task_of(tmp_path / "run", init, folder, *SEVERAL), predictions(tmp_path / "run")
    run(tmp_path / "again", tmp_path / "run", folder, *SEVERAL, "evaluate=true", "task.test_splits=[val]",
        "task.validation_splits=[test]")  # fmt: skip
    there = predictions(tmp_path / "again")
    expected = best_thresholds(there["probabilities"], task.targets[there["clips"]])
    np.testing.assert_allclose(found["thresholds"], expected)
    decisions = load(tmp_path / "run").description["decisions"]
    assert decisions == {"thresholds": found["thresholds"].tolist(), "median_frames": 7}
    fixed = run(tmp_path / "fixed", init, folder, *SEVERAL, "test.thresholds=0.9")
    assert predictions(tmp_path / "fixed")["thresholds"] == 0.9
    assert fixed["scores"]["mAP"] == results(tmp_path / "run")["scores"]["mAP"]
    assert fixed["scores"]["macro_f1"] != results(tmp_path / "run")["scores"]["macro_f1"]


@pytest.mark.parametrize("pooling", ["max", "average", "linear_softmax", "exponential_softmax", "attention"])
def test_moments_learn_from_labels_of_clips_by_every_pooling(folder, init, pooling, tmp_path):
    weak = [*SEVERAL, "tuning=events", f"model.weak_pooling={pooling}", "trainer.max_steps=30"]
    content = run(tmp_path / "run", init, folder, *weak)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < 0.95 * losses[0] and math.isfinite(content["scores"]["mAP"])
    again = ["evaluate=true", *SEVERAL]
    same = run(tmp_path / "again", tmp_path / "run", folder, *again)["scores"]
    assert same == {name: content["scores"][name] for name in same} and len(same) > 5


def test_clips_longer_than_the_model_listens_are_heard_whole(init, tmp_path):
    long = clips_folder(tmp_path / "long", seconds=2.5)
    whole = run(tmp_path / "run", init, long)
    tested = load(tmp_path / "run")
    task, found = task_of(tmp_path / "run", init, long), predictions(tmp_path / "run")
    for clip, probabilities in zip(found["clips"].tolist(), found["probabilities"], strict=True):
        wave = torch.from_numpy(task.waveform(clip, RATE_HZ))
        starts = [*range(0, len(wave) - 15600, 3 * 2560), -(-(len(wave) - 15600) // 2560) * 2560]
        pieces = [wave[start : start + 15600] for start in sorted(set(starts))]
        assert len(pieces) > 2 and starts[-1] + 15600 >= len(wave)
        with torch.no_grad():
            parts = [torch.nn.functional.pad(piece, (0, 15600 - len(piece)))[None] for piece in pieces]
            lengths = [torch.tensor([len(piece)]) for piece in pieces]
            logits = [tested.logits(tested.frontend(p, num_samples=n)) for p, n in zip(parts, lengths, strict=True)]
        expected = torch.cat(logits).mean(0).softmax(0)
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
    again = ["evaluate=true"]
    other = run(tmp_path / "one", tmp_path / "run", long, *again, "test.batch_size=1")
    assert other["scores"] == pytest.approx({name: whole["scores"][name] for name in other["scores"]}, abs=1e-6)
    run(tmp_path / "middle", tmp_path / "run", long, *again, "test.overlap=null")
    clip, start = int(found["clips"][0]), (40000 - 15600) // 2
    wave = torch.from_numpy(task.waveform(clip, RATE_HZ))[None, start : start + 15600]
    with torch.no_grad():
        middle = tested.logits(tested.frontend(wave)).softmax(1)[0]
    np.testing.assert_allclose(predictions(tmp_path / "middle")["probabilities"][0], middle, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("seconds", "frames"), [(1.92, 192), (0.64, 64)])
@pytest.mark.parametrize("model", ["audiomae", "atst"])
def test_an_encoder_hears_clips_of_another_length(model, seconds, frames, folder, tmp_path):
    init = encoder(tmp_path / "encoder", **({} if model == "audiomae" else {"geometry": FRAME}))
    run(tmp_path / "run", init, folder, f"frontend.seconds={seconds}", "data.mean=-5", "data.std=3")
    found = load(tmp_path / "run")
    assert found.frontend.frames == frames and found.encoder.geometry["frames"] == frames
    assert found.description["frontend"]["mean"] == -5 and found.description["frontend"]["std"] == 3
    same, before = (
        run(tmp_path / "again", tmp_path / "run", folder, "evaluate=true")["scores"],
        results(tmp_path / "run"),
    )
    assert same == {name: before["scores"][name] for name in same} and len(same) > 5


@pytest.mark.parametrize("source", ["run", "export", "checkpoint"])
def test_a_training_starts_from_a_run_its_export_or_its_checkpoint(source, folder, init, tmp_path):
    run(tmp_path / "first", init, folder, "test.weights=last")
    files = {"run": "", "export": "encoder.safetensors", "checkpoint": "checkpoints/last.ckpt"}
    run(tmp_path / "second", tmp_path / "first" / files[source], folder, "trainer.max_steps=1")
    first, second = load(tmp_path / "first").encoder, load(tmp_path / "second" / "start.safetensors").encoder
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("pattern", ["mae_ft_*", "passt_s10_eval*", "atst_c2f_as*"])
def test_a_training_starts_from_published_weights(pattern, folder, tmp_path):
    for case in large_cases(pattern):
        num_heads = json.loads((case / "case.json").read_text())["config"]["num_heads"]
        (official,) = case.glob("official.*")
        assert main(["import", str(official), str(tmp_path / case.name), f"num_heads={num_heads}"]) == 0
        how = ["trainer.max_steps=1", "frontend.seconds=1"]
        content = run(tmp_path / f"{case.name}_run", tmp_path / case.name, folder, *how)
        assert content["status"] == "finished" and len(predictions(tmp_path / f"{case.name}_run")["clips"]) == 12
        assert load(tmp_path / f"{case.name}_run").labels == CLASSES


def test_silence_is_tested_and_a_clip_that_cannot_be_read_is_told_and_left_out(folder, init, tmp_path):
    broken = clips_folder(tmp_path / "set")
    soundfile.write(broken / "audio" / "dog2.wav", np.zeros(RATE_HZ, np.float32), RATE_HZ)
    soundfile.write(broken / "audio" / "dog5.wav", np.full(RATE_HZ, np.nan, np.float32), RATE_HZ, subtype="FLOAT")
    content = run(tmp_path / "run", init, broken, "task.max_bad_fraction=0.2")
    keys = [row["key"] for row in csv.DictReader(open(tmp_path / "run" / "predictions.csv", newline=""))]
    found = predictions(tmp_path / "run")["probabilities"]
    assert "dog2" in keys and np.isfinite(found).all() and "dog5" not in keys and len(keys) == 11
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scores"]["score"] == content["scores"]["score"]


def test_a_clip_that_turns_out_damaged_only_when_it_is_heard_is_in_the_results(folder, init, tmp_path, monkeypatch):
    from audiossl.sound.audio import AudioError
    from audiossl.tasks import Task

    real = Task.waveform

    def waveform(task, clip, rate_hz):
        if task.keys[clip] == "dog2":
            raise AudioError("cut off")
        return real(task, clip, rate_hz)

    monkeypatch.setattr(Task, "waveform", waveform)
    content = run(tmp_path / "run", init, folder)
    assert content["bad_clips"] == {"dog2": "cut off"} == results(tmp_path / "run")["bad_clips"]
    assert len(predictions(tmp_path / "run")["clips"]) == 11


def test_a_student_learns_from_a_fine_tuned_teacher(folder, init, tmp_path):
    run(tmp_path / "teacher", init, folder)
    taught = [f"model.teacher={tmp_path / 'teacher'}", "model.distill_weight=0.5"]
    run(tmp_path / "student", init, folder, *taught)
    with open(tmp_path / "student" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    for row in rows:
        parts = float(row["distill_loss"]), float(row["label_loss"])
        assert float(row["loss"]) == pytest.approx(sum(parts) / 2, rel=1e-4)
    assert not any(name.startswith("teacher") for name in load(tmp_path / "student").state_dict())
    with pytest.raises(UserError, match="other classes|names 3 classes"):
        run(tmp_path / "other", init, ROOT, "task.shards=demo/shards", "task.root=null", *taught)
