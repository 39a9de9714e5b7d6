"""How does a killed pack go on where it was, and never into what is another's?

`OUT/.pack` holds the plan (arguments, and hashes of the files) and, for each finished shard, what is in it; it goes
when the index is written. A folder with another plan, or with shards of unknown origin, is refused.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from audiossl.errors import UserError
from audiossl.indexing.indexfile import read_meta, write_whole
from audiossl.indexing.shardpaths import INDEX_NAME
from audiossl.packing.writer import Settings

STATE = ".pack"


@contextmanager
def claim(out: Path, files: str, times: str, settings: Settings) -> Iterator[None]:
    """Hold `out` for this pack: refuse what is another's, remember the plan, and clean up when the index is there.

    `files` and `times` hash what is packed (`Source.fingerprint`, `Source.times`). Raises UserError for an `out` that
    holds another pack or is being packed into.
    """
    out.mkdir(parents=True, exist_ok=True)
    plan = {"settings": asdict(settings), "files": files, "times": times}
    _refuse_other(out, plan)
    (out / STATE).mkdir(exist_ok=True)
    with open(out / STATE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is packing into {out}") from error
        write_whole(out / STATE / "plan.json", json.dumps(plan).encode())
        yield
    shutil.rmtree(out / STATE)


def _refuse_other(out: Path, plan: dict) -> None:
    way_out = f"choose another --out, or delete {out} to pack anew"
    if (out / INDEX_NAME).is_file():
        packed = read_meta(out / INDEX_NAME).get("pack", {})
        wanted = plan["settings"] | {"fingerprint": plan["files"]}
        if changed := [name for name, value in wanted.items() if packed.get(name) != value]:
            raise UserError(f"{out} holds another corpus ({', '.join(changed)} differ); {way_out}")
        return
    if not (out / STATE / "plan.json").is_file():
        if shards := sorted(out.glob("*.tar")):
            raise UserError(f"{out} holds shards already ({shards[0].name} ...); {way_out}")
        return
    begun = json.loads((out / STATE / "plan.json").read_bytes())
    changed = [f"--{name}" for name, value in plan["settings"].items() if begun["settings"][name] != value]
    if begun["files"] != plan["files"] or begun["times"] != plan["times"]:
        changed.append("the files or their csv")
    if changed:
        raise UserError(f"{out} holds a pack begun with other arguments ({', '.join(changed)} changed); {way_out}")


def shard_path(out: Path, number: int) -> Path:
    """Name a shard."""
    return out / f"shard-{number:06d}.tar"


def rows_path(out: Path, number: int) -> Path:
    """Name the file that says what a finished shard holds, and what was rejected on the way."""
    return out / STATE / f"shard-{number:06d}.json"


def is_done(out: Path, number: int) -> bool:
    """Tell whether a shard is whole: its rows are written first, so a shard without them was never begun."""
    if not rows_path(out, number).is_file():
        return False
    shard, path = json.loads(rows_path(out, number).read_bytes()), shard_path(out, number)
    return not shard["rows"] or (path.is_file() and path.stat().st_size == shard["bytes"])
