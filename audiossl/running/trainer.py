"""Which Lightning Trainer does a config ask for?

Ours decide what Lightning would decide otherwise: where a checkpoint lies and when (`checkpointing`), what a signal
does (`checkpoints/preemption`), how many devices there are (`devices`), and the run's end, which is `max_steps` alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from audiossl.checkpointing import AtomicCheckpointIO
from audiossl.running.devices import Layout
from audiossl.running.ranks import give_up_after
from audiossl.sharded.settings import is_deepspeed


class PatientDDP(DDPStrategy):
    """Wait `startup` for all ranks to come, and from then on `patience` for one that does not answer."""

    def __init__(self, *, startup: timedelta, patience: timedelta):
        super().__init__(timeout=startup)
        self.patience = patience

    def setup_distributed(self) -> None:
        super().setup_distributed()
        give_up_after(self.patience)


def build_trainer(
    config: dict[str, Any],
    layout: Layout,
    max_steps: int,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
    *,
    has_validation: bool,
) -> pl.Trainer:
    """Make the Trainer that `config["trainer"]` asks for, on the devices of `layout`, which validates if there is what.

    Checkpoints are `callbacks`' affair, so are pre-emption and requeues; Lightning's own are off.
    """
    settings = dict(config["trainer"])
    accumulate = settings["accumulate_grad_batches"]
    for ours in ("accelerator", "devices", "num_nodes", "max_steps", "max_epochs", "strategy", "precision"):
        settings.pop(ours)
    for of_the_network in ("compile", "checkpoint_activations"):
        settings.pop(of_the_network, None)
    startup = timedelta(seconds=settings.pop("startup_timeout_seconds"))
    patience = timedelta(seconds=settings.pop("timeout_seconds"))
    strategy, precision = config["trainer"]["strategy"], config["trainer"]["precision"]
    if strategy == "auto":
        strategy = "ddp" if layout.total > 1 else "auto"
    if strategy == "ddp":
        strategy = PatientDDP(startup=startup, patience=patience)
    if precision == "auto":
        has_bf16 = layout.accelerator != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-mixed" if has_bf16 else "32-true"
    plugins = [AtomicCheckpointIO()]
    how = {"strategy": strategy, "precision": precision}
    if is_deepspeed(strategy):
        from audiossl.sharded.start import trainer_arguments

        how = trainer_arguments(strategy, layout.accelerator, precision, startup, patience)
        plugins = how.pop("plugins")
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    total = max_steps * accumulate
    return _left_in_peace(
        pl.Trainer(
            **settings,
            accelerator=layout.accelerator,
            devices=layout.devices,
            num_nodes=layout.num_nodes,
            **how,
            max_steps=max_steps,
            max_epochs=-1,
            val_check_interval=min(config["validate_every_steps"] * accumulate, total) if has_validation else 1.0,
            limit_val_batches=1.0 if has_validation else 0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            logger=loggers,
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=config["run_dir"],
        )
    )


def _left_in_peace(trainer: pl.Trainer) -> pl.Trainer:
    """Have no rank asked for a SIGTERM before every micro-batch, for whose answer a GPU would have to be waited for.

    Signals are `checkpoints.preemption`'s.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody
    return trainer


def _ask_nobody() -> None:
    """Take the place of Lightning's question."""
