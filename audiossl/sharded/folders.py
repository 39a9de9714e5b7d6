"""When is a folder that many ranks wrote a checkpoint, and when is it what a crash left?

When it holds the file COMPLETE, which rank 0 writes after all ranks have forced their files to disk, and when every
file that it names has the size and the SHA-256 that it names. The layout inside is DeepSpeed's.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from audiossl.checkpoints.torchfile import read_safely
from audiossl.errors import UserError
from audiossl.indexing.indexfile import sha256_of

TAG, SEAL, FORMAT = "checkpoint", "COMPLETE", 1
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stages 1 and 2, stage 3
Written = tuple[str, int, str]  # path below the folder, bytes, SHA-256


def is_sharded(path: str | Path) -> bool:
    """Tell whether `path` is a folder as ranks of DeepSpeed write it, complete or not."""
    path = Path(path)
    return path.is_dir() and ((path / SEAL).exists() or (path / TAG).is_dir())


def read_seal(folder: str | Path) -> dict[str, Any]:
    """Read `format`, `step`, `ranks`, `stage` and `files` (name -> bytes and SHA-256); raise `UserError` without it."""
    path = Path(folder) / SEAL
    try:
        found = json.loads(path.read_text())
        sizes = [found["format"], found["step"], found["ranks"], found["stage"]]
        is_whole = all(isinstance(size, int) for size in sizes) and all(len(v) == 2 for v in found["files"].values())
    except FileNotFoundError:
        said = f"incomplete: it has no {SEAL}, so the run ended before all ranks had saved"
        raise UserError(f"{folder}: {said}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if not is_whole or found["format"] > FORMAT:
        raise UserError(f"{path}: damaged, or written by a newer audiossl")
    return found


def problem_of(folder: str | Path, *, check_contents: bool = True) -> str | None:
    """Give None for a complete checkpoint, else what is wrong with it and with which file.

    `check_contents` reads every byte for its SHA-256, and every tensor file's structure without running code.
    """
    folder = Path(folder)
    try:
        files = read_seal(folder)["files"]
        for name, (num_bytes, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"incomplete: {name} is missing"
            if path.stat().st_size != num_bytes:
                return f"damaged: {name} has {path.stat().st_size} bytes, not {num_bytes}"
            if check_contents and sha256_of(path) != digest:
                return f"damaged: the SHA-256 of {name} is wrong"
            if check_contents and path.suffix == ".pt" and (problem := _objects_in(path)):
                return f"{problem[0]}: {name} {problem[1]}"
        strange = sorted({str(path.relative_to(folder)) for path in (folder / TAG).rglob("*")} - files.keys())
    except UserError as error:
        return str(error).removeprefix(f"{folder}: ")
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"altered: it holds {strange[0]}, which no rank wrote" if strange else None


def _objects_in(path: Path) -> tuple[str, str] | None:
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return "unsafe", "holds Python objects, which could run code"
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        return "damaged", f"cannot be read ({type(error).__name__})"
    return None


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read the first rank's model file; its entry `run` is what an ordinary checkpoint holds beside the tensors.

    Raises `UserError` for what is no complete folder.
    """
    folder = Path(folder)
    if problem := problem_of(folder, check_contents=False):
        raise UserError(f"{folder}: {problem}")
    path = next((folder / TAG / name for name in MODEL_FILES if (folder / TAG / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: holds no model states")
    return read_safely(path)
