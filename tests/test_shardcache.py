"""What is downloaded lies in one cache, whole, once, and within its bounds, whichever processes want it."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from servers import Files, Server

from audiossl.errors import UserError
from audiossl.indexing.indexfile import sha256_of
from audiossl.remote.shardcache import ShardCache, default_folder
from audiossl.remote.transfer import Patience

SIZE = 1_000_000
HASTY = Patience(tries=3, first_wait_seconds=0.01, stall_seconds=2.0)


@pytest.fixture(scope="module")
def web(tmp_path_factory, certificate):
    folder = tmp_path_factory.mktemp("served")
    for name in "abcd":
        (folder / f"{name}.tar").write_bytes(os.urandom(SIZE))
    server = Server(folder, Files, certificate)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def environment(certificate, web, monkeypatch):
    web.forget()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def opened(web, cache, name):
    return cache.open(f"https://{web.host}/{name}.tar", SIZE, sha256_of(web.folder / f"{name}.tar"))


def held(cache) -> int:
    return sum(path.stat().st_size for path in cache.folder.glob("*/*") if path.suffix != ".tag")


def here(web, cache) -> str:
    return "".join(name for name in "abcd" if cache.has(sha256_of(web.folder / f"{name}.tar")))


def test_a_shard_is_downloaded_once_and_then_read_from_the_cache(web, tmp_path):
    cache = ShardCache(tmp_path, 10**7, HASTY)
    for _ in range(3):
        descriptor = opened(web, cache, "a")
        assert os.pread(descriptor, SIZE, 0) == (web.folder / "a.tar").read_bytes()
        os.close(descriptor)
    assert web.asked["a.tar"] == 1 and not list((tmp_path / "parts").iterdir())


def test_the_shard_used_longest_ago_makes_room_and_whoever_reads_it_reads_on(web, tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE + 1, HASTY)
    descriptors = {}
    for name in "abacda":
        descriptors[name] = opened(web, cache, name)
        assert held(cache) <= 2 * SIZE + 1
        time.sleep(0.02)
    assert here(web, cache) == "ad" and web.asked == {"a.tar": 2, "b.tar": 1, "c.tar": 1, "d.tar": 1}
    for name, descriptor in descriptors.items():
        assert os.pread(descriptor, SIZE, 0) == (web.folder / f"{name}.tar").read_bytes()
        os.close(descriptor)


def test_a_shard_larger_than_the_cache_is_refused_by_name(web, tmp_path):
    with pytest.raises(UserError, match=r"a\.tar has 0.001 GB, more than data.cache_gb=0.0005"):
        opened(web, ShardCache(tmp_path, SIZE // 2, HASTY), "a")


def test_a_cache_that_cannot_be_written_is_named(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: .*; set data.cache_dir"):
        opened(web, ShardCache(tmp_path / "file", 10**7, HASTY), "a")


def test_a_file_cut_by_a_crash_of_the_machine_is_downloaded_again(web, tmp_path):
    cache = ShardCache(tmp_path, 10**7, HASTY)
    os.close(opened(web, cache, "a"))
    os.truncate(cache.path(sha256_of(web.folder / "a.tar")), 5)
    descriptor = opened(web, cache, "a")
    assert os.pread(descriptor, SIZE, 0) == (web.folder / "a.tar").read_bytes() and web.asked["a.tar"] == 2
    os.close(descriptor)


def test_the_users_cache_folder_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_folder() == Path("/some/where/audiossl")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.cache/audiossl")


def download(url, cache, sha256, names) -> None:
    descriptor = cache.open(url, SIZE, sha256)
    names.put((os.getpid(), os.fstat(descriptor).st_size))


def start(context, web, cache, name):
    queue = context.Queue()
    arguments = (f"https://{web.host}/{name}.tar", cache, sha256_of(web.folder / f"{name}.tar"), queue)
    process = context.Process(target=download, args=arguments)
    process.start()
    return process, queue


def test_processes_that_want_the_same_shard_at_once_fetch_it_once(web, tmp_path):
    web.seconds_per_block = 0.05
    cache, context = ShardCache(tmp_path, 10**7, HASTY), multiprocessing.get_context("spawn")
    started = [start(context, web, cache, "a") for _ in range(3)]
    assert {queue.get(timeout=60)[1] for _, queue in started} == {SIZE}
    for process, _ in started:
        process.join(20)
    assert web.asked["a.tar"] == 1 and web.sent["a.tar"] == SIZE


def test_two_downloads_at_once_share_a_cache_that_only_one_fits_into(web, tmp_path):
    web.seconds_per_block = 0.03
    cache, context = ShardCache(tmp_path, SIZE * 3 // 2, HASTY), multiprocessing.get_context("spawn")
    started = [start(context, web, cache, name) for name in "ab"]
    most = 0
    while any(process.is_alive() for process, _ in started):
        most = max(most, held(cache))
        time.sleep(0.01)
    assert [process.exitcode for process, _ in started] == [0, 0] and SIZE <= most <= SIZE * 3 // 2


def test_a_download_that_was_killed_goes_on_in_another_process(web, tmp_path):
    web.seconds_per_block = 0.1
    cache, context = ShardCache(tmp_path, 10**7, HASTY), multiprocessing.get_context("spawn")
    process, _ = start(context, web, cache, "a")
    while not any(path.stat().st_size > SIZE // 3 for path in tmp_path.glob("parts/*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    web.seconds_per_block = 0.0
    descriptor = opened(web, cache, "a")
    assert os.pread(descriptor, SIZE, 0) == (web.folder / "a.tar").read_bytes()
    assert web.asked["a.tar"] == 2 and web.ranges["a.tar"][1] is not None
    os.close(descriptor)
