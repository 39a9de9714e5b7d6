"""When is something different, and when does it matter?

Beyond three standard errors it is different; beyond these shares and deviations a model would notice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

IMPORTANT_SHARE = 0.01  # of the clips: missing, undecodable, doubled, or of another kind
IMPORTANT_STDS = 0.1  # of the log-mel's standard deviation
SURE = 3.0  # standard errors
DB_PER_NEPER = 10 / math.log(10)


@dataclass(frozen=True)
class Difference:
    """Say how one thing differs, in words; no words where it does not. Important: a model would notice."""

    subject: str
    text: str = ""
    is_important: bool = False


def error_of_share(shares: tuple[float, float], clips: tuple[int, int]) -> float:
    """Give the standard error of the difference of two shares of so many clips drawn at random."""
    return math.sqrt(sum(p * (1 - p) / n for p, n in zip(shares, clips, strict=True)))


def percent(share: float) -> str:
    """Spell a share with what digits it deserves."""
    if share in (0, 1) or 0.095 < share < 0.905:
        return f"{share:.0%}"
    return f"{share:.1%}" if 0.005 < share < 0.995 else f"{share:.2g}" if share > 1 else f"{share:.3%}"
