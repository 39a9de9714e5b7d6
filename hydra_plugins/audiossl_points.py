"""Where does Hydra find the sweeper that goes on with a sweep, and runs one point of it in an array job?

Hydra takes sweepers from the namespace package `hydra_plugins` alone; what ours does is in `audiossl.sweeping`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # Hydra's own default; there is no public base

from audiossl.sweeping.launching import launch_points


class PointSweeper(BasicSweeper):
    """Run the points of a grid that are still to be run; the settings are explained in conf/hydra/sweeper/points.yaml.

    It sweeps as Hydra's basic sweeper does: every combination of the values given, in the same order.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        only: Sequence[int] | None = None,
        by_array: bool = True,
    ):
        super().__init__(max_batch_size, params)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the points; see `hydra.plugins.sweeper.Sweeper`. The values stand in the config, like `arguments`."""
        return launch_points(self.launcher, self.config, self.max_batch_size)
