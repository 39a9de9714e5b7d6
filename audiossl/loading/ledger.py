"""What became of every clip of the index, over all ranks and restarts?

Each rank keeps its own `badclips.BadClips`. After every optimiser step the ranks tell each other which clips they could
not read, so that a limit is passed on all of them at the same step and none is left waiting; the counts lie in every
checkpoint; and at the end they must add up: index = trained + skipped + lost + held out + not reached.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from audiossl.errors import UserError
from audiossl.loading.badclips import BadClips, Entry
from audiossl.running.ranks import Ranks

log = logging.getLogger(__name__)


class Accounts(Callback):
    """Share, save, limit and add up what the ranks' ledgers hold.

    `held_out` are the index's numbers of the validation clips. Raises UserError on rank 0, and `SystemExit(2)` on the
    others, when a limit is passed.
    """

    def __init__(self, ledger: BadClips, *, held_out: np.ndarray):
        self.ledger, self.held_out = ledger, held_out
        self._before = {"trained": 0, "skipped": 0}  # visits, of all ranks, before this process was started
        self._saved_in_a_row: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ranks = Ranks()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        if len(self._saved_in_a_row) == self.ranks.size:
            self.ledger.in_a_row = self._saved_in_a_row[trainer.global_rank]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.ranks.size > 1 and trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._share(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.ranks.size > 1:
            self._share(trainer)

    def add_up(self) -> dict[str, dict[str, int]]:
        """Count `clips` (each once) and `visits` over all ranks; call it on all of them, after training.

        Of `clips`, the first is the sum of all that follow but the last, which are among the held out.
        """
        visited, visits, _ = self._together()
        bad = set(self.ledger.bad)
        held_out = set(self.held_out.tolist())
        in_training = np.ones(len(visited), bool)
        in_training[[*held_out, *self.ledger.lost]] = False
        skipped = len(bad - held_out)
        trained = int(np.count_nonzero(visited & in_training)) - skipped
        clips = {"in_the_index": len(visited), "trained": trained, "skipped": skipped, "lost": len(self.ledger.lost)}
        clips["held_out"] = len(held_out - set(self.ledger.lost))
        clips["not_chosen"] = len(visited) - self.ledger.num_clips
        clips["not_reached"] = len(visited) - sum(list(clips.values())[1:])
        clips["held_out_unreadable"] = len(bad & held_out)
        return {"clips": clips, "visits": visits}

    def state_dict(self) -> dict[str, Any]:
        visited, visits, in_a_row = self._together()
        bad = [[clip, *entry] for clip, entry in sorted(self.ledger.bad.items())]
        bits = torch.from_numpy(np.packbits(visited))
        return {"visited": bits, "visits": visits, "in_a_row": in_a_row, "bad": bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        visited = np.unpackbits(state["visited"].numpy(), count=len(self.ledger.visited)).astype(bool)
        self.ledger.visited |= visited
        self.ledger.bad |= {clip: Entry(*entry) for clip, *entry in state["bad"]}
        self._before, self._saved_in_a_row = dict(state["visits"]), list(state["in_a_row"])

    def _share(self, trainer: pl.Trainer) -> None:
        """Tell all ranks of the bad clips found since the last time; stop all of them when one has to."""
        found = self.ledger.take_unshared()
        if not self.ranks.maximum(bool(found) or self.ledger.in_a_row >= self.ledger.max_in_a_row):
            return
        for others in self.ranks.gather({clip: tuple(entry) for clip, entry in found.items()}):
            self.ledger.bad |= {clip: Entry(*entry) for clip, entry in others.items() if clip not in self.ledger.bad}
        problems = [problem for problem in self.ranks.gather(self.ledger.problem()) if problem]
        if problems and trainer.is_global_zero:
            raise UserError(problems[0])
        if problems:
            raise SystemExit(2)

    def _together(self) -> tuple[np.ndarray, dict[str, int], list[int]]:
        """Join the ranks' counts: clips visited (num_rows,), visits, and each rank's failures in a row."""
        ledger = self.ledger
        own = (np.packbits(ledger.visited), ledger.visits_trained, ledger.visits_skipped, ledger.in_a_row)
        everyone = self.ranks.gather(own)
        bits = np.bitwise_or.reduce([bits for bits, *_ in everyone])
        visits = {
            "trained": self._before["trained"] + sum(rank[1] for rank in everyone),
            "skipped": self._before["skipped"] + sum(rank[2] for rank in everyone),
        }
        visited = np.unpackbits(bits, count=len(ledger.visited)).astype(bool)
        return visited, visits, [rank[3] for rank in everyone]
