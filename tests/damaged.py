"""A stranger's folder of shards, whole and indexed, and then damaged in many ways at once."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from tiny_shards import audio, noise

from audiossl.__main__ import main
from audiossl.index import Index

NUM_SHARDS, PER_SHARD, FRAMES = 8, 12, 5600
ODD_KEYS = ["0KvrcRZM-qE_30.000", "a.b", "a.c", "__x__/y", "-dash", "with space", "größe_音", "Twin", "twin", "n" * 300]


def sound(number: int) -> np.ndarray:
    """Give clip `number` a waveform of its own: noise (FRAMES,) int16."""
    return noise(number, FRAMES)


def write_folder(folder: Path, tar_format: int = tarfile.PAX_FORMAT) -> Index:
    """Write 8 shards of 12 clips with a json each, labelled by their key, and index them as a user does."""
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"part-{shard}.tar", "w", format=tar_format) as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                key = ODD_KEYS[number] if number < len(ODD_KEYS) else f"clip{number:03d}"
                meta = json.dumps({"labels": [f"label of {key}"]}).encode()
                for name, data in ((f"{key}.flac", audio(sound(number))), (f"{key}.json", meta)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    assert main(["index", f"{folder}/*.tar"]) == 0
    return Index.load(folder)


def overwrite(index: Index, clip: int, data: bytes) -> None:
    """Put other bytes where a clip's audio is; the rest of it becomes zeros."""
    with open(index.shard_path(clip), "r+b") as shard:
        shard.seek(int(index.offset[clip]))
        shard.write(data[: int(index.size[clip])].ljust(int(index.size[clip]), b"\0"))


def rename(index: Index, clip: int, name: str) -> None:
    """Give a member another name, with a valid header: the shard is another one of the same size."""
    with open(index.shard_path(clip), "r+b") as shard:
        shard.seek(int(index.offset[clip]) - 512)
        header = tarfile.TarInfo.frombuf(shard.read(512), "utf-8", "surrogateescape")
        header.name = name
        shard.seek(-512, os.SEEK_CUR)
        shard.write(header.tobuf(tarfile.USTAR_FORMAT))


def flip(index: Index, clip: int, at: int) -> None:
    """Turn a byte round, counted from the first of the clip's audio; the header lies before that."""
    with open(index.shard_path(clip), "r+b") as shard:
        shard.seek(int(index.offset[clip]) + at)
        (byte,) = shard.read(1)
        shard.seek(-1, os.SEEK_CUR)
        shard.write(bytes([byte ^ 0xFF]))


def damage(index: Index) -> tuple[set[int], dict[int, str]]:
    """Damage all shards but the first; returns the clips lost with their shards, and the bad ones with the reason."""
    shards = index.shards
    os.truncate(shards[1], int(index.offset[PER_SHARD + 9]) + 300)  # in data: 3 are lost
    os.truncate(shards[2], int(index.offset[2 * PER_SHARD + 8]) - 512)  # between two members: 4
    os.truncate(shards[3], 0)
    shards[4].unlink()
    lost = {*range(21, 24), *range(32, 36), *range(36, 60)}
    bad = {}
    for clip in range(60, 64):  # the clips of this shard now bear each other's names
        rename(index, clip, f"{index.key(123 - clip)}.flac")
        bad[clip] = "lies in its place"
    flip(index, 72, -512)
    flip(index, 73, -512 + 148)  # in the checksum, of no matter to who knows where the audio lies
    bad[72] = "no tar header"
    half = index.read(84)
    for clip, data, reason in (
        (84, half[: len(half) // 2], "cannot be decoded"),
        (85, half[:60], "cannot be decoded"),
        (86, np.random.default_rng(0).bytes(9000), "cannot be decoded"),
        (87, b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>", "cannot be decoded"),
        (88, b"", "cannot be decoded"),
        (89, half[:21] + bytes([half[21] | 0x0F]) + b"\xff" * 4 + half[26:], "cannot be decoded"),
    ):
        overwrite(index, clip, data)
        bad[clip] = reason
    flip(index, 90, int(index.size[90]) // 2)
    bad[90] = "cannot be decoded"
    return lost, bad
