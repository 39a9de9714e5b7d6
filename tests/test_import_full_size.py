"""Do files of the published size and layout, their heads untold, give what the published code gave for such weights?"""

import math
import zlib

import pytest
import torch
from imports import imported, renamed
from test_weights_audiomae import deterministic_state, scramble

from audiossl.features.chunks import clip_features_in_chunks, frame_features_in_chunks
from audiossl.features.classifier import pool_tokens
from audiossl.parts.positions import sincos_table

WIDTH, DEPTH = 768, 12


def blocks(*, bias: bool) -> dict[str, tuple[int, ...]]:
    """Name the tensors of the transformer blocks of all base models, with their shapes."""
    parts = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    parts |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH), "norm1": (WIDTH,), "norm2": (WIDTH,)}
    shapes = {}
    for number in range(DEPTH):
        for part, shape in parts.items():
            shapes[f"blocks.{number}.{part}.weight"] = shape
            if bias or part != "attn.qkv":
                shapes[f"blocks.{number}.{part}.bias"] = shape[:1]
    return shapes


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


AUDIOMAE = {"cls_token": (1, 1, WIDTH)} | pair("patch_embed.proj", WIDTH, 1, 16, 16) | blocks(bias=True)
AUDIOMAE |= pair("fc_norm", WIDTH) | pair("head", 527, WIDTH)
ATST = {"mask_embed": (1, 1, WIDTH), "pos_embed": (1, 251, WIDTH)} | pair("patch_embed.patch_embed", WIDTH, 256)
ATST |= blocks(bias=False)
CLIP = ATST | {"cls_token": (1, 1, WIDTH)} | pair("norm", WIDTH)
FRAME = ATST | pair("norm_frame", WIDTH)
PASST = {name: (1, 1, WIDTH) for name in ("cls_token", "dist_token")} | {"new_pos_embed": (1, 2, WIDTH)}
PASST |= {"freq_new_pos_embed": (1, WIDTH, 12, 1), "time_new_pos_embed": (1, WIDTH, 1, 99)} | blocks(bias=True)
PASST |= pair("patch_embed.proj", WIDTH, 1, 16, 16) | pair("norm", WIDTH) | pair("head.0", WIDTH)
PASST |= pair("head.1", 527, WIDTH) | pair("head_dist", 527, WIDTH)


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Fill tensors as those were that the published code was measured with: numbers follow from the names."""
    tables = {name: shape for name, shape in shapes.items() if name.endswith("pos_embed")}
    state = deterministic_state({name: torch.zeros(shape) for name, shape in shapes.items() if name not in tables})
    for name, shape in tables.items():
        state[name] = 0.2 * scramble(math.prod(shape), zlib.crc32(name.encode())).reshape(shape)
    return {name: value.float() for name, value in state.items()}


def heard(*shape: int) -> torch.Tensor:
    return (scramble(math.prod(shape), 12345) * math.sqrt(12)).reshape(shape)


def same(ours: torch.Tensor, total: float, spread: float, first: list[float]) -> None:
    assert ours.sum().item() == pytest.approx(total, abs=2e-6 * ours.numel() ** 0.5 + 2e-3)
    assert ours.abs().mean().item() == pytest.approx(spread, abs=2e-6)
    assert ours.flatten()[: len(first)].tolist() == pytest.approx(first, abs=2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_fine_tuned_audiomae(tmp_path):
    state = filled(AUDIOMAE)
    table = sincos_table((8, 64), WIDTH, positions="published", overlapping=False)
    state["pos_embed"] = torch.cat([torch.zeros(1, WIDTH), table.transpose(0, 1).flatten(0, 1)])[None]
    assert len(state) == 152
    model = imported({"model": state}, tmp_path)[0].double()
    logits = model.logits(heard(2, 1, 1024, 128).mT)
    same(logits, 4.658410, 0.763818, [1.376262, 0.094258, 0.364474, -1.037757])


@pytest.mark.slow
@torch.no_grad()
def test_atst_clip(tmp_path):
    state = filled(CLIP)
    assert len(state) == 139 and sum(value.numel() for value in state.values()) == 85_420_032
    model = imported({"state_dict": renamed(state, "model.teacher.encoder.")}, tmp_path)[0].double()
    mel = heard(2, 1, 64, 1001)
    first = model.tokens(mel, torch.tensor([1001, 603]))[:, 0]
    same(first, -1.027252, 0.802010, [0.928443, -1.401794, 0.399103, 0.363710])
    sizes = dict(chunk_frames=601, num_layers=12, with_mean=True, division="published")
    features = clip_features_in_chunks(model.encoder, mel, torch.tensor([1001, 900]), **sizes)
    same(features, -31.750038, 0.574746, [0.009810, 0.604157, 0.021910, 0.274571])


@pytest.mark.slow
@torch.no_grad()
def test_atst_frame(tmp_path):
    state = filled(FRAME)
    assert len(state) == 138 and sum(value.numel() for value in state.values()) == 85_419_264
    model = imported({"state_dict": renamed(state, "model.teacher.encoder.")}, tmp_path)[0].double()
    mel, lengths = heard(2, 1, 64, 1001), torch.tensor([1001, 603])
    features = frame_features_in_chunks(model.encoder, mel, lengths, chunk_frames=None, num_layers=12)
    same(features, -25.397470, 0.517513, [-0.048293, 0.029384, -0.010296, -0.171268])


@pytest.mark.slow
@torch.no_grad()
def test_passt(tmp_path):
    state = filled(PASST)
    assert len(state) == 159 and sum(value.numel() for value in state.values()) == 86_153_758
    model = imported(state, tmp_path, name="passt-s-f128-p16-s10.pt")[0].double()
    x = heard(2, 1, 128, 998)
    same(model.logits(x), 10.617600, 0.787420, [0.029245, 0.126904, 0.522072, -0.369294])
    features = pool_tokens(model.tokens(x), "class", 2)
    same(features, 0.308618, 0.771342, [0.406384, -1.339391, 0.472084, 0.990035])
    same(model.logits(x[..., :500]), 9.013811, 0.785738, [-0.227900, 0.244501, 0.574382, -0.361037])
