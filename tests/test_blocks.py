"""Do blocks that are compiled, or whose activations are computed twice, train as they would as they are written?"""

import copy

import pytest
import torch
from maes import audiomae
from torch._dynamo.utils import counters

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.parts import blocks
from audiossl.planning.cost import cost_of
from audiossl.planning.memory import memory_of, sizes_of

SIZES = dict(depth=3, decoder="local", decoder_depth=4, drop_path=0.3, width=24, num_heads=2, decoder_dropout=0.1)


def step(model, clips: int, number: int, *, trains: bool = True) -> tuple[float, list[torch.Tensor]]:
    """Take a step of some clips, some of which are not there: the loss and all gradients."""
    spectrogram = torch.randn(clips, 1, 128, 128, generator=torch.Generator().manual_seed(number))
    noise = Noise(0, number, torch.arange(clips), 8)
    torch.manual_seed(number)
    model.train(trains).zero_grad()
    with noise.of_this_step(), blocks.compiled(), torch.set_grad_enabled(trains):
        loss = model(Batch(spectrogram=spectrogram, rows=torch.arange(clips)), generator=noise)["loss"]
    if trains:
        loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(one, other, rtol: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=rtol)
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= rtol * b.norm() + 1e-9


@pytest.mark.parametrize(
    "backend, rtol, is_checkpointed",
    [
        ("eager", 1e-6, True),
        ("aot_eager", 1e-6, False),
        pytest.param("inductor", 1e-4, False, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param("inductor", 1e-4, True, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_compiled_blocks_do_what_is_written_and_are_compiled_once(backend, rtol, is_checkpointed):
    """Whatever the masks, the draws of drop path and dropout, the number of clips, training or not in between."""
    torch._dynamo.reset()
    blocks._compiled.cache_clear()
    counters.clear()
    written = audiomae(**SIZES)
    model = copy.deepcopy(written)
    assert blocks.compile_blocks(model, "cpu", backend) == 7
    if is_checkpointed:
        blocks.checkpoint_blocks(model)
    assert model.state_dict().keys() == written.state_dict().keys()
    for number, (clips, trains) in enumerate([(4, True), (3, False), (6, True), (2, True), (1, True), (5, False)]):
        if number == 2:
            graphs = counters["stats"]["unique_graphs"]
            torch.compiler.set_stance("fail_on_recompile")
        try:
            assert_same(step(model, clips, number, trains=trains), step(written, clips, number, trains=trains), rtol)
        finally:
            torch.compiler.set_stance("default")
    assert graphs == counters["stats"]["unique_graphs"] <= 8 and not counters["graph_break"]


def test_activations_computed_twice_change_no_number_and_save_memory():
    """Equal bits, drop path and dropout included; operations are counted once."""
    written = audiomae(**SIZES)
    model = copy.deepcopy(written)
    assert blocks.checkpoint_blocks(model) == 7
    for number in range(2):
        (loss, gradients), (expected, theirs) = step(model, 4, number), step(written, 4, number)
        assert loss == expected and all(map(torch.equal, gradients, theirs))
    samples = model.frontend.samples_for(model.frontend.frames)
    costs = [cost_of(m, samples=samples, num_classes=None, half=None) for m in (written, model)]
    assert costs[1].saved_bytes < 0.5 * costs[0].saved_bytes
    assert costs[1].flops_training == costs[0].flops_training


def test_the_largest_block_that_is_computed_again_is_counted():
    """It takes what checkpointing that block alone saves; and in the decoder its input, which it would not keep."""
    model = audiomae(**SIZES)
    samples = model.frontend.samples_for(model.frontend.frames)
    rows = [block for block in model.modules() if isinstance(block, blocks.Regional)]
    plain = cost_of(model, samples=samples, num_classes=None, half=None)
    taken = []
    for block, kept in ((rows[0], 0), (rows[-1], 64 * 16 * 4)):  # of the encoder, of the decoder
        block.is_checkpointed = True
        alone = cost_of(model, samples=samples, num_classes=None, half=None)
        block.is_checkpointed = False
        taken.append(plain.saved_bytes - alone.saved_bytes + kept)
        assert alone.recomputed_bytes == taken[-1]
    blocks.checkpoint_blocks(model)
    found = cost_of(model, samples=samples, num_classes=None, half=None)
    assert plain.recomputed_bytes == 0 and found.recomputed_bytes == max(taken)
    assert all(block.is_checkpointed for block in rows)
    needs = dict(devices=1, optim={"optimizer": "adamw"}, strategy="auto", is_half=False, remembered_bytes=0)
    parts = memory_of(sizes_of(model), found, batch_size=3, **needs)
    assert parts["a block run again"] == 3 * found.recomputed_bytes


def test_a_compiler_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match="trainer.compile=true: no C.. compiler"):
        blocks.compile_blocks(audiomae(), "cpu")
    with pytest.raises(UserError, match="DeepSpeed"):
        blocks.choose_ways(audiomae(), {"compile": True, "strategy": "deepspeed_stage_2"}, "cpu")
