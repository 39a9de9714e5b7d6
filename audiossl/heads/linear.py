"""How well do two heads without chance read classes off features: logistic regression and nearest neighbours?

Both see features standardised by the clips they are fitted on. What they may choose is chosen on the validation clips;
then they are refitted with those, and only then the test clips are looked at. All folds are fitted at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from audiossl.heads.examples import Examples, Split, tensor_of
from audiossl.heads.lbfgs import Logistic, minimise, pieces
from audiossl.heads.quality import cross_entropy, quality

VALUES_IN_FLOAT64 = 1e8  # of features; more stay float32, and may stay on disk
VALUES_AT_ONCE = 5e7  # logits held together
PAIRS_AT_ONCE = 5e7
Problem = tuple[NDArray, float]  # the rows that it is fitted on, and the weight of its penalty


class Predicted(NamedTuple):
    """Hold a head's probabilities for the test examples of a fold (test, C), and what it chose there.

    `validation` are those for the validation examples, by the same head fitted without them; None where not asked for.
    """

    probabilities: NDArray[np.float64]
    chosen: dict[str, float | str]
    validation: NDArray[np.float64] | None = None


def linear(
    examples: Examples, splits: Sequence[Split], *, l2_grid: list[float], device: torch.device | str = "cpu",
    with_validation: bool = False,
) -> list[Predicted]:  # fmt: skip
    """Fit logistic regression by L-BFGS, fold by fold: multinomial where a clip has one class, else one per class.

    An entry of `l2_grid` weighs half the squared coefficients against the sum of the losses, as 1 / C of scikit-learn;
    that of least cross-entropy on the validation examples is taken. Where there is one entry, nothing is chosen and
    validation examples are trained on.
    """
    features = tensor_of(examples.vectors()).to(device)
    if features.numel() <= VALUES_IN_FLOAT64:
        features = features.double()
    targets = tensor_of(examples.targets).to(device, torch.float64)
    known = None if examples.known is None else tensor_of(examples.known).to(device)
    chosen = [l2_grid[0]] * len(splits)
    if len(l2_grid) > 1:
        problems = [(split.train, l2) for split in splits for l2 in l2_grid]
        losses = []
        rough = _logits(features, targets, known, problems, examples.is_exclusive, precision=0.01)
        for number, logits in enumerate(rough):
            rows = splits[number // len(l2_grid)].validation
            losses.append(cross_entropy(logits[rows], targets[rows], _of(known, rows), examples.is_exclusive))
        of_fold = np.array(losses).reshape(len(splits), -1)
        chosen = [l2_grid[best] for best in of_fold.argmin(1)]
    problems = [(np.concatenate([s.train, s.validation]), l2) for s, l2 in zip(splits, chosen, strict=True)]
    asked = [split.test for split in splits]
    if with_validation:
        problems += [(split.train, l2) for split, l2 in zip(splits, chosen, strict=True)]
        asked += [split.validation for split in splits]
    found = []
    all_logits = _logits(features, targets, known, problems, examples.is_exclusive)
    for rows, logits in zip(asked, all_logits, strict=True):
        probabilities = torch.softmax(logits[rows], -1) if examples.is_exclusive else torch.sigmoid(logits[rows])
        found.append(probabilities.cpu().numpy())
    validation = found[len(splits) :] or [None] * len(splits)
    return [
        Predicted(tested, {"l2": l2}, held_out)
        for tested, l2, held_out in zip(found[: len(splits)], chosen, validation, strict=True)
    ]


def _logits(
    features: Tensor,
    targets: Tensor,
    known: Tensor | None,
    problems: Sequence[Problem],
    is_exclusive: bool,
    *,
    precision: float = 1.0,
) -> Iterator[Tensor]:
    """Fit each problem (rows, l2), and yield the logits of all examples (n, C), in order."""
    at_once = max(1, int(VALUES_AT_ONCE // (len(features) * max(targets.shape[1], 1))))
    for first in range(0, len(problems), at_once):
        some = problems[first : first + at_once]
        logistic = _posed(features, targets, known, some, is_exclusive)
        size = (features.shape[1] + 1) * targets.shape[1]
        counts = torch.tensor([float(len(rows)) for rows, _ in some], device=features.device)
        tolerance = (1e-3 * logistic.l2 / counts).clamp(1e-9, 1e-6) / precision  # a flat valley: nearer its floor
        points = minimise(logistic, targets.new_zeros(len(some), size), tolerance=tolerance)
        everything = torch.arange(len(some), device=features.device)
        yield from logistic.scores(points.unflatten(1, (-1, targets.shape[1])), everything)


def _posed(
    features: Tensor,
    targets: Tensor,
    known: Tensor | None,
    problems: Sequence[tuple[NDArray, float]],
    is_exclusive: bool,
) -> Logistic:
    weights, means, deviations = targets.new_zeros(len(problems), len(features)), [], []
    seen: dict[bytes, tuple[Tensor, Tensor]] = {}
    for number, (rows, _) in enumerate(problems):
        place = torch.from_numpy(np.asarray(rows)).to(features.device)
        weights[number, place] = 1.0
        if (key := np.asarray(rows).tobytes()) not in seen:
            seen[key] = standardisation_of(features, place)
        mean, deviation = seen[key]
        means.append(mean)
        deviations.append(deviation)
    if known is not None:
        weights = weights[:, :, None] * known[None]
    l2 = torch.tensor([l2 for _, l2 in problems], dtype=targets.dtype, device=features.device)
    return Logistic(features, targets, weights, l2, torch.stack(means), torch.stack(deviations), is_exclusive)


def standardisation_of(features: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and deviation of the rows `place` (m,) of features (n, D), in float64; of float32 piece by piece."""
    if features.dtype == torch.float64:
        return standardisation(features[place])
    parts = [place[rows] for rows in pieces(features) if rows.start < len(place)]
    mean = sum(features[part].double().sum(0) for part in parts) / len(place)
    squares = sum((features[part].double() - mean).square().sum(0) for part in parts)
    return mean, _usable((squares / len(place)).sqrt(), mean)


def standardisation(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and deviation along the first axis; 1 for what is constant."""
    mean = rows.mean(0)
    return mean, _usable(rows.std(0, correction=0), mean)


def _usable(deviation: Tensor, mean: Tensor) -> Tensor:
    return torch.where(deviation > 1e-8 * (1 + mean.abs()), deviation, 1.0)


def knn(
    examples: Examples, splits: Sequence[Split], *, neighbours: list[int], device: torch.device | str = "cpu",
    with_validation: bool = False,
) -> list[Predicted]:  # fmt: skip
    """Let the nearest training examples by cosine vote: a class's probability is its share among them.

    The number of voters is the one of best quality on the validation examples (accuracy or mAP), the first of equals.
    """
    features = tensor_of(examples.vectors()).to(device)
    targets = tensor_of(examples.targets).to(device)
    known = None if examples.known is None else tensor_of(examples.known).to(device)
    found = []
    for split in splits:
        possible = [k for k in neighbours if k <= len(split.train)] or [len(split.train)]
        is_asked = with_validation or len(possible) > 1
        votes = _votes(features, targets, known, split.train, split.validation, possible) if is_asked else []
        rows = split.validation
        goodness = [quality(some, targets[rows], _of(known, rows), examples.is_exclusive) for some in votes]
        best = int(np.argmax(goodness)) if goodness else 0
        held_out = votes[best].double().cpu().numpy() if with_validation else None
        fitted = np.concatenate([split.train, split.validation])
        (votes,) = _votes(features, targets, known, fitted, split.test, possible[best : best + 1])
        found.append(Predicted(votes.double().cpu().numpy(), {"neighbours": possible[best]}, held_out))
    return found


def _votes(
    features: Tensor, targets: Tensor, known: Tensor | None, fitted: NDArray, asked: NDArray, neighbours: list[int]
) -> list[Tensor]:
    """Give the share of each class among the k nearest of `fitted` for the examples `asked`, for every k."""
    mean, deviation = standardisation(features[fitted])
    kept = functional.normalize((features[fitted] - mean) / deviation, dim=-1)
    weights = torch.ones_like(targets[fitted]) if known is None else known[fitted].float()
    parts: list[list[Tensor]] = [[] for _ in neighbours]
    for rows in np.array_split(asked, max(1, int(len(asked) * len(kept) // PAIRS_AT_ONCE))):
        like = functional.normalize((features[rows] - mean) / deviation, dim=-1) @ kept.T
        nearest = like.topk(max(neighbours), dim=1).indices
        for part, k in zip(parts, neighbours, strict=True):
            voters = nearest[:, :k]
            counted = weights[voters].sum(1)
            part.append((targets[fitted][voters] * weights[voters]).sum(1) / counted.clamp(min=1))
    return [torch.cat(part) for part in parts]


def _of(known: Tensor | None, rows: NDArray) -> Tensor | None:
    return None if known is None else known[rows]
