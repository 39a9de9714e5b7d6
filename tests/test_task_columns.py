"""A set of millions of clips: no Python object for each, and the same answers as clip by clip."""

import tracemalloc

import numpy as np
import pytest
import yaml
from conftest import ROOT

from audiossl.index import Index
from audiossl.labelled.columns import Ragged
from audiossl.tasks import load_task
from benchmarks.tasks import write_synthetic

FOLDER = yaml.safe_load((ROOT / "conf" / "task" / "folder.yaml").read_text()) | {"root": None, "kind": "multilabel"}
NUM_CLIPS = 40_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_synthetic(folder, NUM_CLIPS)
    return folder


def test_a_clip_of_a_large_set_costs_next_to_nothing(shards, tmp_path):
    """Its share of the index is 90 bytes; a Python object for each label alone would be 150 more."""
    load_task(**FOLDER | {"shards": str(shards)})  # what is imported late
    tracemalloc.start()
    task = load_task(**FOLDER | {"shards": str(shards)})
    kept, peak = tracemalloc.get_traced_memory()
    task.targets_of(task.divisions[0].test[:10])
    task.shards_of(task.divisions[0], tmp_path / "index.safetensors")
    _, writing = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200 * NUM_CLIPS and peak < 300 * NUM_CLIPS and writing < 600 * NUM_CLIPS


def test_labels_splits_and_keys_are_those_of_the_index(shards, tmp_path):
    index, task = Index.load(shards), load_task(**FOLDER | {"shards": str(shards)})
    (division,) = task.divisions
    written = Index.load(task.shards_of(division, tmp_path / "index.safetensors"))
    for clip in np.random.default_rng(0).integers(NUM_CLIPS, size=200).tolist():
        names = [task.classes[label] for label in task.labels[clip]]
        assert names == sorted(index.labels(clip)) and task.keys[clip] == index.key(clip)
        assert (clip in division.test) == (index.split(clip) == "test")
        assert (written.split(clip), sorted(written.labels(clip))) == (index.split(clip), names)
    some = np.array([5, 3, NUM_CLIPS - 1])
    expected = [[name in index.labels(clip) for name in task.classes] for clip in some]
    np.testing.assert_array_equal(task.targets_of(some), expected)


def test_rows_of_ids_are_taken_and_numbered_anew_in_order():
    rows = Ragged.of([[2, 0], [], [1]])
    other = rows.renumbered(np.array([5, 1, 3], np.int32))
    assert [row.tolist() for row in other] == [[3, 5], [], [1]]
    assert [row.tolist() for row in rows.take(np.array([2, 0, 1]))] == [[1], [2, 0], []]
    assert rows[-1].tolist() == [1] and len(Ragged.of([])) == 0
