"""The `url` source: one file over http(s), resumable, verified, and never from inside the private network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from src.data.download import FetchedData, Headers, cache_key, check_size, fetch_once, get, parse
from src.errors import DataError, RunError
from src.schema import DataSource
from src.utils.files import disk_errors, read_json, sha256, write_json

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

BLOCK = 1 << 20
# what a server may call the compression of a file that is a compressed one by its name
ENCODINGS = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}


class DownloadPaths(NamedTuple):
    """Where the downloads of one address lie, and how it may be named to people."""

    folder: Path
    shown: str
    name: str

    @property
    def part(self) -> Path:
        return self.folder.with_suffix(".part")

    @property
    def part_facts(self) -> Path:
        return self.folder.with_suffix(".part.json")

    @property
    def facts(self) -> Path:
        return self.folder / "latest.json"

    def version(self, digest: str) -> Path:
        return self.folder / digest


def fetch_url(source: DataSource, cache: Path) -> FetchedData:
    """Fetch the file at `source.url`, unless the server says that it has not changed.

    Args:
        source: reads url, sha256, max_gb and allow_private.
        cache: the file lands in CACHE/url; a partial one is kept there and continued by the next call.
    Raises: DataError if it cannot be had, is too large, lies at a private address or is not what sha256 says.
    """
    address = _checked(source.url or "")
    wanted = _checked_digest(source.sha256)
    place = DownloadPaths(cache / "url" / cache_key(address), redacted_url(address), _file_name(address))
    with _alone(place):
        known = _known(place, wanted)
        if not wanted or not known:
            known = _download(address, source, place, known, wanted)
    version = {"type": "url", "url": place.shown} | {key: known.get(key) for key in ("sha256", "bytes", "etag")}
    return FetchedData(place.version(known["sha256"]), version)


def redacted_url(address: str) -> str:
    """`address` without its query and fragment, which may hold a token.

    >>> redacted_url("https://example.org/a.jsonl?token=x#y")
    'https://example.org/a.jsonl?...'
    """
    plain, query, _ = address.partition("#")[0].partition("?")
    return plain + ("?..." if query else "")


def _checked(address: str) -> str:
    parsed = parse(address)
    if parsed is None:
        raise DataError(
            "data_source.url is not an http(s) address", hint="set it to one such as https://host/file"
        )
    if parsed.auth is not None:
        raise DataError(
            "data_source.url holds a user name or password, which would be written down",
            hint="take it out; use a signed url or another source",
        )
    return address.partition("#")[0]


def _checked_digest(digest: str | None) -> str | None:
    if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise DataError(
            f"data_source.sha256={digest} is not a SHA-256 of 64 hexadecimal digits", hint="correct it"
        )
    return digest and digest.lower()


def _file_name(address: str) -> str:
    """The last segment of the path, as a name that is safe everywhere."""
    last = unquote(urlsplit(address).path.rpartition("/")[2])
    return re.sub(r"[^\w.-]", "_", last, flags=re.ASCII).lstrip(".")[-150:] or "data"


@contextmanager
def _alone(place: DownloadPaths) -> Iterator[None]:
    """Hold other processes off the partial file: they wait here, and find the whole one then."""
    import fcntl

    with disk_errors(place.folder):
        place.folder.mkdir(parents=True, exist_ok=True)
        lock = (place.folder / "lock").open("w")
    with lock:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _known(place: DownloadPaths, wanted: str | None) -> dict[str, Any]:
    """Facts of the version that is here: the wanted one, or else the latest; empty if there is none."""
    latest = _facts(place.facts)
    digest = wanted or latest.get("sha256", "")
    if not digest or not place.version(digest).is_dir():
        return {}
    if digest == latest.get("sha256"):
        return latest
    return {"sha256": digest, "bytes": sum(file.stat().st_size for file in place.version(digest).iterdir())}


def _facts(path: Path) -> dict[str, Any]:
    """What was noted about a download; nothing if there is no note, or a spoilt one."""
    try:
        return dict(read_json(path))
    except (RunError, ValueError, TypeError):
        return {}


# Download


def _download(
    address: str, source: DataSource, place: DownloadPaths, known: dict[str, Any], wanted: str | None
) -> dict[str, Any]:
    """Bring the newest version into its folder. Returns: its sha256, bytes, etag and last_modified."""
    from urllib3.exceptions import HTTPError

    try:
        with _answer(address, source, place, known) as response:
            if response.status == 304:
                return known
            _receive(response, source, place)
    except HTTPError as error:
        raise _broken_off(place, error) from None
    digest = sha256(place.part)
    facts = _facts(place.part_facts) | {"sha256": digest, "bytes": place.part.stat().st_size}
    if wanted and digest != wanted:
        _drop_part(place)
        raise DataError(
            f"{place.shown} has the SHA-256 {digest}, and data_source.sha256 is {wanted}",
            hint="nothing was kept; correct sha256, or ask whoever serves the file",
        )
    with disk_errors(place.folder):
        fetch_once(place.version(digest), lambda folder: place.part.rename(folder / place.name))
        write_json(place.facts, facts)
    _drop_part(place)
    return facts


@contextmanager
def _answer(
    address: str, source: DataSource, place: DownloadPaths, known: dict[str, Any]
) -> Iterator[BaseHTTPResponse]:
    """The server's answer: 304 for a version that is here, 206 for the rest of a part, or 200."""
    for conditions in (_conditions(place, known), {}):
        response = get(address, place.shown, conditions, allow_private=source.allow_private)
        try:
            if response.status != 416 or not conditions:
                _check_status(response, place, conditions)
                yield response
                return
        finally:
            response.close()
        _drop_part(place)


def _conditions(place: DownloadPaths, known: dict[str, Any]) -> Headers:
    part = _facts(place.part_facts)
    # a weak validator promises the same meaning, not the same bytes
    validator = part.get("last_modified") if part.get("etag") is None else part["etag"]
    if place.part.is_file() and place.part.stat().st_size and validator and not validator.startswith("W/"):
        return {"Range": f"bytes={place.part.stat().st_size}-", "If-Range": validator}
    if known.get("etag"):
        return {"If-None-Match": known["etag"]}
    return {"If-Modified-Since": known["last_modified"]} if known.get("last_modified") else {}


def _check_status(response: BaseHTTPResponse, place: DownloadPaths, conditions: Headers) -> None:
    """Raises: DataError for anything but the file, or an answer to what `conditions` asked."""
    asked = {206} if "Range" in conditions else {304} if conditions else set()
    if response.status in {200} | asked:
        return
    remedies = {401: "it wants credentials; use a signed url", 403: "it refuses access; use a signed url"}
    raise DataError(
        f"{place.shown} answered with HTTP status {response.status}",
        hint=remedies.get(response.status, "check data_source.url, or try again later"),
    )


def _receive(response: BaseHTTPResponse, source: DataSource, place: DownloadPaths) -> None:
    """Write the body to the partial file: behind what is there, or over it."""
    begin = _range_begin(response, place) if response.status == 206 else 0
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity" and ENCODINGS.get(encoding) != Path(place.name).suffix:
        raise DataError(
            f"{place.shown} comes compressed ({encoding}), though the plain file was asked for",
            hint="ask for the compressed file by its own name, or fetch it by hand and use data_source.type=local",
        )
    length = response.headers.get("Content-Length", "")
    if length.isdigit():
        _check_size(begin + int(length), source, place)
    with disk_errors(place.part), place.part.open("ab" if begin else "wb") as file:
        if not begin:  # noted only now that no bytes of another version are left
            write_json(place.part_facts, _validators(response))
        for block in response.stream(BLOCK, decode_content=False):
            file.write(block)
            _check_size(file.tell(), source, place)


def _validators(response: BaseHTTPResponse) -> dict[str, str | None]:
    return {"etag": response.headers.get("ETag"), "last_modified": response.headers.get("Last-Modified")}


def _check_size(size: int, source: DataSource, place: DownloadPaths) -> None:
    try:
        check_size(place.shown, size, source.max_gb)
    except DataError:
        _drop_part(place)
        raise


def _range_begin(response: BaseHTTPResponse, place: DownloadPaths) -> int:
    """Where the 206 answer begins, proven to continue the partial file."""
    have = place.part.stat().st_size if place.part.exists() else 0
    told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    begin, end, total = map(int, told.groups()) if told else (-1, -1, -1)
    length = response.headers.get("Content-Length", str(end - begin + 1))
    before, now = _facts(place.part_facts), _validators(response)
    same = all(value in (None, before.get(key)) for key, value in now.items())
    if not have or begin != have or end != total - 1 or length != str(end - begin + 1) or not same:
        _drop_part(place)
        raise DataError(
            f"{place.shown} was asked for its bytes from {have} on, and answered with others",
            hint="the partial file was dropped; run the command again",
        )
    return begin


def _broken_off(place: DownloadPaths, error: Exception) -> DataError:
    have = place.part.stat().st_size if place.part.exists() else 0
    return DataError(
        f"{place.shown} broke off after {have:,} bytes ({type(error).__name__})",
        hint="run the command again; it goes on from there where the server can",
    )


def _drop_part(place: DownloadPaths) -> None:
    place.part.unlink(missing_ok=True)
    place.part_facts.unlink(missing_ok=True)
