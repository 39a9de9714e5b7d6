"""What has been found out for other jobs of a sweep, and need not be found out again?

Jobs that differ in seed, rate, length or labels cost the same a clip. What they cost is kept by the settings that it
depends on; speed is measured for the first few of them, and follows from the operations for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from audiossl.planning.cost import Cost

Found = TypeVar("Found")


class Known:
    """Keep results by the plain values that decide them; `num_measured` speeds are measured at most."""

    def __init__(self, num_measured: int):
        self.num_measured = num_measured
        self._found: dict[str, Any] = {}
        self._rates: dict[str, float] = {}  # floating-point operations a second

    def once(self, about: object, find: Callable[[], Found]) -> Found:
        """Give what `find` finds, which is asked once for what it is `about`."""
        name = json.dumps(about, sort_keys=True, default=str)
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    def speed(self, about: object, cost: Cost, measure: Callable[[], tuple[float, int]]) -> tuple[float, int | None]:
        """Give clips/s and the steps in which they were measured; None for those that follow from the operations.

        Those are taken to run at the mean rate of the settings that were measured.
        """
        name = json.dumps(about, sort_keys=True, default=str)
        if name not in self._rates and len(self._rates) >= self.num_measured:
            return sum(self._rates.values()) / len(self._rates) / cost.flops_training, None
        clips_per_second, steps = self.once(("speed", about), measure)
        self._rates[name] = clips_per_second * cost.flops_training
        return clips_per_second, steps
