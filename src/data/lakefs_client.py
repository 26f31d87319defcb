"""The connection to a lakeFS server by its official client, with errors as DataError of one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..errors import DataError
from ..schema import DataSource
from ..utils.secrets import redact

KEYS = ("LAKEFS_ACCESS_KEY", "LAKEFS_SECRET_KEY")
TIMEOUT = (4, 30)  # seconds to connect, and between two packets


class StoredObject(NamedTuple):
    """An object as lakeFS lists it."""

    key: str
    size: int
    checksum: str

    @property
    def md5(self) -> str | None:
        """The MD5 of the content; None after a multipart upload, whose ETag ends in -<parts>."""
        return self.checksum if re.fullmatch("[0-9a-f]{32}", self.checksum) else None

    def difference(self, size: int, md5: str) -> str:
        """How a copy with this size and MD5 differs; empty if no difference is known."""
        if size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        return f"MD5 {md5} instead of {self.md5}" if self.md5 and md5 != self.md5 else ""


@dataclass(frozen=True)
class Repository:
    """A repository on a server, with the client that is connected to it."""

    endpoint: str
    name: str
    client: Any

    def __str__(self) -> str:
        return f"lakeFS at {self.endpoint}"

    def resolve(self, ref: str) -> str:
        """The commit id of `ref`, which is a branch, a tag or the beginning of a commit id."""
        return str(self.client.sdk_client.commits_api.get_commit(self.name, ref, _request_timeout=TIMEOUT).id)

    def presigns(self) -> bool:
        """Whether objects are read and written by presigned URLs of the storage, without the server."""
        config = self.client.sdk_client.config_api.get_config(_request_timeout=TIMEOUT)
        storages = [s for s in [config.storage_config, *(config.storage_config_list or [])] if s]
        return bool(storages) and all(s.pre_sign_support for s in storages)

    def reference(self, ref: str) -> Any:
        from lakefs.reference import Reference

        return Reference(self.name, ref, self.client)

    def objects(self, ref: str, prefix: str) -> list[StoredObject]:
        """All objects whose key begins with `prefix`, page by page."""
        listed = self.reference(ref).objects(prefix=prefix or None, _request_timeout=TIMEOUT)
        return [StoredObject(o.path, o.size_bytes or 0, o.checksum) for o in listed]

    def single(self, ref: str, key: str) -> StoredObject | None:
        """The object `key`, if there is one."""
        from lakefs.exceptions import ObjectNotFoundException

        try:
            found = self.reference(ref).object(key).stat(_request_timeout=TIMEOUT)
        except ObjectNotFoundException:
            return None
        return StoredObject(found.path, found.size_bytes or 0, found.checksum)

    @contextmanager
    def translate_errors(self, ref: str, unreachable_hint: str = "") -> Iterator[None]:
        """Turn errors of the client into a DataError about `ref`, such as `branch main`.

        The messages do not quote the client, whose errors may contain presigned URLs, which are secret.

        Args:
            unreachable_hint: the hint if the server cannot be reached.
        """
        from lakefs.exceptions import ServerException, api_exception_handler
        from urllib3.exceptions import HTTPError

        try:
            with api_exception_handler():
                yield
        except ServerException as error:
            raise self._refusal(ref, error) from None
        except HTTPError as error:
            hint = unreachable_hint or "start it, or set data_source.endpoint or LAKEFS_ENDPOINT"
            raise DataError(f"{self} cannot be reached: {failure_reason(error)}", hint=hint) from None
        except ValueError as error:  # of pydantic, json and unicode
            raise self._not_lakefs() from error

    def _refusal(self, ref: str, error: Any) -> DataError:
        message = server_message(error, else_status=False)
        if error.status_code == 401:
            return DataError(
                f"{self} does not accept the keys in {' and '.join(KEYS)}", hint="set those of a user"
            )
        if not message and error.status_code in {403, 404, 405}:
            return self._not_lakefs()
        if error.status_code == 404 and "repository" in message:
            return DataError(f"{self} has no repository {self.name}", hint="set data_source.repo")
        if error.status_code == 404:
            return DataError(
                f"repository {self.name} of {self} has no {ref}", hint="create it, or name another one"
            )
        message = server_message(error)
        return DataError(
            f"{self} refuses {ref} of repository {self.name}: {message}", hint="see the log of the server"
        )

    def _not_lakefs(self) -> DataError:
        return DataError(
            f"{self.endpoint} responds, but is not a lakeFS server",
            hint="set data_source.endpoint or LAKEFS_ENDPOINT to the address of its web page, without a path",
        )


def connect(source: DataSource) -> Repository:
    """A client for the repository that `source` names. Sends no request.

    Raises: DataError if the address, the repository's name or a key is missing or invalid.
    """
    endpoint, name = server_address(source), repository_name(source)
    access, secret = (os.environ.get(key, "") for key in KEYS)
    missing = [key for key in KEYS if not os.environ.get(key)]
    if missing:
        raise DataError(
            f"{' and '.join(missing)} not set in the environment", hint="set them, or write them to .env"
        )
    from lakefs.client import Client
    from urllib3 import Retry, Timeout

    client = Client(host=f"{endpoint}/api/v1", username=access, password=secret)
    # The client has no settings for these. Its defaults are three attempts and no timeout.
    settings = client.sdk_client.objects_api.api_client.rest_client.pool_manager.connection_pool_kw
    settings["timeout"] = Timeout(connect=TIMEOUT[0], read=TIMEOUT[1])
    settings["retries"] = Retry(
        total=4, connect=1, read=2, status=2, backoff_factor=0.2, status_forcelist=(429, 502, 503, 504),
        raise_on_status=False, respect_retry_after_header=False,
    )  # fmt: skip
    return Repository(endpoint, name, client)


def server_address(source: DataSource) -> str:
    """The address of the server, without the path of its API.

    Raises: DataError if it is not set, not an address, or holds credentials.
    """
    given = source.endpoint or os.environ.get("LAKEFS_ENDPOINT", "")
    hint = "set data_source.endpoint or LAKEFS_ENDPOINT, such as http://localhost:8000"
    if not given:
        raise DataError("data_source.type=lakefs names no server", hint=hint)
    if "@" in given:
        raise DataError(
            "the address of the lakeFS server holds credentials", hint=f"set {' and '.join(KEYS)} instead"
        )
    try:
        parts = urlsplit(given)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise DataError(f"{given} is not the address of a lakeFS server", hint=hint)
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/').removesuffix('/api/v1')}"


def repository_name(source: DataSource) -> str:
    """The name of the repository. Raises: DataError if it is not set or not a valid name."""
    if not source.repo:
        raise DataError("data_source.type=lakefs names no repository", hint="set data_source.repo")
    if not re.fullmatch("[a-z0-9][a-z0-9-]{2,62}", source.repo):
        raise DataError(
            f"data_source.repo={source.repo} is not a valid name of a lakeFS repository",
            hint="it has 3 to 63 lower-case letters, digits and '-'",
        )
    return source.repo


def server_message(error: Any, else_status: bool = True) -> str:
    """The message in an error response, else its status; with `else_status=False`, else empty."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(redact(body.get("message") or (f"{error.status_code} {error.reason}" if else_status else "")))


def failure_reason(error: BaseException) -> str:
    """A short reason why a request failed, without its address."""
    from urllib3 import exceptions as seen

    cause = getattr(error, "reason", None) or error
    if isinstance(cause, seen.NameResolutionError):
        return "its name is not known"
    if isinstance(cause, seen.TimeoutError) and not isinstance(cause, seen.NewConnectionError):
        return "no response within the timeout"
    if isinstance(cause, seen.SSLError):
        return f"TLS: {str(cause).rsplit('] ', 1)[-1].split(' (_ssl')[0]}"
    if isinstance(cause, seen.NewConnectionError):
        return str(cause).rsplit("] ", 1)[-1].lower()
    return "the connection was interrupted"
