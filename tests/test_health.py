"""Do the two numbers tell features that spread from features that have collapsed?"""

import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from audiossl.parts.health import effective_rank, feature_std


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_by_definition(rows: torch.Tensor) -> float:
    values = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def test_features_that_point_everywhere_have_a_std_of_one_over_the_root_of_their_dimension():
    for dim in (16, 256):
        assert float(feature_std(normal(4000, dim))) == pytest.approx(1 / math.sqrt(dim), rel=0.01)


def test_a_std_is_that_of_directions_not_of_lengths():
    rows = normal(50, 8)
    lengths = torch.logspace(-3, 3, 50)[:, None]
    torch.testing.assert_close(feature_std(rows * lengths), feature_std(rows))
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(feature_std(rows), (unit.var(0) + 1e-6).sqrt().mean())
    torch.testing.assert_close(feature_std(rows.view(5, 10, 8)), feature_std(rows))


def test_features_that_agree_have_the_smallest_std_and_no_rank():
    same = normal(1, 32).expand(40, 32)
    almost = same + 1e-7 * normal(40, 32, seed=1)  # what rounding leaves of a collapse
    for rows in (same, almost, torch.zeros(40, 32), normal(1, 32), torch.zeros(0, 32)):
        assert float(feature_std(rows)) == pytest.approx(1e-3, rel=1e-3)
        assert float(effective_rank(rows)) == 0.0


@pytest.mark.parametrize("shape", [(300, 20), (20, 300), (64, 64), (2, 5)])
def test_the_rank_is_the_entropy_of_the_singular_values(shape):
    rows = normal(*shape) * torch.linspace(0.05, 2, shape[1]) + 3
    assert float(effective_rank(rows)) == pytest.approx(rank_by_definition(rows), rel=1e-3)
    assert float(effective_rank(1000 * rows)) == pytest.approx(rank_by_definition(rows), rel=1e-3)


@pytest.mark.parametrize("directions", [1, 3])
def test_features_on_a_few_lines_have_a_healthy_std_and_a_low_rank(directions):
    rows = normal(200, directions) @ normal(directions, 64, seed=1)
    assert float(feature_std(rows)) > 0.5 / 8
    assert directions - 0.5 < float(effective_rank(rows)) < directions + 0.01


def test_mixed_precision_changes_nothing_and_no_gradient_is_kept():
    rows = normal(100, 16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = feature_std(rows), effective_rank(rows)
        low = effective_rank(rows.bfloat16())
    assert within == (feature_std(rows), effective_rank(rows))
    assert not any(value.requires_grad or value.dtype != torch.float32 for value in (*within, low))
    assert float(low) == pytest.approx(float(within[1]), rel=1e-2)


def test_features_that_are_not_numbers_are_for_another_alarm():
    assert float(effective_rank(torch.full((4, 3), float("nan")))) == 0.0
    assert feature_std(torch.full((4, 3), float("nan"))).isnan()


def measure(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = (normal(12, 6) * torch.linspace(0.1, 2, 6))[: 5 if rank == 0 else None][5 * rank :]
    found = [float(feature_std(rows)), float(effective_rank(rows)), float(effective_rank(rows[: 5 * rank]))]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def test_two_ranks_with_unequal_shares_measure_what_one_would(tmp_path):
    multiprocessing.spawn(measure, (str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    rows = normal(12, 6) * torch.linspace(0.1, 2, 6)
    told = [float(feature_std(rows)), float(effective_rank(rows)), float(effective_rank(rows[5:10]))]
    assert found[0] == found[1] == pytest.approx(told, rel=1e-5)
