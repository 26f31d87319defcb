"""Publishing to the Hub: one commit, verified and tagged.

    whoami ─ find or create the repository ─┬─ the tag exists: done
                                            └─ commit what differs ─ verify ─ tag ─ (then the run's manifest)

The only state between attempts is on the Hub: each attempt reads it and does what is missing. A lost connection, a
kill between two steps and a repeated command are therefore the same case.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import NAME
from ..errors import RunError, UserError
from ..utils.logs import log
from ..utils.units import count, format_size
from .checks.files import MANIFEST
from .hub_settings import RESUME, endpoint, new_token_hint, token

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoFile

TAG = re.compile(r"(?!.*(?:\.\.|\.lock\Z|\.\Z))[A-Za-z0-9][A-Za-z0-9._+-]*")
HUB_FILES = {".gitattributes"}  # the Hub creates them
MAX_MANIFEST = 16 << 20  # bytes; a larger manifest.json is not one of ours

FIRST_WAIT_S, MAX_WAIT_S = 1.0, 300.0  # the Hub counts requests in windows of 300 s
MAX_TRIES = 6
NOTHING_SENT = "nothing was sent"
MAX_CONFLICTS = 3  # attempts during which somebody else changes the repository


class RepoChanged(Exception):
    """Somebody else changed the repository during the attempt."""


# Publishing


@dataclass
class Publication:
    """A folder that is published to the Hub.

    Args:
        repo: USER/NAME.
        private: whether a repository that does not exist is created private.
        tag: the run's id.
        files: `{path below folder: sha256}` of every file.
    """

    repo: str
    private: bool
    tag: str
    folder: Path
    files: Mapping[str, str]
    user: str = ""
    namespaces: set[str] = field(default_factory=set)  # of the token's owner: the user and organisations
    state: str = NOTHING_SENT  # what is on the Hub, for error messages
    conflicts: int = 0

    def publish(self) -> dict[str, Any]:
        """Push the folder to the Hub and verify it.

        Returns: endpoint, repo, commit, tag, url, private, files, bytes.
        Raises: RunError, which reports the current state on the Hub.
        """
        from .hub_client import connected

        with self.explained_errors(), connected(endpoint(), token()) as api:
            if not TAG.fullmatch(self.tag):
                raise RunError(f"{self.tag} is not a valid git tag", hint="rename the run's directory")
            private, commit = self._retry(api)
        if private and not self.private:
            log.warning("%s was private and stays private; change that on its settings page", self.repo)
        return {
            "endpoint": endpoint(),
            "repo": self.repo,
            "commit": commit,
            "tag": self.tag,
            "url": f"{endpoint()}/{self.repo}/tree/{self.tag}",
            "private": private,
            "files": len(self.files),
            "bytes": sum((self.folder / path).stat().st_size for path in self.files),
        }

    def _retry(self, api: HfApi) -> tuple[bool, str]:
        """Attempt until it succeeds, or until a failure that a retry does not resolve."""
        from .hub_client import TransientError, root_cause

        tries = 0
        while True:
            try:
                return self._attempt(api)
            except RepoChanged as change:
                self.conflicts += 1
                if self.conflicts == MAX_CONFLICTS:
                    raise RunError(str(change), hint="run the command again when the changes have ended") from None
                log.info("%s; trying again", change)
            except Exception as error:
                cause, tries = root_cause(error), tries + 1
                if not isinstance(cause, TransientError):
                    raise
                if cause.committing:
                    self.state = f"it is not known whether {self.repo} accepted the commit"
                wait = cause.wait if cause.wait is not None else FIRST_WAIT_S * 2 ** (tries - 1)
                never_reached = cause.unreachable and not self.user
                if tries == MAX_TRIES or wait > MAX_WAIT_S or never_reached:
                    raise
                log.info("%s; again in %.0f s (try %d of %d)", cause.reason, wait, tries + 1, MAX_TRIES)
                time.sleep(wait)

    def _attempt(self, api: HfApi) -> tuple[bool, str]:
        """Read the state of the Hub and do what is missing. Returns: is the repository private, and the commit."""
        if not self.user:
            self._identify(api)
        info = self._find_or_create(api)
        if self.state == NOTHING_SENT:
            self.state = f"{NOTHING_SENT}, and {self.repo} exists"
        if self.private and not info.private:
            raise RunError(
                f"{self.repo} is public on the Hub",
                hint="set private=false (publish-hf: --public), or name another repository",
            )
        commit = self._tagged_commit(api)
        if commit:
            log.info("tag %s of %s already contains this model", self.tag, self.repo)
        else:
            commit = self._commit(api, info.sha)
            self.state = f"commit {commit[:12]} is in {self.repo}, neither verified nor tagged"
            self._verify(api, commit)
            self.state = f"commit {commit[:12]} is in {self.repo}, verified but not tagged"
            self._create_tag(api, commit)
        self.state = f"commit {commit[:12]} and tag {self.tag} are in {self.repo}"
        return bool(info.private), commit

    def _identify(self, api: HfApi) -> None:
        """Read the owner of the token and its namespaces.

        Raises: RunError if the token may only read.
        """
        who = api.whoami()
        if "name" not in who:
            raise RunError(f"{endpoint()} does not respond like a Hub", hint="check HF_ENDPOINT")
        user = str(who["name"])
        self.namespaces = {user, *(str(org["name"]) for org in who.get("orgs", []))}
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise RunError(f"the token of {user} may only read", hint=new_token_hint())
        self.user = user

    # State of the Hub

    def _find_or_create(self, api: HfApi) -> ModelInfo:
        """The repository, which is created if it does not exist.

        It is looked up first: if it exists and is not writable, create_repo fails to build its address at any
        endpoint but huggingface.co, and hides the reason.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return api.model_info(self.repo)
        except RepositoryNotFoundError:
            api.create_repo(self.repo, private=self.private, exist_ok=True)
            return api.model_info(self.repo)

    def _tree(self, api: HfApi, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        entries = api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _differing(self, remote: Mapping[str, RepoFile]) -> list[str]:
        """Our files that a tree of the repository lacks, or has with other content."""
        return [path for path in self.files if path not in remote or not self._is_equal(path, remote[path])]

    def _is_equal(self, path: str, entry: RepoFile) -> bool:
        """Compare by SHA-256 for LFS files, else by git's blob id: the SHA-1 of `blob SIZE\\0` and the bytes."""
        file = self.folder / path
        if entry.size != file.stat().st_size:
            return False
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == self.files[path])
        content = file.read_bytes()
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())

    def _tagged_commit(self, api: HfApi) -> str | None:
        """The commit of the run's tag, or None if there is no tag.

        Raises: RunError if the tagged commit has another model.
        """
        found = {str(tag.name): str(tag.target_commit) for tag in api.list_repo_refs(self.repo).tags}
        commit = found.get(self.tag)
        if commit is None:
            return None
        if differing := self._differing(self._tree(api, commit)):
            some = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
            raise RunError(
                f"tag {self.tag} of {self.repo} is commit {commit[:12]}, which has another model ({some})",
                hint=f"delete the tag with hf repos tag delete {self.repo} {self.tag}, or name another repository",
            )
        return commit

    # Changes of the Hub

    def _commit(self, api: HfApi, head: str | None) -> str:
        """Commit what differs from `head`, on top of it. Returns: the commit, `head` itself if nothing differs.

        Raises: RepoChanged if `head` is no longer the newest commit.
        """
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        remote = self._tree(api, head) if head else {}
        obsolete = self._obsolete(api, head, remote) if head else set()
        differing = self._differing(remote)
        if head and not differing and not obsolete:
            log.info("commit %s of %s already contains this model", head[:12], self.repo)
            return head
        self.state = f"{self.repo} exists; nothing was committed"
        size = sum((self.folder / path).stat().st_size for path in differing)
        log.info("sending %s, %s, to %s", count(len(differing), "file"), format_size(size), self.repo)
        operations = [self._addition(path) for path in differing]
        try:
            return api.create_commit(
                self.repo,
                operations=[
                    *operations,
                    *(CommitOperationDelete(path, is_folder=False) for path in sorted(obsolete)),
                ],
                commit_message=f"{NAME} run {self.tag}",
                parent_commit=head,
            ).oid
        except HfHubHTTPError as error:
            if error.response.status_code in {409, 412}:
                raise RepoChanged(f"somebody else changed {self.repo} at the same time") from None
            raise

    def _addition(self, path: str) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(path, self.folder / path)
        addition.upload_info.sha256 = bytes.fromhex(self.files[path])  # saves reading the file again
        return addition

    def _obsolete(self, api: HfApi, head: str, remote: Mapping[str, RepoFile]) -> set[str]:
        """Files of an earlier publication that this one does not have. Files of other origin are kept."""
        others = remote.keys() - self.files.keys() - HUB_FILES
        if not others:
            return set()
        obsolete = others & self._published_files(api, head, remote.get(MANIFEST))
        if kept := sorted(others - obsolete):
            log.warning("%s keeps files that Assay did not publish: %s", self.repo, ", ".join(kept))
        return obsolete

    def _published_files(self, api: HfApi, head: str, manifest: RepoFile | None) -> set[str]:
        """The files that the manifest at `head` lists; empty if it is not one of ours."""
        if manifest is None or manifest.size > MAX_MANIFEST:
            return set()
        with tempfile.TemporaryDirectory() as folder:
            file = api.hf_hub_download(self.repo, MANIFEST, revision=head, local_dir=folder)
            try:
                listed = json.loads(Path(file).read_bytes())["sha256"]
            except (ValueError, KeyError, TypeError):
                return set()
        return set(listed) if isinstance(listed, dict) else set()

    def _verify(self, api: HfApi, commit: str) -> None:
        """Raises: RunError unless the commit has every file with its local hash."""
        if differing := self._differing(self._tree(api, commit)):
            raise RunError(
                f"commit {commit[:12]} has other content than was sent: {', '.join(differing)}",
                hint="run the same command to send it again",
            )

    def _create_tag(self, api: HfApi, commit: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            api.create_tag(self.repo, tag=self.tag, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        if self._tagged_commit(api) != commit:
            raise RepoChanged(f"somebody else set tag {self.tag} of {self.repo} at the same time")

    # Errors

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Turn known errors of the block into a RunError that reports the current state on the Hub."""
        try:
            yield
        except UserError as error:
            facts = [f"{problem}; {self.state}" for problem in error.problems]
            raise RunError(*facts, hint=error.hint or RESUME) from error
        except Exception as error:
            from .hub_client import explain

            explained = explain(error, self.repo, self.user, self.namespaces)
            if explained is None:
                raise
            raise RunError(f"{explained[0]}; {self.state}", hint=explained[1]) from error
