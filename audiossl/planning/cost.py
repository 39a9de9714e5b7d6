"""What does a clip cost: how many tokens, operations and bytes?

Counted in a real training step of one clip on the CPU, not from formulas: patchout, a teacher and a decoder are then in
it as they are. A second clip in the forward pass tells what grows with the batch from what does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from audiossl.batch import Batch
from audiossl.noise import Noise
from audiossl.parts.blocks import Regional


@dataclass(frozen=True)
class Cost:
    """Hold what a clip costs.

    tokens: of its spectrogram; encoded: what passes each encoder's first block, class tokens included, all views
    together, by the encoder's name. FLOPs: a multiply-add is 2; forward, and of training. saved_bytes: kept for the
    backward pass a clip; fixed_bytes: kept whatever the batch (copies of the weights in 16 bit, position biases);
    recomputed_bytes: what a clip takes besides while the largest of the checkpointed blocks is computed again.
    """

    tokens: int | None
    encoded: dict[str, int]
    flops_forward: int
    flops_training: int
    saved_bytes: int
    fixed_bytes: int
    recomputed_bytes: int = 0


def flop_counter() -> FlopCounterMode:
    """Count the operations of matrix products, convolutions and attention, on the CPU too.

    Differs: torch's counter knows attention's kernels on GPUs only, and would leave them out here.
    """
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def cost_of(method: nn.Module, *, samples: int, num_classes: int | None, half: torch.dtype | None) -> Cost:
    """Take one training step of one clip of noise, `samples` long at the front end's rate; gradients are dropped after.

    `half` is the 16-bit type that autocast computes in, None for float32 throughout. Weights and buffers stay as they
    are but for what a forward pass in training moves (batch statistics).
    """
    method.train()
    forward, whole = flop_counter(), flop_counter()
    with whole:
        with forward, _saved_by(method) as saved, _seen_by(method) as encoded:
            loss = _loss(method, _clips(method, 1, samples, num_classes), half)
        loss.backward()
    method.zero_grad(set_to_none=True)
    with _saved_by(method) as saved_of_two:
        _loss(method, _clips(method, 2, samples, num_classes), half)
    one, two = sum(saved.values()), sum(saved_of_two.values())
    again = [_kept_by_blocks(method, _clips(method, count, samples, num_classes), half) for count in (1, 2)]
    return Cost(
        tokens=getattr(method, "tokens_per_clip", None),
        encoded=dict(encoded),
        flops_forward=forward.get_total_flops(),
        flops_training=whole.get_total_flops(),
        saved_bytes=max(two - one, 0),
        fixed_bytes=max(2 * one - two, 0),
        recomputed_bytes=max((of_two - of_one for of_one, of_two in zip(*again, strict=True)), default=0),
    )


def _kept_by_blocks(method: nn.Module, batch: Batch, half: torch.dtype | None) -> list[int]:
    """Count the bytes that each pass through a checkpointed block keeps while it is computed again, input left out."""
    blocks = [m for m in method.modules() if isinstance(m, Regional) and m.is_checkpointed]
    if not blocks:
        return []
    kept: list[int] = []
    with _saved_by(method) as saved:

        def bytes_with(inputs: tuple) -> int:
            storages = [t.untyped_storage() for t in inputs if isinstance(t, Tensor)]
            return sum((saved | {storage.data_ptr(): storage.nbytes() for storage in storages}).values())

        def begin(_: nn.Module, inputs: tuple) -> None:
            kept.append(-bytes_with(inputs))

        def end(_: nn.Module, inputs: tuple, __: Tensor) -> None:
            kept[-1] += bytes_with(inputs)

        hooks = [hook for b in blocks for hook in (b.register_forward_pre_hook(begin), b.register_forward_hook(end))]
        try:
            for block in blocks:
                block.is_checkpointed = False
            _loss(method, batch, half)
        finally:
            for block in blocks:
                block.is_checkpointed = True
            for hook in hooks:
                hook.remove()
    return kept


def _clips(method: nn.Module, count: int, samples: int, num_classes: int | None) -> Batch:
    waveform = 0.1 * torch.randn(count, samples, generator=torch.Generator().manual_seed(0))
    target = None if num_classes is None else torch.eye(num_classes)[:1].expand(count, -1).clone()
    rows = torch.arange(count)
    keys = [f"clip {row}" for row in range(count)]
    return Batch(waveform, torch.full((count,), samples), rows=rows, key=keys, target=target)


def _loss(method: nn.Module, batch: Batch, half: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        return method(batch, generator=Noise(0, 0, batch.rows, len(batch)))["loss"]


@contextmanager
def _saved_by(method: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the storages that are kept for the backward pass, the method's own weights left out: {address: bytes}."""
    own = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    saved: dict[int, int] = {}
    alive = []  # an address that is freed might be given out again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


@contextmanager
def _seen_by(method: nn.Module) -> Iterator[dict[str, int]]:
    """Count the tokens that enter each encoder: {name: tokens}; the name says whose it is, where there are several."""
    seen: dict[str, int] = {}
    encoders = {name: m for name, m in method.named_modules() if hasattr(m, "patch_embed") and hasattr(m, "blocks")}

    def counting(name: str):
        def count(_: nn.Module, args: tuple) -> None:
            seen[name] = seen.get(name, 0) + args[0].shape[0] * args[0].shape[1]

        return count

    short = {name: name.removesuffix("encoder").strip(".") or "encoder" for name in encoders}
    hooks = [m.blocks[0].register_forward_pre_hook(counting(short[name])) for name, m in encoders.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
