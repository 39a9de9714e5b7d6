"""How do shards on another machine look like files?

A `RemoteShard` is a path that comes into being when it is asked for: `open(shard)` downloads the tar into the cache and
opens it there, checked against the index's size and sha256. A remote folder is known by its index, whose names must
stay inside it. Only `https://` and `s3://` are allowed (RELIABILITY S6).
"""

import os
import re
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from audiossl.errors import UserError
from audiossl.indexing.shardpaths import INDEX_NAME, expand_braces, index_command, is_remote, refuse_scheme
from audiossl.remote.shardcache import ShardCache
from audiossl.remote.streams import list_s3
from audiossl.remote.transfer import Absent, Patience


@dataclass(frozen=True)
class RemoteShard(os.PathLike):
    """Name a tar by its URL, with what the index says of it; its `str` is the URL, its path one in the cache."""

    url: str
    num_bytes: int
    sha256: str
    cache: ShardCache

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        os.close(self.open())
        return str(self.cache.path(self.sha256))

    @property
    def name(self) -> str:
        """Give the last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def is_here(self) -> bool:
        """Tell whether it has been downloaded and is still in the cache."""
        return self.cache.has(self.sha256)

    def open(self) -> int:
        """Give a descriptor to read from, after a download where that is needed; raises UserError."""
        try:
            return self.cache.open(self.url, self.num_bytes, self.sha256)
        except Absent as error:  # torch hands on a worker's exception by its very type
            raise UserError(str(error)) from error


def locate(described: list[dict], base: str, cache: ShardCache, index: Path) -> list[Path | RemoteShard]:
    """Turn an index's shards into paths: below the folder or URL `base`, or the URLs that a local index names.

    Raises UserError for schemes other than https and s3, and for names that leave a remote folder.
    """
    found: list[Path | RemoteShard] = []
    for shard in described:
        name = shard["name"]
        if is_remote(base):
            if "://" in name or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
                raise UserError(f"{base}/{INDEX_NAME} names {name[:80]!r}, which does not lie in that folder; not read")
            url = f"{base}/{urllib.parse.quote(name) if base.startswith('https') else name}"
        elif "://" in name or name.startswith(("pipe:", "file:")) or name == "-":
            refuse_scheme(name, f"{index} names ")
            url = name
        else:
            found.append(Path(os.path.abspath(os.path.join(base, name))))
            continue
        if not re.fullmatch(r"[0-9a-f]{64}", shard["sha256"]):  # it becomes a file's name
            raise UserError(f"index {index} is damaged (no sha256 of {name}); build it again")
        found.append(RemoteShard(url, shard["bytes"], shard["sha256"], cache))
    return found


def find_remote_index(pattern: str, cache: ShardCache) -> tuple[Path, str, list[str] | None]:
    """Fetch the index that a URL means: a copy here, the folder its names are relative to, and the shards (None: all).

    The URL is a folder's, the index's own, or shards' with braces. Raises UserError as `find_index` does.
    """
    refuse_scheme(pattern)
    if pattern.endswith(".safetensors"):
        return cache.index(pattern), pattern.rpartition("/")[0], None
    is_folder = not pattern.endswith(".tar")
    shards = None if is_folder else expand_remote(pattern)
    base = pattern.rstrip("/") if shards is None else _common_base(shards)
    has_parent = base.count("/") > 2 and not is_folder
    for place in [base, base.rpartition("/")[0]] if has_parent else [base]:
        with suppress(Absent):
            return cache.index(f"{place}/{INDEX_NAME}"), place, shards
    example = f"{base}/shard-{{000000..000127}}.tar" if is_folder else pattern
    raise UserError(
        f"{base} has no {INDEX_NAME}; build one here, {index_command(example)} --out DIR, and take data.shards=DIR"
    )


def expand_remote(pattern: str) -> list[str]:
    """List the URLs that a pattern names, sorted, each once; `*` only where S3 can list."""
    refuse_scheme(pattern)
    found: set[str] = set()
    for name in expand_braces(pattern):
        if "*" not in name:
            found.add(name)
        elif name.startswith("s3://"):
            found.update(list_s3(name, Patience().stall_seconds))
        else:
            raise UserError(f"'{pattern}': https cannot list files; write the numbers as {{000000..000127}}")
    if not found:
        raise UserError(f"'{pattern}' matches no file")
    return sorted(found)


def _common_base(urls: list[str]) -> str:
    """Give the deepest folder of all, without a slash at its end."""
    folders = [url.split("/")[:-1] for url in urls]
    base = os.path.commonprefix(folders)  # of lists: the parts they begin with
    if len(base) < 3:
        raise UserError(f"{urls[0]} and {urls[-1]} lie on different hosts; index them into a folder here")
    return "/".join(base)
