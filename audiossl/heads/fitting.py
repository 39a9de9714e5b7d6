"""How are heads fitted that learn by gradient steps: linear by SGD, MLP, attention, weighed layers?

All folds and learning rates are trained side by side (`nets.py`); each keeps the weights of its best validation, and
may stop early. Of a fold's learning rates and depths the best on its validation examples is tested, as it is: it is not
refitted. HEAR's grid (2203.03022, heareval) and ATST's linear evaluation (2204.12076) are settings of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.heads.examples import Examples, Split, tensor_of
from audiossl.heads.linear import Predicted, standardisation
from audiossl.heads.nets import Nets, Optimiser, Shape
from audiossl.heads.quality import losses_of, quality

VALUES_AT_ONCE = 1e8  # of rows gathered for a step
VALUES_ON_DEVICE = 1e9


@dataclass(frozen=True, kw_only=True)
class NetSettings:
    """Say how a head is built and fitted.

    Every entry of `lr` with every entry of `hidden_layers` (0: linear) is a candidate. `over` says what a bag is: the
    clip's vector, its segments, or its moments; only `attention` tells rows of a bag apart. `weighted` sums the layers
    by learned weights. `standardise` shifts and scales features by the training examples; `norm` batch is a batch norm
    without weights. `patience` counts checks, `check_every` epochs apart, without a better validation; null trains all
    `max_epochs`. `keep` last takes the last weights instead of the best.
    """

    optimiser: Literal["sgd", "adam"]
    lr: list[float]
    hidden_layers: list[int]
    hidden_width: int
    dropout: float
    norm: Literal["batch", "none"]
    standardise: bool
    over: Literal["clip", "segments", "moments"]
    attention: bool
    weighted: bool
    max_epochs: int
    check_every: int
    patience: int | None
    keep: Literal["best", "last"]
    batch_size: int
    schedule: Literal["cosine", "constant"]
    weight_decay: float


def fit(
    examples: Examples, splits: Sequence[Split], settings: NetSettings, *, seed: int,
    device: torch.device | str = "cpu", with_validation: bool = False,
) -> list[Predicted]:  # fmt: skip
    """Fit all candidates on every split, and give the test probabilities of each split's best."""
    if not settings.lr or not settings.hidden_layers or min(settings.hidden_layers) < 0:
        raise UserError("heads.*.lr and heads.*.hidden_layers: name at least one rate, and one depth, 0 for linear")
    examples = examples if settings.weighted else examples.concatenated()
    best: list[tuple[float, Predicted] | None] = [None] * len(splits)
    for depth in settings.hidden_layers:
        candidates = [(number, rate) for number in range(len(splits)) for rate in settings.lr]
        some = max(1, int(VALUES_AT_ONCE // max(_values_per_step(examples, splits, settings, depth), 1)))
        for first in range(0, len(candidates), some):
            group = candidates[first : first + some]
            one = _Fit(examples, splits, settings, group, depth, seed, device)
            found = one.run()
            held_out = one.held_out() if with_validation else [None] * len(group)
            for (number, rate), (goodness, probabilities), validation in zip(group, found, held_out, strict=True):
                if best[number] is None or goodness > best[number][0]:
                    chosen = {"lr": rate} | ({"hidden_layers": depth} if len(settings.hidden_layers) > 1 else {})
                    best[number] = goodness, Predicted(probabilities, chosen, validation)
    return [found[1] for found in best if found is not None]


def _values_per_step(examples: Examples, splits: Sequence[Split], settings: NetSettings, depth: int) -> int:
    """Count the numbers that one candidate touches in a step: rows of its bags, and its own weights."""
    longest = int(np.diff(examples.offsets).max())
    batch = min(settings.batch_size, max(len(split.train) for split in splits))
    row = examples.rows.shape[1] * examples.rows.shape[2]
    return batch * longest * row + (row + depth * settings.hidden_width) * settings.hidden_width * min(depth, 1)


class _Fit:
    """Train some candidates (split number, learning rate) of one depth side by side."""

    def __init__(
        self,
        examples: Examples,
        splits: Sequence[Split],
        settings: NetSettings,
        group: Sequence[tuple[int, float]],
        depth: int,
        seed: int,
        device: torch.device | str,
    ):
        self.settings, self.device = settings, torch.device(device)
        self.splits = [splits[number] for number, _ in group]
        self.is_exclusive, self.longest = examples.is_exclusive, int(np.diff(examples.offsets).max())
        rows = tensor_of(examples.rows)
        self.rows = rows.to(self.device) if rows.numel() <= VALUES_ON_DEVICE else rows
        self.offsets = torch.from_numpy(examples.offsets)
        self.targets = tensor_of(examples.targets).to(self.device)
        self.known = None if examples.known is None else tensor_of(examples.known).to(self.device)
        layers, width = rows.shape[1:]
        sizes = (layers, width, examples.targets.shape[1], depth, settings.hidden_width, settings.dropout)
        shape = Shape(*sizes, settings.weighted, settings.attention, settings.norm)
        self.generator = torch.Generator().manual_seed(seed)
        self.nets = Nets(shape, len(group), self.generator, self.device)
        rates = torch.tensor([rate for _, rate in group], device=self.device)
        self.optimiser = Optimiser(self.nets.weights, settings.optimiser, rates, settings.weight_decay)
        self.standard = self._standardisation([number for number, _ in group]) if settings.standardise else None
        self.everything = torch.arange(len(group), device=self.device)

    def _standardisation(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give mean and deviation (K, L, D) of each candidate's training rows."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for number, split in zip(numbers, self.splits, strict=True):
            if number not in found:
                owner = torch.repeat_interleave(torch.arange(len(self.targets)), self.offsets.diff())
                is_trained = torch.isin(owner, torch.from_numpy(split.train))
                found[number] = standardisation(self.rows[is_trained.to(self.rows.device)].double())
        both = [torch.stack([found[number][part] for number in numbers]).float().to(self.device) for part in (0, 1)]
        return both[0], both[1]

    def run(self) -> list[tuple[float, NDArray[np.float64]]]:
        """Train; returns for each candidate its quality in validation and its test probabilities."""
        settings, count = self.settings, len(self.splits)
        best = torch.full((count,), -math.inf, dtype=torch.float64)
        kept, waited = self.nets.copy(), torch.zeros(count)
        longest = max(len(split.train) for split in self.splits)
        batch = min(settings.batch_size, longest)
        steps = -(-longest // batch)
        has_validation = all(len(split.validation) for split in self.splits)
        with tqdm(total=settings.max_epochs, unit="epoch", desc="head", delay=3, leave=False) as bar:
            for epoch in range(settings.max_epochs):
                self._epoch(epoch, batch, steps)
                bar.update(1)
                if not has_validation or (epoch + 1) % settings.check_every and epoch + 1 < settings.max_epochs:
                    continue
                found = self._validate()
                better = found > best
                waited = torch.where(better, 0, waited + 1)
                best = torch.where(better, found, best)
                now = self.nets.copy()
                for name, value in kept.items():
                    value[better.to(self.device)] = now[name][better.to(self.device)]
                if settings.patience is not None and (waited >= settings.patience).all():
                    break
        if has_validation and settings.keep == "best":
            self.nets.load(kept)
        return list(zip(best.tolist(), self._predict([split.test for split in self.splits]), strict=True))

    def held_out(self) -> list[NDArray[np.float64]]:
        """Give each trained candidate's probabilities for its validation examples."""
        return self._predict([split.validation for split in self.splits])

    def _epoch(self, epoch: int, batch: int, steps: int) -> None:
        order = torch.stack([self._order(split.train, batch * steps) for split in self.splits])
        counted = torch.stack([torch.arange(batch * steps) < len(split.train) for split in self.splits])
        for step in range(steps):
            part = slice(step * batch, (step + 1) * batch)
            chosen, weights = order[:, part], counted[:, part].float().to(self.device)
            logits = self.nets.logits(*self._bags(chosen, self.everything), self.everything, generator=self.generator)
            loss = self._losses(logits, chosen.to(self.device))
            loss = (loss * weights).sum(1) / weights.sum(1).clamp(min=1)
            loss.sum().backward()
            share = (epoch * steps + step) / (self.settings.max_epochs * steps)
            self.optimiser.step(0.5 * (1 + math.cos(math.pi * share)) if self.settings.schedule == "cosine" else 1.0)

    def _order(self, rows: NDArray, count: int) -> Tensor:
        """Shuffle rows, and begin again where `count` is more; those count nothing."""
        order = torch.from_numpy(rows)[torch.randperm(len(rows), generator=self.generator)]
        return order.repeat(-(-count // len(order)))[:count]

    def _losses(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Give the loss of every example: (K, B, C) -> (K, B)."""
        known = None if self.known is None else self.known[chosen][..., None, :]
        return losses_of(logits[..., None, :], self.targets[chosen][..., None, :], known, self.is_exclusive)

    def _bags(self, chosen: Tensor, which: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gather the rows of examples (k, B), standardised as networks `which` want it: (k, B, M, L, D)."""
        if self.longest == 1:
            rows, is_there = self.rows[self.offsets[chosen].to(self.rows.device)][:, :, None], None
        else:
            starts, counts = self.offsets[chosen], self.offsets[chosen + 1] - self.offsets[chosen]
            places = torch.arange(int(counts.max()))
            is_there = (places < counts[..., None]).to(self.device)
            taken = starts[..., None] + places.minimum((counts - 1)[..., None])
            rows = self.rows[taken.to(self.rows.device)]
        rows = rows.to(self.device)
        if self.standard is not None:
            mean, deviation = (part[which][:, None, None] for part in self.standard)
            rows = (rows - mean) / deviation
        return rows, is_there

    @torch.no_grad()
    def _validate(self) -> Tensor:
        """Give each candidate's quality; of equals, the one of lower cross-entropy is better by next to nothing."""
        found = []
        for number, rows in enumerate([split.validation for split in self.splits]):
            logits = self._logits(number, rows)
            known = None if self.known is None else self.known[rows]
            goodness = quality(logits, self.targets[rows], known, self.is_exclusive)
            loss = float(losses_of(logits, self.targets[rows], known, self.is_exclusive))
            found.append(goodness - 1e-7 * min(loss, 1e3) if math.isfinite(loss) else -1.0)
        return torch.tensor(found, dtype=torch.float64)

    @torch.no_grad()
    def _predict(self, wanted: Sequence[NDArray]) -> list[NDArray[np.float64]]:
        found = []
        for number, rows in enumerate(wanted):
            logits = self._logits(number, rows).double()
            found.append((torch.softmax(logits, -1) if self.is_exclusive else torch.sigmoid(logits)).cpu().numpy())
        return found

    def _logits(self, number: int, rows: NDArray) -> Tensor:
        which = torch.tensor([number], device=self.device)
        size = max(1, int(VALUES_AT_ONCE // (self.longest * self.rows[0].numel())))
        parts = torch.from_numpy(rows).split(size)
        return torch.cat([self.nets.logits(*self._bags(part[None], which), which)[0] for part in parts])
