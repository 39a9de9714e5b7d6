"""Where in the shards is each clip, and what is known of it, without opening a single tar?

One `index.safetensors` beside the shards holds a column per fact (shard, byte offset and size of the audio, frames,
labels ...) as plain arrays, so two million clips load in seconds and cost no Python object each. A clip is then one
seek and read: no tar header is parsed while training, and a cut or replaced shard is found at the start.
"""

import argparse
import io
import json
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from audiossl.errors import UserError
from audiossl.indexing.indexfile import COLUMNS, corpus_hash, read_index, sha256_of, take_ragged
from audiossl.indexing.shardpaths import find_index, index_command, is_remote, matching
from audiossl.indexing.shardstate import problem_of, state_of
from audiossl.packing.tarfiles import read_member
from audiossl.remote.location import RemoteShard, find_remote_index, locate
from audiossl.remote.shardcache import ShardCache
from audiossl.sound.audio import EXTENSIONS


class Index:
    """Look up clips 0..len-1 of packed shards; build it with `load`.

    Arrays over clips: `offset`, `size` (bytes of the encoded audio in its shard), `num_frames`, `seconds`, `rate_hz`,
    `channels`, `fold` (-1 for none), `shard` (position in `shards`, a list of paths; those of `RemoteShard`s exist once
    they are opened). `vocabulary` and `splits` list names; `corpus_hash` (hex) changes with any byte of any shard in
    use; `meta` is the header as written.
    """

    def __init__(
        self,
        *,
        columns: dict[str, np.ndarray],
        meta: dict,
        path: Path,
        base: str | None = None,
        cache: ShardCache | None = None,
    ):
        self.path, self.meta, self._columns = path, meta, columns
        self._base, self._cache = base or str(path.parent), cache or ShardCache.of(None, None)
        self.shards: list[Path | RemoteShard] = locate(meta["shards"], self._base, self._cache, path)
        self.vocabulary: list[str] = meta["vocabulary"]
        self.splits: list[str] = meta["splits"]
        self.corpus_hash: str = corpus_hash(meta["shards"])
        self.shard, self.offset, self.size = columns["shard"], columns["offset"], columns["size"]
        self.num_frames, self.seconds = columns["num_frames"], columns["seconds"]
        self.rate_hz, self.channels, self.fold = columns["rate_hz"], columns["channels"], columns["fold"]
        self.lost: dict[int, str] = {}  # clips that cannot be in their shards as these are, and why

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        damaged_shards: Literal["stop", "skip"] = "stop",
        cache: ShardCache | None = None,
    ) -> "Index":
        """Load the index of a folder, an index file, or the shards a glob names (`DIR/shard-{000000..000003}.tar`).

        All of these may be `https://` or `s3://`; what is downloaded goes into `cache`, the user's by default.

        A glob of some of the shards selects their clips; a shard in the index that it would match, were it there, is
        missing. Raises UserError for a glob that matches nothing, shards without an index, a damaged index, and
        ("stop") a shard that is missing, cannot be read or has another size than the index says. With "skip" such a
        shard's clips that cannot be there are in `lost`, and everything else stays as it is.
        """
        path, cache, base = os.fspath(path), cache or ShardCache.of(None, None), None
        if is_remote(path):
            index_path, base, wanted = find_remote_index(path, cache)
        else:
            index_path, wanted = find_index(path, may_miss=damaged_shards == "skip")
        columns, meta = read_index(index_path)
        index = cls(columns=columns, meta=meta, path=index_path, base=base, cache=cache)
        if wanted is not None:
            shards = [str(shard) for shard in wanted]
            if not is_remote(path):
                there = set(shards)
                shards += map(str, matching(path, [shard for shard in index.shards if str(shard) not in there]))
            index = index._restrict(shards, path)
        problems = list(map(problem_of, index.shards, index.meta["shards"]))
        if damaged_shards == "stop" and (worded := next(filter(None, problems), None)):
            raise UserError(f"{worded[0]} ({index.path}); {worded[2]}")
        for number, problem in enumerate(problems):
            if problem is not None:
                index._lose(number, problem[1], index.shards[number])
        return index

    def __len__(self) -> int:
        return len(self.offset)

    def column(self, name: str) -> np.ndarray:
        """Return a column of `indexfile.COLUMNS` or `RAGGED` as it is, for statistics over all clips at once."""
        return self._columns[name]

    def key(self, i: int) -> str:
        """Return the key of clip `i`: unique in the corpus."""
        start, end = _span(self._columns["key_ends"], i)
        return self._columns["key_bytes"][start:end].tobytes().decode("utf-8", "surrogateescape")

    def member_key(self, i: int) -> str:
        """Return the key of clip `i` as its shard has it."""
        return self.key(i)

    def key_spans(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the keys of many clips at once: UTF-8 bytes of all keys, and where in them each begins and ends."""
        ends = self._columns["key_ends"]
        return self._columns["key_bytes"], np.where(clips > 0, ends[clips - 1], 0), ends[clips]

    def labels_of(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the label ids of many clips at once, and where each clip's end."""
        return take_ragged(self._columns["label_ids"], self._columns["label_ends"], clips)

    def label_ids(self, i: int) -> np.ndarray:
        """Return positions in `vocabulary` (int32), none for an unlabelled clip."""
        start, end = _span(self._columns["label_ends"], i)
        return self._columns["label_ids"][start:end]

    def labels(self, i: int) -> list[str]:
        """Return the label names of clip `i`."""
        return [self.vocabulary[label] for label in self.label_ids(i)]

    def shard_path(self, i: int) -> Path | RemoteShard:
        """Return the tar that holds clip `i`."""
        return self.shards[self.shard[i]]

    def extension(self, i: int) -> str:
        """Return the audio's file extension, such as `flac`."""
        return EXTENSIONS[self._columns["extension"][i]]

    def split(self, i: int) -> str | None:
        """Return the split of clip `i`, None where it has none."""
        code = self._columns["split"][i]
        return None if code < 0 else self.splits[code]

    def read(self, i: int) -> bytes:
        """Read the encoded audio of clip `i`; raises AudioError where the shard holds another in its place."""
        with open(self.shard_path(i), "rb") as shard:
            name = f"{self.member_key(i)}.{self.extension(i)}"
            return read_member(partial(_pread, shard.fileno()), name, int(self.offset[i]), int(self.size[i]))

    def read_meta(self, i: int) -> dict:
        """Read the JSON member after clip `i`'s audio, {} where there is none; for some clips, not for each of many."""
        with open(self.shard_path(i), "rb") as shard:
            shard.seek(int(self.offset[i]) + -(-int(self.size[i]) // 512) * 512)
            try:
                with tarfile.open(fileobj=shard, mode="r|") as tar:
                    member = tar.next()
                    if member is None or not member.isfile() or member.name != f"{self.member_key(i)}.json":
                        return {}
                    found = json.load(io.BytesIO(tar.extractfile(member).read(2**20)))
            except (tarfile.TarError, ValueError):
                return {}
        return found if isinstance(found, dict) else {}

    def select(self, split: str | None = None, folds: Sequence[int] | None = None) -> np.ndarray:
        """Return ascending clip ids (int64) of a split ("a+b": of both) and / or of some folds; all by default.

        Raises UserError for a split or fold that no clip has, and when no clip is left.
        """
        chosen = np.ones(len(self), bool)
        if split is not None:
            names = split_names(split, self.splits)
            if absent := [name for name in names if name not in self.splits]:
                raise UserError(f"split '{absent[0]}' is not in {self.path}; it has {self.splits or 'no splits'}")
            chosen &= np.isin(self._columns["split"], [self.splits.index(name) for name in names])
        if folds is not None:
            there = np.unique(self.fold[self.fold >= 0]).tolist()
            if absent := sorted(set(folds) - set(there)):
                raise UserError(f"folds {absent} are not in {self.path}; it has {there or 'no folds'}")
            chosen &= np.isin(self.fold, list(folds))
        if not chosen.any():
            raise UserError(f"0 of the {len(self)} clips in {self.path} have split={split} and folds={folds}")
        return np.flatnonzero(chosen)

    def verify(self) -> None:
        """Read every shard and compare its sha256; raise UserError naming those that differ."""
        pairs = zip(self.shards, self.meta["shards"], strict=True)
        if damaged := [str(path) for path, shard in pairs if sha256_of(path) != shard["sha256"]]:
            raise UserError(f"shards differ from {self.path}: {', '.join(damaged)}; fetch or pack them again")

    def _restrict(self, wanted: list[str], pattern: str) -> "Index":
        position = {str(shard): i for i, shard in enumerate(self.shards)}
        if absent := [shard for shard in wanted if shard not in position]:
            raise UserError(
                f"{absent[0]} is not in {self.path} ({len(absent)} of {len(wanted)} shards are not); "
                f"index them: {index_command(pattern)}"
            )
        if len(wanted) == len(self.shards):
            return self
        chosen = sorted(position[shard] for shard in wanted)
        renumbered = np.full(len(self.shards), -1, np.int32)
        renumbered[chosen] = np.arange(len(chosen), dtype=np.int32)
        rows = np.flatnonzero(renumbered[self.shard] >= 0)
        columns = {name: self._columns[name][rows] for name in COLUMNS if not name.endswith("_ends")}
        columns["shard"] = renumbered[columns["shard"]]
        for values, ends in (("key_bytes", "key_ends"), ("label_ids", "label_ends")):
            columns[values], columns[ends] = take_ragged(self._columns[values], self._columns[ends], rows)
        meta = {**self.meta, "shards": [self.meta["shards"][i] for i in chosen]}
        return Index(columns=columns, meta=meta, path=self.path, base=self._base, cache=self._cache)

    def _lose(self, shard: int, num_bytes: int, path: Path) -> None:
        """Note the clips of a shard that do not lie within its first `num_bytes`."""
        reason = f"its shard ends at byte {num_bytes}" if num_bytes else f"its shard is {state_of(path)}"
        ends = self.offset + self.size
        for i in np.flatnonzero((self.shard == shard) & (ends > num_bytes)).tolist():
            self.lost[i] = reason


def split_names(split: str, known: Sequence[str]) -> list[str]:
    """Take "a+b" apart, unless a split is called so."""
    return [split] if split in known else split.split("+")


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    return os.pread(descriptor, size, offset)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `python -m audiossl index`."""
    parser.add_argument("shards", metavar="GLOB", help="the shards, quoted: 'DIR/shard-*.tar' or 'DIR/{000..127}.tar', "
                        "also at https:// and s3://")  # fmt: skip
    parser.add_argument("--out", type=Path, help="the index, or a folder for it (default: index.safetensors in the "
                        "shards' common folder; remote shards need one)")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="compare every byte with the index that is there")
    parser.add_argument("--cache-dir", type=Path, help="remote shards: where they are kept (default: the user's cache)")
    parser.add_argument("--cache-gb", type=float, help="remote shards: how much of them is kept (default: 50)")


def main(args: argparse.Namespace) -> int:
    """Index a stranger's shards; return 1 when over 1 % of the samples, or part of a shard, were left out."""
    if args.verify:
        index = Index.load(args.out or args.shards)
        index.verify()
        print(f"{len(index.shards)} shards with {len(index)} clips are as {index.path} says, byte for byte")
        return 0
    from audiossl.indexing.scan import index_shards  # the loader's workers import this module and need none of that

    return index_shards(args.shards, args.out, ShardCache.of(args.cache_dir, args.cache_gb))


def _span(ends: np.ndarray, i: int) -> tuple[int, int]:
    i = range(len(ends))[i]
    return (int(ends[i - 1]) if i else 0), int(ends[i])
