"""The `hub` source: the data files of a dataset on the Hugging Face Hub at one commit, or a local copy of it.

A branch is first resolved to its commit, and only that commit is read. Every file is checked against the hash in
the commit.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import DataError
from ..schema import DataSource
from ..utils.files import sha256
from ..utils.network import CHECK_NETWORK, network_cause
from .download import (
    FetchedData,
    cache_key,
    check_endpoint,
    check_size,
    fetch_once,
    is_hidden_name,
    relative_name,
    run_parallel,
    safe_path,
    safe_paths,
)
from .readers import READERS
from .readers.stream import ARCHIVES

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

PUBLIC = "https://huggingface.co"
DATA_FILE = re.compile(
    rf"({'|'.join(map(re.escape, READERS))})({'|'.join(map(re.escape, ARCHIVES))})?\Z", re.IGNORECASE
)
COMMIT = re.compile(r"[0-9a-f]{40}")
CARD = "README.md"  # says which files belong to which split
ANSWER_SECONDS = 10
BLOCK = 1 << 20


def fetch_hub(source: DataSource, cache: Path) -> FetchedData:
    """Fetch the data files of `source.repo` below `source.path`, or use a local folder of that name in place.

    Args:
        source: reads endpoint, repo, revision, path and max_gb. HF_TOKEN gives access to private datasets.
        cache: files are stored in CACHE/hub, in one folder per commit.
    Raises: DataError if they cannot be fetched, are too large, or differ from the commit.
    """
    if not source.repo:
        raise DataError(
            "data_source.repo is not set", hint="set it to a dataset id such as user/name, or a folder"
        )
    if os.path.isdir(Path(source.repo).expanduser()):
        return _local(source, Path(source.repo).expanduser())
    endpoint = check_endpoint(source.endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC)
    commit = source.revision if source.revision and COMMIT.fullmatch(source.revision) else None
    if commit is None or not _target(source, endpoint, commit, cache).is_dir():
        commit = _download(source, endpoint, cache)
    version = {"type": "hub", "repo": source.repo, "revision": source.revision, "commit": commit}
    return FetchedData(_target(source, endpoint, commit, cache), version | {"path": source.path})


def recorded_hub(source: DataSource, cache: Path, version: Mapping[str, Any]) -> Path:
    """The folder of the commit that `version` records. Raises: DataError as fetch_hub does."""
    return fetch_hub(replace(source, revision=version["commit"]), cache).folder


def _is_data(name: str) -> bool:
    """Whether `name`, relative to `path`, is a data file. Hidden files are metadata of git and of the library."""
    return DATA_FILE.search(name) is not None and not is_hidden_name(name)


def _nothing(source: DataSource) -> DataError:
    return DataError(
        f"{source.repo} holds no data files below {source.path or 'its root'}",
        hint=f"correct data_source.path; data files end in {', '.join((*READERS, *ARCHIVES))}",
    )


# Local folder


def _local(source: DataSource, repo: Path) -> FetchedData:
    """A local folder in place, identified by a hash of its data files."""
    if source.revision:
        raise DataError(
            f"data_source.revision is not supported for {source.repo}, which is a local folder",
            hint="leave it out, or name a dataset on the Hub",
        )
    folder = safe_path(repo, source.path) if source.path.strip("/") else repo
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if _is_data(name)]
    if not names:
        raise _nothing(source)
    content = hashlib.sha256()
    for name in names:
        content.update(f"{sha256(folder / name)}  {name}\n".encode(errors="surrogateescape"))
    version = {"type": "hub", "repo": source.repo, "revision": None, "commit": None, "path": source.path}
    return FetchedData(folder, version | {"sha256": content.hexdigest()})


# Download


def _target(source: DataSource, endpoint: str, commit: str, cache: Path) -> Path:
    return cache / "hub" / cache_key(endpoint, source.repo, commit, source.path)


def _download(source: DataSource, endpoint: str, cache: Path) -> str:
    """Fetch the files of the revision into their folder. Returns: its commit."""
    with _errors(source, endpoint):
        api = _api(endpoint)
        commit = api.dataset_info(str(source.repo), revision=source.revision, timeout=ANSWER_SECONDS).sha
        if not commit or not COMMIT.fullmatch(commit):
            raise DataError(f"{endpoint} returned no commit of {source.repo}", hint="check data_source.endpoint")
        fetch_once(_target(source, endpoint, commit, cache), lambda folder: _fetch(api, source, commit, folder))
    return commit


def _api(endpoint: str) -> HfApi:
    if endpoint != PUBLIC:
        # read on import of the library, whose Xet protocol has no fallback for endpoints without it
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import HfApi

    # False: do not use a token that `hf auth login` stored
    return HfApi(endpoint=endpoint, token=os.environ.get("HF_TOKEN") or False)


def _fetch(api: HfApi, source: DataSource, commit: str, folder: Path) -> None:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(str(source.repo), recursive=True, revision=commit, repo_type="dataset")
    found = [(relative_name(source.path, entry.path), entry) for entry in tree if isinstance(entry, RepoFile)]
    named = {name: entry for name, entry in found if name is not None and (_is_data(name) or name == CARD)}
    if not any(map(_is_data, named)):
        raise _nothing(source)
    check_size(str(source.repo), sum(entry.size for entry in named.values()), source.max_gb)
    where = safe_paths(folder, named)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as staging:

        def read(name: str) -> None:
            _read(api, source, commit, named[name], Path(staging), where[name])

        run_parallel(read, named)


def _read(api: HfApi, source: DataSource, commit: str, entry: RepoFile, staging: Path, target: Path) -> None:
    """Write one file to `target`, by way of `staging`, where the library stores its metadata."""
    got = api.hf_hub_download(
        str(source.repo),
        entry.path,
        repo_type="dataset",
        revision=commit,
        local_dir=staging,
        tqdm_class=cast(Any, partial(_Meter, entry)),
    )
    if not _matches(Path(got), entry):
        raise _not_listed(entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(got).rename(target)


class _Meter:
    """Passed to the library as a progress bar; stops a file that exceeds its listed size."""

    def __init__(self, entry: RepoFile, **_: object) -> None:
        self.entry, self.received = entry, 0

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, size: int) -> None:
        self.received += size
        if self.received > self.entry.size:
            raise _not_listed(self.entry)


def _matches(file: Path, entry: RepoFile) -> bool:
    """Whether a file has the hash of its git blob, or the SHA-256 of its LFS object."""
    if entry.lfs is not None:
        return sha256(file) == entry.lfs.sha256
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as opened:
        for block in iter(lambda: opened.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest() == entry.blob_id


def _not_listed(entry: RepoFile) -> DataError:
    return DataError(
        f"{entry.path} differs from its commit on the Hub",
        hint="nothing was stored; run the command again, and check data_source.endpoint if that does not help",
    )


# Errors


@contextmanager
def _errors(source: DataSource, endpoint: str) -> Iterator[None]:
    """Turn the errors of the library, which span several lines, into a DataError of one sentence."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(error, source, endpoint) from None
    except HFValidationError:
        raise DataError(
            f"{source.repo} is neither a local folder nor a dataset id such as user/name",
            hint="correct data_source.repo",
        ) from None
    except OfflineModeIsEnabled:
        raise DataError(
            f"the dataset {source.repo} is not in the cache, and HF_HUB_OFFLINE prevents fetching it",
            hint="unset HF_HUB_OFFLINE, or set data_source.revision to a commit that was fetched before",
        ) from None
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, ImportError) as error:
        cause = network_cause(error, endpoint)
        said = f": {cause.fact}" if cause else ""
        remedy = cause.remedy if cause else CHECK_NETWORK
        remedy += " and data_source.endpoint" if remedy == CHECK_NETWORK else ""
        raise DataError(
            f"{endpoint} does not respond as a Hub ({type(error.__cause__ or error).__name__}){said}",
            hint=f"{remedy}, or name a local folder in data_source.repo",
        ) from None


def _refusal(error: HfHubHTTPError, source: DataSource, endpoint: str) -> DataError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    token = "HF_TOKEN gives no access to it" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return DataError(
            f"the dataset {source.repo} is gated, and {token}",
            hint="accept its terms on its page, and set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return DataError(
            f"the dataset {source.repo} has no revision {source.revision}", hint="correct data_source.revision"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DataError(
            f"there is no dataset {source.repo} at {endpoint}, or it is private and {token}",
            hint="correct data_source.repo, or set HF_TOKEN to a token that may read it",
        )
    if status in {401, 403}:
        return DataError(
            f"{endpoint} refuses access to the dataset {source.repo}, and {token}",
            hint="set HF_TOKEN to a token that may read it",
        )
    return DataError(
        f"{endpoint} answered with HTTP status {status} for the dataset {source.repo}", hint="try again later"
    )
