"""Is a shard still what its index says, as far as one can tell without reading it?"""

import os
from pathlib import Path

from audiossl.indexing.shardpaths import index_command
from audiossl.remote.location import RemoteShard


def problem_of(path: Path | RemoteShard, described: dict) -> tuple[str, int, str] | None:
    """Say what a shard has that its index does not know, how many bytes can be read, and the way out."""
    if isinstance(path, RemoteShard):
        return None  # checked when it comes
    state = state_of(path)
    if state == "not readable":
        return f"shard {path} may not be read", 0, "see its permissions, or data.damaged_shards=skip"
    if state:
        return f"shard {path} is {state}", 0, "bring it back, or go on without: data.damaged_shards=skip"
    if (size := path.stat().st_size) == described["bytes"]:
        return None
    there = index_command(str(path.parent / "*.tar"))
    return (
        f"shard {path} has {size} bytes where the index says {described['bytes']}: cut or replaced",
        size,
        f"fetch or pack it again, index what is there ({there}), or data.damaged_shards=skip",
    )


def state_of(path: Path) -> str:
    """Say why a shard cannot be opened; nothing where it can."""
    if not path.exists():
        return "missing"
    if not path.is_file():
        return "no file"
    try:
        os.close(os.open(path, os.O_RDONLY))  # access(2) asks for another user than open(2), and file servers differ
    except OSError:
        return "not readable"
    return ""
