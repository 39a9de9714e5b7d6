"""Bytes come whole over networks that fail, and what cannot come is said in one line."""

import hashlib
import os
import threading
import time

import pytest
from servers import Bucket, Files, Server

from audiossl.errors import UserError
from audiossl.remote.streams import QUERY_VARIABLE, list_s3
from audiossl.remote.transfer import Absent, Patience, fetch

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HASTY = Patience(tries=4, first_wait_seconds=0.01, stall_seconds=1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "bucket"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    return folder.parent


@pytest.fixture(scope="module")
def web(served, certificate):
    server = Server(served, Files, certificate)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def s3(served):
    server = Server(served, Bucket)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def environment(certificate, web, s3, monkeypatch):
    web.forget()
    s3.forget()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.host}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")


def get(url, part, **changes):
    settings = dict(num_bytes=len(CONTENT), sha256=SHA256, max_bytes=10**8, patience=HASTY) | changes
    return fetch(url, part, **settings)


@pytest.fixture(params=["https", "s3"])
def server_and_url(request, web, s3):
    return (web, f"https://{web.host}/bucket/a.tar") if request.param == "https" else (s3, "s3://bucket/a.tar")


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "hang"])
def test_what_may_pass_is_tried_again(server_and_url, tmp_path, fault):
    server, url = server_and_url
    server.plan["a.tar"].extend([fault, fault])
    assert get(url, tmp_path / "part")[0] == SHA256
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert server.asked["a.tar"] >= 3 and not server.plan["a.tar"]


def test_a_cut_transfer_goes_on_where_it_stopped(web, tmp_path):
    web.plan["a.tar"].append("cut")
    get(f"https://{web.host}/bucket/a.tar", tmp_path / "part")
    first, second = web.ranges["a.tar"]
    begin = int(second.removeprefix("bytes=").removesuffix("-"))
    assert first is None and 0 < begin <= len(CONTENT) // 2
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert web.sent["a.tar"] == len(CONTENT) // 2 + len(CONTENT) - begin


def test_a_server_without_ranges_is_asked_for_everything_again(web, tmp_path):
    web.knows_ranges = False
    web.plan["a.tar"].append("cut")
    get(f"https://{web.host}/bucket/a.tar", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT and web.sent["a.tar"] == len(CONTENT) * 3 // 2


@pytest.mark.faults("S14")
def test_what_a_killed_process_left_is_used_or_thrown_away_by_its_hash(server_and_url, tmp_path):
    server, url = server_and_url
    (tmp_path / "part").write_bytes(CONTENT[:2_000_000])
    assert get(url, tmp_path / "part")[0] == SHA256 and server.sent["a.tar"] == 1_000_000
    assert get(url, tmp_path / "part")[0] == SHA256 and server.sent["a.tar"] == 1_000_000, "it was whole"


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_a_file_that_changes_on_the_way_is_not_patched_together(web, served, tmp_path, knows_if_range):
    """Of a file without known hash only the tag can tell."""
    path = served / "bucket" / "b.tar"
    path.write_bytes(CONTENT)
    web.seconds_per_block, web.knows_if_range = 0.01, knows_if_range
    web.plan["b.tar"].append("cut")
    os.utime(path, (1, 1))
    patience = Patience(tries=4, first_wait_seconds=1.0, stall_seconds=5.0)
    changed = threading.Timer(0.7, lambda: (path.write_bytes(CONTENT[::-1]), os.utime(path, (2, 2))))
    changed.start()
    url = f"https://{web.host}/bucket/b.tar"
    sha256, _ = get(url, tmp_path / "part", num_bytes=None, sha256=None, patience=patience)
    assert sha256 == hashlib.sha256(CONTENT[::-1]).hexdigest() and web.asked["b.tar"] == (2 if knows_if_range else 3)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("403", "answers 403"), ("401", "answers 401"), ("400", "400"), ("wrong bytes", "its sha256 is"), ("404", "404")],
)
def test_what_will_not_pass_ends_at_once_with_address_and_status(server_and_url, tmp_path, fault, expected):
    server, url = server_and_url
    server.plan["a.tar"].extend([fault] * (2 if url.startswith("s3") and fault == "wrong bytes" else 1))
    with pytest.raises(Absent if fault == "404" else UserError, match=expected) as caught:
        get(url, tmp_path / "part")
    assert str(caught.value).startswith(url) and "\n" not in str(caught.value)
    assert server.asked["a.tar"] <= 2


def test_it_gives_up_after_some_tries_and_says_so(web, tmp_path):
    web.plan["a.tar"].extend(["500"] * 9)
    with pytest.raises(UserError, match=r"a\.tar: the server answers 500, 4 times in a row"):
        get(f"https://{web.host}/bucket/a.tar", tmp_path / "part")
    assert web.asked["a.tar"] == 4


def test_a_hanging_server_is_given_up_in_time(web, tmp_path):
    web.plan["a.tar"].extend(["hang"] * 9)
    started = time.monotonic()
    with pytest.raises(UserError, match="no answer in time, 2 times in a row"):
        patience = Patience(tries=2, first_wait_seconds=0.01, stall_seconds=0.5)
        get(f"https://{web.host}/bucket/a.tar", tmp_path / "part", patience=patience)
    assert time.monotonic() - started < 10


@pytest.mark.faults("S14")
@pytest.mark.parametrize(("num_bytes", "message"), [(2_999_999, "the index says 2999999"), (4_000_000, "says 4000000")])
def test_another_size_than_the_index_has_is_refused(server_and_url, tmp_path, num_bytes, message):
    with pytest.raises(UserError, match=message):
        get(server_and_url[1], tmp_path / "part", num_bytes=num_bytes)


def test_more_than_the_limit_is_refused_before_it_is_downloaded(web, tmp_path):
    with pytest.raises(UserError, match="more than the limit of 1000000"):
        get(f"https://{web.host}/bucket/a.tar", tmp_path / "part", num_bytes=None, sha256=None, max_bytes=10**6)
    assert (tmp_path / "part").stat().st_size == 0


def test_a_certificate_that_nobody_vouches_for_is_refused(web, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UserError, match="certificate is not trusted"):
        get(f"https://127.0.0.1:{web.server_address[1]}/bucket/a.tar", tmp_path / "part")
    assert web.asked["a.tar"] == 0


@pytest.mark.faults("S14")
def test_a_way_out_of_https_is_not_followed(web, s3, tmp_path):
    web.plan["a.tar"].append(f"to http://{s3.host}/bucket/a.tar")
    with pytest.raises(UserError, match=r"leads on to http://localhost; only https:// is allowed"):
        get(f"https://{web.host}/bucket/a.tar", tmp_path / "part")


def test_a_signed_query_is_sent_and_never_shown(web, tmp_path, monkeypatch):
    monkeypatch.setenv(QUERY_VARIABLE, "sig=planted%2Fsecret")
    web.plan["a.tar"].extend(["500", "", "403"])
    get(f"https://{web.host}/bucket/a.tar", tmp_path / "part")
    assert web.queries == ["sig=planted%2Fsecret"] * 2, "as it was signed"
    (tmp_path / "part").unlink()
    with pytest.raises(UserError) as caught:
        get(f"https://{web.host}/bucket/a.tar", tmp_path / "part")
    assert "planted" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        get("https://localhost:1/a.tar", tmp_path / "part")
    assert "planted" not in str(caught.value)


def test_s3_lists_what_a_star_means(s3):
    assert list_s3("s3://bucket/*.tar", 5.0)[0] == "s3://bucket/a.tar"
    assert list_s3("s3://bucket/x*.tar", 5.0) == []
