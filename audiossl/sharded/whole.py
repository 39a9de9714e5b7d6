"""How does one get back a whole from the pieces that many ranks saved?

DeepSpeed's own `zero_to_fp32` knows how ZeRO cuts (flat groups, paddings, partitions of stage 3); it is called here
for the weights, and again for each of the optimiser's moments, which are cut in the same way. It would unpickle
anything, so it runs where `torch.load` cannot.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiossl.checkpoints.torchfile import read_safely
from audiossl.errors import UserError
from audiossl.sharded.folders import TAG, problem_of, read_seal, read_state

PREFIX = "method."  # of what `Pretraining` trains
MOMENTS = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}
WEIGHTS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


@contextmanager
def only_weights() -> Iterator[None]:
    """Let nobody inside load with `weights_only=False`."""
    load = torch.load
    torch.load = lambda *args, **settings: load(*args, **(settings | {"weights_only": True}))
    try:
        yield
    finally:
        torch.load = load


def read_whole(folder: str | Path, *, with_optimizer: bool = False) -> dict[str, Any]:
    """Read a folder of many ranks as the ordinary checkpoint of the same step.

    Without `with_optimizer` there are no `optimizer_states`, and nothing can be resumed from it. Raises `UserError`
    for a folder that is incomplete or damaged, or where DeepSpeed is missing. No code in the folder runs.
    """
    folder = Path(folder)
    if problem := problem_of(folder):
        raise UserError(f"{folder}: {problem}")
    try:
        from deepspeed.utils import zero_to_fp32 as deepspeeds
    except ImportError:
        raise UserError(
            f"{folder}: reading it needs DeepSpeed; pip install -e '.[deepspeed]' -c constraints.txt"
        ) from None
    stage, ranks = read_seal(folder)["stage"], read_seal(folder)["ranks"]
    content = read_state(folder)
    run, own = content["run"], content["module"]
    with only_weights(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        files = deepspeeds.get_model_state_files(str(folder / TAG))
        states = deepspeeds.parse_model_states(files)
    parts = [read_safely(Path(file))["optimizer_state_dict"] for file in _optimizer_files(folder, ranks)]

    def join(flat: list[list[Tensor]]) -> dict[str, Tensor]:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if stage == 3:
                found = deepspeeds._get_fp32_state_dict_from_zero3_checkpoint(ranks, flat, states, False)
            else:
                paddings = parts[0].get("param_alignment_paddings")
                found = deepspeeds._get_fp32_state_dict_from_zero2_checkpoint(ranks, flat, states, False, paddings)
            return deepspeeds.to_torch_tensor(found)

    weights = join([part[WEIGHTS[stage]] for part in parts])
    buffers = {name: own[name] for name in content["buffer_names"]}  # theirs are turned into floats
    whole = {name: (weights | buffers)[name].clone() for name in own}
    checkpoint = run | {"state_dict": whole}
    return checkpoint | ({"optimizer_states": [_optimizer_state(parts, stage, join)]} if with_optimizer else {})


def _optimizer_files(folder: Path, ranks: int) -> list[Path]:
    files = sorted((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if [_rank_of(file) for file in files] != list(range(ranks)):
        raise UserError(f"{folder}: holds optimiser states of {len(files)} ranks, not of {ranks}")
    return files


def _rank_of(file: Path) -> int:
    return int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])


def _optimizer_state(parts: list[dict[str, Any]], stage: int, join) -> dict[str, Any]:
    """Give the state as `build_optimizer`'s optimiser has it: an entry a parameter, in the order of the groups."""
    key, sizes = MOMENTS[stage], [[flat.numel() for flat in part[WEIGHTS[stage]]] for part in parts]
    first = parts[0][key]["state"]
    if sorted(first) != list(range(len(sizes[0]))):
        raise UserError(f"the optimiser's state has {len(first)} groups, not {len(sizes[0])}")
    cut = [name for name, value in first[0].items() if torch.is_tensor(value) and value.numel() > 1]
    joined = {
        name: join(
            [
                [part[key]["state"][group][name][:size] for group, size in enumerate(own)]
                for part, own in zip(parts, sizes, strict=True)
            ]
        )
        for name in cut
    }
    state, groups = {}, []
    for group in parts[0][key]["param_groups"]:
        same = {name: value for name, value in first[0].items() if name not in cut}
        numbers = []
        for name in group["names"]:
            numbers.append(len(state))
            moments = {moment: joined[moment][PREFIX + name].clone() for moment in cut}
            state[len(state)] = {k: v.clone() if torch.is_tensor(v) else v for k, v in same.items()} | moments
        groups.append(group | {"params": numbers})
    return {"state": state, "param_groups": groups}
