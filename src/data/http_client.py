"""One GET over http(s) that reaches only whom it may.

Every hop of a redirect is resolved once; its addresses are judged, and the connection goes to just those, so a
name that answers differently the second time gains nothing. For that reason no proxy is used.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from src.errors import DataError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse
    from urllib3.util import Url

CONNECT_SECONDS, READ_SECONDS = 10, 30
MOST_REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
Headers = dict[str, str]


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
