"""Class metrics equal the published ones, and say nothing where nothing can be said."""

import math
import statistics

import numpy as np
import pytest
from conftest import golden_cases
from safetensors.numpy import load_file

from audiossl.metrics import accuracy, d_prime, score_classes


@pytest.mark.parametrize("folder", golden_cases("metrics_*"))
def test_golden_metrics(folder):
    given, expected = load_file(folder / "input.safetensors"), load_file(folder / "expected.safetensors")
    found = score_classes(given["scores"], given["targets"])
    ours = {"AP": found.average_precision, "AUC": found.auc, "mAP": found.mean_average_precision}
    ours |= {
        "mAUC": found.mean_auc,
        "d_prime": found.d_prime,
        "acc_argmax": accuracy(given["scores"], given["targets"]),
    }
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_average_precision_by_hand():
    """Ranked + - + -: precision 1 at recall 1/2 and 2/3 at recall 1; 3 of the 4 pairs are in order."""
    found = score_classes([[4.0], [3.0], [2.0], [1.0]], [[1], [0], [1], [0]])
    assert found.average_precision[0] == pytest.approx((1 + 2 / 3) / 2, abs=1e-12) and found.auc[0] == 0.75


def test_equal_scores_share_a_threshold():
    """What order ties come in must not matter: all equal is chance."""
    for targets in ([1, 0, 0, 0], [0, 0, 0, 1]):
        found = score_classes(np.zeros((4, 1)), np.array(targets)[:, None])
        assert found.average_precision[0] == 0.25 and found.auc[0] == 0.5 and found.d_prime == 0


def test_classes_without_a_clip_are_left_out_and_counted():
    rng = np.random.default_rng(0)
    scores, targets = rng.standard_normal((50, 5)), rng.random((50, 5)) < 0.4
    targets[:, 1], targets[:, 3] = False, True
    found = score_classes(scores, targets)
    assert found.num_absent == 1 and np.isnan(found.average_precision[1]) and np.isnan(found.auc[[1, 3]]).all()
    there = [score_classes(scores[:, [c]], targets[:, [c]]) for c in (0, 2, 3, 4)]
    assert found.mean_average_precision == pytest.approx(np.mean([one.average_precision[0] for one in there]))
    assert found.mean_auc == pytest.approx(np.mean([there[n].auc[0] for n in (0, 1, 3)]))
    assert found.accuracy is None and score_classes(scores, np.eye(5)[rng.integers(0, 5, 50)]).accuracy is not None


def test_a_score_that_is_no_number_is_no_result():
    scores, targets = np.random.default_rng(0).standard_normal((20, 2)), np.tile([[1, 0], [0, 1]], (10, 1))
    scores[3, 1] = np.nan
    found = score_classes(scores, targets)
    assert not np.isnan(found.average_precision[0]) and math.isnan(found.mean_average_precision)
    nobody = score_classes(np.zeros((0, 3)), np.zeros((0, 3)))
    assert math.isnan(nobody.mean_auc) and nobody.num_absent == 3 and nobody.accuracy is None


def test_d_prime_is_the_distance_of_two_gaussians_with_that_auc():
    for auc in (0.02, 0.5, 0.973):
        assert float(d_prime(auc)) == pytest.approx(math.sqrt(2) * statistics.NormalDist().inv_cdf(auc), abs=1e-12)
    assert d_prime(1.0) == math.inf
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(1.5, 1, 20000), rng.normal(0, 1, 20000)])
    assert score_classes(scores[:, None], np.repeat([1, 0], 20000)[:, None]).d_prime == pytest.approx(1.5, abs=0.05)
