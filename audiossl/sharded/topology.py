"""Can this run go on from that checkpoint, when one of them is spread over ranks?

ZeRO's optimiser state is cut into as many pieces as there were ranks, and DeepSpeed loads it on no other number
(its "elastic" checkpoints included). The way out is the converter, whose result any run starts from.
"""

from __future__ import annotations

from pathlib import Path

from audiossl.errors import UserError
from audiossl.sharded.folders import is_sharded, read_seal
from audiossl.sharded.settings import is_deepspeed, stage_of


def check_layout(ckpt: Path, strategy: str, num_ranks: int) -> None:
    """Refuse, with a `UserError` that names the way out, a checkpoint of another kind, stage or number of ranks."""
    if not is_sharded(ckpt):
        if is_deepspeed(strategy):
            raise UserError(
                f"ckpt={ckpt}: an ordinary checkpoint, which trainer.strategy={strategy} cannot resume; go on with "
                f"trainer.strategy=ddp, or start a new run from its weights with init={ckpt}"
            )
        return
    found = read_seal(ckpt)
    ranks, stage = found["ranks"], found["stage"]
    way_out = f"give these, or convert it: python -m audiossl convert {ckpt} OUT"
    saved = f"saved by {ranks} rank{'s' if ranks > 1 else ''} of trainer.strategy=deepspeed_stage_{stage}"
    if not is_deepspeed(strategy):
        raise UserError(f"ckpt={ckpt}: {saved}, now it is trainer.strategy={strategy}; {way_out}")
    if stage_of(strategy) != stage or ranks != num_ranks:
        raise UserError(f"ckpt={ckpt}: {saved}, now it is {num_ranks} of stage {stage_of(strategy)}; {way_out}")
