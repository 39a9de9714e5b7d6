"""m4a, mp4, webm and aac are read by the program ffmpeg where it is installed, and are named where it is not."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soxr
from audiosets import write_classes, write_clip, write_segments
from packing import ROOT, read_table, run, tone, write_table

from audiossl.index import Index
from audiossl.sound import ffmpeg, files
from audiossl.sound.audio import AudioError, decode

needs_ffmpeg = pytest.mark.skipif(not ffmpeg.is_installed(), reason="the program ffmpeg is not installed")


def convert(source: Path, target: Path, *options: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{source}", *options, f"file:{target}"]
    subprocess.run(command, check=True, timeout=60)
    return target


@needs_ffmpeg
@pytest.mark.parametrize("extension", ffmpeg.EXTENSIONS)
def test_a_real_clip_comes_back_as_it_was(tmp_path, extension):
    source = write_clip(tmp_path / "-a.wav", number=30)
    before, rate_hz = decode(source)
    data, info, clipped = ffmpeg.to_flac(convert(source, tmp_path / f"-a.{extension}"), 32_000)
    after, _ = decode(data)
    before = soxr.resample(before, rate_hz, 32_000)
    assert (info.rate_hz, info.channels, clipped) == (32_000, 1, False)
    assert abs(len(after) - len(before)) < 0.1 * 32_000
    padded = np.pad(after, (0, max(0, len(before) - len(after))))[: len(before)]
    spectrum = np.fft.rfft(before, 2 * len(before)) * np.conj(np.fft.rfft(padded, 2 * len(before)))
    likeness = np.fft.irfft(spectrum).max() / np.linalg.norm(before) / np.linalg.norm(padded)
    assert likeness > 0.9  # whatever the codec's delay


@needs_ffmpeg
def test_stereo_becomes_mono_with_its_tone_where_it_was(tmp_path):
    source = tone(tmp_path / "tone.wav", 44_100, 2.0, channels=2)
    wave, rate_hz = decode(ffmpeg.to_flac(convert(source, tmp_path / "tone.m4a"), 32_000)[0])
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert np.argmax(spectrum) * rate_hz / len(wave) == pytest.approx(1000, abs=1)
    assert np.abs(wave[4000:-4000]).max() == pytest.approx(0.5, abs=0.02)


@needs_ffmpeg
def test_of_a_video_only_the_sound_is_read(tmp_path):
    source = tone(tmp_path / "tone.wav", 44_100, 2.0)
    picture = ("-f", "lavfi", "-t", "2", "-i", "testsrc=size=64x64:rate=5", "-c:v", "mpeg4")
    info = ffmpeg.to_flac(convert(source, tmp_path / "video.mp4", *picture), 32_000)[1]
    assert info.seconds == pytest.approx(2.0, abs=0.1)
    convert(source, tmp_path / "mute.mp4", *picture, "-an", "-map", "1:v")
    with pytest.raises(AudioError, match="cannot be decoded: ffmpeg: "):
        ffmpeg.to_flac(tmp_path / "mute.mp4", 32_000)


def damage(folder: Path) -> None:
    """Write files that must be rejected, each named after what it is."""
    source = tone(folder / "tone.wav", 44_100, 5.0)
    (folder / "zero.m4a").write_bytes(b"")
    (folder / "page.mp4").write_bytes(b"<html>not found</html>")
    (folder / "random.aac").write_bytes(np.random.default_rng(0).bytes(5000))
    for name, options in {"m4a": ("-movflags", "+faststart"), "webm": (), "mp4": (), "aac": ()}.items():
        whole = convert(source, folder / f"whole.{name}", *options).read_bytes()
        (folder / f"half.{name}").write_bytes(whole[: len(whole) // 2])
    (folder / "other.m4a").write_bytes(source.read_bytes())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{folder}/whole.aac\n#EXT-X-ENDLIST\n"
    (folder / "playlist.m4a").write_text(playlist)
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {folder}/whole.aac\n")


@needs_ffmpeg
def test_damaged_files_and_lists_of_other_files_are_rejected_with_a_reason(tmp_path):
    damage(tmp_path)
    names = ["zero.m4a", "page.mp4", "random.aac", "half.m4a", "half.webm", "half.mp4", "half.aac"]
    for name in [*names, "other.m4a", "playlist.m4a", "concat.mp4", "gone.m4a"]:
        with pytest.raises(AudioError) as caught:
            ffmpeg.to_flac(tmp_path / name, 32_000)
        reason = str(caught.value)
        assert reason.startswith(("cannot be decoded: ffmpeg: ", "zero bytes", "cannot be read")), (name, reason)
        assert len(reason) < 200 and "\n" not in reason


@needs_ffmpeg
def test_what_ffmpeg_writes_is_bounded_in_length_and_in_time(tmp_path):
    long = convert(tone(tmp_path / "long.wav", 8_000, 600.0), tmp_path / "long.m4a")
    with pytest.raises(AudioError, match="longer than the limit of 20 s"):
        ffmpeg.to_flac(long, 32_000, max_seconds=20.0)
    with pytest.raises(AudioError, match="ffmpeg took longer than 0 s"):
        ffmpeg.to_flac(long, 32_000, timeout_seconds=0.02)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert "ffmpeg" not in {Path(f"/proc/{child}/comm").read_text().strip() for child in children}


@needs_ffmpeg
def test_a_file_is_streamed_block_by_block_and_only_waiting_for_ffmpeg_counts(tmp_path):
    source = convert(tone(tmp_path / "tone.wav", 44_100, 30.0), tmp_path / "tone.m4a")
    with ffmpeg.stream(source, timeout_seconds=5.0) as (rate_hz, blocks):
        first = next(blocks)
        time.sleep(5.5)
        assert len(first) + sum(map(len, blocks)) == pytest.approx(30 * rate_hz, abs=0.1 * rate_hz)
    waveform, rate_hz = files.read(source)
    assert waveform[4000:-4000].abs().max() == pytest.approx(0.5, abs=0.02) and rate_hz == 44_100


@needs_ffmpeg
def test_audioset_as_m4a_is_packed(tmp_path):
    write_classes(tmp_path)
    names = ["-0BIyqJj9ZU", "_bcdefghij-", "abcdefghijk"]
    write_segments(tmp_path, "eval", [(name, 30, [74]) for name in names])
    for number, name in enumerate(names):
        source = write_clip(tmp_path / ".wav" / f"{name}.wav", number)
        convert(source, tmp_path / "eval" / f"{name}.m4a")
    assert run(tmp_path, tmp_path / "out", "--workers", "2") == 0
    index = Index.load(tmp_path / "out")
    assert [index.key(i) for i in range(3)] == ["%2D0BIyqJj9ZU_30000", "_bcdefghij-_30000", "abcdefghijk_30000"]
    assert {index.extension(i) for i in range(3)} == {"flac"} and set(index.rate_hz) == {32_000}
    assert run(tmp_path, tmp_path / "kept", "--codec", "keep") == 2
    reasons = set(read_table(tmp_path / "kept" / "rejected.csv").values())
    assert reasons == {"m4a cannot be kept, only turned into FLAC (--codec flac)"}


def without_ffmpeg(*arguments: object) -> subprocess.CompletedProcess:
    """Run `pack` where the shell finds no program."""
    command = [sys.executable, "-m", "audiossl", "pack", *map(str, arguments)]
    environment = os.environ | {"PATH": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_without_ffmpeg_a_clip_is_rejected_with_what_to_install(tmp_path):
    write_clip(tmp_path / "a.wav")
    (tmp_path / "b.m4a").write_bytes(b"anything")
    write_table(tmp_path / "meta.csv", [("filename",), ("a.wav",), ("b.m4a",)])
    done = without_ffmpeg(tmp_path, "--out", tmp_path / "out", "--workers", 1)
    assert done.returncode == 1
    assert read_table(tmp_path / "out" / "rejected.csv") == {"b.m4a": ffmpeg.MISSING}
    assert "apt install ffmpeg" in ffmpeg.MISSING


def test_without_ffmpeg_a_corpus_of_m4a_stops_at_once_in_one_line(tmp_path):
    write_classes(tmp_path)
    write_segments(tmp_path, "eval", [("abcdefghijk", 0, [0])])
    (tmp_path / "abcdefghijk.m4a").write_bytes(b"anything")
    done = without_ffmpeg(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "its 1 clips are m4a, mp4, webm, aac, which needs the program ffmpeg" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plain_folder_is_packed_as_before_and_says_what_it_leaves_out(tmp_path, capsys):
    shutil.copy(write_clip(tmp_path / "a.wav"), tmp_path / "b.wav")
    (tmp_path / "a.m4a").write_bytes(b"anything")
    assert run(tmp_path, tmp_path / "out") == 0
    index = Index.load(tmp_path / "out")
    assert [index.key(i) for i in range(len(index))] == ["a", "b"]
    assert "1 m4a, mp4, webm, aac files are left out" in capsys.readouterr().err
