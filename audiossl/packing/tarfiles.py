"""How is a shard written so that the same clips give the same bytes, and read so that no damage passes unseen?

A tar is headers of 512 bytes, each followed by its data padded to 512. Ours carry no time and no owner. Common readers
take a broken header for the end of the archive, and a corpus loses its tail without a word; this walk compares every
header with the file's size and says where it had to stop.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from audiossl.sound.audio import AudioError

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 4096
MAX_EXTENDED_BYTES = 2**15  # of extra headers before a member's own
_CHUNK_BYTES = 2**20
NAME_BYTES = 100  # of a header
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_NAMING = (_LONG_NAME, *_PAX)
_EXTRA = (*_NAMING, _LONG_LINK, tarfile.XGLTYPE)


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


@dataclass(frozen=True)
class Damage:
    """Say which bytes of a tar could not be understood; what follows them could be."""

    reason: str


class TarDamage(Exception):
    """Say where a tar cannot be read any further."""


def walk(path: Path) -> Iterator[Member | Oddity | Damage]:
    """Yield the members of a tar in order, from headers alone, without trust in the sizes they announce.

    A header whose checksum is wrong, or an end marker that is none, costs what lies up to the next good header, and is
    yielded as `Damage`. Raises TarDamage, after everything before it was yielded: cut at a member's boundary (no end
    marker), in a header or in data, empty, not a tar, or no good header any more.
    """
    file_bytes = path.stat().st_size
    long_name = None
    with open(path, "rb") as file:
        at = 0
        while True:
            header = _header(file, at, file_bytes)
            if header is None:
                if (further := _next_header(file, at, file_bytes)) is None:
                    return
                yield Damage(f"damaged header at byte {at}: what lay up to byte {further} is lost")
                at, long_name = further, None
                continue
            data, end = at + BLOCK, at + BLOCK + header.size
            if end > file_bytes:
                raise TarDamage(f"cut in the data of '{header.name}': {file_bytes - data} of {header.size} bytes")
            at = data + -(-header.size // BLOCK) * BLOCK
            if header.type in _EXTRA:
                if header.type in _NAMING:
                    long_name = _long_name(file, data, header) or long_name
                continue
            name, long_name = long_name or header.name, None
            if header.isdir():
                continue
            yield _judge(name, data, header)


def _next_header(file: BinaryIO, at: int, file_bytes: int) -> int | None:
    """Find the next good header after byte `at`; None where only zeros are left."""
    file.seek(at)
    is_empty = not any(file.read(BLOCK))
    for start in range(at + BLOCK, file_bytes, _CHUNK_BYTES):
        file.seek(start)
        chunk = file.read(_CHUNK_BYTES)
        is_empty = is_empty and not any(chunk)
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[place + 257 : place + 262] == b"ustar" and _is_header(chunk[place : place + BLOCK]):
                return start + place
    if not is_empty:
        raise TarDamage(f"damaged header, and none that is whole in the bytes after it, up to byte {file_bytes}")
    return None


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
    except tarfile.HeaderError:
        return False


def read_member(read: Callable[[int, int], bytes], name: str, offset: int, size: int) -> bytes:
    """Read a clip's audio, `size` bytes at `offset`, by `read(offset, num_bytes)`, and the tar header before it.

    A shard replaced by another of the same size has other audio there, which must not be heard under this clip's
    labels: the header has to bear `name` (`key.extension`) and `size`. Raises AudioError.
    """
    at = offset - BLOCK
    if at < 0:
        raise AudioError("no tar header lies before its bytes")
    data = read(at, BLOCK + size)
    if len(data) < BLOCK + size:
        raise AudioError(f"its shard ends at byte {at + len(data)} of the {offset + size} that the index says")
    _check_member(data[:BLOCK], name, size, lambda num_bytes: read(max(0, at - num_bytes), min(at, num_bytes)))
    return data[BLOCK:]


def _check_member(header: bytes, name: str, size: int, read_before: Callable[[int], bytes]) -> None:
    """Compare a header; `read_before(n)` gives up to n bytes that lie before it, for names too long or foreign."""
    wanted = name.encode("utf-8", "surrogateescape")
    is_whole_name = len(wanted) < NAME_BYTES  # a longer one is cut there, and goes on in an extra header
    if is_whole_name and header[:NAME_BYTES].partition(b"\0")[0] == wanted and header[124:136] == b"%011o\0" % size:
        return
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise AudioError("no tar header lies before its bytes: the shard is damaged or another") from error
    if not (is_whole_name and _folded(found.name) == _folded(name)):
        known = _extended_name(header, read_before) or found.name
        if _folded(known) != _folded(name):
            raise AudioError(f"'{known[:200]}' lies in its place: the shard is damaged, or another of the same size")
    if found.size != size:
        raise AudioError(f"it has {found.size} bytes where the index says {size}: the shard is another")


def _folded(name: str) -> str:
    """Spell a name as an index does: no './' in front, the extension in lower case."""
    stem, dot, extension = name.removeprefix("./").rpartition(".")
    return stem + dot + extension.lower()


def _extended_name(header: bytes, read_before: Callable[[int], bytes]) -> str | None:
    """Find the name that extra headers (GNU, pax) right before a member's own header give it; None without them."""
    before = read_before(MAX_EXTENDED_BYTES)
    before = before[len(before) % BLOCK :]
    for start in range(len(before) - BLOCK, -1, -BLOCK):
        at, name = start, None
        while at < len(before):
            try:
                extra = tarfile.TarInfo.frombuf(before[at : at + BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                break
            if extra.type not in _EXTRA or extra.size < 0:
                break
            data = before[at + BLOCK : at + BLOCK + extra.size]
            name = (_named_in(data, extra.type) if extra.type in _NAMING else None) or name
            at += BLOCK + -(-extra.size // BLOCK) * BLOCK
        if at == len(before) and name:
            return name
    return None


def _header(file: BinaryIO, at: int, file_bytes: int) -> tarfile.TarInfo | None:
    """Read a header; None for one that is damaged or an end marker."""
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
    if _is_header(block):
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if at == 0 and any(block) and block[257:262] != b"ustar":
        raise TarDamage("not a tar")
    return None


def _long_name(file: BinaryIO, offset: int, header: tarfile.TarInfo) -> str | None:
    """Read the name that a GNU or pax extra header gives the member after it."""
    if header.size > 16 * MAX_NAME_BYTES:
        raise TarDamage(f"a name of {header.size} bytes at byte {offset}")
    file.seek(offset)
    return _named_in(file.read(header.size), header.type)


def _named_in(data: bytes, kind: bytes) -> str | None:
    if kind == _LONG_NAME:
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
