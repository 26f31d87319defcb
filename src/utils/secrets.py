"""Find what is secret and redact it: everything written to a file passes through `redact`.

Secret are the values of variables whose names say so, of variables that a setting refers to by `${oc.env:NAME}`,
and in URLs the user information and the values of a query.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from .urls import REDACTED, REFERENCE, hide_in_urls

SECRET_NAME = re.compile(
    r"TOKEN|SECRET|KEY|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|^LAKEFS_|DATABASE_URL|CONNECTION_STRING|WEBHOOK"
    r"|(?<!BY)(?<!COM)PASS(?![A-Z])|PWD(?![A-Z])|CREDS?(?![A-Z])|(?<!COM)PAT(?![A-Z])|DSN(?![A-Z])"
    r"|AUTH(?!OR(?!IZ|IS))",  # AUTHORIZATION, not AUTHOR
    re.IGNORECASE,
)
PUBLIC_NAME = re.compile(r"ENDPOINT|(?<!DATABASE_)URL$|HOST$", re.IGNORECASE)  # redacted as well, but not secret
NOT_SECRET = {"REMOTE_KEY", "PWD", "OLDPWD"}  # paths
USER_IN_URL = re.compile(r"(?:https?://[^/?#\s]+|[A-Za-z][\w+.-]*://[^/?#\s]*:[^/?#\s]*)@")
SHORTEST_SECRET = 8  # shorter values (KEY=1, TOKEN=test) occur in other text by chance
REFERRED = (
    "ASSAY_REFERRED"  # names, separated by commas: the variables that settings refer to; inherited by workers
)
URL_PART = "ASSAY_URL_PART_"  # and a number: the variable of a secret part of a typed URL, see `to_references`


def secrets() -> dict[str, str]:
    """`{value: variable name}` of the environment's secrets, the longest first."""
    referred = set(os.environ.get(REFERRED, "").split(","))
    named = {k: v for k, v in os.environ.items() if len(v) >= SHORTEST_SECRET and k not in NOT_SECRET}
    found = {v: k for k, v in named.items() if (k in referred or _grants_access(k, v)) and not _is_path(v)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def credentials() -> dict[str, str]:
    """`{value: variable name}` of the secrets that grant access by name or form, unlike addresses."""
    return {
        value: name
        for value, name in secrets().items()
        if USER_IN_URL.match(value) or (SECRET_NAME.search(name) and not PUBLIC_NAME.search(name))
    }


def _grants_access(name: str, value: str) -> bool:
    return bool(SECRET_NAME.search(name) or USER_IN_URL.match(value))


def _is_path(value: str) -> bool:
    """Whether a value is an absolute path, as in GOOGLE_APPLICATION_CREDENTIALS: its first folder exists."""
    first = value[1:].partition("/")[0]
    return value.startswith("/") and bool(first) and "\0" not in value and os.path.isdir(f"/{first}")


def refer_to(name: str) -> None:
    """Treat the value of a variable as secret from now on, also in the processes that this one starts."""
    known = [each for each in os.environ.get(REFERRED, "").split(",") if each]
    if name not in known and name != REFERRED:
        os.environ[REFERRED] = ",".join([*known, name])


def redact(value: Any) -> Any:
    """`value` with every secret replaced by the reference `${oc.env:NAME}`, which OmegaConf resolves.

    In URLs, `***` stands for a secret that no variable holds. Recurses into dicts and lists, since escaping, as in
    JSON, would hide a secret.
    """
    known = _reference_of_each()

    def clean(text: str) -> str:
        return _URL_PART_REFERENCE.sub(REDACTED, hide_in_urls(_replace(text, known)))

    return _in_texts(value, clean)


def redact_secrets(value: Any) -> Any:
    """As `redact`, but URLs stay: for rows of data and answers of models, of which they are content."""
    known = _reference_of_each()
    return _in_texts(value, lambda text: _replace(text, known))


def to_references(value: Any) -> Any:
    """`value` without secrets, from which `restore_secrets` or OmegaConf makes `value` again in this environment.

    It is passed to other processes, which inherit the environment or are sent the variables that it names. Each
    secret part of a URL gets a variable of its own.
    """
    known = _reference_of_each()
    return _in_texts(value, lambda text: hide_in_urls(_replace(text, known), _reference_of_part))


def split_at_secrets(text: str) -> list[str]:
    """`text` cut at its secrets, with their variables in between: `[text, name, text, ...]`."""
    known = secrets()
    if not known:
        return [text]
    pieces = re.split(f"({'|'.join(map(re.escape, known))})", text)
    pieces[1::2] = [known[secret] for secret in pieces[1::2]]
    return pieces


def restore_secrets(value: Any) -> Any:
    """The inverse of `redact_secrets` and `to_references` in the same environment."""
    parts = {name: os.environ[name] for name in os.environ if name.startswith(URL_PART)}
    known = {name: secret for secret, name in secrets().items()} | parts
    return _in_texts(value, lambda text: _replace(text, {_reference(name): v for name, v in known.items()}))


_URL_PART_REFERENCE = re.compile(rf"\$\{{oc\.env:{URL_PART}\d+\}}")


def _reference(name: str) -> str:
    return f"${{oc.env:{name}}}"


def _reference_of_each() -> dict[str, str]:
    return {secret: _reference(name) for secret, name in secrets().items() if not name.startswith(URL_PART)}


def _reference_of_part(part: str) -> str:
    """A reference to the variable that holds a secret part of a URL; it is set unless it exists."""
    if part == REDACTED:
        return part
    part = re.sub(REFERENCE, lambda found: os.environ.get(found[0][9:-1], found[0]), part)  # ${oc.env:NAME}
    names = (f"{URL_PART}{number}" for number in range(1, len(os.environ) + 2))
    name = next(name for name in names if os.environ.get(name, part) == part)
    os.environ[name] = part
    return _reference(name)


def _replace(text: str, known: Mapping[str, str]) -> str:
    if found := [old for old in known if old in text]:  # one pass: a replacement may hold another secret
        return re.sub("|".join(map(re.escape, found)), lambda match: known[match[0]], text)
    return text


def _in_texts(value: Any, change: Any) -> Any:
    """`value` with `change` applied to every text in it, keys included. Tuples become lists."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_in_texts(k, change): _in_texts(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_in_texts(v, change) for v in value]
    return value


def redact_argv(argv: Iterable[str]) -> list[str]:
    """A command line as it may be shown and recorded, see `redact`."""
    return [str(redact(word)) for word in argv]


def redact_tracebacks(show: Callable[[str], str]) -> None:
    """Redact tracebacks of unhandled exceptions: stderr may be kept in a log. `show` makes them printable."""

    def report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        print(show(str(redact(text))), end="", file=sys.stderr, flush=True)

    sys.excepthook = report
    threading.excepthook = lambda ended: report(ended.exc_type, ended.exc_value, ended.exc_traceback)
