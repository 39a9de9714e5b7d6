"""What is this file, and which checkpoint can be trusted after a machine died at any moment?

A checkpoint is believed only after the checksum of every byte was recomputed; the newest is the one with the highest
step in it, whatever its name or time says. Reading never runs code.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from audiossl.errors import UserError
from audiossl.sharded.folders import SEAL, is_sharded, problem_of, read_seal

log = logging.getLogger(__name__)

NO_WAY = "nothing lets a run resume from it"
_STEP = re.compile(r"(?:best-)?step=(\d+)")
REQUIRED = ("state_dict", "loops", "global_step", "optimizer_states", "lr_schedulers")


def read_lazily(path: str | Path) -> Any:
    """Read a torch file with its tensors left on disk, without running code; raises what torch raises."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def describe_file(path: str | Path) -> str:
    """Say in a few words what a file is that should be a checkpoint."""
    try:
        return _inspect(Path(path))[1]
    except OSError as error:
        return f"unreadable ({error.strerror})"


def is_valid(path: str | Path) -> str | None:
    """Give None for a complete checkpoint, else what is wrong: every byte is read and its checksum compared."""
    try:
        valid, what = _inspect(Path(path))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return None if valid else what


def set_aside_later_than(folder: Path, step: int) -> None:
    """Rename the checkpoints of a future that a run, resumed from an earlier step, will not have."""
    for path in folder.glob("*.ckpt"):
        found = _STEP.match(path.name)
        try:
            later = (int(found[1]) if found else step_of(path)) > step
        except Exception as error:  # whatever a file of somebody else's may be, it is none of ours to move
            log.warning("%s: left alone: %s", path, error)
            continue
        if later:
            path.replace(f"{path}.superseded")
            log.warning("%s: saved after step %d, from where this run goes on; renamed to *.superseded", path, step)


def lower_is_better(metric: str) -> bool:
    """Tell whether the smaller value of a metric is the better one: "loss" or "error" is in its name."""
    return re.search("loss|error", metric, re.IGNORECASE) is not None


def step_of(path: Path) -> int:
    """Read the optimiser step a checkpoint was saved at, without reading its tensors."""
    if path.is_dir():
        return read_seal(path)["step"]
    return read_lazily(path)["global_step"]


def newest_valid(folder: str | Path) -> Path | None:
    """Find the complete checkpoint with the highest step, whatever the files' times; None when there is none.

    Damaged files that stand before it are logged and renamed to `*.corrupt` (folders of many ranks that were never
    whole to `*.incomplete`); unreadable ones are logged and left.
    """
    steps = {}
    for path in sorted(Path(folder).glob("*.ckpt")):
        try:
            steps[path] = step_of(path)
        except FileNotFoundError:
            log.debug("%s went away; another process tidies up here", path)
        except Exception:  # a damaged file fails anywhere inside of torch; what is wrong with it is said below
            _set_aside(path)
    # at the same step `step=` sorts behind `best-` and `last`, and so comes first here
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
        if is_valid(path) is None:
            return path
        _set_aside(path)
    return None


def describe_damaged(folder: str | Path) -> str:
    """Name one of the files that were set aside in `folder`, and say what it is; "" when there is none."""
    aside = sorted(Path(folder).glob("*.corrupt"))
    return f"{aside[-1]} is {describe_file(aside[-1])}" if aside else ""


def resolve_ckpt(value: str | Path | None, run_dir: str | Path) -> Path | None:
    """Turn the config's `ckpt` into the file to resume from; None starts from the beginning.

    "last": the newest valid checkpoint of `run_dir`, or None, said in the log; "must": the same, but an error when
    there is none; else a path. Raises `UserError` that says what the file is, also when all checkpoints are damaged.
    """
    if value is None:
        return None
    folder = Path(run_dir) / "checkpoints"
    if str(value) in ("last", "must"):
        path = newest_valid(folder)
        if path is not None:
            log.info("resuming from %s, step %d", path, step_of(path))
            return path
        if damaged := describe_damaged(folder):
            raise UserError(f"ckpt={value}: no valid checkpoint in {folder}; {damaged}; ckpt=null restarts")
        if value == "must":
            raise UserError(f"ckpt=must: no checkpoint in {folder}; ckpt=last starts when there is none")
        log.warning("ckpt=last: no checkpoint in %s yet; starting from step 0", folder)
        return None
    path = Path(value)
    if not path.exists():
        raise UserError(f"ckpt={value}: no such file; take a path, last (newest in {folder}), must or null")
    problem = is_valid(path)
    if problem is not None:
        raise UserError(f"ckpt={value}: cannot resume from it, it is {problem}")
    return path


def _set_aside(path: Path) -> None:
    problem = is_valid(path) or "damaged"
    if not os.access(path, os.R_OK):
        log.warning("%s: skipped, %s", path, problem)
        return
    # what was never whole is no loss: a run killed within its first save starts again
    name = f"{path.name}.{'incomplete' if is_sharded(path) and not (path / SEAL).exists() else 'corrupt'}"
    try:
        os.replace(path, path.with_name(name))
        log.warning("%s: skipped, it is %s; renamed to %s", path, problem, name)
    except OSError as error:
        log.warning("%s: skipped, it is %s (and cannot be renamed: %s)", path, problem, error.strerror)


def _inspect(path: Path) -> tuple[bool, str]:
    """Give whether `path` is a complete checkpoint, and what it is; raises OSError when it cannot be read."""
    if path.is_dir():
        problem = problem_of(path) if is_sharded(path) else "a folder"
        return problem is None, problem or f"a checkpoint of step {step_of(path)}, of many ranks"
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if not size:
        return False, "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return False, "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return False, "an HTML page, as a failed download leaves it"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return False, "a safetensors file: weights alone, without optimiser and step"
    if head.startswith(b"\x80"):
        return False, f"a bare pickle or a torch file older than 1.6, which could run code; {NO_WAY}"
    if not head.startswith(b"PK"):
        return False, f"no torch file (it begins with {head[:8]!r})"
    return _inspect_archive(path, size)


def _inspect_archive(path: Path, size: int) -> tuple[bool, str]:
    if not zipfile.is_zipfile(path):
        return False, f"truncated: a torch file of {size} bytes whose end is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            members = archive.namelist()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return False, f"damaged ({error})"
    if damaged is not None:
        return False, f"damaged: the checksum of its part {damaged} is wrong"
    if not any(name.endswith("/data.pkl") for name in members):
        return False, "a zip archive, but not of torch"
    try:
        content = read_lazily(path)
    except pickle.UnpicklingError as error:
        return False, f"a torch file with Python objects in it, which could run code ({_forbidden(error)}); {NO_WAY}"
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        return False, f"damaged ({error})"
    return _judge(content)


def _judge(content: Any) -> tuple[bool, str]:
    if not isinstance(content, dict):
        return False, f"a torch file with a {type(content).__name__}, not a checkpoint"
    missing = [key for key in REQUIRED if key not in content]
    if not missing:
        return True, f"a checkpoint of step {content['global_step']}"
    keys = ", ".join(str(key) for key in list(content)[:4])
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return False, f"a state dict: weights alone ({keys}, ...), without optimiser and step"
    return False, f"a torch file without {', '.join(missing)} (it has {keys})"


def _forbidden(error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+)", str(error))
    return found[1] if found else "unknown types"
