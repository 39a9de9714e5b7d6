"""How is a shard written so that the same clips give the same bytes, and read so that no damage passes unseen?

A tar is headers of 512 bytes, each followed by its data padded to 512. Ours carry no time and no owner. Common readers
take a broken header for the end of the archive, and a corpus loses its tail without a word; this walk compares every
header with the file's size and says where it had to stop.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 4096
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class TarWriter:
    """Append members to `stream`, counting bytes and hashing on the way."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._hash, self.num_bytes = stream, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def close(self) -> str:
        """Write the end marker and return the sha256 of everything; the stream stays open."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


@dataclass(frozen=True)
class Member:
    """Name a regular file of a tar, and where its data lie."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Oddity:
    """Name a member that is no regular file (link, device, unknown type) or climbs out of the folder."""

    name: str
    reason: str


class TarDamage(Exception):
    """Say where a tar cannot be read any further."""


def walk(path: Path) -> Iterator[Member | Oddity]:
    """Yield the members of a tar in order, from headers alone, without trust in the sizes they announce.

    Raises TarDamage, after everything before the damage was yielded: cut at a member's boundary (no end marker), in a
    header or in data, empty, a header whose checksum is wrong, or not a tar.
    """
    file_bytes = path.stat().st_size
    long_name = None
    with open(path, "rb") as file:
        at = 0
        while True:
            header = _header(file, at, file_bytes)
            if header is None:
                return
            data, end = at + BLOCK, at + BLOCK + header.size
            if end > file_bytes:
                raise TarDamage(f"cut in the data of '{header.name}': {file_bytes - data} of {header.size} bytes")
            at = data + -(-header.size // BLOCK) * BLOCK
            if header.type in (_LONG_NAME, _LONG_LINK, *_PAX, tarfile.XGLTYPE):
                if header.type == _LONG_NAME or header.type in _PAX:
                    long_name = _long_name(file, data, header) or long_name
                continue
            name, long_name = long_name or header.name, None
            if header.isdir():
                continue
            yield _judge(name, data, header)


def _header(file: BinaryIO, at: int, file_bytes: int) -> tarfile.TarInfo | None:
    file.seek(at)
    block = file.read(BLOCK)
    if not file_bytes:
        raise TarDamage("zero bytes")
    if not block:
        raise TarDamage("no end marker: cut between two members")
    if at == 0 and block.startswith(b"\x1f\x8b"):
        raise TarDamage("compressed; unpack it with gunzip first")
    if len(block) < BLOCK:
        raise TarDamage(f"cut in a header at byte {at}")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0:
            raise tarfile.InvalidHeaderError("negative size")
        return header
    except tarfile.EOFHeaderError:
        return None
    except tarfile.HeaderError as error:
        what = f"damaged header at byte {at}, {file_bytes - at} bytes after it not read" if at else "not a tar"
        raise TarDamage(what) from error


def _long_name(file: BinaryIO, offset: int, header: tarfile.TarInfo) -> str | None:
    """Read the name that a GNU or pax extra header gives the member after it."""
    if header.size > 16 * MAX_NAME_BYTES:
        raise TarDamage(f"a name of {header.size} bytes at byte {offset}")
    file.seek(offset)
    data = file.read(header.size)
    if header.type == _LONG_NAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    for record in data.split(b"\n"):  # each is b"LENGTH KEY=VALUE"
        key, found, value = record.partition(b" ")[2].partition(b"=")
        if found and key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None


def _judge(name: str, offset: int, header: tarfile.TarInfo) -> Member | Oddity:
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        return Oddity(name, "a link, device or unknown kind of member")
    if name.startswith("/") or ".." in name.split("/") or len(name) > MAX_NAME_BYTES:
        return Oddity(name[:200], "a name that climbs out of its folder")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return Oddity(repr(name), "control characters in its name")
    return Member(name.removeprefix("./"), offset, header.size)
