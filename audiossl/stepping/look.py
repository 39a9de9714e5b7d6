"""What does the host have to know of a step, and what of a step that went wrong?

Its numbers, to judge and to log; and, in case one is not finite, the batches it saw, the state it left and which
gradients were spoilt. A look takes all of it along while the device works, and is read a step later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from audiossl.batch import Batch
from audiossl.parts.health import Spectrum
from audiossl.stepping.hostcopy import HostCopy


class NonFiniteError(RuntimeError):
    """Stop a run whose loss or gradient is NaN or infinite, before the update reaches the weights; `look` says more."""

    def __init__(self, words: str, look: Look):
        super().__init__(words)
        self.look = look


@dataclass
class Gradients:
    """Hold a step's gradients: their parameters' names, the norm of each (n,) and of all (), where there are any."""

    names: list[str]
    norms: Tensor
    norm: Tensor

    @classmethod
    def of(cls, method: nn.Module) -> Gradients:
        """Measure what a backward pass has left."""
        names, gradients = [], []
        for name, parameter in method.named_parameters():
            if parameter.grad is not None:
                names.append(name)
                gradients.append(parameter.grad)
        if not gradients:
            device = next(method.parameters()).device
            return cls([], torch.zeros(0, device=device), torch.zeros((), device=device))
        norms = torch.stack(torch._foreach_norm(gradients))
        return cls(names, norms, torch.linalg.vector_norm(norms))


@dataclass
class Look:
    """Copy what is to be known of optimiser step `step`: its `row` of numbers, filled with floats once it is `read`.

    `spectra` hold a matrix for each micro-batch, whose rank joins the row as the mean of them. `batches` are those of
    this rank, with their losses. Only where `judges_norm` does an infinite gradient count.
    """

    step: int
    row: dict[str, Tensor | float]
    spectra: Mapping[str, Sequence[Spectrum]]
    gradients: Gradients
    batches: list[tuple[Batch, Tensor]]
    judges_norm: bool
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        numbers = {name: value for name, value in self.row.items() if isinstance(value, Tensor)}
        self._names = list(numbers)
        dtype = torch.float64 if torch.float64 in {value.dtype for value in numbers.values()} else torch.float32
        exact = torch.stack([value.to(dtype) for value in numbers.values()])
        matrices = [part for spectra in self.spectra.values() for one in spectra for part in (one.gram, one.floor)]
        self._copy = HostCopy([exact, self.gradients.norms, *matrices])

    def read(self) -> None:
        """Wait for the numbers, and put floats into the row. Raises `NonFiniteError` of a loss or gradient."""
        values, _, *matrices = self._copy.read()
        self.row |= dict(zip(self._names, values.tolist(), strict=True))
        loss, norm = self.row["loss"], self.row.get("grad_norm", 0.0)
        if not math.isfinite(loss) or (self.judges_norm and not math.isfinite(norm)):
            raise NonFiniteError(f"step {self.step}: the loss is {loss:g}, the gradient's norm {norm:g}", self)
        parts = iter(matrices)
        for name, spectra in self.spectra.items():
            ranks = [Spectrum(next(parts), next(parts)).rank() for _ in spectra]
            self.row[name] = float(torch.stack(ranks).mean().numpy()[()])

    @property
    def spoilt(self) -> list[str]:
        """Name the parameters whose gradient is not finite, once the look was read."""
        norms = self._copy.read()[1].tolist()
        return [n for n, norm in zip(self.gradients.names, norms, strict=True) if not math.isfinite(norm)]


def batch_statistics(method: nn.Module) -> dict[str, Tensor]:
    """Copy what the forward passes of later steps will change: the running statistics of batch normalisation."""
    kinds = (m for m in method.named_modules() if isinstance(m[1], nn.modules.batchnorm._BatchNorm))
    named = ((f"{name}.{part}", value) for name, module in kinds for part, value in module.named_buffers())
    return {name: value.clone() for name, value in named}
