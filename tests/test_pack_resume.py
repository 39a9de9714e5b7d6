"""The same folder gives the same bytes, whatever number of workers, however often it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import webdataset as wds
from packing import DEMO, ROOT, contents, run, tone, unpack_demo

from audiossl.__main__ import main
from audiossl.errors import UserError
from audiossl.index import Index


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return unpack_demo(tmp_path_factory.mktemp("clips"), step=8)


@pytest.fixture(scope="module")
def packed(clips, tmp_path_factory) -> Path:
    """Pack them without interruption, by one process."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert run(clips, out, "--workers", "1") == 0
    return out


def test_two_workers_write_the_same_bytes_as_one(clips, packed, tmp_path):
    assert run(clips, tmp_path / "two", "--workers", "2") == 0
    assert contents(tmp_path / "two") == contents(packed)
    assert len(list(packed.glob("shard-*.tar"))) > 5


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_pack_killed_twice_resumes_to_the_same_bytes_as_an_uninterrupted_one(clips, packed, tmp_path, workers):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "audiossl", "pack", clips, "--out", out]
    command += ["--shard-size", "500kB", "--workers", workers]
    for num_shards in (2, 5):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(list(out.glob("shard-*.tar"))) < num_shards and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "index.safetensors").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert contents(out) == contents(packed)
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())


def test_packing_again_changes_nothing(clips, packed, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(clips, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_corpus_or_other_arguments_are_refused_and_nothing_is_touched(clips, packed, tmp_path, capsys):
    out = shutil.copytree(packed, tmp_path / "out")
    tone(tmp_path / "a.wav", 32_000, 1.0)
    for arguments in ([str(tmp_path)], [str(clips), "--rate", "16000"], [str(clips), "--codec", "keep"]):
        assert main(["pack", *arguments, "--out", str(out), "--shard-size", "500kB"]) == 2
        assert "holds another corpus" in capsys.readouterr().err
    assert contents(out) == contents(packed)


def test_a_finished_pack_with_a_shard_gone_is_not_called_finished(clips, packed, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    (out / "shard-000001.tar").unlink()
    assert run(clips, out) == 2
    with pytest.raises(UserError, match="shard-000001.tar is missing"):
        Index.load(out)


def test_workers_end_with_a_killed_parent(clips, tmp_path):
    command = [sys.executable, "-m", "audiossl", "pack", clips, "--out", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("out/shard-*.part")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(1.0)  # let the workers come up
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while members_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not members_of(process.pid)


def members_of(session: int) -> list[int]:
    """List processes of a session that are alive."""
    alive = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, found = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(found) == session and state != "Z":
                alive.append(int(folder.name))
    return alive


def test_codec_keep_keeps_the_bytes_and_the_meta_csv(clips, tmp_path):
    assert run(clips, tmp_path / "out", "--codec", "keep") == 0
    kept, demo = Index.load(tmp_path / "out"), Index.load(DEMO)
    place = {demo.key(i): i for i in range(len(demo))}
    assert len(kept) == len(range(0, len(demo), 8))
    for i in range(len(kept)):
        j = place[kept.key(i)]
        assert kept.read(i) == demo.read(j)
        assert kept.labels(i) == demo.labels(j) and kept.split(i) == demo.split(j) and kept.fold[i] == demo.fold[j]
        assert kept.read_meta(i)["kind"] == demo.read_meta(j)["kind"]


def test_webdataset_reads_our_shards_as_they_are(packed):
    index = Index.load(packed)
    shards = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [index.key(i) for i in range(len(index))]
    for i, sample in enumerate(samples):
        assert sample["flac"] == index.read(i)
        assert json.loads(sample["json"])["labels"] == index.labels(i)


def test_our_tars_are_what_tarfile_would_have_written(packed):
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert all(member.isfile() and member.mtime == 0 and member.uid == 0 for member in tar.getmembers())
        assert [name.rpartition(".")[0] for name in names[::2]] == [name.rpartition(".")[0] for name in names[1::2]]
        assert {name.rpartition(".")[2] for name in names[::2]} == {"flac"}
