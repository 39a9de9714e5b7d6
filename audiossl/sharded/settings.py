"""Can a run be sharded as its config says? Answered before torch is imported."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping

from audiossl.errors import UserError

DEFAULT_STAGE = 2
PRECISIONS = ("auto", "32-true", "bf16-mixed")


def is_deepspeed(strategy: object) -> bool:
    """Tell whether `trainer.strategy` asks for DeepSpeed."""
    return isinstance(strategy, str) and strategy.startswith("deepspeed")


def stage_of(strategy: str) -> int:
    """Read the ZeRO stage from `deepspeed` (2), or `deepspeed_stage_1`, `_2` or `_3`; raises `UserError`."""
    found = re.fullmatch(r"deepspeed(?:_stage_([123]))?", strategy)
    if found is None:
        raise UserError(
            f"trainer.strategy={strategy}: is not run here; take deepspeed_stage_1, deepspeed_stage_2 or "
            "deepspeed_stage_3, or ddp"
        )
    return int(found[1] or DEFAULT_STAGE)


def check_sharding(values: Mapping[str, object]) -> None:
    """Check what `trainer.strategy=deepspeed...` needs: the package, a stage, a precision, a way to clip."""
    strategy = values.get("trainer.strategy")
    if not is_deepspeed(strategy):
        return
    stage_of(strategy)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"trainer.strategy={strategy}: DeepSpeed is not installed; pip install -e '.[deepspeed]' -c constraints.txt"
        )
    if (precision := values.get("trainer.precision")) not in PRECISIONS:
        raise UserError(
            f"trainer.precision={precision}: trainer.strategy={strategy} takes 32-true or bf16-mixed; the others "
            "would turn the front end and a teacher's moving average into half precision"
        )
    if values.get("trainer.gradient_clip_algorithm") == "value":
        raise UserError(f"trainer.gradient_clip_algorithm=value: trainer.strategy={strategy} clips by norm only")


def refuse_sharding(values: Mapping[str, object]) -> None:
    """Refuse DeepSpeed where it was never tried: fine-tuning trains several runs in one process."""
    if is_deepspeed(strategy := values.get("trainer.strategy")):
        raise UserError(f"trainer.strategy={strategy}: is for train.py; finetune.py takes ddp, or auto")
