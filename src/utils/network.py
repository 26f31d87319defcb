"""Why a request over the network failed: the cause behind the errors that libraries wrap around it.

Libraries say "check your connection" for a proxy without its package, a variable that forbids the network, and an
unknown name alike. Errors are recognised by the names of their classes: nothing is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
CHECK_NETWORK = "check the network"
MAX_CHAIN = 20  # errors behind an error


class Cause(NamedTuple):
    """Why a request failed, and the remedy; one clause each."""

    fact: str
    remedy: str


class Failure(NamedTuple):
    """A kind of failure: the classes of its errors, the words in their text, and what is said of it.

    Fields of `fact` and `remedy`: {server}; {to}, the server or the proxy before it; {variable} of the proxy;
    {reason}, the text of the error; {network}, the remedy for a connection; {offline} and {token}, variables.
    """

    classes: tuple[str, ...]
    words: str
    fact: str
    remedy: str


PROXY = ("ProxyError", "ProxyConnectionError")
TIMEOUTS = ("TimeoutException", "TimeoutError", "ConnectTimeoutError", "ReadTimeoutError")
BROKEN = ("RemoteProtocolError", "ProtocolError", "ConnectionError", "ConnectionClosedError")
STATUS = ("HTTPStatusError", "HfHubHTTPError")
# The first kind that one of the errors is of; the more specific ones come first.
KINDS = [
    Failure(("ImportError", "InvalidSchema"), "socks|SOCKS",
         "{to} needs the Python package socksio", "install it (pip install socksio), or unset {variable}"),
    Failure((), "[Uu]nknown scheme for proxy|Proxy URL had|invalid proxy",
         "{to} is not the address of a proxy", "write {variable}=http://HOST:PORT, or unset it"),
    Failure(PROXY, "407", "{to} requires a user name and a password",
         "write {variable}=http://USER:PASSWORD@HOST:PORT"),
    Failure(("OfflineModeIsEnabled",), "", "{offline} is set, which forbids the network", "unset {offline}"),
    Failure((), "outgoing traffic has been disabled|offline mode is enabled",
         "{offline} is set, which forbids the network", "unset {offline}, or fetch it once without it"),
    Failure(("GatedRepoError",), "", "it is gated, and {token}", "accept its terms on its page, and set HF_TOKEN"),
    Failure(("RepositoryNotFoundError",), "",
         "{server} has none of this name, or it is private and {token}", "correct the name, or set HF_TOKEN"),
    Failure(("RevisionNotFoundError",), "", "it has no such revision", "correct the revision"),
    Failure(("gaierror", "NameResolutionError"), "", "no address is known for {to}", "{network}"),
    Failure((), "CERTIFICATE_VERIFY_FAILED|certificate verify failed|doesn't match|no appropriate",
         "the certificate of {to} is not trusted ({reason})",
         "set SSL_CERT_FILE if a private certificate authority issued it"),
    Failure(("SSLError",), "", "TLS with {to} failed ({reason})", "check whether the address is http or https"),
    Failure((), r"\[SSL", "TLS with {to} failed ({reason})", "check whether the address is http or https"),
    Failure(("ConnectionRefusedError",), "", "{to} refuses the connection", "{network}"),
    Failure((), "[Nn]o route to host|[Nn]etwork is unreachable", "{to} cannot be reached", "{network}"),
    Failure(TIMEOUTS, "", "{to} does not respond in time", "{network}"),
    Failure(BROKEN, "", "{to} broke the connection off", "{network}"),
    Failure(PROXY, "", "{to} passes no request on ({reason})", "{network}"),
    Failure(STATUS, r"\b40[13]\b", "{server} denies access, and {token}", "set HF_TOKEN to one that may read it"),
    Failure(STATUS, r"\b(408|429|5\d\d)\b", "{server} is busy or out of order ({reason})", "try again later"),
    Failure(STATUS, "", "{server} refuses the request ({reason})", "check the name and the address of the server"),
]  # fmt: skip


def network_cause(error: BaseException, address: str, proxies: bool = True) -> Cause | None:
    """Why a request to the server at `address` failed, by `error` and those behind it; None if it is not known.

    Args:
        proxies: whether the request goes by a proxy where the environment sets one.
    """
    chain = list(_chain(error))
    for kind in KINDS:
        for each in chain:
            if _is(each, kind):
                fields = _fields(each, address, proxy_of(address) if proxies else ("", ""))
                return Cause(kind.fact.format(**fields), kind.remedy.format(**fields))
    return None


def proxy_of(address: str) -> tuple[str, str]:
    """The variable that sets a proxy for `address`, and the proxy without its credentials; empty without one."""
    parts = urlsplit(address)
    proxies = getproxies_environment()
    scheme = next((each for each in (parts.scheme, "all") if proxies.get(each)), "")
    if not scheme or not parts.hostname or proxy_bypass(parts.hostname):
        return "", ""
    variable = next(name for name in os.environ if name.lower() == f"{scheme}_proxy" and os.environ[name])
    return variable, re.sub("//[^/@]*@", "//", proxies[scheme])


def _fields(error: BaseException, address: str, by: tuple[str, str]) -> dict[str, str]:
    server = urlsplit(address).netloc.rpartition("@")[2] or address
    variable, proxy = by
    return {
        "server": server,
        "to": f"the proxy {proxy} ({variable})" if proxy else server,
        "variable": variable or "the proxy's variable",
        "network": f"correct or unset {variable}" if variable else CHECK_NETWORK,
        "reason": _reason(error),
        "offline": next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0]),
        "token": "HF_TOKEN gives no access to it" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set",
    }


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without its address, its number and its place in the source."""
    text = " ".join(str(error).split()).partition(" For more information")[0]
    text = re.sub(r"\[[^]]*\] |\s*\(_ssl[^)]*\)| for url '[^']*'", "", text)
    return text[:120] or type(error).__name__


def _is(error: BaseException, kind: Failure) -> bool:
    names = {each.__name__ for each in type(error).__mro__}
    return (not kind.classes or not names.isdisjoint(kind.classes)) and bool(re.search(kind.words, str(error)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it, from the outermost to the first."""
    current: BaseException | None = error
    for _ in range(MAX_CHAIN):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__
