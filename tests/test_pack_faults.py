"""What cannot be packed is named and listed; what is there already is never overwritten."""

import fcntl
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
from packing import contents, read_table, run, tone

from audiossl.__main__ import main
from audiossl.index import Index
from audiossl.sound.audio import AudioError, to_flac


def test_a_pack_begun_with_other_arguments_or_files_says_so(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "broken.wav").write_bytes(b"")
    assert main(["pack", str(source), "--out", str(out)]) == 2  # none can be packed: the plan stays begun
    assert "none of the 1 files could be packed" in capsys.readouterr().err
    assert main(["pack", str(source), "--out", str(out), "--rate", "16000"]) == 2
    assert "rate_hz changed" in capsys.readouterr().err
    tone(source / "broken.wav", 32_000, 1.0)
    assert main(["pack", str(source), "--out", str(out)]) == 2
    assert "the files or their csv changed" in capsys.readouterr().err


def test_shards_of_somebody_else_are_never_overwritten(tmp_path, capsys):
    tone(tmp_path / "a.wav", 32_000, 1.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"precious")
    assert run(tmp_path, tmp_path / "out") == 2
    assert "holds shards already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"shard-000000.tar": b"precious"}


def damage(folder: Path) -> dict[str, str]:
    """Write one file of each kind that must be rejected, and a word of the reason."""
    noise, whole = np.random.default_rng(0).normal(0, 0.1, 96_000), {}
    for kind in ("flac", "wav", "ogg", "aiff"):
        soundfile.write(folder / f"ok.{kind}", noise, 32_000)
        whole[kind] = (folder / f"ok.{kind}").read_bytes()
    (folder / "zero.flac").write_bytes(b"")
    (folder / "page.wav").write_bytes(b"<html>not found</html>")
    (folder / "random.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    for kind, data in whole.items():
        (folder / f"half.{kind}").write_bytes(data[: len(data) // 2])
    (folder / "flipped.flac").write_bytes(whole["flac"][:9000] + b"\xff\x00" * 9 + whole["flac"][9018:])
    announcing = bytearray(whole["flac"])
    announcing[21] |= 0x0F  # total samples: 36 bits
    announcing[22:26] = b"\xff" * 4
    (folder / "bomb.flac").write_bytes(announcing)
    announcing[21] &= 0xF0
    announcing[22:26] = bytes(4)
    (folder / "endless.flac").write_bytes(announcing)
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        wave = np.zeros(1000, np.float32)
        wave[500] = value
        soundfile.write(folder / f"{name}.wav", wave, 32_000, subtype="FLOAT")
    soundfile.write(folder / "nothing.wav", np.zeros(0), 32_000)
    reasons = {"zero.flac": "zero bytes", "page.wav": "cannot be decoded", "random.mp3": "cannot be decoded"}
    reasons |= {"half.flac": "cannot be decoded", "half.wav": "cut", "half.ogg": "cut", "half.aiff": "cut"}
    reasons |= {"flipped.flac": "cannot be decoded", "bomb.flac": "announces", "endless.flac": "announces"}
    return reasons | {"nan.wav": "NaN or Inf", "inf.wav": "NaN or Inf", "nothing.wav": "no samples"}


@pytest.mark.parametrize("codec", ["flac", "keep"])
def test_every_kind_of_bad_file_is_rejected_with_its_reason_and_the_good_ones_are_packed(tmp_path, codec, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    reasons = damage(source)
    assert run(source, out, "--codec", codec) == 1
    assert f"{len(reasons)}, see" in capsys.readouterr().out
    rejected = read_table(out / "rejected.csv")
    assert rejected.keys() == reasons.keys()
    assert all(reasons[name] in rejected[name] for name in reasons)
    index = Index.load(out)
    assert [unquote(index.key(i)) for i in range(len(index))] == ["ok.aiff", "ok.flac", "ok.ogg", "ok.wav"]
    assert np.array_equal(index.num_frames, [96_000] * 4)


@pytest.mark.parametrize(("num_bad", "strict", "expected"), [(0, True, 0), (1, False, 0), (1, True, 1), (2, False, 1)])
def test_the_exit_code_is_1_past_one_percent_or_for_any_when_strict(tmp_path, num_bad, strict, expected):
    source = tmp_path / "source"
    source.mkdir()
    first = tone(source / "000.flac", 8_000, 0.2)
    for number in range(1, 100 - num_bad):
        shutil.copy(first, source / f"{number:03d}.flac")
    for number in range(num_bad):
        (source / f"bad{number}.flac").write_bytes(b"no audio")
    assert run(source, tmp_path / "out", "--workers", "1", *(["--strict"] if strict else [])) == expected
    assert len(Index.load(tmp_path / "out")) == 100 - num_bad


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\na.wav,x\n", "no column 'filename'"),
        ("filename,fold\na.wav,three\n", "line 2: fold 'three'"),
        ("filename,label\na.wav,x\na.wav,y\n", "line 3: 'a.wav' is listed twice"),
        ("filename,label\na.wav,x,y\n", "line 2: 3 values for 2 columns"),
        ("filename,label\nb.wav,x\n", "no audio that can be packed"),
    ],
)
def test_a_meta_csv_that_cannot_be_meant_is_one_line_naming_the_place(tmp_path, table, message, capsys):
    tone(tmp_path / "a.wav", 8_000, 0.1)
    (tmp_path / "meta.csv").write_text(table)
    assert run(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_clip_longer_than_the_limit_is_refused_before_it_is_decoded(tmp_path):
    soundfile.write(tmp_path / "long.flac", np.zeros(1000 * 3601, np.int16), 1000)
    with pytest.raises(AudioError, match="announces 3601 s"):
        to_flac(tmp_path / "long.flac", 32_000)


def test_packing_into_a_folder_in_use_by_another_process_is_refused(tmp_path, capsys):
    tone(tmp_path / "a.wav", 8_000, 0.1)
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    with open(tmp_path / "out" / ".pack" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(tmp_path, tmp_path / "out") == 2
    assert "another process is packing" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.tar"))
