"""Do spans hide what the published mask generator hides, and, corrected, exactly what they say?"""

import json
import math

import pytest
import torch
from conftest import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.parts.blockmask import SpanMasking, cover_ranks, hide_smallest, num_hidden, num_spans

NAMES = ["block", "uniform", "disjoint", "random"]
CLIPS = 6000
STATISTICS = [
    (folder, name)
    for folder in golden_cases("atst_frame_masks*")
    for name in json.loads((folder / "case.json").read_text())["statistics_over_3000_masks"]
]


def draw(name, ratio=0.65, share="published", clips=6, tokens=250, length=5, shortest=2, available=None, step=0):
    masking = SpanMasking(name, ratio, length, shortest, share)
    return masking.draw(Noise.for_batch(0, step, clips), tokens, available)


def published(folder, name):
    """Read what the generator's statistics are, and draw as many masks as tell them from others."""
    stated = json.loads((folder / "case.json").read_text())["statistics_over_3000_masks"][name]
    kind = {"static": "disjoint" if stated.get("no_overlap") else "block", "uniform": "uniform", None: "random"}
    sizes = {"tokens": stated["num_patches"], "length": stated.get("length", 5), "shortest": stated.get("other", 2)}
    return stated, draw(kind[stated.get("type")], stated["ratio"], clips=CLIPS, **sizes)


def by_chance(spread):
    """Say how far the mean of 3,000 published masks may lie from ours when one mask has this standard deviation."""
    return 4.5 * spread * (1 / 3000 + 1 / CLIPS) ** 0.5 + 1e-6


def middle(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, mask.shape[1] // 2 - 2 : mask.shape[1] // 2 + 3]


@pytest.mark.parametrize(("folder", "name"), STATISTICS, ids=[name for _, name in STATISTICS])
def test_masks_have_the_published_statistics(folder, name):
    stated, mask = published(folder, name)
    hidden = mask.sum(1)
    if "masked_per_row" in stated:
        assert set(hidden.tolist()) == set(stated["masked_per_row"])
        return
    share, tokens = hidden / mask.shape[1], mask.shape[1]
    spread = stated["std_fraction"]
    assert share.mean().item() == pytest.approx(stated["mean_masked_fraction"], abs=by_chance(spread))
    assert share.std().item() == pytest.approx(spread, rel=0.08, abs=1e-6)
    extremes = torch.tensor([stated["min"], stated["max"]])
    assert (torch.stack(hidden.aminmax()) - extremes).abs().max() <= 1.6 * spread * tokens
    for part, where in (("first5", mask[:, :5]), ("mid", middle(mask)), ("last5", mask[:, -5:])):
        at_each = torch.tensor(stated[f"per_position_prob_{part}"])
        spread = (at_each * (1 - at_each)).sqrt()
        assert ((where.float().mean(0) - at_each).abs() <= by_chance(spread)).all(), part


def runs(mask: torch.Tensor) -> list[int]:
    """Measure the stretches of hidden tokens of all masks."""
    text = "0".join("".join(map(str, row)) for row in mask.int().tolist())
    return [len(run) for run in text.split("0") if run]


@pytest.mark.parametrize(("folder", "name"), STATISTICS, ids=[name for _, name in STATISTICS])
def test_masks_are_made_of_stretches_like_the_published_masks(folder, name):
    stated, mask = published(folder, name)
    theirs = load_file(folder / "expected.safetensors")[f"masks.{name}"].bool()
    lengths, expected = (torch.tensor(runs(m), dtype=torch.float32) for m in (mask[:1000], theirs))
    assert abs(lengths.mean() - expected.mean()) < 4.5 * expected.std() / len(expected) ** 0.5
    assert abs(lengths.median() - expected.median()) <= 1 and lengths.min() == expected.min()


def test_the_published_65_percent_hides_half():
    assert draw("block", clips=CLIPS).float().mean().item() == pytest.approx(0.503, abs=0.002)
    assert draw("block", share="corrected", clips=CLIPS).float().mean().item() == pytest.approx(162 / 250)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    ratio=st.floats(0.01, 0.99),
    tokens=st.integers(1, 60),
    length=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_corrected_masks_hide_exactly_the_ratio_of_the_tokens_that_are_there(name, ratio, tokens, length, seed):
    available = torch.randint(0, tokens + 1, (8,), generator=torch.Generator().manual_seed(seed))
    mask = draw(name, ratio, "corrected", 8, tokens, length, shortest=1, available=available, step=seed)
    for row, count in zip(mask, available.tolist(), strict=True):
        assert row[:count].sum() == round(ratio * count) and row[count:].all()


@pytest.mark.parametrize("name", ["block", "disjoint"])
def test_corrected_masks_consist_of_whole_spans_but_one(name):
    mask = draw(name, share="corrected", clips=500)
    short = [[run for run in runs(row[None]) if run < 5] for row in mask]
    assert max(map(len, short)) <= 1
    if name == "disjoint":
        cut = [sum(run % 5 for run in runs(row[None])) for row in mask]
        assert set(cut) == {162 % 5}


def test_corrected_masks_reach_the_last_token_and_published_spans_never_do():
    for name in ("block", "disjoint"):
        assert not draw(name, clips=500)[:, -1].any()
        assert 0.1 < draw(name, share="corrected", clips=500)[:, -1].float().mean() < 0.4


def test_disjoint_spans_never_overlap():
    mask = draw("disjoint", 0.5, clips=500)
    assert all(run % 5 == 0 for run in runs(mask)) and (mask.sum(1) == 125).all()
    crowded = draw("disjoint", 0.95, clips=50)  # more than can be laid without looking ahead
    assert all(run % 5 == 0 for run in runs(crowded)) and 0.7 < crowded.float().mean() < 0.9


@pytest.mark.parametrize("share", ["published", "corrected"])
@pytest.mark.parametrize("name", NAMES)
def test_a_clip_that_ends_early_is_masked_as_a_short_clip(name, share):
    available = torch.tensor([100] * 4000 + [250] * 10)
    mask = draw(name, 0.5, share, clips=4010, available=available)
    assert mask[:4000, 100:].all() and not mask[4000:, 100:].all()
    short = draw(name, 0.5, share, clips=4000, tokens=100, step=1)
    assert mask[:4000, :100].float().mean() == pytest.approx(short.float().mean().item(), abs=0.006)
    assert mask[:4000, :100].sum(1).float().std() == pytest.approx(short.sum(1).float().std().item(), rel=0.1, abs=1e-6)


@pytest.mark.parametrize("folder", golden_cases("atst_frame_masks*"))
def test_random_masks_of_short_clips_hide_as_many_as_published(folder):
    for name, mask in load_file(folder / "expected.safetensors").items():
        if "_available_" in name:
            count = int(name.rpartition("_")[2])
            ours = draw("random", 0.65, clips=5, tokens=mask.shape[1], available=torch.full((5,), count))
            assert set(ours.sum(1).tolist()) == set(mask.sum(1).tolist()) and ours[:, count:].all()


@pytest.mark.parametrize("share", ["published", "corrected"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_differ_between_clips_and_steps_and_follow_their_clip_and_seed(name, share):
    mask, rows = draw(name, share=share), torch.tensor([4, 1])
    assert mask.dtype == torch.bool and mask.shape == (6, 250)
    assert not any(torch.equal(mask[0], other) for other in mask[1:])
    assert not torch.equal(mask, draw(name, share=share, step=1))
    assert torch.equal(SpanMasking(name, 0.65, 5, 2, share).draw(Noise(0, 0, rows, 6), 250), mask[rows])
    none = torch.zeros(0, dtype=torch.int64)
    assert SpanMasking(name, 0.65, 5, 2, share).draw(Noise(0, 0, none, 6), 250).shape == (0, 250)


def test_the_rank_of_a_position_is_that_of_the_first_span_to_cover_it():
    draws = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.0, 0.5]])
    lengths = torch.tensor([[2, 3, 1, 9, 9, 9]])  # of the first span, the second, ...
    ranks = cover_ranks(draws, torch.tensor([4]), lengths, 3)  # starts 1, 3, 2, 0 in this order; 9 stays unused
    lengths = torch.tensor([[2, 3, 1, 2, 1, 1]])
    assert cover_ranks(draws, torch.tensor([4]), lengths, 3).tolist() == [[3, 0, 0, 1, 1, 1]]
    assert ranks[0, 1:].tolist() == [0, 0, 1, 1, 1]


def test_counts_are_those_of_the_published_arithmetic():
    def counts(ratio, tokens, *draws):
        return num_spans(torch.tensor(draws), torch.full((len(draws),), tokens), ratio, 5).tolist()

    assert counts(0.65, 250, 0.0, 0.49, 0.5, 0.99) == [32, 32, 33, 33]
    assert counts(0.5, 250, 0.0, 1 - 2**-24) == [25, 25]
    assert counts(0.1, 20, 0.0) == [2]
    tokens = torch.tensor([100, 250, 50])
    assert num_hidden(tokens, 0.55, "published").tolist() == [55, 138, 28]  # 55 though 100 * .55 > 55 in doubles
    assert math.ceil(100 * 0.55) == 56
    assert num_hidden(tokens, 0.65, "corrected").tolist() == [65, 162, 32]


def test_of_equal_keys_the_first_are_hidden():
    mask = hide_smallest(torch.tensor([[2, 1, 1, 1, 0], [0, 0, 0, 0, 0]]), torch.tensor([3, 2]))
    assert mask.int().tolist() == [[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("blocks", 0.65, 5, 2, "published"), "model.mask='blocks': choose block"),
        (("block", 0.0, 5, 2, "published"), "model.mask_ratio=0.0"),
        (("block", 1.0, 5, 2, "published"), "model.mask_ratio=1.0"),
        (("block", float("nan"), 5, 2, "published"), "model.mask_ratio=nan"),
        (("block", 0.65, 0, 1, "published"), "model.mask_length=0"),
        (("uniform", 0.65, 5, 11, "published"), "model.mask_shortest=11"),
        (("block", 0.65, 5, 2, "right"), "model.mask_share='right': choose published or corrected"),
    ],
)
def test_a_wrong_setting_is_named(arguments, said):
    with pytest.raises(UserError, match=said):
        SpanMasking(*arguments)
