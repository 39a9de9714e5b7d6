"""Shards made to do harm: nothing in them is run, nothing outside is opened, and no size is believed."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from tiny_shards import audio, clip, noise, write_shards

from audiossl.__main__ import main
from audiossl.index import Index

MEASURED = """
import contextlib, io, json, re, sys, time
sys.path.insert(0, {tests!r})
import audiossl.indexing.scan
from audiossl.__main__ import main
from tiny_shards import data_of, train_batches

def peak():  # ru_maxrss counts the parent before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1e3

def train(folder):
    found = []
    for cache_mb in (0, 1024):
        batches = train_batches(data_of(folder, cache_mb=cache_mb, crop_seconds=1.0, batch_size=2), max_steps=1)
        found.append([sorted(key for batch in batches for key in batch.key),
                      [entry.reason for batch in batches for entry in batch.skipped]])
    assert found[0] == found[1], found
    return found[0]

def index(folder):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(["index", folder + "/*.tar"])
    return [code, out.getvalue()]

{what}({folders}[0])
for folder in {folders}:
    before, started = peak(), time.monotonic()
    outcome = {what}(folder)
    print(json.dumps([time.monotonic() - started, peak() - before, *outcome]))
"""


def measured(what: str, folders: list[Path]) -> list[tuple[float, float, object, object]]:
    """Run `train` or `index` on each folder, all in one process: seconds, megabytes added, and what came of it."""
    code = MEASURED.format(tests=str(ROOT / "tests"), what=what, folders=[str(folder) for folder in folders])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()[-len(folders) :]]


def silence(seconds: int, rate_hz: int = 48_000) -> bytes:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", rate_hz, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(seconds):
            file.write(np.zeros(rate_hz, np.int16))
    return stream.getvalue()


def announcing(num_frames: int) -> bytes:
    """Make a FLAC of 0.1 s whose header announces another length (36 bits)."""
    data = bytearray(audio(noise(0, 800)))
    data[21] = data[21] & 0xF0 | num_frames >> 32
    data[22:26] = (num_frames & 0xFFFFFFFF).to_bytes(4)
    return bytes(data)


@pytest.mark.faults("S8")
def test_a_tiny_flac_that_decodes_or_claims_to_decode_to_hours_costs_no_memory(tmp_path):
    """S8, F34: error or crop, in less than 300 MB and a second, with a cache and without."""
    good, false = audio(noise(0, 8000)), announcing(2**36 - 1)
    bombs = {
        "good": (good, 8000, 8_000),
        "silence": (silence(3600), 3600 * 48_000, 48_000),  # 0.5 MB that make 691
        "false_length": (false, 2**36 - 1, 8_000),
        "longest": (false, 2**62, 8_000),  # an index may lie as well
        "huge_member": (good, 8000, 8_000),
    }
    for name, (data, frames, rate_hz) in bombs.items():
        assert len(data) < 2**20
        write_shards(tmp_path / name, [[clip("bomb", data, frames, rate_hz=rate_hz), clip("good", good, 8000)]])
    claim_8_gb(tmp_path / "huge_member")
    found = dict(zip(bombs, measured("train", [tmp_path / name for name in bombs]), strict=True))
    assert max(seconds for seconds, *_ in found.values()) < 2 * 1  # both caches
    assert max(megabytes for _, megabytes, *_ in found.values()) < 300
    assert [keys for _, _, keys, _ in found.values()] == [["bomb", "good"]] * 2 + [["good"]] * 3
    reasons = [reasons[0] for _, _, _, reasons in found.values() if reasons]
    assert reasons[2] == "8589934592 bytes, more than the limit of 1073741824" and all(reasons)


def claim_8_gb(folder: Path) -> None:
    """Make the first clip of a shard a hole of 8 GB, in tar and index."""
    columns, meta = read_columns(folder)
    path, size = folder / "shard-000000.tar", 2**33
    with open(path, "r+b") as shard:
        shard.seek(int(columns["offset"][0]) - 512)
        member = tarfile.TarInfo("bomb.flac")
        member.size = size
        shard.write(member.tobuf(tarfile.GNU_FORMAT))
        shard.truncate(size + 2048)
    columns["size"][0], meta["shards"][0]["bytes"] = size, size + 2048
    write_columns(folder, columns, meta)


def index_bomb(folder: Path, name: str) -> None:
    with tarfile.open(folder / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in ("good", "bomb"):
            data = announcing(2**36 - 1) if (key, name) == ("bomb", "false length") else audio(noise(0, 800))
            member = tarfile.TarInfo(f"{key}.flac")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = (folder / "0.tar").read_bytes()
    if name == "1 TiB header":
        with tarfile.open(folder / "0.tar") as tar:
            bomb = tar.getmember("bomb.flac")
        bomb.size = 2**40
        (folder / "0.tar").write_bytes(whole[: bomb.offset] + bomb.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    if name == "gz":
        (folder / "0.tar").unlink()
        with tarfile.open(folder / "0.tar", "w:gz") as tar:
            member = tarfile.TarInfo("bomb.wav")
            member.size = 2**27
            tar.addfile(member, io.BytesIO(bytes(2**27)))


@pytest.mark.faults("S8")
def test_a_shard_that_claims_to_be_huge_is_named_and_costs_no_memory(tmp_path):
    """S8, F34."""
    expected = {"good": "clips", "false length": "announces", "1 TiB header": "cut in the data", "gz": "gunzip"}
    for name in expected:
        (tmp_path / name).mkdir()
        index_bomb(tmp_path / name, name)
    found = measured("index", [tmp_path / name for name in expected])
    assert max(seconds for seconds, *_ in found) < 1 and max(megabytes for _, megabytes, *_ in found) < 300
    assert [code for _, _, code, _ in found] == [0, 1, 1, 2]
    assert all(what in said for what, (*_, said) in zip(expected.values(), found, strict=True))
    for name in ("false length", "1 TiB header"):
        index = Index.load(tmp_path / name)
        assert [index.key(i) for i in range(len(index))] == ["good"]


def read_columns(folder: Path):
    from audiossl.indexing.indexfile import read_index

    columns, meta = read_index(folder / "index.safetensors")
    return {name: column.copy() for name, column in columns.items()}, meta


def write_columns(folder: Path, columns: dict, meta: dict) -> None:
    from safetensors.numpy import save_file

    save_file(columns, folder / "index.safetensors", metadata={"audiossl": json.dumps(meta)})


class Planted:
    """Touch a file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.faults("S5")
def test_pickles_in_a_shard_are_passed_over_and_never_loaded(tmp_path):
    """S5, F31: from the index to the batch."""
    marker = tmp_path / "executed"
    payload = pickle.dumps(Planted(marker))
    objects = io.BytesIO()
    np.save(objects, np.array([Planted(marker)], dtype=object), allow_pickle=True)
    members = [(f"a.{kind}", payload) for kind in ("pyd", "pkl", "pickle", "pth", "pt", "ckpt")]
    members += [("a.npy", objects.getvalue()), ("a.npz", objects.getvalue()), ("a.flac", audio(noise(0, 8000)))]
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "0.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert main(["index", f"{tmp_path}/s/*.tar"]) == 0
    from tiny_shards import data_of, train_batches

    (batch,) = train_batches(data_of(str(tmp_path / "s")), max_steps=1)
    assert batch.key == ["a"] * 4 and not marker.exists()
    pickle.loads(payload)  # noqa: S301
    assert marker.exists(), "the payload was none"


AUDITED = """
import sys
events = []
def hook(event, arguments):
    if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "pty.")):
        events.append((event, str(arguments)[:80]))
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.scan import index_shards
sys.addaudithook(hook)
for load in (Index.load, index_shards):
    for pattern in sys.argv[1:]:
        try:
            load(pattern)
            print("LOADED", pattern)
        except UserError as error:
            print(error)
print("EVENTS", events)
"""


@pytest.mark.faults("S6")
def test_shards_that_name_a_command_or_a_stream_start_no_process_and_open_no_socket(tmp_path):
    """S6: schemes in the setting, and a file of that name, and GOPEN_REWRITE, which webdataset obeys."""
    patterns = [f"pipe:touch {tmp_path}/ran", "pipe:cat x.tar", "http://127.0.0.1:9/x.tar", "file:///etc/passwd", "-"]
    patterns += ["gs://bucket/x.tar", "ftp://host/x.tar", "ssh://host/x.tar", "hdfs://x/y.tar", "PIPE:touch ran"]
    rewrite = {"GOPEN_REWRITE": f"x=pipe:touch {tmp_path}/ran", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, *patterns, "x.tar"], cwd=tmp_path, env=rewrite, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *said, events = done.stdout.splitlines()
    assert events == "EVENTS []" and not list(tmp_path.iterdir())
    assert not [line for line in said if line.startswith("LOADED")]
    for pattern in patterns:
        scheme = pattern.partition(":")[0]
        assert sum(f"'{scheme}" in line and "not allowed" in line for line in said) >= 2, (pattern, said)


@pytest.mark.faults("S6")
def test_a_shard_in_an_index_that_names_a_command_is_refused(tmp_path):
    """S6: manifests."""
    write_shards(tmp_path / "s", [[clip("a", audio(noise(0, 900)), 900)]])
    columns, meta = read_columns(tmp_path / "s")
    meta["shards"][0]["name"] = f"pipe:touch {tmp_path}/ran"
    write_columns(tmp_path / "s", columns, meta)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(tmp_path / "s")], cwd=ROOT, capture_output=True, text=True
    )
    assert "is not allowed" in done.stdout and "EVENTS []" in done.stdout and not (tmp_path / "ran").exists()


@pytest.mark.faults("S7", "D7")
def test_links_devices_and_names_that_climb_out_are_listed_and_touch_nothing(tmp_path):
    """S7, D7: nothing is ever extracted, and a link leads nowhere."""
    outside = tmp_path / "outside.flac"
    outside.write_bytes(audio(noise(0, 900)))
    folder = tmp_path / "s"
    folder.mkdir()
    kinds = {"sym.flac": tarfile.SYMTYPE, "hard.flac": tarfile.LNKTYPE, "dev.flac": tarfile.CHRTYPE}
    kinds |= {"fifo.flac": tarfile.FIFOTYPE, "sparse.flac": tarfile.GNUTYPE_SPARSE}
    with tarfile.open(folder / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            tar.addfile(member)
        for name in ("../../x.flac", "/abs/x.flac", "n" * 5000 + ".flac", "nul\x01l.flac", "ok.flac"):
            member = tarfile.TarInfo(name)
            member.size = outside.stat().st_size
            tar.addfile(member, io.BytesIO(outside.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    assert main(["index", f"{folder}/*.tar"]) == 1
    assert sorted(tmp_path.rglob("*")) == sorted([*before, folder / "index.safetensors", folder / "rejected.csv"])
    index = Index.load(folder)
    assert [index.key(i) for i in range(len(index))] == ["ok"]
    listed = (folder / "rejected.csv").read_text()
    assert listed.count("link, device or unknown") == 5 and listed.count("climbs out") == 3
    assert listed.count("control characters") == 1


@pytest.mark.faults("S7", "S15")
def test_no_code_of_ours_extracts_a_tar_or_unpickles():
    """S7, S15: what could is nowhere called."""
    for path in (ROOT / "audiossl").rglob("*.py"):
        text = path.read_text()
        assert not any(word in text for word in ("extractall", ".extract(", "pickle.load", "allow_pickle=True")), path
