"""What can a run not do while no rank holds the whole model (ZeRO stage 3), and how does it end?

Pictures and probes run the model on one rank, a teacher follows its student weight by weight, an average copies them
all: none of it works on pieces. The first two are done once, at the end, on the weights of the last checkpoint.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from audiossl.errors import UserError
from audiossl.running.build import method_from_config
from audiossl.sharded.settings import is_deepspeed, stage_of
from audiossl.weights.reading import read_torch_file

log = logging.getLogger(__name__)


def has_whole_weights(config: dict[str, Any], method: nn.Module) -> bool:
    """Tell whether every rank holds all weights; raises `UserError` where it must and does not."""
    strategy = config["trainer"]["strategy"]
    if not is_deepspeed(strategy) or stage_of(strategy) < 3:
        return True
    asks = {
        f"{type(method).__name__} has a teacher that follows its student": hasattr(method, "after_step"),
        "swa.start averages the weights": config["swa"]["start"] is not None,
        f"{type(method).__name__} scores classes while it validates": getattr(method, "needs_labels", False),
    }
    for what, is_asked in asks.items():
        if is_asked:
            raise UserError(f"trainer.strategy={strategy}: no rank holds all weights, and {what}; take stage 1 or 2")
    log.info("ZeRO stage 3: pictures and probe wait for the end of the run, when the weights are put together")
    return False


def put_together(config: dict[str, Any], vocabulary: list[str] | None, checkpoint: Path) -> nn.Module:
    """Build the method anew with the weights of a checkpoint of all ranks, on the CPU."""
    method = method_from_config(config, vocabulary=vocabulary)
    state = read_torch_file(checkpoint)["state_dict"]
    method.load_state_dict({k.removeprefix("method."): v for k, v in state.items() if k.startswith("method.")})
    return method
