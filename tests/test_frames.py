"""Scores that lie on disk while they are judged give the numbers that they give in memory."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scored import random_clips

from audiossl.errors import UserError
from audiossl.scoring import frames
from audiossl.scoring.frames import FrameTable
from audiossl.scoring.numbers import event_scores
from audiossl.scoring.psds import PSDS1, PSDS2, PsdsTable
from audiossl.tuning.predictions import Moments


@pytest.mark.parametrize("block", [1, 3000, 2**26])
def test_scores_of_moments_in_files_are_scored_as_those_in_memory(block, tmp_path, monkeypatch):
    case = random_clips(7, num_clips=20, frames=40)
    logits = [(of * 8 - 5).astype(np.float32) for of in case.scores]
    how = dict(frame_seconds=case.step, median_frames=3, thresholds=[0.3, 0.5, 0.6], num_resamples=5)
    expected = event_scores([expit(of.astype(np.float64)) for of in logits], case.events, case.seconds, **how)
    monkeypatch.setattr(frames, "HELD_BYTES", 0)
    monkeypatch.setattr(frames, "BLOCK_BYTES", block)
    moments = Moments(3, tmp_path, tmp_path / "kept.safetensors", {"some": "thing"})
    for of_clip in logits:
        moments.add(of_clip)
    moments.seal({"clips": np.arange(20)})
    again = Moments.read(tmp_path / "kept.safetensors")
    assert all(np.array_equal(again.values(clip), logits[clip]) for clip in range(20))
    assert event_scores(again, case.events, case.seconds, **how, folder=tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


@pytest.mark.parametrize("settings", [PSDS1, PSDS2])
def test_thresholds_that_are_not_looked_at_do_not_count_whatever_clips_weigh(settings):
    case, settings = random_clips(3, num_clips=240, frames=100), replace(settings, max_per_hour=20.0)
    table = PsdsTable(*case.clips, frame_seconds=case.step, settings=settings)
    whole = PsdsTable(*case.clips, frame_seconds=case.step, settings=settings)
    whole._follow(range(3), None)
    assert all(len(table.changes[k].level) < 0.9 * len(whole.changes[k].level) for k in range(3))
    others = np.ones(240)
    others[table.sure[0]] = 0  # those that are sure to have false alarms are not drawn: look further
    for weights in (np.ones(240), np.random.default_rng(0).multinomial(240, np.full(240, 1 / 240)), others):
        found, expected = table.score(weights), whole.score(weights)
        np.testing.assert_allclose(found.per_class, expected.per_class, rtol=0, atol=1e-12)
        assert found.value == pytest.approx(expected.value, abs=1e-12)
    assert len(table.changes[0].level) == len(whole.changes[0].level) and not len(table.sure[0])


def test_a_disk_without_room_is_one_line(tmp_path):
    with pytest.raises(UserError, match="scores of moments, while they are judged, need .* GB, and"):
        FrameTable(np.array([10**12]), 400, np.float32, folder=tmp_path)
