"""Which weights does a path mean: a file of a stranger's, a folder of many ranks, a run?

Files are read by `checkpoints.torchfile`, which runs no code in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from audiossl.checkpoints.files import describe_damaged, newest_valid
from audiossl.checkpoints.torchfile import read_safely
from audiossl.errors import UserError
from audiossl.sharded.folders import is_sharded
from audiossl.sharded.whole import read_whole

CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def read_torch_file(path: str | Path, *, runs_code: bool = False) -> dict[str, Any]:
    """Read a checkpoint's dict on the CPU; raise `UserError` naming the file if it is missing, broken or unsafe.

    `runs_code` lets a file run code, with a warning: only where the user asked for it.
    A folder of many DeepSpeed ranks is put together, without the optimiser's state.
    """
    path = Path(path)
    if is_sharded(path):
        return read_whole(path)
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.suffix in CHECKPOINTS)[:4]
        raise UserError(f"{path}: a folder, not a file; it holds {', '.join(found) or 'no checkpoint'}")
    return read_safely(path, runs_code=runs_code)


def read_weights(path: str | Path, *, runs_code: bool = False) -> dict[str, Any]:
    """Read a checkpoint's dict as `read_torch_file` does, or the tensors of a .safetensors that is not ours."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return read_torch_file(path, runs_code=runs_code)
    try:
        with safe_open(path, framework="pt") as file:
            if "description" in (file.metadata() or {}):
                raise UserError(f"{path}: an export of ours, which needs no import: audiossl.load reads it")
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def newest_checkpoint(run_dir: Path) -> Path:
    """Find the newest valid checkpoint of a run's folder; raise `UserError` when there is none.

    A checkpoint that is itself a folder is given back.
    """
    if is_sharded(run_dir):
        return run_dir
    folder = run_dir / "checkpoints"
    found = newest_valid(folder) if folder.is_dir() else None
    if found is None:
        way_out = describe_damaged(folder) or "give a run's folder or a .ckpt file"
        raise UserError(f"{run_dir}: no checkpoint in {folder}; {way_out}")
    return found
