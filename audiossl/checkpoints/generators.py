"""How does a resumed run draw the random numbers it would have drawn?

audiossl's own noise is a function of (seed, step) and needs none of this; users' callbacks and datasets may draw from
the global generators of Python, numpy and torch. Lightning's checkpoints leave those out.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


def seed_generators(seed: int) -> None:
    """Start this process's global generators (python, numpy, torch, CUDA) from `seed`, in [0, 2^32)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """Give the states of this process's global generators in plain types; `cuda` is the current device's, or None."""
    kind, keys, *rest = np.random.get_state()
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": [str(kind), keys.tolist(), *(float(value) for value in rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if has_cuda else None,
    }


def restore_generators(states: list[dict[str, Any]]) -> None:
    """Set this rank's generators from the states of all ranks; another number of ranks than saved leaves them alone."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size != len(states):
        log.warning("global random generators not restored: saved by %d ranks, now there are %d", len(states), size)
        return
    state = states[rank]
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
