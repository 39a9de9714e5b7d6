"""Does a run fit on a device, and its checkpoints on the disk?

Weights, gradients and optimiser state are counted from the model, and ZeRO (arXiv 1910.02054) shares them out over the
devices; what is kept for the backward pass was measured. The allocator's own losses and the kernels' work space come on
top and are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from audiossl.planning.cost import Cost


@dataclass(frozen=True)
class Sizes:
    """Count parameters: of the whole method, those that are trained, the encoder's; and the bytes of all the rest."""

    whole: int
    trained: int
    encoder: int
    untrained_bytes: int


def sizes_of(method: nn.Module) -> Sizes:
    """Count a method's parameters; `untrained_bytes` are teachers, tables and statistics, in float32 as they are."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    others = [p for p in method.parameters() if not p.requires_grad] + list(method.buffers())
    return Sizes(
        whole=sum(p.numel() for p in method.parameters()),
        trained=trained,
        encoder=sum(p.numel() for p in method.encoder.parameters()),
        untrained_bytes=sum(t.numel() * t.element_size() for t in others),
    )


def state_slots(optim: Mapping[str, Any]) -> int:
    """Count the float32 numbers that the optimiser remembers of each trained weight."""
    if optim["optimizer"] == "sgd":
        return 1 if optim["momentum"] else 0
    return 2


def zero_stage(strategy: Any) -> int | None:
    """Read ZeRO's stage off the config's strategy; None where it is not DeepSpeed."""
    text = str(strategy)
    stage = re.search(r"stage[^0-9]*([123])", text)
    return (int(stage[1]) if stage else 2) if "deepspeed" in text.lower() else None


def memory_of(
    sizes: Sizes, cost: Cost, *, batch_size: int, devices: int, optim: Mapping[str, Any], strategy: Any, is_half: bool,
    remembered_bytes: int,
) -> dict[str, int]:  # fmt: skip
    """Split the bytes of one device by what they hold, in the order of a table; they add up to what it needs.

    Under DeepSpeed with 16-bit precision the weights are 16 bit, and the float32 copy is the optimiser's.
    """
    full, slots, stage = 4 * sizes.trained, state_slots(optim), zero_stage(strategy)
    state, weights, gradients = slots * full, full, full
    if stage is not None:
        weights, gradients, state = (full // 2, full // 2, state + full) if is_half else (full, full, state)
        state //= devices
        gradients //= devices if stage >= 2 else 1
        weights //= devices if stage == 3 else 1
    parts = {"weights": weights, "gradients": gradients, "optimiser state": state}
    parts["teacher, tables"] = sizes.untrained_bytes
    if devices > 1 and stage is None:
        parts["DDP's buckets"] = full
    parts["clips remembered"] = remembered_bytes
    parts["kept for backward"] = cost.fixed_bytes + batch_size * cost.saved_bytes
    parts["a block run again"] = batch_size * cost.recomputed_bytes
    return {name: size for name, size in parts.items() if size}


def remembered_bytes(method: nn.Module) -> int:
    """Count the spectrograms that a method keeps to mix later clips with; it must have seen a clip."""
    return sum(bank.num_bytes for bank in getattr(method, "memory", ()))


def checkpoint_bytes(method: nn.Module, sizes: Sizes, optim: Mapping[str, Any]) -> int:
    """Say how large a checkpoint is: all that is in the state dict, and the optimiser's state of what is trained."""
    weights = sum(t.numel() * t.element_size() for t in method.state_dict().values())
    return weights + 4 * sizes.trained * state_slots(optim)
