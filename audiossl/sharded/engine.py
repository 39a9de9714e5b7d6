"""What does DeepSpeed write and read, so that a stranger's folder can run no code?

DeepSpeed hands every file of a checkpoint to a "checkpoint engine". Ours writes plain types only, forces the bytes to
disk and notes what it wrote; it reads with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from audiossl.checkpoints.atomic import check_plain, sync_folder, write_atomically
from audiossl.checkpoints.torchfile import read_safely
from audiossl.errors import UserError
from audiossl.indexing.indexfile import sha256_of
from audiossl.sharded.folders import FORMAT, SEAL, TAG, Written

OBJECTS = ("loss_scaler", "param_slice_mappings")  # of DeepSpeed's classes: a constant 1, and what follows from shapes


class PlainFiles(TorchCheckpointEngine):
    """Write and read the files of a checkpoint without pickled objects.

    A save never raises, since the other ranks would wait in DeepSpeed's barrier: `problem` says what went wrong, and
    `written` what was written.
    """

    def __init__(self):
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Forget the save before."""
        self.written: list[Path] = []
        self.problem: str | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = f"{path}: {error.strerror}"

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.problem is not None:
            return
        try:
            plain = as_plain(state_dict)
            check_plain(plain, Path(path).name)
            with open(path, "wb") as file:
                torch.save(plain, file)
                file.flush()
                os.fsync(file.fileno())
            self.written.append(Path(path))
        except (UserError, OSError, RuntimeError) as error:  # torch wraps what the disk says
            self.problem = f"{Path(path).name}: {reason_of(error)}"

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        part = read_safely(Path(path))
        if "optimizer_state_dict" in part:
            part["optimizer_state_dict"]["loss_scaler"] = LossScaler(scale=1.0)
        return part


def as_plain(tree: Any) -> Any:
    """Replace DeepSpeed's objects by numbers, and leave out those of which nothing is needed to go on."""
    if isinstance(tree, dict):
        kept = {key: as_plain(value) for key, value in tree.items() if key not in OBJECTS}
        return kept if type(tree) is dict else type(tree)(kept)
    if type(tree) in (list, tuple):
        return type(tree)(as_plain(item) for item in tree)
    return tree.value if isinstance(tree, Enum) else tree


def reason_of(error: BaseException) -> str:
    """Find what the system said behind what torch says."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(error) if cause is None else str(cause.strerror)


def described(folder: Path, paths: list[Path]) -> list[Written]:
    """Give name, bytes and SHA-256 of files of a checkpoint's folder."""
    return [(str(path.relative_to(folder)), path.stat().st_size, sha256_of(path)) for path in paths]


def seal(folder: Path, written: list[Written], **facts: int) -> None:
    """Declare a folder complete, on the first rank, when all ranks have written.

    Raises OSError, and `UserError` where another rank's file cannot be seen from here.
    """
    for name, num_bytes, _ in written:
        if not (folder / name).exists() or (folder / name).stat().st_size != num_bytes:
            raise UserError(f"{name}, of another rank, is not seen by rank 0: all nodes must share this folder")
    names = {name for name, *_ in written}
    others = [p for p in sorted(folder.rglob("*")) if p.is_file() and str(p.relative_to(folder)) not in names]
    files = {name: [size, digest] for name, size, digest in [*written, *described(folder, others)]}
    for place in (folder / TAG, folder, folder.parent):
        sync_folder(place)
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1) + "\n"
    write_atomically(folder / SEAL, lambda file: file.write(text.encode()))
