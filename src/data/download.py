"""What remote sources share: safe file names, atomic and parallel fetches, HTTP GET to allowed addresses only.

HTTP: each hop of a redirect is resolved once. All its addresses are checked, and the connection goes to exactly
those, so that a second, different answer of the name server has no effect. Proxies are not used for this reason.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from ..errors import DataError
from ..utils.files import atomic_dir
from ..utils.network import network_cause

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse
    from urllib3.util import Url

THREADS = 8
MAX_NAME = 255  # bytes, on all common file systems
CONNECT_SECONDS, READ_SECONDS = 10, 30
MAX_REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Addresses that no setting opens: those of one link, where clouds hand out the credentials of their machines, and
# the other addresses of such services (AWS, Google, Alibaba, Oracle, Azure).
METADATA = [
    ipaddress.ip_network(each)
    for each in (
        "169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::/32", "100.100.100.200", "192.0.0.192",
        "168.63.129.16",
    )
]  # fmt: skip
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
Headers = dict[str, str]
Job = TypeVar("Job")


class FetchedData(NamedTuple):
    """A local folder, and the version of its data for the manifest."""

    folder: Path
    version: dict[str, Any]


def safe_path(folder: Path, name: str) -> Path:
    """The path in `folder` of the object `name`, such as `train/a.jsonl`.

    Raises: DataError if the name is absolute, leads out of the folder, or is not a valid file name.
    """
    parts = PurePosixPath(name).parts
    invalid = not parts or ".." in parts or "\\" in name or "\0" in name or name.startswith("/") or ":" in parts[0]
    target = folder.joinpath(*parts) if not invalid else folder
    if invalid or not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"the source holds an object named {name!r}, which would be written outside its folder",
            hint="nothing was fetched; rename or delete that object, or read another path",
        )
    return target


def safe_paths(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """`{name: path in folder}` of all objects of a source.

    Raises: DataError as safe_path does, and if a name is too long or two objects need the same path.
    """
    found = {name: safe_path(folder, name) for name in names}
    used: dict[Path, str] = {}
    for name, target in found.items():
        if not all(_fits(part) for part in target.relative_to(folder).parts):
            raise DataError(
                f"the source holds an object named {name[:80]!r}..., which is not a possible file name",
                hint="rename that object, or read another path",
            )
        if target in used:
            raise _clash(name, used[target])
        used[target] = name
    for target, name in used.items():
        folders = [parent for parent in target.parents if parent in used]
        if folders:
            raise _clash(name, used[folders[0]])
    return found


def _fits(part: str) -> bool:
    try:
        return len(os.fsencode(part)) <= MAX_NAME
    except UnicodeEncodeError:
        return False


def _clash(a: str, b: str) -> DataError:
    return DataError(
        f"the source holds {a!r} and {b!r}, which cannot both be files in one folder",
        hint="rename one of them, or read another path",
    )


def relative_name(path: str, name: str) -> str | None:
    """`name` relative to `path`, which is a folder or the object itself; None if it is not in `path`.

    >>> relative_name("train", "train/a.jsonl"), relative_name("train/a.jsonl", "train/a.jsonl")
    ('a.jsonl', 'a.jsonl')
    >>> relative_name("train", "training/a") is None
    True
    """
    path = path.strip("/")
    if path and name == path:
        return name.rpartition("/")[2]
    return name.removeprefix(path + "/" if path else "") if not path or name.startswith(path + "/") else None


def is_hidden_name(name: str) -> bool:
    """Whether an object, by its name relative to the path that is read, is a hidden file or in a hidden folder."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def cache_key(*parts: object) -> str:
    """A hash of `parts`, which are JSON values, that is safe in a path."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_size(what: str, size: int, max_gb: float) -> None:
    """Raises: DataError if `size` bytes exceed `max_gb` (10^9 bytes)."""
    if size > max_gb * 1e9:
        raise DataError(
            f"{what} is larger than data_source.max_gb={max_gb:g}: {size / 1e9:.3g} GB",
            hint="nothing was stored; raise max_gb, or select less data",
        )


def check_endpoint(address: str, setting: str = "data_source.endpoint") -> str:
    """The server `address` of `setting`, without a trailing slash.

    Raises: DataError if it is not an http(s) address, or holds a user name or password, which would be recorded.
    """
    try:
        parts = urlsplit(address)
        invalid = parts.scheme not in {"http", "https"} or not parts.hostname or (parts.port or 1) < 1
    except ValueError:
        raise DataError(f"{setting} is not an http(s) address", hint="correct it") from None
    if "@" in parts.netloc or parts.query:
        raise DataError(
            f"{setting} holds a user name, a password or a query",
            hint="remove them: credentials are read from environment variables only",
        )
    if invalid:
        raise DataError(f"{setting} {address!r} is not an http(s) address", hint="correct it")
    return address.rstrip("/")


def fetch_once(target: Path, fill: Callable[[Path], object]) -> Path:
    """`target`, filled by `fill(temporary folder)` unless it exists. An interrupted fetch leaves no folder.

    Raises: what `fill` raises.
    """
    if not target.is_dir():
        with atomic_dir(target) as temporary:
            fill(temporary)
    return target


def run_parallel(work: Callable[[Job], object], jobs: Iterable[Job]) -> None:
    """Run `work` for all `jobs` in THREADS threads. The first error is raised and cancels jobs not yet started."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# HTTP


def split_url(address: str) -> Url | None:
    """The parts of an http(s) address; None if it is not one."""
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        parsed = parse_url(address)
    except LocationParseError:
        return None
    return parsed if parsed.scheme in {"http", "https"} and parsed.host else None


def http_get(address: str, shown: str, headers: Headers, *, allow_private: bool) -> BaseHTTPResponse:
    """The first response that is not a redirect, with its body unread.

    Args:
        shown: the address as messages may show it.
    Raises: DataError if it leads to a private address, which is not allowed, or there is no response.
    """
    for _ in range(MAX_REDIRECTS + 1):
        parsed = split_url(address)
        assert parsed is not None, "checked before"
        response = _request(parsed, allow_private, shown, headers)
        target = response.headers.get("Location")
        if response.status not in {301, 302, 303, 307, 308} or not target:
            return response
        response.close()
        address = _next_hop(address, target, shown)
    raise DataError(f"{shown} redirects more than {MAX_REDIRECTS} times", hint="use the address to which it leads")


def _next_hop(address: str, target: str, shown: str) -> str:
    following = urljoin(address, target)
    parsed = split_url(following)
    if parsed is None or parsed.auth is not None:
        raise DataError(f"{shown} redirects to an address that is not plain http(s)", hint="use another url")
    if address.lower().startswith("https:") and parsed.scheme != "https":
        raise DataError(f"{shown} redirects from https down to http", hint="use an address that stays on https")
    return following.partition("#")[0]


def _request(parsed: Url, allow_private: bool, shown: str, extra: Headers) -> BaseHTTPResponse:
    """Send the request to the first address of the host that accepts a connection."""
    import urllib3

    host = (parsed.host or "").strip("[]").rstrip(".")
    secure = parsed.scheme == "https"
    port = parsed.port or (443 if secure else 80)
    options: dict[str, Any] = {}
    if secure:
        options = {"assert_hostname": host} | ({} if _as_ip(host) else {"server_hostname": host})
    pool_class = urllib3.HTTPSConnectionPool if secure else urllib3.HTTPConnectionPool
    headers = {"Host": parsed.netloc or host, "Accept-Encoding": "identity", "User-Agent": "assay", **extra}
    reason = ""
    for ip in _addresses(host, port, allow_private, shown):
        pool = pool_class(ip, port, timeout=urllib3.Timeout(CONNECT_SECONDS, READ_SECONDS), **options)
        try:
            return pool.urlopen(
                "GET", parsed.request_uri, headers=headers, redirect=False, retries=False,
                preload_content=False, decode_content=False,
            )  # fmt: skip
        except urllib3.exceptions.SSLError as error:
            fact, remedy = network_cause(error, f"https://{host}", proxies=False) or (
                f"TLS with {host} failed",
                "",
            )
            raise DataError(fact, hint=remedy) from None
        except urllib3.exceptions.HTTPError as error:
            cause = network_cause(error, f"{parsed.scheme}://{host}:{port}", proxies=False)
            reason = f"({type(error).__name__}){f': {cause.fact}' if cause else ''}"
    raise DataError(
        f"no response from {host} on port {port} {reason}",
        hint="check data_source.url and the network; proxies are not used, see docs/sources.md",
    )


def _addresses(host: str, port: int, allow_private: bool, shown: str) -> list[str]:
    """The addresses of `host`, all of them checked.

    Raises: DataError if there is none, or one is private and that is not allowed.
    """
    if re.fullmatch(r"\d+|0x[0-9a-f]*", host.lower().rpartition(".")[2]) and _as_ip(host) is None:
        raise DataError(f"{shown} leads to {host}, an unusual spelling of an address", hint="write it as a.b.c.d")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DataError(f"no address is known for {host}", hint="check data_source.url and the network") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for ip in filter(is_metadata, addresses):
        what = host if host == ip else f"{host}, which is {ip}"
        fact = f"{shown} leads to {what}, a private address that no setting allows"
        raise DataError(fact, hint="use another url: link-local addresses hold the credentials of cloud machines")
    private = [ip for ip in addresses if not is_public(ip)]
    if private and not allow_private:
        what = host if host == private[0] else f"{host}, which is {private[0]}"
        hint = "set data_source.allow_private=true if you trust it"
        raise DataError(f"{shown} leads to {what}, a private address", hint=hint)
    return addresses


def _as_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_metadata(address: str) -> bool:
    """Whether an address, or the IPv4 address that it embeds, is one of METADATA, which are never fetched from."""
    ip = ipaddress.ip_address(address)
    return any(each in network for each in (ip, _embedded(ip)) if each is not None for network in METADATA)


def is_public(address: str) -> bool:
    """Whether an address, or the IPv4 address that it embeds, is publicly reachable."""
    ip = ipaddress.ip_address(address)
    inner = _embedded(ip)
    if isinstance(ip, ipaddress.IPv6Address) and inner is None and ip not in GLOBAL_UNICAST:
        return False
    ip = inner or ip
    return ip.is_global and not ip.is_multicast


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address embeds, if any."""
    if not isinstance(ip, ipaddress.IPv6Address):
        return None
    in_nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
    return ip.ipv4_mapped or ip.sixtofour or in_nat64
