"""A small in-memory lakeFS server, which responds as the real one recorded in tests/data/lakefs_recorded.json.

`LakeFS("local")` serves objects itself; `LakeFS("s3")` redirects clients to a second server, the storage, by
presigned URLs. test_lakefs_server.py replays the recording against both. A test may inspect `requests`, modify
what is stored, and alter responses by `damage` and `before`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 1000
CHUNKED_FROM = 2048  # bytes: Go's server says no length of a longer answer that is written at once


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - never altered
    length: int | None = None  # a false Content-Length


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.answer = as_json(status, {"message": message})


@dataclass
class Stored:
    data: bytes
    checksum: str
    address: str
    content_type: str
    mtime: int


@dataclass
class Commit:
    record: dict[str, Any]
    objects: dict[str, Stored]


@dataclass
class Repository:
    record: dict[str, Any]
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    staged: dict[str, dict[str, Stored]] = field(default_factory=dict)

    def seen(self, branch: str) -> dict[str, Stored]:
        return {**self.commits[self.branches[branch]].objects, **self.staged.get(branch, {})}


class Request(NamedTuple):
    method: str
    path: str  # of the API without its /api/v1, or of the storage
    authorized: bool  # whether credentials came with it
    object: str


class LakeFS:
    """Start with `with LakeFS(kind) as server`, and give a client its `url`, `access` and `secret`."""

    def __init__(self, kind: str = "local") -> None:
        self.kind, self.access, self.secret = kind, "AKIA" + secrets.token_hex(8), secrets.token_urlsafe(24)
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}  # of the storage: path -> content
        self.addresses: dict[str, tuple[str, Stored]] = {}
        self.signatures: set[str] = set()
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.damage: Callable[[str, Answer], Answer] = lambda _key, answer: answer  # of an object's bytes
        self.before: Callable[[Request], Answer | None] = lambda _request: None
        self._lock, self._reading = threading.Lock(), 0
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> LakeFS:
        self.url, self.storage = self._listen(self._api), self._listen(self._s3)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        while self._servers:
            server = self._servers.pop()
            server.shutdown()
            server.server_close()

    def _listen(self, answer: Callable[..., Answer]) -> str:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(iter(self.chunk, b""))
                parts = urlsplit(self.path)
                query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
                request = Request(
                    self.command, parts.path.removeprefix("/api/v1"), "Authorization" in self.headers,
                    query.get("path", ""),
                )  # fmt: skip
                owner.requests.append(request)
                try:
                    said = owner.before(request) or answer(request, parts.path, query, self.headers, body)
                except Refused as refused:
                    said = refused.answer
                self.say(said)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_one

            def chunk(self) -> bytes:
                data = self.rfile.read(int(self.rfile.readline(), 16))
                self.rfile.readline()
                return data

            def say(self, said: Answer) -> None:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                chunked = len(said.body) > CHUNKED_FROM and said.headers.get("Content-Type") == "application/json"
                if chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(said.body) if said.length is None else said.length))
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(said.body), said.body) if chunked else said.body)
                self.close_connection = said.length is not None

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    def put(self, name: str, objects: dict[str, bytes], branch: str = "main", checksum: str = "") -> None:
        """Stage objects of a repository without a request each, with a `checksum` of another kind if given."""
        repo = self.repositories[name]
        for key, data in objects.items():
            checked = checksum or hashlib.md5(data).hexdigest()
            stored = Stored(data, checked, self._address(repo), "application/octet-stream", int(time.time()))
            self._stage(repo, branch, key, stored)

    # The storage of kind s3

    def presigned(self, address: str, method: str, name: str) -> str:
        signature = secrets.token_hex(32)
        self.signatures.add(f"{method} {signature}")
        attached = (
            f"&response-content-disposition=attachment%3B%20filename%3D{quote(name)}" if method == "Get" else ""
        )
        return (
            f"{self.storage}/{quote(address.removeprefix('s3://'))}?X-Amz-Algorithm=AWS4-HMAC-SHA256"
            f"&X-Amz-Credential=testing%2F20261121%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20261121T051842Z"
            f"&X-Amz-Expires=900&X-Amz-SignedHeaders=host{attached}&x-id={method}Object&X-Amz-Signature={signature}"
        )

    def _s3(self, request: Request, path: str, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        # S3 refuses a request that is authorised in two ways.
        if f"{request.method.title()} {query.get('X-Amz-Signature')}" not in self.signatures or request.authorized:
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"})
        address = "s3:/" + unquote(path)
        if request.method == "PUT":
            self.uploaded[address] = body
            etag = f'"{hashlib.md5(body).hexdigest()}"'
            return Answer(200, b"", {"ETag": etag, "Content-Type": "text/html; charset=utf-8"})
        more = {"Accept-Ranges": "bytes", "Content-Disposition": query["response-content-disposition"]}
        return self._bytes(*self.addresses[address], headers.get("Range"), more)

    def _bytes(self, key: str, stored: Stored, wanted: str | None, more: dict[str, str]) -> Answer:
        modified = formatdate(stored.mtime, usegmt=True)
        headers = {
            "Content-Type": stored.content_type,
            "Etag": f'"{stored.checksum}"',
            "Last-Modified": modified,
            **more,
        }
        with self._lock:
            self._reading += 1
            self.most_at_once = max(self.most_at_once, self._reading)
        try:
            data, status = stored.data, 200
            if wanted:
                first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                if first >= len(data):
                    return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                last = min(last, len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data, status = data[first : last + 1], 206
            return self.damage(key, Answer(status, data, headers))
        finally:
            with self._lock:
                self._reading -= 1

    # The API

    def _api(self, request: Request, path: str, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        expected = base64.b64encode(f"{self.access}:{self.secret}".encode()).decode()
        if headers.get("Authorization") != f"Basic {expected}":
            raise Refused(401, "error authenticating request")
        for method, pattern, function in ROUTES:
            if method == request.method and (match := re.fullmatch(pattern, request.path)):
                names = {k: unquote(v) for k, v in match.groupdict().items()}
                if "repo" in names:
                    if names["repo"] not in self.repositories:
                        raise Refused(404, "repository not found")
                    names["repo"] = self.repositories[names["repo"]]  # type: ignore[assignment]
                return function(self, query=query, headers=headers, body=body, **names)
        raise Refused(404, "invalid API endpoint")

    def config(self, **_: Any) -> Answer:
        s3 = self.kind == "s3"
        storage = {
            "blockstore_description": "", "blockstore_id": "",
            "blockstore_namespace_ValidityRegex": f"^{self.kind}://",
            "blockstore_namespace_example": f"{self.kind}://example-bucket/", "blockstore_type": self.kind,
            "default_namespace_prefix": "" if s3 else "local://", "import_support": s3,
            "import_validity_regex": f"^{self.kind}://", "pre_sign_multipart_upload": s3, "pre_sign_support": s3,
            "pre_sign_support_ui": False,
        }  # fmt: skip
        version = {"version": "1.83.0-snapshot", "version_context": "lakeFS"}
        parts = {"storage_config": storage, "storage_config_list": [], "version_config": version}
        return as_json(200, {"capabilities_config": {}, "ui_config": {}, **parts})

    def create(self, body: bytes, **_: Any) -> Answer:
        asked = json.loads(body)
        if asked["name"] in self.repositories:
            raise Refused(409, "error creating repository: not unique")
        record = {
            "creation_date": int(time.time()), "default_branch": asked["default_branch"], "id": asked["name"],
            "read_only": False, "storage_id": "", "storage_namespace": asked["storage_namespace"],
        }  # fmt: skip
        repo = self.repositories[asked["name"]] = Repository(record, {})
        repo.branches[asked["default_branch"]] = self._new_commit(repo, "", "Repository created", {}, [], {}, "")
        return as_json(201, record)

    def properties(self, repo: Repository, **_: Any) -> Answer:
        return as_json(200, repo.record)

    def remove(self, repo: Repository, **_: Any) -> Answer:
        del self.repositories[repo.record["id"]]
        return Answer(204)

    def commit_of(self, repo: Repository, ref: str, **_: Any) -> Answer:
        return as_json(200, self._resolve(repo, ref).record)

    def _resolve(self, repo: Repository, ref: str) -> Commit:
        named = repo.branches.get(ref) or repo.tags.get(ref)
        found = [named] if named else [c for c in repo.commits if c.startswith(ref)]
        if len(found) != 1:
            raise Refused(404, "commit not found")
        return repo.commits[found[0]]

    def _visible(self, repo: Repository, ref: str) -> dict[str, Stored]:
        return repo.seen(ref) if ref in repo.branches else self._resolve(repo, ref).objects

    def _new_commit(
        self, repo: Repository, by: str, message: str, metadata: Any, parents: list[str],
        objects: dict[str, Stored], meta_range: str,
    ) -> str:  # fmt: skip
        record = {
            "committer": by, "creation_date": int(time.time()), "generation": len(repo.commits) + 1,
            "id": secrets.token_hex(32), "message": message, "meta_range_id": meta_range, "metadata": metadata,
            "parents": parents, "version": 1,
        }  # fmt: skip
        repo.commits[record["id"]] = Commit(record, objects)
        return str(record["id"])

    def commit(self, repo: Repository, branch: str, body: bytes, **_: Any) -> Answer:
        asked, head = json.loads(body), self._head(repo, branch)
        before, objects = repo.commits[head].objects, repo.seen(branch)
        if {k: o.checksum for k, o in objects.items()} == {k: o.checksum for k, o in before.items()}:
            raise Refused(400, "commit: no changes")
        new = self._new_commit(
            repo, "admin", asked["message"], asked.get("metadata") or {}, [head], objects, secrets.token_hex(32)
        )
        repo.branches[branch] = new
        repo.staged.pop(branch, None)
        return as_json(201, repo.commits[new].record)

    def _head(self, repo: Repository, branch: str) -> str:
        if branch not in repo.branches:
            raise Refused(404, "branch not found")
        return repo.branches[branch]

    def _stage(self, repo: Repository, branch: str, key: str, stored: Stored) -> dict[str, Any]:
        self._head(repo, branch)
        repo.staged.setdefault(branch, {})[key] = stored
        self.addresses[stored.address] = key, stored
        return {**described(key, stored), "metadata": {}}

    def _address(self, repo: Repository) -> str:
        namespace = repo.record["storage_namespace"]
        root = f"local:///lakefs-data/{namespace.removeprefix('local://')}" if self.kind == "local" else namespace
        version = f",{secrets.token_urlsafe(32)}" if self.kind == "s3" else ""
        return f"{root}/data/{secrets.token_hex(10)}/{secrets.token_hex(10)}{version}"

    def upload(self, repo: Repository, branch: str, query: dict[str, str], headers: Any, body: bytes) -> Answer:
        kind = headers.get("Content-Type", "application/octet-stream")
        stored = Stored(body, hashlib.md5(body).hexdigest(), self._address(repo), kind, int(time.time()))
        return as_json(201, self._stage(repo, branch, query["path"], stored))

    def backing(self, repo: Repository, branch: str, query: dict[str, str], **_: Any) -> Answer:
        self._head(repo, branch)
        address = self._address(repo)
        url = self.presigned(address, "Put", "")
        return as_json(
            200,
            {"physical_address": address, "presigned_url": url, "presigned_url_expiry": int(time.time()) + 900},
        )

    def link(self, repo: Repository, branch: str, query: dict[str, str], body: bytes, **_: Any) -> Answer:
        asked = json.loads(body)
        address = asked["staging"]["physical_address"]
        kind = asked.get("content_type") or "application/octet-stream"
        stored = Stored(self.uploaded[address], asked["checksum"], address, kind, int(time.time()))
        return as_json(200, self._stage(repo, branch, query["path"], stored))

    def listing(self, repo: Repository, ref: str, query: dict[str, str], **_: Any) -> Answer:
        prefix, after, delimiter = (query.get(k, "") for k in ("prefix", "after", "delimiter"))
        entries: dict[str, dict[str, Any]] = {}
        for key, stored in self._visible(repo, ref).items():
            rest = key.removeprefix(prefix)
            if key.startswith(prefix) and delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter, 1)[0] + delimiter
                common = {"path_type": "common_prefix", "checksum": "", "mtime": 0, "physical_address": ""}
                entries[folder] = {"path": folder, **common}
            elif key.startswith(prefix):
                entries[key] = described(key, stored)
        amount = int(query.get("amount") or PAGE)
        return self._page(
            sorted((e for e in entries.values() if e["path"] > after), key=lambda e: e["path"]), amount
        )

    def _page(self, entries: list[dict[str, Any]], amount: int = PAGE) -> Answer:
        page, more = entries[:amount], len(entries) > amount
        offset = page[-1]["path"] if more else ""
        pagination = {"has_more": more, "max_per_page": PAGE, "next_offset": offset, "results": len(page)}
        return as_json(200, {"pagination": pagination, "results": page})

    def _object(self, repo: Repository, ref: str, key: str) -> Stored:
        found = self._visible(repo, ref).get(key)
        if found is None:
            raise Refused(404, "not found")
        return found

    def stat(self, repo: Repository, ref: str, query: dict[str, str], **_: Any) -> Answer:
        return as_json(200, {**described(query["path"], self._object(repo, ref, query["path"])), "metadata": {}})

    def objects(self, repo: Repository, ref: str, query: dict[str, str], headers: Any, **_: Any) -> Answer:
        key = query["path"]
        stored = self._object(repo, ref, key)
        if query.get("presign", "").lower() != "true":
            return self._bytes(key, stored, headers.get("Range"), {"Content-Disposition": "attachment"})
        if self.kind == "local":
            raise Refused(400, "local adapter presigned URL: operation not supported")
        return Answer(302, b"", {"Location": self.presigned(stored.address, "Get", key.rsplit("/", 1)[-1])})

    def tag(self, repo: Repository, body: bytes, **_: Any) -> Answer:
        asked = json.loads(body)
        repo.tags[asked["id"]] = self._resolve(repo, asked["ref"]).record["id"]
        return as_json(201, {"commit_id": repo.tags[asked["id"]], "id": asked["id"]})

    def branch(self, repo: Repository, body: bytes, **_: Any) -> Answer:
        asked = json.loads(body)
        commit = repo.branches[asked["name"]] = self._resolve(repo, asked["source"]).record["id"]
        return Answer(201, commit.encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def diff(self, repo: Repository, branch: str, **_: Any) -> Answer:
        before = repo.commits[self._head(repo, branch)].objects
        changes = [
            {
                "path": key,
                "path_type": "object",
                "size_bytes": len(stored.data),
                "type": "changed" if key in before else "added",
            }
            for key, stored in sorted(repo.staged.get(branch, {}).items())
        ]
        return self._page(changes)

    def log(self, repo: Repository, ref: str, **_: Any) -> Answer:
        found = [self._resolve(repo, ref).record]
        while found[-1]["parents"]:
            found.append(repo.commits[found[-1]["parents"][0]].record)
        return self._page(found)


def as_json(status: int, value: Any) -> Answer:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).replace("&", "\\u0026")
    return Answer(status, text.encode() + b"\n", {"Content-Type": "application/json"})


def described(key: str, stored: Stored) -> dict[str, Any]:
    return {
        "checksum": stored.checksum, "content_type": stored.content_type, "mtime": stored.mtime, "path": key,
        "path_type": "object", "physical_address": stored.address, "size_bytes": len(stored.data),
    }  # fmt: skip


REPO = "/repositories/(?P<repo>[^/]+)"
REF, BRANCH = f"{REPO}/refs/(?P<ref>[^/]+)", f"{REPO}/branches/(?P<branch>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/config", LakeFS.config),
    ("POST", "/repositories", LakeFS.create),
    ("GET", REPO, LakeFS.properties),
    ("DELETE", REPO, LakeFS.remove),
    ("GET", f"{REPO}/commits/(?P<ref>[^/]+)", LakeFS.commit_of),
    ("POST", f"{BRANCH}/commits", LakeFS.commit),
    ("POST", f"{BRANCH}/objects", LakeFS.upload),
    ("GET", f"{BRANCH}/staging/backing", LakeFS.backing),
    ("PUT", f"{BRANCH}/staging/backing", LakeFS.link),
    ("GET", f"{BRANCH}/diff", LakeFS.diff),
    ("GET", f"{REF}/objects/ls", LakeFS.listing),
    ("GET", f"{REF}/objects/stat", LakeFS.stat),
    ("GET", f"{REF}/objects", LakeFS.objects),
    ("GET", f"{REF}/commits", LakeFS.log),
    ("POST", f"{REPO}/tags", LakeFS.tag),
    ("POST", f"{REPO}/branches", LakeFS.branch),
]
