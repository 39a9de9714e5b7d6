"""A student, a teacher and the demo clips: small enough to collapse on purpose in seconds.

The student predicts what its teacher, a moving average of it, makes of the same clip under other noise. It stays
healthy with a predictor and a slow teacher, and collapses without them: then a constant is all it takes to be right.
"""

import copy
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml
from conftest import ROOT
from maes import PLAIN
from test_pretraining import QUIET, demo_data
from torch import nn
from torch.nn import functional as F

from audiossl.checkpointing import AtomicCheckpointIO, Checkpointing
from audiossl.optim import OptimSettings
from audiossl.parts.health import effective_rank, feature_std
from audiossl.pretraining import Pretraining
from audiossl.running.alarm import CollapseAlarm, CollapseError
from audiossl.schedules import momentum_at
from audiossl.spectrogram import AtstMel

WIDTH = 16


class Teaching(nn.Module):
    """Log the health of both networks; `feature_dim` is the length of what they predict."""

    feature_dim = WIDTH

    def __init__(self, momentum: float, has_predictor: bool, narrowing: float = 1.0):
        super().__init__()
        self.narrowing = narrowing  # what is left of all dimensions but one after a step
        self.register_buffer("weights", torch.ones(WIDTH))
        settings = yaml.safe_load((ROOT / "conf/frontend/atst_mel.yaml").read_text()) | {"seconds": 0.64}
        self.frontend = AtstMel(**{name: value for name, value in settings.items() if name != "_target_"})
        self.encoder = nn.Sequential(nn.Linear(64 * 4, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.predictor = mlp(WIDTH) if has_predictor else nn.Identity()
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum = momentum

    def forward(self, batch, *, generator):
        patches = F.adaptive_avg_pool2d(self.frontend(batch.waveform, batch.num_samples), (64, 4)).flatten(1)
        views = [patches + 3.0 * (generator.uniform(patches.shape[1]) - 0.5) for _ in range(2)]
        student = torch.cat([self.predictor(self.encoder(view)) for view in views]) * self.weights
        with torch.no_grad():
            teacher = torch.cat([self.teacher(view) for view in reversed(views)]) * self.weights
        health = {"student_std": feature_std(student), "teacher_std": feature_std(teacher)}
        health |= {"student_rank": effective_rank(student), "teacher_rank": effective_rank(teacher)}
        return {"loss": 2 - 2 * F.cosine_similarity(student, teacher).mean(), **health}

    @torch.no_grad()
    def after_step(self, step: int, max_steps: int) -> None:
        self.weights[1:] *= self.narrowing
        momentum = momentum_at(step, self.momentum, max_steps)
        for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


HEALTHY = dict(momentum=0.99, has_predictor=True)
COLLAPSING = dict(momentum=0.0, has_predictor=False)
NARROWING = HEALTHY | dict(narrowing=0.8)


class Health(pl.Callback):
    """Keep what every step logged."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        self.rows.append({name: float(value) for name, value in module.row.items()})


def learn(folder: Path, teaching: dict, *, steps: int = 60, ckpt: Path | None = None, ranks: int = 1, **alarm):
    """Train on the demo clips, 16 a step over all ranks; returns the rows of every step and what the alarm said."""
    settings = dict(action="stop", loss=0.1, std_share=0.25, rank_share=0.1, patience=10) | alarm
    optim = PLAIN | dict(lr=0.01, base_lr=None, min_lr=0.0, warmup_steps=0, warmup_epochs=None, warmup_ratio=None)
    optim = OptimSettings(**optim, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    torch.manual_seed(0)
    rates = dict(batch_size=16 // ranks, waveform_rate_hz=16000, seed=3)
    module = Pretraining(Teaching(**teaching), optim=optim, max_steps=steps, **rates)
    save = dict(every_minutes=None, keep_last=9, keep_best=0, metric=None, provenance={})
    checkpointing = Checkpointing(folder=folder / "checkpoints", every_steps=5, **save)
    health = Health()
    callbacks = [health, CollapseAlarm(**settings), checkpointing]
    layout = dict(
        devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=steps, plugins=[AtomicCheckpointIO()]
    )
    settings = {name: value for name, value in QUIET.items() if name != "enable_checkpointing"}
    trainer = pl.Trainer(**settings, **layout, callbacks=callbacks, default_root_dir=folder)
    rung = None
    try:
        trainer.fit(module, Clips(16 // ranks, steps), ckpt_path=ckpt, weights_only=True)
    except CollapseError as error:
        rung = str(error)
    return health.rows, rung


class Clips(pl.LightningDataModule):
    """The demo clips in micro-batches of `batch_size` a rank, from the step where the trainer stands."""

    def __init__(self, batch_size: int, steps: int):
        super().__init__()
        self.batch_size, self.steps = batch_size, steps

    def train_dataloader(self):
        trainer = self.trainer
        where = dict(rank=trainer.global_rank, world_size=trainer.world_size, start_step=trainer.global_step)
        plan = dict(accumulate=1, max_steps=self.steps, seed=3, crop_samples=11000)
        return demo_data(self.batch_size).train_loader(**where, **plan)


if __name__ == "__main__":
    rows, said = learn(Path(sys.argv[1]), COLLAPSING, ranks=2)
    print(len(rows), said, flush=True)
