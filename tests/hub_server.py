"""A hub of one machine: the few endpoints of huggingface.co that huggingface_hub uses, on the loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A server of repositories.

    Attributes:
        repositories: Id to name to content. One commit each, which "main" and "v1" mean too.
        private: Ids that need the token "right".
        gated: Ids whose files nobody may have.
        status: What every question is answered with, when it is not None.
        names: Headers that name files, such as the ETag, instead of honest ones.
        cut: How many downloads break after half of the bytes.
        requests: (method, path, Range) of each request.
        created: What each request to make a repository asked for.
        commits: (repository, revision, header) of each commit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.cut = 0
        self.status: int | None = None
        self.names: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.created: list[dict] = []
        self.commits: list[tuple[str, str, dict]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self, method: str) -> list[str]:
        """What was asked for by this method."""
        return [path for verb, path, _ in self.requests if verb == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Makes repositories and branches, and takes commits of files inside the request."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(("POST", path, url.query))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer right":
            return self._fail(401, None, True, "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self._send(b'{"errors": [], "warnings": []}', True)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.server.created.append(wanted)
            repository = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.server.repositories.setdefault(repository, {})
            return self._send(json.dumps({"url": f"{self.server.endpoint}/{repository}"}).encode(), True)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if match is None or match[1] not in self.server.repositories:
            return self._fail(404, "RepoNotFound", True)
        if match[2] == "branch":
            return self._send(b"{}", True)
        if match[2] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._send(json.dumps({"files": [{**file, "shouldIgnore": False} for file in files]}).encode(), True)
        header, *entries = [json.loads(line) for line in body.splitlines()]
        self.server.commits.append((match[1], match[3], header["value"]))
        for entry in entries:
            file = entry["value"]
            self.server.repositories[match[1]][file["path"]] = base64.b64decode(file["content"])
        answer = {"commitUrl": f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
        if "create_pr=1" in url.query:
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{match[1]}/discussions/1"
        return self._send(json.dumps(answer).encode(), True)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        match = tree or file or info
        if self.server.status is not None:
            return self._fail(self.server.status, None, body, "busy", {"Retry-After": "7"})
        if match is None:
            return self._fail(404, "RepoNotFound", body)
        repository, revision = match[1], match[2] or "main"
        token = self.headers.get("Authorization")
        if token not in (None, "Bearer right"):
            return self._fail(401, None, body, "Invalid credentials in Authorization header")
        if repository not in self.server.repositories or (repository in self.server.private and token is None):
            return self._fail(401, "RepoNotFound", body)
        if repository in self.server.gated and file:
            return self._fail(403, "GatedRepo", body)
        if revision not in ("main", "v1", COMMIT):
            return self._fail(404, "RevisionNotFound", body)
        files = self.server.repositories[repository]
        if tree:
            return self._tree(files, match[3] or "", body)
        if info:
            siblings = [{"rfilename": name} for name in files]
            return self._send(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), body)
        if match[3] not in files:
            return self._fail(404, "EntryNotFound", body)
        return self._file(files[match[3]], body)

    def _tree(self, files: dict[str, bytes], folder: str, body: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {name[len(prefix) :]: content for name, content in files.items() if name.startswith(prefix)}
        if not inside:
            return self._fail(404, "EntryNotFound", body)
        entries = [
            {"type": "file", "path": prefix + name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in inside.items()
            if "/" not in name
        ]
        folders = sorted({name.split("/")[0] for name in inside if "/" in name})
        entries += [{"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40} for name in folders]
        return self._send(json.dumps(entries).encode(), body)

    def _file(self, content: bytes, body: bool) -> None:
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            **self.server.names,
        }
        status = 200
        if (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) and body:
            start, whole = int(wanted[1]), len(content)
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            content, status = content[start:], 206
        self._send(content, body, status, headers, cut=body and self.server.cut > 0)

    def _fail(
        self, status: int, code: str | None, body: bool, message: str = "", more: dict[str, str] | None = None
    ) -> None:
        headers = {**(more or {}), "X-Error-Message": message or str(code), **({"X-Error-Code": code} if code else {})}
        self._send(b"{}", body, status, headers)

    def _send(
        self, content: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if cut:
            self.server.cut -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)
        elif body:
            self.wfile.write(content)
