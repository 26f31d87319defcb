"""What every remote source needs: names that stay inside their folder, and folders that are whole or absent."""

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

from src.errors import DataError
from src.utils.files import atomic_dir

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse
    from urllib3.util import Url

THREADS = 8
LONGEST_NAME = 255  # bytes, on every file system in use
CONNECT_SECONDS, READ_SECONDS = 10, 30
MOST_REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
Headers = dict[str, str]
Job = TypeVar("Job")


class FetchedData(NamedTuple):
    """A local folder, and the version that it was fetched at: what the manifest records."""

    folder: Path
    version: dict[str, Any]


def safe_path(folder: Path, name: str) -> Path:
    """Where the object `name`, such as `train/a.jsonl`, lies in `folder`.

    Raises: DataError if the name is absolute, climbs out of the folder, or is none that a file can have.
    """
    parts = PurePosixPath(name).parts
    odd = not parts or ".." in parts or "\\" in name or "\0" in name or name.startswith("/") or ":" in parts[0]
    target = folder.joinpath(*parts) if not odd else folder
    if odd or not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"the source holds an object named {name!r}, which would be written outside its folder",
            hint="nothing was fetched; rename or delete that object, or read another path",
        )
    return target


def safe_paths(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """`{name: where it lies in folder}` for all objects of one source.

    Raises: DataError as `inside` does, and if no file can have a name or two objects need the same place.
    """
    found = {name: safe_path(folder, name) for name in names}
    held: dict[Path, str] = {}
    for name, target in found.items():
        if not all(_fits(part) for part in target.relative_to(folder).parts):
            raise DataError(
                f"the source holds an object named {name[:80]!r}..., which no file can be called",
                hint="rename that object, or read another path",
            )
        if target in held:
            raise _clash(name, held[target])
        held[target] = name
    for target, name in held.items():
        folders = [parent for parent in target.parents if parent in held]
        if folders:
            raise _clash(name, held[folders[0]])
    return found


def _fits(part: str) -> bool:
    try:
        return len(os.fsencode(part)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _clash(a: str, b: str) -> DataError:
    return DataError(
        f"the source holds {a!r} and {b!r}, which cannot both be files in one folder",
        hint="rename one of them, or read another path",
    )


def relative_name(path: str, name: str) -> str | None:
    """What `name` is called seen from `path`, a folder or the object itself; None if it lies elsewhere.

    >>> relative_name("train", "train/a.jsonl"), relative_name("train/a.jsonl", "train/a.jsonl")
    ('a.jsonl', 'a.jsonl')
    >>> relative_name("train", "training/a") is None
    True
    """
    path = path.strip("/")
    if path and name == path:
        return name.rpartition("/")[2]
    return name.removeprefix(path + "/" if path else "") if not path or name.startswith(path + "/") else None


def cache_key(*parts: object) -> str:
    """A name for what `parts`, which are plain data, describe: equal for equal parts, and safe in a path."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_size(what: str, size: int, max_gb: float) -> None:
    """Raises: DataError if `size` bytes are more than the source may send."""
    if size > max_gb * 1e9:
        raise DataError(
            f"{what} is larger than data_source.max_gb={max_gb:g}: {size / 1e9:.3g} GB",
            hint="nothing was kept; raise max_gb, or read less",
        )


def check_endpoint(address: str, setting: str = "data_source.endpoint") -> str:
    """`address` of a server, which `setting` names, without a trailing slash.

    Raises: DataError if it is no http(s) address, or holds a user name or password, which would be written down.
    """
    try:
        parts = urlsplit(address)
        odd = parts.scheme not in {"http", "https"} or not parts.hostname or (parts.port or 1) < 1
    except ValueError:
        raise DataError(f"{setting} is not an http(s) address", hint="correct it") from None
    if "@" in parts.netloc or parts.query:
        raise DataError(
            f"{setting} holds a user name, a password or a query",
            hint="take them out: credentials come from environment variables only",
        )
    if odd:
        raise DataError(f"{setting} {address!r} is not an http(s) address", hint="correct it")
    return address.rstrip("/")


def fetch_once(target: Path, fill: Callable[[Path], object]) -> Path:
    """`target`, filled by `fill(temporary folder)` unless it is there already. A torn fetch leaves nothing.

    Raises: what `fill` raises.
    """
    if not target.is_dir():
        with atomic_dir(target) as temporary:
            fill(temporary)
    return target


def run_parallel(work: Callable[[Job], object], jobs: Iterable[Job]) -> None:
    """Do `work` for all `jobs`, several at a time; the first error is raised, and the rest are not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# HTTP


def parse(address: str) -> Url | None:
    """The parts of an http(s) address, or None if it is none."""
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        parsed = parse_url(address)
    except LocationParseError:
        return None
    return parsed if parsed.scheme in {"http", "https"} and parsed.host else None


def get(address: str, shown: str, headers: Headers, *, allow_private: bool) -> BaseHTTPResponse:
    """The first answer that is no redirect, its body not yet read.

    Args:
        shown: how the address may be named to people.
    Raises: DataError if it leads to a private address, and that is not allowed, or nobody answers.
    """
    for _ in range(MOST_REDIRECTS + 1):
        parsed = parse(address)
        assert parsed is not None, "checked before"
        response = _ask(parsed, allow_private, shown, headers)
        target = response.headers.get("Location")
        if response.status not in {301, 302, 303, 307, 308} or not target:
            return response
        response.close()
        address = _next_hop(address, target, shown)
    raise DataError(f"{shown} redirects more than {MOST_REDIRECTS} times", hint="use the address that it means")


def _next_hop(address: str, target: str, shown: str) -> str:
    following = urljoin(address, target)
    parsed = parse(following)
    if parsed is None or parsed.auth is not None:
        raise DataError(f"{shown} redirects to what is no plain http(s) address", hint="use another url")
    if address.lower().startswith("https:") and parsed.scheme != "https":
        raise DataError(f"{shown} redirects from https down to http", hint="use an address that stays on https")
    return following.partition("#")[0]


def _ask(parsed: Url, allow_private: bool, shown: str, extra: Headers) -> BaseHTTPResponse:
    """Send the request to the first of the host's addresses that takes it."""
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


def _addresses(host: str, port: int, allow_private: bool, shown: str) -> list[str]:
    """The addresses of `host`, all of them judged."""
    if re.fullmatch(r"\d+|0x[0-9a-f]*", host.lower().rpartition(".")[2]) and _as_ip(host) is None:
        raise DataError(f"{shown} leads to {host}, an unusual spelling of an address", hint="write it as a.b.c.d")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise DataError(f"no address is known for {host}", hint="check data_source.url and the network") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
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


def is_public(address: str) -> bool:
    """Whether an address, or the IPv4 one that it stands for, is reachable by everybody."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        in_nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        inner = ip.ipv4_mapped or ip.sixtofour or in_nat64
        if inner is None and ip not in GLOBAL_UNICAST:
            return False
        ip = inner or ip
    return ip.is_global and not ip.is_multicast
