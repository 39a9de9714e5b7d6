"""Can checkpoints be written here, and is there room for one?

Asked before the first step, not at the first save, which may be hours later: the folder is made and tried out, and what
a checkpoint will hold is counted. That is the weights and buffers (a teacher's among them), what the optimiser will
keep of each trained weight, and what callbacks will add, such as an average of the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from audiossl.checkpoints.atomic import sweep, write_atomically
from audiossl.errors import UserError


def prepare_folder(folder: Path) -> None:
    """Make `folder`, tidy it and try it out; raises `UserError` where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        write_atomically(folder / ".writable", lambda file: None)
        (folder / ".writable").unlink()
    except OSError as error:
        where = "make it writable, or write elsewhere: hydra.run.dir=..."
        raise UserError(f"{folder}: checkpoints cannot be written here: {error.strerror}; {where}") from error


def check_room(folder: Path, trainer: pl.Trainer, module: torch.nn.Module) -> None:
    """Raise `UserError` where `folder` has no room for one checkpoint of this run (call it before the first step)."""
    parts = {
        "weights": bytes_of(module.state_dict().values()),
        "the optimiser's moments": sum(map(bytes_of_moments, trainer.optimizers)),
        "averages of the weights": sum(getattr(callback, "bytes_to_save", 0) for callback in trainer.callbacks),
    }
    free, needed = shutil.disk_usage(folder).free, sum(parts.values())
    if free < needed:
        what = ", ".join(f"{name} {num_bytes}" for name, num_bytes in parts.items() if num_bytes)
        raise UserError(
            f"{folder}: {free} bytes are free on its filesystem, and a checkpoint takes {needed} ({what}); make room, "
            "or write elsewhere: hydra.run.dir=..."
        )


def bytes_of(tensors: Iterable[object]) -> int:
    """Count the bytes of tensors, each memory once."""
    return sum({(t.data_ptr() or id(t)): t.nbytes for t in tensors if isinstance(t, Tensor)}.values())


def bytes_of_moments(optimizer: torch.optim.Optimizer) -> int:
    """Count what an optimiser will have to remember: two numbers a weight (AdamW), one (SGD with momentum), or none."""
    settings = getattr(optimizer, "defaults", {})
    per_weight = 2 if "betas" in settings else 1 if settings.get("momentum") else 0
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return per_weight * bytes_of(trained)
