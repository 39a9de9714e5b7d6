"""Scores of more moments than are kept: the same numbers as of all rows at once, for scores rounded to float16."""

import multiprocessing

import numpy as np
import pytest
import torch.distributed as dist
from scipy.special import expit

from audiossl.metrics import score_classes
from audiossl.running.ranks import Ranks
from audiossl.scoring.tally import Tally
from audiossl.scoring.thresholds import best_thresholds

FIELDS = ("average_precision", "auc", "clips", "judged", "num_clips")


@pytest.fixture
def rows():
    """Make 600 moments of 5 classes: ties, huge scores, a class that is nowhere, one that is everywhere, unknown."""
    rng = np.random.default_rng(0)
    targets = (rng.random((600, 5)) < 0.2).astype(np.float32)
    logits = (rng.normal(size=(600, 5)) * 4 + 3 * targets).astype(np.float32)
    logits[::7, 0], logits[::11, 1], logits[3, 2], logits[4, 2] = 0.0, -0.0, 1e6, -1e6
    targets[:, 3], targets[:, 4] = 0, 1
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return logits, targets


def tally_of(logits, targets, **settings) -> Tally:
    tally = Tally(logits.shape[1], **settings)
    for part in range(0, len(logits), 50):
        tally.add(logits[part : part + 50], targets[part : part + 50])
    return tally


@pytest.mark.parametrize("max_values, is_exact", [(10**6, True), (1, False), (700, False), (2999, False)])
def test_rows_that_are_counted_score_as_rows_that_are_kept(rows, max_values, is_exact):
    logits, targets = rows
    tally = tally_of(logits, targets, max_values=max_values)
    rounded = logits if is_exact else np.clip(logits, -65504, 65504).astype(np.float16).astype(np.float64)
    expected, found = score_classes(rounded, np.nan_to_num(targets), ~np.isnan(targets)), tally.scores()
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, err_msg=name)
    assert tally.is_exact == found.is_exact == is_exact and found.accuracy is None
    whole = score_classes(logits, np.nan_to_num(targets), ~np.isnan(targets))
    np.testing.assert_allclose(found.average_precision, whole.average_precision, atol=2e-3)
    thresholds = best_thresholds(expit(rounded.astype(np.float64)), np.nan_to_num(targets), ~np.isnan(targets))
    np.testing.assert_allclose(tally.thresholds(), thresholds, rtol=1e-7)


def test_counted_rows_know_accuracy_and_a_class_that_is_no_number(rows):
    logits = rows[0]
    targets = np.eye(5)[logits.argmax(1)]
    targets[:60] = np.eye(5)[0]
    expected = score_classes(logits, targets)
    logits[5, 1] = np.nan
    found = tally_of(logits, targets, max_values=100).scores()
    assert 0.8 < found.accuracy < 1 and found.accuracy == pytest.approx(expected.accuracy, abs=2 / 600)
    assert np.isnan(found.average_precision[1]) and np.isfinite(found.average_precision[[0, 2]]).all()


def _join(rank: int, store: str, logits, targets, max_values: int, said) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = slice(0, 500) if rank == 0 else slice(500, None)
    tally = tally_of(logits[own], targets[own], max_values=max_values)
    tally.join(Ranks())
    said.put((rank, tally.scores()))


@pytest.mark.parametrize("max_values", [10**6, 2900, 2000, 500], ids=["kept", "kept, too many", "one counts", "both"])
def test_ranks_that_keep_and_ranks_that_count_join(rows, max_values, tmp_path):
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    ranks = [context.Process(target=_join, args=(n, tmp_path / "store", *rows, max_values, said)) for n in (0, 1)]
    for rank in ranks:
        rank.start()
    found = dict(said.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    whole = tally_of(*rows, max_values=max_values if max_values > 3000 else 1).scores()
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found[0], name), getattr(whole, name), rtol=1e-12, err_msg=name)
    assert found[0].is_exact == (max_values == 10**6)
