"""The url source against servers on loopback: downloads are resumed and verified, private addresses refused."""

from __future__ import annotations

import doctest
import gzip
import hashlib
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zstandard

from src.data import download, from_url, url_content
from src.data.download import is_public
from src.data.from_url import fetch_url
from src.data.readers import read_values
from src.data.sources import fetch_parts
from src.data.url_content import suffix_of
from src.errors import DataError
from src.schema import DataSource, TrainDataArgs
from tests.data.hub_server import Handler, closed_port, serving, tree

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PUBLIC_IP = "93.184.216.34"


@dataclass
class Site:
    """A server of one file, with the behaviours that tests need."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    breaks_after: int | None = None  # bytes, after which the connection is closed
    content_range: str | None = None  # sent instead of the correct one
    length: bool = True
    moved_to: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    @property
    def asked(self) -> dict[str, str]:
        """Headers of the newest request."""
        return self.requests[-1][1]


class SiteHandler(Handler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.requests.append((self.path, dict(self.headers)))
        if self.path.startswith("/status/"):
            return self.answer(int(self.path[8:11]))
        if self.path.startswith("/moved"):
            hop = int(self.path.removeprefix("/moved") or 0)
            target = site.moved_to or ("/rows.jsonl" if hop == 0 else f"/moved{hop - 1}")
            return self.answer(302, Location=target)
        if site.etag and self.headers["If-None-Match"] == site.etag:
            return self.answer(304)
        if site.modified and self.headers["If-Modified-Since"] == site.modified:
            return self.answer(304)
        self.send_file(*self.range())

    def range(self) -> tuple[int, int]:
        """Status and first byte of the answer."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if (
            not asked
            or not self.site.ranges
            or self.headers["If-Range"] not in (self.site.etag, self.site.modified)
        ):
            return 200, 0
        return (206 if int(asked[1]) < len(self.site.content) else 416), int(asked[1])

    def send_file(self, status: int, begin: int) -> None:
        site, body = self.site, self.site.content[begin:]
        self.send_response(status)
        known = {"ETag": site.etag, "Last-Modified": site.modified, **site.headers}
        if site.length:
            known["Content-Length"] = str(len(body))
        if status == 206:
            total = len(site.content)
            known["Content-Range"] = site.content_range or f"bytes {begin}-{total - 1}/{total}"
        for name, value in known.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: site.breaks_after])
        self.close_connection = site.breaks_after is not None or not site.length


@contextmanager
def site_serving(host: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[Site]:
    site = Site()
    with serving(type("Bound", (SiteHandler,), {"site": site}), host) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme, name = "https" if certificate else "http", f"[{host}]" if ":" in host else host
        site.address = f"{scheme}://{name}:{server.server_port}"
        yield site


@pytest.fixture
def site() -> Iterator[Site]:
    with site_serving() as site:
        yield site


def source(site: Site, path: str = "/rows.jsonl", **keys: Any) -> DataSource:
    return DataSource("url", url=site.address + path, **{"allow_private": True, **keys})


def files(cache: Path) -> dict[str, bytes]:
    """The files that were fetched, by name; the notes beside them do not count."""
    return {path.rpartition("/")[2]: content for path, content in tree(cache).items() if path.count("/") == 3}


def refused(source: DataSource, cache: Path) -> str:
    """The error message, after a check that the cache holds no file."""
    with pytest.raises(DataError) as caught:
        fetch_url(source, cache)
    assert not cache.exists() or files(cache) == {}
    assert len(caught.value.problems) == 1 and caught.value.hint and "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    return str(caught.value)


def test_one_file_comes_with_its_pins(site: Site, tmp_path: Path) -> None:
    found = fetch_url(source(site), tmp_path)
    assert tree(found.folder) == {"rows.jsonl": CONTENT}
    pins = {"sha256": DIGEST, "bytes": len(CONTENT), "etag": '"v1"'}
    assert found.version == {"type": "url", "url": site.address + "/rows.jsonl", **pins}
    assert site.asked["Accept-Encoding"] == "identity" and site.asked["Host"] == site.address[7:]
    assert [path.name for path in tmp_path.rglob("*.part*")] == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/rows.jsonl?x=1", "rows.jsonl"),
        ("/", "data"),
        ("", "data"),
        ("/..%2f..%2fetc%2fpasswd", "_.._etc_passwd"),
        ("/%2e%2e", "data"),
        ("/.hidden", "hidden"),
        ("/a%00b%0a.jsonl", "a_b_.jsonl"),
    ],
)
def test_the_name_comes_from_the_path_and_is_harmless(site: Site, tmp_path: Path, path: str, name: str) -> None:
    site.headers = {"Content-Disposition": 'attachment; filename="../../evil.jsonl"'}
    assert set(tree(fetch_url(source(site, path), tmp_path).folder)) == {name}


def test_the_query_of_an_address_is_never_written(site: Site, tmp_path: Path) -> None:
    found = fetch_url(source(site, "/rows.jsonl?token=hunter2"), tmp_path)
    assert site.requests[0][0] == "/rows.jsonl?token=hunter2"
    assert found.version["url"] == site.address + "/rows.jsonl?token=***"
    everything = [str(path).encode() + path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in everything if b"hunter2" in text]
    other = fetch_url(source(site, "/rows.jsonl?token=other"), tmp_path)
    assert other.folder != found.folder
    assert "answered with HTTP status 404" in refused(source(site, "/status/404?token=hunter2"), tmp_path / "new")


# Unchanged files


@pytest.mark.parametrize("validator", ["etag", "modified"])
def test_an_unchanged_file_is_revalidated_and_not_sent_again(site: Site, tmp_path: Path, validator: str) -> None:
    site.etag, site.modified = ('"v1"', None) if validator == "etag" else (None, "Sat, 01 Jan 2022 00:00:00 GMT")
    first = fetch_url(source(site), tmp_path)
    site.content = b"not looked at"
    assert fetch_url(source(site), tmp_path) == first and len(site.requests) == 2
    site.etag, site.modified, site.content = '"v2"', None, b"new"
    second = fetch_url(source(site), tmp_path)
    assert tree(second.folder) == {"rows.jsonl": b"new"} and tree(first.folder) == {"rows.jsonl": CONTENT}


def test_without_a_validator_the_file_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.etag = None
    fetch_url(source(site), tmp_path)
    site.content = b"new"
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": b"new"}


def test_an_unrequested_304_is_refused(site: Site, tmp_path: Path) -> None:
    assert "answered with HTTP status 304" in refused(source(site, "/status/304"), tmp_path)


# SHA-256


def test_a_file_with_a_known_sha256_needs_no_server(site: Site, tmp_path: Path) -> None:
    first = fetch_url(source(site, sha256=DIGEST.upper()), tmp_path)
    site.requests.clear()
    assert fetch_url(source(site, sha256=DIGEST), tmp_path) == first
    site.etag, site.content = '"v2"', b"new"
    fetch_url(source(site), tmp_path)
    site.requests.clear()
    again = fetch_url(source(site, sha256=DIGEST), tmp_path)
    assert again.folder == first.folder and again.version["bytes"] == len(CONTENT) and site.requests == []


def test_another_sha256_is_refused_and_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    told = refused(source(site, sha256="0" * 64), tmp_path)
    assert f"has the SHA-256 {DIGEST}, and data_source.sha256 is {'0' * 64}" in told
    assert list(tmp_path.rglob("*.part*")) == []
    assert "is not a SHA-256" in refused(source(site, sha256="abc"), tmp_path)


def test_a_wanted_sha256_is_not_satisfied_by_what_is_unchanged(site: Site, tmp_path: Path) -> None:
    fetch_url(source(site), tmp_path)
    with pytest.raises(DataError, match="has the SHA-256"):
        fetch_url(source(site, sha256="0" * 64), tmp_path)


# Resuming


def broken_off(site: Site, cache: Path, after: int = 1000) -> None:
    site.breaks_after = after
    assert re.search("was interrupted after [1-9]", refused(source(site), cache))
    site.breaks_after = None


def test_an_interrupted_download_resumes(site: Site, tmp_path: Path) -> None:
    broken_off(site, tmp_path)
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": CONTENT}
    assert (site.asked["Range"], site.asked["If-Range"]) == ("bytes=1000-", '"v1"')


def test_a_file_without_an_etag_goes_on_by_its_date(site: Site, tmp_path: Path) -> None:
    site.etag, site.modified = None, "Sat, 01 Jan 2022 00:00:00 GMT"
    broken_off(site, tmp_path)
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": CONTENT}
    assert site.asked["If-Range"] == site.modified


@pytest.mark.parametrize("etag", ['W/"v1"', None])
def test_without_a_strong_validator_it_starts_over(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.etag = etag
    broken_off(site, tmp_path)
    site.content = b"new"
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": b"new"}
    assert not [headers for _, headers in site.requests if "Range" in headers]


def test_a_file_that_changed_meanwhile_starts_over(site: Site, tmp_path: Path) -> None:
    broken_off(site, tmp_path)
    site.etag, site.content = '"v2"', CONTENT[::-1]
    found = fetch_url(source(site), tmp_path)
    assert tree(found.folder) == {"rows.jsonl": CONTENT[::-1]} and found.version["etag"] == '"v2"'


def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    broken_off(site, tmp_path)
    site.ranges = False
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": CONTENT}


def test_a_partial_file_that_is_complete_starts_over(site: Site, tmp_path: Path) -> None:
    broken_off(site, tmp_path)
    [part] = tmp_path.rglob("*.part")
    part.write_bytes(CONTENT)
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": CONTENT}
    assert len(site.requests) == 3


@pytest.mark.parametrize(
    "lie",
    ["bytes 0-1047575/1047576", "bytes 1000-1048575/1048577", "bytes 1000-1048574/1048575", "bytes x", " "],
)
def test_a_wrong_content_range_is_refused(site: Site, tmp_path: Path, lie: str) -> None:
    broken_off(site, tmp_path)
    site.content_range = lie
    assert "returned other bytes than those requested, from 1000 on" in refused(source(site), tmp_path)
    assert list(tmp_path.rglob("*.part*")) == []


def test_a_206_of_another_version_is_caught(site: Site, tmp_path: Path) -> None:
    broken_off(site, tmp_path)
    site.headers = {"ETag": '"v2"'}
    assert "returned other bytes" in refused(source(site), tmp_path)


def test_two_downloads_do_not_write_one_part(site: Site, tmp_path: Path) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_url(source(site), tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and tree(found[0].folder) == {"rows.jsonl": CONTENT}
    assert [headers.get("If-None-Match") for _, headers in site.requests] == [None, '"v1"', '"v1"']


# Size and encoding


def test_a_file_that_is_too_large_is_refused_by_its_length(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT * 8
    assert "larger than data_source.max_gb=0.001: 0.00839 GB" in refused(source(site, max_gb=0.001), tmp_path)
    assert list(tmp_path.rglob("*.part*")) == []


def test_a_file_that_grows_too_large_is_refused_on_the_way(site: Site, tmp_path: Path) -> None:
    site.length, site.content = False, CONTENT * 8
    assert "larger than data_source.max_gb=0.001: 0.001" in refused(source(site, max_gb=0.001), tmp_path)
    assert list(tmp_path.rglob("*.part*")) == []


# What the body is


@pytest.mark.parametrize("name", ["/rows.jsonl", "/rows"])
def test_a_body_that_may_be_cut_is_refused_unless_its_hash_is_known(site: Site, tmp_path: Path, name: str) -> None:
    """A connection that is closed after a complete row looks like the end of a file without a length."""
    site.length, site.content = False, b'{"n": 1}\n{"n": 2}\n'
    told = refused(source(site, name), tmp_path)
    assert "was sent without its length" in told and "set data_source.sha256" in told
    assert not list(tmp_path.rglob("*.part*")) and not list(tmp_path.rglob("*.jsonl"))
    known = hashlib.sha256(site.content).hexdigest()
    assert tree(fetch_url(source(site, name, sha256=known), tmp_path).folder) == {"rows.jsonl": site.content}
    site.breaks_after = 9
    assert "has the SHA-256" in refused(source(site, name, sha256=known), tmp_path / "other")
    site.content, site.breaks_after = gzip.compress(CONTENT), None  # its reader notices a cut
    assert tree(fetch_url(source(site, "/rows.jsonl.gz"), tmp_path).folder) == {"rows.jsonl.gz": site.content}


def test_a_chunked_body_needs_no_length_and_is_refused_if_it_is_cut(site: Site, tmp_path: Path) -> None:
    row, site.length, site.ranges = b'{"n": 1}\n', False, False
    site.headers = {"Transfer-Encoding": "chunked"}
    site.content = b"9\r\n" + row + b"\r\n"
    assert "was interrupted after 9 bytes" in refused(source(site), tmp_path)
    site.content += b"0\r\n\r\n"
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": row}


def test_the_rest_of_a_file_that_is_cut_again_is_not_taken_for_all_of_it(site: Site, tmp_path: Path) -> None:
    site.breaks_after = 700_000
    refused(source(site), tmp_path)
    site.length, site.breaks_after = False, 100_000  # the size is in Content-Range only
    assert "was interrupted after 800,000 bytes" in refused(source(site), tmp_path)
    site.breaks_after = None
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": CONTENT}


@pytest.mark.parametrize(
    ("body", "content_type", "told"),
    [
        (b"\n<!DOCTYPE html><html><head><title>Sign\n in</title>", None, "returned an HTML page (Sign in), not"),
        (b"\xef\xbb\xbf<HTML lang=en>", "application/octet-stream", "returned an HTML page, not"),
        (b"<!-- x --><div>", "text/html; charset=utf-8", "returned an HTML page, not"),
        (b"<?xml version='1.0'?><Error/>", "application/xml", "returned an XML document, not"),
    ],
)
def test_a_page_is_called_one_and_not_kept(
    site: Site, tmp_path: Path, body: bytes, content_type: str | None, told: str
) -> None:
    site.content, site.headers = body, {"Content-Type": content_type} if content_type else {}
    assert told in refused(source(site), tmp_path)
    assert not list(tmp_path.rglob("*.part*"))


def test_rows_that_a_server_calls_html_and_texts_about_html_are_fetched(site: Site, tmp_path: Path) -> None:
    site.content, site.headers = b'{"n": 1}\n', {"Content-Type": "text/html"}
    assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": site.content}
    site.content, site.headers = b"<html> begins a page", {"Content-Type": "text/plain"}
    assert tree(fetch_url(source(site, "/text.txt"), tmp_path).folder) == {"text.txt": site.content}


@pytest.mark.parametrize(
    ("begin", "suffix"),
    [
        (b'{"n": 1}\n{"n": 2}\n', ".jsonl"), (b'{"n": "' + b"x" * 70_000, ".jsonl"),
        (b'{\n "n": 1\n}', ".json"),
        (b"\xef\xbb\xbf\n[1,\n2]", ".json"), (b"a,b\n1,2\n", ".csv"), (b"a;b\n1;2\n", ".csv"),
        (b"a\tb\n1\t2", ".tsv"),
        (b"PAR1\x15\x04", ".parquet"), (b"ARROW1\0\0", ".arrow"), (b"PK\3\4..[Content_Types].xml", ".xlsx"),
        (gzip.compress(b'{"n": 1}\n', mtime=0), ".jsonl.gz"), (zstandard.compress(b"a,b\n1,2\n"), ".csv.zst"),
        (b"PK\3\4..rows.jsonl", None), (gzip.compress(b"PAR1", mtime=0), None), (b"\x1f\x8b???", None),
        (b"some text\n", None),
        (b"\x80\x04\x95\0", None), (b"", None),
    ],
)  # fmt: skip
def test_the_kind_of_a_file_is_told_by_its_beginning(begin: bytes, suffix: str | None) -> None:
    assert suffix_of(begin) == suffix


@pytest.mark.parametrize("address", ["/download?id=5", "/v1.0/export.php", "/rows"])
def test_a_url_without_a_data_suffix_is_read_by_its_content(site: Site, tmp_path: Path, address: str) -> None:
    site.content, site.etag = gzip.compress(b'{"n": 1}\n', mtime=0), None
    args = TrainDataArgs(data_source=source(site, address))
    (part,) = fetch_parts(args, tmp_path)
    assert [value for _, value in read_values(part.files[0])] == [{"n": 1}]
    site.content = b"no rows"
    with pytest.raises(DataError, match="neither its name nor its content is of a known kind"):
        fetch_parts(args, tmp_path)


def test_a_compressed_response_is_accepted_only_for_a_compressed_file_name(site: Site, tmp_path: Path) -> None:
    site.headers = {"Content-Encoding": "gzip"}
    assert "is sent compressed (gzip)" in refused(source(site), tmp_path)
    assert tree(fetch_url(source(site, "/rows.jsonl.gz"), tmp_path).folder) == {"rows.jsonl.gz": CONTENT}


# Addresses


@pytest.mark.parametrize("allow_private", [False, True])
@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "[fe80::1]", "[::ffff:169.254.1.2]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]",
        "[fd00:ec2::254]", "100.100.100.200", "168.63.129.16",
    ],
)  # fmt: skip
def test_link_local_and_metadata_addresses_are_refused_whatever_is_allowed(
    tmp_path: Path, host: str, allow_private: bool
) -> None:
    told = refused(DataSource("url", url=f"http://{host}/rows.jsonl", allow_private=allow_private), tmp_path)
    assert f"leads to {host.strip('[]')}, a private address that no setting allows; use another url" in told


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1.", "[::127.0.0.1]"]
)
def test_a_private_address_is_refused_before_anything_is_sent(site: Site, tmp_path: Path, host: str) -> None:
    address = f"http://{host}:{site.address.rpartition(':')[2]}/rows.jsonl"
    assert "a private address" in refused(DataSource("url", url=address), tmp_path)
    assert site.requests == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "0x7f.0.0.1", "134744072"])
@pytest.mark.parametrize("allow_private", [False, True])
def test_an_odd_spelling_of_an_address_is_refused(tmp_path: Path, host: str, allow_private: bool) -> None:
    told = refused(DataSource("url", url=f"http://{host}/x", allow_private=allow_private), tmp_path)
    assert "an unusual spelling of an address" in told


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2001:4860:4860::8888", True), ("64:ff9b::808:808", True), ("2002:808:808::1", True),
        ("::ffff:8.8.8.8", True),
        ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False),
        ("0.0.0.0", False), ("::", False), ("::1", False), ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False),
        ("fd00:ec2::254", False), ("fec0::1", False), ("ff02::1", False), ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False), ("2001:db8::1", False), ("::8.8.8.8", False), ("198.18.0.1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


class Names:
    """Names as the operating system knows them, in the place of its resolver and of the route to PUBLIC_IP."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
        self.known: dict[str, list[list[str]]] = {}
        self.connected: list[str] = []
        resolve, connect = socket.getaddrinfo, socket.socket.connect

        def getaddrinfo(host: Any, *args: Any, **keys: Any) -> Any:
            answers = self.known.get(str(host))
            if answers is None:
                return resolve(host, *args, **keys)
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answer]

        def connecting(self_: socket.socket, address: Any) -> None:
            self.connected.append(address[0])
            connect(self_, ("127.0.0.1", port) if address[0] == PUBLIC_IP else address)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", connecting)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, site: Site) -> Names:
    return Names(monkeypatch, int(site.address.rpartition(":")[2]))


def public(path: str = "/rows.jsonl") -> DataSource:
    return DataSource("url", url=f"http://rows.test{path}")


def test_the_connection_goes_to_the_address_that_was_judged(site: Site, names: Names, tmp_path: Path) -> None:
    names.known["rows.test"] = [[PUBLIC_IP], ["127.0.0.1"]]  # a second look would be led astray
    assert tree(fetch_url(public(), tmp_path).folder) == {"rows.jsonl": CONTENT}
    assert names.connected == [PUBLIC_IP] and site.asked["Host"] == "rows.test"


def test_a_name_with_one_private_address_is_refused(site: Site, names: Names, tmp_path: Path) -> None:
    names.known["rows.test"] = [[PUBLIC_IP, "10.0.0.1"]]
    said = "leads to rows.test, which is 10.0.0.1, a private address; set data_source.allow_private=true if"
    assert said in refused(public(), tmp_path)
    assert names.connected == []


@pytest.mark.parametrize("target", ["http://127.0.0.1/x", "http://169.254.169.254/latest", "//localhost/x"])
def test_a_redirect_into_the_private_network_is_refused(
    site: Site, names: Names, tmp_path: Path, target: str
) -> None:
    names.known["rows.test"] = [[PUBLIC_IP]]
    site.moved_to = target
    assert "a private address" in refused(public("/moved"), tmp_path)
    assert names.connected == [PUBLIC_IP]


def test_the_next_address_is_tried_where_one_is_dead(site: Site, names: Names, tmp_path: Path) -> None:
    with socket.socket() as taken:  # 127.0.0.2 refuses: it has no listener on the port of the site
        taken.bind(("127.0.0.2", 0))
        names.known["rows.test"] = [["127.0.0.2", PUBLIC_IP]]
        found = fetch_url(
            DataSource("url", url=f"http://rows.test:{taken.getsockname()[1]}/x", allow_private=True), tmp_path
        )
    assert tree(found.folder) == {"x": CONTENT} and names.connected == ["127.0.0.2", PUBLIC_IP]


def test_ipv6_works(tmp_path: Path) -> None:
    try:
        with site_serving("::1") as site:
            assert tree(fetch_url(source(site), tmp_path).folder) == {"rows.jsonl": CONTENT}
            assert site.asked["Host"] == site.address[7:]
    except OSError:
        pytest.skip("no IPv6 on this machine")


# Redirects


def test_five_redirects_are_followed_and_the_sixth_is_refused(site: Site, tmp_path: Path) -> None:
    found = fetch_url(source(site, "/moved4"), tmp_path)
    assert tree(found.folder) == {"moved4": CONTENT} and found.version["url"] == site.address + "/moved4"
    assert "redirects more than 5 times" in refused(source(site, "/moved5"), tmp_path / "new")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://me:hunter2@127.0.0.1/x"])
def test_a_redirect_to_anything_else_is_refused(site: Site, tmp_path: Path, target: str) -> None:
    site.moved_to = target
    assert "redirects to an address that is not plain http(s)" in refused(source(site, "/moved"), tmp_path)


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost, with its key, that signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    words += " -addext subjectAltName=DNS:localhost"
    done = subprocess.run(
        [*words.split(), "-keyout", folder / "key", "-out", folder / "cert"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    both = folder / "both.pem"
    both.write_bytes((folder / "key").read_bytes() + (folder / "cert").read_bytes())
    return both


@pytest.fixture
def secure(certificate: Path) -> Iterator[Site]:
    with site_serving(certificate=certificate) as site:
        yield site


def test_https_is_verified_by_name(
    secure: Site, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the certificate of 127.0.0.1 is not trusted" in refused(source(secure), tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert "the certificate of 127.0.0.1 is not trusted" in refused(source(secure), tmp_path)
    secure.address = secure.address.replace("127.0.0.1", "localhost")
    assert tree(fetch_url(source(secure), tmp_path).folder) == {"rows.jsonl": CONTENT}


def test_https_is_never_redirected_to_http(
    secure: Site, site: Site, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.address = secure.address.replace("127.0.0.1", "localhost")
    secure.moved_to = site.address + "/rows.jsonl"
    assert "redirects from https down to http" in refused(source(secure, "/moved"), tmp_path)
    site.moved_to = secure.address + "/rows.jsonl"
    secure.moved_to = None
    assert tree(fetch_url(source(site, "/moved"), tmp_path).folder) == {"moved": CONTENT}


# Refusals


@pytest.mark.parametrize("module", [download, from_url, url_content])
def test_the_examples_in_the_docstrings_are_true(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (None, "data_source.url is not an http(s) address"),
        ("rows.jsonl", "data_source.url is not an http(s) address"),
        ("file:///etc/passwd", "data_source.url is not an http(s) address"),
        ("http://[::1/x", "data_source.url is not an http(s) address"),
        ("https://me:hunter2@example.org/x", "data_source.url holds a user name or password"),
        ("https://hunter2@example.org/x", "data_source.url holds a user name or password"),
        ("http://no-such-host.invalid/x", "no address is known for no-such-host.invalid"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(tmp_path: Path, address: str | None, told: str) -> None:
    assert told in refused(DataSource("url", url=address), tmp_path)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "signed url"), (403, "signed url"), (404, "check"), (500, "later")]
)
def test_a_status_is_reported_with_its_remedy(site: Site, tmp_path: Path, status: int, remedy: str) -> None:
    told = refused(source(site, f"/status/{status}"), tmp_path)
    assert f"/status/{status} answered with HTTP status {status}; " in told and remedy in told


def test_a_dead_server_is_reported_at_once_and_no_proxy_is_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", site.address)
    monkeypatch.setenv("http_proxy", site.address)
    began, port = time.monotonic(), closed_port()
    told = refused(DataSource("url", url=f"http://127.0.0.1:{port}/x", allow_private=True), tmp_path)
    assert f"no response from 127.0.0.1 on port {port} (NewConnectionError)" in told
    assert time.monotonic() - began < 2 and site.requests == []
