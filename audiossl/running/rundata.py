"""Which clips does a run's trainer get, how long, and for how many steps?"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from audiossl.errors import UserError
from audiossl.shards import ShardData


class RunData(pl.LightningDataModule):
    """Hand the trainer the loaders of this rank, from the optimiser step it stands at."""

    def __init__(self, data: ShardData, *, max_steps: int, seed: int, crop_samples: int):
        super().__init__()
        self.data, self.max_steps, self.seed, self.crop_samples = data, max_steps, seed, crop_samples

    def train_dataloader(self):
        return self._train_loader(self.trainer.global_step, self.max_steps, is_replay=False)

    def replay(self, first_step: int, last_step: int):
        """Serve this rank's micro-batches of the optimiser steps [first_step, last_step) once more."""
        return self._train_loader(first_step, last_step, is_replay=True)

    def _train_loader(self, start_step: int, max_steps: int, *, is_replay: bool):
        trainer = self.trainer
        return self.data.train_loader(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            start_step=start_step,
            max_steps=max_steps,
            seed=self.seed,
            crop_samples=self.crop_samples,
            is_replay=is_replay,
            **self._place(),
        )

    def _place(self) -> dict[str, Any]:
        """Say where a resident corpus lies, and how many ranks share that host."""
        return {"device": self.trainer.strategy.root_device, "num_sharing": self.trainer.num_devices}

    def val_dataloader(self):
        loader = self.data.validation_loader(
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            crop_samples=self.crop_samples,
            **self._place(),
        )
        return loader if loader is not None else []


def crop_samples(data: dict[str, Any], method, rate_hz: int) -> int:
    """Count the samples of a crop at the loader's rate: as long as asked for, as the method wants, or as the frames."""
    frontend = method.frontend
    if data["crop_seconds"] is not None:
        return round(data["crop_seconds"] * rate_hz)
    if frontend.frames is None:
        raise UserError("data.crop_seconds and frontend.seconds are both null; say how long a crop is")
    samples = getattr(method, "crop_samples", None) or frontend.samples_for(frontend.frames)
    return math.ceil(samples * rate_hz / frontend.rate_hz)


def max_steps_of(trainer: dict[str, Any], clips_per_epoch: int, global_batch: int) -> int:
    if trainer["max_steps"] is not None:
        return trainer["max_steps"]
    return math.ceil(trainer["max_epochs"] * clips_per_epoch / global_batch)
