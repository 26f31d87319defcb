"""The S3 source against moto's server, by boto3 and sockets; objects change, or are corrupt or truncated."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
from werkzeug.serving import make_server

from src.data.from_s3 import fetch_s3
from src.errors import DataError
from src.schema import DataSource
from tests.data.bucket import BUCKET, STORE
from tests.data.hub_server import closed_port, tree

pytest_plugins = ["tests.data.bucket"]
pytestmark = pytest.mark.usefixtures("environment")


def put(client: Any, **objects: str) -> None:
    for key, text in objects.items():
        client.put_object(Bucket=BUCKET, Key=key.replace("__", "/"), Body=text.encode())


def put_in_parts(client: Any, key: str, content: bytes) -> None:
    name = {"Bucket": BUCKET, "Key": key}
    name["UploadId"] = client.create_multipart_upload(**name)["UploadId"]
    etag = client.upload_part(**name, PartNumber=1, Body=content)["ETag"]
    client.complete_multipart_upload(**name, MultipartUpload={"Parts": [{"ETag": etag, "PartNumber": 1}]})


class Proxy:
    """A proxy between boto3 and moto.

    `before()` runs before the first object is read; `change(number, body)` modifies the response to a read.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.pool = urllib3.PoolManager(maxsize=20)
        self.reads: list[str] = []
        self.change: Callable[[int, bytes], bytes] = lambda number, body: body
        self.before: Callable[[], object] = lambda: None
        self.sends_length = True  # of the changed body, so that the connection looks intact
        self.lock = threading.Lock()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else "")
        headers = {k[5:].replace("_", "-"): v for k, v in environ.items() if k.startswith("HTTP_")}
        is_read = environ["PATH_INFO"].count("/") >= 2 and environ["REQUEST_METHOD"] == "GET"
        if is_read:
            with self.lock:
                self.reads.append(path)
                number = len(self.reads)
                if number == 1:
                    self.before()
        answer = self.pool.request(environ["REQUEST_METHOD"], self.upstream + path, headers=headers)
        body = self.change(number, answer.data) if is_read and answer.status == 200 else answer.data
        # a checksum is no matter of course: without it, size and MD5 have to tell
        dropped = ("connection", "transfer-encoding", "x-amz-checksum")
        kept = [(k, v) for k, v in answer.headers.items() if not k.lower().startswith(dropped)]
        if is_read and self.sends_length:
            kept = [(k, v) for k, v in kept if k.lower() != "content-length"] + [
                ("Content-Length", str(len(body)))
            ]
        start_response(f"{answer.status} {answer.reason or 'x'}", kept)
        return [body]


@contextmanager
def running(application: Any) -> Iterator[str]:
    """The address of a server with a WSGI application."""
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def between(moto: str) -> Iterator[tuple[Proxy, str]]:
    application = Proxy(moto)
    with running(application) as endpoint:
        yield application, endpoint


def source(endpoint: str, path: str = "", **keys: Any) -> DataSource:
    return DataSource("s3", endpoint=endpoint, bucket=BUCKET, path=path, **keys)


def refused(source: DataSource, cache: Path) -> str:
    """The error message, after a check that the cache is empty."""
    with pytest.raises(DataError) as caught:
        fetch_s3(source, cache)
    assert tree(cache) == {}
    assert "secret-of-the-test" not in str(caught.value)
    assert len(caught.value.problems) == 1 and caught.value.hint and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_objects_below_a_path_come_with_their_pins(client: Any, moto: str, tmp_path: Path) -> None:
    put(client, **{"train__a.jsonl": "a", "train__deep__b.jsonl": "bb", "training__c.jsonl": "c"})
    client.put_object(Bucket=BUCKET, Key="train/empty/", Body=b"")
    for hidden in ("train/.a.jsonl", "train/.ipynb_checkpoints/a.jsonl", "train/deep/._b.jsonl"):
        client.put_object(Bucket=BUCKET, Key=hidden, Body=b"hidden")
    found = fetch_s3(source(moto, "train/"), tmp_path / "cache")
    assert tree(found.folder) == {"a.jsonl": b"a", "deep/b.jsonl": b"bb"}
    a, b = "0cc175b9c0f1b6a831c399e269772661", "21ad0bd836b90d08f4cf640b4c298e7c"
    objects = [
        {"key": "train/a.jsonl", "version_id": None, "etag": a, "bytes": 1},
        {"key": "train/deep/b.jsonl", "version_id": None, "etag": b, "bytes": 2},
    ]
    place = {"endpoint": moto, "bucket": BUCKET, "path": "train/"}
    assert found.version == {"type": "s3", **place, "objects": objects}


def test_a_path_may_be_one_key(client: Any, moto: str, tmp_path: Path) -> None:
    put(client, **{"train__a.jsonl": "a", "train__a.jsonl.old": "b"})
    assert tree(fetch_s3(source(moto, "train/a.jsonl"), tmp_path).folder) == {"a.jsonl": b"a"}


def test_a_hidden_key_that_is_named_is_read(client: Any, moto: str, tmp_path: Path) -> None:
    client.put_object(Bucket=BUCKET, Key=".own/.a.jsonl", Body=b"a")
    assert tree(fetch_s3(source(moto, ".own/.a.jsonl"), tmp_path).folder) == {".a.jsonl": b"a"}


def test_the_endpoint_may_come_from_the_environment(
    client: Any, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(client, **{"a.jsonl": "a"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    assert fetch_s3(DataSource("s3", bucket=BUCKET), tmp_path).version["endpoint"] == moto


def test_1100_objects_are_more_than_one_page(client: Any, moto: str, tmp_path: Path) -> None:
    for i in range(1100):  # past the server, for speed
        STORE.put_object(BUCKET, f"many/{i:04}.jsonl", str(i).encode())
    files = tree(fetch_s3(source(moto, "many"), tmp_path).folder)
    assert files == {f"{i:04}.jsonl": str(i).encode() for i in range(1100)}


def test_unchanged_objects_are_not_read_again_and_changed_ones_make_a_new_folder(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, endpoint = between
    put(client, **{"a.jsonl": "a"})
    first = fetch_s3(source(endpoint), tmp_path)
    assert fetch_s3(source(endpoint), tmp_path) == first and len(proxy.reads) == 1
    put(client, **{"a.jsonl": "b"})
    second = fetch_s3(source(endpoint), tmp_path)
    assert tree(first.folder) == {"a.jsonl": b"a"} and tree(second.folder) == {"a.jsonl": b"b"}


@pytest.mark.parametrize("key", ["../../etc/x", "/etc/x", "a/../../x", "a/../x", "a\\b", "x" * 300])
def test_a_key_that_leaves_the_folder_is_refused(client: Any, moto: str, tmp_path: Path, key: str) -> None:
    put(client, **{"a.jsonl": "a"})
    client.put_object(Bucket=BUCKET, Key=key, Body=b"evil")
    assert "the source holds an object named" in refused(source(moto), tmp_path)
    assert not (tmp_path.parent / "etc").exists()


@pytest.mark.parametrize(("one", "other"), [("a", "a/b"), ("a/b", "a//b")])
def test_keys_that_need_the_same_place_are_refused(
    client: Any, moto: str, tmp_path: Path, one: str, other: str
) -> None:
    for key in (one, other):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    assert "cannot both be files" in refused(source(moto), tmp_path)


def test_a_versioned_object_that_is_overwritten_meanwhile_is_read_as_it_was_listed(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, endpoint = between
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    put(client, **{"a.jsonl": "older"})
    put(client, **{"a.jsonl": "old", "gone.jsonl": "x"})
    client.delete_object(Bucket=BUCKET, Key="gone.jsonl")
    version = client.head_object(Bucket=BUCKET, Key="a.jsonl")["VersionId"]
    proxy.before = lambda: put(client, **{"a.jsonl": "new"})
    found = fetch_s3(source(endpoint), tmp_path)
    assert tree(found.folder) == {"a.jsonl": b"old"}
    assert [o["version_id"] for o in found.version["objects"]] == [version]


def test_an_object_without_versions_that_is_overwritten_meanwhile_stops_the_fetch(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, endpoint = between
    put(client, **{"a.jsonl": "old"})
    proxy.before = lambda: put(client, **{"a.jsonl": "new"})
    assert "changed while it was fetched" in refused(source(endpoint), tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "sends_length", "reason"),
    [
        ("a.jsonl", lambda _, body: b"X" + body[1:], True, "its MD5 differs"),
        ("parts.jsonl", lambda _, body: body[:-1], True, "9 of 10 bytes"),
        ("parts.jsonl", lambda _, body: body + b"X", True, "too many bytes"),
        ("a.jsonl", lambda _, body: body[:-1], False, "IncompleteReadError|ResponseStreamingError"),
    ],
)
def test_bytes_that_are_not_those_listed_are_refused(
    client: Any, between: tuple[Proxy, str], tmp_path: Path,
    key: str, change: Callable[[int, bytes], bytes], sends_length: bool, reason: str,
) -> None:  # fmt: skip
    proxy, endpoint = between
    put(client, **{"a.jsonl": "0123456789"})
    put_in_parts(client, "parts.jsonl", b"0123456789")
    proxy.change, proxy.sends_length = change, sends_length
    told = refused(source(endpoint, key), tmp_path)
    assert re.search(rf"{key} differs from its listing after 3 attempts \(({reason})\)", told)
    assert len(proxy.reads) == 3


def test_a_connection_that_breaks_once_is_forgiven(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, endpoint = between
    put(client, **{"a.jsonl": "0123456789"})
    proxy.change, proxy.sends_length = lambda number, body: body[:-1] if number == 1 else body, False
    assert tree(fetch_s3(source(endpoint), tmp_path).folder) == {"a.jsonl": b"0123456789"}


def test_the_etag_of_parts_is_not_mistaken_for_an_md5(client: Any, moto: str, tmp_path: Path) -> None:
    put_in_parts(client, "parts.jsonl", b"parts")
    found = fetch_s3(source(moto), tmp_path)
    assert tree(found.folder) == {"parts.jsonl": b"parts"}
    assert found.version["objects"][0]["etag"].endswith("-1")


def test_the_etag_of_encrypted_content_is_not_mistaken_for_an_md5(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, endpoint = between
    client.put_object(Bucket=BUCKET, Key="kms.jsonl", Body=b"x", ServerSideEncryption="aws:kms")
    proxy.change = lambda _, body: b"y"  # at AWS the ETag is of the encrypted bytes; moto's is always the MD5
    assert tree(fetch_s3(source(endpoint), tmp_path).folder) == {"kms.jsonl": b"y"}


def test_more_than_max_gb_is_refused_before_anything_is_read(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, endpoint = between
    put(client, **{"a.jsonl": "x" * 600, "b.jsonl": "x" * 600})
    assert "max_gb=1e-06" in refused(source(endpoint, max_gb=1e-6), tmp_path)
    assert proxy.reads == []


def test_a_missing_bucket_and_an_empty_path_are_named(client: Any, moto: str, tmp_path: Path) -> None:
    assert "there is no S3 bucket nowhere" in refused(DataSource("s3", endpoint=moto, bucket="nowhere"), tmp_path)
    assert "s3://rows/nothing holds no objects" in refused(source(moto, "nothing"), tmp_path)
    assert "not the name of an S3 bucket" in refused(DataSource("s3", endpoint=moto, bucket="no bucket"), tmp_path)
    assert "data_source.bucket is not set" in refused(DataSource("s3"), tmp_path)


def test_missing_credentials_are_reported(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "there are no credentials" in refused(source(moto), tmp_path)


def answering(status: str, code: str) -> Callable[..., Any]:
    def application(environ: Any, start_response: Any) -> Any:
        start_response(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>secret-of-the-test</Message></Error>".encode()]

    return application


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        ("403 Forbidden", "AccessDenied", "S3 refuses access to the bucket rows (AccessDenied)"),
        ("403 Forbidden", "InvalidAccessKeyId", "S3 refuses access to the bucket rows (InvalidAccessKeyId)"),
        ("400 Bad Request", "Odd", "S3 could not read the bucket rows (Odd)"),
    ],
)
def test_a_refusal_is_one_sentence(tmp_path: Path, status: str, code: str, told: str) -> None:
    with running(answering(status, code)) as endpoint:
        assert told in refused(source(endpoint), tmp_path)


def test_a_key_that_may_not_list_versions_reads_by_etag(
    client: Any, between: tuple[Proxy, str], tmp_path: Path
) -> None:
    proxy, _ = between
    put(client, **{"a.jsonl": "a"})
    denied = answering("403 Forbidden", "AccessDenied")

    def application(environ: Any, start_response: Any) -> Any:
        return (denied if "versions" in environ["QUERY_STRING"] else proxy)(environ, start_response)

    with running(application) as endpoint:
        found = fetch_s3(source(endpoint), tmp_path)
    assert tree(found.folder) == {"a.jsonl": b"a"}


def test_a_dead_server_is_reported_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    told = refused(source(f"http://127.0.0.1:{closed_port()}"), tmp_path)
    assert re.search(r"127\.0\.0\.1:\d+ does not respond as an S3 server", told)
    assert time.monotonic() - began < 10


def test_an_endpoint_with_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    told = refused(source("http://me:secret-of-the-test@127.0.0.1:1"), tmp_path)
    assert "data_source.endpoint holds a user name" in told
