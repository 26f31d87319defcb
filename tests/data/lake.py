"""A lakeFS repository for tests: on the in-memory server with both kinds of storage, and on a real server.

The real server is used if LAKEFS_ENDPOINT, LAKEFS_ACCESS_KEY and LAKEFS_SECRET_KEY are set in the environment.
Each test gets a separate repository on it, which is deleted afterwards.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from src.data.download import FetchedData
from src.data.from_lakefs import fetch_lakefs
from src.data.lakefs_client import KEYS
from src.data.lakefs_push import push_dataset
from src.schema import DataPushConfig, DataSource
from tests.data.lakefs_server import LakeFS

REAL = {name: os.environ.get(name, "") for name in ("LAKEFS_ENDPOINT", *KEYS)}  # before a test alters them
BIN = "application/octet-stream"


@dataclass
class Lake:
    endpoint: str
    name: str
    client: Any
    secrets: tuple[str, str]
    server: LakeFS | None = None

    @property
    def own(self) -> LakeFS:
        assert self.server
        return self.server

    def branch(self, name: str = "main") -> Any:
        from lakefs.branch import Branch

        return Branch(self.name, name, self.client)

    def put(self, objects: dict[str, bytes], branch: str = "main") -> None:
        """Upload without a commit."""
        for key, data in objects.items():
            self.branch(branch).object(key).upload(data, "wb", content_type=BIN)

    def commit(self, objects: dict[str, bytes], branch: str = "main") -> str:
        """Upload and commit. Returns the commit's id."""
        self.put(objects, branch)
        return str(self.branch(branch).commit("some data").get_commit().id)

    def tag(self, name: str, ref: str) -> None:
        from lakefs.tag import Tag

        Tag(self.name, name, self.client).create(ref)

    def content(self, ref: str = "main") -> dict[str, bytes]:
        """Every object of a commit, or of a branch, its uncommitted changes included."""
        listed = self.branch(ref).objects()
        return {o.path: self.branch(ref).object(o.path).reader("rb").read() for o in listed}

    def committed(self, branch: str = "main") -> dict[str, bytes]:
        return self.content(self.branch(branch).get_commit().id)

    def source(self, **keys: Any) -> DataSource:
        return DataSource(**{"type": "lakefs", "endpoint": self.endpoint, "repo": self.name, **keys})

    def fetch(self, cache: Path, **keys: Any) -> FetchedData:
        return fetch_lakefs(self.source(**keys), cache)

    def push(self, folder: Path, message: str | None = "new", pattern: str = "**/*", **keys: Any) -> int:
        return push_dataset(DataPushConfig(str(folder), pattern, self.source(**keys), message))


def connected(endpoint: str, access: str, secret: str, server: LakeFS | None) -> Lake:
    from lakefs.client import Client
    from lakefs.repository import Repository

    client = Client(host=endpoint, username=access, password=secret)
    name = f"assay-test-{secrets.token_hex(6)}"
    prefix = client.storage_config.default_namespace_prefix or os.environ.get(
        "LAKEFS_TEST_NAMESPACE", "s3://lake/"
    )
    Repository(name, client).create(f"{prefix.rstrip('/')}/{name}" if prefix != "local://" else prefix + name)
    return Lake(endpoint, name, client, (access, secret), server)


def use(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """Set the keys of `lake` in the environment, and nothing else."""
    monkeypatch.delenv("LAKEFS_ENDPOINT", raising=False)
    for key, value in zip(KEYS, lake.secrets, strict=True):
        monkeypatch.setenv(key, value)
    return lake


@pytest.fixture(params=["local", "s3"])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    """A repository on the small server."""
    with LakeFS(request.param) as server:
        yield use(connected(server.url, server.access, server.secret, server), monkeypatch)


@pytest.fixture(params=["local", "s3", "real"])
def lake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    """A repository on the small server, or on a real one."""
    if request.param != "real":
        with LakeFS(request.param) as server:
            yield use(connected(server.url, server.access, server.secret, server), monkeypatch)
        return
    missing = [name for name, value in REAL.items() if not value]
    if missing:
        pytest.skip(f"no real lakeFS server: {', '.join(missing)} not set in the environment")
    from lakefs.repository import Repository

    found = connected(*REAL.values(), None)
    yield use(found, monkeypatch)
    Repository(found.name, found.client).delete()
