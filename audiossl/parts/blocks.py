"""How does a block of a network run: as it is written, compiled, or with its activations computed twice?

A network is a row of equal blocks. What is random about one (which clips skip it, what a dropout leaves out) comes in
as an argument, so that its body is a pure function of its inputs: it can be compiled once for all blocks of its kind,
without breaks, and computed again in the backward pass (activation checkpointing, 1604.06174) with the
very same numbers, without a look at a generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from audiossl.errors import UserError
from audiossl.parts.droppath import shares_of

_compiles = False  # true within `compiled`


class Regional(nn.Module, ABC):
    """Be a block whose `body(*inputs)` may be compiled or checkpointed; the first `num_batched` inputs are (B, ...).

    The names of weights, hooks and copies know nothing of either. A batch of one clip or none is never compiled: torch
    would compile it apart.
    """

    num_batched = 1
    backend: str | None = None
    is_checkpointed = False

    @abstractmethod
    def body(self, *inputs: Any) -> Tensor:
        """Compute the block from inputs alone: no draws, no state but its weights."""

    def run(self, *inputs: Any) -> Tensor:
        """Compute `body`, in the way that was chosen."""
        body = type(self).body
        is_watched = _get_current_dispatch_mode() is not None  # counters of operations see nothing of what is compiled
        if _compiles and self.backend is not None and len(inputs[0]) > 1 and not is_watched:
            for tensor in inputs[: self.num_batched]:
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)  # clips may be missing from a batch
            body = _compiled(type(self), self.backend)
        if self.is_checkpointed and torch.is_grad_enabled():
            how = dict(use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
            return checkpoint(body, self, *inputs, **how)
        return body(self, *inputs)


class ViTBlock(Regional, Block):
    """Mix tokens by attention, then each alone: timm's pre-norm block, whose `drop_path` draws before it runs."""

    num_batched = 4

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return (B, N, D); `attn_mask` is added to the logits of attention."""
        return self.run(tokens, attn_mask, *(shares_of(drop, tokens) for drop in (self.drop_path1, self.drop_path2)))

    def body(self, tokens: Tensor, mask: Tensor | None, first: Tensor | None, second: Tensor | None) -> Tensor:
        mixed = self.ls1(self.attn(self.norm1(tokens), attn_mask=mask))
        tokens = tokens + (mixed if first is None else mixed * first.to(mixed.dtype))
        changed = self.ls2(self.mlp(self.norm2(tokens)))
        return tokens + (changed if second is None else changed * second.to(changed.dtype))


def compile_blocks(network: nn.Module, device: str, backend: str = "inductor") -> int:
    """Let every block of a network run compiled within `compiled`, by a backend of `torch.compile`; give their number.

    Nothing is compiled before the first batch. Raises `UserError` where there is no compiler for a type of `device`.
    """
    if backend == "inductor":
        check_compiler(device)
    # a kind of block has a graph for each size, for training and not, with gradients and without
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    blocks = [module for module in network.modules() if isinstance(module, Regional)]
    for block in blocks:
        block.backend = backend
    return len(blocks)


def checkpoint_blocks(network: nn.Module) -> int:
    """Let every block keep its input alone for the backward pass, and compute the rest again; give their number."""
    blocks = [module for module in network.modules() if isinstance(module, Regional)]
    for block in blocks:
        block.is_checkpointed = True
    return len(blocks)


def check_compiler(device: str) -> None:
    """Raise `UserError` where torch finds nothing that compiles for a device: Triton on GPUs, C++ on the CPU."""
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            return get_cpp_compiler() and None
        except InvalidCxxCompiler:
            lack = "no C++ compiler is to be found (g++ or clang++, or the one that CXX names)"
    else:
        from torch.utils._triton import has_triton

        if has_triton():
            return
        lack = "Triton, which compiles for this device, is not here"
    raise UserError(f"trainer.compile=true: {lack}; install it or take trainer.compile=false")


def choose_ways(network: nn.Module, trainer: Mapping[str, Any], accelerator: str) -> None:
    """Let blocks run as the config's section `trainer` says. Raises `UserError` where they cannot."""
    if trainer.get("checkpoint_activations"):
        checkpoint_blocks(network)
    if trainer.get("compile"):
        if "deepspeed" in str(trainer["strategy"]):
            raise UserError("trainer.compile=true: not with DeepSpeed, which changes the weights under it; take false")
        compile_blocks(network, "cpu" if accelerator == "cpu" else "cuda")


@contextmanager
def compiled() -> Iterator[None]:
    """Let blocks that are to be compiled run so: in training, and not for the odd sizes of probes and pictures."""
    global _compiles
    before, _compiles = _compiles, True
    try:
        yield
    finally:
        _compiles = before


@cache
def _compiled(kind: type[Regional], backend: str) -> Callable[..., Tensor]:
    """Compile a kind's body once: dynamo tells blocks of other sizes apart by itself."""
    return torch.compile(kind.body, backend=backend, fullgraph=True)


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Count operations the first time only: those done twice are no part of what a model costs."""
    return nullcontext(), nullcontext() if _get_current_dispatch_mode() is None else _disable_current_modes()
