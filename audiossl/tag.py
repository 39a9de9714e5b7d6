"""What is heard in an audio file, and when, says an encoder with a classifier?

`python -m audiossl tag --encoder DIR FILE...` prints the classes of highest probability. A long file is heard window by
window, as `embed` hears it, and its probabilities are the windows' average: every moment counts once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from audiossl.embed import add_encoder_arguments, load_for
from audiossl.embeddings import evaluating, file_blocks
from audiossl.errors import UserError
from audiossl.features.description import NOT_FINITE
from audiossl.features.windows import Layout, Piece, cut, speaks_for, windows_for
from audiossl.sound.audio import AudioError
from audiossl.sound.listing import find_files, none_of

if TYPE_CHECKING:
    from audiossl.pretrained import PretrainedEncoder


@dataclass(frozen=True)
class Tagged:
    """Hold the probabilities (C,) of a window of a clip, when it begins and ends, and how many moments it is for."""

    begin_seconds: float
    end_seconds: float
    probabilities: Tensor
    weight: int


@torch.no_grad()
def tag(
    model: PretrainedEncoder, blocks: Iterable[Tensor], *, exclusive: bool = False, overlap: float, batch_size: int
) -> list[Tagged]:
    """Score the classes of a clip that comes in blocks (S,) at the model's rate, window by window.

    Probabilities are sigmoids, class by class, as AudioSet's labels ask; `exclusive` takes the softmax instead, for
    classes of which a clip has one. A head that scores moments is pooled over a window's as it was in training
    (`weak_pooling`), else averaged. Raises `UserError` for an
    encoder without classifier, and `AudioError` as the blocks do.
    """
    layout, found = Layout.of(model.encoder, model.frontend, overlap), []
    with evaluating(model):
        for windows in windows_for(model.encoder, model.frontend, layout, cut(0, blocks, layout), batch_size):
            score = model.logits if model.weak_pooling == "none" else model.clip_logits
            logits = score(windows.spectrogram, windows.valid_frames).float().cpu()
            if not logits.isfinite().all():
                raise AudioError(NOT_FINITE)
            scores = logits.softmax(-1) if exclusive else logits.sigmoid()
            is_taken = speaks_for(windows, model.encoder, mask_padding=model.mask_padding)
            for piece, some, mask in zip(windows.pieces, scores, is_taken, strict=True):
                if some.ndim == 2:  # of every patch: (N, C)
                    some = _mean_over(some, mask)
                found.append(Tagged(*_times(piece, model), some, int(mask.sum())))
    return found


def _mean_over(scores: Tensor, is_taken: Tensor) -> Tensor:
    rows = len(scores) // len(is_taken)
    taken = is_taken if is_taken.any() else torch.ones_like(is_taken)
    return scores.unflatten(0, (rows, len(is_taken)))[:, taken].mean((0, 1))


def _times(piece: Piece, model: PretrainedEncoder) -> tuple[float, float]:
    return piece.start / model.rate_hz, (piece.start + len(piece.samples)) / model.rate_hz


def average(found: list[Tagged]) -> Tensor:
    """Average windows by the moments that each is for: (C,)."""
    weights = torch.tensor([float(window.weight) for window in found])
    return (torch.stack([window.probabilities for window in found]) * weights[:, None]).sum(0) / weights.sum()


def _lines(found: list[Tagged], labels: list[str], num_top: int, by_window: bool) -> Iterator[str]:
    if by_window:
        for window in found:
            best = ", ".join(f"{label} {p:.3f}" for label, p in _top(window.probabilities, labels, num_top))
            yield f"  {window.begin_seconds:8.2f} - {window.end_seconds:8.2f} s  {best}"
        return
    best = _top(average(found), labels, num_top)
    width = max(len(label) for label, _ in best)
    yield from (f"  {label:<{width}}  {probability:.3f}" for label, probability in best)


def _top(probabilities: Tensor, labels: list[str], num_top: int) -> list[tuple[str, float]]:
    values, places = probabilities.topk(min(num_top, len(labels)))
    return [(labels[place], value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl tag`."""
    add_encoder_arguments(parser)
    parser.add_argument("--top", type=int, default=5, help="how many classes (default: 5)")
    parser.add_argument("--windows", action="store_true", help="a line for each window, with its times")
    parser.add_argument(
        "--exclusive", action="store_true", help="a clip has one class only: softmax instead of sigmoid"
    )


def main(args: argparse.Namespace) -> int:
    """Tag each file as it comes; a file that cannot be used is a line on stderr."""
    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1")
    found = find_files(args.files)
    model = load_for(args)
    if model.head is None or not model.labels:
        what = "no classifier" if model.head is None else "a classifier without the names of its classes"
        raise UserError(f"--encoder {args.encoder}: has {what}; take one that was trained on labels (passt, atst_c2f)")
    rejected, num_tagged = list(found.rejected), 0
    how = dict(exclusive=args.exclusive, overlap=args.overlap, batch_size=args.batch_size)
    for path in found.files:
        try:
            windows = tag(model, file_blocks(path, model), **how)
        except AudioError as error:
            rejected.append((str(path), str(error)))
            continue
        num_tagged += 1
        print(path, *_lines(windows, model.labels, args.top, args.windows), sep="\n")
    if not num_tagged:
        raise UserError(none_of("tagged", rejected))
    for name, reason in rejected:
        print(f"{name}: {reason}", file=sys.stderr)
    return 0
