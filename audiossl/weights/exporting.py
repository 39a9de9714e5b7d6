"""How does one hand an encoder to someone else?

`python -m audiossl export SRC DST` makes a folder of it (encoder.safetensors, encoder.json and a README.md that says
what it is), from a finished run, one of its checkpoints or an export; `layout=audiomae|atst|passt` writes one file that
the authors' own code loads instead (`publishing.py`), and says what of the model has no place there.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from audiossl.checkpoints.atomic import write_atomically
from audiossl.errors import UserError
from audiossl.weights.reading import newest_checkpoint, read_torch_file

LAYOUTS = ("audiossl", "audiomae", "atst", "passt")


def export(source: str | Path, target: Path, *, layout: str = "audiossl", revision: str | None = None) -> list[str]:
    """Export `source` (a run, a .ckpt, an export, `user/name` on the hub) to `target`; returns lines that say what.

    layout audiossl: a folder; else a file of the authors' layout, or a folder to put it in. Raises `UserError` for a
    source that is none, a layout of another family, and a target that exists: nothing is overwritten.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout}: choose one of {', '.join(LAYOUTS)}")
    if layout == "audiossl":
        return _as_folder(source, target, revision)
    return _as_published(source, target, layout, revision)


def _as_folder(source: str | Path, target: Path, revision: str | None) -> list[str]:
    from audiossl.weights.export import export_encoder, load_encoder
    from audiossl.weights.modelcard import model_card

    if target.suffix in (".safetensors", ".json") or target.is_file():
        raise UserError(f"{target}: give a folder; encoder.safetensors, encoder.json and README.md go there")
    file = target / "encoder.safetensors"
    _refuse_to_overwrite(file, target / "README.md")
    checkpoint = _checkpoint_of(source, prefer=False)
    if checkpoint is None:
        model = _load_export(source, revision)
        _make(target)
        model.save_pretrained(target)
    else:
        method, config, provenance = _load_checkpoint(checkpoint)
        _make(target)
        export_encoder(method, config, file, vocabulary=provenance.get("vocabulary"), provenance=provenance)
        model = load_encoder(file)
        (target / "README.md").write_text(model_card(model.description), encoding="utf-8")
    what = {
        file: "the weights",
        target / "encoder.json": "what they are, for readers",
        target / "README.md": "the card",
    }
    lines = [f"{path}  {_size(path)}  {words}" for path, words in what.items()]
    return [*lines, _licence_line(model.description.get("licence")), f'audiossl.load("{target}") loads it']


def _as_published(source: str | Path, target: Path, layout: str, revision: str | None) -> list[str]:
    from audiossl.weights.publishing import SUFFIXES, publish

    checkpoint = _checkpoint_of(source, prefer=True)
    if checkpoint is None:
        model = _load_export(source, revision)
        licence = model.description.get("licence")
    else:
        model, _, provenance = _load_checkpoint(checkpoint)
        licence = provenance.get("licence")
    published = publish(model, layout)
    file = target if target.suffix and not target.is_dir() else target / f"{layout}{SUFFIXES[layout]}"
    _refuse_to_overwrite(file)
    _make(file.parent)
    write_atomically(file, lambda opened: torch.save(published.content, opened))
    lost = [("zeros", key, why) for key, why in published.filled.items()]
    lost += [("left out", key, why) for key, why in published.left_out.items()]
    lines = [f"{file}  {_size(file)}  {len(published.tensors)} tensors, as {layout} has them"]
    lines += [f"note: {note}" for note in published.notes] + [_licence_line(licence)]
    return lines + ([_table(lost)] if lost else ["every tensor has its place"])


def _checkpoint_of(source: str | Path, *, prefer: bool) -> Path | None:
    """Find the training checkpoint to export from: `prefer` takes a run's before its finished export."""
    path = Path(source)
    if path.suffix == ".ckpt":
        return path
    is_run = (path / "checkpoints").is_dir()
    return newest_checkpoint(path) if is_run and (prefer or not (path / "encoder.safetensors").exists()) else None


def _load_export(source: str | Path, revision: str | None) -> Any:
    import audiossl

    return audiossl.load(source, revision=revision)


def _load_checkpoint(path: Path) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    """Build a checkpoint's method; give its config and its provenance with it."""
    from audiossl.running.build import load_method

    method, config = load_method(path)
    content = read_torch_file(path)
    return method, config, (content["audiossl"].get("provenance") or {}) | {"steps": content["global_step"]}


def _size(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from error


def _refuse_to_overwrite(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{file}: exists already; give another place, or remove it")


def _licence_line(licence: dict[str, Any] | None) -> str:
    if licence is None:
        return "licence: none recorded; name one in README.md before you hand it on"
    return (
        f"licence: {licence['name']}, of {licence.get('source') or 'an unknown source'} ({licence.get('note') or ''})"
    )


def _table(rows: list[tuple[str, str, str]]) -> str:
    table = Table(title="not as it was here", title_justify="left")
    for column in ("what", "tensor", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=None if sys.stdout.isatty() else 110).print(table)
    return text.getvalue().rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="a run's folder, a .ckpt, an export, or user/name on the hub")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; with another layout, the file")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        help=f"layout={'|'.join(LAYOUTS)} (default: audiossl); revision=BRANCH|TAG|COMMIT of a model on the hub",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; raises `UserError` for what the user can mend."""
    settings = {}
    for word in args.settings:
        key, equals, value = word.partition("=")
        if key not in ("layout", "revision") or not equals or not value:
            raise UserError(f"{word}: no such setting; give layout={'|'.join(LAYOUTS)} or revision=...")
        settings[key] = value
    print("\n".join(export(args.source, args.target, **settings)))
    return 0
