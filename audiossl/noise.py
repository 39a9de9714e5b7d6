"""Where does the randomness of a step come from?

From (seed, step) alone. Numbers are drawn for the *global* batch and every clip takes the row at its position, so one
process with 16 clips and two with 8 see the same masks, and a resumed run sees those of the run it resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def mix_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from integers and words, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Noise:
    """Draw random numbers for the rows of one micro-batch.

    `rows` (B,) int64 are positions within the global batch of `num_rows` clips. Calls must come in the same order in
    every process, which they do when all run the same method.
    """

    def __init__(self, seed: int, step: int, rows: Tensor, num_rows: int, device: torch.device | str = "cpu"):
        if rows.device.type == "cpu" and len(rows):  # on a GPU the look would wait for it
            assert rows.numpy().max() < num_rows, "a row lies outside the global batch"
        self.rows = rows.to(device)
        self.num_rows = num_rows
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(mix_seed(seed, step))
        self._host = self.generator  # of what the host has to know: asking a GPU would mean to wait for it
        if self.device.type != "cpu":
            self._host = torch.Generator().manual_seed(mix_seed(seed, step, "host"))
        self._inside, self._seed, self._num_inside = torch.Generator(self.device), (seed, step), 0

    @classmethod
    def for_batch(cls, seed: int, step: int, batch_size: int, device: torch.device | str = "cpu") -> Noise:
        """Serve a batch that is the whole global batch: scripts, validation, tests."""
        return cls(seed, step, torch.arange(batch_size), batch_size, device)

    def uniform(self, *shape: int) -> Tensor:
        """Draw float32 in [0, 1): (B, *shape)."""
        everyone = torch.rand(self.num_rows, *shape, generator=self.generator, device=self.device)
        return everyone[self.rows]

    def shared(self, *shape: int) -> Tensor:
        """Draw float32 in [0, 1) that all clips of the global batch share: `shape`."""
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def randint(self, high: int) -> int:
        """Draw one integer in [0, high), shared by the global batch."""
        return int(torch.randint(high, (1,), generator=self._host).numpy()[0])

    @contextmanager
    def of_this_step(self) -> Iterator[None]:
        """Let layers that are handed no noise draw by the rows of this one: see `draws_of_this_step`."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def draw_inside(self, count: int) -> Tensor:
        """Draw float32 in [0, 1) for `count` rows of a layer: those of the batch, once for each of its views.

        Every call has a seed of its own, so that a rank without clips, which draws nothing, stays in step.
        """
        self._inside.manual_seed(mix_seed(*self._seed, "inside", self._num_inside))
        self._num_inside += 1
        views = count // max(len(self.rows), 1)
        everyone = torch.rand(views, self.num_rows, generator=self._inside, device=self.device)
        return everyone[:, self.rows].flatten()


_CURRENT: ContextVar[Noise | None] = ContextVar("noise of this step", default=None)


def draws_of_this_step(count: int) -> Tensor | None:
    """Draw for `count` rows of a layer from the step's noise; None outside of a step, or where the rows are others."""
    noise = _CURRENT.get()
    if noise is None or (len(noise.rows) and count % len(noise.rows)) or (count and not len(noise.rows)):
        return None
    return noise.draw_inside(count)
