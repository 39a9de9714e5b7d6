"""A folder of audio becomes shards with everything that meta.csv and the file names say."""

from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import soxr
import webdataset as wds
from packing import read_table, run, tone, write_table

from audiossl.index import Index
from audiossl.pack import parse_bytes
from audiossl.packing.source import key_of
from audiossl.sound.audio import decode, to_flac, to_int16


def test_stereo_at_44100_becomes_mono_at_32000_with_its_tone_where_it_was(tmp_path):
    tone(tmp_path / "tone.wav", 44_100, 2.0, channels=2)
    assert run(tmp_path, tmp_path / "out") == 0
    index = Index.load(tmp_path / "out")
    wave, rate_hz = decode(index.read(0))
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert (rate_hz, len(wave), index.channels[0], index.seconds[0]) == (32_000, 64_000, 1, 2.0)
    assert np.argmax(spectrum) * rate_hz / len(wave) == pytest.approx(1000, abs=1)
    assert np.abs(wave[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)


def test_a_long_clip_resampled_in_blocks_equals_one_resampled_at_once(tmp_path):
    rng = np.random.default_rng(0)
    wave = np.cumsum(rng.normal(size=44_100 * 40)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", 0.9 * wave / np.abs(wave).max(), 44_100, subtype="PCM_16")
    expected = soxr.resample(soundfile.read(tmp_path / "a.wav", dtype="float32")[0], 44_100, 32_000, quality="HQ")
    data, info, _ = to_flac(tmp_path / "a.wav", 32_000)
    assert info.num_frames == len(expected) == 32_000 * 40
    assert np.array_equal(to_int16(decode(data)[0]), to_int16(expected))


def test_sixteen_bit_audio_at_the_rate_of_the_shards_keeps_every_sample(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 20_000, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 32_000, subtype="PCM_16")
    data, info, clipped = to_flac(tmp_path / "a.wav", 32_000)
    assert np.array_equal(to_int16(decode(data)[0]), samples)
    assert (info.num_frames, info.seconds, clipped) == (20_000, 0.625, False)


ODD_NAMES = ["id_30.000", "a.b", "a.c", "-lead", "with space", "naïve 日本", "Case", "case"]
ODD_NAMES += ["__x__", "x" * 120, "50%", "a%2Eb"]


@pytest.mark.faults("D6")
def test_odd_names_become_safe_keys_that_turn_back_and_that_webdataset_reads(tmp_path):
    """D6."""
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    for name in ODD_NAMES:
        tone(source / f"{name}.wav", 8_000, 0.1)
    tone(source / "deep" / "er" / "a.b.wav", 8_000, 0.1)
    tone(source / "twin.wav", 8_000, 0.1)
    tone(source / "twin.flac", 8_000, 0.1)
    assert run(source, tmp_path / "out", "--codec", "keep") == 0
    index = Index.load(tmp_path / "out")
    keys = [index.key(i) for i in range(len(index))]
    names = {unquote(key) for key in keys}
    assert names == {*ODD_NAMES, "deep/er/a.b", "twin.wav", "twin.flac"} and len(keys) == len(names)
    assert not any(set(key) & set("./\\ ") or key.startswith("-") or not key.isascii() for key in keys)
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert [sample["__key__"] for sample in wds.WebDataset(shards, shardshuffle=False)] == keys


def test_keys_have_no_control_characters():
    assert key_of("a\nb\0c\x7f") == "a%0Ab%00c%7F"


def test_sub_folders_are_no_labels_and_hidden_files_no_clips(tmp_path):
    for name in ("dog", "cat", ".cache"):
        (tmp_path / name).mkdir()
        tone(tmp_path / name / "1.flac", 8_000, 0.1)
    assert run(tmp_path, tmp_path / "out") == 0
    index = Index.load(tmp_path / "out")
    assert [index.key(i) for i in range(len(index))] == ["cat%2F1", "dog%2F1"]
    assert index.vocabulary == [] and index.labels(0) == [] and index.split(0) is None and index.fold[0] == -1


def test_meta_csv_goes_into_index_and_json(tmp_path, capsys):
    tone(tmp_path / "a.wav", 16_000, 1.0)
    tone(tmp_path / "unlisted.wav", 16_000, 1.0)
    header = ("filename", "labels", "split", "fold", "source", "note")
    rows = [("a.wav", "dog; cat;dog", "train", "3", "the field", ""), ("gone.wav", "", "", "", "", "")]
    write_table(tmp_path / "meta.csv", [header, *rows, ("../a.wav", "", "", "", "", "")])
    assert run(tmp_path, tmp_path / "out") == 1
    index = Index.load(tmp_path / "out")
    assert (index.labels(0), index.split(0), index.fold[0], index.vocabulary) == (
        ["dog", "cat"],
        "train",
        3,
        ["cat", "dog"],
    )
    own = {"labels": ["dog", "cat"], "seconds": 1.0, "rate_hz": 32_000, "split": "train", "fold": 3, "source": "a.wav"}
    assert index.read_meta(0) == own | {"meta_source": "the field"}
    reasons = {"gone.wav": "file is missing", "../a.wav": "the name leads out of the folder"}
    assert read_table(tmp_path / "out" / "rejected.csv") == reasons
    assert "1 audio files, left out" in capsys.readouterr().out


def test_sizes_are_read_as_people_write_them():
    assert [parse_bytes(text) for text in ("1GB", "500 MB", "2GiB", "1.5kb", "7")] == [10**9, 5 * 10**8, 2**31, 1500, 7]
