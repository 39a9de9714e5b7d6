"""A crop of a FLAC is found by the header of its frame, and is what the whole clip has there."""

import io

import numpy as np
import pytest
import soundfile
from tiny_shards import RATE, audio, noise

from audiossl.sound.flac import decode_from


def written(waveform: np.ndarray, rate_hz: int, level: float, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate_hz, format="FLAC", subtype=subtype, compression_level=level)
    return file.getvalue()


def is_cut_rightly(data: bytes, rate_hz: int, waveform: np.ndarray, start: int, num_frames: int) -> bool:
    out = np.zeros(num_frames, np.int16)
    return decode_from(data, start, rate_hz, out) and np.array_equal(out, waveform[start : start + num_frames])


# 11 kHz, 12345 Hz and 50001 Hz are spelled out in each frame's header; frames are 1152 or 4096 samples long
@pytest.mark.parametrize("rate_hz", [8000, 11_000, 12_345, 16_000, 32_000, 44_100, 50_001])
@pytest.mark.parametrize("level", [0.0, 0.6])
def test_any_crop_that_begins_behind_the_first_frame_is_decoded_from_its_own(rate_hz, level):
    waveform = noise(rate_hz, 60_000)
    data = written(waveform, rate_hz, level)
    for start in (4096, 4097, 8191, 8192, 30_000, 49_151):
        assert is_cut_rightly(data, rate_hz, waveform, start, 900)
    assert is_cut_rightly(data, rate_hz, waveform, 5000, 55_000)  # to the very end
    assert not decode_from(data, 5000, rate_hz, np.zeros(55_001, np.int16))


def test_numbers_of_frames_take_one_to_three_bytes():
    waveform = np.repeat(noise(1, 2100), 1152)  # a frame of silence takes 11 bytes
    data = written(waveform, RATE, 0.0)
    for frame in (1, 127, 128, 2047, 2048, 2098):
        assert is_cut_rightly(data, RATE, waveform, frame * 1152 + 5, 1100)


def test_what_lies_between_header_and_frames_is_passed_over():
    waveform = noise(2, 20_000)
    data = written(waveform, RATE, 0.6)
    padding = b"\x01" + (3000).to_bytes(3) + bytes(3000)
    assert is_cut_rightly(data[:42] + padding + data[42:], RATE, waveform, 9000, 5000)


def others() -> dict[str, bytes]:
    waveform, plain = noise(3, 40_000), written(noise(3, 40_000), RATE, 0.6)
    flipped, long = bytearray(plain), bytearray(plain)
    flipped[len(plain) // 2] ^= 0xFF
    long[8:10] = b"\x01\x00"  # frames of 256 to 4096 samples
    return {
        "stereo": written(np.stack([waveform] * 2, 1), RATE, 0.6),
        "24 bit": written(waveform, RATE, 0.6, "PCM_24"),
        "another rate": written(waveform, 2 * RATE, 0.6),
        "damaged": bytes(flipped),
        "cut": plain[: len(plain) // 2],
        "frames of many lengths": bytes(long),
        "an ID3 tag before it": b"ID3" + bytes(50) + plain,
        "wav": audio(waveform, extension="wav"),
        "header alone": plain[:42],
        "no whole frame": plain[: plain.find(b"\xff\xf8") + 3],
        "less than a header": plain[:7],
        "nothing": b"",
    }


@pytest.mark.parametrize("name", others())
def test_whatever_is_not_plain_is_left_to_the_decoder_that_looks_at_the_whole(name):
    assert not decode_from(others()[name], 10_000, RATE, np.zeros(20_000, np.int16))


def test_a_header_that_stands_where_no_frame_begins_is_found_out():
    waveform = noise(4, 40_000)
    data = written(waveform, RATE, 0.6)
    first = data.find(b"\xff\xf8")
    third = data.find(data[first : first + 4] + b"\x02")
    planted = bytearray(data)
    planted[third - 300 : third - 294] = data[third : third + 6]
    assert is_cut_rightly(data, RATE, waveform, 9000, 5000)
    assert not decode_from(bytes(planted), 9000, RATE, np.zeros(5000, np.int16))
