"""A connection to a lakeFS server through its official client, every failure of which is told in a sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from src.errors import DataError
from src.schema import DataSource
from src.utils.secrets import redact

KEYS = ("LAKEFS_ACCESS_KEY", "LAKEFS_SECRET_KEY")
TIMEOUT = (4, 30)  # seconds to connect, and between two packets


class StoredObject(NamedTuple):
    """An object as lakeFS lists it."""

    key: str
    size: int
    checksum: str

    @property
    def md5(self) -> str | None:
        """None where the checksum is none of the content: the ETag of a multipart upload ends in -<parts>."""
        return self.checksum if re.fullmatch("[0-9a-f]{32}", self.checksum) else None

    def difference(self, size: int, md5: str) -> str:
        """How a copy of this size and MD5 is another file; empty if it is the same, as far as can be known."""
        if size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        return f"MD5 {md5} instead of {self.md5}" if self.md5 and md5 != self.md5 else ""


@dataclass(frozen=True)
class Repository:
    """A repository on a server, and the official client that is connected to it."""

    endpoint: str
    name: str
    client: Any

    def __str__(self) -> str:
        return f"lakeFS at {self.endpoint}"

    def resolve(self, ref: str) -> str:
        """The id of the commit that the branch, tag, commit or start of a commit id `ref` stands for."""
        return str(self.client.sdk_client.commits_api.get_commit(self.name, ref, _request_timeout=TIMEOUT).id)

    def presigns(self) -> bool:
        """Whether objects are read from and written to the storage itself, past the server."""
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
    def translate_errors(self, ref: str, when_dead: str = "") -> Iterator[None]:
        """Turn what the server refuses, or that there is none, into a sentence about `ref`, such as `branch main`.

        None of them repeats the client's own words, in which a presigned address is a secret.
        Raises: DataError; `when_dead` is the hint where the server does not answer.
        """
        from lakefs.exceptions import ServerException, api_exception_handler
        from urllib3.exceptions import HTTPError

        try:
            with api_exception_handler():
                yield
        except ServerException as error:
            raise self._refusal(ref, error) from None
        except HTTPError as error:
            hint = when_dead or "start it, or set data_source.endpoint or LAKEFS_ENDPOINT"
            raise DataError(f"{self} cannot be reached: {failure_reason(error)}", hint=hint) from None
        except ValueError as error:  # pydantic's, json's and unicode's alike
            raise self._stranger() from error

    def _refusal(self, ref: str, error: Any) -> DataError:
        message = server_message(error, else_status=False)
        if error.status_code == 401:
            return DataError(
                f"{self} does not accept the keys in {' and '.join(KEYS)}", hint="set those of a user"
            )
        if not message and error.status_code in {403, 404, 405}:
            return self._stranger()
        if error.status_code == 404 and "repository" in message:
            return DataError(f"{self} has no repository {self.name}", hint="set data_source.repo")
        if error.status_code == 404:
            return DataError(
                f"repository {self.name} of {self} has no {ref}", hint="create it, or name another one"
            )
        told = server_message(error)
        return DataError(
            f"{self} refuses {ref} of repository {self.name}: {told}", hint="see the server's own log"
        )

    def _stranger(self) -> DataError:
        return DataError(
            f"{self.endpoint} answers, but not as a lakeFS server does",
            hint="set data_source.endpoint or LAKEFS_ENDPOINT to the address of its web page, without a path",
        )


def connect(source: DataSource) -> Repository:
    """The client for the repository that `source` names. Sends nothing yet.

    Raises: DataError if the address, the repository's name or a key is missing or cannot be one.
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
    # The client has no setting for these. Its own are three tries, and no limit of time.
    settings = client.sdk_client.objects_api.api_client.rest_client.pool_manager.connection_pool_kw
    settings["timeout"] = Timeout(connect=TIMEOUT[0], read=TIMEOUT[1])
    settings["retries"] = Retry(
        total=4, connect=1, read=2, status=2, backoff_factor=0.2, status_forcelist=(429, 502, 503, 504),
        raise_on_status=False, respect_retry_after_header=False,
    )  # fmt: skip
    return Repository(endpoint, name, client)


def server_address(source: DataSource) -> str:
    """The server's address, without the path of its API.

    Raises: DataError if there is none, it is not one, or holds credentials.
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
    """Raises: DataError if no repository is named, or none can have that name."""
    if not source.repo:
        raise DataError("data_source.type=lakefs names no repository", hint="set data_source.repo")
    if not re.fullmatch("[a-z0-9][a-z0-9-]{2,62}", source.repo):
        raise DataError(
            f"data_source.repo={source.repo} is not a name that a lakeFS repository can have",
            hint="it has 3 to 63 lower-case letters, digits and '-'",
        )
    return source.repo


def server_message(error: Any, else_status: bool = True) -> str:
    """What a server says in its refusal; if nothing, its status."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(redact(body.get("message") or (f"{error.status_code} {error.reason}" if else_status else "")))


def failure_reason(error: BaseException) -> str:
    """Why a request failed, in few words and without its address."""
    from urllib3 import exceptions as seen

    cause = getattr(error, "reason", None) or error
    if isinstance(cause, seen.NameResolutionError):
        return "its name is not known"
    if isinstance(cause, seen.TimeoutError) and not isinstance(cause, seen.NewConnectionError):
        return "no answer in time"
    if isinstance(cause, seen.SSLError):
        return f"TLS: {str(cause).rsplit('] ', 1)[-1].split(' (_ssl')[0]}"
    if isinstance(cause, seen.NewConnectionError):
        return str(cause).rsplit("] ", 1)[-1].lower()
    return "the connection broke off"
