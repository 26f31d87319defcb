"""The stage data-push: commit the files of a folder to a lakeFS branch."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import MAX_LISTED, ConfigError, DataError
from ..schema import DataPushConfig
from ..utils.logs import log, log_verdict
from ..utils.units import count
from .download import run_parallel
from .from_lakefs import unusable
from .lakefs_client import TIMEOUT, Repository, connect, failure_reason, server_message

COMMIT_TIMEOUT = (4, 600)  # seconds; a large commit takes long


class LocalFile(NamedTuple):
    """A file to commit."""

    file: Path
    size: int
    md5: str


def push_dataset(cfg: DataPushConfig) -> int:
    """Upload the files that the branch does not have yet, and commit them. No object is deleted.

    Raises: ConfigError if a setting is missing or not supported; DataError if a file cannot be committed, the
    branch holds other uncommitted changes, or the server fails.
    """
    _check_settings(cfg)
    source, branch = cfg.data_source, cfg.data_source.branch or "main"
    prefix = f"{source.path.rstrip('/')}/" if source.path else ""
    found = _found(Path(cfg.dataset_path), cfg.dataset_pattern)
    repository = connect(source)
    local = {prefix + name: LocalFile(file, file.stat().st_size, _md5(file)) for name, file in found.items()}
    with repository.translate_errors(f"branch {branch}"):
        _refuse_foreign_changes(repository, branch, local)
        missing = _missing(repository, branch, prefix, local)
    _upload_all(repository, branch, prefix, missing)
    commit = _commit(repository, branch, str(cfg.message))
    summary = f"{count(len(missing), 'file')} uploaded, {len(local) - len(missing)} unchanged"
    if commit:
        log.info("%s: %s, committed to branch %s", repository.name, summary, branch)
        log_verdict(f"data_source.commit={commit}", document={"commit": commit, "branch": branch}, commit=commit)
    else:
        log_verdict(f"{repository.name}: {summary}, nothing to commit to branch {branch}")
    return 0


def _check_settings(cfg: DataPushConfig) -> None:
    source = cfg.data_source
    problems = []
    if source.type != "lakefs":
        problems.append(f"data_source.type={source.type}: data-push commits to lakefs only")
    for key in ("tag", "commit"):
        if getattr(source, key):
            problems.append(
                f"data_source.{key} is not supported by data-push, which commits to data_source.branch"
            )
    if not (cfg.message or "").strip():
        problems.append("message is not set: a commit needs one")
    if problems:
        raise ConfigError(*problems, hint='write make data-push MESSAGE="what is new" data_source.repo=NAME')


def _found(root: Path, pattern: str) -> dict[str, Path]:
    """`{relative name: file}` of the files to commit.

    Raises: DataError naming every link out of the folder, and every name that could not be fetched again.
    """
    if not root.exists():
        raise DataError(f"dataset_path {root} does not exist", hint="set dataset_path")
    try:
        paths = sorted(root.glob(pattern)) if root.is_dir() else [root]
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"dataset_pattern={pattern}: {error}", hint="set dataset_pattern") from None
    base = root if root.is_dir() else root.parent
    files, skipped, problems = dict[str, Path](), [], []
    for path in paths:
        name = path.relative_to(base).as_posix()
        if path != root and (not path.resolve().is_relative_to(base.resolve()) or not path.exists()):
            problems.append(f"{path} is a link out of {base}, or a broken link")
        elif any(part.startswith(".") for part in Path(name).parts) or not (path.is_file() or path.is_dir()):
            skipped += [] if path.is_dir() else [name]
        elif path.is_file():
            files[name] = path
            problems += [] if _is_unicode(name) else [f"{name!r} is not UTF-8"]
    problems += unusable(name for name in files if _is_unicode(name))
    if problems:
        raise DataError(
            *problems, hint="nothing was uploaded; rename or remove these files, or set dataset_pattern"
        )
    if skipped:
        log.info("skipped, hidden or not a regular file: %s", _list(skipped))
    if not files:
        raise DataError(
            f"no file to commit in {root} matches {pattern}", hint="set dataset_path and dataset_pattern"
        )
    return files


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as data:
        for block in iter(lambda: data.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def _list(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _refuse_foreign_changes(repository: Repository, branch: str, local: Mapping[str, LocalFile]) -> None:
    """Raises: DataError if the branch has other uncommitted changes, since a commit would include them."""
    from lakefs.branch import Branch

    changes = Branch(repository.name, branch, repository.client).uncommitted(_request_timeout=TIMEOUT)
    others = [change.path for change in changes if change.path not in local]
    if others:
        raise DataError(
            f"branch {branch} holds uncommitted changes that are not part of this push: {_list(others)}",
            hint=f"nothing was uploaded; commit them first, or discard them: {_reset(repository, branch)}",
        )


def _reset(repository: Repository, branch: str) -> str:
    return f"lakectl branch reset lakefs://{repository.name}/{branch}"


def _missing(
    repository: Repository, branch: str, prefix: str, local: Mapping[str, LocalFile]
) -> dict[str, LocalFile]:
    """The files that the branch, including its uncommitted changes, does not hold with the same content."""
    remote = {stored.key: stored for stored in repository.objects(branch, prefix)}
    same = {k for k, f in local.items() if k in remote and not remote[k].difference(f.size, f.md5)}
    return {key: file for key, file in local.items() if key not in same}


def _upload_all(repository: Repository, branch: str, prefix: str, missing: Mapping[str, LocalFile]) -> None:
    done: list[str] = []
    try:
        with repository.translate_errors(f"branch {branch}"):
            presigned = repository.presigns()
            run_parallel(lambda job: done.append(_upload(repository, branch, presigned, *job)), missing.items())
            for key in _missing(repository, branch, prefix, missing):
                raise DataError(
                    f"{key} on the branch differs from the local file: it changed or was corrupted in the upload"
                )
    except DataError as error:
        raise DataError(
            *error.problems,
            f"nothing was committed; branch {branch} has {count(len(done), 'uncommitted file')} of {len(missing)}",
            hint=f"run the command again to resume, or discard them: {_reset(repository, branch)}",
        ) from None


def _upload(repository: Repository, branch: str, presigned: bool, key: str, local: LocalFile) -> str:
    from lakefs.exceptions import ServerException, api_exception_handler
    from lakefs.object import WriteableObject
    from urllib3.exceptions import HTTPError

    target = WriteableObject(repository.name, branch, key, repository.client)
    try:
        with (
            api_exception_handler(),
            local.file.open("rb") as data,
            target.writer("wb", presigned, _request_timeout=TIMEOUT) as remote,
        ):
            shutil.copyfileobj(data, remote, 1 << 20)
    except ServerException as error:
        raise DataError(f"{key} cannot be uploaded: {server_message(error)}") from None
    except HTTPError as error:
        raise DataError(f"{key} cannot be uploaded: {failure_reason(error)}") from None
    return key


def _commit(repository: Repository, branch: str, message: str) -> str | None:
    """The id of the new commit; None if there is nothing to commit."""
    from lakefs.exceptions import BadRequestException, api_exception_handler
    from lakefs_sdk.models.commit_creation import CommitCreation
    from urllib3.exceptions import HTTPError

    with repository.translate_errors(f"a commit to branch {branch}"):
        commits = repository.client.sdk_client.commits_api
        try:
            with api_exception_handler():
                creation = CommitCreation(message=message, date=None, allow_empty=False)
                return str(commits.commit(repository.name, branch, creation, _request_timeout=COMMIT_TIMEOUT).id)
        except BadRequestException as error:
            if "no changes" not in server_message(error):
                raise
            return None
        except HTTPError as error:
            raise DataError(
                f"it is unknown whether {repository} committed: {failure_reason(error)}",
                hint="run the command again: it commits, or reports that there is nothing to commit",
            ) from None
