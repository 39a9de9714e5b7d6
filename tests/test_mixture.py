"""Several corpora in one run: exact shares in every epoch, each clip once per pass of its own corpus."""

import shutil
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_shards import audio, clip, data_of, digest, noise, train_batches, write_shards

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.loading.mixture import JoinedIndex, Mixed, largest_remainder
from audiossl.loading.order import ShardWindows, Shuffled, StepSampler

COUNTS = {"music": 9, "noise": 4, "speech": 30}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    """Write three corpora whose keys repeat; speech has another rate, noise a split and label of its own."""
    folder = tmp_path_factory.mktemp("corpora")
    paths = {}
    for number, (name, count) in enumerate(COUNTS.items()):
        rate = 16000 if name == "speech" else 8000
        clips = [
            clip(
                f"k{i:02d}",
                audio(noise(100 * number + i, 1000), rate),
                1000,
                rate_hz=rate,
                split="dev" if name == "noise" else "train",
                labels=[name, "common"] if i % 2 else [name],
            )
            for i in range(count)
        ]
        paths[name] = write_shards(folder / name, [clips[: count // 2], clips[count // 2 :]])
    return paths


def sources(corpora, **weights) -> dict[str, dict]:
    return {name: {"shards": corpora[name], "weight": weight} for name, weight in weights.items()}


def mixed(**changes):
    return data_of(None, crop_seconds=0.05, **changes)


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in batch.key]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8), st.integers(0, 3_000_000))
def test_quotas_add_up_and_are_less_than_one_clip_away_from_the_shares(shares, total):
    quotas = largest_remainder(shares, total)
    assert sum(quotas) == total
    exact = [share / sum(shares) * total for share in shares]
    assert all(abs(quota - share) < 1 + 1e-6 for quota, share in zip(quotas, exact, strict=True))


def test_every_epoch_has_the_very_share_of_each_corpus_and_each_clip_once_per_pass(corpora):
    data = mixed(sources=sources(corpora, music=1, noise=1, speech=2), draws_per_epoch=20, batch_size=20)
    batches = train_batches(data, max_steps=18)
    streams = {name: [] for name in COUNTS}
    for batch in batches:
        owners = Counter(key.split("/")[0] for key in batch.key)
        assert owners == {"music": 5, "noise": 5, "speech": 10}
        for key in batch.key:
            streams[key.split("/")[0]].append(key)
    for name, count in COUNTS.items():
        whole = len(streams[name]) // count
        assert whole >= 6
        passes = [streams[name][n * count : (n + 1) * count] for n in range(whole)]
        assert all(len(set(one)) == count for one in passes) and passes[0] != passes[1]


def test_sources_are_interleaved_anew_each_epoch_and_not_one_after_another(corpora):
    data = mixed(sources=sources(corpora, music=1, speech=1), draws_per_epoch=40, batch_size=40)
    patterns = ["".join(key[0] for key in batch.key) for batch in train_batches(data, max_steps=4)]
    assert len(set(patterns)) == 4
    assert all(4 <= pattern[:20].count("m") <= 16 for pattern in patterns)
    assert all(pattern.count("ms") + pattern.count("sm") > 10 for pattern in patterns)


def test_without_weights_an_epoch_is_each_clip_of_all_corpora_once(corpora):
    plain = {name: {"shards": path} for name, path in corpora.items()}
    data = mixed(sources=plain, batch_size=43)
    assert data.num_clips == data.clips_per_epoch == 43
    for batch in train_batches(data, max_steps=3):
        assert len(set(batch.key)) == 43
    assert data.corpus.shares == pytest.approx([9 / 43, 4 / 43, 30 / 43])


def test_ranks_workers_and_resume_change_nothing(corpora):
    settings = dict(sources=sources(corpora, music=1, noise=1, speech=2), draws_per_epoch=21)
    reference = digest(train_batches(mixed(**settings, batch_size=8)))
    assert digest(train_batches(mixed(**settings, batch_size=8, num_workers=2))) == reference
    late = digest(train_batches(mixed(**settings, batch_size=8), start_step=5))
    assert late == reference[5:]
    ranks = [train_batches(mixed(**settings, batch_size=4), rank=rank, world_size=2) for rank in range(2)]
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert sum((batch.key for batch in batches), []) == reference[step][0]


def test_a_crop_is_never_drawn_from_the_same_numbers_twice(corpora):
    data = mixed(sources=sources(corpora, noise=9, speech=1), draws_per_epoch=100)
    turns, clips = data.order(3).at(np.arange(1000))
    assert len(set(zip(turns.tolist(), clips.tolist(), strict=True))) == 1000


def test_another_source_changes_no_order_within_a_source(corpora):
    def speech(**weights) -> list[str]:
        data = mixed(sources=sources(corpora, **weights), draws_per_epoch=60, batch_size=60)
        return [key for key in keys_of(train_batches(data, max_steps=3)) if key.startswith("speech")]

    assert speech(speech=1, noise=1)[:60] == speech(speech=1, music=1, noise=1)[:60]


def test_the_joined_index_says_of_each_clip_what_its_own_index_says(corpora):
    parts = {name: Index.load(path) for name, path in corpora.items()}
    joined = JoinedIndex(parts)
    assert joined.vocabulary == ["common", "music", "noise", "speech"] and joined.splits == ["dev", "train"]
    assert len(joined) == sum(COUNTS.values()) and joined.meta["counts"]["clips"] == len(joined)
    at = 0
    for name, index in parts.items():
        for i in range(len(index)):
            assert joined.key(at) == f"{name}/{index.key(i)}" and joined.member_key(at) == index.key(i)
            assert (joined.labels(at), joined.split(at)) == (index.labels(i), index.split(i))
            assert (joined.shard_path(at), joined.read(at)) == (index.shard_path(i), index.read(i))
            assert (joined.rate_hz[at], joined.num_frames[at]) == (index.rate_hz[i], index.num_frames[i])
            at += 1


def test_audio_comes_from_the_corpus_that_the_key_names(corpora):
    data = mixed(sources=sources(corpora, music=1, noise=1), batch_size=13, rate_hz=8000)
    (batch,) = train_batches(data, max_steps=1)
    for key, crop in zip(batch.key, batch.waveform.numpy(), strict=True):
        name, clip_key = key.split("/")
        whole = noise(100 * list(COUNTS).index(name) + int(clip_key[1:]), 1000)
        assert crop.tobytes() in whole.tobytes()


def test_corpora_of_different_rates_come_at_the_front_ends(corpora):
    assert mixed(sources=sources(corpora, music=1, noise=1), default_rate_hz=32000).rate_hz == 8000
    assert mixed(sources=sources(corpora, music=1, speech=1), default_rate_hz=32000).rate_hz == 32000


def test_validation_is_held_out_in_proportion_and_whatever_weights_and_fractions(corpora):
    def held_out(weights=(1, 1, 1), **changes) -> set[str]:
        entries = sources(corpora, **dict(zip(COUNTS, weights, strict=True)))
        data = mixed(sources=entries, validation_clips=11, **changes)
        trained = {data.index.key(i) for i in data.clips}
        found = {data.index.key(i) for i in data.held_out}
        assert found.isdisjoint(trained) and len(found) == 11
        assert found == set(keys_of(data.validation_loader(rank=0, world_size=1)))
        return found

    reference = held_out()
    assert Counter(key.split("/")[0] for key in reference) == {"music": 2, "noise": 1, "speech": 8}
    assert held_out((5, 1, 2)) == held_out(fraction=0.5) == reference


def test_split_and_fraction_are_the_sources_own_or_the_mixtures(corpora):
    entries = sources(corpora, noise=1, speech=1)
    entries["noise"] |= {"split": "dev", "fraction": 0.5}
    data = mixed(sources=entries, split="train", fraction=0.1)
    assert [len(pool) for pool in data.corpus.pools] == [2, 3]


def test_the_hash_changes_with_any_source_weight_fraction_or_byte_and_not_with_the_place(corpora, tmp_path):
    def hash_of(entries, **changes) -> str:
        return mixed(sources=entries, **changes).corpus_hash

    entries = sources(corpora, music=1, speech=1)
    reference = hash_of(entries)
    moved = entries | {"music": {**entries["music"], "shards": f"{corpora['music']}/shard-*.tar"}}
    assert hash_of(moved) == hash_of(dict(reversed(entries.items()))) == reference
    assert hash_of(sources(corpora, music=2, speech=2)) == reference, "only the shares count"
    others = [
        hash_of(sources(corpora, music=2, speech=1)),
        hash_of(sources(corpora, music=1, noise=1)),
        hash_of(entries | {"music": {**entries["music"], "fraction": 0.5}}),
        hash_of(entries | {"music": {**entries["music"], "split": "train"}}),
        hash_of(entries | {"music": {**entries["music"], "shards": f"{corpora['music']}/shard-000000.tar"}}),
        hash_of(entries, fraction=0.5),
        hash_of({"tunes" if name == "music" else name: entry for name, entry in entries.items()}),
    ]
    assert len({reference, *others}) == 8


def test_balanced_sampling_works_within_each_source(corpora):
    data = mixed(sources=sources(corpora, music=1, speech=1), sampling="audiomae", draws_per_epoch=600, batch_size=100)
    keys = keys_of(train_batches(data, max_steps=6))
    assert Counter(key.split("/")[0] for key in keys) == {"music": 300, "speech": 300}
    odd = [key for key in keys if key.startswith("music") and int(key[-2:]) % 2]  # with the rarer label too
    weights = [1000 / 9.01 + (1000 / 4.01 if i % 2 else 0) for i in range(9)]
    assert len(odd) == pytest.approx(300 * sum(weights[1::2]) / sum(weights), abs=5 * np.sqrt(75))
    with pytest.raises(UserError, match="is 300 of data.sources.music without replacement, but only 9 clips"):
        mixed(sources=sources(corpora, music=1, speech=1), sampling="passt", draws_per_epoch=600)


def test_shard_windows_hold_within_each_source():
    parts = [ShardWindows(np.arange(40) // 10, num_shards=1, seed=1), Shuffled(20, seed=2)]
    turns, clips = Mixed(parts, num_clips=[40, 20], quotas=[40, 20], seed=0).at(np.arange(60))
    shards = [clip // 10 for clip in clips.tolist() if clip < 40]
    assert len([a for a, b in zip(shards, shards[1:], strict=False) if a != b]) == 3 and set(turns) == {0}


def test_two_million_clips_of_many_passes_are_mixed_in_seconds():
    parts = [Shuffled(50, seed=1), Shuffled(1_500_000, seed=2)]
    order = Mixed(parts, num_clips=[50, 1_500_000], quotas=[1_000_000] * 2, seed=0)
    settings = dict(batch_size=512, accumulate=1, rank=0, world_size=1)
    sampler = StepSampler(order=order, start_step=7030, max_steps=7032, **settings)
    started = time.perf_counter()
    assert len(list(sampler)) == 2
    assert time.perf_counter() - started < 10  # 1.3 s on a quiet core


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "data.shards=null: say where the shards are, or mix"),
        ({"sources": {"a b": {"shards": "x"}}}, "data.sources.a b: a name may hold"),
        ({"sources": {"a": {"shards": "x", "weight": 1}, "b": {"shards": "y"}}}, "data.sources.b.weight=null"),
        ({"sources": {"a": {"shards": "x", "weight": 0}}}, "data.sources.a.weight=0: must be above 0"),
        ({"sources": {"a": {"shards": "x", "fraction": 2}}}, "data.sources.a.fraction=2: must be above 0 and at most"),
        ({"sources": {"a": {"shards": "nowhere/x.tar"}}}, "'nowhere/x.tar' matches no file"),
    ],
)
def test_wrong_sources_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        mixed(**changes)


def test_a_share_that_is_no_clip_of_an_epoch_is_refused(corpora):
    with pytest.raises(UserError, match=r"data.sources.noise: its share of 0.001 is no clip of the 20"):
        mixed(sources=sources(corpora, noise=1, speech=999), draws_per_epoch=20)
    with pytest.raises(UserError, match="data.sources say where the shards are; null one"):
        data_of(corpora["music"], sources=sources(corpora, speech=1))


def test_what_one_source_has_lost_is_counted_and_the_others_train(corpora, tmp_path):
    """D8 in a mixture: the lost clips are those of the right source, and no clip is heard under another's name."""
    shutil.copytree(corpora["speech"], tmp_path / "speech")
    (tmp_path / "speech" / "shard-000001.tar").unlink()
    damaged = sources(corpora, music=1.0, speech=1.0)
    damaged["speech"]["shards"] = str(tmp_path / "speech")
    with pytest.raises(UserError, match="shard-000001.tar is missing"):
        mixed(sources=damaged)
    data = mixed(sources=damaged, damaged_shards="skip")
    whole = mixed(sources=sources(corpora, music=1.0, speech=1.0))
    assert {data.index.key(i) for i in data.bad_clips.lost} == {f"speech/k{i:02d}" for i in range(15, 30)}
    assert (data.num_clips, whole.num_clips) == (9 + 15, 9 + 30) and data.corpus_hash != whole.corpus_hash
    batches = train_batches(data, max_steps=12)
    assert len(set(keys_of(batches))) == 24 and not any(batch.skipped for batch in batches)


def test_a_source_with_nothing_left_is_named(corpora, tmp_path):
    shutil.copytree(corpora["noise"], tmp_path / "noise")
    for shard in (tmp_path / "noise").glob("*.tar"):
        shard.unlink()
    damaged = sources(corpora, music=1.0, noise=1.0)
    damaged["noise"]["shards"] = str(tmp_path / "noise")
    with pytest.raises(UserError, match="data.sources.noise: 0 clips to train on"):
        mixed(sources=damaged, damaged_shards="skip")
