"""Which clips skip a block in training, whoever computes them?

Stochastic depth (1603.09382) leaves a residual branch out for some clips of a batch. timm draws for the rows that a
process happens to hold, so two ranks with the same seed would drop alike and other numbers of ranks otherwise. In a
training step a clip's draws depend on (seed, step) and its row of the global batch instead.
"""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor

from audiossl.noise import draws_of_this_step


class RowDropPath(DropPath):
    """Drop (n, ...) by row as timm's `DropPath` does; within `Noise.of_this_step` by the rows of the global batch.

    Where there are several views of each clip they must lie one behind the other: (views * B, ...).
    """

    def forward(self, values: Tensor) -> Tensor:
        """Return (n, ...) with some rows zero and the others scaled up; outside of training as it is."""
        draws = draws_of_this_step(len(values)) if self.training and self.drop_prob else None
        if draws is None:
            return super().forward(values)
        kept = (draws >= self.drop_prob).to(values.dtype)
        scale = 1 - self.drop_prob if self.scale_by_keep else 1.0
        return values * (kept / scale).view(-1, *(1 for _ in values.shape[1:]))
