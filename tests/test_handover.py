"""Workers write batches into memory that is used again, and nobody can tell."""

import gc
import logging
import os
import resource

import pytest
from processes import end_within, workers
from tiny_shards import audio, clip, data_of, digest, noise, ragged_corpus, train_batches, write_shards

from audiossl.loading.handover import SPARE_SLOTS
from audiossl.loading.workers import fork_server

PREFETCH = 4
NUM_BATCHES = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return ragged_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(corpus) -> list:
    return digest(train_batches(data_of(corpus), max_steps=NUM_BATCHES))


def loader_of(corpus: str, num_workers: int = 1, max_steps: int = NUM_BATCHES, **changes):
    data = data_of(corpus, num_workers=num_workers, **changes)
    return data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=max_steps, seed=5)


def rings() -> dict[int, int]:
    """Find the shared memory that this process holds: bytes in use by descriptor."""
    gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.lexists(path) and "memfd:audiossl-batches" in os.readlink(path):
            found[os.stat(path).st_ino] = 512 * os.stat(path).st_blocks
    return found


def test_few_slots_serve_many_batches_which_are_those_of_one_process(corpus, expected):
    places = set()
    for number, batch in enumerate(loader_of(corpus)):
        assert digest([batch]) == expected[number : number + 1]
        places.add(batch.waveform.data_ptr())
    assert number == NUM_BATCHES - 1 and len(places) <= PREFETCH + SPARE_SLOTS


def test_a_batch_that_is_kept_is_never_written_over(corpus, expected):
    """More are kept than there are slots; a process forked from this one lets go of its copies."""
    num_slots = 2 * (PREFETCH + SPARE_SLOTS)
    batches = iter(loader_of(corpus, num_workers=2))
    kept = [next(batches) for _ in range(num_slots + 8)]
    if (child := os.fork()) == 0:
        kept.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert digest(batches) == expected[len(kept) :]
    assert digest(kept) == expected[: len(kept)]
    assert len({batch.waveform.data_ptr() for batch in kept}) == len(kept)


def test_slots_are_free_again_when_what_was_kept_is_dropped(corpus):
    batches = iter(loader_of(corpus))
    kept = [next(batches) for _ in range(PREFETCH + SPARE_SLOTS + 4)]
    in_slots = {batch.waveform.data_ptr() for batch in kept if not batch.waveform.is_shared()}
    assert len(in_slots) == PREFETCH + SPARE_SLOTS  # the others came in memory of their own
    kept.clear()
    after = [next(batches).waveform.data_ptr() for _ in range(4 * PREFETCH)]
    assert set(after[2 * PREFETCH :]) <= in_slots


def test_a_loader_dropped_in_mid_epoch_gives_back_all_but_what_is_kept(corpus, expected):
    others, shm = rings(), set(os.listdir("/dev/shm"))
    loader = loader_of(corpus, num_workers=2)
    batches = iter(loader)
    kept = [next(batches) for _ in range(6)][2:3]
    (ring,) = rings().keys() - others.keys()
    in_use = rings()[ring]
    batches.close()
    assert 0 < rings()[ring] < in_use and not workers()  # its slot, and the page of who has what
    assert digest(kept) == expected[2:3]
    del loader, batches
    assert digest(kept) == expected[2:3]
    kept.clear()
    assert rings() == others and set(os.listdir("/dev/shm")) <= shm


def test_kept_workers_serve_one_iteration_after_the_other_and_two_loaders_at_once(corpus):
    one, two = (data_of(corpus, num_workers=workers, validation_clips=9) for workers in (0, 1))
    expected = [digest(train_batches(one)), digest(one.validation_loader(rank=0, world_size=1))]
    validation = two.validation_loader(rank=0, world_size=1)
    training = iter(loader_of(corpus, validation_clips=9, max_steps=12))
    found, kept = [], []
    for _ in range(4):
        found += [next(training) for _ in range(3)]
        next(iter(validation))  # and no further
        kept.append(list(validation))
    assert digest(found) == expected[0]
    assert [digest(batches) for batches in kept] == [expected[1]] * 4


def test_batches_of_any_size_skipped_clips_and_labels_come_through(tmp_path):
    clips = [clip(f"k{i:02d}", audio(noise(i, 900)), 900, labels=["ab"[i % 2]]) for i in range(11)]
    clips[3:6] = [clip(f"k{i:02d}", b"no audio", 900, labels=["a"]) for i in range(3, 6)]
    shards = write_shards(tmp_path / "some", [clips])
    settings = dict(batch_size=2, needs_labels=True, validation_clips=0, max_bad_fraction=1.0)
    plain, handed = (train_batches(data_of(shards, num_workers=n, **settings), max_steps=22) for n in (0, 1))
    assert digest(plain) == digest(handed) and {len(batch) for batch in handed} == {0, 1, 2}
    for one, other in zip(plain, handed, strict=True):
        assert one.skipped == other.skipped and one.target.equal(other.target)
        assert one.start_seconds.equal(other.start_seconds) and one.target.dtype == other.target.dtype


def test_where_no_memory_can_be_shared_one_line_says_so_and_batches_are_the_same(corpus, expected, caplog):
    fork_server()  # has to have no such limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))  # less than eight slots
    try:
        with caplog.at_level(logging.WARNING):
            batches = iter(loader_of(corpus))
            first = next(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record.message.count("no memory can be shared with the workers") for record in caplog.records] == [1]
    assert digest([first, *batches]) == expected and first.waveform.is_shared()
    assert end_within(10, workers)
