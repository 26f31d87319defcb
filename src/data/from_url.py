"""The `url` source: one file over http(s), resumable, verified, and never from inside the private network.

Every hop of a redirect is resolved once; its addresses are judged, and the connection goes to just those, so a
name that answers differently the second time gains nothing. For that reason no proxy is used.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from src.config import DataSource
from src.data.download import Fetched, cache_key, check_size, once
from src.errors import DataError, RunError
from src.utils.files import disk_errors, read_json, sha256, write_json

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse
    from urllib3.util import Url

CONNECT_SECONDS, READ_SECONDS = 10, 30
MOST_REDIRECTS = 5
BLOCK = 1 << 20
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# what a server may call the compression of a file that is a compressed one by its name
ENCODINGS = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}
Headers = dict[str, str]


class Place(NamedTuple):
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


def url(source: DataSource, cache: Path) -> Fetched:
    """Fetch the file at `source.url`, unless the server says that it has not changed.

    Args:
        source: reads url, sha256, max_gb and allow_private.
        cache: the file lands in CACHE/url; a partial one is kept there and continued by the next call.
    Raises: DataError if it cannot be had, is too large, lies at a private address or is not what sha256 says.
    """
    address = _checked(source.url or "")
    wanted = _checked_digest(source.sha256)
    place = Place(cache / "url" / cache_key(address), shown(address), _file_name(address))
    with _alone(place):
        known = _known(place, wanted)
        if not wanted or not known:
            known = _download(address, source, place, known, wanted)
    version = {"type": "url", "url": place.shown} | {key: known.get(key) for key in ("sha256", "bytes", "etag")}
    return Fetched(place.version(known["sha256"]), version)


def shown(address: str) -> str:
    """`address` without its query and fragment, which may hold a token.

    >>> shown("https://example.org/a.jsonl?token=x#y")
    'https://example.org/a.jsonl?...'
    """
    plain, query, _ = address.partition("#")[0].partition("?")
    return plain + ("?..." if query else "")


def _checked(address: str) -> str:
    parsed = _parse(address)
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


def _parse(address: str) -> Url | None:
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        parsed = parse_url(address)
    except LocationParseError:
        return None
    return parsed if parsed.scheme in {"http", "https"} and parsed.host else None


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
def _alone(place: Place) -> Iterator[None]:
    """Hold other processes off the partial file: they wait here, and find the whole one then."""
    import fcntl

    with disk_errors(place.folder):
        place.folder.mkdir(parents=True, exist_ok=True)
        lock = (place.folder / "lock").open("w")
    with lock:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _known(place: Place, wanted: str | None) -> dict[str, Any]:
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
    address: str, source: DataSource, place: Place, known: dict[str, Any], wanted: str | None
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
        once(place.version(digest), lambda folder: place.part.rename(folder / place.name))
        write_json(place.facts, facts)
    _drop_part(place)
    return facts


@contextmanager
def _answer(address: str, source: DataSource, place: Place, known: dict[str, Any]) -> Iterator[BaseHTTPResponse]:
    """The server's answer: 304 for a version that is here, 206 for the rest of a part, or 200."""
    for conditions in (_conditions(place, known), {}):
        response = _follow(address, source, place, conditions)
        try:
            if response.status != 416 or not conditions:
                _check_status(response, place, conditions)
                yield response
                return
        finally:
            response.close()
        _drop_part(place)


def _conditions(place: Place, known: dict[str, Any]) -> Headers:
    part = _facts(place.part_facts)
    # a weak validator promises the same meaning, not the same bytes
    validator = part.get("last_modified") if part.get("etag") is None else part["etag"]
    if place.part.is_file() and place.part.stat().st_size and validator and not validator.startswith("W/"):
        return {"Range": f"bytes={place.part.stat().st_size}-", "If-Range": validator}
    if known.get("etag"):
        return {"If-None-Match": known["etag"]}
    return {"If-Modified-Since": known["last_modified"]} if known.get("last_modified") else {}


def _check_status(response: BaseHTTPResponse, place: Place, conditions: Headers) -> None:
    """Raises: DataError for anything but the file, or an answer to what `conditions` asked."""
    asked = {206} if "Range" in conditions else {304} if conditions else set()
    if response.status in {200} | asked:
        return
    remedies = {401: "it wants credentials; use a signed url", 403: "it refuses access; use a signed url"}
    raise DataError(
        f"{place.shown} answered with HTTP status {response.status}",
        hint=remedies.get(response.status, "check data_source.url, or try again later"),
    )


def _receive(response: BaseHTTPResponse, source: DataSource, place: Place) -> None:
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


def _check_size(size: int, source: DataSource, place: Place) -> None:
    try:
        check_size(place.shown, size, source.max_gb)
    except DataError:
        _drop_part(place)
        raise


def _range_begin(response: BaseHTTPResponse, place: Place) -> int:
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


def _broken_off(place: Place, error: Exception) -> DataError:
    have = place.part.stat().st_size if place.part.exists() else 0
    return DataError(
        f"{place.shown} broke off after {have:,} bytes ({type(error).__name__})",
        hint="run the command again; it goes on from there where the server can",
    )


def _drop_part(place: Place) -> None:
    place.part.unlink(missing_ok=True)
    place.part_facts.unlink(missing_ok=True)


# Connections


def _follow(address: str, source: DataSource, place: Place, conditions: Headers) -> BaseHTTPResponse:
    """The first answer that is no redirect."""
    for _ in range(MOST_REDIRECTS + 1):
        parsed = _parse(address)
        assert parsed is not None, "checked before"
        response = _ask(parsed, source, place, conditions)
        target = response.headers.get("Location")
        if response.status not in {301, 302, 303, 307, 308} or not target:
            return response
        response.close()
        address = _next_hop(address, target, place)
    raise DataError(
        f"{place.shown} redirects more than {MOST_REDIRECTS} times", hint="use the address that it means"
    )


def _next_hop(address: str, target: str, place: Place) -> str:
    following = urljoin(address, target)
    parsed = _parse(following)
    if parsed is None or parsed.auth is not None:
        raise DataError(f"{place.shown} redirects to what is no plain http(s) address", hint="use another url")
    if address.lower().startswith("https:") and parsed.scheme != "https":
        raise DataError(
            f"{place.shown} redirects from https down to http", hint="use an address that stays on https"
        )
    return following.partition("#")[0]


def _ask(parsed: Url, source: DataSource, place: Place, conditions: Headers) -> BaseHTTPResponse:
    """Send the request to the first of the host's addresses that takes it."""
    import urllib3

    host = (parsed.host or "").strip("[]").rstrip(".")
    secure = parsed.scheme == "https"
    port = parsed.port or (443 if secure else 80)
    options: dict[str, Any] = {}
    if secure:
        options = {"assert_hostname": host} | ({} if _as_ip(host) else {"server_hostname": host})
    pool_class = urllib3.HTTPSConnectionPool if secure else urllib3.HTTPConnectionPool
    headers = {"Host": parsed.netloc or host, "Accept-Encoding": "identity", "User-Agent": "assay", **conditions}
    reason = ""
    for ip in _addresses(host, port, source.allow_private, place):
        pool = pool_class(ip, port, timeout=urllib3.Timeout(CONNECT_SECONDS, READ_SECONDS), **options)
        try:
            return pool.urlopen(
                "GET", parsed.request_uri, headers=headers, redirect=False, retries=False,
                preload_content=False, decode_content=False,
            )  # fmt: skip
        except urllib3.exceptions.SSLError:
            raise DataError(
                f"the certificate of {host} is not trusted",
                hint="set SSL_CERT_FILE if it comes from a certificate authority of your own",
            ) from None
        except urllib3.exceptions.HTTPError as error:
            reason = type(error).__name__
    raise DataError(
        f"{host} does not answer on port {port} ({reason})",
        hint="check data_source.url and the network; proxies are not used, see docs/sources.md",
    )


def _addresses(host: str, port: int, allow_private: bool, place: Place) -> list[str]:
    """The addresses of `host`, all of them judged."""
    if re.fullmatch(r"\d+|0x[0-9a-f]*", host.lower().rpartition(".")[2]) and _as_ip(host) is None:
        raise DataError(
            f"{place.shown} leads to {host}, an unusual spelling of an address", hint="write it as a.b.c.d"
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DataError(f"no address is known for {host}", hint="check data_source.url and the network") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = [ip for ip in addresses if not _is_public(ip)]
    if private and not allow_private:
        raise DataError(
            f"{place.shown} leads to {host}, which is {private[0]}, a private address",
            hint="set data_source.allow_private=true if you trust it",
        )
    return addresses


def _as_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_public(address: str) -> bool:
    """Whether an address, or the IPv4 one that it stands for, is reachable by everybody."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        in_nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        inner = ip.ipv4_mapped or ip.sixtofour or in_nat64
        if inner is None and ip not in GLOBAL_UNICAST:
            return False
        ip = inner or ip
    return ip.is_global and not ip.is_multicast
