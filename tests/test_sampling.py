"""Balanced draws follow the published weights, and are the same for any ranks, restarts and machines."""

import numpy as np
import pytest
from conftest import golden_cases
from safetensors.numpy import load_file
from tiny_shards import audio, clip, data_of, digest, noise, train_batches, write_shards

from audiossl.errors import UserError
from audiossl.loading.order import StepSampler
from audiossl.loading.sampling import (
    FORMULAS,
    Weighted,
    clip_weights,
    draw_with_replacement,
    draw_without_replacement,
    portable_log,
)

LABELS = [["dog"]] * 24 + [["cat"]] * 6 + [["dog", "owl"]] * 2 + [[]] * 4  # of 36 clips


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    clips = [clip(f"k{i:02d}", audio(noise(i, 900)), 900, labels=labels) for i, labels in enumerate(LABELS)]
    return write_shards(tmp_path_factory.mktemp("labelled"), [clips[:20], clips[20:]])


def ragged(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nonzero(table)[1].astype(np.int32), np.cumsum(table.sum(1)).astype(np.int64)


@pytest.mark.parametrize("case", golden_cases("sample_weights"))
def test_weights_equal_the_published_code(case):
    label_ids, label_ends = ragged(load_file(case / "input.safetensors")["labels"])
    expected = load_file(case / "expected.safetensors")
    for name in ("audiomae", "atst"):
        weights = clip_weights(label_ids, label_ends, offset=FORMULAS[name].offset, reduce="sum")
        assert weights == pytest.approx(expected["mae_sample_weight"], rel=1e-12)
    for offset in (0, 100):
        for reduce in ("sum", "max"):
            weights = clip_weights(label_ids, label_ends, offset=offset, reduce=reduce)
            assert weights == pytest.approx(expected[f"passt_weight.offset{offset}.{reduce}"], rel=1e-6)
    assert FORMULAS["passt"].offset == 100


def test_a_clip_without_labels_weighs_nothing_wherever_it_stands():
    ids, ends = np.array([1, 0, 1], np.int32), np.array([0, 1, 1, 3, 3])
    assert clip_weights(ids, ends, offset=0.0, reduce="sum").tolist() == [0, 500, 0, 1500, 0]
    assert clip_weights(ids, ends, offset=0.0, reduce="max").tolist() == [0, 500, 0, 1000, 0]


WEIGHTS = np.array([0.0, 1.0, 2.0, 7.0, 0.0, 10.0])


def words(num: int) -> np.ndarray:
    return np.random.Philox(key=11).random_raw(num)


def test_draws_with_replacement_come_in_proportion_to_the_weights():
    counts = np.bincount(draw_with_replacement(WEIGHTS[WEIGHTS > 0], words(200_000)), minlength=4)
    shares = WEIGHTS[WEIGHTS > 0] / WEIGHTS.sum()
    assert np.abs(counts / 200_000 - shares).max() < 4 * np.sqrt(0.25 / 200_000)
    assert draw_with_replacement(np.ones(3), np.array([0, 2**64 - 1], np.uint64)).tolist() == [0, 2]


def test_draws_without_replacement_follow_successive_sampling():
    """Of weights 1, 2, 7 two are drawn: P(first = i) = w_i / sum, then the same among those left."""
    weights = np.array([1.0, 2.0, 7.0])
    drawn = [tuple(draw_without_replacement(weights, w, 2)) for w in words(90_000).reshape(-1, 3)]
    for first in range(3):
        for second in set(range(3)) - {first}:
            expected = weights[first] / 10 * weights[second] / (10 - weights[first])
            assert drawn.count((first, second)) / 30_000 == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 30_000))


def test_the_logarithm_of_basic_operations_is_a_logarithm():
    uniform = ((words(100_000) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    x = np.concatenate([uniform, [1.0, 2.0**-53, 0.5, np.sqrt(0.5), 1 - 2.0**-53]])
    assert np.abs(portable_log(x) - np.log(x)).max() < 1e-14
    assert np.allclose(portable_log(x), np.log(x), rtol=4e-16, atol=4e-16)


@pytest.mark.parametrize("replacement", [True, False])
def test_an_epoch_is_a_function_of_seed_and_epoch_and_shows_no_clip_of_weight_0(replacement):
    weights = np.tile([0.0, 1.0, 3.0, 9.0], 50)

    def epoch(seed: int, number: int) -> tuple[list, list]:
        order = Weighted(weights, num_draws=80, replacement=replacement, seed=seed)
        turns, clips = order.at(number * 80 + np.arange(80))
        return turns.tolist(), clips.tolist()

    assert epoch(3, 2) == epoch(3, 2)
    assert len({tuple(epoch(seed, number)[1]) for seed in range(3) for number in range(3)}) == 9
    clips = epoch(3, 2)[1]
    assert weights[clips].all() and (replacement or len(set(clips)) == 80)
    visits = [visit for number in range(3) for visit in zip(*epoch(3, number), strict=True)]
    assert len(set(visits)) == 240, "a crop is never drawn from the same number twice"


def test_heavy_clips_do_not_crowd_the_start_of_an_epoch():
    weights = np.concatenate([np.ones(500), np.full(500, 50.0)])
    order = Weighted(weights, num_draws=800, replacement=False, seed=0)
    _, clips = order.at(np.arange(800))
    is_heavy = clips >= 500
    assert is_heavy.sum() > 480 and abs(is_heavy[:400].mean() - is_heavy[400:].mean()) < 0.1


@pytest.mark.parametrize("replacement", [True, False])
def test_ranks_accumulation_and_resume_change_no_draw(replacement):
    def steps(world_size: int, accumulate: int, start_step: int = 0) -> list[list]:
        order = Weighted(np.arange(40.0), num_draws=30, replacement=replacement, seed=1)
        shape = dict(batch_size=16 // world_size // accumulate, accumulate=accumulate, world_size=world_size)
        ranks = [
            list(StepSampler(order=order, rank=rank, max_steps=9, start_step=start_step, **shape))
            for rank in range(world_size)
        ]
        groups = range(0, len(ranks[0]), accumulate)
        return [sorted(r for rank in ranks for batch in rank[g : g + accumulate] for r in batch) for g in groups]

    reference = steps(1, 1)
    assert steps(2, 1) == steps(2, 4) == steps(1, 8) == reference
    assert all(steps(4, 2, start_step=start) == reference[start:] for start in (1, 2, 5, 8))


def test_a_run_draws_rare_classes_as_often_as_common_ones(corpus):
    data = data_of(corpus, sampling="audiomae", draws_per_epoch=3000, batch_size=50)
    assert (data.num_clips, data.clips_per_epoch) == (36, 3000)
    keys = [key for batch in train_batches(data, max_steps=60) for key in batch.key]
    counts = np.array([keys.count(f"k{i:02d}") for i in range(36)])
    assert not counts[32:].any(), "clips without a label never come"
    weights = np.array([1000 / 26.01] * 24 + [1000 / 6.01] * 6 + [1000 / 26.01 + 1000 / 2.01] * 2)
    expected = 3000 * weights / weights.sum()
    assert (np.abs(counts[:32] - expected) < 5 * np.sqrt(expected)).all()
    assert counts[24:30].sum() == pytest.approx(counts[30:32].sum(), rel=0.15)
    assert "4 clips without a label never come" in data.describe_epoch()


def test_one_clip_drawn_twice_in_an_epoch_gives_two_crops(corpus):
    data = data_of(corpus, sampling="atst", draws_per_epoch=400, batch_size=400, crop_seconds=0.05)
    (batch,) = train_batches(data, max_steps=1)
    owls = [waveform.numpy().tobytes() for key, waveform in zip(batch.key, batch.waveform, strict=True) if key == "k30"]
    assert len(owls) > 20 and len(set(owls)) > 0.8 * len(owls)
    assert digest(train_batches(data, max_steps=2))[0] == digest([batch])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "passt"}, "holds each once, whatever its weight; give data.draws_per_epoch"),
        ({"sampling": "passt", "draws_per_epoch": 33}, "only 32 clips have a label; draw fewer"),
        ({"sampling": "atst", "replacement": False, "draws_per_epoch": 99}, "is 99 of data without replacement"),
        ({"sampling": "atst", "shuffle_shards": 2}, "data.shuffle_shards=2: data.sampling=atst draws from all shards"),
        ({"replacement": True, "shuffle_shards": 2}, "data.replacement=true draws from all shards"),
        ({"draws_per_epoch": 0}, "data.draws_per_epoch=0: must be at least 1"),
        ({"sampling": "atst", "sampling_offset": -1.0}, "data.sampling_offset=-1.0: must be at least 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(corpus, changes, message):
    with pytest.raises(UserError, match=message):
        data_of(corpus, **changes)


def test_a_corpus_without_labels_cannot_be_balanced(tmp_path):
    clips = [clip(f"k{i}", audio(noise(i, 900)), 900, labels=[]) for i in range(3)]
    with pytest.raises(UserError, match="none of the 3 clips of data has a label to be balanced by"):
        data_of(write_shards(tmp_path / "plain", [clips]), sampling="audiomae")
