"""Ranks whose clips were unreadable step with the others, and all learn what one process learns of the rest."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from maes import real_clips
from methods import batch_of, build
from torch.nn.parallel import DistributedDataParallel

from audiossl.noise import Noise

ROWS = {"audiomae": ([0, 1, 3], [2]), "passt": ([], [0, 2, 3])}
ROWS |= {"atst_clip": ([0, 1, 3], []), "atst_frame": ([0, 2, 3], [1]), "atst_c2f": ([1, 2], [])}
QUIET = {"atst_clip": dict(mixup_ratio=0.0), "atst_frame": dict(mixup_ratio=0.0), "atst_c2f": {}, "audiomae": {}}
QUIET |= {"passt": dict(waveform_mixup=0.0, spectrogram_mixup_alpha=None)}


def gradients(name: str, rows: list[int], clips: torch.Tensor, *, wrapped: bool) -> dict[str, torch.Tensor]:
    """Take one backward pass over some rows of a global batch of four."""
    method = build(name, **QUIET[name]).train()
    batch = batch_of(method, clips[rows], rows=rows)
    noise = Noise(0, 0, torch.tensor(rows, dtype=torch.int64), 4)
    model = DistributedDataParallel(method) if wrapped else method
    output = model(batch, generator=noise)
    output["loss"].backward()
    found = {f"grad {n}": p.grad for n, p in method.named_parameters() if p.requires_grad}
    found |= {f"buffer {n}": b for n, b in method.named_buffers() if "running" in n}
    return found | {"loss": output["loss"].detach()}


def as_rank(rank: int, folder: Path, clips: torch.Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: gradients(name, rows[rank], clips, wrapped=True) for name, rows in ROWS.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder, clips = tmp_path_factory.mktemp("ranks"), real_clips(4, 5.0)
    mp.spawn(as_rank, args=(folder, clips), nprocs=2)
    return clips, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ROWS)
def test_a_rank_with_fewer_clips_or_none_learns_what_one_process_learns_of_all(name, ranks):
    clips, found = ranks
    alone = gradients(name, sorted(sum(ROWS[name], [])), clips, wrapped=False)
    for key, value in alone.items():
        if key == "loss":
            both = torch.stack([rank[name]["loss"] for rank in found]).mean()
            torch.testing.assert_close(both, value, rtol=1e-5, atol=1e-6)
            continue
        atol = 1e-6 + 1e-4 * float(value.abs().max())  # sums in another order, over values far larger than some entries
        for rank in found:
            torch.testing.assert_close(rank[name][key], value, rtol=1e-3, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
