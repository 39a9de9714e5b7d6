"""Which clips come in which batch: the same whatever the ranks, workers, cache and number of restarts."""

import numpy as np
import pytest
import torch
from tiny_shards import RATE, audio, clip, data_of, digest, noise, ragged_corpus, train_batches, write_shards

from audiossl.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return ragged_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus) -> list:
    return digest(train_batches(data_of(corpus)))


@pytest.mark.faults("X1")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_clip_comes_once_per_epoch_from_ragged_shards_on_any_ranks(corpus, world_size):
    data = data_of(corpus, batch_size=1)
    num_steps = data.num_clips // world_size
    ranks = [train_batches(data, rank=r, world_size=world_size, max_steps=num_steps) for r in range(world_size)]
    assert {len(batches) for batches in ranks} == {num_steps}
    keys = [key for batches in ranks for batch in batches for key in batch.key]
    assert len(keys) == len(set(keys)) == num_steps * world_size
    assert data.num_clips - len(keys) < world_size  # these begin the step that straddles the epochs


GRID = [(shards, ranks) for shards in ((41,), (20, 1, 20), (9, 1, 5, 8, 3, 9, 6), (5,) * 8 + (1,), (1,) * 41)
        for ranks in (1, 2, 3, 4)]  # fmt: skip


def check_cover(folder, shards, ranks, workers):
    """Serve two epochs and a bit: each is the corpus, and all ranks have equally many batches."""
    clips = iter([clip(f"c{i:02d}", audio(noise(i, 900)), 900) for i in range(sum(shards))])
    made = [[next(clips) for _ in range(count)] for count in shards]
    data = data_of(write_shards(folder, made), batch_size=2, num_workers=workers)
    steps = -(-2 * data.num_clips // (2 * ranks))
    given = [train_batches(data, rank=rank, world_size=ranks, max_steps=steps) for rank in range(ranks)]
    assert {len(batches) for batches in given} == {steps}
    stream = [key for batches in zip(*given, strict=True) for batch in batches for key in batch.key]
    for epoch in range(2):
        assert len(set(stream[epoch * data.num_clips : (epoch + 1) * data.num_clips])) == data.num_clips
    assert len(stream) - 2 * data.num_clips < 2 * ranks


@pytest.mark.faults("X1", "X4")
@pytest.mark.parametrize(("shards", "ranks"), GRID, ids=str)
def test_an_epoch_is_the_corpus_on_any_ranks_however_few_or_ragged_the_shards(tmp_path, shards, ranks):
    """Clips are shared out, not shards: one shard is enough for four ranks."""
    check_cover(tmp_path / "s", shards, ranks, 0)


@pytest.mark.faults("X1", "X4")
@pytest.mark.parametrize(("ranks", "workers"), [(2, 3), (4, 2)])
def test_the_same_with_more_workers_than_shards(tmp_path, ranks, workers):
    check_cover(tmp_path / "s", (20, 1, 20), ranks, workers)


@pytest.mark.slow
@pytest.mark.faults("X1")
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("shards", "ranks"), GRID, ids=str)
def test_the_same_with_workers_on_the_whole_grid(tmp_path, shards, ranks, workers):
    check_cover(tmp_path / "s", shards, ranks, workers)


@pytest.mark.faults("R3")
@pytest.mark.parametrize(("num_workers", "cache_mb"), [(0, 8), (1, 0), (2, 0), (2, 8)])
def test_workers_and_cache_change_no_sample(corpus, reference, num_workers, cache_mb):
    data = data_of(corpus, num_workers=num_workers, cache_mb=cache_mb)
    assert digest(train_batches(data, max_steps=24))[:12] == reference
    assert digest(train_batches(data)) == reference


@pytest.mark.parametrize("start_step", [1, 7, 10, 11, 12])
def test_a_loader_made_for_a_later_step_goes_on_with_the_same_crops(corpus, reference, start_step):
    loader = data_of(corpus).train_loader(
        rank=0, world_size=1, accumulate=1, start_step=start_step, max_steps=12, seed=5
    )
    assert digest(loader) == reference[start_step:]
    assert len(loader) == 12


def test_two_ranks_and_accumulation_read_the_same_global_batches(corpus, reference):
    halves = [train_batches(data_of(corpus, batch_size=2), rank=rank, world_size=2) for rank in range(2)]
    joined = [
        sorted(zip([*a.rows.tolist(), *b.rows.tolist()], a.key + b.key, strict=True))
        for a, b in zip(*halves, strict=True)
    ]
    assert joined == [list(zip(rows, keys, strict=True)) for keys, rows, _, _ in reference]
    windows = digest(train_batches(data_of(corpus, batch_size=2), accumulate=2))
    assert b"".join(waveform for *_, waveform in windows) == b"".join(waveform for *_, waveform in reference)


@pytest.mark.faults("D13")
def test_every_epoch_has_a_new_order_and_new_crops_and_a_seed_repeats_them(corpus):
    data = data_of(corpus, batch_size=41)
    first, second = train_batches(data, max_steps=2)
    assert sorted(first.key) == sorted(second.key) and first.key != second.key
    crops = [dict(zip(batch.key, batch.waveform.numpy(), strict=True)) for batch in (first, second)]
    assert sum(np.array_equal(crops[0][key], crops[1][key]) for key in first.key) < 4
    assert digest(train_batches(data, max_steps=2)) == digest([first, second])
    assert train_batches(data, max_steps=1, seed=6)[0].key != first.key


def test_held_out_clips_are_the_same_in_every_run_and_never_trained_on(corpus):
    data = data_of(corpus, validation_clips=7)
    assert (data.num_clips, data.num_validation_clips) == (34, 7)
    (first, second) = (list(data.validation_loader(rank=0, world_size=1)) for _ in range(2))
    held_out = {key for batch in first for key in batch.key}
    assert digest(first) == digest(second) and len(held_out) == 7
    assert held_out.isdisjoint(key for batch in train_batches(data, seed=1) for key in batch.key)
    two = [list(data.validation_loader(rank=rank, world_size=2)) for rank in range(2)]
    assert {key for batches in two for batch in batches for key in batch.key} == held_out
    assert data_of(corpus).validation_loader(rank=0, world_size=1) is None


def test_a_validation_crop_is_the_middle_of_the_clip(corpus):
    data = data_of(corpus, validation_clips=3)
    for batch in data.validation_loader(rank=0, world_size=1):
        for key, crop in zip(batch.key, batch.waveform.numpy(), strict=True):
            whole = noise(int(key[1:]), 1600 + 80 * int(key[1:]))
            assert np.array_equal(crop, whole[(len(whole) - 800) // 2 :][:800])


def test_a_split_selects_what_is_trained_on(tmp_path):
    clips = [clip(f"k{i}", audio(noise(i, 900)), 900, split="train" if i % 3 else "test") for i in range(9)]
    data = data_of(write_shards(tmp_path / "split", [clips]), split="train")
    trained_on = {key for batch in train_batches(data) for key in batch.key}
    assert data.num_clips == 6 and trained_on == {f"k{i}" for i in (1, 2, 4, 5, 7, 8)}
    with pytest.raises(UserError, match="split 'trian'"):
        data_of(str(tmp_path / "split"), split="trian")


def test_a_corpus_of_one_rate_keeps_it_and_a_mixed_one_gets_the_front_ends(tmp_path):
    eight = clip("a", audio(noise(0, 900)), 900)
    sixteen = clip("b", audio(noise(0, 900), 16000), 900, rate_hz=16000)
    assert data_of(write_shards(tmp_path / "one", [[eight]])).rate_hz == RATE
    assert data_of(write_shards(tmp_path / "two", [[eight, sixteen]]), default_rate_hz=32000).rate_hz == 32000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0: must be 1 or more"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"crop_seconds": 0.0}, "data.crop_seconds=0.0"),
        ({"validation_clips": 41}, "data.validation_clips=41: only 41 clips"),
    ],
)
def test_wrong_settings_are_named(corpus, changes, message):
    with pytest.raises(UserError, match=message):
        data_of(corpus, **changes)


def test_examples_to_look_at_are_of_different_kinds_and_at_the_front_ends_rate(tmp_path):
    clips = [clip(key, audio(noise(0, 8000)), 8000) for key in ("a1", "a2", "b1", "b2", "c1")]
    data = data_of(write_shards(tmp_path / "kinds", [clips]))
    examples = data.example_clips(3)
    assert [key[0] for key, _ in examples] == ["a", "b", "c"]
    assert all(waveform.shape == (16000,) and waveform.dtype == torch.float32 for _, waveform in examples)
