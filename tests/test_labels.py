"""Labels travel with the clips of a method that needs them, and clips without one stay away."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_shards import audio, clip, data_of, digest, noise, train_batches, write_shards

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.loading.handover import collate

SPLITS = ("train", "extra", "test")


def write(folder, first: int, classes: list[str], labelled=lambda i: i % 4) -> str:
    """Write 30 clips, ten of each split; those where `labelled` is not 0 have one or two classes."""
    clips = []
    for i in range(30):
        labels = [classes[i % len(classes)], classes[-1]][: 1 + i % 2] if labelled(i) else []
        data = audio(noise(first + i, 1000))
        clips.append(clip(f"k{i:02d}", data, 1000, split=SPLITS[i // 10], labels=sorted(set(labels))))
    return write_shards(folder, [clips[:11], clips[11:]])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("corpus") / "a", 0, ["dog", "rain", "bell"])


def labels_of(batch, index: Index) -> dict[str, list[str]]:
    assert batch.target.dtype == torch.float32 and batch.target.shape == (len(batch), len(index.vocabulary))
    assert set(batch.target.unique().tolist()) <= {0.0, 1.0}
    named = [[index.vocabulary[c] for c in row.nonzero()[:, 0].tolist()] for row in batch.target]
    return dict(zip(batch.key, named, strict=True))


def truth(index: Index) -> dict[str, list[str]]:
    return {index.key(i): sorted(index.labels(i)) for i in range(len(index))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_targets_are_the_labels_of_the_index_in_training_and_validation(corpus, num_workers):
    data = data_of(corpus, needs_labels=True, num_workers=num_workers, validation_clips=6)
    expected = {key: labels for key, labels in truth(data.index).items() if labels}
    assert max(map(len, expected.values())) == 2, "some clips have several labels"
    seen = {}
    for batch in train_batches(data, max_steps=9):
        seen |= labels_of(batch, data.index)
    held_out = {}
    for batch in data.validation_loader(rank=0, world_size=1):
        held_out |= labels_of(batch, data.index)
    assert len(held_out) == 6 and not seen.keys() & held_out.keys()
    assert seen | held_out == expected and data.num_clips == len(expected) - 6
    assert "8 clips left out for having no label" in data.describe_epoch()


def test_a_method_that_needs_none_gets_none_and_every_clip(corpus):
    data = data_of(corpus)
    loader = data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=12, seed=5)
    assert all(request.labels is None for request in loader.loader.batch_sampler.batch(0))
    batches = list(loader)
    assert all(batch.target is None for batch in batches) and len({key for b in batches for key in b.key}) == 30
    assert data.describe_epoch() == "" and data.corpus_hash == data.index.corpus_hash


def test_labels_change_neither_crops_nor_batches(tmp_path):
    shards = write(tmp_path / "all", 0, ["dog", "rain"], labelled=lambda i: True)
    plain, labelled = (train_batches(data_of(shards, needs_labels=needs)) for needs in (False, True))
    assert digest(plain) == digest(labelled)
    late = train_batches(data_of(shards, needs_labels=True), start_step=5)
    assert [b.target.tolist() for b in late] == [b.target.tolist() for b in labelled[5:]]


def test_a_batch_without_a_readable_clip_still_has_a_target():
    assert collate([], 80, 7).target.shape == (0, 7)


def test_a_mixture_has_one_vocabulary(corpus, tmp_path):
    other = write(tmp_path / "b", 100, ["siren", "dog"])
    data = data_of(None, sources={"a": {"shards": corpus}, "b": {"shards": other}}, needs_labels=True)
    assert data.index.vocabulary == ["bell", "dog", "rain", "siren"]
    expected = {f"a/{k}": v for k, v in truth(Index.load(corpus)).items() if v}
    expected |= {f"b/{k}": v for k, v in truth(Index.load(other)).items() if v}
    seen = {}
    for batch in train_batches(data):
        seen |= labels_of(batch, data.index)
    assert seen == expected


def test_shards_without_any_label_are_one_clear_error(tmp_path, corpus):
    unlabelled = write(tmp_path / "none", 0, ["x"], labelled=lambda i: False)
    with pytest.raises(UserError, match=r"data\.shards: none of 30 clips of .*none.* has a label.*meta\.csv.*model="):
        data_of(unlabelled, needs_labels=True)
    with pytest.raises(UserError, match=r"data\.sources\.b\.shards: none of 30 clips"):
        data_of(None, sources={"a": {"shards": corpus}, "b": {"shards": unlabelled}}, needs_labels=True)
    assert data_of(unlabelled).num_clips == 30


def test_another_label_is_another_corpus_for_a_method_that_needs_them(tmp_path, corpus):
    """The shards hold the same bytes; only what their index says of them differs."""
    same = write(tmp_path / "same", 0, ["dog", "rain", "bell"])
    renamed = write(tmp_path / "renamed", 0, ["hound", "rain", "bell"])
    hashes = [[data_of(s, needs_labels=needs).corpus_hash for s in (corpus, same, renamed)] for needs in (False, True)]
    assert len(set(hashes[0])) == 1 and hashes[1][0] == hashes[1][1] != hashes[1][2]


def validated(data) -> set[str]:
    return {data.index.key(i) for i in data.held_out.tolist()}


def test_validation_on_a_split_of_its_own(corpus):
    everything = data_of(corpus, split="train", validation_split="test")
    assert (everything.num_clips, everything.num_validation_clips) == (10, 10)
    assert validated(everything) == {f"k{i:02d}" for i in range(20, 30)}
    some = data_of(corpus, split="train", validation_split="test", validation_clips=4)
    assert (some.num_clips, some.num_validation_clips) == (10, 4) and validated(some) < validated(everything)
    assert validated(data_of(corpus, split="extra", validation_split="test", validation_clips=4)) == validated(some)
    assert data_of(corpus, split="train", validation_split="test", validation_clips=99).num_validation_clips == 10
    labelled = data_of(corpus, split="train+extra", validation_split="test", needs_labels=True)
    assert (labelled.num_clips, labelled.num_validation_clips) == (15, 7)
    assert "5 clips left out" in labelled.describe_epoch()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(split="test"), r"data\.validation_split=test: data\.split=test trains on these"),
        (dict(split="train+test"), r"data\.validation_split=test: data\.split=train\+test trains"),
        (dict(split=None), r"data\.split=null trains on these clips too; .*data\.split=extra\+train for example"),
        (dict(split="train", validation_split="tset"), r"split 'tset' is not in .*test"),
        (dict(split="train+xtra"), r"split 'xtra' is not in .*extra"),
    ],
)
def test_a_split_is_not_both_trained_on_and_validated_on(corpus, changes, message):
    with pytest.raises(UserError, match=message):
        data_of(corpus, **{"validation_split": "test", **changes})


def test_sources_of_a_mixture_without_the_split_only_train(corpus, tmp_path):
    shards = [[clip(f"m{i}", audio(noise(50 + i, 1000)), 1000, split=None) for i in range(8)]]
    other = write_shards(tmp_path / "b", shards)
    sources = {"a": {"shards": corpus, "split": "train"}, "b": {"shards": other}}
    data = data_of(None, sources=sources, validation_split="test")
    assert validated(data) == {f"a/k{i:02d}" for i in range(20, 30)} and data.num_clips == 18
    assert len(data_of(None, sources=sources, validation_split="test", validation_clips=3).held_out) == 3
    with pytest.raises(UserError, match=r"data\.sources\.a\.split=null trains"):
        data_of(None, sources={**sources, "a": {"shards": corpus}}, validation_split="test")
    with pytest.raises(UserError, match="no source has this split"):
        data_of(None, sources=sources, validation_split="dev")


def test_the_demo_set_has_what_a_supervised_run_needs():
    data = data_of(str(ROOT / "demo/shards"), split="train", validation_split="test", needs_labels=True)
    counts = [np.bincount(data.index.labels_of(clips)[0], minlength=10) for clips in (data.clips, data.held_out)]
    assert counts[0].tolist() == [9] * 10 and counts[1].tolist() == [6] * 10
