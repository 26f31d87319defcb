"""The `lakefs` source: a branch or tag is resolved to a commit id, and that commit is read.

A commit never changes, so that a cached one needs no server.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import MAX_LISTED, DataError, RunError
from ..schema import DataSource
from ..utils.files import read_json, write_json
from ..utils.logs import log
from .download import FetchedData, fetch_once, is_hidden_name, run_parallel, safe_path
from .lakefs_client import (
    TIMEOUT,
    Repository,
    StoredObject,
    connect,
    failure_reason,
    repository_name,
    server_address,
    server_message,
)

BLOCK = 1 << 25  # bytes; the client holds a response in memory, so larger objects are read in ranges
ATTEMPTS = 3


def fetch_lakefs(source: DataSource, cache: Path) -> FetchedData:
    """The objects of one commit under `source.path`, in a folder of `cache`.

    Raises: DataError if the reference is ambiguous or unknown, the server cannot be reached, there are no objects
    or more than `max_gb`, a name is not a valid file name, or an object is corrupt after ATTEMPTS downloads.
    """
    endpoint, name = server_address(source), repository_name(source)
    kind, ref = _reference(source)
    repo_cache = cache / "lakefs" / _short_hash(endpoint) / name
    path = _short_hash(source.path) if source.path else "all"

    def fetched(commit: str) -> FetchedData:
        unverified = sum(not stored.md5 for stored in _cached_objects(repo_cache / commit / path))
        version = {"type": "lakefs", "endpoint": endpoint, "repo": name, "ref": f"{kind} {ref}", "commit": commit}
        more = {"checked_by_size_only": unverified} if unverified else {}
        return FetchedData(repo_cache / commit / path / "files", {**version, "path": source.path, **more})

    if kind == "commit" and (repo_cache / ref / path).is_dir():
        log.info("lakeFS %s: commit %s is in the cache", name, ref)
        return fetched(ref)
    repository = connect(source)
    with repository.translate_errors(f"{kind} {ref}", unreachable_hint=_cached_commits(repo_cache, path)):
        commit = repository.resolve(ref)
        if kind == "commit" and not commit.startswith(ref):
            raise DataError(
                f"{ref} is a branch or tag (commit {commit}), not a commit id",
                hint="set data_source.branch or tag",
            )
        wanted = (
            {} if (repo_cache / commit / path).is_dir() else _wanted(repository, commit, source, f"{kind} {ref}")
        )
        presigned = bool(wanted) and repository.presigns()
    log.info("lakeFS %s: %s %s is commit %s", name, kind, ref, commit)
    if wanted:
        log.info("lakeFS %s: fetching %s", name, _amount(wanted))
        reference = repository.reference(commit)
        fetch_once(repo_cache / commit / path, lambda folder: _fill(folder, reference, presigned, wanted))
    return fetched(commit)


def recorded_lakefs(source: DataSource, cache: Path, version: Mapping[str, Any]) -> Path:
    """The folder of the commit that `version` records. Raises: DataError as fetch_lakefs does."""
    return fetch_lakefs(replace(source, branch=None, tag=None, commit=version["commit"]), cache).folder


def _cached_objects(folder: Path) -> list[StoredObject]:
    """The objects of a cached commit.

    Raises: DataError if a file is missing or its size differs from the fetched object.
    """
    try:
        objects = {name: StoredObject(*o) for name, o in read_json(folder / "objects.json").items()}
        files = {name: folder / "files" / name for name in objects}
        altered = [
            name for name, file in files.items() if not file.is_file() or file.stat().st_size != objects[name].size
        ]
    except RunError:
        altered = ["objects.json"]
    if altered:
        raise DataError(f"{folder} was modified after the fetch: {altered[0]} differs", hint="delete that folder")
    return list(objects.values())


def _cached_commits(repo_cache: Path, path: str) -> str:
    """A hint that names the cached commits, for a server that cannot be reached; empty if there are none."""
    commits = sorted(repo_cache.glob(f"*/{path}"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    names = [folder.parent.name for folder in commits[:3]]
    return f"the cache holds data_source.commit={' or '.join(names)}, which needs no server" if names else ""


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _amount(objects: dict[str, StoredObject]) -> str:
    return f"{len(objects):,} objects of {sum(o.size for o in objects.values()):,} bytes"


def _reference(source: DataSource) -> tuple[str, str]:
    """The kind and name of the reference, such as `("branch", "main")`.

    Raises: DataError if several are set, or the commit is not a commit id.
    """
    kinds = {"branch": source.branch, "tag": source.tag, "commit": source.commit}
    given = [(kind, ref) for kind, ref in kinds.items() if ref]
    if len(given) > 1:
        names = ", ".join(f"{kind} {ref}" for kind, ref in given)
        raise DataError(f"data_source names more than one version: {names}", hint="keep one of them")
    if source.commit and not re.fullmatch("[0-9a-f]{6,64}", source.commit):
        raise DataError(
            f"data_source.commit={source.commit} is not a commit id",
            hint="it has 64 digits of 0-9 and a-f; the first 6 or more are enough",
        )
    return given[0] if given else ("branch", "main")


def _wanted(repository: Repository, commit: str, source: DataSource, ref: str) -> dict[str, StoredObject]:
    """`{relative name: object}` of everything under `source.path`, checked before anything is fetched."""
    prefix = f"{source.path.rstrip('/')}/" if source.path else ""
    single = None if source.path[-1:] in {"", "/"} else repository.single(commit, source.path)
    # other tools create an empty object to mark a folder
    found = [o for o in repository.objects(commit, prefix) if o.size or not o.key.endswith("/")]
    found = [o for o in found if not is_hidden_name(o.key.removeprefix(prefix))]
    if single and found:
        raise DataError(f"{source.path} of {ref} is both a file and a folder", hint="rename one of them")
    if not single and not found:
        names = [o.path for o in repository.reference(commit).objects(delimiter="/", max_amount=MAX_LISTED)]
        raise DataError(
            f"{ref} of repository {repository.name} holds nothing under {source.path or '/'}",
            hint=f"set data_source.path; the repository holds {', '.join(names)}" if names else "push data first",
        )
    wanted = {single.key.rsplit("/", 1)[-1]: single} if single else {o.key.removeprefix(prefix): o for o in found}
    problems = unusable(wanted)
    if problems:
        raise DataError(*problems, hint="nothing was fetched; rename these objects, or set data_source.path")
    if sum(o.size for o in wanted.values()) > source.max_gb * 1e9:
        raise DataError(
            f"{ref} holds {_amount(wanted)}, more than data_source.max_gb={source.max_gb:g}",
            hint="nothing was fetched; raise data_source.max_gb, or set data_source.path",
        )
    return wanted


def unusable(names: Iterable[str]) -> list[str]:
    """Why `names` cannot all be files of one folder, on a case-insensitive file system included."""
    problems, used = list[str](), dict[str, str]()
    for name in names:
        try:
            safe_path(Path("/objects"), name)
        except DataError as error:
            problems += error.problems
            continue
        same = _folded(name)
        if same in used:
            problems.append(f"{used[same]!r} and {name!r} would be one file on a case-insensitive file system")
        used[same] = name
    parents = {str(parent): name for same, name in used.items() for parent in PurePosixPath(same).parents}
    problems += [f"{used[p]!r} is a file and, for {parents[p]!r}, a folder" for p in parents.keys() & used.keys()]
    more = len(problems) - MAX_LISTED
    return [*problems[:MAX_LISTED], f"... and {more} more"] if more > 0 else problems


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", "/".join(PurePosixPath(name).parts)).casefold()


def _fill(folder: Path, reference: Any, presigned: bool, wanted: dict[str, StoredObject]) -> None:
    targets = {safe_path(folder / "files", name): stored for name, stored in wanted.items()}
    for parent in {target.parent for target in targets}:
        parent.mkdir(parents=True, exist_ok=True)
    run_parallel(lambda job: _fetch(reference, presigned, *job), targets.items())
    write_json(folder / "objects.json", {name: stored for name, stored in wanted.items()})


def _fetch(reference: Any, presigned: bool, target: Path, stored: StoredObject) -> None:
    """Read one object to `target`. Retry if it is corrupt."""
    from lakefs.exceptions import ServerException
    from urllib3.exceptions import HTTPError

    difference = ""
    for _ in range(ATTEMPTS):
        size, digest = 0, hashlib.md5(usedforsecurity=False)
        try:
            with (
                reference.object(stored.key).reader("rb", presigned, _request_timeout=TIMEOUT) as reader,
                target.open("wb") as file,
            ):
                while size < stored.size and (block := reader.read(BLOCK if stored.size > BLOCK else None)):
                    size += file.write(block)
                    digest.update(block)
        except ServerException as error:
            raise DataError(
                f"{stored.key} cannot be read: {server_message(error)}", hint="see the log of the server"
            ) from None
        except HTTPError as error:
            raise DataError(
                f"{stored.key} cannot be read: {failure_reason(error)}", hint="run the command again"
            ) from None
        difference = stored.difference(size, digest.hexdigest())
        if not difference:
            return
    raise DataError(
        f"{stored.key} is corrupt after download: {difference}", hint="nothing was stored; run the command again"
    )
