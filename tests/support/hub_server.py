"""A real HTTP server on loopback that speaks as much of the hub as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and what it does wrong.

    files: repository name -> path -> content, all at revision "main", commit SHA.
    gated: repositories that answer 403.
    truncated: paths of which GET, unlike HEAD, knows only the first half.
    interrupted: paths whose first download breaks off half-way.
    failing: paths that answer 404 although they are listed.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    truncated: set[str] = field(default_factory=set)
    interrupted: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; connections are refused from then on. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            repo, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo in self.hub.gated and kind != "revision":
            return self._error(403, "GatedRepo")
        if repo not in self.hub.files:
            return self._error(404, "RepoNotFound")
        if revision not in ("main", SHA):
            return self._error(404, "RevisionNotFound")
        files = self.hub.files[repo]
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings})
        if kind == "tree":
            return self._json([_entry(name, content) for name, content in files.items()])
        name = "/".join(parts[4:])
        if name not in files or name in self.hub.failing:
            return self._error(404, "EntryNotFound")
        return self._file(name, files[name])

    def _file(self, name: str, content: bytes) -> None:
        etag = _oid(content)
        start = 0
        requested = self.headers.get("Range", "")
        if requested.startswith("bytes="):
            start = int(requested.removeprefix("bytes=").split("-")[0])
        body = content[start:]
        if name in self.hub.truncated and self.command == "GET":
            body = body[: len(body) // 2]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.interrupted:
            self.hub.interrupted.discard(name)
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = _oid(content)
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
