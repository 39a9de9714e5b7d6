"""Two gloo ranks that DeepSpeed trains by our own `training.fit`, forked from one process that has imported it all.

`Pairs.run` starts both ranks as torchrun would and waits for both. Faults are made here, by wrapping what the saving
code calls.
"""

import atexit
import functools
import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

from commands import TINY
from conftest import ROOT
from methods import settings_of
from toy_training import Run, Toys

COMMON = ["trainer.accelerator=cpu", "trainer.max_steps=6", "checkpoint.every_steps=2", "logger.tensorboard=false"]
COMMON += ["trainer.log_every_n_steps=1", "data.batch_size=4", "data.num_workers=0", "probe=none", "pictures.clips=0"]
TEACHER = [*settings_of("atst_frame"), "data.validation_clips=8"]


class Pairs(Toys):
    """Start two ranks (or one) with the overrides of a command line; close it at the end."""

    script, defaults = __file__, {"overrides": [], "fault": {}}

    def start_pair(self, folder: Path, *overrides: str, model=TINY, fault=None, ranks: int = 2) -> list[Run]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "toy"}
        options = {"overrides": [*model, *COMMON, *overrides, f"trainer.devices={ranks}"], "fault": fault or {}}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return [self.start(folder, common | place, **options) for place in places]

    def run(self, folder: Path, *overrides: str, **more) -> tuple[list[int], str]:
        """Give the exit codes of the ranks, and what they said."""
        runs = self.start_pair(folder, *overrides, **more)
        codes = [run.wait(120) for run in runs]
        return codes, "\n".join(run.output() for run in runs)


@functools.cache
def pairs() -> Pairs:
    """Give the one server of this test session."""
    started = Pairs()
    atexit.register(started.close)
    return started


def split_small_weights_too() -> None:
    """Let stage 3 spread matrices that it would leave whole for being small; vectors stay whole, as in real models."""
    from audiossl.sharded.strategy import Zero

    build = Zero.__init__

    def built(self, **settings):
        build(self, **settings)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 500

    Zero.__init__ = built


def arm(fault: dict) -> None:
    """Arm kill: POINT at the save number `save` of rank `rank`, or signal: NAME after its step `step`."""
    if not fault or int(os.environ["RANK"]) != fault["rank"]:
        return
    from audiossl.checkpointing import Checkpointing
    from audiossl.sharded import strategy
    from audiossl.sharded.engine import PlainFiles

    die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    saves = 0
    save_all, save, seal = strategy.Zero.save_checkpoint, PlainFiles.save, strategy.seal

    def counted(*arguments, **settings):
        nonlocal saves
        saves += 1
        save_all(*arguments, **settings)

    def half(self, state_dict, path):
        if saves == fault["save"]:
            Path(path).write_bytes(b"PK\x03\x04 half")
            die()
        save(self, state_dict, path)

    def unsealed(folder, written, **facts):
        if saves == fault["save"]:
            die()
        seal(folder, written, **facts)

    if "kill" in fault:
        strategy.Zero.save_checkpoint = counted
    if fault.get("kill") == "mid-write":
        PlainFiles.save = half
    if fault.get("kill") == "before the seal":
        strategy.seal = unsealed
    if "signal" in fault:
        end = Checkpointing.on_train_batch_end

        def signalled(self, trainer, *rest):
            if trainer.global_step == fault["step"]:
                os.kill(os.getpid(), getattr(signal, fault["signal"]))
            end(self, trainer, *rest)

        Checkpointing.on_train_batch_end = signalled


def train(folder: Path, name: str, *, overrides: list[str], fault: dict) -> None:
    import hydra

    from audiossl.checkpoints.signals import install_early_handlers
    from audiossl.config.settings import check, plain_config
    from audiossl.config.specs import SPECS
    from audiossl.errors import UserError
    from audiossl.training import fit

    install_early_handlers()
    arm(fault)
    split_small_weights_too()
    places = [f"run_dir={folder}", "name=toy", f"root={ROOT}"]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*overrides, *places])
    try:
        check(cfg, SPECS["train"])
        seen = []
        fit(plain_config(cfg), prepare=seen.append)
    except UserError as error:
        print(f"UserError: {error}")
        sys.exit(2)
    if os.environ["RANK"] == "0":
        import torch

        torch.save(seen[0].state_dict(), folder / "memory.pt")


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import hydra  # noqa: F401
    import toy_training

    import audiossl.config.specs
    import audiossl.sharded.start
    import audiossl.training  # noqa: F401

    audiossl.sharded.start.trainer_arguments("deepspeed", "cpu", "32-true", timedelta(minutes=5), timedelta(minutes=5))
    toy_training.train = train
    toy_training.serve()
