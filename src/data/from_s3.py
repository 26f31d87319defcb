"""The `s3` source: objects below a path of a bucket, at any S3-compatible endpoint.

The listing pins the version: each object is read by its listed version id and ETag. If an object is overwritten
meanwhile, either the listed version is read or the fetch stops.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..schema import DataSource
from ..utils.network import network_cause
from .download import (
    THREADS,
    FetchedData,
    cache_key,
    check_endpoint,
    check_size,
    fetch_once,
    is_hidden_name,
    relative_name,
    run_parallel,
    safe_paths,
)

CONNECT_SECONDS, READ_SECONDS = 4, 20
ATTEMPTS = 3
AWS = "https://s3.amazonaws.com"
BLOCK = 1 << 20
# error codes of a key without the permission to list versions, and of a server without versions
NO_VERSIONS = {"AccessDenied", "403", "NotImplemented", "501", "MethodNotAllowed", "405"}
CHANGED = {"PreconditionFailed", "412", "NoSuchVersion", "NoSuchKey", "404"}
DENIED = {
    "AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "TokenRefreshRequired", "AllAccessDisabled",
}  # fmt: skip


class S3Object(NamedTuple):
    """An object as listed. `name` is relative to the path."""

    key: str
    name: str
    version_id: str | None
    etag: str
    size: int


def fetch_s3(source: DataSource, cache: Path) -> FetchedData:
    """Fetch the objects below `source.path`, or the one object of that key.

    Args:
        source: reads endpoint, bucket, path and max_gb. Credentials are those that boto3 finds.
        cache: objects are stored in CACHE/s3, in one folder per listing.
    Raises: DataError if they cannot be fetched, are too large, or have names that cannot be files of one folder.
    """
    return _fetch_listing(source, cache, None)


def recorded_s3(source: DataSource, cache: Path, version: Mapping[str, Any]) -> Path:
    """The folder of the objects that `version` records: from the cache, or as the bucket still has them.

    Raises: DataError as fetch_s3 does.
    """
    objects = [_recorded(entry, source.path) for entry in version["objects"]]
    return _fetch_listing(source, cache, sorted(objects)).folder


def _fetch_listing(source: DataSource, cache: Path, objects: list[S3Object] | None) -> FetchedData:
    """Fetch the `objects`, or if they are None, those that the bucket lists."""
    if not source.bucket:
        raise DataError("data_source.bucket is not set", hint="set it to the name of the S3 bucket")
    endpoint = source.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = endpoint and check_endpoint(endpoint)
    target = None if objects is None else _target(endpoint, source, objects, cache)
    if objects is None or target is None or not target.is_dir():
        with s3_errors(source.bucket, endpoint):
            client = s3_client(endpoint)
            objects = _listed(client, source.bucket, source.path) if objects is None else objects
            _check(objects, source)
            target = _target(endpoint, source, objects, cache)
            fetch_once(target, partial(_fetch, client, source.bucket, objects))
    version = {"type": "s3", "endpoint": endpoint, "bucket": source.bucket, "path": source.path}
    facts = [{"key": o.key, "version_id": o.version_id, "etag": o.etag, "bytes": o.size} for o in objects]
    return FetchedData(target, version | {"objects": facts})


def _target(endpoint: str | None, source: DataSource, objects: Iterable[S3Object], cache: Path) -> Path:
    listing = sorted((o.key, o.version_id or o.etag, o.size) for o in objects)
    return cache / "s3" / cache_key(endpoint, source.bucket, source.path, listing)


def _recorded(entry: Mapping[str, Any], path: str) -> S3Object:
    """An object as the manifest of a run records it."""
    name = relative_name(path, entry["key"]) or entry["key"]
    return S3Object(entry["key"], name, entry["version_id"], entry["etag"], entry["bytes"])


def s3_client(endpoint: str | None) -> Any:
    """A client of AWS S3, or of the S3-compatible server `endpoint`, with the credentials of the environment."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        max_pool_connections=THREADS,
        # only AWS addresses buckets by host name
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    # a new session: the default one caches the environment of its first use
    return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)


# Listing


def _listed(client: Any, bucket: str, path: str) -> list[S3Object]:
    """The newest version of every object below `path`, by key."""
    from botocore.exceptions import ClientError

    try:
        entries = list(_entries(client, "list_object_versions", "Versions", bucket, path))
    except ClientError as error:
        if _code(error) not in NO_VERSIONS:
            raise
        entries = list(_entries(client, "list_objects_v2", "Contents", bucket, path))
    objects = [_object(entry, path) for entry in entries if entry.get("IsLatest", True)]
    return sorted(o for o in objects if o is not None)


def _entries(client: Any, operation: str, member: str, bucket: str, path: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator(operation).paginate(Bucket=bucket, Prefix=path.strip("/")):
        yield from page.get(member, [])


def _object(entry: dict[str, Any], path: str) -> S3Object | None:
    """A listed object; None if it is outside of `path`, hidden, or an empty object that marks a folder."""
    name, is_named = relative_name(path, entry["Key"]), entry["Key"] == path.strip("/")
    if name is None or (is_hidden_name(name) and not is_named):
        return None
    if not entry["Size"] and entry["Key"].endswith("/"):
        return None
    version_id = entry.get("VersionId")
    # "null" is not a fixed version but the last object written
    return S3Object(
        entry["Key"], name, None if version_id == "null" else version_id, entry["ETag"].strip('"'), entry["Size"]
    )


def _check(objects: list[S3Object], source: DataSource) -> None:
    where = f"s3://{source.bucket}/{source.path}"
    if not objects:
        raise DataError(f"{where} holds no objects", hint="set data_source.path to a folder or key of the bucket")
    check_size(where, sum(o.size for o in objects), source.max_gb)


# Fetching


def _fetch(client: Any, bucket: str, objects: list[S3Object], folder: Path) -> None:
    where = safe_paths(folder, [o.name for o in objects])
    run_parallel(lambda o: _read(client, bucket, o, where[o.name]), objects)


def _read(client: Any, bucket: str, item: S3Object, target: Path) -> None:
    """Write one object to `target`. Retry from the start if its bytes differ from the listing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    pin = {"IfMatch": f'"{item.etag}"'} | ({"VersionId": item.version_id} if item.version_id else {})
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            return _write(client.get_object(Bucket=bucket, Key=item.key, **pin), item, target)
        except _Corrupt as error:
            reason = str(error)
    raise DataError(
        f"s3://{bucket}/{item.key} differs from its listing after {ATTEMPTS} attempts ({reason})",
        hint="nothing was stored; run the command again",
    )


class _Corrupt(Exception):
    """How the received bytes differ from the listing."""


def _write(answer: dict[str, Any], item: S3Object, target: Path) -> None:
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

    digest, size = hashlib.md5(usedforsecurity=False), 0
    with target.open("wb") as file, closing(answer["Body"]) as body:
        try:
            for block in body.iter_chunks(BLOCK):
                size += len(block)
                if size > item.size:
                    raise _Corrupt("too many bytes")
                digest.update(block)
                file.write(block)
        except (FlexibleChecksumError, HTTPClientError, IncompleteReadError) as error:
            raise _Corrupt(type(error).__name__) from None
    if size != item.size:
        raise _Corrupt(f"{size:,} of {item.size:,} bytes")
    if _etag_is_md5(answer, item.etag) and digest.hexdigest() != item.etag:
        raise _Corrupt("its MD5 differs")


def _etag_is_md5(answer: dict[str, Any], etag: str) -> bool:
    """Whether the ETag is the MD5 of the content: not after multipart upload or KMS encryption."""
    foreign = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    return not foreign and re.fullmatch(r"[0-9a-f]{32}", etag) is not None


# Errors


@contextmanager
def s3_errors(
    bucket: str, endpoint: str | None, where: str = "data_source.bucket", server: str = "data_source.endpoint"
) -> Iterator[None]:
    """Turn the errors of boto3, which may contain keys and signatures, into a DataError of one sentence.

    Args:
        where, server: the settings that name the bucket and its endpoint, for the hint.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _refusal(_code(error), bucket, where, server) from None
    except BotoCoreError as error:
        raise _failure(error, bucket, endpoint, where, server) from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refusal(code: str, bucket: str, where: str, server: str) -> DataError:
    if code == "NoSuchBucket":
        return DataError(f"there is no S3 bucket {bucket}", hint=f"correct {where} or {server}")
    if code in DENIED:
        return DataError(
            f"S3 refuses access to the bucket {bucket} ({code})",
            hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may list and read it",
        )
    if code in CHANGED:
        return DataError(
            f"an object of the S3 bucket {bucket} changed while it was fetched",
            hint="nothing was stored; run the command again",
        )
    return DataError(f"S3 could not read the bucket {bucket} ({code})", hint=f"check {where}, or try again later")


def _failure(error: Exception, bucket: str, endpoint: str | None, where: str, server: str) -> DataError:
    name = type(error).__name__
    if "Credential" in name or name == "ProfileNotFound":
        return DataError(
            f"there are no credentials for the S3 bucket {bucket} ({name})",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    if name == "ParamValidationError":
        return DataError(f"{bucket!r} is not the name of an S3 bucket", hint=f"correct {where}")
    cause = network_cause(error, endpoint or AWS)
    fact = f"{endpoint or 'the AWS endpoint'} does not respond as an S3 server ({name})"
    if cause is None:
        return DataError(fact, hint=f"check {server} and the network")
    return DataError(f"{fact}: {cause.fact}", hint=f"check {server}, and {cause.remedy}")
