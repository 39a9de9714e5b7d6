"""The cache of features: computed once, never stale, whole or not there, and small enough."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from threading import Thread

import numpy as np
import pytest
from commands import environment
from conftest import ROOT
from exported import export
from labelled_clips import task_of, write_folder

from audiossl.errors import UserError
from audiossl.probes.cache import FeatureCache
from audiossl.probes.segments import Wanted
from audiossl.probes.sources import open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("set") / "small")


@pytest.fixture
def task(folder, tmp_path):
    return task_of(folder, cache_dir=str(tmp_path / "tasks"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(export("audiomae", tmp_path_factory.mktemp("encoder") / "mae"))


def test_features_are_computed_once_and_equal_what_the_source_says(task, encoder, tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), open_source(encoder)
    first = cache.features(source, task, Wanted(with_moments=True))
    again = cache.features(source, task, Wanted(with_moments=True))
    assert first.is_new and not again.is_new and not first.bad
    assert np.array_equal(first.pooled, again.pooled) and np.array_equal(first.moments, again.moments)
    assert isinstance(again.pooled, np.memmap)
    for clip in (0, len(task) - 1):
        waveform = task.waveform(clip, source.rate_hz)
        found = source.model.embed(waveform[: int(source.max_seconds * source.rate_hz)], source.rate_hz, overlap=0.0)
        assert np.allclose(first.pooled[first.offsets[clip], -1, 0], found.clip[0], atol=1e-5)
        mine = first.moments[first.moment_offsets[clip] :][: found.num_frames[0], -1]
        assert np.allclose(mine, found.frames[0], atol=1e-5)
        middles = first.middles_seconds[first.moment_offsets[clip] : first.moment_offsets[clip + 1]]
        assert (np.diff(middles) > 0).all() and middles[-1] < task.seconds[clip] + 0.2


def test_what_was_kept_with_moments_serves_heads_that_want_none(task, encoder, tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), open_source(encoder)
    rich = cache.features(source, task, Wanted(with_moments=True, moment_layers=1))
    plain = cache.features(source, task, Wanted())
    assert rich.is_new and not plain.is_new and plain.pooled.shape[1] == source.num_layers
    assert rich.moments.shape[1] == 1 < source.num_layers


def test_another_support_encoder_or_label_is_another_entry(folder, task, encoder, tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), open_source(encoder)
    assert cache.features(source, task, Wanted()).is_new
    half = cache.features(source, task, Wanted(support_seconds=1.0))
    assert half.is_new and len(half.pooled) > 2 * len(task)
    assert cache.features(open_source(f"untrained:{encoder}", seed=7), task, Wanted()).is_new
    shorter = task_of(folder, cache_dir=str(tmp_path / "tasks"), clip_seconds=1.0)
    assert cache.features(source, shorter, Wanted()).is_new
    assert not cache.features(source, task, Wanted()).is_new


def test_a_clip_that_cannot_be_read_is_named_and_the_others_stay(folder, task, encoder, tmp_path, monkeypatch):
    from audiossl.sound.audio import AudioError

    broken, read = 3, type(task).waveform

    def waveform(self, clip, rate_hz):
        if clip == broken:
            raise AudioError("cut short")
        return read(self, clip, rate_hz)

    monkeypatch.setattr(type(task), "waveform", waveform)
    found = FeatureCache(tmp_path / "cache", 1.0).features(open_source(encoder), task, Wanted())
    assert found.bad == {broken: "cut short"}
    counts = np.diff(found.offsets)
    assert counts[broken] == 0 and (np.delete(counts, broken) > 0).all()


def test_no_room_is_one_line_and_the_oldest_goes_first(task, encoder, tmp_path):
    with pytest.raises(UserError, match="more than probe.cache_gb"):
        FeatureCache(tmp_path / "cache", 1e-6).features(open_source(encoder), task, Wanted())
    source = open_source(encoder)
    size = FeatureCache(tmp_path / "probe", 1.0).features(source, task, Wanted()).num_bytes
    cache = FeatureCache(tmp_path / "cache", 3.5 * size / 1e9)
    for seed in range(4):
        cache.features(open_source(f"untrained:{encoder}", seed=seed), task, Wanted())
        time.sleep(0.02)
    assert len(list(cache.folder.glob("*/complete.json"))) < 4
    assert not cache.features(open_source(f"untrained:{encoder}", seed=3), task, Wanted()).is_new


SLOW = """
    import sys, time
    sys.path.insert(0, "tests")
    from labelled_clips import task_of
    import audiossl.probes.cache as cache
    from audiossl.probes.segments import Wanted
    from audiossl.probes.sources import open_source
    cache.BLOCK_CLIPS = 4
    task = task_of(sys.argv[1], cache_dir=sys.argv[2])
    found = cache.FeatureCache(sys.argv[4], 1.0).features(open_source(sys.argv[3]), task, Wanted())
    print("new", found.is_new, float(found.pooled.sum()))
"""


def test_a_killed_command_goes_on_where_it_was_and_ends_the_same(folder, encoder, tmp_path):
    def start(cache):
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(SLOW),
            str(folder),
            str(tmp_path / "tasks"),
            encoder,
            str(cache),
        ]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole").communicate(timeout=200)[0]
    process, deadline = start(tmp_path / "killed"), time.time() + 100
    while not (blocks := list((tmp_path / "killed").glob("features/*/block-*.npz"))):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in blocks if path.exists()}
    second = start(tmp_path / "killed")
    assert second.communicate(timeout=200)[0] == whole and whole.startswith("new True")
    assert not list((tmp_path / "killed").glob("features/*/block-*.npz")) and kept
    assert os.path.isfile(next((tmp_path / "killed").glob("features/*/complete.json")))


def test_who_waits_for_features_that_another_process_computes_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    first, second, order = FeatureCache(tmp_path, 1), FeatureCache(tmp_path, 1), []

    def wait():
        with second._claimed("these"):
            order.append("second")

    with first._claimed("these"):
        waiting = Thread(target=wait)
        waiting.start()
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"] and "another process computes these features" in caplog.text
