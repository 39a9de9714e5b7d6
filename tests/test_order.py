"""Every clip once per epoch, the same global batches on any machine, and resume from the step number alone."""

import time
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiossl.loading.order import FixedSampler, ShardWindows, Shuffled, StepSampler, clip_order, rows_of


def sampler(**changes) -> StepSampler:
    order = Shuffled(changes.pop("num_clips", 50), seed=3)
    defaults = dict(order=order, batch_size=4, accumulate=1, rank=0, world_size=1, max_steps=40, start_step=0)
    return StepSampler(**{**defaults, **changes})


def global_batches(world_size: int, **changes) -> list[list[tuple[int, int, int]]]:
    """Join what all ranks get in each optimiser step, sorted by row."""
    ranks = [list(sampler(rank=rank, world_size=world_size, **changes)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks have unequal numbers of batches"
    accumulate = changes.get("accumulate", 1)
    steps = []
    for first in range(0, len(ranks[0]), accumulate):
        micro_batches = [batch for batches in ranks for batch in batches[first : first + accumulate]]
        steps.append(sorted(request for batch in micro_batches for request in batch))
    return steps


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): clip_order(100, seed, epoch).copy() for seed, epoch in product(range(3), range(4))}
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(100))
        assert np.array_equal(order, clip_order(100, seed, epoch))
    assert len({order.tobytes() for order in orders.values()}) == len(orders)


def test_the_order_stays_what_it_was_in_earlier_versions():
    assert clip_order(10, 0, 0).tolist() == [6, 8, 3, 4, 9, 7, 0, 1, 2, 5]
    assert clip_order(10, 0, 1).tolist() == [2, 4, 7, 5, 0, 8, 6, 3, 1, 9]


def test_a_large_epoch_looks_shuffled():
    order = clip_order(20_000, 1, 0)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.03
    assert np.mean(np.abs(np.diff(order)) < 100) < 0.02  # neighbours in a shard do not stay neighbours


@pytest.mark.faults("X1")
@pytest.mark.parametrize("num_clips", [1, 3, 7, 8, 40, 41])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_clip_comes_once_per_epoch_on_any_ranks(num_clips, world_size, accumulate):
    steps = global_batches(world_size, num_clips=num_clips, accumulate=accumulate, max_steps=20)
    stream = [(epoch, clip) for step in steps for _, epoch, clip in step]
    for epoch in range(stream[-1][0]):  # the last epoch is cut by max_steps
        assert sorted(clip for e, clip in stream if e == epoch) == list(range(num_clips))
    assert [[row for row, _, _ in step] for step in steps] == [list(range(4 * world_size * accumulate))] * 20


@pytest.mark.faults("X9")
def test_one_rank_two_ranks_and_accumulation_see_the_same_global_batches():
    reference = global_batches(1, batch_size=16)
    assert global_batches(2, batch_size=8) == reference
    assert global_batches(1, batch_size=8, accumulate=2) == reference
    assert global_batches(4, batch_size=2, accumulate=2) == reference
    assert len(reference) == 40


@pytest.mark.faults("X2")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_ten_thousand_random_topologies_cover_the_stream_exactly(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        num_clips, world_size, accumulate, batch_size = (int(rng.integers(1, high)) for high in (200, 17, 5, 9))
        step = int(rng.integers(0, 50))
        shape = dict(world_size=world_size, batch_size=batch_size)
        rows = [row for m, r in product(range(accumulate), range(world_size)) for row in rows_of(m, rank=r, **shape)]
        global_batch = batch_size * accumulate * world_size
        assert rows == list(range(global_batch))
        first = step * global_batch // num_clips * num_clips  # the start of the epoch in which this step begins
        epochs, clips = Shuffled(num_clips, seed=seed).at(np.arange(first, first + num_clips))
        assert set(epochs.tolist()) == {first // num_clips} and sorted(clips) == list(range(num_clips))


@pytest.mark.faults("R3")
@pytest.mark.parametrize("start_step", [0, 1, 9, 12, 13, 25, 39, 40])
def test_resuming_at_any_step_yields_the_remaining_batches(start_step):
    whole = list(sampler(accumulate=2, world_size=2, rank=1))
    resumed = sampler(accumulate=2, world_size=2, rank=1, start_step=start_step)
    assert list(resumed) == whole[start_step * 2 :]
    assert len(resumed) == len(whole) == 80


def test_a_run_of_two_million_clips_resumes_within_seconds():
    started = time.perf_counter()
    late = sampler(num_clips=2_000_000, batch_size=512, start_step=35_000, max_steps=35_010)
    assert len(list(late)) == 10
    assert time.perf_counter() - started < 6  # 0.4 s on a quiet core


@pytest.mark.parametrize("num_clips", [0, 1, 7, 8, 9, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_gives_each_clip_once_and_each_rank_equally_many_batches(num_clips, world_size):
    ranks = [
        list(FixedSampler(num_clips=num_clips, batch_size=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(clip for batches in ranks for batch in batches for _, _, clip in batch) == list(range(num_clips))
    assert all(row < 4 * world_size for batches in ranks for batch in batches for row, _, _ in batch)


RAGGED_SHARDS = np.repeat([5, 3, 8, 0, 9, 2, 7], [10, 3, 10, 7, 10, 1, 6])  # shard of each of 47 clips


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 50])
def test_shard_windows_give_each_clip_once_per_epoch_a_few_shards_at_a_time(num_shards):
    order = ShardWindows(RAGGED_SHARDS, num_shards=num_shards, seed=4)
    visited = []
    for epoch in range(4):
        turns, clips = order.at(np.arange(epoch * 47, (epoch + 1) * 47))
        assert set(turns) == {epoch} and sorted(clips) == list(range(47))
        windows, at = order.shards_ahead(epoch * 47), 0
        while at < 47:
            ahead = next(windows)
            num_clips = int(np.isin(RAGGED_SHARDS, ahead).sum())
            assert set(RAGGED_SHARDS[clips[at : at + num_clips]]) == set(ahead) and len(ahead) <= num_shards
            at += num_clips
        visited.append(clips.tolist())
    assert len({tuple(clips) for clips in visited}) == 4


def test_the_shards_ahead_of_any_position_begin_with_its_own_window_and_go_on_into_the_next_epoch():
    order = ShardWindows(RAGGED_SHARDS, num_shards=2, seed=4)
    _, clips = order.at(np.arange(3 * 47))
    for position in range(2 * 47):
        ahead = [shard for window, _ in zip(order.shards_ahead(position), range(5), strict=False) for shard in window]
        met = list(dict.fromkeys(RAGGED_SHARDS[clips[position : 47 * (position // 47 + 1)]].tolist()))
        assert set(met) <= set(ahead)
        assert RAGGED_SHARDS[clips[position]] in next(order.shards_ahead(position))
    windows = list(islice(order.shards_ahead(0), 12))
    assert windows == [window for epoch in range(3) for window in islice(order.shards_ahead(47 * epoch), 4)]


def test_clips_are_mixed_within_a_window_and_shards_between_epochs():
    shard = np.repeat(np.arange(40), 100)
    order = ShardWindows(shard, num_shards=8, seed=0)
    _, clips = order.at(np.arange(4000))
    assert np.mean(np.diff(shard[clips]) == 0) < 0.2, "neighbours of a shard do not stay neighbours"
    firsts = {tuple(sorted(next(order.shards_ahead(epoch * 4000)))) for epoch in range(5)}
    assert len(firsts) == 5


def test_ranks_and_resume_see_the_same_windows():
    order = ShardWindows(RAGGED_SHARDS, num_shards=2, seed=4)
    settings = dict(order=order, batch_size=4, accumulate=1, max_steps=40)
    whole = list(StepSampler(rank=0, world_size=1, start_step=0, **settings | {"batch_size": 8}))
    ranks = [list(StepSampler(rank=rank, world_size=2, start_step=5, **settings)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole[5:]
