"""What does a head see?

Examples, each a bag of rows: a clip is the bag of its segments or of its moments, a moment a bag of one. Heads that
want one vector take the mean of the bag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audiossl.errors import UserError

if TYPE_CHECKING:
    from audiossl.probes.blocks import ClipFeatures

Layers = Literal["last"] | int | list[int]
Pooling = Literal["mean", "max", "class", "class+mean"]


@dataclass(frozen=True)
class Split:
    """Name the rows of a feature table that a head is fitted on, makes its choice on, and is tested on."""

    train: NDArray
    validation: NDArray
    test: NDArray

    @classmethod
    def of_folds(
        cls, folds: NDArray, *, train_folds: Sequence[int], validation_fold: int, test_folds: Sequence[int]
    ) -> Split:
        """Divide clips by fold number; `train_folds` may name the validation fold too, which is then taken out."""
        assert validation_fold not in test_folds and not set(train_folds) & set(test_folds), "a test fold is trained on"
        train = [fold for fold in train_folds if fold != validation_fold]
        return cls(
            np.flatnonzero(np.isin(folds, train)),
            np.flatnonzero(folds == validation_fold),
            np.flatnonzero(np.isin(folds, test_folds)),
        )


@dataclass(frozen=True)
class Examples:
    """Hold n examples: `rows` (R, L, D), those of example i from `offsets[i]` to `offsets[i + 1]`, and their targets.

    `targets` (n, C) are 0 or 1; `known` (n, C) says which of them count, None for all. `is_exclusive`: exactly one
    class each.
    """

    rows: NDArray[np.float32]
    offsets: NDArray[np.int64]
    targets: NDArray[np.float32]
    known: NDArray[np.bool_] | None
    is_exclusive: bool

    def __len__(self) -> int:
        return len(self.targets)

    def vectors(self) -> NDArray[np.float32]:
        """Average each bag, layers side by side: (n, L * D)."""
        rows = self.rows.reshape(len(self.rows), -1)
        if len(rows) == len(self):
            return np.ascontiguousarray(rows)
        sums = np.add.reduceat(rows, self.offsets[:-1], axis=0, dtype=np.float64)
        return (sums / np.diff(self.offsets)[:, None]).astype(np.float32)

    def exploded(self) -> tuple[Examples, NDArray[np.int64]]:
        """Make every row an example of its own; returns them, and which example each row was of."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        known = None if self.known is None else self.known[owner]
        alone = np.arange(len(self.rows) + 1)
        return Examples(self.rows, alone, self.targets[owner], known, self.is_exclusive), owner

    def concatenated(self) -> Examples:
        """Lay the layers side by side: one layer of width L * D."""
        return replace(self, rows=self.rows.reshape(len(self.rows), 1, -1))


def tensor_of(values: NDArray) -> Tensor:
    """Make a tensor of an array; of one that is mapped from a file, and so cannot be written, a copy."""
    values = np.ascontiguousarray(values)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def averaged(rows: NDArray, owner: NDArray[np.int64], num: int) -> NDArray:
    """Average the rows of each owner: (R, C) -> (num, C)."""
    sums = np.zeros((num, rows.shape[1]))
    np.add.at(sums, owner, rows)
    return sums / np.bincount(owner, minlength=num)[:, None].clip(min=1)


def split_rows(split: Split, owner: NDArray[np.int64]) -> Split:
    """Say which rows belong to the examples of a split."""
    return Split(*(np.flatnonzero(np.isin(owner, part)) for part in (split.train, split.validation, split.test)))


def take_layers(values: NDArray, layers: Layers) -> NDArray:
    """Choose along axis 1, (R, L, ...): the last, the n last, or those numbered; raise `UserError` for others."""
    depth = values.shape[1]
    if layers == "last":
        return values[:, -1:]
    if isinstance(layers, int) and not isinstance(layers, bool) and 1 <= layers <= depth:
        return values[:, depth - layers :]
    if isinstance(layers, list) and layers and all(layer in range(-depth, depth) for layer in layers):
        return values[:, [layer % depth for layer in layers]]
    raise UserError(
        f"probe.layers={layers}: last, the number of last layers (1 to {depth}), or a list, 0 to {depth - 1}"
    )


def pooled_rows(features: ClipFeatures, pooling: Pooling, layers: Layers | None) -> NDArray[np.float32]:
    """Take one vector a segment and layer: (segments, L, D'); `layers` None is all of them."""
    from audiossl.probes.segments import POOLED  # which imports what opens any encoder

    if "class" in pooling and not features.has_classes:
        raise UserError(f"probe.pooling={pooling}: this encoder has no class token; take mean or max")
    parts = [features.pooled[:, :, POOLED.index(name)] for name in pooling.split("+")]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(joined if layers is None else take_layers(joined, layers))


def good_clips(features: ClipFeatures) -> NDArray[np.int64]:
    """List the clips that have features."""
    return np.flatnonzero(np.diff(features.offsets) > 0)


def within(clips: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Say at which places of `kept` (ascending) the clips stand; those not in it are left out."""
    there = clips[np.isin(clips, kept)]
    return np.searchsorted(kept, there)
