"""Training on shards of another machine is training on the same shards here."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, environment, kill_when, train
from commands import start as start_training
from servers import Bucket, Files, Server
from tiny_shards import audio, clip, data_of, digest, noise, ragged_corpus, train_batches, write_shards

from audiossl.__main__ import main
from audiossl.errors import UserError
from audiossl.index import Index
from audiossl.indexing.indexfile import read_index, write_index
from audiossl.remote.shardcache import ShardCache

SIX = "shard-{000000..000005}.tar"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return Path(ragged_corpus(tmp_path_factory.mktemp("bucket") / "prefix"))


@pytest.fixture(scope="module")
def web(corpus, certificate):
    server = Server(corpus.parent, Files, certificate)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def s3(corpus):
    server = Server(corpus.parent.parent, Bucket)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def outside(certificate, web, s3, monkeypatch, tmp_path):
    """Trust the server's certificate, ask S3 at its address without credentials, and keep caches apart."""
    web.forget()
    s3.forget()
    settings = {"SSL_CERT_FILE": str(certificate), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    settings |= {"AWS_ENDPOINT_URL": f"http://{s3.host}", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (settings | {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["https", "s3"])
def server_and_base(request, web, s3, corpus):
    if request.param == "https":
        return web, f"https://{web.host}/prefix"
    return s3, f"s3://{corpus.parent.name}/prefix"


@pytest.mark.parametrize("form", ["", "/", "/index.safetensors", f"/{SIX}"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_are_those_of_the_local_shards(server_and_base, corpus, form, num_workers):
    server, base = server_and_base
    data = data_of(base + form, num_workers=num_workers)
    assert digest(train_batches(data)) == digest(train_batches(data_of(str(corpus))))
    assert data.corpus_hash == data_of(str(corpus)).corpus_hash
    gets = {name: number for name, number in server.asked.items() if name.endswith(".tar")}
    assert len(gets) == 6 and max(gets.values()) <= 2, "for S3, one of the two is a HEAD"


def test_some_of_the_shards_are_some_of_the_clips(web, corpus):
    assert data_of(f"https://{web.host}/prefix/shard-00000{{1,3}}.tar").num_clips == 3 + 7
    with pytest.raises(UserError, match=r"shard-000009\.tar is not in"):
        Index.load(f"https://{web.host}/prefix/shard-00000{{1,9}}.tar")


def test_a_star_is_looked_up_where_it_can_be(web, corpus):
    assert len(Index.load(f"s3://{corpus.parent.name}/prefix/shard-00000[.tar".replace("[", "*"))) == 41
    with pytest.raises(UserError, match=r"https cannot list files; write the numbers"):
        Index.load(f"https://{web.host}/prefix/*.tar")


def test_an_index_is_downloaded_again_only_when_it_has_changed(server_and_base, corpus, tmp_path):
    server, base = server_and_base
    for _ in range(3):
        Index.load(base)
    once = server.sent["index.safetensors"]
    assert once == (corpus / "index.safetensors").stat().st_size
    stat = (corpus / "index.safetensors").stat()
    os.utime(corpus / "index.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    Index.load(base)
    assert server.sent["index.safetensors"] == 2 * once


def test_a_tiny_cache_still_gives_the_same_clips(web, corpus, tmp_path):
    sizes = [path.stat().st_size for path in corpus.glob("*.tar")]
    data = data_of(f"https://{web.host}/prefix", cache_dir=str(tmp_path / "cache"), num_workers=2)
    for shard in data.remote.values():
        object.__setattr__(shard.cache, "max_bytes", max(sizes) + min(sizes))
    assert digest(train_batches(data)) == digest(train_batches(data_of(str(corpus))))
    held = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())
    assert held <= max(sizes) + min(sizes) and sum(web.asked.values()) > 2 * 7


def test_an_order_that_would_turn_the_cache_over_is_refused_before_it_starts(web, corpus):
    total = sum(path.stat().st_size for path in corpus.glob("*.tar")) / 1e9
    with pytest.raises(UserError, match=r"6 remote shards of .* GB do not fit .*set data.shuffle_shards=\d \(at most"):
        data_of(f"https://{web.host}/prefix", cache_gb=total * 0.8)
    with pytest.raises(UserError, match=r"the 20 validation clips alone lie in \d of them; lower"):
        data_of(f"https://{web.host}/prefix", cache_gb=total * 0.8, validation_clips=20)
    assert data_of(f"https://{web.host}/prefix", cache_gb=total * 1.01).num_clips == 41
    assert not [name for name in web.asked if name.endswith(".tar")]


def test_a_corpus_larger_than_the_cache_is_visited_window_by_window(web, corpus, tmp_path):
    total = sum(path.stat().st_size for path in corpus.glob("*.tar")) / 1e9
    far = data_of(f"https://{web.host}/prefix", cache_gb=total * 0.8, shuffle_shards=1, cache_dir=str(tmp_path / "c"))
    batches = train_batches(far, max_steps=9)  # most of an epoch: 36 of 41 clips
    assert digest(batches) == digest(train_batches(data_of(str(corpus), shuffle_shards=1), max_steps=9))
    assert len({key for batch in batches for key in batch.key}) == 36
    assert max(times for name, times in web.asked.items() if name.endswith(".tar")) == 1


def test_a_mixture_may_lie_here_and_there(web, corpus, tmp_path):
    sources = {"far": {"shards": f"https://{web.host}/prefix", "weight": 3.0}, "near": {"shards": str(corpus)}}
    sources["near"]["weight"] = 1.0
    batches = train_batches(data_of(None, sources=sources), max_steps=10)
    keys = [key for batch in batches for key in batch.key]
    assert len(keys) == 40 and not any(batch.skipped for batch in batches)
    assert {key.partition("/")[0] for key in keys} == {"far", "near"}
    near = data_of(None, sources=sources | {"far": {"shards": str(corpus), "weight": 3.0}})
    assert digest(batches) == digest(train_batches(near, max_steps=10))


def test_a_remote_corpus_has_the_passport_of_the_local_one(web, corpus, tmp_path):
    for name, shards in {"far": f"https://{web.host}/prefix", "near": str(corpus)}.items():
        assert main(["passport", shards, "--out", str(tmp_path / f"{name}.json"), "--workers", "1"]) == 0
    assert (tmp_path / "far.json").read_text() == (tmp_path / "near.json").read_text()


def test_for_pictures_no_more_than_one_shard_is_downloaded(web):
    data = data_of(f"https://{web.host}/prefix", validation_clips=9)
    assert data.example_clips(1)
    assert len([name for name in web.asked if name.endswith(".tar")]) == 1


@pytest.mark.parametrize(("fault", "expected"), [("404", "404"), ("403", "403"), ("wrong bytes", "sha256")])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_cannot_be_had_stops_the_run_with_its_address(web, fault, expected, num_workers):
    web.plan["shard-000002.tar"].extend([fault] * 9)
    with pytest.raises(UserError, match=rf"^https://{web.host}/prefix/shard-000002\.tar: .*{expected}"):
        train_batches(data_of(f"https://{web.host}/prefix", num_workers=num_workers))


def test_the_loader_waits_for_a_slow_download(web, monkeypatch, capsys):
    """Longer than its time-out, as long as bytes come."""
    monkeypatch.setattr("audiossl.loading.loader.POLL_SECONDS", 1)
    data = data_of(f"https://{web.host}/prefix", num_workers=1, timeout_seconds=2.0)
    loader = data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=12, seed=5)
    shutil.rmtree(data.index._cache.folder / "shards")
    web.seconds_per_block = 1.0
    assert len(list(loader)) == 12
    assert "waiting for downloads: shard-0000" in capsys.readouterr().out


def test_shards_are_downloaded_ahead_as_far_as_the_cache_has_room(web, corpus, tmp_path):
    data = data_of(f"https://{web.host}/prefix", cache_dir=str(tmp_path / "cache"), batch_size=1)
    cache = ShardCache(tmp_path / "cache", largest(corpus) * 3)
    data.remote = {name: replace(shard, cache=cache) for name, shard in data.remote.items()}
    loader = data.train_loader(rank=0, world_size=1, accumulate=1, start_step=0, max_steps=41, seed=5)
    order = list(dict.fromkeys(request.shard for batch in loader.loader.batch_sampler for request in batch))
    downloads = loader.downloads
    downloads.start(0)
    wait_for(lambda: len(web.asked) > 2)
    time.sleep(1.0)
    early = [name for name in order if data.remote[name].is_here]
    assert early == order[: len(early)] and 1 < len(early) < 6, "in the order of their use, and not all of them"
    downloads.reached(41)
    wait_for(lambda: all(web.asked[name.rpartition("/")[2]] for name in order))
    downloads.stop()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../other/shard.tar", "does not lie in that folder"),
        ("/etc/passwd", "does not lie in that folder"),
        ("s3://private/shard.tar", "does not lie in that folder"),
        ("pipe:touch marker", None),
    ],
)
def test_names_in_a_remote_index_cannot_leave_its_folder(web, corpus, name, message):
    columns, meta = read_index(corpus / "index.safetensors")
    rows = [["a", "flac", 512, 100, 100, 8000, 1, [], None, None]]
    (corpus.parent / "evil").mkdir(exist_ok=True)
    write_index(corpus.parent / "evil" / "index.safetensors",
                [{"name": name, "bytes": 1024, "sha256": "0" * 64, "rows": rows}])  # fmt: skip
    with pytest.raises(UserError, match=message or "404"):
        data_of(f"https://{web.host}/evil").index.read(0)


@pytest.mark.parametrize("name", ["pipe:touch marker", "http://host/a.tar", "file:///etc/passwd", "https://u:p@host/a"])
def test_names_in_a_local_index_are_paths_or_allowed_addresses(tmp_path, name):
    rows = [["a", "flac", 512, 100, 100, 8000, 1, [], None, None]]
    write_index(tmp_path / "index.safetensors", [{"name": name, "bytes": 1024, "sha256": "0" * 64, "rows": rows}])
    with pytest.raises(UserError, match="is not allowed|must not stand"):
        Index.load(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_a_hash_in_an_index_that_is_no_hash_names_no_file(web, corpus):
    rows = [["a", "flac", 512, 100, 100, 8000, 1, [], None, None]]
    (corpus.parent / "odd").mkdir(exist_ok=True)
    write_index(corpus.parent / "odd" / "index.safetensors",
                [{"name": "a.tar", "bytes": 1024, "sha256": "../../../../x", "rows": rows}])  # fmt: skip
    with pytest.raises(UserError, match="no sha256"):
        Index.load(f"https://{web.host}/odd")


@pytest.mark.faults("S6")
@pytest.mark.parametrize("shards", ["http://h/a.tar", "pipe:cat a.tar", "gs://b/a.tar", "-", "file:///a.tar"])
def test_other_schemes_are_refused_before_anything_is_started(tmp_path, shards):
    """RELIABILITY S6: the error names the scheme, and no program was started."""
    code = (
        "import sys; started = []\n"
        "sys.addaudithook(lambda event, _: started.append(event) if event in ('subprocess.Popen', 'os.system',"
        " 'os.posix_spawn', 'socket.connect') else None)\n"
        "from audiossl.errors import UserError; from audiossl.index import Index\n"
        f"try:\n    Index.load({shards!r})\nexcept UserError as error:\n    print(error)\nprint(started)"
    )
    rewrite = environment(GOPEN_REWRITE="http://h=/tmp", WDS_REWRITE="http://h=/tmp")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=rewrite, cwd=tmp_path)
    assert "is not allowed" in done.stdout and done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.faults("S9")
@pytest.mark.parametrize("shards", ["https://me:planted-1@h/x/", "https://h/shard-{0..3}.tar?sig=planted-1"])
def test_a_secret_in_an_address_is_refused_and_never_written(tmp_path, shards):
    output = train("data=folder", f"data.shards='{shards}'", cwd=tmp_path, expect=2)
    assert "must not stand in an address" in output and output.count("\n") == 1
    assert "planted" not in output and not list(tmp_path.rglob("*.yaml"))


def test_without_the_extra_one_line_names_the_command(web, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for address in ("s3://bucket/prefix", f"https://{web.host}/prefix"):
        with pytest.raises(UserError, match=r"pip install -e '\.\[remote\]' -c constraints.txt$"):
            Index.load(address)


def test_a_folder_without_an_index_is_told_how_to_get_one(server_and_base):
    base = server_and_base[1].replace("/prefix", "/nothing")
    for form in ("/", f"/{SIX}"):
        with pytest.raises(UserError, match=r"python -m audiossl index '.*\.tar' --out DIR, and take data.shards=DIR"):
            Index.load(base + form)


def test_a_strangers_remote_shards_are_indexed_and_trained_on(server_and_base, corpus, tmp_path, capsys):
    server, base = server_and_base
    cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-gb", str(1.5e-9 * largest(corpus))]
    assert main(["index", f"{base}/{SIX}", "--out", str(tmp_path / "mine"), *cache]) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir()) <= 1.5 * largest(corpus)
    index = Index.load(tmp_path / "mine")
    assert [str(shard) for shard in index.shards] == [f"{base}/shard-{i:06d}.tar" for i in range(6)]
    assert index.corpus_hash == Index.load(corpus).corpus_hash
    assert digest(train_batches(data_of(str(tmp_path / "mine")))) == digest(train_batches(data_of(str(corpus))))
    index.verify()


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*.tar"))


def test_damage_in_a_remote_shard_is_named_with_its_address(web, corpus, tmp_path, capsys):
    folder = corpus.parent / "damaged"
    clips = [clip(f"k{i}", audio(noise(i, 900)), 900) for i in range(3)]
    write_shards(folder, [clips])
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: 2 * 512 + len(clips[0][1])])
    assert main(["index", f"https://{web.host}/damaged/shard-000000.tar", "--out", str(tmp_path)]) == 1
    assert f"https://{web.host}/damaged/shard-000000.tar: cut" in capsys.readouterr().out


def test_indexing_remote_shards_needs_a_folder_for_the_index(web, capsys):
    assert main(["index", f"https://{web.host}/prefix/{SIX}"]) == 2
    assert "--out DIR" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real(folder_shards, certificate):
    server = Server(folder_shards, Files, certificate)
    yield server
    server.stop()


def test_a_run_over_https_killed_and_resumed_is_the_local_run(real, folder_shards, tmp_path):
    """With faults of the server on the way, and a kill in the middle."""
    common = [*TINY, "data=folder", "trainer.max_steps=12", "checkpoint.every_steps=3", "trace=true",
              "data.validation_clips=8", "validate_every_steps=4", "data.num_workers=2"]  # fmt: skip
    train(*common, f"data.shards={folder_shards}", "hydra.run.dir=here", cwd=tmp_path)
    names = sorted(path.name for path in folder_shards.glob("*.tar"))
    real.plan[names[0]].extend(["500", "cut"])
    address = f"data.shards=https://{real.host}/shard-{{000000..{len(names) - 1:06d}}}.tar"  # no quotes inside quotes
    remote = [*common, address, f"data.cache_dir={tmp_path}/cache", "hydra.run.dir=there"]
    process = start_training(*remote, cwd=tmp_path)
    assert kill_when(process, tmp_path / "there" / "checkpoints" / "step=000000003.ckpt") == -signal.SIGKILL
    output = train(*remote, "ckpt=last", cwd=tmp_path)
    assert (tmp_path / "there" / "trace.csv").read_text() == (tmp_path / "here" / "trace.csv").read_text()
    assert "resuming from" in output and all(real.asked[name] <= 3 for name in names), real.asked
    assert not re.search(r"Traceback|Unclosed|was never awaited", output), output[-3000:]
    assert np.array_equal(*(Index.load(where).offset for where in (folder_shards, f"https://{real.host}/")))


@pytest.mark.slow
def test_two_ranks_download_each_shard_once(real, folder_shards, tmp_path):
    real.forget()
    train(*TINY, "data=folder", f"data.shards=https://{real.host}/", "trainer.max_steps=6", "trainer.devices=2",
          f"data.cache_dir={tmp_path}/cache", "data.batch_size=2", "hydra.run.dir=run", cwd=tmp_path)  # fmt: skip
    assert {real.asked[path.name] for path in folder_shards.glob("*.tar")} == {1}


def test_a_cache_that_is_already_there_asks_for_nothing_but_the_index(real, folder_shards, tmp_path):
    cache = ShardCache.of(tmp_path / "cache", None)
    for shard in Index.load(f"https://{real.host}/", cache=cache).shards:
        assert Path(os.fspath(shard)).is_file()
    real.forget()
    index = Index.load(f"https://{real.host}/", cache=cache)
    assert index.read(0) == Index.load(folder_shards).read(0)
    assert set(real.asked) == {"index.safetensors"}
