"""How are weights updated: which ones decay, at which rate, when?

AdamW (1711.05101) with weight decay on matrices only, a learning rate that rises linearly and falls as half a cosine,
and for fine-tuning a rate that shrinks towards the input layer by layer (BEiT, 2106.08254). The schedule is a pure
function of the step, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from audiossl.errors import UserError


@dataclass(frozen=True)
class OptimSettings:
    """Hold the `optim` group of the config.

    The peak learning rate is `lr`, or `base_lr` for every 256 clips of the global batch; warm-up lasts
    `warmup_steps`, or `warmup_epochs`. Of each pair exactly one is given, or a `UserError` names both.
    """

    lr: float | None
    base_lr: float | None
    min_lr: float
    warmup_steps: int | None
    warmup_epochs: float | None
    warmup_ratio: float | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def __post_init__(self):
        for names in (("lr", "base_lr"), ("warmup_steps", "warmup_epochs", "warmup_ratio")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                given = ", ".join(f"optim.{name}={getattr(self, name)}" for name in names)
                raise UserError(f"{given}: give exactly one of them, null for the others")
        for name in ("lr", "base_lr", "min_lr", "warmup_steps", "warmup_epochs", "warmup_ratio", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"optim.{name}={value} must be a number from 0 up")

    def peak_lr(self, global_batch: int) -> float:
        """Give the highest learning rate, for `global_batch` clips per optimiser step."""
        return self.lr if self.lr is not None else scale_lr(self.base_lr, global_batch)

    def in_steps(self, steps_per_epoch: float, max_steps: int) -> OptimSettings:
        """Translate a warm-up in epochs, or as a share of `max_steps`, into whole steps, at least one."""
        if self.warmup_steps is not None:
            return self
        steps = self.warmup_ratio * max_steps if self.warmup_epochs is None else self.warmup_epochs * steps_per_epoch
        whole = max(round(steps), 1 if steps else 0)
        return replace(self, warmup_steps=whole, warmup_epochs=None, warmup_ratio=None)


def scale_lr(base_lr: float, global_batch: int) -> float:
    """Scale a learning rate given for 256 clips: micro-batch x accumulation x processes = `global_batch`."""
    return base_lr * global_batch / 256


def warmup_cosine(step: float, *, peak: float, floor: float, warmup_steps: float, max_steps: float) -> float:
    """Rise from 0 to `peak` over `warmup_steps`, then fall as half a cosine, reaching `floor` at `max_steps`.

    Step 0 of a warm-up has rate 0; past `max_steps` the value stays `floor`. In epochs: step = epoch x steps per
    epoch. Source: Audio-MAE `util/lr_sched.py`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def is_decayed(name: str, parameter: nn.Parameter, no_decay: Iterable[str] = ()) -> bool:
    """Tell whether weight decay acts: not on vectors and biases, nor on names ending in one of `no_decay`.

    Class and mask tokens have three axes and are decayed in pre-training, as published; fine-tuning passes them as
    `no_decay`.
    """
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim > 1 and last != "bias" and last not in no_decay


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict]:
    """Split what is trained into a decayed group and an undecayed one; fixed tables are buffers and in neither."""
    return _grouped((name, p, 1.0, weight_decay if is_decayed(name, p) else 0.0) for name, p in _trained(module))


def layer_decay_groups(
    module: nn.Module, *, depth: int, layer_decay: float, weight_decay: float, no_decay: Iterable[str]
) -> list[dict]:
    """Group an encoder with a head for fine-tuning: `lr_scale` = layer_decay ** (depth + 1 - layer).

    Layer 0 is the class token and the patch embedding, block i is layer i + 1, all behind the blocks is layer depth +
    1. Source: Audio-MAE `util/lr_decay.py`.
    """
    no_decay = tuple(no_decay)
    rows = []
    for name, parameter in _trained(module):
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        rows.append((name, parameter, scale, weight_decay if is_decayed(name, parameter, no_decay) else 0.0))
    return _grouped(rows)


def layer_of(name: str, depth: int) -> int:
    """Number the layer of a parameter of an encoder with `depth` blocks, 0 .. depth + 1."""
    parts = name.removeprefix("encoder.").split(".")
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    return 0 if parts[0] in ("class_token", "patch_embed", "positions") else depth + 1


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _grouped(rows: Iterable[tuple[str, nn.Parameter, float, float]]) -> list[dict]:
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter, scale, decay in rows:
        empty = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    module: nn.Module | list[dict], settings: OptimSettings, *, lr: float, allow_fused: bool = True
) -> torch.optim.AdamW:
    """Build AdamW over a module's parameters, or over ready groups; on CUDA in one fused kernel if `allow_fused`.

    A caller who changes the rate sets every group's `lr` to rate x `lr_scale`.
    """
    groups = module
    if isinstance(module, nn.Module):
        groups = parameter_groups(module, weight_decay=settings.weight_decay)
    fused = allow_fused and all(p.is_cuda for group in groups for p in group["params"])
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(settings.betas), eps=settings.eps, fused=fused or None)
