"""The index says what the tars say, loads at two million rows, and finds the damage a shard has taken."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from packing import DEMO, ROOT

from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import take_ragged, write_index
from audiossl.indexing.shardpaths import expand
from audiossl.sound.audio import EXTENSIONS


@pytest.fixture
def shards(tmp_path) -> Path:
    """Copy the demo's shards and index."""
    return shutil.copytree(DEMO, tmp_path / "shards")


def test_the_index_equals_what_tarfile_and_soundfile_say():
    index = Index.load(DEMO)
    at = 0
    for path in sorted(DEMO.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for sound, text in zip(members[::2], members[1::2], strict=True):
                meta = json.load(tar.extractfile(text))
                info = soundfile.info(io.BytesIO(tar.extractfile(sound).read()))
                assert sound.name == f"{index.key(at)}.{index.extension(at)}" and text.name == f"{index.key(at)}.json"
                assert (index.shard_path(at), index.offset[at], index.size[at]) == (path, sound.offset_data, sound.size)
                found = (index.num_frames[at], index.rate_hz[at], index.channels[at])
                assert found == (info.frames, info.samplerate, info.channels)
                assert index.seconds[at] == pytest.approx(info.duration)
                fold = None if index.fold[at] < 0 else index.fold[at]
                assert (index.labels(at), index.split(at), fold) == (meta["labels"], meta["split"], meta["fold"])
                assert index.read_meta(at) == meta
                at += 1
    assert at == len(index) == index.meta["counts"]["clips"]
    assert index.meta["counts"]["seconds"] == pytest.approx(float(index.seconds.sum()))


def test_the_demo_set_has_three_kinds_and_balanced_folds_and_nothing_non_commercial():
    index = Index.load(DEMO)
    kinds = [index.read_meta(i) for i in range(len(index))]
    assert {meta["kind"] for meta in kinds} == {"speech", "music", "environment"}
    assert not any(word in meta["licence"] for meta in kinds for word in ("NC", "Sampling"))
    counts = [
        np.bincount([index.label_ids(i)[0] for i in index.select(split, folds)], minlength=10).tolist()
        for split, folds in (("train", [1, 2, 3]), ("test", [4, 5]))
    ]
    assert counts == [[9] * 10, [6] * 10]
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 15_000_000
    sources = (DEMO.parent / "SOURCES.md").read_text()
    assert all(f"/{index.key(i).split('-')[1]}/" in sources for i in index.select(folds=[1, 2, 3, 4, 5]))


def test_a_glob_of_some_shards_selects_their_clips():
    whole = Index.load(DEMO)
    part = Index.load(f"{DEMO}/shard-{{000001..000002}}.tar")
    ids = np.flatnonzero(whole.shard >= 1)
    assert len(part) == len(ids) < len(whole)
    for i, j in enumerate(ids):
        assert (part.key(i), part.labels(i), part.split(i)) == (whole.key(j), whole.labels(j), whole.split(j))
        assert part.read(i) == whole.read(j)
    assert part.corpus_hash != whole.corpus_hash
    for same in (DEMO / "index.safetensors", f"{DEMO}/shard-*.tar", f"{DEMO}/shard-00000{{0,1,2}}.tar"):
        assert Index.load(same).corpus_hash == whole.corpus_hash
        assert len(Index.load(same)) == len(whole)


def test_select_gives_ids_of_splits_and_folds():
    index = Index.load(DEMO)
    train, test = index.select(split="train"), index.select(split="test")
    assert np.array_equal(np.sort(np.concatenate([train, test])), index.select())
    assert train.dtype == np.int64 and set(index.fold[test]) == {4, 5}
    assert np.array_equal(index.select(folds=[4, 5]), test)
    for wrong, message in (
        ({"split": "tran"}, "'tran'"),
        ({"folds": [6]}, r"\[6\]"),
        ({"split": "test", "folds": [1]}, "0 of"),
    ):
        with pytest.raises(UserError, match=message):
            index.select(**wrong)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere/shard-*.tar", "matches no file"),
        ("nowhere/index.safetensors", "does not exist"),
        ("", "no shards given"),
        ("pipe:cat shard.tar", "'pipe:' is not allowed"),
        ("http://host/shard.tar", "'http:' is not allowed"),
        ("gs://bucket/shard.tar", "'gs:' is not allowed"),
        ("file:///etc/passwd", "'file:' is not allowed"),
        ("-", "'-' is not allowed"),
        ("{0..999999999}.tar", "more than"),
        ("{0..9999}{0..9999}.tar", "more than"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        Index.load(pattern)


def test_shards_without_an_index_are_offered_the_command_that_builds_it(shards):
    (shards / "index.safetensors").unlink()
    for pattern in (shards, f"{shards}/shard-*.tar"):
        with pytest.raises(UserError, match=r"no index; build it: python -m audiossl index .*\.tar"):
            Index.load(pattern)
    (shards / "empty").mkdir()
    with pytest.raises(UserError, match="holds no shards; pack a folder"):
        Index.load(shards / "empty")


def test_a_missing_cut_or_unlisted_shard_is_named_when_the_index_is_loaded(shards):
    second = shards / "shard-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:-512])
    with pytest.raises(UserError, match="shard-000001.tar has .* cut or replaced"):
        Index.load(shards)
    second.unlink()
    with pytest.raises(UserError, match="shard-000001.tar is missing"):
        Index.load(shards)
    assert len(Index.load(shards / "shard-000002.tar"))
    second.mkdir()
    with pytest.raises(UserError, match="shard-000001.tar is no file"):
        Index.load(shards)
    (shards / "other.tar").write_bytes(whole)
    with pytest.raises(UserError, match="other.tar is not in"):
        Index.load(f"{shards}/other.tar")


@pytest.mark.faults("D11")
def test_verify_finds_a_shard_replaced_by_one_of_the_same_size(shards):
    Index.load(shards).verify()
    data = bytearray((shards / "shard-000002.tar").read_bytes())
    data[100_000] ^= 1
    (shards / "shard-000002.tar").write_bytes(data)
    with pytest.raises(UserError, match="shard-000002.tar; fetch or pack"):
        Index.load(shards).verify()


@pytest.mark.parametrize("where", [0, 4, 100, 3000, -1])
def test_a_damaged_index_is_one_clear_line(shards, where):
    path = shards / "index.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:where] if where > 4 or where < 0 else b"\xff" * where + data[where:] if where else b"")
    with pytest.raises(UserError, match="index.safetensors"):
        Index.load(shards)


@pytest.mark.parametrize(
    ("column", "value"),
    [("offset", 10**12), ("offset", -1), ("shard", 9), ("label_ids", 10), ("extension", 99), ("split", 7)],
)
def test_an_index_that_points_outside_is_refused(shards, column, value):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = shards / "index.safetensors"
    with safe_open(path, "numpy") as file:
        columns, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    columns[column][0] = value
    save_file(columns, path, metadata=metadata)
    with pytest.raises(UserError, match="damaged"):
        Index.load(shards)


def test_ragged_rows_are_taken_in_any_order():
    values, ends = np.arange(6), np.array([2, 2, 5, 6])
    taken, new_ends = take_ragged(values, ends, np.array([3, 1, 0]))
    assert taken.tolist() == [5, 0, 1] and new_ends.tolist() == [1, 1, 3]
    assert take_ragged(values, ends, np.array([], int))[1].tolist() == []


def test_expand_sorts_and_gives_each_file_once(tmp_path):
    for name in ("b.tar", "a.tar", "[x].tar"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in expand(f"{tmp_path}/{{b,a,b}}.tar")] == ["a.tar", "b.tar"]
    assert [path.name for path in expand(f"{tmp_path}/[x].tar")] == ["[x].tar"]
    with pytest.raises(UserError, match="c.tar of .* is missing"):
        expand(f"{tmp_path}/{{a,c}}.tar")


LOAD = """
import re, sys, time
start = time.monotonic()
from audiossl.index import Index
index = Index.load(sys.argv[1])
assert len(index.select(split="train")) and index.key(len(index) - 1) and index.labels(len(index) // 2)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())  # ru_maxrss counts the parent before exec
print(len(index), time.monotonic() - start, int(peak.group(1)) / 1e6)
"""


def million_rows(folder: Path, num_clips: int) -> None:
    per_shard, size = 5_000, 200_000
    for number in range(num_clips // per_shard):
        with open(folder / f"shard-{number:06d}.tar", "wb") as file:
            os.truncate(file.fileno(), per_shard * size)

    def shard(number: int) -> dict:
        shape = (size, 320_000, 32_000, 1, [f"/m/{(number * 7 + i) % 527:04x}" for i in range(3)], "train", None)
        rows = [(f"Y{number:06d}{i:05d}", EXTENSIONS[0], i * size, *shape) for i in range(per_shard)]
        return {"name": f"shard-{number:06d}.tar", "bytes": per_shard * size, "sha256": "0" * 64, "rows": rows}

    write_index(folder / "index.safetensors", map(shard, range(num_clips // per_shard)))


@pytest.mark.slow
def test_two_million_rows_load_in_under_10_s_and_1_gb(tmp_path):
    million_rows(tmp_path, 2_000_000)
    command = [sys.executable, "-c", LOAD, tmp_path]
    num_clips, seconds, gigabytes = subprocess.check_output(command, cwd=ROOT, text=True).split()
    assert int(num_clips) == 2_000_000
    assert float(seconds) < 10
    assert float(gigabytes) < 1
