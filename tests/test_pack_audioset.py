"""AudioSet as laboratories have it, incomplete and under many names, becomes shards with the published labels."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import webdataset as wds
from audiosets import REAL_CLASSES, write_audioset, write_classes, write_clip, write_segments
from packing import ROOT, contents, read_table, run, tone, write_table

from audiossl.index import Index
from audiossl.indexing.indexfile import write_index
from audiossl.sound.audio import decode


def command(source: Path, out: Path, *options: object) -> list[str]:
    words = [sys.executable, "-m", "audiossl", "pack", source, "--out", out, "--shard-size", "500kB", *options]
    return [str(word) for word in words]


def call(source: Path, out: Path, *options: object, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(source, out, *options), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def keys_of(index: Index) -> dict[str, int]:
    return {unquote(index.key(i)): i for i in range(len(index))}


@pytest.fixture(scope="module")
def audioset(tmp_path_factory) -> Path:
    return write_audioset(tmp_path_factory.mktemp("audioset"), num_per_split=12)


@pytest.fixture(scope="module")
def packed(audioset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    call(audioset, out, "--workers", 1)
    return out


def test_label_ids_are_the_published_class_indices(packed):
    index = Index.load(packed)
    assert len(index.vocabulary) == 527
    assert all(index.vocabulary[i] == name for i, (_, name) in REAL_CLASSES.items())
    assert index.label_ids(0).tolist() == [137, 0] and index.labels(0) == ["Music", "Speech"]


def test_splits_keys_and_json_say_what_the_tables_say(audioset, packed):
    index = Index.load(packed)
    assert [len(index.select(split=split)) for split in ("balanced_train", "unbalanced_train", "eval")] == [12, 12, 12]
    clip = keys_of(index)["-eval_00003_30000"]
    assert index.split(clip) == "eval"
    expected = {"mids": ["/m/04rlf", "/m/09x0r"], "ytid": "-eval_00003", "start_seconds": 30.0, "end_seconds": 40.0}
    expected |= {"labels": ["Music", "Speech"], "source": "eval_segments/Y-eval_00003.wav", "split": "eval"}
    found = index.read_meta(clip)
    assert {name: found[name] for name in expected} == expected
    source, rate_hz = decode(audioset / "eval_segments" / "Y-eval_00003.wav")
    assert index.seconds[clip] == pytest.approx(len(source) / rate_hz, abs=1e-4)


def test_webdataset_reads_the_shards_as_they_are(packed):
    index = Index.load(packed)
    shards = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [index.key(i) for i in range(len(index))]
    assert all(json.loads(sample["json"])["mids"] == ["/m/04rlf", "/m/09x0r"] for sample in samples)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_pack_killed_in_this_layout_goes_on_and_ends_with_the_same_bytes(audioset, packed, tmp_path, workers):
    out = tmp_path / "killed"
    words = command(audioset, out, "--workers", workers)
    for num_shards in (2, 4):
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(list(out.glob("shard-*.tar"))) < num_shards and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "index.safetensors").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    call(audioset, out, "--workers", workers)
    assert contents(out) == contents(packed)
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())


def test_another_table_over_the_same_files_is_another_corpus(audioset, packed, tmp_path):
    other = shutil.copytree(audioset, tmp_path / "audioset")
    table = other / "eval_segments.csv"
    table.write_text(table.read_text().replace("/m/04rlf", "/m/0bt9lr", 1))
    done = call(other, shutil.copytree(packed, tmp_path / "out"), expect=2)
    assert "holds another corpus (fingerprint differ)" in done.stderr


NAMES = [  # each names the segment of -0BIyqJj9ZU at 30 s
    "-0BIyqJj9ZU.wav",
    "Y-0BIyqJj9ZU.flac",
    "-0BIyqJj9ZU_30.000.flac",
    "-0BIyqJj9ZU_30000.ogg",
    "-0BIyqJj9ZU_30.wav",
    "-0BIyqJj9ZU_30000_40000.WAV",
    "Y-0BIyqJj9ZU_30.000_40.000.wav",
    "-0BIyqJj9ZU_30-40.mp3",
    "unbalanced_train_segments/unbalanced_train_segments_part07/Y-0BIyqJj9ZU.wav",
    "_/0/-0BIyqJj9ZU_30.000.flac",
]


@pytest.mark.parametrize("name", NAMES)
def test_common_namings_find_their_segment(tmp_path, name):
    write_classes(tmp_path)
    write_segments(tmp_path, "unbalanced_train", [("-0BIyqJj9ZU", 30, [74]), ("-0bIyqJj9ZU", 30, [0])])
    write_clip(tmp_path / name)
    assert run(tmp_path, tmp_path / "out", "--workers", "1") == 0
    index = Index.load(tmp_path / "out")
    assert keys_of(index) == {"-0BIyqJj9ZU_30000": 0} and index.labels(0) == ["Dog"]
    assert index.key(0) == "%2D0BIyqJj9ZU_30000"  # a leading dash is an option to tar
    assert read_table(tmp_path / "out" / "rejected.csv") == {"-0bIyqJj9ZU_30000": "file is missing"}


def test_several_segments_of_one_video_stay_apart(tmp_path):
    write_classes(tmp_path)
    write_segments(tmp_path, "eval", [("aaaaaaaaaaa", 0, [0]), ("aaaaaaaaaaa", 30, [74]), ("bbbbbbbbbbb", 10, [0])])
    write_segments(tmp_path, "balanced_train", [("bbbbbbbbbbb", 10_000, [137]), ("ccccccccccc", 0, [131])])
    write_segments(tmp_path, "unbalanced_train", [("ccccccccccc", 90, [526])])
    for name in ("aaaaaaaaaaa_0.wav", "aaaaaaaaaaa_30.wav", "aaaaaaaaaaa_60.wav", "aaaaaaaaaaa.wav"):
        write_clip(tmp_path / name)
    write_clip(tmp_path / "bbbbbbbbbbb_10000.wav")  # 10,000 s or 10,000 ms
    write_clip(tmp_path / "balanced_train" / "ccccccccccc.wav")
    write_clip(tmp_path / "unbalanced_train" / "ccccccccccc.wav")
    assert run(tmp_path, tmp_path / "out") == 1
    index = Index.load(tmp_path / "out")
    found = {key: (index.labels(i), index.split(i)) for key, i in keys_of(index).items()}
    assert found == {
        "aaaaaaaaaaa_0": (["Speech"], "eval"),
        "aaaaaaaaaaa_30000": (["Dog"], "eval"),
        "ccccccccccc_0": (["Bee, wasp, etc."], "balanced_train"),
        "ccccccccccc_90000": (["Field recording"], "unbalanced_train"),
    }
    rejected = read_table(tmp_path / "out" / "rejected.csv")
    assert "could be 2 segments (aaaaaaaaaaa_0, aaaaaaaaaaa_30000)" in rejected.pop("aaaaaaaaaaa.wav")
    assert "could be 2 segments" in rejected.pop("bbbbbbbbbbb_10000.wav")
    assert rejected == dict.fromkeys(("bbbbbbbbbbb_10000", "bbbbbbbbbbb_10000000"), "file is missing")


def test_ids_that_differ_in_case_only_are_two_clips(tmp_path):
    write_classes(tmp_path)
    write_segments(tmp_path, "eval", [("abcdefghijk", 0, [0]), ("ABCDEFGHIJK", 0, [74])])
    write_clip(tmp_path / "a" / "abcdefghijk.wav")
    write_clip(tmp_path / "b" / "ABCDEFGHIJK.wav")
    assert run(tmp_path, tmp_path / "out") == 0
    index = Index.load(tmp_path / "out")
    labels = {key: index.labels(i) for key, i in keys_of(index).items()}
    assert labels == {"abcdefghijk_0": ["Speech"], "ABCDEFGHIJK_0": ["Dog"]}


def test_of_two_files_of_a_segment_the_first_by_name_is_packed_and_the_other_counted(tmp_path, capsys):
    write_classes(tmp_path)
    write_segments(tmp_path, "eval", [("abcdefghijk", 0, [0])])
    for name in ("z/abcdefghijk.wav", "b/abcdefghijk_0.wav", "c/Yabcdefghijk.wav", "c/stranger.wav"):
        write_clip(tmp_path / name)
    assert run(tmp_path, tmp_path / "out") == 0
    assert Index.load(tmp_path / "out").read_meta(0)["source"] == "b/abcdefghijk_0.wav"
    assert "3 audio files, left out, 2 of them second files of a segment" in capsys.readouterr().out


@pytest.mark.parametrize(("num_bad", "strict", "expected"), [(0, True, 0), (0, False, 0), (1, True, 1), (2, False, 1)])
def test_missing_files_are_listed_but_only_rejected_ones_make_the_exit_code_1(tmp_path, num_bad, strict, expected):
    write_classes(tmp_path)
    names = [f"abcdefg{number:04d}" for number in range(300)]
    write_segments(tmp_path, "eval", [(name, 0, [0]) for name in names])
    first = tone(tmp_path / f"{names[0]}.flac", 8_000, 0.2)
    for name in names[1 : 100 - num_bad]:
        shutil.copy(first, tmp_path / f"{name}.flac")
    for name in names[100 - num_bad : 100]:
        (tmp_path / f"{name}.flac").write_bytes(b"no audio")
    done = call(tmp_path, tmp_path / "out", "--workers", 1, *(["--strict"] if strict else []), expect=expected)
    reasons = list(read_table(tmp_path / "out" / "rejected.csv").values())
    assert reasons.count("file is missing") == 200 and len(reasons) == 200 + num_bad
    assert f"rejected        {num_bad}, see" in done.stdout
    assert "missing         200 segments without a file" in done.stdout
    assert Index.load(tmp_path / "out").meta["pack"]["absent"] == 200


def test_a_file_much_longer_than_its_segment_is_not_given_its_labels(tmp_path):
    write_classes(tmp_path)
    write_segments(tmp_path, "eval", [("abcdefghijk", 0, [0]), ("bbcdefghijk", 0, [0])])
    tone(tmp_path / "abcdefghijk.flac", 8_000, 240.0)
    tone(tmp_path / "bbcdefghijk.flac", 8_000, 10.4)
    for codec in ("flac", "keep"):
        out = tmp_path / "out" / codec
        assert run(tmp_path, out, "--codec", codec) == 1
        assert read_table(out / "rejected.csv") == {"abcdefghijk.flac": "announces 240 s, more than the limit of 20 s"}
        assert keys_of(Index.load(out)) == {"bbcdefghijk_0": 0}


def test_the_tables_may_lie_elsewhere_and_are_then_named(audioset, packed, tmp_path):
    tables, audio = tmp_path / "tables", tmp_path / "audio"
    shutil.copytree(audioset, audio, ignore=shutil.ignore_patterns("*.csv"))
    tables.mkdir()
    for path in audioset.glob("*.csv"):
        shutil.copy(path, tables)
    segments = sorted(tables.glob("*_segments.csv"))
    call(audio, tmp_path / "out", "--segments", *segments, "--classes", tables / "class_labels_indices.csv")
    assert contents(tmp_path / "out") == contents(packed)
    call(audio, tmp_path / "eval", "--segments", tables / "eval_segments.csv")
    assert Index.load(tmp_path / "eval").splits == ["eval"]


def test_a_meta_csv_comes_before_tables_that_are_not_named(tmp_path):
    write_classes(tmp_path)
    write_segments(tmp_path, "eval", [("abcdefghijk", 0, [0])])
    write_clip(tmp_path / "abcdefghijk.wav")
    write_table(tmp_path / "meta.csv", [("filename", "label"), ("abcdefghijk.wav", "mine")])
    assert run(tmp_path, tmp_path / "one") == 0 and Index.load(tmp_path / "one").vocabulary == ["mine"]
    assert run(tmp_path, tmp_path / "two", "--segments", str(tmp_path / "eval_segments.csv")) == 0
    assert Index.load(tmp_path / "two").labels(0) == ["Speech"]


def test_what_cannot_be_meant_is_one_line(tmp_path, capsys):
    table = write_segments(tmp_path, "eval", [("abcdefghijk", 0, [0])])
    write_clip(tmp_path / "Qabcdefghijk.wav")
    cases = [((), "eval_segments.csv but no class_labels_indices.csv; put it there or name it with --classes")]
    cases += [(("--segments", str(tmp_path / "gone.csv")), "name it with --classes")]
    for options, message in cases:
        assert run(tmp_path, tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    write_classes(tmp_path)
    cases = [((), "1 audio files, none named after a segment; names such as Yabcdefghijk.wav")]
    cases += [
        (("--segments", str(table), str(table)), "more than once"),
        (("--classes", "gone.csv"), "gone.csv is no file"),
    ]
    for options, message in cases:
        assert run(tmp_path, tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_given_vocabulary_keeps_its_order_and_its_absent_names(tmp_path):
    row = ["k", "flac", 512, 10, 100, 8000, 1, ["b", "c"], None, None]
    shard = {"name": "a.tar", "bytes": 2048, "sha256": "0" * 64, "rows": [row]}
    meta = write_index(tmp_path / "index.safetensors", [shard], vocabulary=["c", "z", "b"])
    (tmp_path / "a.tar").write_bytes(bytes(2048))
    index = Index.load(tmp_path)
    assert index.vocabulary == meta["vocabulary"] == ["c", "z", "b"]
    assert np.array_equal(index.label_ids(0), [2, 0]) and index.labels(0) == ["b", "c"]
