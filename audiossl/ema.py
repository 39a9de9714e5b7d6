"""How does a teacher follow its student?

As an exponential moving average of the student's parameters, taken once per optimiser step (BYOL, arXiv 2006.07733;
ATST, arXiv 2204.12076). It gets no gradient and so cannot be pulled towards the student's shortcuts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from audiossl.stepping.refusal import refused_step


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of `teacher` to momentum * teacher + (1 - momentum) * student, in place.

    Parameters are paired by name; what only the student has (a predictor) is left alone. Buffers are not averaged: as
    published, the running statistics of the teacher's BatchNorm come from its own forward passes. After a step that was
    refused on the device nothing moves.
    """
    source = dict(student.named_parameters())
    names, targets = zip(*teacher.named_parameters(), strict=True)
    missing = [name for name in names if name not in source]
    assert not missing, f"the student has no parameter {missing[0]}"
    sources, refused = [source[name] for name in names], refused_step()
    if refused is None:
        return get_ema_multi_avg_fn(momentum)(list(targets), sources, None)
    shares = {dtype: (1 - momentum) * (1 - refused.to(dtype)) for dtype in {target.dtype for target in targets}}
    with torch.no_grad():
        torch._foreach_lerp_(targets, sources, [shares[target.dtype] for target in targets])
