"""How are many logistic regressions on the same features fitted at once?

L-BFGS (Liu & Nocedal 1989) for K independent convex problems side by side: one pass over the features serves all of
them, each takes its own steps, and those that have converged drop out. Folds differ by the weights of the rows, and
standardisation is folded into the coefficients, so that the features are never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
HISTORY, SUFFICIENT, SHRINK, MAX_HALVINGS = 10, 1e-4, 0.5, 30
VALUES_AT_ONCE = 2**23  # of features that are made float64 for a product


@dataclass(frozen=True)
class Logistic:
    """Pose K logistic regressions on features (n, D): multinomial, or one against the rest for every class.

    All is float64; but features may be float32, and are then made float64 a piece at a time, where all at once would
    not fit.
    targets (n, C) are 0 or 1; weights (K, n) or (K, n, C) say how much a row (its class) counts for a problem, 0 for
    not at all; l2 (K,) weighs half the squared coefficients against the sum of the losses, as 1 / C of scikit-learn.
    mean and deviation (K, D) standardise the features. A point is (K, D + 1, C), the intercepts last, which are free.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor
    l2: Tensor
    mean: Tensor
    deviation: Tensor
    is_multinomial: bool

    def scores(self, points: Tensor, which: Tensor, features: Tensor | None = None) -> Tensor:
        """Give the logits (k, n, C) of problems `which` at points (k, D + 1, C)."""
        features = self.features if features is None else features
        scaled = points[:, :-1] / self.deviation[which, :, None]
        offset = points[:, -1] - torch.einsum("kd,kdc->kc", self.mean[which], scaled)
        flat = product(features, scaled.permute(1, 0, 2).flatten(1))
        return flat.unflatten(1, (len(which), -1)).transpose(0, 1) + offset[:, None]

    def __call__(self, flat: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Give loss (k,) and gradient (k, P) at flat points (k, P) of problems `which`, per unit of weight."""
        classes = self.targets.shape[1]
        points = flat.unflatten(1, (-1, classes))
        logits = self.scores(points, which)
        weights = self.weights[which]
        weights = weights if weights.ndim == 3 else weights[:, :, None]
        total = weights.sum((1, 2)).clamp(min=1e-12) / (weights.shape[2] if weights.shape[2] > 1 else 1)
        if self.is_multinomial:
            losses = -(torch.log_softmax(logits, -1) * self.targets).sum(-1, keepdim=True)
            slope = torch.softmax(logits, -1) - self.targets
        else:
            losses = torch.nn.functional.softplus(logits) - logits * self.targets
            slope = torch.sigmoid(logits) - self.targets
        residual = weights * slope / total[:, None, None]
        penalty = self.l2[which] / total
        loss = (weights * losses).sum((1, 2)) / total + penalty / 2 * points[:, :-1].square().sum((1, 2))
        intercept = residual.sum(1)
        by_feature = transposed_product(self.features, residual.transpose(0, 1).flatten(1))
        by_feature = (
            by_feature.unflatten(1, (len(which), -1)).transpose(0, 1) - self.mean[which, :, None] * intercept[:, None]
        )
        coefficients = by_feature / self.deviation[which, :, None] + penalty[:, None, None] * points[:, :-1]
        return loss, torch.cat([coefficients, intercept[:, None]], dim=1).flatten(1)


def pieces(features: Tensor) -> list[slice]:
    """Cut (n, D) into rows of which some millions of values are float64 at once; float64 is in one piece."""
    at_once = len(features) if features.dtype == torch.float64 else VALUES_AT_ONCE // max(features.shape[1], 1)
    ends = [*range(0, len(features), max(at_once, 1)), len(features)]
    return [slice(*ends) for ends in pairwise(ends)]


def product(features: Tensor, matrix: Tensor) -> Tensor:
    """Multiply (n, D) with (D, m), float64."""
    return torch.cat([matrix.new_zeros(0, matrix.shape[1]), *(features[r].double() @ matrix for r in pieces(features))])


def transposed_product(features: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the transpose of (n, D) with (n, m), float64."""
    total = matrix.new_zeros(features.shape[1], matrix.shape[1])
    for rows in pieces(features):
        total += features[rows].double().T @ matrix[rows]
    return total


def minimise(objective: Objective, start: Tensor, *, tolerance: Tensor, max_iterations: int = 2000) -> Tensor:
    """Minimise K problems from start (K, P); one is done when no entry of its gradient exceeds its `tolerance` (K,).

    `objective(points (k, P), which (k,))` gives loss (k,) and gradient (k, P).
    """
    points, which = start.clone(), torch.arange(len(start), device=start.device)
    loss, gradient = objective(points, which)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    final = points.clone()
    for _ in range(max_iterations):
        is_open = gradient.abs().amax(1) > tolerance[which]
        if not is_open.all():
            final[which] = points
            points, loss, gradient, which = points[is_open], loss[is_open], gradient[is_open], which[is_open]
            steps = [tuple(part[is_open] for part in step) for step in steps]
        if not len(which):
            return final
        direction = -_inverse_hessian(gradient, steps)
        slope = (direction * gradient).sum(1)
        uphill = slope >= 0  # rounding has spoilt the history: begin again downhill
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.square().sum(1), slope)
        scale = torch.ones_like(loss) if steps else (1 / gradient.abs().sum(1)).clamp(max=1.0)
        found = _search(objective, points, which, loss, direction, slope, scale)
        moved, turned = found[0] - points, found[2] - gradient
        curvature = (moved * turned).sum(1)
        usable = curvature > 1e-12 * turned.square().sum(1)
        steps.append((moved, turned, torch.where(usable, 1 / curvature.clamp(min=1e-300), 0.0)))
        steps = steps[-HISTORY:]
        stuck = (moved == 0).all(1)  # no step lowers the loss: as good as the numbers allow
        points, loss, gradient = found[0], found[1], torch.where(stuck[:, None], 0.0, found[2])
    final[which] = points
    return final


def _inverse_hessian(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Apply the two-loop recursion, problem by problem."""
    direction, shares = gradient.clone(), []
    for moved, turned, inverse in reversed(steps):
        shares.append(inverse * (moved * direction).sum(1))
        direction -= shares[-1][:, None] * turned
    if steps:
        moved, turned, inverse = steps[-1]
        scale = (moved * turned).sum(1) / turned.square().sum(1).clamp(min=1e-300)
        direction *= torch.where(inverse > 0, scale, 1.0)[:, None]
    for (moved, turned, inverse), share in zip(steps, reversed(shares), strict=True):
        direction += moved * (share - inverse * (turned * direction).sum(1))[:, None]
    return direction


def _search(
    objective: Objective, points: Tensor, which: Tensor, loss: Tensor, direction: Tensor, slope: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Shorten each problem's step until its loss falls enough (Armijo); those that never do stay where they are."""
    best_points, best_loss, best_gradient = points.clone(), loss.clone(), torch.zeros_like(points)
    waiting = torch.arange(len(points), device=points.device)
    for _ in range(MAX_HALVINGS):
        tried = points[waiting] + scale[waiting, None] * direction[waiting]
        tried_loss, tried_gradient = objective(tried, which[waiting])
        fits = tried_loss <= loss[waiting] + SUFFICIENT * scale[waiting] * slope[waiting]
        done = waiting[fits]
        best_points[done], best_loss[done], best_gradient[done] = tried[fits], tried_loss[fits], tried_gradient[fits]
        waiting = waiting[~fits]
        if not len(waiting):
            break
        scale = scale.clone()
        scale[waiting] *= SHRINK
    return best_points, best_loss, best_gradient
