"""A loopback stand-in for the Hub: enough of its HTTP interface for `datasets.load_dataset(repo_id)` to read
Parquet, for `hf_hub_download` of a model's file, and for `create_repo` and `upload_folder`.

    with FakeHub({("owner/name", "main"): {"README.md": b"...", "data/train.parquet": b"..."}}) as hub:
        subprocess.run([hub.python(), ...], env=hub.env())

`HF_ENDPOINT` is read when huggingface_hub is imported, so the client has to be another process. All hubs of a process
have one address, so that tests/warm_python.py need import it once.
"""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from warm_python import python


@functools.cache
def address() -> tuple[int, Path]:
    """A free port, and an empty folder for the cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        folder = tempfile.mkdtemp(prefix="fake_hub_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return free.getsockname()[1], Path(folder)


class FakeHub:
    """Serves repositories, given as {(repo id, revision): {path: content}}, on a port of 127.0.0.1; no cache.

    `requests` lists what was asked, as "METHOD path". Entering starts the server, leaving stops it.
    """

    def __init__(self, repos: dict[tuple[str, str], dict[str, bytes]]):
        # Clients resolve a revision to its commit and go on with that; both must find the same files.
        self.repos = {}
        for (repo, revision), files in repos.items():
            commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
            self.repos[repo, revision] = self.repos[repo, commit] = (commit, files)
        self.requests: list[str] = []
        self.messages: dict[str, list[str]] = {}
        """Commit messages by repository."""
        self.commits: dict[str, list[set[str]]] = {}
        """Names of the files of every commit that has any, by repository."""
        self.tokens: set[str | None] = set()
        """Authorization headers of what was written."""
        self.large: dict[str, bytes] = {}
        """Content of large files by SHA-256."""
        self.failures: dict[str, int] = {}
        """Last part of a path that is POSTed to ("create", "preupload", "batch", "commit") -> status, 0: drop the
        connection."""

    def create(self, repo: str) -> None:
        self.commit(repo, {}, "initial commit")

    def commit(self, repo: str, files: dict[str, bytes], message: str) -> str:
        _, old = self.repos.get((repo, "main"), ("", {}))
        messages = self.messages.setdefault(repo, [])
        messages.append(message)
        if files:
            self.commits.setdefault(repo, []).append(set(files))
        commit = hashlib.sha1(f"{repo}@{len(messages)}".encode()).hexdigest()
        self.repos[repo, "main"] = self.repos[repo, commit] = (commit, old | files)
        return commit

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        port, cache = address()
        shutil.rmtree(cache, ignore_errors=True)
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def env(self) -> dict[str, str]:
        """An environment in which this is the Hub, with an own cache and without proxies or offline switches."""
        dropped = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(dropped)}
        port, cache = address()
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        return env | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}

    def python(self) -> str:
        """The interpreter of processes with `env()`."""
        return python(self.env())


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        parts = url.path.strip("/").split("/")
        if parts[0] == "api":
            # /api/datasets/OWNER/NAME[/revision/REV | /tree/REV[/FOLDER]]
            repo, (action, revision, *rest) = "/".join(parts[2:4]), (parts[4:] or ["revision", "main"])
        elif parts[3:4] == ["resolve"]:
            # /datasets/OWNER/NAME/resolve/REV/PATH
            repo, (action, revision, *rest) = "/".join(parts[1:3]), parts[3:]
        elif parts[2:3] == ["resolve"]:
            # /OWNER/NAME/resolve/REV/PATH, of a model
            repo, (action, revision, *rest) = "/".join(parts[:2]), parts[2:]
        else:
            return self.error(404, "RepoNotFound")
        if (repo, unquote(revision)) not in self.hub.repos:
            known = any(repo == other for other, _ in self.hub.repos)
            return self.error(404, "RevisionNotFound" if known else "RepoNotFound")
        commit, files = self.hub.repos[repo, unquote(revision)]
        path = unquote("/".join(rest))
        if action == "resolve":
            return self.file(commit, files[path]) if path in files else self.error(404, "EntryNotFound", commit)
        if action == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})
        entries = {name: _entry("file", name, files[name]) for name in files}
        folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        entries |= {name: _entry("directory", name, b"") for name in folders}
        recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
        inside = [e for name, e in entries.items() if not path or name.startswith(path + "/")]
        if not inside and path:
            return self.error(404, "EntryNotFound")
        return self.json([e for e in inside if recursive or str(Path(e["path"]).parent) == (path or ".")])

    do_HEAD = do_GET

    def do_PUT(self):
        self.hub.large[self.path.rpartition("/")[2]] = self.body()
        self.reply(200, b"", {})

    def do_POST(self):
        self.hub.requests.append(f"POST {unquote(self.path)}")
        body = self.body()
        parts = urlsplit(self.path).path.strip("/").split("/")
        action = next((a for a in ("create", "validate-yaml", "preupload", "batch", "commit") if a in parts), None)
        if action in self.hub.failures:
            if not self.hub.failures[action]:
                return self.connection.shutdown(socket.SHUT_RDWR)
            return self.error(self.hub.failures[action], "Refused")
        self.hub.tokens.add(self.headers.get("Authorization"))
        if action == "create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            if (repo, "main") in self.hub.repos:
                return self.json({"url": self.url(repo)}, 409)
            self.hub.create(repo)
            return self.json({"url": self.url(repo)})
        if action == "validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if action == "batch":
            objects = [
                o | {"actions": {"upload": {"href": self.url(f"large/{o['oid']}")}}}
                for o in json.loads(body)["objects"]
            ]
            return self.json({"objects": objects, "transfer": "basic"})
        repo = "/".join(parts[2:4])
        if (repo, "main") not in self.hub.repos:
            return self.error(404, "RepoNotFound")
        if action == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            known = [{"path": f, "uploadMode": mode[f.endswith(".safetensors")], "shouldIgnore": False} for f in files]
            return self.json({"files": known})
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            regular = operation["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if regular else self.hub.large[value["oid"]]
        commit = self.hub.commit(repo, files, header["value"]["summary"])
        return self.json({"commitUrl": self.url(f"{repo}/commit/{commit}"), "commitOid": commit})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{path}"

    def json(self, value, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, commit: str, content: bytes) -> None:
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.reply(200, content, {"ETag": etag, "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"})

    def error(self, status: int, code: str, commit: str | None = None) -> None:
        known = {} if commit is None else {"X-Repo-Commit": commit}  # clients remember that it lacks the file
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **known})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def _entry(kind: str, path: str, content: bytes) -> dict:
    oid = hashlib.sha1(content or path.encode()).hexdigest()
    return {"type": kind, "path": path, "size": len(content), "oid": oid}
