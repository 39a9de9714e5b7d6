"""A clip of any kind becomes a crop of one kind, or is left out by name."""

import csv
import io
import os
import time

import numpy as np
import pytest
import soundfile
import torch
from frontends import NAMES, front_end
from maes import audiomae
from tiny_shards import RATE, audio, clip, data_of, digest, noise, train_batches, write_shards

from audiossl.batch import Batch
from audiossl.errors import UserError
from audiossl.noise import Noise
from audiossl.spectrogram import resample, to_float


@pytest.mark.parametrize("extension", ["flac", "wav", "ogg", "mp3"])
@pytest.mark.parametrize("cache_mb", [0, 8])
def test_a_crop_is_a_piece_of_the_clip(tmp_path, extension, cache_mb):
    data = audio(noise(1, 40_000), extension=extension)
    whole = np.round(32768 * soundfile.read(io.BytesIO(data), dtype="float32")[0]).clip(-32768, 32767)
    shards = write_shards(tmp_path / "one", [[clip("a", data, 40_000, extension)]])
    (batch,) = train_batches(data_of(shards, batch_size=8, crop_seconds=0.5, cache_mb=cache_mb), max_steps=1)
    assert batch.waveform.shape == (8, 4000) and batch.waveform.dtype == torch.int16
    beginnings = np.lib.stride_tricks.sliding_window_view(whole[:-3968], 32)
    starts = [int(np.abs(beginnings - crop[:32]).max(1).argmin()) for crop in batch.waveform.numpy()]
    for start, crop in zip(starts, batch.waveform.numpy(), strict=True):
        assert np.abs(whole[start : start + 4000] - crop).max() <= 1  # MP3 decoders differ in the last bit
    assert len(set(starts)) == 8 and batch.num_samples.tolist() == [4000] * 8


@pytest.mark.parametrize("extension", ["flac", "wav", "ogg", "mp3"])
def test_seeking_gives_what_the_cache_gives_bit_for_bit(tmp_path, extension):
    shards = [[clip("a", audio(noise(2, 80_000), extension=extension), 80_000, extension)]]
    shards = write_shards(tmp_path / "one", shards)
    seeking = train_batches(data_of(shards, batch_size=40, crop_seconds=0.5), max_steps=2)
    cached = train_batches(data_of(shards, batch_size=40, crop_seconds=0.5, cache_mb=8), max_steps=2)
    assert digest(seeking) == digest(cached)


def tone(rate_hz: int, seconds: float, hz: float = 1000.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)


ODD_CLIPS = {
    "stereo": (np.stack([tone(RATE, 1), np.zeros(RATE)], 1), RATE, "PCM_16", 0.25),
    "surround": (np.stack([tone(RATE, 1)] * 6, 1), RATE, "PCM_16", 0.5),
    "16k": (tone(16000, 1), 16000, "PCM_16", 0.5),
    "44k": (tone(44100, 1), 44100, "PCM_16", 0.5),
    "48k_24bit": (tone(48000, 1), 48000, "PCM_24", 0.5),
    "8bit": (tone(RATE, 1), RATE, "PCM_U8", 0.5),
    "too_loud": (4 * tone(RATE, 1), RATE, "FLOAT", 1.0),
    "short": (tone(44100, 0.1), 44100, "PCM_16", 0.5),
    "ten_minutes": (tone(RATE, 600), RATE, "PCM_16", 0.5),
}


@pytest.mark.faults("D12", "C4")
@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("name", ODD_CLIPS)
def test_odd_clips_become_mono_int16_of_one_rate_and_pitch(tmp_path, name, cache_mb):
    """D12."""
    waveform, rate_hz, subtype, amplitude = ODD_CLIPS[name]
    data = audio(waveform, rate_hz, "wav", subtype)
    shards = write_shards(tmp_path / "odd", [[clip(name, data, len(waveform), "wav", rate_hz)]])
    (batch,) = train_batches(
        data_of(shards, rate_hz=RATE, crop_seconds=0.5, cache_mb=cache_mb), max_steps=1, start_step=0
    )
    assert batch.waveform.shape == (4, 4000) and batch.waveform.dtype == torch.int16 and not batch.skipped
    spectrum = np.abs(np.fft.rfft(batch.waveform.numpy() / 32768 * np.hanning(4000), axis=1))
    assert np.abs(np.argmax(spectrum, 1) * 2 - 1000).max() <= 4  # Hz
    assert np.abs(batch.waveform.numpy()[:, 400:-400] / 32768).max() == pytest.approx(amplitude, rel=0.02)  # no ringing


@pytest.mark.faults("D12")
@pytest.mark.parametrize("num_frames", [1, 7, 799])
def test_a_short_clip_is_repeated_or_followed_by_zeros(tmp_path, num_frames):
    waveform = noise(3, num_frames)
    shards = write_shards(tmp_path / "short", [[clip("s", audio(waveform, extension="wav"), num_frames, "wav")]])
    (cyclic,) = train_batches(data_of(shards), max_steps=1)
    (zeros,) = train_batches(data_of(shards, padding="zeros"), max_steps=1)
    rotations = {np.resize(np.roll(waveform, -start), 800).tobytes() for start in range(num_frames)}
    assert {row.tobytes() for row in cyclic.waveform.numpy()} <= rotations and cyclic.num_samples.tolist() == [800] * 4
    assert np.array_equal(zeros.waveform[0], np.pad(waveform, (0, 800 - num_frames)))
    assert zeros.num_samples.tolist() == [num_frames] * 4


def bad_clips() -> dict[str, tuple]:
    flac, not_a_number = audio(noise(4, 40_000)), noise(5, 40_000) / 32768
    not_a_number[100:] = np.nan
    flipped = bytearray(flac)
    flipped[len(flac) // 2] ^= 0xFF
    ogg, wav = audio(noise(6, 40_000), extension="ogg"), audio(noise(6, 40_000), extension="wav")
    return {
        "zero_bytes": (bytes(5000), "flac"),
        "half_flac": (flac[: len(flac) // 2], "flac"),
        "header_only": (flac[:60], "flac"),
        "flipped": (bytes(flipped), "flac"),
        "random_bytes": (np.random.default_rng(0).bytes(5000), "flac"),
        "html": (b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>", "wav"),
        "not_a_number": (audio(not_a_number, extension="wav", subtype="FLOAT"), "wav"),
        "half_ogg": (ogg[: len(ogg) // 2], "ogg"),
        "half_wav": (wav[: len(wav) // 2], "wav"),
        "other_rate": (audio(noise(7, 40_000), 16000), "flac"),
        "false_length": (flac[:21] + bytes([flac[21] | 0x0F]) + b"\xff\xff\xff\xff" + flac[26:], "flac"),
    }


@pytest.mark.faults("D1", "D2", "S8")
@pytest.mark.parametrize(("num_workers", "cache_mb"), [(0, 0), (0, 64), (1, 0)])
def test_bad_clips_are_left_out_and_named_and_the_run_goes_on(tmp_path, num_workers, cache_mb):
    """D1, D2, S8."""
    good = [clip(f"good{i:04d}", audio(noise(i, 900)), 900) for i in range(40)]
    bad = [clip(f"bad_{name}", data, 40_000, extension) for name, (data, extension) in bad_clips().items()]
    shards = write_shards(tmp_path / "mixed", [good[:20] + bad[:5], bad[5:] + good[20:]])
    settings = dict(num_workers=num_workers, cache_mb=cache_mb, crop_seconds=5.0, run_dir=tmp_path)
    data = data_of(shards, batch_size=17, **settings)
    started = time.perf_counter()
    batches = train_batches(data, max_steps=3)
    assert time.perf_counter() - started < 5  # F24: nothing sleeps
    skipped = {entry.key: entry for batch in batches for entry in batch.skipped}
    assert sorted(key for batch in batches for key in batch.key) == sorted(key for key, *_ in good)
    assert sorted(skipped) == sorted(key for key, *_ in bad)
    assert all(entry.reason and str(tmp_path) in entry.shard for entry in skipped.values())
    for batch in batches:
        assert sorted([*batch.rows.tolist(), *(entry.row for entry in batch.skipped)]) == list(range(17))
    with open(tmp_path / "bad_clips.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert {(row["key"], row["reason"]) for row in listed} == {(e.key, e.reason) for e in skipped.values()}


def test_a_cut_shard_costs_only_the_clips_that_lay_behind_the_cut(tmp_path):
    clips = [clip(f"k{i}", audio(noise(i, 4000)), 4000) for i in range(8)]
    shards = write_shards(tmp_path / "cut", [clips])
    data = data_of(shards, batch_size=8)
    path = data.index.shard_path(0)
    os.truncate(path, int(data.index.offset[5]) + 100)
    (batch,) = train_batches(data, max_steps=1)
    assert sorted(batch.key) == [f"k{i}" for i in range(5)]
    assert {entry.key for entry in batch.skipped} == {"k5", "k6", "k7"}
    assert all("shard ends at byte" in entry.reason for entry in batch.skipped)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanishes_is_named_at_once(tmp_path, num_workers):
    shards = write_shards(tmp_path / "gone", [[clip("a", audio(noise(0, 900)), 900)]])
    data = data_of(shards, num_workers=num_workers)
    data.index.shard_path(0).unlink()
    with pytest.raises(UserError, match=r"^shard .*shard-000000.tar cannot be read: No such file"):
        train_batches(data)


@pytest.mark.faults("D2")
@pytest.mark.parametrize("frontend", NAMES)
def test_nothing_that_is_not_finite_reaches_a_model_and_silence_makes_no_nan(tmp_path, frontend):
    """D2, F25: NaN and Inf are refused, more than full scale is clipped, silence passes."""
    waveforms = {name: noise(1, 16_000) / 32768 for name in ("nan", "inf", "loud", "silent")}
    waveforms["nan"][5000], waveforms["inf"][5000] = np.nan, -np.inf
    waveforms["loud"] *= 1000
    waveforms["silent"][:] = 0
    clips = [clip(k, audio(w, 16_000, "wav", "FLOAT"), 16_000, "wav", 16_000) for k, w in waveforms.items()]
    shards = write_shards(tmp_path / "odd", [clips])
    (batch,) = train_batches(data_of(shards, crop_seconds=1.0, default_rate_hz=16_000), max_steps=1)
    assert {entry.key: entry.reason for entry in batch.skipped} == dict.fromkeys(("nan", "inf"), "NaN or Inf samples")
    assert sorted(batch.key) == ["loud", "silent"]
    waveform = to_float(batch.waveform)
    front = front_end(frontend)
    features = front(resample(waveform, 16_000, front.rate_hz))
    assert waveform.abs().max() == 1 and features.isfinite().all()
    if frontend == "kaldi_fbank":
        model = audiomae(frames=64, norm_target=True)
        loss = model(Batch(waveform=waveform), generator=Noise.for_batch(0, 0, 2, torch.device("cpu")))["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
