"""What is made of scores: averages of suites, intervals over folds and seeds, frames on a grid, clips held out."""

from types import SimpleNamespace

import numpy as np
import pytest

from audiossl.probes.blocks import ClipFeatures
from audiossl.probes.compare import comparison
from audiossl.probes.differences import told_apart
from audiossl.probes.evaluation import hold_out
from audiossl.probes.moments import on_a_grid
from audiossl.probes.scores import Tested as OneFold
from audiossl.probes.scores import summarise


def result(task: str, domain: str | None, **scores: float) -> dict:
    rows = [
        {"source": name, "head": "sgd", "score": score, "low": None, "high": None, "normalised": score / 0.5}
        for name, score in scores.items()
    ]
    return {"task": {"name": task, "metric": "accuracy", "published": {}}, "domain": domain, "rows": rows}


def test_domains_are_averaged_where_every_set_was_probed():
    contents = [
        result("esc50", "events", a=0.8, b=0.6),
        result("us8k", "events", a=0.4),
        result("irmas", "music", a=0.5),
    ]
    titles, cells, _ = comparison(contents)
    table = {line[0]: dict(zip(titles, line, strict=True)) for line in cells}
    assert table["a"]["mean of events (2)"] == "0.600" and table["b"]["mean of events (2)"] == ""
    assert table["a"]["mean of music (1)"] == "0.500"
    assert table["a"]["normalised, mean of 3"] == f"{(1.6 + 0.8 + 1.0) / 3:.3f}"


def probed(head="linear", root="/sets/esc", source_hash="a", folds=("",), score=0.5, heads=None, **probe) -> dict:
    row = {"source": "run", "role": "encoder", "source_hash": source_hash, "head": head, "support_seconds": None}
    task = {"name": "folder", "metric": "accuracy", "published": {}, "hash": f"{root} {folds}", "folds": list(folds)}
    config = {"init": f"/{source_hash}/run", "task": {"root": root}, "probe": probe, "heads": heads or {}}
    rows = [row | {"score": score, "low": None, "high": None}]
    return {"task": task, "rows": rows, "config": config, "audiossl": "1"}


@pytest.mark.parametrize(
    ("others", "heads"),
    [
        ([dict(layers="last"), dict(layers=2)], ["linear, layers=last", "linear, layers=2"]),
        (
            [dict(aggregate="a", seeds=[0]), dict(aggregate="b", seeds=[1])],
            ["linear, aggregate=a", "linear, aggregate=b"],
        ),
        ([dict(heads={"linear": {"l2_grid": [n]}}) for n in (1, 2)], ["linear, l2_grid=[1]", "linear, l2_grid=[2]"]),
        ([dict(heads={"knn": {"neighbours": [n]}}) for n in (1, 2)], ["linear"]),
        (
            [dict(source_hash="a" * 50), dict(source_hash="b" * 50)],
            ["linear, hash=aaaaaaaa", "linear, hash=bbbbbbbb"],
        ),
        ([dict(cache_dir="x"), dict(cache_dir="y", num_resamples=9)], ["linear"]),
        ([dict(layers=1), dict(head="knn", layers=2)], ["linear", "knn"]),
    ],
)
def test_results_of_other_settings_are_rows_of_their_own(others, heads, caplog):
    _, cells, _ = comparison(told_apart([probed(**other) for other in others]))
    assert [line[1] for line in cells] == heads
    assert len(caplog.records) == (len(heads) == 1), "what is left out is said"


def test_sets_of_one_name_are_columns_of_their_own():
    roots = [
        dict(root="/sets/esc"),
        dict(root="/sets/esc"),
        dict(root="/sets/sed"),
        dict(root="/sets/sed", folds=("fold1",)),
    ]
    titles, cells, _ = comparison(told_apart([probed(**each, score=n / 10) for n, each in enumerate(roots)]))
    columns = ["folder: esc", "folder: sed, folds=none", "folder: sed, folds=fold1"]
    assert titles[2:] == [f"{column} (accuracy)" for column in columns]
    assert [line[2:] for line in cells] == [["0.100", "0.200", "0.300"]]
    moved = told_apart([probed(), probed(layers=2) | {"config": {"task": {"shards": "/elsewhere"}}}])
    assert [content["task"]["name"] for content in moved] == ["folder", "folder"], "the same set in two places"


def small_task(num: int = 60, classes: int = 3):
    labels = np.arange(num) % classes
    targets = np.eye(classes, dtype=np.float32)[labels]
    about = dict(kind="multiclass", metric="accuracy", known=None, name="t", targets=targets)
    return SimpleNamespace(targets_of=targets.__getitem__, **about), labels


def test_a_score_is_the_mean_over_folds_and_seeds_and_lies_in_its_interval():
    task, labels = small_task()
    rng, tested = np.random.default_rng(0), []
    for fold in (0, 1):
        for seed in (0, 1):
            clips = np.arange(fold * 30, fold * 30 + 30)
            scores = np.eye(3)[labels[clips]] + rng.normal(size=(30, 3))
            probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            tested.append(OneFold(f"fold{fold}", seed, clips, probabilities))
    right = [(one.probabilities.argmax(1) == labels[one.clips]).mean() for one in tested]
    found = summarise(task, tested, num_resamples=200)
    assert found["score"] == pytest.approx(np.mean(right)) and found["low"] < found["score"] < found["high"]
    assert found["folds"] == pytest.approx({"fold0": np.mean(right[:2]), "fold1": np.mean(right[2:])})
    assert found["std"] == pytest.approx(np.std([np.mean(right[::2]), np.mean(right[1::2])], ddof=1))
    wide = summarise(task, tested[:1], num_resamples=200)
    assert wide["high"] - wide["low"] > found["high"] - found["low"]


def test_clips_to_choose_on_are_of_every_class_and_come_from_the_training_clips_alone():
    task, labels = small_task()
    train = np.arange(10, 50)
    left, held = hold_out(train, task.targets, 0.2, is_exclusive=True)
    assert sorted([*left, *held]) == train.tolist() and set(labels[held]) == set(labels[left]) == {0, 1, 2}
    again = hold_out(train, task.targets, 0.2, is_exclusive=True)
    assert np.array_equal(again[1], held)


def test_moments_become_frames_of_the_nearest():
    middles = np.array([0.1, 0.3, 0.5, 0.1, 0.3], np.float32)
    features = ClipFeatures(None, np.array([0, 1, 2]), None, middles, np.array([0, 3, 5]), {}, 0, True)
    task = SimpleNamespace(seconds=np.array([0.8, 0.4]), clip_seconds=None)
    first, second = on_a_grid(task, features, np.array([0, 1]), np.arange(5.0)[:, None], 0.2)
    assert first[:, 0].tolist() == [0, 1, 2, 2] and second[:, 0].tolist() == [3, 4]
