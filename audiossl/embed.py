"""How do the features of a folder of audio get into one file, whatever lies in it and whatever kills the command?

`python -m audiossl embed --encoder DIR FILES... --out features.npz` describes each file by a frozen encoder. Files that
cannot be used are listed with the reason beside the result; the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from audiossl.errors import UserError
from audiossl.features.store import Group, Store, check_kind, differing, groups_of, plan_of, write_ledger
from audiossl.sound.listing import Found, find_files, none_of

if TYPE_CHECKING:
    from torch import Tensor

    from audiossl.features.description import Choice
    from audiossl.pretrained import PretrainedEncoder

FORMATS = """\
FILES are audio files, folders (sub-folders included), patterns such as
'set/*/*.flac', or .txt files that list one file a line. Any rate, length up to
an hour and up to 64 channels; m4a, mp4, webm and aac need the program ffmpeg.

OUT holds, row by row or one after the other:
  clip                (files, D') a vector for each file
  files               (files,) their names
  about               what was asked of which encoder, as JSON
with --frames also
  frames              (moments, D") of all files, one after the other
  timestamps_seconds  (moments,) the middle of each
  offsets             (files + 1,) file i has [offsets[i], offsets[i + 1])

What cannot be used is listed in OUT.rejected.csv with its reason. The exit code
is 0 when any file was embedded. The same command goes on where it was stopped.
"""


def embed_files(
    model: PretrainedEncoder, found: Found, out: Path, choice: Choice, *, batch_size: int = 16
) -> tuple[int, list[tuple[str, str]]] | None:
    """Write the features of files to `out` (.npz or .h5), or go on where an earlier call with the same stopped.

    Returns the number of files embedded and (name, reason) of the others; None where all was done before. Raises
    `UserError` where none could be, where `out` holds something else, or was begun with other settings; batch size and
    device may change.
    """
    check_kind(out)
    choice.check(model)
    plan = _plan(model, found, choice)
    ledger = out.with_name(f"{out.name}.rejected.csv")
    if out.exists():
        there = plan_of(out)
        if there == plan:
            return None
        what = f"features made otherwise ({differing(there, plan)})" if there else "something else"
        raise UserError(f"{out}: holds {what}; choose another --out, or delete it")
    sizes = [path.stat().st_size for path in found.files]
    groups = groups_of(sizes)
    names = [str(path) for path in found.files]
    with Store(out, plan).claimed() as store:
        _fill(store, model, found.files, sizes, groups, choice, batch_size)
        rejected = found.rejected + [(names[row], reason) for row, reason in store.rejected(len(groups))]
        write_ledger(ledger, rejected)
        if len(rejected) == len(names) + len(found.rejected):
            store.forget()
            raise UserError(none_of("embedded", rejected, ledger))
        return store.finish(len(groups), names, _times(model) if choice.with_frames else None), rejected


def _fill(store, model, files, sizes, groups, choice, batch_size) -> None:
    from audiossl.embeddings import evaluating

    done = [number for number in range(len(groups)) if store.has(number)]
    before = sum(sizes[row] for number in done for row in groups[number])
    bar = tqdm(total=sum(sizes), initial=before, unit="B", unit_scale=True, desc="embed", mininterval=0.5)
    progress = _Progress(bar, sum(len(groups[number]) for number in done), len(files))
    with bar, evaluating(model):
        for number, rows in enumerate(groups):
            if number not in done:
                store.add(number, _embed_group(model, files, sizes, rows, choice, batch_size, progress))


def _embed_group(model, files, sizes, rows, choice, batch_size, progress: _Progress) -> Group:
    from audiossl.embeddings import file_blocks
    from audiossl.features.description import described
    from audiossl.sound.audio import AudioError

    group = Group()

    def source(row: int) -> Iterator[Tensor]:
        progress.begin(sizes[row])
        yield from file_blocks(files[row], model, progress.take)

    for number, result in described(model, (source(row) for row in rows), choice, batch_size):
        progress.end()
        if isinstance(result, AudioError):
            group.rejected.append((rows[number], str(result)))
        else:
            group.rows.append(rows[number])
            group.clips.append(result.pooled(choice.pooling).numpy())
            group.frames += [result.all_frames().numpy()] if choice.with_frames else []
    return group


class _Progress:
    """Move a bar by bytes, as the files' sizes and how much of each was decoded tell."""

    def __init__(self, bar: tqdm, num_done: int, num_files: int):
        self.bar, self.num_done, self.num_files = bar, num_done, num_files
        self.size = self.moved = 0
        self.seconds = 0.0

    def begin(self, size: int) -> None:
        self._move(self.size)
        self.size, self.moved = size, 0

    def take(self, seconds: float, share: float | None) -> None:
        self.seconds += seconds
        if share is not None:
            self._move(round(share * self.size))

    def end(self) -> None:
        self.num_done += 1
        if self.num_done == self.num_files:
            self._move(self.size)
        speed = self.seconds / max(self.bar.format_dict["elapsed"], 1e-3)
        self.bar.set_postfix_str(f"{self.num_done}/{self.num_files} files, {speed:.0f} x real time", refresh=False)

    def _move(self, to: int) -> None:
        self.bar.update(max(0, to - self.moved))
        self.moved = max(self.moved, to)


def _plan(model: PretrainedEncoder, found: Found, choice: Choice) -> dict[str, Any]:
    """Say what is asked: of which encoder, how, of which files."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    chosen = asdict(choice) | {"layers": choice.blocks(model)}
    description = {key: model.description.get(key) for key in ("method", "geometry", "frontend", "licence")}
    return chosen | {"encoder": digest.hexdigest()[:16], "files": found.fingerprint(), "description": description}


def _times(model: PretrainedEncoder):
    from audiossl.embeddings import timestamps_seconds

    return lambda num_frames: timestamps_seconds(model, num_frames).numpy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl embed`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, FORMATS
    add_encoder_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="features.npz, or .h5 (needs h5py)")
    parser.add_argument("--frames", action="store_true", help="keep the features of every moment too")
    parser.add_argument(
        "--layers", default="last", help="last, the number of last blocks, or blocks 3,7,11 (default: last)"
    )
    poolings = ("mean", "max", "class", "class+mean")
    parser.add_argument(
        "--pooling", choices=poolings, default="mean", help="of patches or class tokens (default: mean)"
    )
    parser.add_argument(
        "--rows", choices=("mean", "concat"), default="mean", help="patches above each other (default: mean)"
    )


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments that `embed` and `tag` share."""
    parser.add_argument("files", metavar="FILES", nargs="+", help="audio files, folders, patterns, .txt lists")
    parser.add_argument("--encoder", required=True, help="a run's folder, or what import and export write")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time (default: 16)")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="of windows with the next (default: 0.5; 0 is fastest)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def load_for(args: argparse.Namespace) -> PretrainedEncoder:
    """Load `--encoder` onto `--device`; raise `UserError` for a device that is not there."""
    import torch

    import audiossl

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: not here ({str(error).splitlines()[0]}); take cpu") from error
    return audiossl.load(args.encoder).to(name)


def parse_layers(text: str) -> str | int | list[int]:
    """Read --layers."""
    try:
        if text == "last":
            return text
        return [int(part) for part in text.strip(",").split(",")] if "," in text else int(text)
    except ValueError as error:
        raise UserError(f"--layers {text}: last, the number of last blocks, or blocks such as 3,7,11") from error


def main(args: argparse.Namespace) -> int:
    """Embed, and say what came of it."""
    from audiossl.features.description import Choice

    check_kind(args.out)
    choice = Choice(parse_layers(args.layers), args.pooling, args.rows, args.overlap, args.frames)
    found = find_files(args.files)
    if args.out.exists() or found.files:
        model = load_for(args)
    else:
        raise UserError(none_of("embedded", found.rejected))
    try:
        result = embed_files(model, found, args.out, choice, batch_size=args.batch_size)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on where it was (so far: {args.out}.partial)", file=sys.stderr)
        return 130
    except OSError as error:
        raise UserError(f"{args.out}: {error.strerror or error}; the same command goes on where it was") from error
    if result is None:
        print(f"{args.out}: was complete already")
        return 0
    num_embedded, rejected = result
    print(f"{args.out}: {num_embedded} files")
    if rejected:
        print(f"{len(rejected)} could not be used, see {args.out}.rejected.csv", file=sys.stderr)
    return 0
