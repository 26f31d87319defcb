"""What every remote source needs: names that stay inside their folder, and folders that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from src.errors import DataError
from src.utils.files import atomic_dir

THREADS = 8
LONGEST_NAME = 255  # bytes, on every file system in use
Job = TypeVar("Job")


class FetchedData(NamedTuple):
    """A local folder, and the version that it was fetched at: what the manifest records."""

    folder: Path
    version: dict[str, Any]


def safe_path(folder: Path, name: str) -> Path:
    """Where the object `name`, such as `train/a.jsonl`, lies in `folder`.

    Raises: DataError if the name is absolute, climbs out of the folder, or is none that a file can have.
    """
    parts = PurePosixPath(name).parts
    odd = not parts or ".." in parts or "\\" in name or "\0" in name or name.startswith("/") or ":" in parts[0]
    target = folder.joinpath(*parts) if not odd else folder
    if odd or not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"the source holds an object named {name!r}, which would be written outside its folder",
            hint="nothing was fetched; rename or delete that object, or read another path",
        )
    return target


def safe_paths(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """`{name: where it lies in folder}` for all objects of one source.

    Raises: DataError as `inside` does, and if no file can have a name or two objects need the same place.
    """
    found = {name: safe_path(folder, name) for name in names}
    held: dict[Path, str] = {}
    for name, target in found.items():
        if not all(_fits(part) for part in target.relative_to(folder).parts):
            raise DataError(
                f"the source holds an object named {name[:80]!r}..., which no file can be called",
                hint="rename that object, or read another path",
            )
        if target in held:
            raise _clash(name, held[target])
        held[target] = name
    for target, name in held.items():
        folders = [parent for parent in target.parents if parent in held]
        if folders:
            raise _clash(name, held[folders[0]])
    return found


def _fits(part: str) -> bool:
    try:
        return len(os.fsencode(part)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _clash(a: str, b: str) -> DataError:
    return DataError(
        f"the source holds {a!r} and {b!r}, which cannot both be files in one folder",
        hint="rename one of them, or read another path",
    )


def relative_name(path: str, name: str) -> str | None:
    """What `name` is called seen from `path`, a folder or the object itself; None if it lies elsewhere.

    >>> relative_name("train", "train/a.jsonl"), relative_name("train/a.jsonl", "train/a.jsonl")
    ('a.jsonl', 'a.jsonl')
    >>> relative_name("train", "training/a") is None
    True
    """
    path = path.strip("/")
    if path and name == path:
        return name.rpartition("/")[2]
    return name.removeprefix(path + "/" if path else "") if not path or name.startswith(path + "/") else None


def cache_key(*parts: object) -> str:
    """A name for what `parts`, which are plain data, describe: equal for equal parts, and safe in a path."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_size(what: str, size: int, max_gb: float) -> None:
    """Raises: DataError if `size` bytes are more than the source may send."""
    if size > max_gb * 1e9:
        raise DataError(
            f"{what} is larger than data_source.max_gb={max_gb:g}: {size / 1e9:.3g} GB",
            hint="nothing was kept; raise max_gb, or read less",
        )


def check_endpoint(address: str, setting: str = "data_source.endpoint") -> str:
    """`address` of a server, which `setting` names, without a trailing slash.

    Raises: DataError if it is no http(s) address, or holds a user name or password, which would be written down.
    """
    try:
        parts = urlsplit(address)
        odd = parts.scheme not in {"http", "https"} or not parts.hostname or (parts.port or 1) < 1
    except ValueError:
        raise DataError(f"{setting} is not an http(s) address", hint="correct it") from None
    if "@" in parts.netloc or parts.query:
        raise DataError(
            f"{setting} holds a user name, a password or a query",
            hint="take them out: credentials come from environment variables only",
        )
    if odd:
        raise DataError(f"{setting} {address!r} is not an http(s) address", hint="correct it")
    return address.rstrip("/")


def fetch_once(target: Path, fill: Callable[[Path], object]) -> Path:
    """`target`, filled by `fill(temporary folder)` unless it is there already. A torn fetch leaves nothing.

    Raises: what `fill` raises.
    """
    if not target.is_dir():
        with atomic_dir(target) as temporary:
            fill(temporary)
    return target


def run_parallel(work: Callable[[Job], object], jobs: Iterable[Job]) -> None:
    """Do `work` for all `jobs`, several at a time; the first error is raised, and the rest are not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
