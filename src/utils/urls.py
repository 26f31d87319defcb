"""What may be secret in a URL: user information, and the values in its path, its query and its fragment.

https://me:word@host/rows.jsonl?expires=9&sig=abc#t=1
https://***@host/rows.jsonl?expires=***&sig=***#t=***
"""

from __future__ import annotations

import re
from collections.abc import Callable

REDACTED = "***"
REFERENCE = r"\$\{oc\.env:\w+\}"  # reveals nothing, and is resolved again
# A setting or a word of a command line that is one URL, whatever characters it has.
_ONE_URL = re.compile(r"[+~]*(?:[\w./]+=)?[\"']?[A-Za-z][\w+.-]*://\S+")
_WORD = re.compile(r"(?:[^\s\"'<>`]|'(?=[\w%&=/#?]))+")  # a quote may be part of a URL, and stand around one
_PARAMETER = re.compile(r"(?<=;)([\w.-]+=)([^;/?#]+)")  # of a path: /rows.jsonl;session=abc
_AUTHORITY_USER = re.compile(
    r"[^/?#]*@|[^/?#@:]*:(?!\d*(?:[/?#]|$)).*@", re.DOTALL
)  # the second holds a raw slash
_INNER_USER = re.compile(r"(?<=://)[^/?#]*@")  # of a second URL: https://proxy/https://me:word@host, a list
_PATH_QUERY_FRAGMENT = re.compile(r"([^?#]*)(\?[^#]*)?(#.*)?", re.DOTALL)
_BEARER = {"http", "https", "ws", "wss", "ftp"}  # where `?` is no wildcard: a query without `=` is a token
_MARK = re.compile(r"://(?:\S*[=?&#/])?\*\*\*")


def hide_in_urls(text: str, hide: Callable[[str], str] = lambda part: REDACTED) -> str:
    """`text` in which `hide` has replaced the secret parts of every URL. References to variables stay.

    A path with a query needs no scheme: the errors of libraries quote it without.

    >>> hide_in_urls("see https://me:word@host/a?x=1&y=2, or /b?sig=3")
    'see https://***@host/a?x=***&y=***, or /b?sig=***'
    """
    if "/" not in text or not any(mark in text for mark in "?@#;"):
        return text
    if _ONE_URL.fullmatch(text):
        return _hide(text, hide)
    return _WORD.sub(lambda found: _hide(found[0], hide) if "/" in found[0] else found[0], text)


def is_redacted(text: str) -> bool:
    """Whether a URL in `text` has lost its secret parts: it must not be fetched, since it is another address."""
    return _MARK.search(text) is not None


def _hide(word: str, hide: Callable[[str], str]) -> str:
    before, scheme, rest = _split_scheme(word)
    rest, after = _split_punctuation(rest)
    before += f"{scheme}://" if scheme else ""
    if scheme and (user := _AUTHORITY_USER.match(rest)):
        rest = rest[user.end() :]
        before += _hide_user(user[0], hide)
    path, query, fragment = _PATH_QUERY_FRAGMENT.fullmatch(rest).groups("")  # type: ignore[union-attr]
    path = _INNER_USER.sub(lambda found: _hide_user(found[0], hide), path)
    if scheme.lower() in _BEARER:
        path = _PARAMETER.sub(lambda found: f"{found[1]}{hide(found[2])}", path)
    if "=" in query or scheme.lower() in _BEARER:
        query = _hide_values(query, hide)
    if "=" in fragment and scheme:
        fragment = _hide_values(fragment, hide)
    return f"{before}{path}{query}{fragment}{after}"


def _split_scheme(word: str) -> tuple[str, str, str]:
    """What precedes the URL in a word, its scheme (empty: there is none), and what follows `://`."""
    head, colon, rest = word.partition("://")
    scheme = re.search(r"[A-Za-z][A-Za-z0-9+.-]*$", head[-32:])
    if not colon or not scheme:
        return "", "", word
    return head.removesuffix(scheme[0]), scheme[0], rest


def _split_punctuation(text: str) -> tuple[str, str]:
    """The text, and the punctuation of the sentence or the list around it."""
    end = len(text.rstrip(".,;:!?)]}\"'"))
    if text[end : end + 1] == "}" and re.fullmatch(REFERENCE, text[text.rfind("$", 0, end) : end + 1]):
        end += 1
    return text[:end], text[end:]


def _hide_user(text: str, hide: Callable[[str], str]) -> str:
    """User information with its `@`; a password that is a reference stays, and so does the name before it."""
    return text if re.fullmatch(rf"(?:[^@:]*:)?{REFERENCE}@", text) else f"{hide(text[:-1])}@"


def _hide_values(text: str, hide: Callable[[str], str]) -> str:
    """A query or fragment, from its `?` or `#` on, with its values hidden and the names of its parameters kept."""
    return text[:1] + "&".join(_hide_value(pair, hide) for pair in text[1:].split("&"))


def _hide_value(pair: str, hide: Callable[[str], str]) -> str:
    name, equals, value = pair.partition("=") if "=" in pair else ("", "", pair)
    return name + equals + (hide(value) if value and not re.fullmatch(REFERENCE, value) else value)
