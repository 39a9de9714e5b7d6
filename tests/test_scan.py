"""A stranger's shards, damaged in every way we know, are indexed as far as they are whole, and the rest is named."""

import csv
import io
import json
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from packing import DEMO

from audiossl.__main__ import main
from audiossl.index import Index
from audiossl.indexing.indexfile import read_index


def sound(kind: str = "flac", seed: int = 0) -> bytes:
    wave = np.random.default_rng(seed).normal(0, 0.1, 8_000)
    stream = io.BytesIO()
    soundfile.write(stream, wave, 16_000, format="OGG" if kind in ("ogg", "opus") else kind.upper())
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def label(name: str) -> bytes:
    return json.dumps({"labels": [name]}).encode()


def sample(key: str, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.flac", sound(seed=seed)), (f"{key}.json", label(key))]


def index(folder: Path, *options: str) -> int:
    return main(["index", f"{folder}/*.tar", *options])


def reasons(folder: Path) -> dict[str, str]:
    with open(folder / "rejected.csv", newline="", encoding="utf-8") as file:
        return {row["key"]: row["reason"] for row in csv.DictReader(file)}


def keys(folder: Path) -> list[str]:
    found = Index.load(folder)
    return [found.key(i) for i in range(len(found))]


def test_our_own_shards_get_the_index_that_pack_wrote(tmp_path):
    for path in DEMO.glob("*.tar"):
        shutil.copy(path, tmp_path)
    assert index(tmp_path) == 0
    (ours, _), (theirs, _) = read_index(DEMO / "index.safetensors"), read_index(tmp_path / "index.safetensors")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert Index.load(tmp_path).corpus_hash == Index.load(DEMO).corpus_hash
    assert not (tmp_path / "rejected.csv").exists()


def test_every_kind_of_audio_and_label_is_read(tmp_path):
    members = []
    for kind in ("flac", "wav", "ogg", "mp3"):
        members += [
            (f"{kind}.{kind}", sound(kind)),
            (f"{kind}.cls", b"7"),
            (f"{kind}.npy", b"x"),
            (f"{kind}.__meta__", b""),
        ]
    members += [("dir/text.FLAC", sound()), ("dir/text.txt", b"dog; cat\n")]
    members += [("j.wav", sound("wav")), ("j.json", b'{"label": 3, "split": "eval", "fold": 2, "url": "u"}')]
    write_tar(tmp_path / "a.tar", members)
    assert index(tmp_path) == 0
    found = Index.load(tmp_path)
    assert keys(tmp_path) == ["flac", "wav", "ogg", "mp3", "dir/text", "j"]
    assert [found.labels(i) for i in range(6)] == [["7"]] * 4 + [["dog", "cat"], ["3"]]
    assert (found.split(5), found.fold[5], found.extension(4)) == ("eval", 2, "flac")
    assert found.read(1) == sound("wav")


CUTS = {
    "in data": ("cut in the data of 'c.flac'", 2),
    "in a header": ("cut in a header", 2),
    "between members": ("no end marker", 2),
    "to nothing": ("zero bytes", 0),
    "in the middle": ("damaged header at byte", 2),
}


@pytest.mark.faults("D4")
@pytest.mark.parametrize("how", CUTS)
def test_the_five_kinds_of_damaged_tar_are_found_and_named(tmp_path, how, capsys):
    """D4, F21."""
    path = write_tar(tmp_path / "bad.tar", [*sample("a"), *sample("b"), *sample("c"), *sample("d")])
    write_tar(tmp_path / "good.tar", sample("e"))
    with tarfile.open(path) as tar:
        third = tar.getmember("c.flac")
    data = bytearray(path.read_bytes())
    data[third.offset + 100] ^= 0xFF if how == "in the middle" else 0
    ends = {"in data": third.offset_data + 700, "in a header": third.offset + 200, "between members": third.offset}
    path.write_bytes(data[: {**ends, "to nothing": 0}.get(how, len(data))])
    reason, num_whole = CUTS[how]
    assert index(tmp_path) == 1
    after = ["d"] if how == "in the middle" else []  # what follows a damaged header is found again
    assert keys(tmp_path) == ["a", "b"][:num_whole] + after + ["e"]
    assert reason in reasons(tmp_path)[""]
    printed = capsys.readouterr()
    assert f"bad.tar: {reason}" in printed.out + printed.err


@pytest.mark.faults("D5")
def test_a_cut_between_audio_and_label_pairs_with_nothing_in_the_next_shard(tmp_path):
    """D5, F22."""
    first = write_tar(tmp_path / "0.tar", [*sample("a"), ("b.flac", sound()), ("b.json", label("right"))])
    with tarfile.open(first) as tar:
        end = tar.getmember("b.json").offset
    first.write_bytes(first.read_bytes()[:end])
    write_tar(tmp_path / "1.tar", [("b.flac", sound(seed=1)), ("b.json", label("wrong")), *sample("z")])
    assert index(tmp_path) == 1
    found = Index.load(tmp_path)
    place = keys(tmp_path).index("b")
    assert (found.shard_path(place).name, found.labels(place)) == ("1.tar", ["wrong"])
    assert found.read(place) == sound(seed=1)


@pytest.mark.faults("D7", "S7")
def test_each_kind_of_bad_sample_is_left_out_with_its_own_reason(tmp_path):
    """D7, S7: a different reason for each kind, with shard and key."""
    bomb = bytearray(sound())
    bomb[21], bomb[22:26] = bomb[21] | 0x0F, b"\xff" * 4
    members = [*sample("twice"), ("twice.flac", sound(seed=1)), ("nolabel.flac", sound()), ("nosound.json", label("x"))]
    members += [("two.flac", sound()), ("two.wav", sound("wav")), ("two.json", label("x"))]
    members += [("broken.flac", sound()), ("broken.json", b"{"), ("deep.flac", sound()), ("deep.json", b"[" * 99_999)]
    members += [("cls.flac", sound()), ("cls.cls", b"dog"), ("zero.flac", b""), ("zero.json", label("x"))]
    members += [
        ("html.mp3", b"<html>" * 99),
        ("html.json", label("x")),
        ("bomb.flac", bytes(bomb)),
        ("bomb.json", label("x")),
    ]
    members += [
        ("../../up.flac", sound()),
        ("../../up.json", label("x")),
        ("/abs.flac", sound()),
        ("bell\a.flac", sound()),
    ]
    write_tar(tmp_path / "0.tar", [*members, *sample("good")])
    write_tar(tmp_path / "1.tar", [*sample("good", seed=1), *sample("other")])
    assert index(tmp_path) == 1
    expected = {"twice": "occurs twice", "nolabel": "audio without label", "nosound": "label without audio"}
    expected |= {"two": "more than one audio", "broken": "json cannot be read", "deep": "json cannot be read"}
    expected |= {"cls": "cls cannot be read", "zero": "zero bytes", "html": "cannot be decoded", "bomb": "announces"}
    expected |= {"../../up.flac": "climbs out", "../../up.json": "climbs out", "/abs.flac": "climbs out"}
    expected |= {"'bell\\x07.flac'": "control characters", "good": "key is also in 0.tar"}
    found = reasons(tmp_path)
    assert found.keys() == expected.keys()
    assert all(expected[key] in found[key] for key in expected)
    assert keys(tmp_path) == ["good", "other"]


@pytest.mark.faults("D6", "D7")
def test_interleaved_and_dotted_keys_never_mix(tmp_path):
    """D6, D7, F23."""
    members = [
        ("a.b.flac", sound(seed=1)),
        ("a.c.flac", sound(seed=2)),
        ("a.c.json", label("c")),
        ("a.b.json", label("b")),
    ]
    write_tar(tmp_path / "0.tar", [*members, *sample("0Kv_30.000"), *sample("__x__/y"), *sample("n" * 300)])
    assert index(tmp_path) == 0
    found = Index.load(tmp_path)
    assert keys(tmp_path) == ["a.b", "a.c", "0Kv_30.000", "__x__/y", "n" * 300]
    assert (found.labels(0), found.read(0)) == (["b"], sound(seed=1))
    assert (found.labels(1), found.read(1)) == (["c"], sound(seed=2))


def test_shards_of_audio_alone_are_unlabelled_and_whole(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.flac", sound()), ("b.flac", sound())])
    assert index(tmp_path) == 0
    assert keys(tmp_path) == ["a", "b"] and Index.load(tmp_path).vocabulary == []


def test_links_and_devices_are_left_out_and_nothing_is_unpickled(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = write_tar(
        tmp_path / "0.tar", [*sample("a"), ("a.pyd", pickle.dumps(Evil())), ("a.pth", pickle.dumps(Evil()))]
    )
    with tarfile.open(path, "a") as tar:
        for name, kind in (("l.flac", tarfile.SYMTYPE), ("h.flac", tarfile.LNKTYPE), ("d.flac", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert index(tmp_path) == 1
    assert keys(tmp_path) == ["a"] and not marker.exists()
    assert {"l.flac", "h.flac", "d.flac"} == reasons(tmp_path).keys()


@pytest.mark.faults("S8")
@pytest.mark.parametrize("size", [2**40, -512])
def test_a_header_that_announces_an_impossible_size_costs_neither_memory_nor_time(tmp_path, size):
    path = write_tar(tmp_path / "0.tar", sample("a"))
    info = tarfile.TarInfo("b.flac")
    info.size = size
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    path.write_bytes(whole + info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    start = time.monotonic()
    assert index(tmp_path) == 1
    assert time.monotonic() - start < 5
    assert keys(tmp_path) == ["a"] and "" in reasons(tmp_path)


@pytest.mark.faults("S8")
def test_a_compressed_tar_and_no_tar_at_all_are_said_to_be_so(tmp_path, capsys):
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.flac"))
    assert index(tmp_path) == 2
    assert "gunzip" in capsys.readouterr().err
    (tmp_path / "gz.tar").write_bytes(b"<html>" * 1000)
    assert index(tmp_path) == 2
    error = capsys.readouterr().err
    assert "0 samples with audio in the 1 shards" in error and "not a tar" in error
    assert not (tmp_path / "index.safetensors").exists()


@pytest.mark.parametrize(("num_bad", "expected"), [(0, 0), (1, 0), (2, 1)])
def test_the_exit_code_is_1_past_one_percent_left_out(tmp_path, num_bad, expected):
    data = sound()
    members = [(f"{i:03d}.flac", data if i >= num_bad else b"no audio") for i in range(100)]
    write_tar(tmp_path / "0.tar", members)
    assert index(tmp_path) == expected
    assert len(Index.load(tmp_path)) == 100 - num_bad


def test_the_index_may_lie_elsewhere_and_cover_several_folders(tmp_path, capsys):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", sample(name))
    (tmp_path / "indexes").mkdir()
    out = tmp_path / "indexes" / "both.safetensors"
    assert main(["index", f"{tmp_path}/*/0.tar", "--out", str(out)]) == 0
    found = Index.load(out)
    assert [found.key(i) for i in range(2)] == ["x", "y"] and found.read(1) == sound()
    assert main(["index", f"{tmp_path}/*/0.tar"]) == 0
    assert keys(tmp_path) == ["x", "y"]
    assert Index.load(f"{tmp_path}/*/0.tar").key(1) == "y" and Index.load(f"{tmp_path}/y/*.tar").key(0) == "y"
    assert main(["index", f"{tmp_path}/*/0.tar", "--out", str(tmp_path / "no" / "i.safetensors")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
