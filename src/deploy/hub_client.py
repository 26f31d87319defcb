"""The Hub's own client under one policy: every request has a time limit, and what may pass by waiting is said so.

huggingface_hub waits without limit for an answer, retries some requests and not others, and sleeps as long as a
server asks. Here nothing is retried below `Passing`: whoever publishes looks at what is there and goes on.
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

from src.deploy.hub_settings import GO_ON, endpoint, new_token

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 120.0  # the second: a commit of many files is not answered at once
PASSING = {408, 425, 429, 500, 502, 503, 504}
LONGEST_REASON = 200
YES = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its variables


class Passing(Exception):
    """A trouble that may pass: the line was cut, or the server is busy.

    Args:
        wait: seconds that the server asks for, if it does.
        unreached: no connection could be made at all.
        committing: it was a commit that was sent; whether the server took it is not known.
    """

    def __init__(
        self, reason: str, wait: float | None = None, unreached: bool = False, committing: bool = False
    ) -> None:
        self.reason, self.wait, self.unreached, self.committing = reason, wait, unreached, committing
        super().__init__(reason)


class Client(httpx2.Client):
    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Raises: Passing where the library would retry in its own ways, or not at all."""
        host = request.url.netloc.decode("ascii", "replace")
        sent = "/commit/" in request.url.path
        try:
            response = super().send(request, **options)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise Passing(f"{host} cannot be reached ({_short(error)})", unreached=True) from error
        except httpx2.TimeoutException as error:
            raise Passing(f"{host} did not answer in time", committing=sent) from error
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            raise Passing(f"the connection to {host} broke off", committing=sent) from error
        if response.status_code in PASSING:
            raise Passing(f"{host} answers {response.status_code}", _asked_for(response), committing=sent)
        return response


def _asked_for(response: httpx2.Response) -> float | None:
    """Seconds after which the server wants to be asked again."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = response.headers.get("Retry-After", "").strip()
    return float(after) if after.isdigit() else None


@contextmanager
def connected(endpoint: str, token: str) -> Iterator[HfApi]:
    """The library's API at `endpoint`, its requests under the policy of this file until the end of the block."""
    host = urlsplit(endpoint).hostname or ""
    before = constants.HF_HUB_DISABLE_XET
    # Xet has no fallback where an endpoint lacks it. The variable is read at import, which may be long over.
    said = os.environ.get("HF_HUB_DISABLE_XET")
    elsewhere = not f".{host}".endswith(".huggingface.co")
    constants.HF_HUB_DISABLE_XET = elsewhere if said is None else said.upper() in YES
    if not os.isatty(2):
        disable_progress_bars()
    limits = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    hooks = {"request": [hf_request_event_hook]}
    huggingface_hub.set_client_factory(lambda: Client(event_hooks=hooks, follow_redirects=True, timeout=limits))
    try:
        yield HfApi(endpoint=endpoint, token=token, library_name="assay")
    finally:
        huggingface_hub.set_client_factory(default_client_factory)
        constants.HF_HUB_DISABLE_XET = before


def cause(error: BaseException) -> BaseException:
    """What stands behind the errors that the library wraps around those of its threads."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, Passing | HfHubHTTPError | OfflineModeIsEnabled):
            return seen
        seen = seen.__cause__
    return error


def reason(error: BaseException) -> str:
    """The server's own words on why it refuses, in one line."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "").split())
        return f"{status}, {said[:LONGEST_REASON]}" if said else str(status)
    return _short(error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def said(error: Exception, repo: str, user: str, own: set[str]) -> tuple[str, str] | None:
    """Fact and remedy of an error that can be foreseen, of what `user` did with `repo`.

    Args:
        own: the namespaces of the user.
    """
    known = cause(error)
    if isinstance(known, Passing):
        asked = f" and asks to wait {known.wait:.0f} s" if known.wait is not None else ""
        return known.reason + asked, GO_ON
    if isinstance(known, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "unset it to publish"
    if isinstance(known, HfHubHTTPError):
        return _refusal(known.response.status_code, reason(known), repo, user, own)
    if isinstance(error, ValueError):  # of the library's checks of what the server says
        return f"{endpoint()} does not answer as a Hub does ({reason(error)})", "check HF_ENDPOINT"
    return None


def _refusal(status: int, why: str, repo: str, user: str, own: set[str]) -> tuple[str, str]:
    namespace = repo.split("/")[0]
    if status == 401:
        return f"{endpoint()} does not accept the token", new_token()
    if status == 403 and namespace not in own:
        fact = f"{namespace} belongs to another owner, and {user} may not write to {repo}"
        return fact, f"name a repository of: {', '.join(sorted(own))}"
    if status == 403:
        return f"the token of {user} has no permission to write to {repo} ({why})", new_token()
    if status == 404:
        return f"{repo} is not there, or not for this token to see", "check the name and the token's scope"
    return f"{endpoint()} refuses it ({why})", f"once that is put right, {GO_ON}"
