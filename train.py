"""Pre-train a self-supervised audio transformer: `python train.py [KEY=VALUE ...]`.

`--help` lists the groups, `--cfg job` the composed settings, `-m` sweeps. The settings are checked before torch is
imported, so a misspelt key costs a second, not a queue. Exit codes: 0 finished, 1 failed, 2 wrong input, 75 pre-empted
(ckpt=last goes on), 130 interrupted.
"""

import sys
from typing import Any

from omegaconf import DictConfig

from audiossl.checkpoints.signals import install_early_handlers
from audiossl.config.cli import launch
from audiossl.config.settings import plain_config
from audiossl.config.specs import SPECS


def fit(config: dict[str, Any]) -> dict[str, Any]:
    """Train as `config` (plain, resolved and checked) says; returns what `results.json` holds."""
    from audiossl.training import fit

    return fit(config)


def run(cfg: DictConfig) -> int:
    """Train as the composed config says; returns the exit code of a finished run."""
    fit(plain_config(cfg))
    return 0


if __name__ == "__main__":
    install_early_handlers()
    sys.exit(launch("train", run, SPECS["train"]))
