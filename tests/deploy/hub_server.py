"""A Hub server on the loopback interface to which models are published, with faults on request.

It implements the protocol of huggingface_hub: whoami-v2, repos/create, validate-yaml, preupload, LFS batch with
PUT and verify, NDJSON commits with parentCommit, tags, refs, model info, tree, resolve. It stores all contents, so
that a test can check the exact state: `commits`, `tags`, `objects`, visibility.

A fault names the step that fails, one of STEPS:

    hub.fault("put", 503)                 the next PUT gets a 503 and has no effect
    hub.fault("commit", LOST)             the commit is made, but its response is lost
    hub.fault("tag", CUT, times=None)     every response to it is cut off
    hub.fault("put", HALF)                the connection drops during the upload
    hub.fault("refs", SLOW)               no response until the end of the test
    hub.fault("commit", call=f)           `f()` is called before the step; after=True: after it
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.data.hub_server import Handler, blob_id, serving

PAGE = 5  # entries per page of the tree: few, so that tests get several pages
LARGE = 10 << 20  # bytes; larger files use LFS, whatever their name
GIT_ATTRIBUTES = "".join(f"*.{x} filter=lfs diff=lfs merge=lfs -text\n" for x in ("safetensors", "bin", "onnx"))
DROP, HALF, LOST, CUT, SLOW = "drop", "half", "lost", "cut", "slow"
STEPS = (
    "whoami", "create", "info", "refs", "tree", "resolve",
    "validate", "preupload", "batch", "put", "verify", "commit", "tag",
)  # fmt: skip


class User(NamedTuple):
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    parent: str | None
    files: dict[str, bytes]
    large: frozenset[str]
    title: str


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)  # the oldest first
    head: str | None = None
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], large: frozenset[str], title: str) -> str:
        content = repr((self.head, title, sorted((p, hashlib.sha256(c).hexdigest()) for p, c in files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(self.head, files, large, title)
        self.head = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.head
        return self.tags.get(revision) or (revision if revision in self.commits else None)

    @property
    def published(self) -> list[Commit]:
        """The commits after the Hub's own first one."""
        return list(self.commits.values())[1:]


@dataclass
class Fault:
    step: str
    kind: str | int = ""
    times: int | None = 1  # None: always
    skip: int = 0  # this many requests of the step succeed first
    headers: dict[str, str] = field(default_factory=dict)
    call: Callable[[], None] | None = None
    after: bool = False


class HubRequest(NamedTuple):
    step: str
    path: str
    authorized: bool


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class ModelHub:
    endpoint: str = ""
    users: dict[str, User] = field(default_factory=dict)  # by token
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    corrupt: set[str] = field(default_factory=set)  # paths that a commit stores with changed content
    requests: list[HubRequest] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fault(self, step: str, kind: str | int = "", **more: Any) -> None:
        assert step in STEPS
        self.faults.append(Fault(step, kind, **more))

    def due(self, step: str) -> Fault | None:
        """The fault of this request, or None. Counts it."""
        with self.lock:
            for fault in self.faults:
                if fault.step == step and fault.times != 0:
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def steps(self) -> list[str]:
        return [request.step for request in self.requests]

    def create(self, name: str, private: bool = True, **files: str) -> Repo:
        """Create a repository of somebody else; the names of `files` have __ for slashes."""
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": GIT_ATTRIBUTES.encode()}, frozenset(), "initial commit")
        if files:
            self.change(name, **files)
        return repo

    def change(self, name: str, **files: str) -> str:
        """Add a commit by somebody else."""
        repo = self.repos[name]
        assert repo.head is not None
        top = repo.commits[repo.head]
        added = {path.replace("__", "/"): content.encode() for path, content in files.items()}
        return repo.commit(top.files | added, top.large, "by somebody else")


class HubHandler(Handler):
    hub: ModelHub
    disable_nagle_algorithm = True

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        step, repo, rest = self.route(parts.path)
        fault = self.hub.due(step)
        body = self.body(half=fault is not None and fault.kind == HALF)
        self.hub.requests.append(HubRequest(step, parts.path, "Authorization" in self.headers))
        if fault and fault.call and not fault.after:
            fault.call()
        if fault and fault.kind == SLOW:
            self.hub.over.wait()
        if fault and fault.kind in {DROP, HALF, SLOW}:
            return self.disconnect()
        if fault and isinstance(fault.kind, int):
            return self.send_json(fault.kind, {"error": HTTPStatus(fault.kind).phrase}, **fault.headers)
        self.withheld = fault.kind if fault and fault.kind in {LOST, CUT} else ""
        try:
            with self.hub.lock:
                answer = getattr(self, f"do_{step}")(repo, rest, body)
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            return self.send_json(error.status, {"error": error.message, **error.more}, **code)
        if fault and fault.call and fault.after:
            fault.call()
        answer()

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def route(self, path: str) -> tuple[str, str, str]:
        """Step, repository and the rest of a path."""
        for prefix, step in (
            ("/api/whoami-v2", "whoami"), ("/api/repos/create", "create"), ("/api/validate-yaml", "validate"),
        ):  # fmt: skip
            if path == prefix:
                return step, "", ""
        if path.startswith("/storage/"):
            return "put", "", path.removeprefix("/storage/")
        if path.endswith(".git/info/lfs/objects/batch"):
            return "batch", path[1:].removesuffix(".git/info/lfs/objects/batch"), ""
        if path.endswith(".git/info/lfs/objects/verify"):
            return "verify", path[1:].removesuffix(".git/info/lfs/objects/verify"), ""
        words = path.split("/")
        if path.startswith("/api/models/"):
            name = "/".join(words[3:5])
            step = words[5] if len(words) > 5 else "info"
            if step == "tree":  # the revision stays quoted, since a folder may follow
                return step, name, "/".join(words[6:])
            return "info" if step == "revision" else step, name, unquote("/".join(words[6:]))
        if len(words) > 4 and words[3] == "resolve":
            return "resolve", "/".join(words[1:3]), unquote("/".join(words[4:]))
        return "unknown", "", path

    def body(self, half: bool) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self.chunk, b""))
        return self.rfile.read(length // 2 if half else length)

    def chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    # Responses

    def send_json(self, status: int, value: Any, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        withheld = getattr(self, "withheld", "")
        if withheld == LOST:
            return self.disconnect()
        if withheld == CUT:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + 1))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            return self.disconnect()
        self.answer(status, body, **({"Content_Type": "application/json"} | headers))

    def disconnect(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    # Users and permissions

    def user(self) -> User:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def writable(self, name: str) -> Repo:
        user, repo = self.user(), self.readable(name)
        if user.role == "read" or name.split("/")[0] not in {user.name, *user.orgs}:
            raise HubError(403, f"Forbidden: you don't have write access to {name}")
        return repo

    def readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] not in self.names()):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def names(self) -> set[str]:
        with suppress(HubError):
            user = self.user()
            return {user.name, *user.orgs}
        return set()

    def at(self, name: str, revision: str) -> tuple[str, Commit]:
        repo = self.readable(name)
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Steps: each does its work and returns the function that sends the response

    def do_unknown(self, _: str, path: str, __: bytes) -> Callable[[], None]:
        raise HubError(404, f"unknown path: {path}")

    def do_whoami(self, *_: Any) -> Callable[[], None]:
        user = self.user()
        info = {
            "type": "user", "name": user.name, "orgs": [{"name": o, "roleInOrg": "write"} for o in user.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "laptop", "role": user.role}},
        }  # fmt: skip
        return lambda: self.send_json(200, info)

    def do_create(self, _: str, __: str, body: bytes) -> Callable[[], None]:
        request, user = json.loads(body), self.user()
        owner = request["organization"] or user.name
        name = f"{owner}/{request['name']}"
        if user.role == "read" or owner not in {user.name, *user.orgs}:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.hub.create(name, private=request.get("visibility") == "private")
        return lambda: self.send_json(200, {"url": url, "name": name, "id": name})

    def do_info(self, name: str, revision: str, _: bytes) -> Callable[[], None]:
        sha, commit = self.at(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.hub.repos[name].private
        info = {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": private, "siblings": siblings}
        return lambda: self.send_json(200, info | {"tags": [], "downloads": 0, "likes": 0})

    def do_refs(self, name: str, *_: Any) -> Callable[[], None]:
        repo = self.readable(name)
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}]
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": sha} for t, sha in repo.tags.items()]
        return lambda: self.send_json(200, {"branches": branches, "tags": tags, "converts": []})

    def do_tree(self, name: str, rest: str, _: bytes) -> Callable[[], None]:
        revision, _, below = (unquote(part) for part in rest.partition("/"))
        _, commit = self.at(name, revision)
        below = f"{below}/" if below else ""
        recursive = [x.lower() for x in self.query.get("recursive", [])] == ["true"]
        paths = [path for path in sorted(commit.files) if path.startswith(below)]
        if below and not paths:
            raise HubError(404, f"{below} does not exist", "EntryNotFound")
        folders = sorted({path[: i + len(below)] for path in paths if (i := path[len(below) :].rfind("/")) > 0})
        entries: list[dict[str, Any]] = [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
        entries += [self.entry(commit, p) for p in paths if recursive or "/" not in p[len(below) :]]
        begin = int(self.query.get("cursor", ["0"])[0])
        more = {}
        if begin + PAGE < len(entries):
            query = f"recursive={str(recursive).lower()}&cursor={begin + PAGE}"
            more = {"Link": f'<{self.hub.endpoint}{urlsplit(self.path).path}?{query}>; rel="next"'}
        return lambda: self.send_json(200, entries[begin : begin + PAGE], **more)

    def entry(self, commit: Commit, path: str) -> dict[str, Any]:
        content = commit.files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if path in commit.large:
            sha256 = hashlib.sha256(content).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
            entry["oid"] = blob_id(pointer.encode())
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
        return entry

    def do_resolve(self, name: str, rest: str, _: bytes) -> Callable[[], None]:
        revision, _, path = rest.partition("/")
        sha, commit = self.at(name, revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content, entry = commit.files[path], self.entry(commit, path)
        etag = entry.get("lfs", entry)["oid"]
        return lambda: self.send_json(200, content, X_Repo_Commit=sha, ETag=f'"{etag}"', Content_Type="text/plain")

    def do_validate(self, _: str, __: str, body: bytes) -> Callable[[], None]:
        import yaml

        self.user()
        lines = json.loads(body)["content"].split("---\n")
        try:
            front = yaml.safe_load(lines[1]) if len(lines) > 2 else None
        except yaml.YAMLError as error:
            raise HubError(400, "invalid YAML", errors=[{"message": str(error)}], warnings=[]) from None
        problems = [] if isinstance(front, dict) else [{"message": "empty or missing yaml metadata"}]
        return lambda: self.send_json(200, {"errors": [], "warnings": problems})

    def do_preupload(self, name: str, revision: str, body: bytes) -> Callable[[], None]:
        self.writable(name)
        _, commit = self.at(name, revision)
        files = []
        for file in json.loads(body)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            suffixes = {line.split()[0][1:] for line in commit.files[".gitattributes"].decode().splitlines()}
            large = any(path.endswith(s) for s in suffixes) or file["size"] > LARGE or b"\0" in sample
            found: dict[str, Any] = {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if path in commit.files:
                entry = self.entry(commit, path)
                found["oid"] = entry.get("lfs", entry)["oid"]
            files.append(found)
        return lambda: self.send_json(200, {"files": files})

    def do_batch(self, name: str, _: str, body: bytes) -> Callable[[], None]:
        self.writable(name)
        request = json.loads(body)
        assert (
            request["operation"] == "upload"
            and request["hash_algo"] == "sha256"
            and "basic" in request["transfers"]
        )
        objects = []
        for item in request["objects"]:
            found: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                verify = f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify"
                upload = f"{self.hub.endpoint}/storage/{item['oid']}?signature=of-the-storage"
                found["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(found)
        return lambda: self.send_json(200, {"transfer": "basic", "objects": objects})

    def do_put(self, _: str, oid: str, body: bytes) -> Callable[[], None]:
        if "Authorization" in self.headers:
            raise HubError(400, "Only one auth mechanism allowed")  # like the storage of the Hub
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the content does not match its SHA-256")
        self.hub.objects[oid] = body
        return lambda: self.send_json(200, b"")

    def do_verify(self, name: str, _: str, body: bytes) -> Callable[[], None]:
        self.writable(name)
        request = json.loads(body)
        if len(self.hub.objects.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, "object not found")
        return lambda: self.send_json(200, {})

    def do_commit(self, name: str, branch: str, body: bytes) -> Callable[[], None]:
        repo = self.writable(name)
        assert branch == "main" and self.headers["Content-Type"] == "application/x-ndjson"
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", repo.head) != repo.head:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        assert repo.head is not None
        files, large = dict(repo.commits[repo.head].files), set(repo.commits[repo.head].large)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files, large)
        sha = repo.commit(files, frozenset(large), header["value"]["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        return lambda: self.send_json(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, kind: str, value: dict[str, Any], files: dict[str, bytes], large: set[str]) -> None:
        path = value["path"]
        if kind == "deletedFile":
            if path not in files:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
            large.discard(path)
            return
        if kind == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise HubError(400, f"LFS object {value['oid']} was not uploaded")
            content = self.hub.objects[value["oid"]]
            large.add(path)
        else:
            assert kind == "file" and value["encoding"] == "base64"
            content = base64.b64decode(value["content"])
            large.discard(path)
        files[path] = content[::-1] if path in self.hub.corrupt else content

    def do_tag(self, name: str, revision: str, body: bytes) -> Callable[[], None]:
        repo = self.writable(name)
        sha, tag = self.at(name, revision)[0], json.loads(body)["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Tag {tag} already exists")
        repo.tags[tag] = sha
        return lambda: self.send_json(200, {})


@contextmanager
def model_hub() -> Iterator[ModelHub]:
    """A Hub server without repositories, at `hub.endpoint`."""
    hub = ModelHub()
    with serving(type("Bound", (HubHandler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            hub.over.set()
