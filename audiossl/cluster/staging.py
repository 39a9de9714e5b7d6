"""How do shards get from a file system that all nodes share onto a disk of each node?

Each node copies them once, into a folder named by what they hold; several jobs or tasks of a node share it, and whoever
comes second waits. A shard appears under its name only when its sha256 is the index's, and a copy that was cut short
goes on where it stopped. Where the run skips damaged shards, one that is not what its index says is read where it is,
as without staging. Shards at https:// and s3:// need none of it: `data.cache_dir` is their place on a node.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from safetensors.numpy import save
from tqdm import tqdm

from audiossl.checkpoints.signals import install_early_handlers
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import COLUMNS, RAGGED, write_whole
from audiossl.indexing.shardpaths import INDEX_NAME
from audiossl.indexing.shardstate import problem_of

CHUNK_BYTES = 2**23
SPARE_BYTES = 2**30  # of a node's disk that is left to others
GB = 1e9


class Damaged(UserError):
    """Report a shard that is not what its index says, or cannot be read."""


def place_of(index: Index, disk: Path) -> Path:
    """Say in which folder of a node's disk the shards of an index lie once they are staged."""
    return disk / f"shards-{index.corpus_hash[:16]}"


def stage(
    index: Index, disk: Path, spare_bytes: int = SPARE_BYTES, damaged_shards: Literal["stop", "skip"] = "stop"
) -> Path:
    """Copy the shards of an index onto a node's disk, those that are not there yet; returns their folder.

    Raises UserError where there is no room, where the disk cannot be written, and ("stop") for a shard that is not what
    the index says; with "skip" such a one stays where it is, and the index on the disk names it there.
    """
    folder = place_of(index, disk)
    names = [f"{number:06d}-{Path(str(path)).name}" for number, path in enumerate(index.shards)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _alone(folder),
            tqdm(unit="B", unit_scale=True, desc=f"stage on {os.uname().nodename}", mininterval=5) as bar,
        ):
            bar.total = sum(shard["bytes"] for shard in index.meta["shards"])
            shards = zip(names, index.shards, index.meta["shards"], strict=True)
            missing = sum(_missing_bytes(folder / n, s) for n, source, s in shards if problem_of(source, s) is None)
            free = shutil.disk_usage(folder).free
            if missing and missing + spare_bytes > free:
                raise UserError(
                    f"{disk}: has {free / GB:.3g} GB free, and staging wants {missing / GB:.3g} GB and "
                    f"{spare_bytes / GB:.3g} to spare; leave AUDIOSSL_STAGE unset, or take fewer shards"
                )
            for number, (source, shard) in enumerate(zip(index.shards, index.meta["shards"], strict=True)):
                try:
                    _copy(Path(source), folder / names[number], shard, bar)
                except Damaged as error:
                    if damaged_shards == "stop":
                        raise
                    bar.write(f"not staged, and read where it is: {error}")
                    names[number] = os.path.abspath(source)
            _write_index(index, names, folder)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{disk}: cannot be staged to: {error.strerror or error}{where}") from error
    return folder


def _missing_bytes(path: Path, shard: dict) -> int:
    part = path.with_name(f"{path.name}.part")
    there = path if path.exists() else part
    return shard["bytes"] - (there.stat().st_size if there.exists() else 0)


def _copy(source: Path, target: Path, shard: dict, bar: tqdm) -> None:
    """Copy one shard, going on with what is there of it, and give it its name once it is known to be whole."""
    if target.exists() and target.stat().st_size == shard["bytes"]:
        bar.update(shard["bytes"])
        return
    part, digest = target.with_name(f"{target.name}.part"), hashlib.sha256()
    with _opened(source) as whole, open(part, "a+b") as copy:
        copy.seek(0)
        for chunk in iter(lambda: copy.read(CHUNK_BYTES), b""):  # a node may have gone down in the middle of a write
            if _read(whole, len(chunk)) != chunk:
                copy.truncate(0)
                whole.seek(0)
                digest = hashlib.sha256()
                break
            digest.update(chunk)
            bar.update(len(chunk))
        for chunk in iter(lambda: _read(whole, CHUNK_BYTES), b""):
            copy.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
        copy.flush()
        os.fsync(copy.fileno())
    if digest.hexdigest() != shard["sha256"]:
        part.unlink()
        raise Damaged(f"shard {source} is not what its index says (another sha256); fetch or index it again")
    os.replace(part, target)


def _opened(source: Path) -> BinaryIO:
    try:
        return open(source, "rb")
    except OSError as error:
        raise Damaged(f"shard {source} cannot be read: {error.strerror}") from error


def _read(file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise Damaged(f"shard {file.name} cannot be read: {error.strerror}") from error


def _write_index(index: Index, names: list[str], folder: Path) -> None:
    """Write the index of the copies: that of the shards as they were chosen, by their new names."""
    columns = {name: index.column(name) for name in COLUMNS | RAGGED}
    shards = [shard | {"name": name} for shard, name in zip(index.meta["shards"], names, strict=True)]
    counts = {"clips": len(index), "seconds": float(index.seconds.sum())}
    meta = index.meta | {"shards": shards, "counts": counts, "corpus_hash": index.corpus_hash}
    content = save(columns, metadata={"audiossl": json.dumps(meta, sort_keys=True)})
    if not (folder / INDEX_NAME).exists() or (folder / INDEX_NAME).read_bytes() != content:
        write_whole(folder / INDEX_NAME, content)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this node work in a folder at a time; a lock that a dead one held is free."""
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: list[str]) -> int:
    """Stage shards on this node: `python -m audiossl.cluster.staging SHARDS DISK [skip]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("disk", type=Path)
    parser.add_argument("damaged_shards", nargs="?", choices=("stop", "skip"), default="stop")
    args = parser.parse_args(argv)
    try:
        index = Index.load(args.shards, damaged_shards=args.damaged_shards)
        print(f"staged: {stage(index, args.disk, damaged_shards=args.damaged_shards)}")
    except UserError as error:
        print(f"staging: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    install_early_handlers()
    sys.exit(main(sys.argv[1:]))
