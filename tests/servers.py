"""Real servers for remote shards: https with a certificate of its own, which fails when told to, and a small S3."""

import os
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections import Counter, defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

CERTIFICATE = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
               "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]  # fmt: skip


class Files(BaseHTTPRequestHandler):
    """Serve a folder with ranges and tags; `plan` says what goes wrong, per file name and request."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        name = os.path.basename(address.path)
        self.server.asked[name] += 1
        self.server.queries.append(address.query)
        self.server.ranges[name].append(self.headers.get("Range"))
        self.answer(address, name, self.server.plan[name].popleft() if self.server.plan[name] else "")

    def answer(self, address, name, fault):
        path = self.server.folder / urllib.parse.unquote(address.path).lstrip("/")
        if fault.isdigit():
            return self.fail(int(fault))
        if fault.startswith("to "):
            return self.fail(302, Location=fault[3:])
        if not path.is_file():
            return self.fail(404)
        data = path.read_bytes()
        data = bytes(len(data)) if fault == "wrong bytes" else data
        tag, start = f'"{len(data)}-{path.stat().st_mtime_ns}"', 0
        if self.headers.get("If-None-Match") == tag:
            return self.fail(304)
        wanted = self.headers.get("Range")
        is_same = not self.server.knows_if_range or self.headers.get("If-Range", tag) == tag
        if wanted and self.server.knows_ranges and is_same:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}")
            data = data[start:end]
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = len(data) // 2 if fault in ("cut", "hang") else len(data)
        for at in range(0, cut, 2**16):
            self.wfile.write(data[at : min(at + 2**16, cut)])
            self.server.sent[name] += min(2**16, cut - at)
            time.sleep(self.server.seconds_per_block)
        self.wfile.flush()
        if fault == "cut":
            time.sleep(0.2)  # let what was sent arrive
        if fault == "hang":
            self.server.is_over.wait(30)
        if fault:
            self.close_connection = True

    def fail(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Bucket(Files):
    """Serve a folder as S3 does: `/bucket/key`, HEAD, GET with ranges, and lists."""

    do_HEAD = Files.do_GET

    def answer(self, address, name, fault):
        query = urllib.parse.parse_qs(address.query)
        if "list-type" not in query:
            return super().answer(address, name, fault)
        bucket, prefix = address.path.strip("/"), query.get("prefix", [""])[0]
        root = self.server.folder / bucket
        keys = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(root / key).stat().st_size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        text = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


class Server(ThreadingHTTPServer):
    """Serve `folder` from a thread; counts requests and bytes per file name."""

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[Files], certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder
        self.is_over = threading.Event()
        self.forget()
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.host = f"localhost:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def forget(self):
        self.asked, self.sent, self.queries = Counter(), Counter(), []
        self.ranges, self.plan = defaultdict(list), defaultdict(deque)
        self.knows_ranges, self.knows_if_range, self.seconds_per_block = True, True, 0.0

    def handle_error(self, *_):
        pass  # clients that are killed or cut a transfer are what is tested

    def stop(self):
        self.is_over.set()
        self.shutdown()
        self.server_close()


def make_certificate(folder: Path) -> Path:
    """Make a key and a self-signed certificate for localhost, in one file."""
    path = folder / "server.pem"
    subprocess.run([*CERTIFICATE, "-keyout", folder / "key", "-out", folder / "crt"], check=True, capture_output=True)
    path.write_bytes((folder / "key").read_bytes() + (folder / "crt").read_bytes())
    return path
