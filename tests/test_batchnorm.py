"""Do ranks that hold parts of a batch normalise as one process that holds all of it?"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from audiossl.parts.batchnorm import BatchNorm1d

CHANNELS, STEPS = 6, 3
CASES = dict(enumerate([((4, 4), True), ((5, 2), False), ((3, 0), True), ((0, 6), False), ((1, 1), True)]))


def rows(count: int, step: int) -> torch.Tensor:
    """Draw `count` rows that lie far from zero: what a single pass over sums of squares would cancel."""
    values = torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(step))
    return values * torch.linspace(0.1, 3, CHANNELS) + 100 * torch.arange(CHANNELS)


def trained(norm, parts: list[torch.Tensor], rank: int | None) -> dict[str, torch.Tensor]:
    """Take a few steps as `rank` of those that hold `parts`; returns outputs, gradients and buffers."""
    result = {}
    for step, whole in enumerate(parts):
        mine = (torch.cat(whole) if rank is None else whole[rank]).requires_grad_()
        first = 0 if rank is None else sum(map(len, whole[:rank]))
        target = rows(64, 100 + step)[first : first + len(mine)] / 100
        norm.zero_grad()
        output = norm(mine)
        (output - target).pow(4).sum().backward()
        result |= {f"output{step}": output.detach(), f"gradient{step}": mine.grad}
    result |= {f"{name}.gradient": p.grad for name, p in norm.named_parameters()}
    norm.eval()
    return result | norm.state_dict() | {"evaluated": norm(rows(4, 50).double()).detach()}


def layer(kind, affine: bool):
    torch.manual_seed(0)
    norm = kind(CHANNELS, affine=affine).double()
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return norm


def split(counts: tuple[int, ...]) -> list[list[torch.Tensor]]:
    return [list(rows(sum(counts), step).double().split(list(counts))) for step in range(STEPS)]


def as_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parts = {
        number: trained(layer(BatchNorm1d, affine), split(counts), rank) for number, (counts, affine) in CASES.items()
    }
    torch.save(parts | {"unusual": unusual(rank)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def unusual(rank: int) -> dict[str, torch.Tensor]:
    """Normalise where no rank has a row, nothing is differentiated, over time, and in half precision."""
    norm = BatchNorm1d(CHANNELS)
    with torch.no_grad():
        empty = norm(torch.zeros(0, CHANNELS))
        running = torch.cat([norm.running_mean, norm.running_var])
        values = rows(8, 0).split(4)[rank]
        over_time = norm(values.T[None])[0].T
        half = norm((values - 200).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = norm(values)
    return {"empty": empty, "running": running, "over_time": over_time, "half": half, "mixed": mixed}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Run both ranks once for all cases; their imports take longer than what they do."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(as_rank, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("number", CASES, ids=map(str, CASES.values()))
def test_ranks_equal_one_process_with_the_joined_batch(number, ranks):
    counts, affine = CASES[number]
    whole = trained(layer(torch.nn.BatchNorm1d, affine), split(counts), None)
    assert ranks[0][number].keys() == whole.keys()
    for name, expected in whole.items():
        parts = [result[number][name] for result in ranks]
        if name.startswith(("output", "gradient")):
            got = torch.cat(parts)
        elif name.endswith(".gradient"):
            got = sum(parts)
        else:
            assert torch.equal(*parts), name
            got = parts[0]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("affine", [True, False])
def test_on_one_process_it_is_torchs_and_takes_its_state(affine):
    ours, theirs = layer(BatchNorm1d, affine), layer(torch.nn.BatchNorm1d, affine)
    got, expected = (trained(norm, split((7,)), None) for norm in (ours, theirs))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    fresh = layer(BatchNorm1d, affine)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh.eval()(rows(4, 50).double()), expected["evaluated"])


def test_it_works_over_time_and_in_half_precision(ranks):
    got = {name: torch.cat([result["unusual"][name] for result in ranks]) for name in ("over_time", "half", "mixed")}
    expected = torch.nn.BatchNorm1d(CHANNELS)(rows(8, 0)).detach()
    torch.testing.assert_close(got["over_time"], expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(got["mixed"], expected, rtol=0, atol=1e-3)
    rounded = torch.nn.BatchNorm1d(CHANNELS)((rows(8, 0) - 200).bfloat16().float()).detach()
    torch.testing.assert_close(got["half"], rounded.bfloat16(), rtol=0, atol=0.02)


def test_where_no_rank_has_a_row_the_running_statistics_stay(ranks):
    for result in ranks:
        assert result["unusual"]["empty"].shape == (0, CHANNELS)
        assert result["unusual"]["running"].tolist() == [0.0] * CHANNELS + [1.0] * CHANNELS
