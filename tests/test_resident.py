"""A corpus that lies in memory whole gives the very batches that the ordinary loader gives, damaged clips included."""

import pytest
import torch
from fits import assert_same_run, kill_and_go_on, run, trace
from methods import settings_of
from tiny_shards import RATE, audio, clip, data_of, digest, many_clips, noise, train_batches, write_shards

from audiossl.errors import UserError
from audiossl.loading.clips import ClipDataset
from audiossl.loading.handover import collate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write 24 clips: of 0.02 to 0.5 s, of two rates and three formats; three of them are damaged."""
    clips = []
    for number in range(24):
        frames, rate = 160 + 170 * number, 2 * RATE if number % 5 == 3 else RATE
        extension = ("flac", "ogg", "wav")[number % 3]
        data = audio(noise(number, frames), rate, extension)
        data = {6: b"no audio", 9: data[: len(data) // 2]}.get(number, data)
        if number == 12:
            data = data[:-400] + bytes(400)
        clips.append(clip(f"{'ab'[number % 2]}{number:02d}", data, frames, extension, rate))
    return write_shards(tmp_path_factory.mktemp("mixed"), [clips[:9], clips[9:11], clips[11:]])


def both(corpus, **changes):
    return [data_of(corpus, resident=resident, **changes) for resident in (False, True)]


@pytest.mark.parametrize("padding", ["cyclic", "zeros"])
def test_batches_order_crops_and_bad_clips_are_those_of_the_ordinary_loader(corpus, padding):
    ordinary, resident = both(corpus, padding=padding, validation_clips=5, rate_hz=RATE, num_workers=2)
    expected = train_batches(ordinary)
    found = train_batches(resident)
    assert digest(found) == digest(expected) and len(found) == 12
    assert [batch.skipped for batch in found] == [batch.skipped for batch in expected]
    assert torch.equal(
        torch.cat([b.start_seconds for b in found]).nan_to_num(-1),
        torch.cat([b.start_seconds for b in expected]).nan_to_num(-1),
    )
    assert resident.bad_clips.bad == ordinary.bad_clips.bad and len(resident.bad_clips.bad) >= 2
    assert resident.bad_clips.visits_trained == ordinary.bad_clips.visits_trained
    validation = [list(data.validation_loader(rank=0, world_size=1)) for data in (ordinary, resident)]
    assert digest(validation[0]) == digest(validation[1])


def test_any_rank_and_any_step_of_a_resident_corpus_see_the_ordinary_batches(corpus):
    ordinary, resident = both(corpus, needs_labels=True, sampling="audiomae", shuffle_shards=None)
    for where in (
        dict(rank=1, world_size=2),
        dict(start_step=7),
        dict(rank=1, world_size=2, accumulate=2, start_step=3),
    ):
        expected, found = train_batches(ordinary, **where), train_batches(resident, **where)
        assert digest(found) == digest(expected)
        assert all(torch.equal(a.target, b.target) for a, b in zip(found, expected, strict=True))


def test_samples_that_lie_on_a_device_are_cut_padded_and_stacked_there(corpus):
    for padding in ("cyclic", "zeros"):
        data = data_of(corpus, resident=True, padding=padding, rate_hz=RATE)
        loader = data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=12, seed=5).loader
        as_tensors = {place: torch.as_tensor(clip) for place, clip in loader.dataset.resident.items()}
        assert len(as_tensors) >= 21
        on_device = ClipDataset(rate_hz=RATE, crop_samples=800, padding=padding, cache_bytes=0, resident=as_tensors)
        requests = [request for batch in loader.batch_sampler for request in batch if request.rate_hz == RATE]
        expected = [collate([loader.dataset[request]], 800) for request in requests]
        assert digest([collate([on_device[request]], 800) for request in requests]) == digest(expected)


def test_a_corpus_that_does_not_fit_is_one_line_with_the_numbers(tmp_path):
    huge = clip("a", audio(noise(0, 900)), 10**15)
    data = data_of(write_shards(tmp_path / "huge", [[huge]]), resident=True)
    with pytest.raises(
        UserError, match=r"data.resident=true: the clips take 2000000.00 GB as int16, more than half of "
    ):
        train_batches(data)


def test_a_mixture_of_corpora_may_be_resident(corpus):
    shares = {"a": {"shards": corpus, "weight": 0.7}, "b": {"shards": corpus, "weight": 0.3}}
    settings = dict(sources=shares, rate_hz=RATE, validation_clips=2)
    ordinary, resident = (data_of(None, resident=resident, **settings) for resident in (False, True))
    assert digest(train_batches(resident)) == digest(train_batches(ordinary))


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    shards = many_clips(tmp_path_factory.mktemp("many") / "corpus", 24)
    given = ["data=folder", f"data.shards={shards}", "data.validation_clips=0", "frontend.seconds=0.16"]
    return [*settings_of("audiomae"), *given, "data.batch_size=2", "trainer.max_steps=6", "checkpoint.every_steps=2"]


def keys_of(folder, rank: int) -> list[str]:
    return [key for row in trace(folder, rank) for key in row["keys"].split()]


def test_two_ranks_that_share_a_resident_corpus_see_what_ordinary_ranks_see(settings, tmp_path):
    """Six steps of two times two clips are an epoch: each clip once, on one of the ranks."""
    run(tmp_path / "resident", *settings, "data.resident=true", ranks=2)
    run(tmp_path / "ordinary", *settings, ranks=2)
    assert_same_run(tmp_path / "resident", tmp_path / "ordinary", 6, ranks=2)
    first, second = (keys_of(tmp_path / "resident", rank) for rank in (0, 1))
    assert len(first) == len(second) == 12 and len({*first, *second}) == 24


def test_a_resident_run_that_is_killed_and_resumed_is_the_one_that_was_never_stopped(settings, tmp_path):
    settings = [*settings, "data.resident=true"]
    run(tmp_path / "straight", *settings)
    kill_and_go_on(tmp_path / "killed", *settings, at=(3,))
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 6)


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_the_same_and_lie_there(corpus):
    ordinary, resident = both(corpus, padding="zeros", rate_hz=RATE, validation_clips=4)
    found = train_batches(resident, device="cuda:0")
    assert all(batch.waveform.is_cuda for batch in found if len(batch))
    assert digest([batch.to("cpu") for batch in found]) == digest(train_batches(ordinary))
