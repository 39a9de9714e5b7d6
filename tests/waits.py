"""What would make the host wait for a GPU, counted on the CPU: every question about a tensor's values."""

import sys
from collections import Counter

import lightning.pytorch as pl
import torch
from fits import config_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from audiossl import training

ASKING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount"}
ASKING |= {"_linalg_eigh", "_linalg_svd", "_linalg_check_errors"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}  # where a mask's places have to be counted
READING = {"tolist", "numpy", "cpu"}  # of tensors on the host no operation tells
ON_THE_HOST = ("audiossl/stepping/", "audiossl/noise.py")  # what these read lies there wherever the model is


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            is_mask(index) for index in arguments[1]
        )
        if name in ASKING or by_mask:
            note(self.found, f"{name} by a mask" if by_mask else name)
        return function(*arguments, **(named or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), named=None):
        name = getattr(function, "__name__", "")
        if name in READING:
            note(self.found, name)
        return function(*arguments, **(named or {}))


def is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def note(found: list[str], name: str) -> None:
    """Say where something was asked, by the innermost lines of the product or of Lightning; not if on the host."""
    frame, lines = sys._getframe(2), []
    while frame is not None:
        file = frame.f_code.co_filename
        if any(part in file for part in ON_THE_HOST):
            return
        if "/audiossl/" in file or "/lightning/" in file:
            lines.append(f"{file.split('/site-packages/')[-1].split('/audiossl/')[-1]}:{frame.f_lineno}")
        frame = frame.f_back
    found.append(f"{name} at {' < '.join(lines[:3])}")


class Waits(pl.Callback):
    """List in `found` what the steps from `first` on ask, until the last has ended, other callbacks included."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.found = first, last, []
        self._modes = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step >= self.first and not self._modes:
            self._modes = [_Operations(self.found), _Functions(self.found)]
            for mode in self._modes:
                mode.__enter__()
        if trainer.global_step >= self.last:
            self.stop()

    def stop(self, *_):
        while self._modes:
            self._modes.pop().__exit__(None, None, None)

    on_train_epoch_end = on_exception = stop


def count(waits: Waits) -> Counter:
    return Counter(waits.found)


SHORT = ("data.batch_size=4", "data.fraction=0.3", "data.validation_clips=0", "checkpoint.every_steps=null")


class NoTrace:
    """Stand where `trace=true` puts its callback."""

    def __init__(self, callback: pl.Callback):
        self.callback = callback

    def __call__(self, folder) -> pl.Callback:
        return self.callback


def fit_with(callback: pl.Callback, folder, monkeypatch, *settings: str) -> None:
    monkeypatch.setattr(training, "Trace", NoTrace(callback))
    training.fit(config_of(*settings) | {"run_dir": str(folder)})
