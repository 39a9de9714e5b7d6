"""Whole runs of a method that learns from labels, on the labelled clips of the demo set."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY, environment, metrics, train
from conftest import ROOT
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from toy_supervised import supervised_project

STEPS = 12
SETTINGS = [
    *(setting for setting in TINY if not setting.startswith("model.decoder")),
    "model=supervised",
    "model.num_heads=2",
    "data.batch_size=8",
    "data.validation_split=test",
    "data.validation_clips=0",
    "validate_every_steps=4",
    "checkpoint.every_steps=5",
    "checkpoint.keep_last=9",
    "checkpoint.metric=val_mAP",
    f"trainer.max_steps={STEPS}",
]
NUMBERS = ("val_mAP", "val_auc", "val_d_prime", "val_accuracy")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return supervised_project(tmp_path_factory.mktemp("project"))


def run(project: Path, *arguments: str, expect: int = 0) -> str:
    return train(*arguments, cwd=project.parent, expect=expect, script=project, fresh=True)  # a package of its own


@pytest.fixture(scope="module")
def finished(project) -> tuple[Path, str]:
    output = run(project, *SETTINGS, "name=one", "model.has_average=true")
    return project.parent / "runs" / "one", output


def per_class(folder: Path) -> list[dict[str, str]]:
    with open(folder / "per_class.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_validation_ends_in_numbers_a_table_and_the_best_checkpoint(finished):
    folder, output = finished
    assert "60 to validate on" in output and "246 clips left out for having no label" in output
    rows = [row for row in metrics(folder) if row["val_mAP"]]
    assert [row["step"] for row in rows] == ["3", "7", "11"] and all(row["val_loss"] for row in rows)
    assert all(row[f"{name}{suffix}"] for row in rows for name in NUMBERS for suffix in ("", "_swa"))
    (best,) = (folder / "checkpoints").glob("best-*.ckpt")
    highest = max(rows, key=lambda row: float(row["val_mAP"]))
    assert best.name.startswith(f"best-step={int(highest['step']) + 1:09d}-val_mAP=")
    classes = per_class(folder)
    assert len(classes) == 10 and {row["clips"] for row in classes} == {"6"}
    results = json.loads((folder / "results.json").read_text())
    for column, name in (("AP", "val_mAP"), ("AP_swa", "val_mAP_swa"), ("AUC", "val_auc")):
        mean = sum(float(row[column]) for row in classes) / 10
        assert results["scores"][name] == pytest.approx(mean) == pytest.approx(float(rows[-1][name]), rel=1e-5)
    assert results["scores"]["val_mAP"] != results["scores"]["val_mAP_swa"]
    counts = {"clips": 60, "classes": 10, "classes_without_a_clip": 0, "exact": True}
    assert results["validation"] == {"step": STEPS, **counts}
    worst = min(classes, key=lambda row: float(row["AP"]))
    assert "10 classes" in output and f"{float(worst['AP']):.3f}" in output.split("10 classes")[1]


REBUILD = """
import torch
from audiossl.sound.audio import decode, resample
from audiossl.batch import Batch
from audiossl.running.build import load_method
from audiossl.index import Index
from sklearn.metrics import average_precision_score

index = Index.load("demo/shards")
method, config = load_method("runs/one")
assert not method.training and method.head.out_features == len(index.vocabulary)
size = round(0.64 * 16000)
scores, targets = [], []
for i in index.select(split="test").tolist():
    waveform, rate_hz = decode(index.read(i))
    waveform = torch.from_numpy(resample(waveform, rate_hz, 16000))
    wanted = method.frontend.samples_for(method.frontend.frames)
    first = (len(waveform) - wanted) // 2
    with torch.no_grad():
        piece = waveform[None, first : first + wanted]
        scores.append(method.logits(Batch(piece, num_samples=torch.tensor([wanted])))[0])
    targets.append(torch.zeros(10).index_fill(0, torch.from_numpy(index.label_ids(i)).long(), 1))
print(average_precision_score(torch.stack(targets).numpy(), torch.stack(scores).numpy()))
"""


def test_a_checkpoint_alone_rebuilds_the_method_whose_score_was_logged(finished, project):
    """Read, cut and scored anew, clip by clip, with scikit-learn's own mean."""
    command = [sys.executable, "-c", REBUILD]
    done = subprocess.run(command, cwd=project.parent, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged = json.loads((finished[0] / "results.json").read_text())["scores"]["val_mAP"]
    assert float(done.stdout) == pytest.approx(logged, abs=0.01)


def test_the_vocabulary_goes_where_the_weights_go(finished):
    folder, _ = finished
    vocabulary = [row["class"] for row in per_class(folder)]
    assert "dog" in vocabulary and len(vocabulary) == 10
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["audiossl"]["provenance"]
    assert saved["vocabulary"] == vocabulary
    assert json.loads((folder / "encoder.json").read_text())["vocabulary"] == vocabulary
    assert saved["corpus_hash"] == json.loads((folder / "provenance.json").read_text())["corpus_hash"]


def test_resumed_equals_never_stopped_with_targets(finished, project):
    folder, _ = finished
    middle = folder / "checkpoints" / "step=000000005.ckpt"
    run(project, *SETTINGS, "name=two", "model.has_average=true", f"ckpt='{middle}'", "data.num_workers=2")
    two = project.parent / "runs" / "two"
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (folder, two))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    told = [[(r["step"], r["loss"], *(r[n] for n in NUMBERS)) for r in metrics(f)] for f in (folder, two)]
    assert told[1] == told[0][5:] and (folder / "per_class.csv").read_text() == (two / "per_class.csv").read_text()


def test_two_ranks_score_all_clips_as_one_process_does(finished, project):
    """57 clips in global batches of 14: of the last, which has one clip, a rank has none."""
    for name, devices, batch_size in (("single", 1, 14), ("pair", 2, 7)):
        run(project, *SETTINGS, f"name={name}", f"trainer.devices={devices}", f"data.batch_size={batch_size}",
            "trainer.max_steps=6", "data.validation_clips=57")  # fmt: skip
    single, pair = (project.parent / "runs" / name for name in ("single", "pair"))
    results = [json.loads((folder / "results.json").read_text()) for folder in (single, pair)]
    assert results[0]["validation"] == results[1]["validation"] and results[0]["validation"]["clips"] == 57
    for one, two in zip(per_class(single), per_class(pair), strict=True):
        assert one["clips"] == two["clips"] and float(one["AP"]) == pytest.approx(float(two["AP"]), rel=1e-3)
    told = [[float(row["val_mAP"]) for row in metrics(folder) if row["val_mAP"]] for folder in (single, pair)]
    assert len(told[0]) == 2 and told[0] == pytest.approx(told[1], rel=1e-3)
    assert len(list((pair / "checkpoints").glob("best-*.ckpt"))) == 1


def test_a_run_resumed_at_its_end_still_leaves_its_scores(finished, project):
    folder, _ = finished
    before = (folder / "per_class.csv").read_text()
    (folder / "per_class.csv").unlink()
    told = metrics(folder)
    run(project, *SETTINGS, "name=one", "model.has_average=true", "ckpt=last")
    assert (folder / "per_class.csv").read_text() == before
    assert [row["val_mAP"] for row in metrics(folder)][:-1] == [row["val_mAP"] for row in told][:-1]


def test_another_vocabulary_is_no_resume(finished, project, tmp_path):
    """The same shards, byte for byte, under an index that calls a class by another name."""
    for shard in (ROOT / "demo" / "shards").glob("*.tar"):
        (tmp_path / shard.name).symlink_to(shard)
    index = ROOT / "demo" / "shards" / "index.safetensors"
    with safe_open(index, "numpy") as file:
        meta = json.loads(file.metadata()["audiossl"])
    meta["vocabulary"] = ["hound" if name == "dog" else name for name in meta["vocabulary"]]
    save_file(load_file(index), tmp_path / "index.safetensors", metadata={"audiossl": json.dumps(meta)})
    arguments = [*SETTINGS, "name=one", "model.has_average=true", "ckpt=last", f"data.shards={tmp_path}"]
    output = run(project, *arguments, expect=2)
    assert "vocabulary: " in output and "corpus_hash: " in output


def test_shards_without_labels_are_refused_in_one_line(project, folder_shards):
    arguments = ["data=folder", f"data.shards={folder_shards}", *SETTINGS[:-1], "data.validation_split=null"]
    output = run(project, *arguments, "name=none", expect=2)
    assert "data.shards: none of 40 clips" in output and "meta.csv" in output


def test_a_method_that_needs_labels_gets_the_number_of_classes_from_the_shards_alone(project):
    output = run(project, *SETTINGS, "model.num_classes=5", "name=given", expect=2)
    assert "model.num_classes: is passed by the program" in output
