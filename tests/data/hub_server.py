"""A server on loopback with the part of the Hub's API that reading a dataset needs, and helpers for servers."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3  # files a page of the listing: small, so that tests see several


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under `folder`, except locks. There must be no links."""
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def closed_port() -> int:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Print nothing: tests close connections early."""


class ServerIPv6(Server):
    address_family = socket.AF_INET6


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], host: str = "127.0.0.1") -> Iterator[Server]:
    """Run a server with `handler` in a thread; its port is `server.server_port`."""
    server = (ServerIPv6 if ":" in host else Server)((host, 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """What the handlers of the tests share."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """Datasets of one server: `commits[sha][path]` are contents, `branches[name]` is a sha."""

    repo: str = "user/rows"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # paths kept as large objects, with a SHA-256
    served: dict[str, bytes] = field(default_factory=dict)  # contents given out instead of the true ones
    endless: set[str] = field(default_factory=set)  # paths that are sent for up to 64 MB, without a length
    sent: int = 0  # MB of endless files
    moves_to: str | None = None  # the commit of main after it was resolved once
    token: str | None = None
    error: tuple[int, str] | None = None  # status and X-Error-Code of every answer
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, branch: str = "main", **files: str | bytes) -> str:
        """Add a commit of `files`, whose names have __ for slashes; the branch is moved to it."""
        contents = {n.replace("__", "/"): c if isinstance(c, bytes) else c.encode() for n, c in files.items()}
        sha = hashlib.sha1(repr(sorted(contents.items())).encode()).hexdigest()
        self.commits[sha] = contents
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if path in self.large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry["oid"] = "0" * 40
        return entry


class HubHandler(Handler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        hub.requests.append(f"{self.command} {parts.path}")
        api, files = f"/api/datasets/{hub.repo}", f"/datasets/{hub.repo}/resolve/"
        if hub.error:
            return self.failure(*hub.error)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.failure(401, "")
        if parts.path.startswith(f"{api}/tree/"):
            return self.listing(unquote(parts.path.removeprefix(f"{api}/tree/")), parse_qs(parts.query))
        if parts.path == api or parts.path.startswith(f"{api}/revision/"):
            return self.info(unquote(parts.path.removeprefix(api).removeprefix("/revision/")) or "main")
        if parts.path.startswith(files):
            return self.file(*unquote(parts.path.removeprefix(files)).split("/", 1))
        return self.failure(404, "RepoNotFound")

    def failure(self, status: int, code: str) -> None:
        self.answer(status, b"{}", **({"X_Error_Code": code} if code else {}))

    def info(self, revision: str) -> None:
        sha = self.hub.resolve(revision)
        if sha is None:
            return self.failure(404, "RevisionNotFound")
        if self.hub.moves_to:
            self.hub.branches["main"] = self.hub.moves_to
        self.answer(200, json.dumps({"id": self.hub.repo, "sha": sha}).encode())

    def listing(self, revision: str, query: dict[str, list[str]]) -> None:
        sha = self.hub.resolve(revision)
        if sha is None or query.get("recursive") not in (["true"], ["True"]):
            return self.failure(404, "RevisionNotFound")
        entries = [self.hub.entry(*item) for item in sorted(self.hub.commits[sha].items())]
        begin = int(query.get("cursor", ["0"])[0])
        more = {}
        if begin + PAGE < len(entries):
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={begin + PAGE}"
            more = {"Link": f'<{address}>; rel="next"'}
        folders = [{"type": "directory", "path": "train", "oid": "0" * 40}] if not begin else []
        self.answer(200, json.dumps(folders + entries[begin : begin + PAGE]).encode(), **more)

    def file(self, revision: str, path: str) -> None:
        sha = self.hub.resolve(revision)
        content = self.hub.commits.get(sha or "", {}).get(path)
        if sha is None or content is None:
            return self.failure(404, "EntryNotFound")
        etag = self.hub.entry(path, content).get("lfs", {}).get("oid") or blob_id(content)
        if path in self.hub.endless and self.command == "GET":
            return self.endless()
        self.answer(200, self.hub.served.get(path, content), X_Repo_Commit=sha, ETag=f'"{etag}"')

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        with suppress(OSError):
            for _ in range(64):
                self.wfile.write(bytes(1_000_000))
                self.hub.sent += 1


@contextmanager
def hub_serving() -> Iterator[Hub]:
    """A Hub without any commit; its address is `hub.endpoint`."""
    hub = Hub()
    with serving(type("Bound", (HubHandler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield hub
