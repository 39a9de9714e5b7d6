"""Probes of events: clips that nobody has timed teach no moment, and thresholds are tuned on validation clips."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import ROOT
from finetunes import events_folder

from audiossl.errors import UserError
from audiossl.heads.fitting import NetSettings
from audiossl.probes.blocks import Wanted
from audiossl.probes.cache import FeatureCache
from audiossl.probes.evaluation import Judged, Reading, judge
from audiossl.probes.sources import open_source
from audiossl.scoring.events import raster, smooth
from audiossl.scoring.thresholds import best_thresholds
from audiossl.tasks import Task, load_task

PROBE = yaml.safe_load((ROOT / "conf" / "probe.yaml").read_text())
FOLDER = yaml.safe_load((ROOT / "conf" / "task" / "folder.yaml").read_text())


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("events")
    return load_task(**FOLDER | dict(root=str(events_folder(folder / "set")), cache_dir=str(folder / "cache")))


def judged(task: Task, cache: str, name: str = "linear", head=None, **reading) -> Judged:
    source = open_source("logmel", moments=True)
    features = FeatureCache(cache, 1.0).features(source, task, Wanted(None, True, None, 1))
    reading = Reading(layers="last", pooling="mean", aggregate="embeddings", held_out=0.2, **reading)
    how = dict(seeds=[0], column_seconds=source.column_seconds, device="cpu")
    return judge(task, features, name, head or {"l2_grid": [1.0]}, reading, **how)


def probabilities(task: Task, cache: str) -> np.ndarray:
    return np.concatenate(judged(task, cache).tested[0].probabilities)


def test_what_nobody_has_timed_is_unknown_and_not_silence(task, tmp_path):
    weak = set(task.divisions[0].train[::2].tolist())
    untimed = replace(task, events=[None if clip in weak else own for clip, own in enumerate(task.events)])
    silent = replace(task, events=[[] if clip in weak else own for clip, own in enumerate(task.events)])
    fewer = replace(task, divisions=[task.divisions[0]._replace(train=task.divisions[0].train[1::2])])
    scores = {name: probabilities(some, str(tmp_path)) for name, some in
              dict(untimed=untimed, silent=silent, fewer=fewer).items()}  # fmt: skip
    away = {name: np.abs(scores["untimed"] - scores[name]).mean() for name in ("silent", "fewer")}
    assert np.isfinite(scores["untimed"]).all() and away["fewer"] < 0.5 * away["silent"]


def test_untimed_clips_cannot_be_tested(task):
    test = task.divisions[0].test[0]
    untimed = replace(task, events=[None if clip == test else own for clip, own in enumerate(task.events)])
    task.check_times()
    with pytest.raises(UserError, match=f"nobody says when things happen in test clip {task.keys[test]}"):
        untimed.check_times()


HEADS = {
    "linear": {"l2_grid": [1.0, 100.0]},
    "knn": {"neighbours": [5, 9]},
    "sgd": NetSettings(**PROBE["heads"]["sgd"] | dict(lr=[0.1], max_epochs=3, norm="none")),
}


@pytest.mark.parametrize("name", HEADS)
def test_thresholds_are_tuned_on_validation_clips_alone(task, tmp_path, name):
    """On those clips, seen as test clips by the head that has not been fitted to them, no other threshold is better."""
    (division,) = task.divisions
    found = judged(task, str(tmp_path), name, HEADS[name])
    tuned = found.tested[0].thresholds
    assert len(set(tuned)) > 1 and found.chosen[0]["thresholds"] == pytest.approx(tuned.tolist(), abs=1e-6)
    other = np.random.default_rng(0).permutation(len(division.test))
    events = [list(own) for own in task.events]
    for clip, from_clip in zip(division.test, division.test[other], strict=True):
        events[clip] = list(task.events[from_clip])
    relabelled = judged(replace(task, events=events), str(tmp_path), name, HEADS[name])
    assert np.array_equal(relabelled.tested[0].thresholds, tuned)
    if name == "sgd":
        return
    head = {key: [found.chosen[0]["l2" if name == "linear" else "neighbours"]] for key in HEADS[name]}
    alone = replace(task, divisions=[division._replace(validation=division.validation[:0], test=division.validation)])
    (tested,) = judged(alone, str(tmp_path), name, head).tested
    assert tested.thresholds == 0.5
    scores = np.concatenate([smooth(one, 7) for one in tested.probabilities])
    step, classes = tested.frame_seconds, len(task.classes)
    there = [raster(task.events[clip], num_frames=len(one), frame_seconds=step, num_classes=classes)
             for clip, one in zip(tested.clips, tested.probabilities, strict=True)]  # fmt: skip
    np.testing.assert_allclose(tuned, best_thresholds(scores, np.concatenate(there)), atol=1e-4)


def test_a_threshold_can_be_given_and_a_set_without_validation_clips_has_a_half(task, tmp_path):
    assert judged(task, str(tmp_path), thresholds=0.3).tested[0].thresholds == 0.3
    without = replace(task, divisions=[task.divisions[0]._replace(validation=task.divisions[0].validation[:0])])
    assert judged(without, str(tmp_path)).chosen[0]["thresholds"] == 0.5
