"""How is a stranger's torch file read without running the code in it?

PyTorch's restricted unpickler loads tensors and plain containers; the few harmless classes that published checkpoints
hold are allowed by name. Anything else is refused, and the message says what it was.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiossl.checkpoints.files import newest_valid
from audiossl.errors import UserError

HARMLESS = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    type(np.dtype("float64")),
    type(np.dtype("float32")),
    type(np.dtype("int64")),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
]


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's dict on the CPU; raise `UserError` naming the file if it is missing, broken or unsafe."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes can make the unpickler raise anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        kind = (
            "broken, or it asks to run code" if isinstance(error, pickle.UnpicklingError) else "no PyTorch checkpoint"
        )
        raise UserError(f"{path}: not read, because it is {kind} ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def newest_checkpoint(run_dir: Path) -> Path:
    """Find the newest valid checkpoint of a run's folder; raise `UserError` when there is none."""
    folder = run_dir / "checkpoints"
    found = newest_valid(folder) if folder.is_dir() else None
    if found is None:
        raise UserError(f"{run_dir}: no checkpoint in {folder}; give a run's folder or a .ckpt file")
    return found
