"""huggingface_hub's client with a time limit for every request, and errors that say whether a retry can help.

huggingface_hub waits for a response without limit, retries some requests and not others, and sleeps as long as a
server asks. With this client no request is retried: a TransientError is raised, and hub.py tries again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils._http import (
    default_client_factory,
    hf_request_event_hook,
    parse_ratelimit_headers,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from ..utils.network import network_cause
from .hub_settings import RESUME, endpoint, new_token_hint

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 120.0  # a commit of many files takes the server a while
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
MAX_REASON = 200  # characters
TRUE_VALUES = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its variables


class TransientError(Exception):
    """A failure that a retry may resolve: the connection was lost, or the server is busy.

    Args:
        wait: seconds after which the server asks for a retry, if it does.
        unreachable: no connection could be made at all.
        committing: the request was a commit, and it is not known whether the server accepted it.
    """

    def __init__(
        self, reason: str, wait: float | None = None, unreachable: bool = False, committing: bool = False
    ) -> None:
        self.reason, self.wait, self.unreachable, self.committing = reason, wait, unreachable, committing
        super().__init__(reason)


class HubHttpClient(httpx2.Client):
    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Raises: TransientError for every failure that a retry may resolve."""
        host = request.url.netloc.decode("ascii", "replace")
        committing = "/commit/" in request.url.path
        try:
            response = super().send(request, **options)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            cause = network_cause(error, str(request.url))
            reason = cause.fact if cause else _short(error)
            raise TransientError(f"{host} cannot be reached ({reason})", unreachable=True) from error
        except httpx2.TimeoutException as error:
            raise TransientError(f"{host} did not respond in time", committing=committing) from error
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            raise TransientError(f"the connection to {host} was lost", committing=committing) from error
        if response.status_code in TRANSIENT_STATUS:
            wait = _retry_after(response)
            raise TransientError(f"{host} responded with {response.status_code}", wait, committing=committing)
        return response


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds until a retry, as the server's RateLimit or Retry-After header says."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = response.headers.get("Retry-After", "").strip()
    return float(after) if after.isdigit() else None


@contextmanager
def connected(endpoint: str, token: str) -> Iterator[HfApi]:
    """huggingface_hub's API at `endpoint`, with this file's client until the end of the block."""
    host = urlsplit(endpoint).hostname or ""
    before = constants.HF_HUB_DISABLE_XET
    # Xet has no fallback for an endpoint without it. huggingface_hub reads the variable when it is imported.
    variable = os.environ.get("HF_HUB_DISABLE_XET")
    other_host = not f".{host}".endswith(".huggingface.co")
    constants.HF_HUB_DISABLE_XET = other_host if variable is None else variable.upper() in TRUE_VALUES
    if not os.isatty(2):
        disable_progress_bars()
    limits = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    hooks = {"request": [hf_request_event_hook]}
    huggingface_hub.set_client_factory(
        lambda: HubHttpClient(event_hooks=hooks, follow_redirects=True, timeout=limits)
    )
    try:
        yield HfApi(endpoint=endpoint, token=token, library_name="assay")
    finally:
        huggingface_hub.set_client_factory(default_client_factory)
        constants.HF_HUB_DISABLE_XET = before


def root_cause(error: BaseException) -> BaseException:
    """The known error behind those that huggingface_hub wraps around the errors of its threads."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, TransientError | HfHubHTTPError | OfflineModeIsEnabled):
            return current
        current = current.__cause__
    return error


def reason(error: BaseException) -> str:
    """The server's error message, in one line."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        message = " ".join((error.server_message or "").split())
        return f"{status}, {message[:MAX_REASON]}" if message else str(status)
    return _short(error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "..."


def explain(error: Exception, repo: str, user: str, namespaces: set[str]) -> tuple[str, str] | None:
    """`(fact, remedy)` of a known error, None of an unknown one.

    Args:
        namespaces: the names under which `user` may create repositories.
    """
    known = root_cause(error)
    if isinstance(known, TransientError):
        wait = f" and asks to wait {known.wait:.0f} s" if known.wait is not None else ""
        return known.reason + wait, RESUME
    if isinstance(known, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "unset it to publish"
    if isinstance(known, HfHubHTTPError):
        return _explain_status(known.response.status_code, reason(known), repo, user, namespaces)
    if isinstance(error, ImportError | ValueError) and (cause := network_cause(error, endpoint())):
        return cause.fact, cause.remedy  # of a proxy
    if isinstance(error, ValueError):  # huggingface_hub cannot parse the response
        return f"{endpoint()} does not respond like a Hub ({reason(error)})", "check HF_ENDPOINT"
    return None


def _explain_status(status: int, why: str, repo: str, user: str, namespaces: set[str]) -> tuple[str, str]:
    owner = repo.split("/")[0]
    if status == 401:
        return f"{endpoint()} does not accept the token", new_token_hint()
    if status == 403 and owner not in namespaces:
        fact = f"namespace {owner} belongs to another owner, and {user} may not write to {repo}"
        return fact, f"name a repository of: {', '.join(sorted(namespaces))}"
    if status == 403:
        return f"the token of {user} has no permission to write to {repo} ({why})", new_token_hint()
    if status == 404:
        return f"{repo} does not exist, or this token may not read it", "check the name and the token's scope"
    return f"{endpoint()} refuses the request ({why})", f"correct the cause, then {RESUME}"
