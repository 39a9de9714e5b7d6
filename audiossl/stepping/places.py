"""How are the hidden tokens of a batch gathered when nobody knows yet how many there are?

Their number decides the size of what follows, so the host has to know it. It asks as soon as the mask is drawn and
needs the answer when the encoders' work is queued: the device, which is then busy with that, has long said it.
"""

from __future__ import annotations

from torch import Tensor

from audiossl.stepping.hostcopy import HostCopy


class Places:
    """Remember where `mask` (B, N) is True; make it early, `take` late."""

    def __init__(self, mask: Tensor):
        self._order = mask.flatten().byte().argsort(descending=True, stable=True)
        self._count = HostCopy([mask.sum()])

    def take(self, tokens: Tensor) -> Tensor:
        """Pick what lies there, clip by clip: (B, N, D) -> (n, D), as `tokens[mask]` would."""
        count = self._count.read()[0].tolist()
        return tokens.flatten(0, 1).index_select(0, self._order[:count])
