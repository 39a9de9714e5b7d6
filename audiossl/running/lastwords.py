"""Which rank failed first, and of what?

When one of many ranks dies, the others only notice that a connection is gone, and it is their complaint that fills the
screen. Here each rank leaves its last words in a file of the run's folder; one that has lost a connection looks there,
and says whose fault it was, or who left without a word. A rank that waits too long writes where it waits.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from audiossl.config.secrets import mask_said
from audiossl.errors import UserError

log = logging.getLogger(__name__)

LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|read error|timed? ?out|socket|nccl|gloo|peer", re.I)
LISTEN_SECONDS = 5.0  # for what the other ranks have to say
_MISTAKE = f"{UserError.__name__}: "


class LastWords(Callback):
    """Keep `folder`/ranks/rank=R.json: where rank R runs and, if it failed, why. One rank alone needs none of it.

    When no batch has ended for nine tenths of `timeout_seconds`, after which the ranks give each other up, the stacks
    of all threads go to stderr, on each rank that still can.
    """

    def __init__(self, folder: Path, timeout_seconds: float):
        self.folder, self.timeout_seconds = Path(folder) / "ranks", timeout_seconds
        self.place = {"host": socket.gethostname(), "pid": os.getpid()}
        self.users_error: str | None = None  # that another rank met, and this one lost its connection by

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._say(trainer.global_rank, None)
            self._rearm(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._rearm(trainer)

    on_validation_batch_start = on_train_batch_end = on_train_batch_start

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            faulthandler.cancel_dump_traceback_later()
            self._file(trainer.global_rank).unlink(missing_ok=True)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            return
        faulthandler.cancel_dump_traceback_later()
        words = mask_said(" ".join(f"{type(exception).__name__}: {exception}".split()))
        is_lost = isinstance(exception, RuntimeError) and LOST.search(str(exception)) is not None
        is_agreed = isinstance(exception, UserError | SystemExit)  # ranks that leave together say so themselves
        self._say(trainer.global_rank, "" if is_lost else words)
        if not is_lost and not is_agreed:
            log.error("rank %d failed: %s", trainer.global_rank, words)
        if is_lost:
            blame = self._blame(trainer)
            if self.users_error is None:
                log.error("rank %d: %s", trainer.global_rank, blame)
            _end_children(trainer)

    def _rearm(self, trainer: pl.Trainer) -> None:
        if trainer.world_size > 1:
            faulthandler.dump_traceback_later(0.9 * self.timeout_seconds, file=2)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank={rank}.json"

    def _say(self, rank: int, words: str | None) -> None:
        part = self._file(rank).with_suffix(".part")
        part.write_text(json.dumps(self.place | {"words": words}))
        os.replace(part, self._file(rank))

    def _blame(self, trainer: pl.Trainer) -> str:
        """Say who failed, as far as the others' last words tell."""
        deadline, said = time.monotonic() + LISTEN_SECONDS, self._heard(trainer)
        while time.monotonic() < deadline and not any(s["words"] for s in said.values()):
            if all(s["words"] is not None for s in said.values()):
                break
            time.sleep(0.1)
            said = self._heard(trainer)
        spoken = {rank: s["words"] for rank, s in said.items() if s["words"]}
        mistakes = {rank: words for rank, words in spoken.items() if words.startswith(_MISTAKE)}
        if spoken and len(mistakes) == len(spoken):
            self.users_error = "; ".join(f"rank {r}: {words.removeprefix(_MISTAKE)}" for r, words in mistakes.items())
        if spoken:
            return "; ".join(f"rank {rank} failed first: {words}" for rank, words in spoken.items())
        silent = [f"rank {r} (process {s['pid']} on {s['host']})" for r, s in said.items() if s["words"] is None]
        who = ", ".join(silent) or "a connection between ranks, none of which failed otherwise,"
        return (
            f"{who} is gone or hangs and left no word, as one does that was killed (SIGKILL; out of memory?); this "
            "rank only lost its connection. ckpt=last goes on from the newest checkpoint"
        )

    def _heard(self, trainer: pl.Trainer) -> dict[int, dict[str, Any]]:
        """Read what the other ranks have said."""
        others = (rank for rank in range(trainer.world_size) if rank != trainer.global_rank)
        unknown = {"host": "an unknown host", "pid": 0, "words": None}
        files = {rank: self._file(rank) for rank in others}
        return {rank: json.loads(file.read_text()) if file.exists() else unknown for rank, file in files.items()}


@contextmanager
def users_errors_of_all_ranks(callbacks: list[Any]) -> Iterator[None]:
    """Raise what another rank met as a `UserError` here too, instead of the connection that was lost by it."""
    try:
        yield
    except RuntimeError as error:
        said = next((c.users_error for c in callbacks if isinstance(c, LastWords)), None)
        if said is None:
            raise
        raise UserError(said) from error


def _end_children(trainer: pl.Trainer) -> None:
    """End the ranks that Lightning started from this process; one that stands still hears nothing but SIGKILL."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            process.wait(LISTEN_SECONDS)
        except Exception as error:  # subprocess.TimeoutExpired, or what another launcher has
            log.warning("killing process %d, which did not end: %s", process.pid, type(error).__name__)
            process.kill()
