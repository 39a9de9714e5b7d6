"""A fraction of a corpus has a seed of its own, lies inside the larger ones, and leaves validation alone."""

import zlib

import numpy as np
import pytest
from tiny_shards import audio, clip, data_of, noise, write_shards

from audiossl.errors import UserError
from audiossl.loading.subsets import crc32

SIZES = {"common": 40, "middle": 12, "rare": 5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Write 60 clips: three classes of one label each, and three clips without."""
    labels = [[name] for name, size in SIZES.items() for _ in range(size)] + [[]] * 3
    clips = [clip(f"k{i:02d}", audio(noise(i, 400)), 400, labels=names) for i, names in enumerate(labels)]
    return write_shards(tmp_path_factory.mktemp("classes"), [clips[0::2], clips[1::2]])


def chosen(corpus: str, **changes) -> set[str]:
    data = data_of(corpus, **changes)
    return {data.index.key(i) for i in data.clips.tolist()}


def held_out(corpus: str, **changes) -> set[str]:
    data = data_of(corpus, **changes)
    return {data.index.key(i) for i in data.held_out.tolist()}


def test_many_crcs_at_once_equal_zlibs():
    rng = np.random.default_rng(0)
    texts = [rng.bytes(int(length)) for length in rng.integers(0, 40, 500)]
    ends = np.cumsum([len(text) for text in texts])
    starts = ends - [len(text) for text in texts]
    text = np.frombuffer(b"".join(texts), np.uint8)
    assert crc32(text, starts, ends).tolist() == [zlib.crc32(text) for text in texts]
    assert crc32(text, starts[::-7], ends[::-7]).tolist() == [zlib.crc32(text) for text in texts[::-7]]


@pytest.mark.parametrize("by", ["random", "class"])
def test_fractions_are_nested_and_of_the_right_size(corpus, by):
    subsets = [chosen(corpus, fraction=f, fraction_by=by, validation_clips=10) for f in (0.02, 0.1, 0.34, 0.8, 1.0)]
    assert [len(subset) for subset in subsets] == [1, 5, 17, 40, 50]
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))


def test_the_fraction_has_a_seed_of_its_own(corpus):
    first = chosen(corpus, fraction=0.3)
    assert chosen(corpus, fraction=0.3) == first != chosen(corpus, fraction=0.3, fraction_seed=1)


def test_how_the_corpus_was_packed_does_not_matter(corpus, tmp_path):
    labels = [[name] for name, size in SIZES.items() for _ in range(size)] + [[]] * 3
    clips = [clip(f"k{i:02d}", audio(noise(i, 400)), 400, labels=names) for i, names in enumerate(labels)]
    other = write_shards(tmp_path / "again", [clips[40:][::-1], clips[:40]])
    for by in ("random", "class"):
        settings = dict(fraction=0.3, fraction_by=by, validation_clips=6)
        assert chosen(other, **settings) == chosen(corpus, **settings)


def test_the_clips_held_out_are_the_same_for_every_fraction_and_never_in_it(corpus):
    reference = held_out(corpus, validation_clips=10)
    for changes in (
        {"fraction": 0.1},
        {"fraction": 0.5, "fraction_by": "class"},
        {"fraction": 0.5, "fraction_seed": 4},
    ):
        assert held_out(corpus, validation_clips=10, **changes) == reference
        assert reference.isdisjoint(chosen(corpus, validation_clips=10, **changes))


def test_by_class_every_class_has_equally_many_as_far_as_they_last(corpus):
    def counts(num_clips: int) -> list[int]:
        data = data_of(corpus, fraction=num_clips / 60, fraction_by="class")
        labels = [", ".join(data.index.labels(i)) for i in data.clips.tolist()]
        return [labels.count(name) for name in (*SIZES, "")]

    assert counts(3) == [1, 1, 1, 0]
    assert counts(15) == [5, 5, 5, 0]
    assert counts(29) == [12, 12, 5, 0]
    assert counts(57) == [40, 12, 5, 0]
    assert counts(59) == [40, 12, 5, 2]


def test_a_clip_of_several_labels_counts_for_its_rarest(tmp_path):
    labels = [["speech"]] * 30 + [["speech", "owl"]] * 5 + [["music", "speech"]] * 10
    clips = [clip(f"k{i:02d}", audio(noise(i, 400)), 400, labels=names) for i, names in enumerate(labels)]
    data = data_of(write_shards(tmp_path / "multi", [clips]), fraction=15 / 45, fraction_by="class")
    found = [tuple(data.index.labels(i)) for i in data.clips.tolist()]
    assert sorted(found) == [("music", "speech")] * 5 + [("speech",)] * 5 + [("speech", "owl")] * 5


def test_a_fraction_of_nothing_and_classes_without_labels_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"data.fraction=0.001: is none of the 60 clips of .*index"):
        data_of(corpus, fraction=0.001)
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            data_of(corpus, fraction=wrong)
    plain = write_shards(tmp_path / "plain", [[clip("a", audio(noise(0, 400)), 400, labels=[]) for _ in "ab"]])
    with pytest.raises(UserError, match="data.fraction_by=class: no clip of .* has a label; take random"):
        data_of(plain, fraction=0.5, fraction_by="class")
