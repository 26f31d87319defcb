"""The in-memory lakeFS server responds as the recorded real one, request by request."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3

from tests.data.lakefs_server import LakeFS

UPLOADS = {
    "05c65f12a59a58a3372e71e0c5e7f4be": b'{"x":1}\n' * 1000,
    "498f6dcbb1bbc13491d0c63ce11e851d": b'{"x":2}\n',
    "9dd4e461268c8034f5c8564e155c67a6": b"x",
}
OBJECT = "(bytes of the object)"
OWN_WAYS = {
    "id", "commit_id", "parents", "meta_range_id", "creation_date", "mtime", "physical_address", "presigned_url",
    "presigned_url_expiry",
}  # fmt: skip
HEADERS = ("Content-Type", "Content-Disposition", "Content-Range", "Etag", "Accept-Ranges")


class Replay:
    """Sends the requests of a recording, with the ids and addresses that the own server gave instead."""

    def __init__(self, server: LakeFS) -> None:
        self.server, self.known = server, dict[str, str]()
        self.http = urllib3.PoolManager()

    def same(self, recorded: Any, own: Any, key: str = "") -> None:
        """Compare two JSON values; record which ids correspond where they differ."""
        assert type(recorded) is type(own), (key, recorded, own)
        if isinstance(recorded, dict):
            assert recorded.keys() == own.keys()
            for k in recorded:
                self.same(recorded[k], own[k], k)
        elif isinstance(recorded, list):
            assert len(recorded) == len(own)
            for a, b in zip(recorded, own, strict=True):
                self.same(a, b, key)
        elif key in OWN_WAYS and recorded not in {"nl-sql", "v1"}:
            if isinstance(recorded, str):
                assert self.shape(recorded) == self.shape(own)
                assert self.known.setdefault(recorded, own) == own
        else:
            assert recorded == own, key

    @staticmethod
    def shape(text: str) -> Any:
        """What two addresses have in common, or how long two ids are."""
        parts = urlsplit(text)
        fields = re.sub(r"(?<=Signature=)\w+", "", parts.query)
        return (parts.scheme, parts.path.count("/"), fields) if parts.scheme else bool(text)

    def own(self, text: str) -> str:
        """A recorded text with the own ids; a commit may be named by its first digits."""
        for recorded, own in sorted(self.known.items(), key=lambda i: -len(i[0])):
            text = text.replace(recorded, own)
            if len(recorded) == 64:
                text = re.sub(rf"(?<=/commits/){recorded[:8]}\b", own[:8], text)
        return text

    def step(self, name: str, exchanges: list[dict[str, Any]]) -> None:
        if name == "list delimiter":
            self.server.put("nl-sql", {f"many/{i:04}.txt": b"x" for i in range(25)})
        etags = [e["headers"]["ETag"].strip('"') for e in exchanges if "ETag" in e["headers"]]
        checksums = [e["response"]["checksum"] for e in exchanges if "checksum" in (e.get("response") or "")]
        data = (
            UPLOADS[(etags + checksums)[0]] if etags + checksums else UPLOADS["05c65f12a59a58a3372e71e0c5e7f4be"]
        )
        for exchange in exchanges:
            redirected = exchange["method"] == "GET" and exchange["path"].startswith("/lake/")
            if not redirected:  # a redirect is followed from its origin
                self.exchange(exchange, data, secret="wrong" if name == "bad creds" else self.server.secret)

    def exchange(self, recorded: dict[str, Any], data: bytes, secret: str) -> None:
        url = self.server.url + self.own(recorded["path"])
        headers = dict(recorded.get("request_headers", {}))
        if recorded["path"].startswith("/lake/"):
            url = self.own("http://s3.example" + recorded["path"])
        else:
            headers |= urllib3.make_headers(basic_auth=f"{self.server.access}:{secret}")
        asked = recorded.get("request")
        body = data if asked == OBJECT else self.own(json.dumps(asked)).encode() if asked else None
        said = self.http.request(recorded["method"], url, body=body, headers=headers)
        assert said.status == recorded["status"], (recorded["path"], said.data)
        wanted = urllib3.HTTPHeaderDict(recorded["headers"])
        assert {h: said.headers.get(h) for h in HEADERS} == {h: wanted.get(h) for h in HEADERS}
        answer = recorded.get("response")
        if answer == OBJECT:
            first, last = (int(n) for n in re.findall(r"\d+", wanted.get("Content-Range", "0-7999"))[:2])
            assert said.data == data[first : last + 1]
        elif isinstance(answer, str):
            assert len(said.data) == len(answer) and self.own(answer) == said.data.decode()
        elif answer is not None:
            self.same(answer, json.loads(said.data))
        else:
            assert said.data == b""
        if "Content-Length" in wanted and "physical_address" not in str(answer):  # renamed, so of another length
            assert said.headers.get("Content-Length") == wanted["Content-Length"]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_small_server_answers_what_a_real_one_answered(kind: str) -> None:
    recorded = json.loads(Path(__file__).with_name("lakefs_recorded.json").read_text(encoding="utf-8"))[kind]
    assert all(hashlib.md5(data).hexdigest() == md5 for md5, data in UPLOADS.items())
    with LakeFS(kind) as server:
        replay = Replay(server)
        for step in recorded:
            replay.step(step["step"], step["exchanges"])
        assert len(recorded) == 27
