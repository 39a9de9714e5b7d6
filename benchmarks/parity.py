"""Do published checkpoints, imported, give the published numbers? `python -m benchmarks.parity --golden DIR`.

Every checkpoint of the golden cases goes the way of a user's: `audiossl import` into a folder, `audiossl.load` out of
it. What the loaded encoder, its front end and its classifier give is compared with what the authors' code gave, within
ten times the rounding that was measured for it (1e-5 where none was). Prints a table, writes it to docs/parity.md, and
ends with 1 where a number is off.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm
from tqdm import tqdm

import audiossl
from audiossl.__main__ import main as run
from audiossl.features.chunks import (
    class_token_over_blocks,
    clip_features_in_chunks,
    frame_features_in_chunks,
    valid_tokens,
)
from audiossl.features.classifier import pool_tokens
from audiossl.features.events import frame_loss, frame_probabilities
from audiossl.features.timestamps import frame_features, scene_embedding, timestamp_embedding
from audiossl.hear import HearModel, get_scene_embeddings, get_timestamp_embeddings, reader_of
from audiossl.masking import keep_cells
from audiossl.patches import grid_of
from audiossl.pretrained import PretrainedEncoder
from audiossl.scoring.pooling import attention_pool, class_attention
from audiossl.spectrogram import to_float
from audiossl.weights.reading import read_torch_file
from benchmarks import ROOT

PATTERNS = ("mae_pt_*", "mae_ft_*", "mae_import_pretrained*", "atst_clip_*", "atst_frame_*", "atst_c2f_*", "passt_*")
UNSTATED = 1e-5
Made = Iterator[tuple[str, Tensor]]


class Case:
    """Hold a golden case, and import its checkpoints when they are asked for."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch, self.name = folder, scratch, folder.name
        self.case = json.loads((folder / "case.json").read_text())
        self.config = self.case.get("config", {})
        self.input = load_file(folder / "input.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.layouts: list[str] = []

    @cached_property
    def file(self) -> Path:
        return next(path for path in (self.folder / "official.pth", self.folder / "official.ckpt") if path.exists())

    def model(self, file: str | None = None, **settings: object) -> PretrainedEncoder:
        """Import a checkpoint as a user does, and load what came of it."""
        source = self.file if file is None else self.folder / file
        told: dict[str, object] = {"num_heads": (self.config.get("arch_replaced_by") or self.config)["num_heads"]}
        size = self.config.get("img_size")  # (frames, bands) of Audio-MAE, (bands, frames) of PaSST
        told |= {"num_mels": size[-1 if self.name.startswith("mae") else 0]} if size else {}
        words = [f"{key}={value}" for key, value in (told | settings).items()]
        target = self.scratch / f"{self.name}-{source.stem}-{'-'.join(words[1:])}"
        if not target.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                code = run(["import", str(source), str(target), *words])
            if code != 0:
                raise RuntimeError(f"{self.name}: {source.name} was not imported")
        model = audiossl.load(target)
        self.layouts.append(model.description["provenance"]["layout"])
        return model

    def bound(self, name: str) -> float:
        told = self.case.get("tolerance", {}).get(name)
        if told is None:
            return UNSTATED
        return 10 * (told if isinstance(told, float) else told["max_abs_diff_f32_vs_f64"])

    def stored(self, ending: str) -> Tensor:
        """Read one tensor of the checkpoint itself, which no encoder holds."""
        return read_torch_file(self.file)["state_dict"][ending]


def time_major(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reorder tokens (B, rows * columns, ..) to Audio-MAE's published order."""
    return values.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


def audiomae_pretrained(case: Case) -> Made:
    if "x" not in case.input:
        return
    model, expected = case.model(), case.expected
    encoder, x = model.encoder, case.input["x"].mT
    rows, columns = encoder.grid_for(x)
    if "latent" in expected:
        kept = expected["ids_restore"].argsort(1)[:, : expected["latent"].shape[1] - 1]
        assert not bool(expected["mask"].gather(1, kept).any()), "the case's own indices keep what it masks"
        yield "latent", encoder(x, kept % rows * columns + kept // rows)
    if "patch_tokens_plus_pos_first16" in expected:
        tokens = time_major(encoder.positions(encoder.embed(x)), (rows, columns))
        yield "patch_tokens_plus_pos_first16", tokens[:, :16]
    if "no_mask_contextual_emb" in expected:
        num_layers = len(encoder.blocks) - 1 - case.config["contextual_depth"]
        mean = torch.stack(encoder.encode_layers(encoder.embed(x), num_layers=num_layers)).mean(0)
        yield "no_mask_contextual_emb", torch.cat([mean[:, :1], time_major(mean[:, 1:], (rows, columns))], dim=1)
    if "pooled_features" in expected:
        last = encoder.encode_layers(encoder.embed(x), num_layers=1, normed=False)[0]
        yield "pooled_features", layer_norm(last[:, 1:].mean(1), (encoder.width,), eps=1e-6)


def audiomae_tuned(case: Case) -> Made:
    model, x, labels = case.model(), case.input["x"].mT, case.input["labels"].float()
    encoder, head = model.encoder, model.head
    logits = model.logits(x)
    yield "features", head.norm(pool_tokens(model.tokens(x), head.pooling, 1))
    yield "logits", logits
    yield "bce", binary_cross_entropy_with_logits(logits, labels)
    keep = keep_cells(case.expected["ids_keep_f"].long(), case.expected["ids_keep_t"].long(), encoder.grid_for(x)[1])
    masked = head(pool_tokens(encoder(x, keep), head.pooling, 1))
    yield "logits_masked", masked
    yield "bce_masked", binary_cross_entropy_with_logits(masked, labels)


def class_token(encoder: torch.nn.Module, mel: Tensor, valid: Tensor, *_: object) -> Tensor:
    return encoder(mel, valid=valid)[:, 0]


def atst_clip(case: Case) -> Made:
    yield from step_outputs(case, "cls", class_token)
    mel, lengths, chunk = case.input.get("mel"), case.input.get("lengths"), case.config.get("chunk_frames")
    if mel is None:
        return
    teacher, short = case.model(), case.expected["len_short"]
    encoder = teacher.encoder
    for name in case.expected:
        kind, *rest = name.split(".")
        is_short = "short" in rest
        number = rest[-1].removesuffix("exact") if rest else ""
        frames = case.config["short_frames"] if is_short else int(number) if number.isdigit() else mel.shape[-1]
        part, count = mel[..., :frames], short if is_short else lengths.clamp(max=frames)
        sizes = dict(chunk_frames=chunk, num_layers=int(rest[0][1:]) if kind == "chunked" else 1, division="published")
        if kind == "chunked" and rest[1] == "avg0":
            yield name, clip_features_in_chunks(encoder, part, count, with_mean=False, **sizes)
        elif kind == "chunked":
            yield name, clip_features_in_chunks(encoder, part, count, with_mean=True, **sizes)
        elif kind == "finetuned":
            tuned = case.model("finetuned.ckpt")
            yield name, tuned.head(clip_features_in_chunks(tuned.encoder, part, count, with_mean=True, **sizes))
        elif kind == "cls":
            yield name, teacher.tokens(part, count)[:, 0]
        elif kind == "student_cls":
            yield name, case.model(part="student").tokens(part, count)[:, 0]
        elif kind == "cls_avg_blocks":
            yield name, class_token_over_blocks(encoder, part, count)
        elif kind == "cls_interp_pos":
            stretched = case.model(seconds=frames / 100, positions="interpolated")
            yield name, stretched.encoder(part)[:, 0]
        elif kind == "intermediate_last":
            yield name, teacher.tokens(part, None if rest[-1] == "nolength" else count)
        elif kind == "intermediate_first_cls":
            valid = valid_tokens(encoder, count, encoder.grid_for(part))
            layers = encoder.encode_layers(encoder.embed(part), num_layers=len(encoder.blocks), valid=valid)
            yield name, layers[0][:, 0]


def atst_frame(case: Case) -> Made:
    yield from step_outputs(case, "encoder", masked_frames)
    mel, lengths = case.input.get("mel"), case.input.get("lengths")
    if mel is None:
        return
    if "strong" in case.expected:
        yield from frame_level_head(case, mel)
        return
    model, chunk = case.model(), case.config["chunk_frames"]
    encoder, longest = model.encoder, model.encoder.geometry["frames"]
    for name in case.expected:
        kind, *rest = name.split(".")
        num_layers = len(encoder.blocks) if rest[0] == "nall" else int(rest[0][1:]) if rest[0][0] == "n" else 1
        frames = 161 if rest[-1] == "short" else longest  # its lengths are said in words in case.json
        part = mel[..., :frames]
        count = torch.tensor([161, 90, 33])[: len(mel)] if rest[-1] == "short" else lengths.clamp(max=frames)
        if kind.startswith("api_"):
            yield name, frame_interface(model, name, case)
        elif kind == "finetuned":
            tuned = case.model("finetuned.ckpt")
            features = frame_features_in_chunks(tuned.encoder, mel, lengths, chunk_frames=chunk, num_layers=1)
            yield name, tuned.head(features)
        elif kind == "frames_interp_pos":
            stretched = case.model(seconds=int(rest[0]) / 100, positions="interpolated")
            yield name, stretched.encoder(mel[:1, ..., : int(rest[0])])
        elif kind == "chunked_scene":
            yield name, frame_features_in_chunks(encoder, mel, lengths, chunk_frames=chunk, num_layers=num_layers)
        elif kind == "scene":
            yield name, frame_features_in_chunks(encoder, part, count, chunk_frames=None, num_layers=num_layers)
        elif kind == "frames":
            tokens = frame_features(encoder, part, count, num_layers=num_layers)
            is_cut = rest[-1].startswith("first")
            yield name, tokens[:, : int(rest[-1].removeprefix("first"))] if is_cut else tokens


def frame_interface(model: PretrainedEncoder, name: str, case: Case) -> Tensor:
    """Go the way of the authors' embedding interface, from the waveform on."""
    kind, samples = name.split(".")
    model.frontend.frames = None
    mel, encoder = model.frontend(case.input[f"wav_i16.{samples}"]), model.encoder
    if kind == "api_scene":
        sizes = dict(chunk_frames=1001, num_layers=len(encoder.blocks))
        return scene_embedding(encoder, mel, weighting="published", **sizes)
    num_layers = case.expected[f"api_timestamp.{samples}"].shape[-1] // encoder.width
    sizes = dict(chunk_frames=1001, num_layers=num_layers, hop_ms=10)
    features, times = timestamp_embedding(encoder, mel, timing="published", **sizes)
    return times if kind == "api_timestamps_ms" else features


def frame_level_head(case: Case, mel: Tensor) -> Made:
    model = case.model()
    frames, strong = model.tokens(mel), frame_probabilities(model.logits(mel))
    yield "frames", frames
    yield "strong", strong
    yield "bce", frame_loss(strong, case.input["labels"].float())
    theirs = {key.removeprefix("dcase_head."): value for key, value in case.input.items()}
    scores, attention = (
        frames @ theirs[f"{part}.weight"].T + theirs[f"{part}.bias"] for part in ("linear", "linear_softmax")
    )
    yield "dcase_strong", frame_probabilities(scores)
    yield "dcase_weak", attention_pool(scores.sigmoid(), class_attention(attention))


def masked_frames(encoder: torch.nn.Module, mel: Tensor, valid: Tensor, mask: Tensor, token: Tensor | None) -> Tensor:
    """Encode with `token` in the place of what is masked, None for nothing hidden; give what is masked and audio."""
    mask, tokens = mask.bool(), encoder.embed(mel)
    if token is not None:
        tokens = torch.where(mask[:, :, None], token, tokens)
    return encoder.encode(tokens, valid=valid)[mask & valid]


def step_outputs(case: Case, what: str, encode: Callable[..., Tensor]) -> Made:
    """Give what the encoders of a pre-training step say, teacher and student, of both views."""
    views = [case.input[name] for name in ("step0.view0", "step0.view1") if name in case.input]
    for part in ("teacher", "student"):
        name = f"step0.{part}_{what}"
        if not views or name not in case.expected:
            continue
        encoder, said = case.model(part=part).encoder, []
        for number, mel in enumerate(views):
            lengths = case.input.get(f"step0.len{number}", case.input.get("step0.lengths"))
            valid, mask = valid_tokens(encoder, lengths, encoder.grid_for(mel)), case.input.get("step0.mask")
            token = case.stored("model.student.encoder.mask_embed") if part == "student" else None
            said.append(encode(encoder, mel, valid, mask, token))
        if what == "encoder":
            evaluated = "eval.student_masked_frames" if part == "student" else "eval.teacher_frames_at_mask"
            yield evaluated, said[0]
            if not case.config.get("symmetric", True):  # the teacher hears one view, the student the other
                said = said[:1] if part == "teacher" else said[1:]
        yield name, torch.cat(said)


def atst_distilled(case: Case) -> Made:
    mel, lengths = case.input["mel"], case.input["lengths"]
    student, teacher = case.model(), case.model(part="teacher")
    chunk = dict(chunk_frames=case.config["teacher_chunk_frames"], num_layers=1)
    features = frame_features_in_chunks(student.encoder, mel, lengths, chunk_frames=None, num_layers=1)
    yield "eval.student_feature", features
    yield "eval.student_logits", student.head(features)
    heard = clip_features_in_chunks(teacher.encoder, mel, lengths, with_mean=True, division="published", **chunk)
    yield "eval.teacher_logits", teacher.head(heard)


def passt(case: Case) -> Made:
    if case.name.startswith("passt_deit"):
        yield from image_start(case)
        return
    model = case.model()
    if "wav_i16" in case.input:
        yield from heard(case, model)
        return
    labels, x = case.input["labels"].float(), case.input["x"]
    if "kept_t" in case.expected or "kept_u" in case.expected or case.case["mode"].startswith("train"):
        yield from patched_out(case, model, x, labels)
        return
    for name in case.expected:
        kind, _, frames = name.replace(".", "_").rpartition("_")
        part = within_reach(model, x[..., : int(frames)])
        tokens = model.tokens(part)
        if kind == "embedding":
            yield name, pool_tokens(tokens, "class", 2)
        elif kind == "logits":
            yield name, model.logits(part)
        elif kind == "bce":
            yield name, binary_cross_entropy_with_logits(model.logits(part), labels)
        elif kind in ("cls", "dist"):
            yield name, tokens[:, ("cls", "dist").index(kind)]
        elif kind == "patch_embed":
            yield name, model.encoder.patch_embed.proj(part)[:, : case.expected[name].shape[1]]


def within_reach(model: PretrainedEncoder, spectrogram: Tensor) -> Tensor:
    """Cut a spectrogram to what PaSST's positions reach."""
    encoder = model.encoder
    reach = (encoder.grid[1] - 1) * encoder.stride[1] + encoder.patch[1]
    columns = grid_of(*spectrogram.shape[-2:], encoder.patch, encoder.stride)[1]
    return spectrogram if columns <= encoder.grid[1] else spectrogram[..., :reach]


def patched_out(case: Case, model: PretrainedEncoder, x: Tensor, labels: Tensor) -> Made:
    """Encode what the case's patchout kept."""
    x, expected, encoder = within_reach(model, x), case.expected, model.encoder
    rows, columns = encoder.grid_for(x)
    kept_f, kept_t = (
        expected.get(name, torch.arange(size)).long() for name, size in (("kept_f", rows), ("kept_t", columns))
    )
    keep = keep_cells(kept_f[None], kept_t[None], columns)
    keep = keep[:, expected["kept_u"].long()] if "kept_u" in expected else keep
    first_column = case.case.get("rng", {}).get("time_encoding_offset", 0)
    tokens = encoder.encode(encoder.embed(x), keep.expand(len(x), -1), first_column=first_column)
    features = pool_tokens(tokens, "class", encoder.num_class_tokens)
    yield "embedding", features
    yield "logits", model.head(features)
    yield "bce", binary_cross_entropy_with_logits(model.head(features), labels)


def heard(case: Case, model: PretrainedEncoder) -> Made:
    """Describe scenes and moments of clips of any length, from the waveform on, by the HEAR interface."""
    audio = to_float(case.input["wav_i16"])
    for module, mode in dict.fromkeys(tuple(name.split(".")[:2]) for name in case.expected):
        reader = HearModel(reader_of(model, module=module, mode=mode))
        yield f"{module}.{mode}.scene", get_scene_embeddings(audio, reader)
        if f"{module}.{mode}.timestamp_embeddings" in case.expected:
            moments, times = get_timestamp_embeddings(audio, reader)
            yield f"{module}.{mode}.timestamp_embeddings", moments
            yield f"{module}.{mode}.timestamps_ms", times


def image_start(case: Case) -> Made:
    frames, stride = case.config["img_size"][1], case.config["stride"]
    model = case.model(like="passt", stride=f"{stride[0]},{stride[1]}", seconds=frames / 100)
    positions = model.encoder.positions
    yield "new_pos_embed", positions.class_table
    yield "freq_new_pos_embed", positions.frequency.permute(2, 0, 1)[None]
    yield "time_new_pos_embed", positions.time.permute(2, 0, 1)[None]
    yield "patch_embed.proj.weight", model.encoder.patch_embed.proj.weight
    yield "embedding", pool_tokens(model.tokens(case.input["x"]), "class", model.encoder.num_class_tokens)


FAMILIES = {
    "mae_ft": audiomae_tuned,
    "mae": audiomae_pretrained,
    "atst_clip": atst_clip,
    "atst_frame": atst_frame,
    "atst_c2f": atst_distilled,
    "passt": passt,
}


@dataclass(frozen=True)
class Result:
    """Hold how near an imported case comes: of the tensor that is nearest to its bound, difference and bound."""

    case: str
    layouts: str
    compared: list[str]
    worst: str
    difference: float
    bound: float

    @property
    def is_met(self) -> bool:
        return self.difference <= self.bound


@torch.no_grad()
def measure(folder: Path, scratch: Path) -> Result | None:
    """Import a case's checkpoints and compare all that they can say; None where the case has none."""
    if not any((folder / f"official.{kind}").exists() for kind in ("pth", "ckpt")):
        return None
    case = Case(folder, scratch)
    make = next(make for start, make in FAMILIES.items() if case.name.startswith(start))
    found = {}
    for name, ours in make(case):
        theirs = case.expected[name]
        assert ours.shape == theirs.shape, f"{case.name} {name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        found[name] = float((ours.double() - theirs.double()).abs().nan_to_num(torch.inf).max())
    if not found:  # a case of training steps alone: that its file imports is all it can show
        case.model()
    worst = max(found, key=lambda name: found[name] / case.bound(name), default="")
    layouts = " + ".join(dict.fromkeys(case.layouts))
    return Result(case.name, layouts, list(found), worst, found.get(worst, 0.0), case.bound(worst))


def lines_of(results: list[Result]) -> Iterator[tuple[str, ...]]:
    for result in results:
        numbers = (result.worst, f"{result.difference:.1e}", f"{result.bound:.1e}") if result.compared else ("", "", "")
        verdict = "imports" if not result.compared else "yes" if result.is_met else "NO"
        yield result.case, result.layouts, str(len(result.compared)), *numbers, verdict


COLUMNS = ("case", "layout", "tensors", "worst of them", "difference", "bound", "met")


def write_page(results: list[Result], path: Path) -> None:
    met, compared = sum(result.is_met for result in results), sum(len(result.compared) for result in results)
    table = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ("---",) * len(COLUMNS), *lines_of(results))]
    path.write_text(
        f"""# Do published checkpoints give the published numbers?

Written by `python -m benchmarks.parity`. Each checkpoint of the golden cases (the authors' code and file layouts, small
random weights) goes through `python -m audiossl import` and `audiossl.load`; what encoder, front end and classifier
then give is compared with what the authors' code gave: evaluation features, logits, forward passes with their masks
and kept patches, fine-tuned and frame-level classifiers, interpolated positions, HEAR. The bound is ten times
the authors' own float32 rounding, 1e-5 where it was not measured; the row shows the tensor nearest to its bound.
{met} of {len(results)} cases met, {compared} tensors compared. "imports": the case holds training steps only, which an
encoder alone cannot take (they are compared elsewhere: [methods](methods.md)). The full-size published files were not
at hand: that they load is not shown here.

"""
        + "\n".join(table)
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden", help="folder of golden cases")
    parser.add_argument("--page", type=Path, default=None, help="where to write the table as Markdown")
    arguments = parser.parse_args()
    folders = [folder for pattern in PATTERNS for folder in sorted(arguments.golden.glob(pattern))]
    with tempfile.TemporaryDirectory() as scratch:
        results = [result for folder in tqdm(folders, unit="case") if (result := measure(folder, Path(scratch)))]
    if not results:
        parser.error(f"{arguments.golden}: no golden case with a checkpoint")
    table = Table(*COLUMNS, box=None)
    for line in lines_of(results):
        table.add_row(*line, style="" if line[-1] != "NO" else "red")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if arguments.page:
        write_page(results, arguments.page)
    return 0 if all(result.is_met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
