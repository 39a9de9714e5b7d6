"""How is a stranger's torch file read without running the code in it?

PyTorch's restricted unpickler loads tensors and plain containers; the few harmless classes that published checkpoints
hold are allowed by name. Anything else is refused, and the message says what it was.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiossl.errors import UserError

log = logging.getLogger(__name__)

ZIP = b"PK\x03\x04"  # by which torch tells its files
DAMAGED = "is cut short or damaged: a PyTorch file whose contents cannot be read"
UNSAFE = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) ([\w.]+\.\w+)")
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


def read_safely(path: str | Path, *, runs_code: bool = False) -> dict[str, Any]:
    """Read the dict in a file on the CPU; raise `UserError` naming the file if it is missing, broken or unsafe.

    `runs_code` lets the file run code, with a warning: only where the user asked for it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if _unpacked_bytes(path) > path.stat().st_size:
        raise UserError(f"{path}: not read, because it unpacks to more than it is, and PyTorch packs nothing tighter")
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(action="ignore"):
            if runs_code:
                log.warning("%s: read with unsafe_load=true; whatever code is in it runs now", path)
            content = torch.load(path, map_location="cpu", weights_only=not runs_code)
    except Exception as error:  # foreign bytes can make the unpickler raise anything
        raise UserError(f"{path}: not read, because it {_reason(error, path)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _unpacked_bytes(path: Path) -> int:
    """Count what a zip archive says that it holds, 0 for other files; an archive that does not say is refused.

    PyTorch's own zip reader is more lenient than Python's: what only it can list could hold anything.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) != ZIP:
                return 0
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # foreign bytes: a version that nobody writes, names that are none, ...
        raise UserError(f"{path}: not read, because it {DAMAGED}") from error


def _reason(error: Exception, path: Path) -> str:
    """Say in a few words why a file was not read; a class that it asks for is named."""
    with open(path, "rb") as file:
        start = file.read(len(ZIP))
    if not start:
        return "is empty"
    text = str(error)
    if asked := UNSAFE.search(text):
        return (
            f"asks to run code: it needs {asked.group(1)}, and tensors, plain containers, argparse.Namespace and "
            "numpy's scalars are all that is read from a stranger's file; one that you trust: python -m audiossl "
            "import FILE DIR unsafe_load=true"
        )
    if "TorchScript" in text:
        return "is a TorchScript program, which is code; ask for its state_dict"
    if start == ZIP and not isinstance(error, pickle.UnpicklingError):
        return DAMAGED
    text = text.partition("WeightsUnpickler error: ")[2] or text  # before it torch advises to let the code run
    first = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    broken = (
        "is broken, or asks to run code" if isinstance(error, pickle.UnpicklingError) else "is no PyTorch checkpoint"
    )
    return f"{broken} ({first})"
