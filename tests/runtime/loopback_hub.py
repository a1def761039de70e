"""A small hub on the loopback address: as much of the HTTP of Hugging Face and of ModelScope as their clients use.

It can break connections, and it remembers every request. Large files are redirected to a store, as the real hub does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One request as the hub saw it, and how many bytes of body it sent back."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    sent: int


@dataclass
class Repo:
    """A model: files per commit, branches and tags, and who may read it."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    token: str | None = None
    """Needed to see the model at all."""
    gated: bool = False
    """Whether its files, but not its listing, are closed to everybody."""
    private: bool = False
    """What whoever made it asked for."""
    licence: str | None = None
    """What its card says."""
    claimed_size: int | None = None
    """What listings say of the size of each large file, where that is not the truth."""


@dataclass
class Break:
    """Cut the connection once so many bytes of a file's body were sent."""

    after: int
    times: int = 1
    reset: bool = False
    """Whether the client sees a reset, or an orderly end that comes too early."""


@dataclass
class LoopbackHub:
    """Use as a context manager; ``url`` is good for ``HF_ENDPOINT`` and ``MODELSCOPE_ENDPOINT``."""

    repos: dict[str, Repo] = field(default_factory=dict)
    breaks: dict[str, Break] = field(default_factory=dict)
    """File path -> how its connection breaks."""
    writer: str | None = None
    """The token with which files are uploaded."""
    status: int | None = None
    """Answer everything with this status."""
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes], *, refs: tuple[str, ...] = ("main", "master")) -> str:
        """Commit files to a model, point branches at the commit, and return its hash."""
        repo = self.repos.setdefault(repo_id, Repo({}, {}))
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs.update(dict.fromkeys(refs, commit))
        return commit

    def fetched(self, path: str) -> list[Request]:
        """The requests that sent bytes of a file."""
        return [request for request in self.requests if request.method == "GET" and request.path == path]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        chunks = iter(self._chunk, b"")
        length = self.headers.get("Content-Length")
        body = b"".join(chunks) if length is None else self.rfile.read(int(length))
        path = unquote(urlsplit(self.path).path)
        if self.hub.status is None and self.hub.writer and path.startswith(("/api/repos/create", "/api/models/")):
            self._write(path, body)
            return
        self._json(200, {"Code": 200, "Success": True, "Data": {}})

    def _route(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if self.hub.status is not None:
            self._json(self.hub.status, {"error": "out of order"})
        elif path.startswith("/api/v1/models/"):
            self._modelscope("/".join(path.split("/")[4:6]), "/".join(path.split("/")[6:]), query)
        elif path.startswith("/api/models/"):
            self._huggingface("/".join(path.split("/")[3:5]), parts.path.split("/")[5:])
        elif path.startswith("/store/"):
            _, _, name, digest = path.split("/", 3)
            name = name.replace("~", "/")
            found = (
                files[name] for repo in self.hub.repos.values() for files in repo.commits.values() if name in files
            )
            self._file(name, next(data for data in found if hashlib.sha256(data).hexdigest() == digest))
        elif "/resolve/" in path:
            owner, name, _, revision, *file = path.strip("/").split("/")
            self._resolve(f"{owner}/{name}", unquote(revision), "/".join(file))
        else:
            self._json(200, {"Code": 200, "Success": True, "Data": {}})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0] or b"0", 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _write(self, path: str, body: bytes) -> None:
        """Uploads, of those who have the token: all files lie within the commit, none in a store."""
        if self.headers.get("Authorization") != f"Bearer {self.hub.writer}":
            self._json(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repos.setdefault(name, Repo({"0": {}}, {"main": "0"}, private=is_private))
            self._json(200, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json(200, {"files": files})
        else:
            name = "/".join(path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self.hub.add(name, files, refs=("main",))
            self._json(
                200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
            )

    # Hugging Face: https://huggingface.co/docs/hub/api

    def _readable(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            status, text = (404, "Repository not found") if repo is None else (401, "Invalid username or password.")
            self._json(status, {"error": text}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": text})
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            text = f"Invalid rev id: {revision}"
            self._json(404, {"error": text}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": text})
            return None
        return commit

    def _huggingface(self, repo_id: str, rest: list[str]) -> None:
        repo = self._readable(repo_id)
        commit = repo and self._commit(repo, unquote(rest[1]) if len(rest) > 1 else "main")
        if not repo or not commit:
            return
        files = repo.commits[commit]
        if rest[:1] == ["tree"]:
            self._json(200, [{"type": "file", "path": path, **_blob(path, data)} for path, data in files.items()])
            return
        siblings: list[dict[str, object]] = []
        for path, data in files.items():
            blob = _blob(path, data)
            size = repo.claimed_size if repo.claimed_size and _is_large(path) else len(data)
            siblings.append({"rfilename": path, "size": size, "blobId": blob["oid"]})
            if _is_large(path):
                siblings[-1]["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        card = {"cardData": {"license": repo.licence}} if repo.licence else {}
        self._json(200, {"id": repo_id, "sha": commit, "siblings": siblings, "tags": [], "private": False} | card)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._readable(repo_id)
        commit = repo and self._commit(repo, revision)
        if not repo or not commit:
            return
        if repo.gated:
            text = f"Access to model {repo_id} is restricted."
            self._json(403, {"error": text}, {"X-Error-Code": "GatedRepo", "X-Error-Message": text})
        elif path not in repo.commits[commit]:
            self._json(404, {}, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        else:
            data = repo.commits[commit][path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(path, data)["oid"]}"'}
            if _is_large(path):
                digest = hashlib.sha256(data).hexdigest()
                headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                # Another host to the client, as the real store is.
                headers["Location"] = f"{self.hub.url}/store/{path.replace('/', '~')}/{digest}".replace(
                    "127.0.0.1", "localhost"
                )
                self._answer(302, b"", headers)
            else:
                self._file(path, data, headers)

    # ModelScope: https://modelscope.cn/docs

    def _modelscope(self, repo_id: str, rest: str, query: dict[str, str]) -> None:
        repo = self.hub.repos.get(repo_id)
        commit = repo and repo.refs.get(query.get("Revision", "master"), query.get("Revision", "master"))
        if not repo or commit not in repo.commits:
            self._json(404, {"Code": 10010205001, "Success": False, "Message": "not found"})
        elif rest == "repo/files":
            files = []
            for path, data in repo.commits[commit].items():
                if path.startswith(query.get("Root", "")):
                    size = repo.claimed_size if repo.claimed_size and _is_large(path) else len(data)
                    digest = hashlib.sha256(data).hexdigest()
                    files.append({"Path": path, "Name": path, "Type": "blob", "Size": size, "Sha256": digest})
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": files}})
        elif rest == "repo":
            self._file(query["FilePath"], repo.commits[commit][query["FilePath"]])
        else:
            self._json(200, {"Code": 200, "Success": True, "Data": {"Name": repo_id}})

    # What both share

    def _json(self, status: int, data: object, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _file(self, path: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | (headers or {})
        wanted, status, total = self.headers.get("Range"), 200, len(data)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) if last else total - 1, total - 1)
            data, status = data[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        self._answer(status, data, headers, path)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], path: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        fault = self.hub.breaks.get(path or "")
        if self.command == "HEAD":
            body = b""
        elif fault and fault.times and len(body) > fault.after:
            fault.times -= 1
            body = body[: fault.after]
            self.close_connection = True
        else:
            fault = None
        # Noted first: the client may act on the last byte before this thread runs again.
        token = self.headers.get("Authorization")
        name = path or urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, name, self.headers.get("Range"), token, status, len(body)))
        self.wfile.write(body)
        if fault and fault.reset:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _blob(path: str, data: bytes) -> dict[str, object]:
    """A file as the listings describe it: git's hash, and for large files that of the content."""
    blob: dict[str, object] = {"size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if _is_large(path):
        blob["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return blob
