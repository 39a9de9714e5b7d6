"""The model of `toy_training`: dropout from the global generator, a moving average, weights of any size."""

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from audiossl.loading.loader import start_worker


class Clips(Dataset):
    """Each micro-batch is a function of its number."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4, 8, generator=torch.Generator().manual_seed(self.first + index))


class Loader:
    """The micro-batches from the one where the trainer stands; its length is that of the whole run."""

    def __init__(self, first: int, num_batches: int, num_workers: int):
        self.num_batches = num_batches
        worker_init_fn = start_worker if num_workers else None
        clips = Clips(first, num_batches)
        self.loader = DataLoader(clips, batch_size=None, num_workers=num_workers, worker_init_fn=worker_init_fn)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        return iter(self.loader)


class Toy(pl.LightningModule):
    """Predict the sum of eight numbers; signals itself where the fault says so; writes its losses to a file."""

    def __init__(self, losses: Path, options: dict):
        super().__init__()
        self.losses, self.options, self.fault = losses, options, dict(options["fault"])
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.ballast = nn.Parameter(torch.zeros(options["size"] * 256))
        self.register_buffer("mean", torch.zeros(16, 8))

    def strike(self, place: str, step: int) -> None:
        """Send this process the signals of the fault if this is its moment, once."""
        is_rank = self.fault.get("rank", 0) == self.global_rank
        if is_rank and self.fault.get("at") == place and self.fault["step"] == step:
            del self.fault["at"]
            for name in self.fault["signals"]:
                os.kill(os.getpid(), getattr(signal, name))

    def train_dataloader(self) -> Loader:
        accumulate = self.options["accumulate"]
        first = self.trainer.global_step * accumulate
        return Loader(first, self.options["steps"] * accumulate, self.options["num_workers"])

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Clips(1000, 1003), batch_size=None, generator=torch.Generator())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.strike("forward", self.global_step)
        time.sleep(self.options["pause"])
        if self.fault.get("nan") == self.global_step:
            self.net[0].weight.data[0, 0] = float("nan")
        error = self.net(batch + self.global_rank) - batch.sum(1, keepdim=True)
        return error.square().mean() + self.ballast.square().sum()

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self.strike("backward", self.global_step)

    def optimizer_step(self, *args, **kwargs) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        self.strike("optimizer", step)
        self.mean.lerp_(self.net[0].weight.detach(), 0.1)

    def on_train_start(self) -> None:
        self.strike("start", self.global_step)

    def on_train_batch_end(self, outputs: dict, batch: torch.Tensor, batch_idx: int) -> None:
        if (batch_idx + 1) % self.options["accumulate"] == 0 and self.global_rank == 0:
            with self.losses.open("a") as file:
                file.write(f"{self.global_step} {float(outputs['loss']).hex()}\n")
        self.strike("batch end", self.global_step)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.strike(f"{'sanity' if self.trainer.sanity_checking else 'validation'} {batch_idx}", self.global_step)
        self.log("val_loss", self.net(batch).square().mean())
        self.log("accuracy", float(self.global_step))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.strike("save", self.global_step)
