"""The `url` source: one file over http(s). Downloads are resumable and verified; private addresses are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ..errors import DataError, RunError
from ..schema import DataSource
from ..utils.files import disk_errors, read_json, sha256, write_json
from ..utils.urls import hide_in_urls, is_redacted
from .download import FetchedData, Headers, cache_key, check_size, fetch_once, http_get, split_url
from .url_content import data_name, refuse_page, shows_a_cut

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

BLOCK = 1 << 20
# content encodings that are accepted for a file with this suffix
ENCODINGS = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}


class DownloadPaths(NamedTuple):
    """The paths of the downloads of one address, and the address as messages may show it."""

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
    """Fetch the file at `source.url`, unless the server reports that it is unchanged.

    Args:
        source: reads url, sha256, max_gb and allow_private.
        cache: the file is stored in CACHE/url. A partial file is kept and resumed by the next call.
    Raises: DataError if it cannot be fetched, is too large, is at a private address, or does not match sha256.
    """
    address = _check_address(source.url or "")
    wanted = _check_digest(source.sha256)
    paths = DownloadPaths(cache / "url" / cache_key(address), redacted_url(address), _file_name(address))
    with _lock(paths):
        known = _cached_facts(paths, wanted)
        if not wanted or not known:
            known = _download(address, source, paths, known, wanted)
        _name_cached(paths.version(known["sha256"]))
    version = {"type": "url", "url": paths.shown} | {key: known.get(key) for key in ("sha256", "bytes", "etag")}
    return FetchedData(paths.version(known["sha256"]), version)


def _name_cached(folder: Path) -> None:
    """Give the file of a version that was cached under a name without suffix the one that its content tells."""
    for file in folder.iterdir():
        if (name := data_name(file, file.name)) != file.name:
            with disk_errors(folder):
                file.rename(folder / name)


def recorded_url(source: DataSource, cache: Path, version: Mapping[str, Any]) -> Path:
    """The folder of the file whose SHA-256 `version` records, fetched under whichever address it has.

    Raises: DataError as fetch_url does.
    """
    digest = _check_digest(version["sha256"])
    cached = next((folder for folder in (cache / "url").glob(f"*/{digest}") if folder.is_dir()), None)
    return cached or fetch_url(replace(source, sha256=digest), cache).folder


def refuse_other_url(source: DataSource, cache: Path, version: Mapping[str, Any]) -> None:
    """Refuse an address with hidden parts that has not held the recorded `version`: a record shows it as equal.

    It is asked for its file, unless the cache has the version from this very address.

    Raises: DataError if it holds another file, or as fetch_url does.
    """
    address = _check_address(source.url or "")
    shown, key = redacted_url(address), cache_key(address)
    if shown == address or (cache / "url" / key / version["sha256"]).is_dir():
        return
    if fetch_url(source, cache).version["sha256"] != version["sha256"]:
        raise DataError(f"{shown} holds another file, and may have other hidden values than the run's address")


def redacted_url(address: str) -> str:
    """`address` as messages and records show it: without its fragment and the values of its query.

    >>> redacted_url("https://example.org/a.jsonl?token=x#y")
    'https://example.org/a.jsonl?token=***'
    """
    return hide_in_urls(address.partition("#")[0])


def _check_address(address: str) -> str:
    if is_redacted(address):
        raise DataError(
            f"data_source.url={address} is an address without its secret parts, which no file of a run holds",
            hint="set data_source.url to the whole address again",
        )
    parsed = split_url(address)
    if parsed is None:
        raise DataError(
            "data_source.url is not an http(s) address", hint="set it to one such as https://host/file"
        )
    if parsed.auth is not None:
        raise DataError(
            "data_source.url holds a user name or password, which would be recorded",
            hint="remove it; use a signed url or another source",
        )
    return address.partition("#")[0]


def _check_digest(digest: str | None) -> str | None:
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
def _lock(paths: DownloadPaths) -> Iterator[None]:
    """Lock the partial file. Other processes wait, and then find the complete file."""
    import fcntl

    with disk_errors(paths.folder):
        paths.folder.mkdir(parents=True, exist_ok=True)
        lock = (paths.folder / "lock").open("w")
    with lock:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached_facts(paths: DownloadPaths, wanted: str | None) -> dict[str, Any]:
    """Facts of the cached version: the wanted one, or the latest; empty if there is none."""
    latest = _facts(paths.facts)
    digest = wanted or latest.get("sha256", "")
    if not digest or not paths.version(digest).is_dir():
        return {}
    if digest == latest.get("sha256"):
        return latest
    return {"sha256": digest, "bytes": sum(file.stat().st_size for file in paths.version(digest).iterdir())}


def _facts(path: Path) -> dict[str, Any]:
    """The recorded facts of a download; empty if there are none or they are corrupt."""
    try:
        return dict(read_json(path))
    except (RunError, ValueError, TypeError):
        return {}


# Download


def _download(
    address: str, source: DataSource, paths: DownloadPaths, known: dict[str, Any], wanted: str | None
) -> dict[str, Any]:
    """Fetch the newest version into its folder. Returns: its sha256, bytes, etag and last_modified."""
    from urllib3.exceptions import HTTPError

    try:
        with _response(address, source, paths, known) as response:
            if response.status == 304:
                return known
            has_end = _receive(response, source, paths)
    except HTTPError as error:
        raise _interrupted(paths, error) from None
    name = data_name(paths.part, paths.name)
    if not (has_end or wanted or shows_a_cut(name)):
        _drop_part(paths)
        raise DataError(
            f"{paths.shown} was sent without its length, so that a part of the file would look complete",
            hint="nothing was stored; set data_source.sha256, or fetch it by hand and set data_source.type=local",
        )
    digest = sha256(paths.part)
    facts = _facts(paths.part_facts) | {"sha256": digest, "bytes": paths.part.stat().st_size}
    if wanted and digest != wanted:
        _drop_part(paths)
        raise DataError(
            f"{paths.shown} has the SHA-256 {digest}, and data_source.sha256 is {wanted}",
            hint="nothing was stored; correct sha256, or ask the provider of the file",
        )
    with disk_errors(paths.folder):
        fetch_once(paths.version(digest), lambda folder: paths.part.rename(folder / name))
        write_json(paths.facts, facts)
    _drop_part(paths)
    return facts


@contextmanager
def _response(
    address: str, source: DataSource, paths: DownloadPaths, known: dict[str, Any]
) -> Iterator[BaseHTTPResponse]:
    """The response: 304 if the cached version is current, 206 for the rest of a partial file, or 200."""
    for conditions in (_conditions(paths, known), {}):
        response = http_get(address, paths.shown, conditions, allow_private=source.allow_private)
        try:
            if response.status != 416 or not conditions:
                _check_status(response, paths, conditions)
                yield response
                return
        finally:
            response.close()
        _drop_part(paths)


def _conditions(paths: DownloadPaths, known: dict[str, Any]) -> Headers:
    part = _facts(paths.part_facts)
    # a weak validator does not guarantee identical bytes
    validator = part.get("last_modified") if part.get("etag") is None else part["etag"]
    if paths.part.is_file() and paths.part.stat().st_size and validator and not validator.startswith("W/"):
        return {"Range": f"bytes={paths.part.stat().st_size}-", "If-Range": validator}
    if known.get("etag"):
        return {"If-None-Match": known["etag"]}
    return {"If-Modified-Since": known["last_modified"]} if known.get("last_modified") else {}


def _check_status(response: BaseHTTPResponse, paths: DownloadPaths, conditions: Headers) -> None:
    """Raises: DataError unless the response is the file or matches the `conditions` of the request."""
    expected = {206} if "Range" in conditions else {304} if conditions else set()
    if response.status in {200} | expected:
        return
    remedies = {401: "it requires credentials; use a signed url", 403: "it denies access; use a signed url"}
    raise DataError(
        f"{paths.shown} answered with HTTP status {response.status}",
        hint=remedies.get(response.status, "check data_source.url, or try again later"),
    )


def _receive(response: BaseHTTPResponse, source: DataSource, paths: DownloadPaths) -> bool:
    """Write the body to the partial file: append a 206 response, else overwrite.

    Returns: whether the response says where it ends, so that no part of the file can look complete.
    """
    begin = _range_begin(response, paths) if response.status == 206 else 0
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity" and ENCODINGS.get(encoding) != Path(paths.name).suffix:
        raise DataError(
            f"{paths.shown} is sent compressed ({encoding}), though the plain file was requested",
            hint="use the address of the compressed file, or fetch it by hand and set data_source.type=local",
        )
    size = _full_size(response, begin)
    if size is not None:
        _check_size(size, source, paths)
    with disk_errors(paths.part), paths.part.open("ab" if begin else "wb") as file:
        if not begin:  # recorded only when no bytes of another version are left
            write_json(paths.part_facts, _validators(response))
        for block in response.stream(BLOCK, decode_content=False):
            if not file.tell():
                _refuse_page(block, response, paths)
            file.write(block)
            _check_size(file.tell(), source, paths)
        if size is not None and file.tell() != size:
            raise _interrupted(paths, EOFError())
    return size is not None or bool(getattr(response, "chunked", False))


def _full_size(response: BaseHTTPResponse, begin: int) -> int | None:
    """The size of the file in bytes, if the response says it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2] if begin else ""
    length = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else begin + int(length) if length.isdigit() else None


def _refuse_page(block: bytes, response: BaseHTTPResponse, paths: DownloadPaths) -> None:
    try:
        refuse_page(block, response.headers.get("Content-Type", ""), paths.name, paths.shown)
    except DataError:
        _drop_part(paths)
        raise


def _validators(response: BaseHTTPResponse) -> dict[str, str | None]:
    return {"etag": response.headers.get("ETag"), "last_modified": response.headers.get("Last-Modified")}


def _check_size(size: int, source: DataSource, paths: DownloadPaths) -> None:
    try:
        check_size(paths.shown, size, source.max_gb)
    except DataError:
        _drop_part(paths)
        raise


def _range_begin(response: BaseHTTPResponse, paths: DownloadPaths) -> int:
    """The first byte of a 206 response, after a check that it continues the partial file."""
    have = paths.part.stat().st_size if paths.part.exists() else 0
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    begin, end, total = map(int, match.groups()) if match else (-1, -1, -1)
    length = response.headers.get("Content-Length", str(end - begin + 1))
    before, now = _facts(paths.part_facts), _validators(response)
    same = all(value in (None, before.get(key)) for key, value in now.items())
    if not have or begin != have or end != total - 1 or length != str(end - begin + 1) or not same:
        _drop_part(paths)
        raise DataError(
            f"{paths.shown} returned other bytes than those requested, from {have} on",
            hint="the partial file was dropped; run the command again",
        )
    return begin


def _interrupted(paths: DownloadPaths, error: Exception) -> DataError:
    have = paths.part.stat().st_size if paths.part.exists() else 0
    return DataError(
        f"the download of {paths.shown} was interrupted after {have:,} bytes ({type(error).__name__})",
        hint="run the command again; it resumes if the server supports that",
    )


def _drop_part(paths: DownloadPaths) -> None:
    paths.part.unlink(missing_ok=True)
    paths.part_facts.unlink(missing_ok=True)
