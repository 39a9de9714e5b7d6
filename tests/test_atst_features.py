"""Do ATST's frozen features equal the published ones, tensor by tensor?"""

from functools import partial

import pytest
import torch
from atsts import ATSTGolden, encoder_of, large_cases

from audiossl.features.chunks import (
    class_token_over_blocks,
    clip_features_in_chunks,
    frame_features_in_chunks,
    valid_tokens,
)
from audiossl.features.classifier import LinearHead
from audiossl.features.timestamps import frame_features, scene_embedding, timestamp_embedding
from audiossl.parts.positions import interpolate_positions
from audiossl.weights.atst import import_finetuned

CLIP, FRAME = large_cases("atst_clip_features*"), large_cases("atst_frame_features*")
SHORT = torch.tensor([161, 90, 33])  # lengths of "frames.*.short", said in words in case.json


def published_clip(encoder, mel, num_frames, chunk_frames, num_layers=1, with_mean=True):
    sizes = dict(chunk_frames=chunk_frames, num_layers=num_layers, with_mean=with_mean)
    return clip_features_in_chunks(encoder, mel, num_frames, **sizes, division="published")


def stretched(encoder, mel):
    """Encode with positions that reach over the whole of `mel` instead of being cut."""
    table = encoder.positions.table
    encoder.positions.table = torch.nn.Parameter(interpolate_positions(table.data, mel.shape[-1] // encoder.patch[1]))
    tokens = encoder(mel)
    encoder.positions.table = table
    return tokens


def finetuned(folder, golden):
    state, head_state, geometry = import_finetuned(folder / "finetuned.ckpt", num_heads=golden.config["num_heads"])
    classes, width = head_state["linear.weight"].shape
    encoder, head = encoder_of(geometry), LinearHead(width, classes, pooling="mean").eval()
    encoder.load_state_dict(state)
    head.load_state_dict(head_state)
    return encoder, head


def clip_tensor(name: str, golden: ATSTGolden, folder):
    """Make what the tensor `name` of a Clip case holds."""
    encoder, mel, lengths = golden.model.encoder, golden.input["mel"], golden.input["lengths"]
    chunk, short = golden.config["chunk_frames"], golden.expected["len_short"]
    kind, *rest = name.split(".")
    if kind == "chunked" and rest[1].startswith("avg"):
        return published_clip(encoder, mel, lengths, chunk, int(rest[0][1:]), rest[1] == "avg1")
    if kind == "finetuned":
        tuned, head = finetuned(folder, golden)
        return head(published_clip(tuned, mel, lengths, chunk))
    is_short = "short" in rest
    frames = golden.config["short_frames"] if is_short else int(rest[-1].removesuffix("exact"))
    mel, lengths = mel[..., :frames], short if is_short else lengths.clamp(max=frames)
    if kind == "chunked":
        return published_clip(encoder, mel, lengths, chunk, int(rest[0][1:]))
    valid = None if rest[-1] == "nolength" else valid_tokens(encoder, lengths, encoder.grid_for(mel))
    makers = {
        "cls": lambda: encoder(mel, valid=valid)[:, 0],
        "student_cls": lambda: golden.model.student.encoder(mel, valid=valid)[:, 0],
        "cls_avg_blocks": lambda: class_token_over_blocks(encoder, mel, lengths),
        "cls_interp_pos": lambda: stretched(encoder, mel)[:, 0],
        "intermediate_last": lambda: encoder(mel, valid=valid),
        "intermediate_first_cls": lambda: all_layers(encoder, mel, valid)[0][:, 0],
    }
    return makers[kind]()


def all_layers(encoder, mel, valid):
    return encoder.encode_layers(encoder.embed(mel), num_layers=len(encoder.blocks), valid=valid)


def frame_tensor(name: str, golden: ATSTGolden, folder):
    """Make what the tensor `name` of a Frame case holds."""
    encoder, mel, lengths = golden.model.encoder, golden.input["mel"], golden.input["lengths"]
    depth, longest = len(encoder.blocks), encoder.geometry["frames"]
    kind, *rest = name.split(".")
    if kind.startswith("api"):
        return embedding_tensor(name, golden)
    chunked = partial(frame_features_in_chunks, chunk_frames=golden.config["chunk_frames"])
    if kind == "finetuned":
        tuned, head = finetuned(folder, golden)
        return head(chunked(tuned, mel, lengths, num_layers=1))
    if kind == "frames_interp_pos":
        return stretched(encoder, mel[:1, ..., : int(rest[0])])
    num_layers = depth if rest[0] == "nall" else int(rest[0][1:])
    if kind == "chunked_scene":
        return chunked(encoder, mel, lengths, num_layers=num_layers)
    frames = int(SHORT[0]) if rest[-1] == "short" else longest
    mel, lengths = mel[..., :frames], SHORT[: len(mel)] if rest[-1] == "short" else lengths.clamp(max=frames)
    if kind == "scene":
        return frame_features_in_chunks(encoder, mel, lengths, chunk_frames=None, num_layers=num_layers)
    tokens = frame_features(encoder, mel, lengths, num_layers=num_layers)
    return tokens[:, : int(rest[-1].removeprefix("first"))] if rest[-1].startswith("first") else tokens


def embedding_tensor(name: str, golden: ATSTGolden):
    kind, samples = name.split(".")
    encoder, frontend = golden.model.encoder, golden.model.frontend
    frontend.frames = None
    mel = frontend(golden.input[f"wav_i16.{samples}"])
    depth = len(encoder.blocks)
    if kind == "api_scene":
        return scene_embedding(encoder, mel, chunk_frames=1001, num_layers=depth, weighting="published")
    sizes = dict(chunk_frames=1001, num_layers=golden.expected[f"api_timestamp.{samples}"].shape[-1] // encoder.width)
    features, times = timestamp_embedding(encoder, mel, **sizes, hop_ms=10, timing="published")
    return times if kind == "api_timestamps_ms" else features


@pytest.mark.parametrize(
    ("folder", "model", "make"),
    [(f, "atst_clip", clip_tensor) for f in CLIP] + [(f, "atst_frame", frame_tensor) for f in FRAME],
)
@torch.no_grad()
def test_every_published_feature_is_met(folder, model, make):
    golden = ATSTGolden(folder, model)
    golden.model.eval()
    names = [name for name in golden.expected if name != "len_short"]
    for name in names:
        bound = max(golden.bound(name), 1e-5)
        made, message = make(name, golden, folder), partial("{}: {}".format, name)
        torch.testing.assert_close(made, golden.expected[name], rtol=0, atol=bound, msg=message)
    assert len(names) > 10
