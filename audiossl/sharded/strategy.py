"""How does DeepSpeed train one of our methods without giving up what a run promises?

Lightning's DeepSpeedStrategy and DeepSpeed's engine do the sharding (ZeRO, 1910.02054). What is added: a folder a step
with a seal instead of one folder that is written over, loading that runs no code, all ranks or none at every save and
load, ranks on the CPU (gloo) as well, and autocast instead of weights in half precision, which neither the front end
nor a teacher that moves by 1e-4 of its way would survive.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from audiossl.checkpoints.atomic import check_plain, try_to_remove
from audiossl.errors import UserError
from audiossl.running.ranks import Ranks, give_up_after
from audiossl.sharded.engine import PlainFiles, described, reason_of, seal
from audiossl.sharded.folders import TAG, problem_of, read_seal

log = logging.getLogger(__name__)


class Autocast(DeepSpeedPrecision):
    """Leave weights and inputs as they are; DeepSpeed's engine casts inside of the forward pass (bf16-mixed)."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> AbstractContextManager:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed")


class Zero(DeepSpeedStrategy):
    """Train with ZeRO stage 1, 2 or 3 on CUDA, or on CPU ranks with gloo.

    Give the Trainer `plugins=[Autocast(precision)]` beside it, as `start.trainer_arguments` does. Saves a folder
    `step=N.ckpt` (see `folders`), and loads one that the same number of ranks saved at the same stage.
    """

    def __init__(self, *, stage: int, precision: str, startup: timedelta, patience: timedelta):
        super().__init__(stage=stage, logging_batch_size_per_gpu=1, logging_level=logging.ERROR, timeout=startup)
        self.patience = patience
        self.stage = stage
        assert isinstance(self.config, dict)
        # Lightning would ask for weights in bfloat16
        self.config["bf16"] = {"enabled": False}
        if precision == "bf16-mixed":
            # no module is "safe": gradients are summed over the ranks in float32, as DistributedDataParallel does
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }

    def setup_environment(self) -> None:
        if self.root_device.type != "cpu":
            return super().setup_environment()
        super(DeepSpeedStrategy, self).setup_environment()  # the check for CUDA is all that DeepSpeedStrategy adds

    def setup_distributed(self) -> None:
        if self.root_device.type != "cpu":
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        give_up_after(self.patience)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer, lr_scheduler: Any = None
    ) -> tuple[deepspeed.DeepSpeedEngine, Optimizer]:
        # Lightning hands on the number of the GPU, of which a CPU rank has none
        engine, sharded, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank if self.root_device.type == "cpu" else self.root_device.index),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        self.files = engine.checkpoint_engine = PlainFiles()
        self.ranks = Ranks()
        return engine, sharded

    def gradient_norm(self) -> Tensor:
        """Give the global norm of the gradient of the step that was just taken; infinite when it was not taken."""
        if self.deepspeed_engine.optimizer.overflow:
            return torch.tensor(float("inf"))
        return torch.as_tensor(self.deepspeed_engine.get_global_grad_norm())

    def divide_gradient_by(self, excess: float) -> None:
        """Have the next step divide the gradient, which it holds in pieces, and its norm, before that is clipped.

        It is the way of a loss scale: what micro-batches weigh is known when the last one is (`pretraining.py`).
        """
        self.deepspeed_engine.optimizer.loss_scale = excess

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Let every rank write its files into the folder `filepath`, then seal it; raises `UserError` on all ranks."""
        assert storage_options is None, "local folders have no storage options"
        folder, ranks = Path(filepath), self.ranks
        state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        check_plain(state)
        if self.is_global_zero and folder.exists():
            try_to_remove(folder)  # of a run that died here, or that came here before it was set back
        self.barrier("the folder is clear")
        self.files.begin()
        self.deepspeed_engine.save_checkpoint(str(folder), tag=TAG, client_state={"run": state})
        problem, written = self.files.problem, []
        try:
            written = described(folder, self.files.written)
        except OSError as error:
            problem = problem or reason_of(error)
        everyone = ranks.gather((written, problem))
        problem = next((problem for _, problem in everyone if problem), None)
        if problem is None and self.is_global_zero:
            facts = dict(step=checkpoint["global_step"], ranks=ranks.size, stage=self.stage)
            try:
                seal(folder, [file for files, _ in everyone for file in files], **facts)
            except (OSError, UserError) as error:
                problem = reason_of(error)
        problem = ranks.gather(problem)[0]
        if problem is not None:
            if self.is_global_zero and folder.exists():
                try_to_remove(folder)
            raise UserError(f"{folder}: not saved, {problem}; checkpoints saved before are as they were")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the folder on all ranks, or raise `UserError` on all of them; no code in it runs."""
        folder = Path(checkpoint_path)
        self._agree(folder.name, problem_of(folder, check_contents=False))
        self._agree(read_seal(folder))
        content, problem = None, None
        try:
            _, content = self.deepspeed_engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        except UserError as error:
            problem = str(error)
        self._agree(None, problem)
        assert content is not None
        return content["run"]

    def _agree(self, found: Any, problem: str | None = None) -> None:
        everyone = self.ranks.gather((found, problem))
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(everyone) if problem]
        if problems:
            raise UserError(f"ckpt: no rank goes on, since {'; '.join(problems)}")
        if any(other != everyone[0][0] for other, _ in everyone):
            raise UserError("ckpt: the ranks found different checkpoints; do they see the same files?")
