"""Which audio files do the words of a command line mean?

Files, folders, patterns, and texts that list files: each file comes once, in order; a word that names none says why.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from audiossl.sound.files import is_audio


@dataclass
class Found:
    """List the files to embed, in order, each once, and (name, reason) for arguments that name none."""

    files: list[Path] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Hash names, sizes and times of change."""
        facts = [(str(path), stat.st_size, stat.st_mtime_ns) for path in self.files for stat in [path.stat()]]
        return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_files(arguments: Sequence[str]) -> Found:
    """Resolve files, folders, patterns and lists; nothing is decoded."""
    found, seen = Found(), set()
    for argument in arguments:
        try:
            for path in _resolve(argument):
                if not path.is_file():
                    found.rejected.append((str(path), "not a file" if path.exists() else "no such file"))
                elif path not in seen:
                    seen.add(path)
                    found.files.append(path)
        except _NoFilesError as error:
            found.rejected.append((argument, str(error)))
    return found


class _NoFilesError(Exception):
    """Say why an argument names no file."""


def _resolve(argument: str) -> Iterator[Path]:
    path = Path(argument)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and is_audio(file.name))
        if not files:
            raise _NoFilesError("a folder without audio")
        yield from files
    elif path.is_file() and path.suffix.lower() == ".txt":
        yield from _listed(path)
    elif not path.exists() and glob.has_magic(argument):
        if not (files := sorted(glob.glob(argument, recursive=True))):
            raise _NoFilesError("no file has such a name")
        yield from (Path(file) for file in files if not Path(file).is_dir())
    else:
        yield path


def _listed(path: Path) -> Iterator[Path]:
    """Read a list of files, as they are named from here or from the list's folder."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _NoFilesError(f"cannot be read as a list of files: {error}") from error
    beside = [path.parent / line for line in lines]
    named = [Path(line) if Path(line).exists() else there for line, there in zip(lines, beside, strict=True)]
    if not any(file.is_file() for file in named):
        raise _NoFilesError("a text that names no file: it should list one file a line")
    yield from named


def none_of(what: str, rejected: Sequence[tuple[str, str]], ledger: Path | None = None) -> str:
    """Say in one line that nothing could be `what` ("embedded"), naming the first files and why."""
    named = "; ".join(f"{name}: {reason}" for name, reason in rejected[:5])
    more = f"; and {len(rejected) - 5} more" if rejected[5:] else ""
    return f"nothing could be {what}: {named}{more}{f' (all in {ledger})' if more and ledger else ''}"
