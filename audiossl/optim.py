"""How are weights updated: which ones decay, at which rate, when?

AdamW (1711.05101), as torch has it or as ATST was published with, or plain SGD; weight decay on matrices only (PaSST:
on everything), rate and decay as pure functions of the step (`schedules`), and for fine-tuning a rate that shrinks
towards the input layer by layer (BEiT, 2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from audiossl.errors import UserError
from audiossl.parts.adamw import PublishedAdamW
from audiossl.schedules import atst_cosine, passt_cycle, passt_ramps, warmup_cosine

FUSED_ON = ("cuda",)  # elsewhere the fused kernel rounds otherwise than the plain one and is no faster by much
TOKENS = ("class_token", "class_table", "table", "time", "frequency")  # class tokens and learned positions


@dataclass(frozen=True)
class OptimSettings:
    """Hold the `optim` group of the config.

    The peak learning rate is `lr`, or `base_lr` for every 256 clips of the global batch; warm-up lasts
    `warmup_steps`, `warmup_epochs`, or `warmup_ratio` of all steps. Of each exactly one is given, or a `UserError`
    names them. PaSST's schedules need `ramp_down`, (start, length) in the unit of the warm-up; `passt_cycle` takes the
    warm-up for half a cycle and reads the start only. With `final_weight_decay` the decay goes there as ATST's cosine.
    `optimizer` sgd has `momentum` and neither `betas` nor `eps` nor `adamw`. With `layer_decay` every layer's rate is
    that much smaller than the next one's, by the rule of `layer_decay_groups`. `head_lr_scale` multiplies the rate of a
    classifier, which starts from nothing while the encoder does not.
    `steps_per_epoch` is the length of a stair of PaSST's schedules; `in_steps` sets it where epochs are the unit.
    """

    schedule: Literal["warmup_cosine", "atst", "passt", "passt_cycle"]
    lr: float | None
    base_lr: float | None
    min_lr: float
    warmup_steps: int | None
    warmup_epochs: float | None
    warmup_ratio: float | None
    ramp_down: tuple[float, float] | None
    optimizer: Literal["adamw", "sgd"]
    momentum: float
    adamw: Literal["torch", "published"]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    final_weight_decay: float | None
    decay: Literal["matrices", "all"]
    layer_decay: float | None
    layer_decay_rule: Literal["audiomae", "atst"]
    head_lr_scale: float
    steps_per_epoch: float = 1.0

    def __post_init__(self):
        for names in (("lr", "base_lr"), ("warmup_steps", "warmup_epochs", "warmup_ratio")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                given = ", ".join(f"optim.{name}={getattr(self, name)}" for name in names)
                raise UserError(f"{given}: give exactly one of them, null for the others")
        rates, warmups = ("lr", "base_lr", "min_lr"), ("warmup_steps", "warmup_epochs", "warmup_ratio")
        for name in (*rates, *warmups, "weight_decay", "final_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"optim.{name}={value} must be a number from 0 up")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.momentum={self.momentum}: must be at least 0 and below 1, 0.9 for example")
        if not 0 < self.head_lr_scale < math.inf:
            raise UserError(f"optim.head_lr_scale={self.head_lr_scale}: must be above 0, 1 for the encoder's rate")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay={self.layer_decay}: must be above 0 and at most 1, 0.75 for example")
        if self.schedule.startswith("passt") != (self.ramp_down is not None):
            wanted = "needs [start, length], in the unit of the warm-up" if self.ramp_down is None else "must be null"
            raise UserError(f"optim.ramp_down={self.ramp_down}: optim.schedule={self.schedule} {wanted}")
        if self.final_weight_decay is not None and not self.weight_decay:
            raise UserError("optim.weight_decay=0: nothing decays; to end at optim.final_weight_decay start above 0")
        if self.schedule == "passt_cycle" and 0 in (self.warmup_steps, self.warmup_epochs, self.warmup_ratio):
            raise UserError("optim.schedule=passt_cycle: the warm-up is half a cycle, so it must be longer than 0")

    def peak_lr(self, global_batch: int) -> float:
        """Give the highest learning rate, for `global_batch` clips per optimiser step."""
        return self.lr if self.lr is not None else scale_lr(self.base_lr, global_batch)

    def in_steps(self, steps_per_epoch: float, max_steps: int) -> OptimSettings:
        """Translate lengths in epochs, or as shares of `max_steps`, into steps; a warm-up into whole ones, at least 1.

        PaSST's stairs are epochs when the lengths are; given in steps or shares, every step is a stair.
        """
        if self.warmup_steps is not None:
            return self
        unit = max_steps if self.warmup_epochs is None else steps_per_epoch
        steps = unit * (self.warmup_ratio if self.warmup_epochs is None else self.warmup_epochs)
        settled = dict(warmup_steps=max(round(steps), 1 if steps else 0), warmup_epochs=None, warmup_ratio=None)
        if self.ramp_down is not None:
            settled["ramp_down"] = (self.ramp_down[0] * unit, self.ramp_down[1] * unit)
            if self.warmup_epochs is not None:
                settled |= dict(warmup_steps=steps, steps_per_epoch=steps_per_epoch)
        return replace(self, **settled)

    def lr_at(self, step: int, *, global_batch: int, max_steps: int) -> float:
        """Give the learning rate of optimiser step `step` (0-based); lengths must be in steps, see `in_steps`."""
        peak, floor, warmup = self.peak_lr(global_batch), self.min_lr, self.warmup_steps
        if self.schedule == "warmup_cosine":
            return warmup_cosine(step, peak=peak, floor=floor, warmup_steps=warmup, max_steps=max_steps)
        if self.schedule == "atst":
            return atst_cosine(step, base=peak, final=floor, warmup_steps=warmup, max_steps=max_steps)
        ends = dict(peak=peak, floor=floor, warmup=warmup, tread=self.steps_per_epoch)
        if self.schedule == "passt":
            return passt_ramps(step, ramp_down=self.ramp_down, **ends)
        return passt_cycle(step, start=self.ramp_down[0], **ends)

    def weight_decay_at(self, step: int, max_steps: int) -> float:
        """Give the decay of the decayed weights at optimiser step `step` (0-based)."""
        if self.final_weight_decay is None:
            return self.weight_decay
        ends = dict(base=self.weight_decay, final=self.final_weight_decay)
        return atst_cosine(step, **ends, warmup_steps=0, max_steps=max_steps)


def scale_lr(base_lr: float, global_batch: int) -> float:
    """Scale a learning rate given for 256 clips: micro-batch x accumulation x processes = `global_batch`."""
    return base_lr * global_batch / 256


def is_decayed(name: str, parameter: nn.Parameter, no_decay: Iterable[str] = ()) -> bool:
    """Tell whether weight decay acts: not on vectors and biases, nor on names ending in one of `no_decay`.

    Class and mask tokens have three axes and are decayed in pre-training, as published; fine-tuning passes them as
    `no_decay`.
    """
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim > 1 and last != "bias" and last not in no_decay


def parameter_groups(
    module: nn.Module, *, weight_decay: float, decay: Literal["matrices", "all"] = "matrices"
) -> list[dict]:
    """Split what is trained into a decayed group and an undecayed one (`decay` all: into one, decayed).

    Fixed tables are buffers, a teacher's parameters need no gradient: they are in neither.
    """
    everything = decay == "all"
    return _grouped((n, p, 1.0, weight_decay if everything or is_decayed(n, p) else 0.0) for n, p in _trained(module))


def layer_decay_groups(
    module: nn.Module,
    *,
    depth: int,
    layer_decay: float,
    weight_decay: float,
    rule: Literal["audiomae", "atst"] = "audiomae",
    no_decay: Iterable[str] = (),
    decay: Literal["matrices", "all"] = "matrices",
) -> list[dict]:
    """Group an encoder with a head for fine-tuning; each group's `lr_scale` is what its layer takes of the rate.

    Block i of `depth` takes layer_decay ** (depth - i) by either rule. `audiomae` (its `util/lr_decay.py`, after BEiT):
    what lies before the blocks layer_decay ** (depth + 1), what lies behind them 1. `atst` (its fine-tuning scripts):
    what lies before them as much as block 0, the final norm layer_decay, a head 1. Weight decay acts as `decay` says,
    and not on what `no_decay` names. Differs: ATST's code counts 12 blocks, however many there are.
    """
    no_decay, rows = tuple(no_decay), []
    for name, parameter in _trained(module):
        steps = depth + 1 - layer_of(name, depth)
        if rule == "atst":
            is_norm = name.removeprefix("encoder.").startswith("norm.")
            steps = min(max(steps, int(is_norm)), depth)
        acts = decay == "all" or is_decayed(name, parameter, no_decay)
        rows.append((name, parameter, layer_decay**steps, weight_decay if acts else 0.0))
    return _grouped(rows)


def layer_of(name: str, depth: int) -> int:
    """Number the layer of a parameter of an encoder with `depth` blocks, 0 .. depth + 1."""
    parts = name.removeprefix("encoder.").split(".")
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    return 0 if parts[0] in ("class_token", "patch_embed", "positions") else depth + 1


def groups_of(module: nn.Module, settings: OptimSettings) -> list[dict]:
    """Group a method's parameters as the settings say; `layer_decay` counts the blocks of its `encoder`."""
    rules = dict(weight_decay=settings.weight_decay, decay=settings.decay)
    if settings.layer_decay is None:
        return _with_head_at(settings.head_lr_scale, parameter_groups(module, **rules))
    is_audiomae = settings.layer_decay_rule == "audiomae"
    rules |= dict(no_decay=TOKENS) if is_audiomae else {}
    depth, by = len(module.encoder.blocks), dict(layer_decay=settings.layer_decay, rule=settings.layer_decay_rule)
    return _with_head_at(settings.head_lr_scale, layer_decay_groups(module, depth=depth, **by, **rules))


def _with_head_at(scale: float, groups: list[dict]) -> list[dict]:
    """Give the parameters of `head` and `attention` `scale` times their rate."""
    if scale == 1:
        return groups
    pairs = [(group, row) for group in groups for row in zip(group["names"], group["params"], strict=True)]
    is_head = {name: name.startswith(("head.", "attention.")) for _, (name, _) in pairs}
    return _grouped(
        (name, parameter, group["lr_scale"] * (scale if is_head[name] else 1.0), group["weight_decay"])
        for group, (name, parameter) in pairs
    )


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
) -> torch.optim.Optimizer:
    """Build an optimiser over a module's parameters or ready groups; AdamW is one fused kernel on CUDA if allowed.

    A caller who changes the rate sets every group's `lr` to rate x `lr_scale`, one who changes the decay the
    `weight_decay` of groups that have one.
    """
    groups = groups_of(module, settings) if isinstance(module, nn.Module) else module
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    same = dict(lr=lr, betas=tuple(settings.betas), eps=settings.eps)
    if settings.adamw == "published":
        return PublishedAdamW(groups, **same)
    fused = allow_fused and all(p.device.type in FUSED_ON for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, **same, fused=fused or None)
