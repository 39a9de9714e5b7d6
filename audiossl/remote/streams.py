"""How is one file read from front to back over `https://` or `s3://`, and which failures may pass?

fsspec does the talking (aiohttp; s3fs); here its errors are sorted into those that may go right the next time and those
that will not, and worded without anything secret. Secrets come from the environment, never from a config:
AUDIOSSL_URL_QUERY (a signed query, added to each https request), a netrc, and what S3's own tools read.
"""

import errno
import os
import ssl
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from audiossl.errors import UserError
from audiossl.indexing.shardpaths import QUERY_VARIABLE, without_secrets

CHUNK_BYTES = {"https": 2**20, "s3": 2**23}  # S3 is asked anew for each
INSTALL = "pip install -e '.[remote]' -c constraints.txt"
SAFE_IN_URLS = "%/:=~+!$,;'@()*[]"
MAX_RETRY_AFTER_SECONDS = 120
_PASSING_STATUS = (408, 416, 425, 429)  # and all from 500 on
_LASTING_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENOSYS)  # s3fs's words for what S3 will always refuse


class Passing(Exception):
    """Say what went wrong and may go right the next time, after `wait_seconds`, or only from the beginning on."""

    def __init__(self, reason: str, wait_seconds: float = 0.0, must_restart: bool = False):
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.must_restart = must_restart


class Refused(Exception):
    """Say what will go wrong the next time too; `is_absent` for 404."""

    def __init__(self, reason: str, is_absent: bool = False):
        super().__init__(reason)
        self.is_absent = is_absent


@dataclass(frozen=True)
class Stream:
    """Hold an open transfer: `start` is 0 where ranges are not known; a `tag`, if there is one, names the version."""

    read: Callable[[int], bytes]
    start: int
    num_bytes: int | None  # of the whole file
    tag: str | None


@contextmanager
def open_stream(
    url: str, start: int, tag: str | None, stall_seconds: float, known_tag: str | None = None
) -> Iterator[Stream]:
    """Open `url` from byte `start` on, or from 0 where that cannot be or its tag is no longer `tag`.

    With the tag `known_tag` nothing need come. `stall_seconds` without a byte are a time-out. Raises Passing and
    Refused, on opening and from inside the `with`, and UserError where the extra is not installed.
    """
    try:
        if url.startswith("s3://"):
            opened = _open_s3(url, start, tag, stall_seconds)
        else:
            opened = _open_https(url, start, tag, stall_seconds, known_tag)
        with opened as stream:
            yield stream
    except (Passing, Refused, UserError):
        raise
    except Exception as error:
        raise _sorted(error) from error


@contextmanager
def _open_https(url: str, start: int, tag: str | None, stall_seconds: float, known_tag: str | None) -> Iterator[Stream]:
    fsspec, aiohttp = _imported("fsspec"), _imported("aiohttp")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
    # "encoded", because a signed query must arrive as it was signed; "trust_env" for proxies and netrc
    fs = fsspec.filesystem("https", encoded=True, client_kwargs={"timeout": timeout, "trust_env": True})
    headers = {"Accept-Encoding": "identity"}
    if known_tag is not None and known_tag.endswith('"'):  # else a date
        headers["If-None-Match"] = known_tag
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag is not None and not tag.startswith("W/"):
            headers["If-Range"] = tag
    query = os.environ.get(QUERY_VARIABLE, "").lstrip("?")
    full = urllib.parse.quote(url, safe=SAFE_IN_URLS) + (f"?{query}" if query else "")
    trust = ssl.create_default_context()  # aiohttp's own was made at its import, whatever SSL_CERT_FILE says now
    with fs.open(full, "rb", block_size=0, size=1, headers=headers, ssl=trust) as file:  # a size, or it asks for one
        answer = file.r
        if answer.url.scheme != "https":
            raise Refused(f"leads on to {answer.url.scheme}://{answer.url.host}; only https:// is allowed")
        found, total = answer.headers, answer.headers.get("Content-Length", "")
        first = "0"
        if answer.status == 206:
            first, _, total = found.get("Content-Range", "").removeprefix("bytes ").partition("/")
        is_plain = found.get("Content-Encoding", "identity") == "identity"
        yield Stream(
            read=file.read,
            start=int(first.partition("-")[0] or 0),
            num_bytes=int(total) if total.isdigit() and is_plain else None,
            tag=known_tag if answer.status == 304 else found.get("ETag") or found.get("Last-Modified"),
        )


@contextmanager
def _open_s3(url: str, start: int, tag: str | None, stall_seconds: float) -> Iterator[Stream]:
    fs = s3_filesystem(stall_seconds)
    fs.invalidate_cache()
    with fs.open(url, "rb", block_size=CHUNK_BYTES["s3"], cache_type="none") as file:
        found = file.details.get("ETag")
        begin = start if tag in (None, found) and start < file.size else 0
        file.seek(begin)
        yield Stream(read=file.read, start=begin, num_bytes=file.size, tag=found)


def s3_filesystem(stall_seconds: float) -> Any:
    """Connect to S3 as fsspec's and S3's own settings say; anonymously where there are no credentials at all."""
    fsspec, botocore = _imported("fsspec"), _imported("botocore.session", "s3fs")
    settings = fsspec.config.conf.get("s3", {})
    timeouts = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds, "retries": {"max_attempts": 0}}
    options = {"config_kwargs": timeouts | settings.get("config_kwargs", {})}
    if "anon" not in settings and not settings.get("key") and botocore.session.get_session().get_credentials() is None:
        options["anon"] = True
    fs = fsspec.filesystem("s3", **options)
    fs.retries = 1  # we try again ourselves
    return fs


def list_s3(pattern: str, stall_seconds: float) -> list[str]:
    """List the `s3://` addresses that a glob matches; raises UserError."""
    fs = s3_filesystem(stall_seconds)
    try:
        return [f"s3://{name}" for name in fs.glob(pattern)]
    except Exception as error:
        raise UserError(f"{pattern}: {_sorted(error)}") from error


def _imported(name: str, *others: str) -> ModuleType:
    """Import what the extra brings, only when it is needed; a name inside a package gives the package."""
    try:
        for other in (*others, name):
            found = __import__(other)
        return found
    except ImportError as error:
        raise UserError(
            f"shards over https:// and s3:// need packages that are not installed ({error}): {INSTALL}"
        ) from error


def _sorted(error: Exception) -> Exception:
    """Word an error of aiohttp, botocore or s3fs as Passing or Refused; their own words may hold a signed query."""
    if isinstance(error, IndexError) and isinstance(error.__context__, OSError):
        error = error.__context__  # s3fs 2026.9 looks for an errno in a TimeoutError that has none
    cause = error.__cause__ or error
    status = getattr(error, "status", None)
    if status is None and isinstance(response := getattr(cause, "response", None), dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, FileNotFoundError):
        return Refused("not found (404)", is_absent=True)
    if isinstance(error, PermissionError):
        status = status or 403
    if isinstance(status, int) and status >= 400:
        headers = getattr(error, "headers", None) or {}
        asked = str(headers.get("Retry-After", ""))
        if status in _PASSING_STATUS or status >= 500:
            return Passing(
                f"the server answers {status}", min(int(asked), MAX_RETRY_AFTER_SECONDS) if asked.isdigit() else 0
            )
        hint = f"; is {QUERY_VARIABLE} or a credential missing or expired?" if status in (401, 403) else ""
        return Refused(f"the server answers {status}{hint}")
    name, text = type(error).__name__, _without_query(" ".join(str(error).split()))
    is_trust = isinstance(getattr(error, "certificate_error", None) or error, ssl.SSLError) or name == "SSLError"
    if is_trust:
        return Refused(f"its certificate is not trusted ({text}); SSL_CERT_FILE names others to trust")
    if "timeout" in name.lower() or isinstance(error, TimeoutError):
        return Passing("no answer in time")
    if isinstance(error, OSError) and error.errno in _LASTING_ERRNOS or name in _LASTING:
        return Refused(f"{name}: {text}")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore"):
        return Passing(f"{name}: {text}" if text else name)
    return error


_LASTING = ("InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError", "TooManyRedirects", "NoCredentialsError",
            "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "InvalidEndpoint")  # fmt: skip


def _without_query(text: str) -> str:
    query = os.environ.get(QUERY_VARIABLE, "").lstrip("?")
    text = text.replace(query, "***") if query else text
    return " ".join(without_secrets(word) for word in text.split())[:300]
