"""How do published weights become an encoder of ours? `python -m audiossl import SRC DST [key=value ...]`.

The file is read without running code in it, recognised by its keys, and translated; a report says what became of every
tensor. `audiossl.load(DST)` then gives the encoder with its front end, and its classifier if the file had one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from audiossl.encoder import Encoder
from audiossl.errors import UserError
from audiossl.features.classifier import LinearHead
from audiossl.importing.layouts import read_checkpoint, translate
from audiossl.importing.lengths import fit_length
from audiossl.importing.report import as_dict, print_report
from audiossl.packing.audioset import read_classes
from audiossl.version import __version__
from audiossl.weights.export import describe, write_export
from audiossl.weights.published import ATST_MEL, KALDI_FBANK, PASST_MEL
from audiossl.weights.translation import Action, Row, Settings, Translation, parse_settings

FRONTEND_KEYS = {*KALDI_FBANK, *ATST_MEL, *PASST_MEL} - {"_target_"}
REPORT = "import_report.json"


@dataclass(frozen=True)
class Imported:
    """Hold an encoder of ours made of somebody else's weights, and all that is to be said about it."""

    layout: str
    encoder: Encoder
    head: LinearHead | None
    translation: Translation
    missing: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint: .pth, .pt, .ckpt, .bin or .safetensors")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder for the encoder; made if need be")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="what the file does not tell, see below")
    parser.epilog = f"""settings:
  num_heads=N                       attention heads, where the width is not a published one
  part=teacher|student              which encoder of a file with two (ATST: teacher; ATST-C2F: student)
  like=passt|audiomae               what an image model shall become
  stride=N | stride=MELS,FRAMES     of PaSST's patches, where it is not a published one
  seconds=S hop_ms=MS               another clip length or hop: positions are fitted to it
  positions=published|corrected     how Audio-MAE's are fitted: recomputed | each cell keeps its own
  positions=cut|interpolated        how ATST's and PaSST's are fitted
  labels=FILE                       names of the classes, one a line, or class_labels_indices.csv
  allow_unknown=true                drop tensors that are not known instead of refusing them
  overwrite=true                    replace the export in DST
  unsafe_load=true                  let the file run its code, which can do whatever you can
and any key of the front end:
{textwrap.fill(", ".join(sorted(FRONTEND_KEYS)), 78, initial_indent="  ", subsequent_indent="  ")}"""


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    source, destination = arguments.source, arguments.destination
    settings = parse_settings(arguments.settings, dict.fromkeys(sorted(FRONTEND_KEYS)))
    check_destination(destination, settings)
    console = Console(width=None if Console().is_terminal else 160, soft_wrap=False, highlight=False)
    imported = import_weights(source, settings, console)
    description = describe_import(imported, source, settings)
    write_import(imported, description, destination)
    _print_summary(imported, description, destination, console)
    return 0


def import_weights(source: Path, settings: Settings, console: Console | None = None) -> Imported:
    """Turn a checkpoint into an encoder and, if it has one, a classifier, strictly: every tensor has its reason.

    Prints the report to `console`, None for silence. Raises `UserError` for files that are broken, that ask to run
    code, whose layout is not known, or that hold tensors that are not known (unless `settings.allow_unknown`).
    """
    checkpoint = read_checkpoint(source, runs_code=settings.unsafe_load)
    layout, found = translate(checkpoint, settings)
    fit_length(found, settings)
    encoder = Encoder(**found.geometry)
    head = None if found.head is None else LinearHead(**found.head)
    wanted = {key: value for key, value in encoder.state_dict().items()}
    wanted |= {f"head.{key}": value for key, value in head.state_dict().items()} if head else {}
    weights = found.encoder | {f"head.{key}": value for key, value in found.head_weights.items()}
    known = set(wanted)
    found.rows = [row if _is_ours(row, known) else Row(row.source, Action.UNKNOWN) for row in found.rows]
    beside = ", ".join(f"{name} ({kind})" for name, kind in checkpoint.beside.items())
    found.notes += [f"beside the weights, and left there: {beside}"] if beside else []
    missing = sorted(known - weights.keys())
    if console is not None:
        console.print(Text(f"{source}: {layout}", style="bold"))
        print_report(found.rows, missing, console)
    _check(found, weights, wanted, missing, source, settings)
    encoder.load_state_dict({key: weights[key] for key in wanted if not key.startswith("head.")})
    if head is not None:
        head.load_state_dict({key.removeprefix("head."): weights[key] for key in wanted if key.startswith("head.")})
        head.eval()
    return Imported(layout, encoder.eval(), head, found, missing)


def _is_ours(row: Row, known: set[str]) -> bool:
    return not row.ours or set(row.ours.split(", ")) <= known


def _check(
    found: Translation,
    weights: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    missing: list[str],
    source: Path,
    settings: Settings,
) -> None:
    """Refuse what is unknown, missing, of another size, or not finite."""
    unknown = [row.source for row in found.rows if row.is_unknown]
    if unknown and not settings.allow_unknown:
        raise UserError(
            f"{source}: {len(unknown)} tensors are not known ({', '.join(unknown[:4])}); allow_unknown=true drops them"
        )
    why = "not known, and allow_unknown=true"
    found.rows = [Row(row.source, Action.DROPPED, why=why) if row.is_unknown else row for row in found.rows]
    if missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing ({', '.join(missing[:4])})")
    for key, value in wanted.items():
        if weights[key].shape != value.shape:
            raise UserError(f"{source}: {key} has shape {list(weights[key].shape)}, not {list(value.shape)}")
        if weights[key].is_floating_point() != value.is_floating_point():
            kind = str(weights[key].dtype).removeprefix("torch.")
            raise UserError(f"{source}: {key} holds {kind}, which is none of these weights")
        if value.is_floating_point() and not bool(weights[key].isfinite().all()):
            raise UserError(f"{source}: {key} holds NaN or infinity: the file is damaged")


def describe_import(imported: Imported, source: Path, settings: Settings) -> dict[str, Any]:
    """Write down what `audiossl.load` needs, where the weights come from, and under which licence."""
    found, labels = imported.translation, None
    if settings.labels is not None:
        labels = read_labels(settings.labels, None if found.head is None else found.head["num_classes"])
    description = describe(imported.encoder, imported.head, found.frontend, labels)
    given = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items() if value}
    return description | {
        "method": found.method,
        "mask_padding": found.mask_padding,
        "corpus": {"shards": None, "mean": found.frontend.get("mean"), "std": found.frontend.get("std")},
        "licence": asdict(found.licence),
        "provenance": {
            "imported_from": source.name,
            "sha256": _sha256(source),
            "layout": imported.layout,
            "settings": given,
            "warnings": found.warnings,
            "audiossl": __version__,
            "torch": torch.__version__,
        },
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_labels(path: Path, num_classes: int | None) -> list[str]:
    """Read the names of the classes, one a line or from AudioSet's class_labels_indices.csv.

    Raises `UserError` where there are not as many as the head knows.
    """
    if not path.is_file():
        raise UserError(f"labels={path}: no such file")
    if path.suffix == ".csv":
        names = list(read_classes(path).names)
    else:
        names = _lines_of(path)
    if num_classes is None:
        raise UserError(f"labels={path}: these weights have no classifier that could use names")
    if len(names) != num_classes:
        raise UserError(f"labels={path}: {len(names)} names, the classifier knows {num_classes} classes")
    return names


def _lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"labels={path}: not a text file") from None


def check_destination(destination: Path, settings: Settings) -> None:
    """Refuse a place that is taken before anything is read."""
    try:
        is_file, is_taken = destination.is_file(), (destination / "encoder.safetensors").exists()
    except OSError as error:
        raise UserError(f"{destination}: cannot be made ({error.strerror})") from error
    if is_file:
        raise UserError(f"{destination}: is a file; give a folder")
    if is_taken and not settings.overwrite:
        raise UserError(f"{destination}: holds an encoder already; overwrite=true replaces it")


def write_import(imported: Imported, description: dict[str, Any], destination: Path) -> None:
    """Write encoder.safetensors, encoder.json and import_report.json: all three or, on a failure, none."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise UserError(f"{destination}: cannot be made ({error.strerror or error})") from error
    try:
        write_export(imported.encoder, imported.head, description, folder / "encoder.safetensors")
        report = as_dict(imported.translation.rows, imported.missing) | {"layout": imported.layout}
        report |= {"warnings": imported.translation.warnings, "notes": imported.translation.notes}
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        destination.mkdir(exist_ok=True)
        for name in (REPORT, "encoder.json", "encoder.safetensors"):  # the last one makes it an export
            os.replace(folder / name, destination / name)
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print_summary(imported: Imported, description: dict[str, Any], destination: Path, console: Console) -> None:
    found, geometry, frontend = imported.translation, imported.translation.geometry, imported.translation.frontend
    for note in found.notes:
        console.print(Text(note))
    for warning in found.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    head = "no classifier" if found.head is None else f"a classifier of {found.head['num_classes']} classes"
    licence = description["licence"]
    lines = (
        f"encoder: width {geometry['width']}, {geometry['depth']} blocks, {geometry['num_heads']} heads, patches "
        f"{geometry['patch'][0]} x {geometry['patch'][1]}, at most {geometry['frames']} frames; {head}",
        f"front end: {frontend['_target_'].rpartition('.')[2]}, {frontend['rate_hz']} Hz, "
        f"{frontend['num_mels']} bands, window {frontend['window_ms']:g} ms, "
        f"hop {frontend['hop_ms']:g} ms, {frontend['seconds']} s",
        f"licence: {licence['name']} ({licence['source']}): {licence['note']}",
        f"written: {destination}; audiossl.load({str(destination)!r}) loads it",
    )
    for line in lines:
        console.print(Text(line))
