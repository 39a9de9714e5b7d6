"""At which rate, with how much decay, with which momentum is step k taken?

Every schedule is a pure function of the step, so that a resumed run needs no scheduler state. Three published shapes:
Audio-MAE's warm-up and half cosine, ATST's (2204.12076: arrays that include both ends of the warm-up and stop short of
the final value) for rate, decay and the teacher's momentum, and PaSST's (2110.05069) factors that change once an epoch.
"""

from __future__ import annotations

import math


def warmup_cosine(step: float, *, peak: float, floor: float, warmup_steps: float, max_steps: float) -> float:
    """Rise from 0 to `peak` over `warmup_steps`, then fall as half a cosine, reaching `floor` at `max_steps`.

    Step 0 of a warm-up has rate 0; past `max_steps` the value stays `floor`. In epochs: step = epoch x steps per
    epoch. Source: Audio-MAE `util/lr_sched.py`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def atst_cosine(step: int, *, base: float, final: float, warmup_steps: int, max_steps: int) -> float:
    """Go from 0 to `base` in `warmup_steps` values, both ends among them, then towards `final` as half a cosine.

    The last step of the warm-up and the first behind it both have `base`; the last of all, `max_steps` - 1, does not
    quite reach `final`. Source: ATST `cosine_scheduler_step`.

    Differs: past the last step its value stays, where the published array ends.
    """
    step = min(step, max_steps - 1)
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    done = (step - warmup_steps) / (max_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * done))


def momentum_at(step: int, base: float, max_steps: int) -> float:
    """Give the teacher's momentum for the update that follows optimiser step `step` (0-based): from `base` to 1.

    A cosine without warm-up. As published the update takes the entry after the step's own, since the step counter has
    already moved on: `step` + 1.

    Differs: after the last step the last entry is taken again; the published code reads past the end there and dies.
    """
    return atst_cosine(step + 1, base=base, final=1.0, warmup_steps=0, max_steps=max_steps)


def passt_ramps(
    step: float, *, peak: float, floor: float, warmup: float, ramp_down: tuple[float, float], tread: float
) -> float:
    """Rise as exp(-5 (1 - e / W)^2), stay at `peak`, fall linearly to `floor`: a staircase of e = 0, 1, 2, ...

    `tread` is the length of a stair in steps (published: an epoch); `warmup` and `ramp_down` = (start, length) are in
    steps too. During the warm-up e counts as .5 at least, so the first rate is above 0; rise and fall multiply where
    they overlap. Source: PaSST `helpers/ramp.py`.
    """
    stair = _stair(step, tread)
    rise, start, length = warmup / tread, ramp_down[0] / tread, ramp_down[1] / tread
    up = math.exp(-5 * (1 - max(stair, 0.5) / rise) ** 2) if 0.5 < rise and stair < rise else 1.0
    fallen = 0.0 if stair <= start else min((stair - start) / length, 1.0) if length else 1.0
    return up * (peak * (1 - fallen) + floor * fallen)


def passt_cycle(step: float, *, peak: float, floor: float, warmup: float, start: float, tread: float) -> float:
    """Swing between `floor` and `peak` as a cosine that rises for `warmup` steps and falls for as many, and again.

    In stairs of `tread` steps, as in `passt_ramps`. Behind the end of the cycle in which `start` lies it stays `floor`.
    Source: PaSST `helpers/ramp.py`, whose cycles of an odd number of epochs begin half an epoch early.
    """
    stair, half = _stair(step, tread), warmup / tread
    last = 2 * half * (1 + (start / tread - 1) // (2 * half))
    if stair > last:
        return floor
    swing = math.cos(math.pi * (stair + math.floor(half)) / half)
    return floor + (peak - floor) * 0.5 * (1 + swing)


def _stair(step: float, tread: float) -> int:
    return math.floor(step / tread + 1e-9)  # 25,000 steps at 8,333.3 an epoch are three
