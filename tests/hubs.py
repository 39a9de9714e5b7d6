"""A hub of models on this machine: as much of the HuggingFace hub's protocol as pushing and loading a model takes."""

import base64
import hashlib
import json
import subprocess
import sys
import urllib.parse
from pathlib import Path

from commands import environment
from servers import Files, Server


class Hub(Files):
    """Serve and take models: folder/USER/NAME/REVISION/FILE; `main` is the newest commit, files go in by one commit."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked[path.rpartition("/")[2]] += 1
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            model, (what, revision) = self.server.folder.joinpath(*words[2:4]), words[4:6]
            commit = self.commit_of(model, revision)
            if not model.is_dir():
                return self.refuse(404, "RepoNotFound")
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            files = sorted(path for path in (model / commit).iterdir())
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": tag(f)} for f in files]
            about = {"id": "/".join(words[2:4]), "sha": commit, "siblings": [{"rfilename": f.name} for f in files]}
            return self.tell(listed if what == "tree" else about)
        user, name, _resolve, revision, file = words
        path = self.server.folder / user / name / revision / file
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        self.tell(path.read_bytes(), {"ETag": f'"{tag(path)}"', "X-Repo-Commit": revision})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        words = urllib.parse.urlsplit(self.path).path.strip("/").split("/")
        if words == ["api", "repos", "create"]:
            asked = json.loads(body)
            (self.server.folder / asked["organization"] / asked["name"]).mkdir(parents=True, exist_ok=True)
            return self.tell({"url": f"http://{self.server.host}/{asked['organization']}/{asked['name']}"})
        if words == ["api", "validate-yaml"]:
            return self.tell({"errors": [], "warnings": []})
        if words[4] == "preupload":
            files = json.loads(body)["files"]
            return self.tell(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        assert words[4] == "commit", self.path
        commit = hashlib.sha1(body).hexdigest()
        model = self.server.folder.joinpath(*words[2:4])
        (model / commit).mkdir()
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                (model / commit / part["value"]["path"]).write_bytes(base64.b64decode(part["value"]["content"]))
        (model / "main").unlink(missing_ok=True)
        (model / "main").symlink_to(commit)
        self.tell(
            {"commitUrl": f"http://{self.server.host}/{'/'.join(words[2:4])}/commit/{commit}", "commitOid": commit}
        )

    def commit_of(self, model: Path, revision: str) -> str | None:
        found = model / revision
        return found.resolve().name if found.exists() else None

    def tell(self, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code):
        self.fail(status, **{"X-Error-Code": code, "X-Error-Message": code})


def tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def python(code: str, hub: Server, cache: Path, **extra: str) -> subprocess.CompletedProcess:
    """Run lines of Python in a process of their own, for which `hub` is the HuggingFace hub."""
    where = {"HF_ENDPOINT": f"http://{hub.host}", "HF_HOME": str(cache), "HF_TOKEN": "hf_none"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment(**where | extra), cwd=cache, capture_output=True, text=True, timeout=120
    )
