"""Which clips skip a block in training, whoever computes them?

Stochastic depth (1603.09382) leaves a residual branch out for some clips of a batch. timm draws for the rows that a
process happens to hold, so two ranks with the same seed would drop alike and other numbers of ranks otherwise. In a
training step a clip's draws depend on (seed, step) and its row of the global batch instead.
"""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from audiossl.noise import draws_of_this_step


class RowDropPath(DropPath):
    """Drop (n, ...) by row as timm's `DropPath` does; within `Noise.of_this_step` by the rows of the global batch.

    Where there are several views of each clip they must lie one behind the other: (views * B, ...).
    """

    def shares(self, tokens: Tensor) -> Tensor | None:
        """Draw what each row (n, N, D) is multiplied by: (n, 1, 1) float32, 0 or above 1; None outside of training."""
        if not (self.training and self.drop_prob):
            return None
        kept, draws = 1 - self.drop_prob, draws_of_this_step(len(tokens))
        if draws is None:
            shares = tokens.new_empty(len(tokens)).bernoulli_(kept)
        else:
            shares = (draws >= self.drop_prob).float()
        return (shares / kept if self.scale_by_keep and kept else shares)[:, None, None]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (n, N, D) with some rows zero and the others scaled up; outside of training as it is."""
        shares = self.shares(tokens)
        return tokens if shares is None else tokens * shares.to(tokens.dtype)


def shares_of(drop: nn.Module, tokens: Tensor) -> Tensor | None:
    """Draw for a block's `drop`, which is no `RowDropPath` where nothing is ever dropped."""
    return drop.shares(tokens) if isinstance(drop, RowDropPath) else None
