"""Shards that are not what their index says: never a silent loss, never audio under another clip's label."""

import csv
import os
import shutil
import tarfile
import time

import numpy as np
import pytest
from commands import pack_folder
from damaged import FRAMES, PER_SHARD, damage, flip, rename, sound, write_folder
from tiny_shards import audio, clip, data_of, noise, train_batches, write_shards

from audiossl.__main__ import main
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.sound.audio import AudioError


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Damage a folder in many ways at once: the folder, the clips lost with shards, and those that are bad."""
    folder = tmp_path_factory.mktemp("damaged") / "theirs"
    return folder, *damage(write_folder(folder))


def whole_epoch(folder, run_dir, **changes):
    data = data_of(str(folder), damaged_shards="skip", crop_seconds=FRAMES / 8000, run_dir=run_dir, **changes)
    return data, train_batches(data, max_steps=-(-data.num_clips // data.batch_size))


@pytest.mark.faults("D1", "D4", "D5", "D11")
@pytest.mark.parametrize(("num_workers", "cache_mb"), [(0, 0), (1, 8)])
def test_a_folder_damaged_in_many_ways_loses_just_what_is_damaged_and_pairs_nothing_wrongly(
    damaged, tmp_path, num_workers, cache_mb
):
    """D1, D4, D5, D11, F22: every clip that is trained on is heard as itself, and every other is listed with reason."""
    folder, lost, bad = damaged
    data, batches = whole_epoch(folder, tmp_path, num_workers=num_workers, cache_mb=cache_mb)
    names = {data.index.key(i): i for i in range(len(data.index))}
    heard = {names[key]: row for batch in batches for key, row in zip(batch.key, batch.waveform.numpy(), strict=True)}
    assert set(heard) == set(range(len(data.index))) - lost - set(bad)
    assert all(np.array_equal(np.resize(row, FRAMES), sound(i)) for i, row in heard.items())
    assert all(data.index.labels(i) == [f"label of {data.index.key(i)}"] for i in heard)
    with open(tmp_path / "bad_clips.csv", newline="", encoding="utf-8") as file:
        listed = {names[row["key"]]: row for row in csv.DictReader(file)}
    assert set(listed) == lost | set(bad) and len(data.bad_clips.lost) == len(lost)
    assert all(listed[i]["shard"] == str(data.index.shard_path(i)) for i in listed)
    assert not {i: listed[i]["reason"] for i in bad if bad[i] not in listed[i]["reason"]}
    assert {listed[i]["reason"].rpartition(" ")[0] for i in lost} == {"its shard ends at byte", "its shard is"}


def cut(index: Index, how: str) -> set[int]:
    """Damage the second shard in one of D4's ways; returns the clips that are gone."""
    first, path = PER_SHARD, index.shards[1]
    place = int(index.offset[first + 5])
    if how == "corrupt header":
        flip(index, first + 5, -512 + 3)
        return {first + 5}
    ends = {"member boundary": place - 512, "in a header": place - 300, "in data": place + 99, "0 bytes": 0}
    os.truncate(path, ends[how])
    return set(range(first if how == "0 bytes" else first + 5, 2 * PER_SHARD))


CUTS = ("member boundary", "in a header", "in data", "0 bytes", "corrupt header")


@pytest.mark.faults("D4")
@pytest.mark.parametrize("how", CUTS)
def test_each_of_the_five_cuts_stops_or_costs_exactly_the_clips_that_are_gone(tmp_path, how):
    """D4, with the index that was made before."""
    index = write_folder(tmp_path / "theirs")
    gone = cut(index, how)
    if how == "corrupt header":  # of the same size: found by --verify, or when the clip is read
        assert main(["index", str(tmp_path / "theirs"), "--verify"]) == 2
    else:
        with pytest.raises(UserError, match=r"part-1.tar has \d+ bytes where the index says .*damaged_shards=skip"):
            data_of(str(tmp_path / "theirs"))
    data, batches = whole_epoch(tmp_path / "theirs", tmp_path)
    missing = {*data.bad_clips.lost, *data.bad_clips.bad}
    assert missing == gone
    assert sum(map(len, batches)) + data.bad_clips.visits_skipped == 4 * len(batches)
    assert {key for batch in batches for key in batch.key} == {index.key(i) for i in set(range(len(index))) - gone}


@pytest.mark.faults("D4")
@pytest.mark.parametrize("how", CUTS)
def test_indexing_cut_shards_anew_says_how_many_of_the_clips_of_the_index_before_are_gone(tmp_path, how, capsys):
    """D4 without the index that was made before: what is whole is found, and the rest is counted where it is known."""
    before = write_folder(tmp_path / "theirs")
    gone = {before.key(i) for i in cut(before, how)}
    assert main(["index", f"{tmp_path}/theirs/*.tar"]) == 1
    after = Index.load(tmp_path / "theirs")
    assert {after.key(i) for i in range(len(after))} == {before.key(i) for i in range(len(before))} - gone
    assert f"{len(gone)} of the {len(before)} clips of the index before" in capsys.readouterr().out
    with open(tmp_path / "theirs" / "rejected.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert gone == {row["key"] for row in rows if row["reason"].startswith("gone: it was in the index before")}
    (tmp_path / "theirs" / "index.safetensors").unlink()  # nobody knows any more what was beyond the cut
    assert main(["index", f"{tmp_path}/theirs/*.tar"]) == 1


@pytest.mark.faults("D8")
def test_a_shard_that_the_glob_would_match_is_missed(tmp_path):
    """D8: a glob finds what is there, so the index has to say what is not."""
    index = write_folder(tmp_path / "theirs")
    index.shards[3].unlink()
    for pattern in ("*.tar", "part-?.tar", "part-[0-9].tar"):
        with pytest.raises(UserError, match="part-3.tar is missing"):
            Index.load(f"{tmp_path}/theirs/{pattern}")
    assert len(Index.load(f"{tmp_path}/theirs/part-[0-2].tar")) == 3 * PER_SHARD
    for pattern in ("*.tar", "part-{0..7}.tar"):
        assert len(Index.load(tmp_path / "theirs" / pattern, damaged_shards="skip").lost) == PER_SHARD
    with pytest.raises(UserError, match=r"part-3.tar of .*part-\{0..7\}.tar is missing"):
        Index.load(tmp_path / "theirs" / "part-{0..7}.tar")


@pytest.mark.faults("D3", "D4")
def test_lost_clips_count_against_the_limit_before_anything_is_trained(tmp_path):
    """D3, D4."""
    index = write_folder(tmp_path / "theirs")
    index.shards[3].unlink()
    with pytest.raises(UserError, match=r"^12 of 96 clips .* limit of 0.1: .* in .*part-3.tar: its shard is missing"):
        data_of(str(tmp_path / "theirs"), damaged_shards="skip", max_bad_fraction=0.1, run_dir=tmp_path)
    assert (tmp_path / "bad_clips.csv").read_text().count("part-3.tar") == PER_SHARD
    data = data_of(str(tmp_path / "theirs"), damaged_shards="skip", max_bad_fraction=0.13)
    assert data.num_clips == 84 and data.corpus_hash != index.corpus_hash


def test_held_out_clips_stay_the_same_when_a_shard_is_lost(tmp_path):
    index = write_folder(tmp_path / "theirs")
    before = data_of(str(tmp_path / "theirs"), validation_clips=20).held_out
    index.shards[3].unlink()
    data = data_of(str(tmp_path / "theirs"), validation_clips=20, damaged_shards="skip")
    assert data.held_out.tolist() == [i for i in before.tolist() if i not in range(36, 48)]
    assert data.num_clips + data.num_validation_clips == 84


@pytest.mark.faults("D11", "D5")
def test_a_shard_replaced_by_another_of_the_same_size_is_never_heard_under_its_labels(tmp_path):
    """D11, F22: also by the probe and the pictures, which read through the index."""
    index = write_folder(tmp_path / "theirs")
    rename(index, 70, "somebody_else.flac")
    with pytest.raises(AudioError, match="'somebody_else.flac' lies in its place"):
        index.read(70)
    _, batches = whole_epoch(tmp_path / "theirs", None)
    assert {entry.key for batch in batches for entry in batch.skipped} == {index.key(70)}
    with pytest.raises(UserError, match="part-5.tar"):
        index.verify()


@pytest.mark.faults("D6", "D11")
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_format_and_length_are_told_apart(tmp_path, tar_format):
    """D6, D11: names over 100 bytes, or not ASCII, lie in headers of their own, or in two fields."""
    stem = "folder" + "x" * 60 + "/" + "y" * (20 if tar_format == tarfile.USTAR_FORMAT else 180)
    names = [f"{stem}{end}" for end in "abc"] + ["z" * 95, "./dotted.key.1", "Über/ß"]
    if tar_format == tarfile.USTAR_FORMAT:
        names = [name.replace("Über/ß", "plain") for name in names]
    (tmp_path / "names").mkdir()
    with tarfile.open(tmp_path / "names" / "0.tar", "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            (tmp_path / "clip").write_bytes(audio(noise(number, 900)))
            tar.add(tmp_path / "clip", f"{name}.FLAC")
    assert main(["index", f"{tmp_path}/names/*.tar"]) == 0
    index = Index.load(tmp_path / "names")
    assert [index.read(i) for i in range(len(names))] == [audio(noise(n, 900)) for n in range(len(names))]
    index._columns["key_bytes"] = index._columns["key_bytes"].copy()
    for end in index._columns["key_ends"]:
        index._columns["key_bytes"][end - 1] ^= 1  # the last letter of every key
    for i in range(len(names)):
        with pytest.raises(AudioError, match="lies in its place"):
            index.read(i)


def test_our_own_shards_pass_the_check_of_names(tmp_path):
    index = Index.load(pack_folder(tmp_path, 5))
    assert all(index.read(i)[:4] in (b"fLaC", b"OggS") for i in range(len(index)))


@pytest.mark.faults("D8")
@pytest.mark.parametrize("how", ["missing", "a directory", "a pipe"])
def test_a_shard_that_is_no_file_stops_the_start_or_is_skipped(tmp_path, how):
    """D8; one that may not be read is in test_faults_train.py."""
    shards = write_shards(
        tmp_path / "s", [[clip(f"{s}{i}", audio(noise(i, 900)), 900) for i in range(3)] for s in "ab"]
    )
    path = tmp_path / "s" / "shard-000001.tar"
    path.unlink()
    if how == "a directory":
        path.mkdir()
    if how == "a pipe":
        os.mkfifo(path)
    expected = "is missing" if how == "missing" else "is no file"
    started = time.monotonic()
    with pytest.raises(UserError, match=f"shard-000001.tar {expected}"):
        data_of(shards)
    data = data_of(shards, damaged_shards="skip")
    assert time.monotonic() - started < 5
    assert data.num_clips == 3 and len(data.bad_clips.lost) == 3
    assert {key[0] for batch in train_batches(data) for key in batch.key} == {"a"}


@pytest.mark.faults("D11")
def test_verify_says_that_all_is_well_and_finds_a_single_bit(tmp_path, capsys):
    """D11."""
    index = write_folder(tmp_path / "theirs")
    assert main(["index", f"{tmp_path}/theirs/*.tar", "--verify"]) == 0
    assert "8 shards with 96 clips" in capsys.readouterr().out
    flip(index, 95, 100)
    assert main(["index", f"{tmp_path}/theirs/*.tar", "--verify"]) == 2
    assert "part-7.tar" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "theirs")
