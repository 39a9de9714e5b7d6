"""How is DeepSpeed brought in, quietly, and for the right devices?

It looks for an accelerator and tries compilers while it is imported, so what it should find is said before.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

from audiossl.sharded.settings import stage_of


def trainer_arguments(
    strategy: str, accelerator: str, precision: str, startup: timedelta, patience: timedelta
) -> dict[str, Any]:
    """Give the `strategy` and `plugins` that a Trainer needs for `deepspeed`, or `deepspeed_stage_1`, `_2`, `_3`."""
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*", FutureWarning)
    logging.getLogger("compilers").setLevel(logging.WARNING)
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it takes the GPU of a machine that has one
    import deepspeed

    if accelerator == "cpu":
        # compiled at the first start for a minute, and its shared memory outlives a rank that is killed; gloo does it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from audiossl.sharded.strategy import Autocast, Zero

    zero = Zero(stage=stage_of(strategy), precision=precision, startup=startup, patience=patience)
    return {"strategy": zero, "plugins": [Autocast(precision)]}
