"""How is a crop of a FLAC decoded without decoding what lies before it?

libFLAC seeks by decoding frames here and there until it has met the right one, which takes as long as a second of
audio. But where all frames are equally long, the header of the one that is wanted is known to the last bit, its number
and its checksum included (RFC 9639, 9.1), so that it can be found as a string; a FLAC without the frames before it is
as good a FLAC.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile

STREAMINFO_BYTES = 34
HEADER_BYTES = 16  # of a frame, at most
SYNC_FIXED = b"\xff\xf8"  # a frame of a stream whose frames are equally long


def decode_from(data: bytes, start: int, rate_hz: int, out: np.ndarray) -> bool:
    """Decode mono 16-bit FLAC from sample `start` on until `out`, int16, is full; say whether that was possible.

    Where it was not, what is in `out` means nothing, and a decoder that looks at the whole file has to judge.
    """
    if (found := _without_head(data, start, len(out))) is None:
        return False
    rest, skip = found
    try:
        with _Onwards(io.BytesIO(rest)) as file:
            if (file.channels, file.subtype, file.samplerate) != (1, "PCM_16", rate_hz):
                return False
            return all(len(file.read(out=part)) == len(part) for part in (np.empty(skip, np.int16), out))
    except (soundfile.SoundFileError, RuntimeError, OSError, ValueError, MemoryError):
        return False


class _Onwards(soundfile.SoundFile):
    """Read without going back: soundfile seeks after each read, and then the last frame is decoded once more."""

    def seekable(self) -> bool:
        return False


def _without_head(data: bytes, start: int, num_frames: int) -> tuple[bytes, int] | None:
    """Cut off the frames before the one with sample `start`; gives the rest and how much of it lies before `start`."""
    if (first := _first_frame(data)) is None:
        return None
    block, total = int.from_bytes(data[8:10]), int.from_bytes(data[18:26]) & (1 << 36) - 1
    number = start // block if block else 0
    if block != int.from_bytes(data[10:12]) or start + num_frames > total:
        return None
    if not 0 < number < min((total - 1) // block, 2**31):  # the last one is shorter, and its header another
        return None
    if (header := _header(data, first, number)) is None:
        return None
    smallest, largest = int.from_bytes(data[12:15]), int.from_bytes(data[15:18])
    until = first + number * largest + len(header) if largest else len(data)
    place = data.find(header, first + number * smallest, until)
    if place < 0:
        return None
    ahead = number * block
    info = data[8:18] + (int.from_bytes(data[18:26]) - ahead).to_bytes(8) + data[26 : 8 + STREAMINFO_BYTES]
    end = place + largest * (num_frames // block + 2) if largest else len(data)  # it begins and ends within frames
    head = b"fLaC\x80" + STREAMINFO_BYTES.to_bytes(3) + info
    return b"".join([head, memoryview(data)[place:end]]), start - ahead


def _first_frame(data: bytes) -> int | None:
    """Pass over the blocks before the first frame; None for what does not begin like a FLAC of equal frames."""
    if data[:4] != b"fLaC" or int.from_bytes(data[4:8]) & 0x7FFFFFFF != STREAMINFO_BYTES:
        return None
    place, is_last = 4, False
    while not is_last and place + 4 < len(data):
        is_last = data[place] >= 0x80
        place += 4 + int.from_bytes(data[place + 1 : place + 4])
    return place if data[place : place + 2] == SYNC_FIXED and place + HEADER_BYTES <= len(data) else None


def _header(data: bytes, first: int, number: int) -> bytes | None:
    """Make the header of a frame out of that of the first, whose number is 0; None where that is no such header."""
    sizes = data[first + 2]
    odd_block, odd_rate = sizes >> 4, sizes & 15  # some sizes and rates are spelled out after the number
    spelled = {6: 1, 7: 2}.get(odd_block, 0) + {12: 1, 13: 2, 14: 2}.get(odd_rate, 0)
    end = first + 5 + spelled
    if data[first + 4] != 0 or data[end] != _crc8(data[first:end]):
        return None
    header = data[first : first + 4] + _coded(number) + data[first + 5 : end]
    return header + bytes([_crc8(header)])


def _coded(number: int) -> bytes:
    """Write a number of up to 31 bits as frames have it: as UTF-8, which once went on beyond 21 bits."""
    if number < 0x80:
        return bytes([number])
    tail = next(n for n in range(1, 6) if number >> 5 * n + 6 == 0)
    lead = 0xFF << 7 - tail & 0xFF | number >> 6 * tail
    return bytes([lead, *(0x80 | number >> 6 * n & 0x3F for n in reversed(range(tail)))])


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _crc8_of(value: int) -> int:
    for _ in range(8):
        value = value << 1 ^ (0x107 if value & 0x80 else 0)
    return value


_CRC8 = bytes(map(_crc8_of, range(256)))
