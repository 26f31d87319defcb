"""Find the secrets of the environment and redact them: everything written to a file passes through `redact`."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

SECRET_NAME = re.compile(r"TOKEN|SECRET|KEY|PASSWORD|^LAKEFS_", re.IGNORECASE)
PUBLIC_NAME = re.compile(r"ENDPOINT|URL$|HOST$", re.IGNORECASE)  # redacted as well, but not secret
NOT_SECRET = {"REMOTE_KEY"}  # the path of a file
SHORTEST_SECRET = 8  # shorter values (KEY=1, TOKEN=test) occur in other text by chance


def secrets() -> dict[str, str]:
    """`{value: variable name}` of the environment's secrets, the longest first."""
    named = {k: v for k, v in os.environ.items() if SECRET_NAME.search(k) and k not in NOT_SECRET}
    found = {v: k for k, v in named.items() if len(v) >= SHORTEST_SECRET}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def redact(value: Any) -> Any:
    """`value` with every secret replaced by the reference `${oc.env:NAME}`, which OmegaConf resolves.

    Recurses into dicts and lists, since escaping, as in JSON, would hide a secret.
    """
    return _replace(value, {secret: f"${{oc.env:{name}}}" for secret, name in secrets().items()})


def split_at_secrets(text: str) -> list[str]:
    """`text` cut at its secrets, with their variables in between: `[text, name, text, ...]`."""
    known = secrets()
    if not known:
        return [text]
    pieces = re.split(f"({'|'.join(map(re.escape, known))})", text)
    pieces[1::2] = [known[secret] for secret in pieces[1::2]]
    return pieces


def restore_secrets(value: Any) -> Any:
    """The inverse of `redact` in the same environment."""
    return _replace(value, {f"${{oc.env:{name}}}": secret for secret, name in secrets().items()})


def _replace(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        if found := [old for old in known if old in value]:  # one pass: a replacement may hold another secret
            return re.sub("|".join(map(re.escape, found)), lambda match: known[match[0]], value)
        return value
    if isinstance(value, Mapping):
        return {_replace(k, known): _replace(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(v, known) for v in value]
    return value


def credentials() -> dict[str, str]:
    """`{value: variable name}` of the secrets that grant access, unlike addresses."""
    return {value: name for value, name in secrets().items() if not PUBLIC_NAME.search(name)}


def redact_argv(argv: Iterable[str]) -> list[str]:
    """A command line with every secret replaced by a reference to its environment variable."""
    return [str(redact(word)) for word in argv]


def redact_tracebacks() -> None:
    """Redact the tracebacks of unhandled exceptions, since stderr may be kept in a log."""

    def report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)

    sys.excepthook = report
    threading.excepthook = lambda ended: report(ended.exc_type, ended.exc_value, ended.exc_traceback)
