"""Which shards does a glob mean, and which index belongs to them?

Local paths, `https://` and `s3://` only, and never a shell: `*`, `?`, `[]` and the braces of webdataset,
`{000000..000007}` and `{a,b}`. A URL holds no secret, because it is written down with the run.
"""

import fnmatch
import glob as globbing
import os
import re
import shlex
from pathlib import Path

from audiossl.errors import UserError

INDEX_NAME = "index.safetensors"
_MAX_NAMES = 1_000_000  # braces such as {0..999999999} are refused before they are expanded
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:|-$")
REMOTE = ("https://", "s3://")
QUERY_VARIABLE = "AUDIOSSL_URL_QUERY"


def find_index(pattern: str, may_miss: bool = False) -> tuple[Path, list[Path] | None]:
    """Return the index that a folder, an index file or a glob of shards means, and the shards (None: all of them).

    `may_miss` allows names in braces of which no file is there.
    Raises UserError when nothing matches and when there is no index, with the command that builds one.
    """
    path = Path(os.path.abspath(pattern)) if pattern else None
    if path is not None and path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"index {pattern} does not exist")
        return path, None
    if path is not None and path.is_dir():
        if (path / INDEX_NAME).is_file():
            return path / INDEX_NAME, None
        if not any(path.glob("*.tar")):
            raise UserError(f"{pattern} holds no shards; pack a folder of audio into it: {pack_command()}")
        raise UserError(f"{pattern} has shards but no index; build it: {index_command(os.path.join(pattern, '*.tar'))}")
    shards = expand(pattern, may_miss)
    folder = common_folder(shards)
    for candidate in (folder / INDEX_NAME, folder.parent / INDEX_NAME):
        if candidate.is_file():
            return candidate, shards
    raise UserError(f"the {len(shards)} shards of {pattern} have no index; build it: {index_command(pattern)}")


def expand(pattern: str, may_miss: bool = False) -> list[Path]:
    """List the files a pattern names, absolute, sorted, each once; raises UserError when there is none.

    `may_miss` lists names in braces too of which no file is there; else they are an error.
    """
    refuse_scheme(pattern)
    if not pattern:
        raise UserError("no shards given: name a folder, an index or a glob such as 'DIR/shard-*.tar'")
    found: set[str] = set()
    for name in expand_braces(pattern):
        if os.path.lexists(name):
            found.add(os.path.abspath(name))
        elif globbing.has_magic(name):
            found.update(os.path.abspath(hit) for hit in globbing.glob(name, recursive=True))
        elif name != pattern and may_miss:
            found.add(os.path.abspath(name))
        elif name != pattern:
            raise UserError(f"shard {name} of {pattern} is missing")
    if not found:
        raise UserError(f"'{pattern}' matches no file (from {os.getcwd()})")
    return [Path(name) for name in sorted(found)]


def is_remote(name: str) -> bool:
    """Tell whether shards are to come from another machine."""
    return name.startswith(REMOTE)


def refuse_scheme(name: str, where: str = "") -> None:
    """Refuse every URL but those over https and s3 that hold no secret, in a line that does not show it either."""
    shown = f"{where}'{without_secrets(name)}'"
    if not is_remote(name):
        if scheme := _SCHEME.match(name):
            raise UserError(
                f"{shown}: shards are local paths, https:// or s3:// addresses; '{scheme.group()}' is not allowed"
            )
        return
    host, _, path = name.partition("://")[2].partition("/")
    if "@" in host:
        raise UserError(f"{shown}: a password must not stand in an address, which is written down; use a .netrc")
    if "?" in name or "#" in name:
        raise UserError(
            f"{shown}: a query must not stand in an address, which is written down with the run; leave it out and "
            f"export {QUERY_VARIABLE}='...', which is added to each https request"
        )
    if not host or ".." in path.split("/") or not name.isprintable() or " " in host:
        raise UserError(f"{shown}: no address of a folder or file")


def without_secrets(address: str) -> str:
    """Cut query and password out of a URL, to show it."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", re.sub(r"[?#].*", "?***", address)) if "://" in address else address


def matching(pattern: str, shards: list[Path]) -> list[Path]:
    """List those of `shards` that a glob would match if they were there (`**` means one folder)."""
    globs = [Path(os.path.abspath(name)).parts for name in expand_braces(pattern) if globbing.has_magic(name)]

    def is_meant(parts: tuple[str, ...]) -> bool:
        return any(len(name) == len(parts) and all(map(fnmatch.fnmatchcase, parts, name)) for name in globs)

    return [shard for shard in shards if is_meant(shard.parts)]


def common_folder(shards: list[Path]) -> Path:
    """Return the deepest folder that holds all the shards."""
    return Path(os.path.commonpath([shard.parent for shard in shards]))


def index_command(pattern: str) -> str:
    """Spell the command that indexes the shards of a pattern."""
    return f"python -m audiossl index {shlex.quote(pattern)}"


def pack_command() -> str:
    """Spell the command that packs a folder."""
    return "python -m audiossl pack FOLDER --out DIR"


def expand_braces(pattern: str) -> list[str]:
    """Write out `{000000..000007}` and `{a,b}`, in order; raises UserError for too many names."""
    names = [pattern]
    while any(_BRACES.search(name) for name in names[:1]):
        longer = []
        for name in names:
            match = _BRACES.search(name)
            choices = _choices(match.group(1), pattern)
            if len(names) * len(choices) > _MAX_NAMES:
                raise UserError(f"'{pattern}' stands for more than {_MAX_NAMES} names")
            longer += [name[: match.start()] + choice + name[match.end() :] for choice in choices]
        names = longer
    return names


def _choices(inside: str, pattern: str) -> list[str]:
    if not (match := _RANGE.fullmatch(inside)):
        return inside.split(",")
    first, last = int(match.group(1)), int(match.group(2))
    if not 0 <= last - first < _MAX_NAMES:
        raise UserError(f"'{pattern}': {{{inside}}} counts down or stands for more than {_MAX_NAMES} names")
    return [str(number).zfill(len(match.group(1))) for number in range(first, last + 1)]
