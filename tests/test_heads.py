"""Heads on arrays: equal to scikit-learn, blind to the test clips, and able to learn what they are for."""

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from audiossl.heads.examples import Examples, Split
from audiossl.heads.fitting import NetSettings, fit
from audiossl.heads.linear import knn, linear
from audiossl.heads.quality import mean_average_precision

NETS = {
    name: section
    for name, section in yaml.safe_load((ROOT / "conf/probe.yaml").read_text())["heads"].items()
    if name not in ("linear", "knn")
}
QUICK = dict(max_epochs=30, hidden_width=32, batch_size=64, patience=None)


def net(name: str, **changes) -> NetSettings:
    return NetSettings(**(NETS[name] | QUICK | {"over": "clip"} | changes))


def clips(num: int = 200, width: int = 20, classes: int = 4, apart: float = 0.6, seed: int = 0):
    """Draw features (num, width) of different scales around a mean per class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=num)
    means = rng.normal(size=(classes, width)) * apart
    features = (rng.normal(size=(num, width)) + means[labels]) * rng.uniform(0.1, 5, width) + rng.normal(size=width)
    return features.astype(np.float32), labels


def examples_of(features, targets, *, known=None, is_exclusive=True) -> Examples:
    rows = features[:, None] if features.ndim == 2 else features
    return Examples(rows, np.arange(len(targets) + 1), np.asarray(targets, np.float32), known, is_exclusive)


def folds(num: int, count: int = 4) -> list[Split]:
    fold = np.arange(num) % count
    parts = [(f, (f + 1) % count) for f in range(count)]
    return [
        Split(*(np.flatnonzero(part) for part in ((fold != t) & (fold != v), fold == v, fold == t))) for t, v in parts
    ]


def accuracy(found, splits, labels) -> float:
    return np.mean(
        [(one.probabilities.argmax(1) == labels[s.test]).mean() for one, s in zip(found, splits, strict=True)]
    )


@pytest.mark.parametrize("l2", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("num", [60, 400])
def test_multinomial_regression_of_all_folds_at_once_is_scikit_learns(num, l2):
    features, labels = clips(num)
    splits = folds(num)
    found = linear(examples_of(features, np.eye(4)[labels]), splits, l2_grid=[l2])
    for split, one in zip(splits, found, strict=True):
        rows = np.concatenate([split.train, split.validation])
        scaler = StandardScaler().fit(features[rows].astype(float))
        theirs = LogisticRegression(C=1 / l2, max_iter=20000, tol=1e-10).fit(
            scaler.transform(features[rows].astype(float)), labels[rows]
        )
        wanted = theirs.predict_proba(scaler.transform(features[split.test].astype(float)))
        assert np.abs(one.probabilities - wanted).max() < 1e-3


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_features_too_large_for_float64_are_read_in_pieces_to_the_same_head(monkeypatch, tmp_path, is_exclusive):
    features, labels = clips(300)
    features[:, 3] = 2.5  # constant
    np.save(tmp_path / "features.npy", features)
    mapped, targets = np.load(tmp_path / "features.npy", mmap_mode="c"), np.eye(4)[labels]
    whole, pieces = (examples_of(some, targets, is_exclusive=is_exclusive) for some in (features, mapped))
    expected = linear(whole, folds(300), l2_grid=[0.1, 1.0], with_validation=True)
    monkeypatch.setattr("audiossl.heads.linear.VALUES_IN_FLOAT64", 0)
    monkeypatch.setattr("audiossl.heads.lbfgs.VALUES_AT_ONCE", 70 * 20)
    found = linear(pieces, folds(300), l2_grid=[0.1, 1.0], with_validation=True)
    for one, other in zip(found, expected, strict=True):
        assert one.chosen == other.chosen
        assert np.allclose(one.probabilities, other.probabilities, atol=1e-6)
        assert np.allclose(one.validation, other.validation, atol=1e-6)


def test_one_against_the_rest_is_scikit_learns_on_the_labels_that_are_known():
    features, _ = clips(300)
    rng = np.random.default_rng(1)
    targets, known = rng.random((300, 3)) < 0.4, rng.random((300, 3)) < 0.7
    split = folds(300)[0]
    (found,) = linear(examples_of(features, targets, known=known, is_exclusive=False), [split], l2_grid=[1.0])
    rows = np.concatenate([split.train, split.validation])
    scaler = StandardScaler().fit(features[rows].astype(float))
    for label in range(3):
        own = rows[known[rows, label]]
        theirs = LogisticRegression(C=1.0, max_iter=20000, tol=1e-10).fit(
            scaler.transform(features[own].astype(float)), targets[own, label]
        )
        wanted = theirs.predict_proba(scaler.transform(features[split.test].astype(float)))[:, 1]
        assert np.abs(found.probabilities[:, label] - wanted).max() < 1e-3


def test_neighbours_vote_as_scikit_learns_do():
    features, labels = clips()
    (split,) = folds(200)[:1]
    (found,) = knn(examples_of(features, np.eye(4)[labels]), [split], neighbours=[5])
    rows = np.concatenate([split.train, split.validation])
    scaler = StandardScaler().fit(features[rows])
    theirs = KNeighborsClassifier(5, metric="cosine").fit(scaler.transform(features[rows]), labels[rows])
    assert np.allclose(found.probabilities, theirs.predict_proba(scaler.transform(features[split.test])))


@pytest.mark.parametrize("head", ["linear", "knn", *NETS])
def test_no_head_sees_the_labels_or_the_company_of_its_test_clips(head):
    features, labels = clips(120)
    targets, split = np.eye(4)[labels], folds(120)[1]

    def run(features, targets, split):
        examples = examples_of(features, targets)
        if head in NETS:
            return fit(examples, [split], net(head, lr=[0.01], max_epochs=5), seed=0)[0].probabilities
        settings = {"l2_grid": [0.1, 10.0]} if head == "linear" else {"neighbours": [1, 5]}
        return {"linear": linear, "knn": knn}[head](examples, [split], **settings)[0].probabilities

    before = run(features, targets, split)
    wrong, other = targets.copy(), features.copy()
    wrong[split.test] = np.roll(targets[split.test], 1, axis=1)
    other[split.test[1:]] += 100
    assert np.array_equal(before, run(features, wrong, split))
    assert np.allclose(before[0], run(other, targets, split)[0], atol=1e-6)


@pytest.mark.parametrize("head", NETS)
def test_every_head_by_gradient_steps_learns_and_knows_its_seed(head):
    features, labels = clips(apart=1.0)
    examples, splits = examples_of(features, np.eye(4)[labels]), folds(200)
    first, again, other = (fit(examples, splits, net(head), seed=seed) for seed in (0, 0, 1))
    assert accuracy(first, splits, labels) > 0.75
    for one, same in zip(first, again, strict=True):
        assert np.array_equal(one.probabilities, same.probabilities)
        assert np.allclose(one.probabilities.sum(1), 1)
    assert any(not np.array_equal(a.probabilities, b.probabilities) for a, b in zip(first, other, strict=True))


def test_folds_fitted_together_are_the_folds_fitted_alone():
    features, labels = clips(160)
    examples, splits = examples_of(features, np.eye(4)[labels]), folds(160)
    together = linear(examples, splits, l2_grid=[0.1, 1.0, 10.0])
    for split, one in zip(splits, together, strict=True):
        (alone,) = linear(examples, [split], l2_grid=[0.1, 1.0, 10.0])
        assert alone.chosen == one.chosen and np.abs(alone.probabilities - one.probabilities).max() < 1e-4


def needles(num: int = 240, bag: int = 5, seed: int = 0):
    """Hide what tells the class in one row of each bag, marked by its first value, and in the second layer only."""
    features, labels = clips(num, apart=1.5, seed=seed)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num * bag, 3, features.shape[1])).astype(np.float32)
    where = np.arange(num) * bag + rng.integers(bag, size=num)
    rows[where, 1] = (features - features.mean(0)) / features.std(0)
    rows[where, 1, 0] += 8
    return Examples(rows, np.arange(num + 1) * bag, np.eye(4, dtype=np.float32)[labels], None, True), labels


def test_attention_finds_the_row_and_a_weighted_sum_the_layer_that_tell():
    examples, labels = needles()
    splits, steps = folds(240), dict(max_epochs=40, lr=[0.01, 0.03])
    plain = fit(examples, splits, net("weighted", weighted=False, **steps), seed=0)
    attentive = fit(examples, splits, net("weighted", weighted=False, attention=True, **steps), seed=0)
    both = fit(examples, splits, net("weighted", weighted=True, attention=True, **steps), seed=0)
    scores = [accuracy(found, splits, labels) for found in (plain, attentive, both)]
    assert scores[0] + 0.1 < scores[1] and scores[1] < scores[2]


def test_a_rate_that_diverges_spoils_no_other():
    features, labels = clips(apart=1.0)
    examples, splits = examples_of(features, np.eye(4)[labels]), folds(200)
    found = fit(examples, splits, net("sgd", lr=[1e38, 0.01]), seed=0)
    assert {one.chosen["lr"] for one in found} == {0.01} and accuracy(found, splits, labels) > 0.6


def test_quick_average_precision_is_scikit_learns_with_ties_and_unknown_labels():
    rng = np.random.default_rng(0)
    scores, targets = np.round(rng.random((300, 5)), 1), (rng.random((300, 5)) < 0.3).astype(float)
    targets[:, 2], known = 0, rng.random((300, 5)) < 0.5
    wanted = [average_precision_score(targets[known[:, c], c], scores[known[:, c], c]) for c in range(5) if c != 2]
    found = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets), torch.from_numpy(known))
    assert found == pytest.approx(np.mean(wanted), abs=1e-12)
