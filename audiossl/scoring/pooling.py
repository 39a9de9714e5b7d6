"""What does a clip's label teach its frames: how do frame probabilities become a clip's?

A weak label says that a class is somewhere in the clip (multiple instance learning). The clip's probability is a
weighted mean of its frames', and the five functions differ in the weights: all on the highest (max), equal (average),
the probability itself (linear softmax), its exponential, or learned (attention). Their gradients differ more: max
teaches one frame, average all alike, linear softmax pushes frames above half the clip's probability up and the others
down. Wang, Li and Metze 2019, arXiv 1810.09050, table 1. The attention is that of ATST-Frame's DESED recipe
(2306.04186), after DCASE's baseline.

Frame probabilities are (B, T', C) in [0, 1], `valid` (B, T') marks the frames that are no padding, at least one a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

CLAMP = 1e-7
WeakPooling = Literal["none", "max", "average", "linear_softmax", "exponential_softmax", "attention"]


def max_pool(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Take the highest frame: (B, C). The first of several has the gradient, which is 1."""
    inside = _inside(probabilities, valid)
    return probabilities.masked_fill(~inside, -1.0).max(1).values


def average_pool(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average the frames: (B, C). The gradient is 1 / T' for every frame."""
    return _weighted(probabilities, torch.ones_like(probabilities), valid)


def linear_softmax_pool(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Weigh frames by their probability: (B, C). The gradient is (2 y_t - y) / sum of y_t."""
    return _weighted(probabilities, probabilities, valid)


def exponential_softmax_pool(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Weigh frames by the exponential of their probability: (B, C).

    The gradient is (1 - y + y_t) exp(y_t) / sum of exp(y_t).
    """
    values = torch.where(_inside(probabilities, valid), probabilities, 0.0)  # no exponential of what padding holds
    return _weighted(values, values.exp(), valid)


def attention_pool(probabilities: Tensor, weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Weigh frames by `weights` (B, T', C), not negative: (B, C).

    The gradients are w_t / sum of w_t for the probabilities and (y_t - y) / sum of w_t for the weights.
    """
    return _weighted(probabilities, weights, valid)


POOLINGS: dict[str, Callable[..., Tensor]] = {
    "max": max_pool,
    "average": average_pool,
    "linear_softmax": linear_softmax_pool,
    "exponential_softmax": exponential_softmax_pool,
    "attention": attention_pool,
}


def class_attention(logits: Tensor) -> Tensor:
    """Weigh frames for each class by how much they are about it rather than another: logits (B, T', C) -> weights.

    The softmax runs over the classes, not over time, and a weight is never below 1e-7. Source: the authors' DESED head.
    """
    return logits.softmax(-1).clamp(min=CLAMP, max=1)


class AttentionWeights(nn.Module):
    """Learn `class_attention` from features (B, T', D): weights (B, T', C). It begins close to an average.

    `.geometry` rebuilds an equal one: `AttentionWeights(**attention.geometry)`.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.geometry = dict(width=width, num_classes=num_classes)
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return class_attention(self.linear(features))


def pool_moments(
    pooling: WeakPooling,
    probabilities: Tensor,
    num_frames: Tensor,
    stride: int,
    *,
    features: Tensor,
    attention: AttentionWeights | None,
) -> Tensor:
    """Pool the probabilities of columns of patches, `stride` frames apart, that begin in a clip's audio: (B, C).

    `num_frames` (B,) is how much of each clip is audio; `features` (B, T', D) are what an `attention` weighs by. `none`
    takes the highest.
    """
    starts = torch.arange(probabilities.shape[1], device=probabilities.device) * stride
    valid = starts < num_frames.clamp(min=1).to(starts.device)[:, None]
    if attention is not None:
        return attention_pool(probabilities, attention(features), valid)
    return POOLINGS["max" if pooling == "none" else pooling](probabilities, valid)


def _inside(frames: Tensor, valid: Tensor | None) -> Tensor:
    shape = frames.shape[:2] if valid is None else valid.shape
    assert frames.ndim == 3 and shape == frames.shape[:2], f"frames {tuple(frames.shape)}, valid {tuple(shape)}"
    return torch.ones_like(frames[..., :1], dtype=torch.bool) if valid is None else valid.bool()[..., None]


def _weighted(probabilities: Tensor, weights: Tensor, valid: Tensor | None) -> Tensor:
    inside = _inside(probabilities, valid)
    weights = torch.where(inside, weights, 0.0)
    values = torch.where(inside, probabilities, 0.0)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=CLAMP)
