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


def is_split(config: dict[str, Any]) -> bool:
    """Tell whether each rank holds a piece of every weight only."""
    strategy = config["trainer"]["strategy"]
    return is_deepspeed(strategy) and stage_of(strategy) == 3


def has_whole_weights(config: dict[str, Any], method: nn.Module) -> bool:
    """Tell whether every rank holds all weights; raises `UserError` where it must and does not."""
    if not is_split(config):
        return True
    asks = {
        f"{type(method).__name__} has a teacher that follows its student": hasattr(method, "after_step"),
        "swa.start averages the weights": config["swa"]["start"] is not None,
        f"{type(method).__name__} scores classes while it validates": getattr(method, "needs_labels", False),
    }
    for what, is_asked in asks.items():
        if is_asked:
            strategy = config["trainer"]["strategy"]
            raise UserError(f"trainer.strategy={strategy}: no rank holds all weights, and {what}; take stage 1 or 2")
    log.info("ZeRO stage 3: pictures and probe wait for the end of the run, when the weights are put together")
    return False


def put_together(method: nn.Module, config: dict[str, Any], vocabulary: list[str] | None) -> nn.Module:
    """Give the method with all its weights: itself, or at stage 3 a new one with those of the last checkpoint."""
    if not is_split(config):
        return method
    whole = method_from_config(config, vocabulary=vocabulary)
    state = read_torch_file(Path(config["run_dir"]) / "checkpoints" / "last.ckpt")["state_dict"]
    whole.load_state_dict({k.removeprefix("method."): v for k, v in state.items() if k.startswith("method.")})
    return whole
