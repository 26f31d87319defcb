"""The Hub as a target: one commit, one tag, read back.

    whoami ─ look ─ create ─┬─ the tag is there ──┬─ read back ─ tag ─ (then the run's manifest)
                            └─ commit what differs ┘

Nothing is remembered between attempts but what is on the Hub: each one looks, and does what is missing. So a
dropped connection, a kill between any two steps and a repeated command are all the same case.
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

from src import NAME
from src.deploy.hub_settings import GO_ON, endpoint, new_token, token
from src.deploy.package import MANIFEST
from src.errors import RunError, UserError
from src.schema import PublishConfig
from src.utils.logs import log

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoFile

TAG = re.compile(r"(?!.*(?:\.\.|\.lock\Z|\.\Z))[A-Za-z0-9][A-Za-z0-9._+-]*")
NOT_OURS = {".gitattributes"}  # the Hub's own
LARGEST_MANIFEST = 16 << 20  # bytes; a larger file of this name is none that was written here

FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds; the Hub counts its requests in windows of 300 s
MOST_TRIES = 6
NOTHING = "nothing was sent"
MOST_LOOKS = 3  # at a repository that others change meanwhile


class Moved(Exception):
    """Somebody else has changed the repository since it was looked at."""


# Publishing


@dataclass
class Publication:
    """A folder on its way to the Hub.

    Args:
        tag: the run's id.
        files: `{path below folder: sha256}` of every file.
    """

    cfg: PublishConfig
    tag: str
    folder: Path
    files: Mapping[str, str]
    user: str = ""
    own: set[str] = field(default_factory=set)  # namespaces of the token's owner
    reached: str = NOTHING
    looks: int = 0

    @property
    def repo(self) -> str:
        return str(self.cfg.repo_id)

    def publish(self) -> dict[str, Any]:
        """Bring the folder to the Hub and read it back.

        Returns: endpoint, repo, commit, tag, url, private, files, bytes.
        Raises: RunError, with what is on the Hub by then.
        """
        from src.deploy.hub_client import connected

        with self.telling(), connected(endpoint(), token()) as api:
            if not TAG.fullmatch(self.tag):
                raise RunError(f"{self.tag} cannot be a tag of git", hint="rename the run's directory")
            private, commit = self._patiently(api)
        if private and not self.cfg.private:
            log.warning("%s was private before and stays so; its settings page makes it public", self.repo)
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

    def _patiently(self, api: HfApi) -> tuple[bool, str]:
        """Attempt until it is done, or until the trouble is none that passes by waiting."""
        from src.deploy.hub_client import Passing, cause

        tries = 0
        while True:
            try:
                return self._attempt(api)
            except Moved as moved:
                self.looks += 1
                if self.looks == MOST_LOOKS:
                    raise RunError(str(moved), hint="run the command again when they are done") from None
                log.info("%s; looking again", moved)
            except Exception as error:
                trouble, tries = cause(error), tries + 1
                if not isinstance(trouble, Passing):
                    raise
                if trouble.committing:
                    self.reached = f"whether {self.repo} took the commit is not known"
                wait = trouble.wait if trouble.wait is not None else FIRST_WAIT * 2 ** (tries - 1)
                never = trouble.unreached and not self.user
                if tries == MOST_TRIES or wait > LONGEST_WAIT or never:
                    raise
                log.info("%s; again in %.0f s (try %d of %d)", trouble.reason, wait, tries + 1, MOST_TRIES)
                time.sleep(wait)

    def _attempt(self, api: HfApi) -> tuple[bool, str]:
        """Look at what is there and do what is missing. Returns: whether it is private, and the commit."""
        if not self.user:
            self._introduce(api)
        info = self._repository(api)
        if self.reached == NOTHING:
            self.reached = f"{NOTHING}, and {self.repo} is there"
        if self.cfg.private and not info.private:
            raise RunError(
                f"{self.repo} is public on the Hub",
                hint="pass --public to publish there, or name another repository",
            )
        commit = self._tagged(api)
        if commit:
            log.info("tag %s of %s holds it already", self.tag, self.repo)
        else:
            commit = self._committed(api, info.sha)
            self.reached = f"commit {commit[:12]} is in {self.repo}, not yet read back nor tagged"
            self._read_back(api, commit)
            self.reached = f"commit {commit[:12]} is in {self.repo} and was read back, and the tag is missing"
            self._set_tag(api, commit)
        self.reached = f"commit {commit[:12]} and tag {self.tag} are there in {self.repo}"
        return bool(info.private), commit

    def _introduce(self, api: HfApi) -> None:
        """Whose token it is, and whether it may write at all.

        Raises: RunError if it may only read.
        """
        who = api.whoami()
        if "name" not in who:
            raise RunError(f"{endpoint()} does not answer as a Hub does", hint="check HF_ENDPOINT")
        user = str(who["name"])
        self.own = {user, *(str(org["name"]) for org in who.get("orgs", []))}
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise RunError(f"the token of {user} may only read", hint=new_token())
        self.user = user

    # What is there

    def _repository(self, api: HfApi) -> ModelInfo:
        """The repository, made where it is missing.

        It is looked at first: where it is there and may not be written to, create_repo fails at any endpoint but
        huggingface.co while it puts the address together.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return api.model_info(self.repo)
        except RepositoryNotFoundError:
            api.create_repo(self.repo, private=self.cfg.private, exist_ok=True)
            return api.model_info(self.repo)

    def _tree(self, api: HfApi, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        entries = api.list_repo_tree(self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _differing(self, there: Mapping[str, RepoFile]) -> list[str]:
        """Our files that are not in a tree of the repository as they are here."""
        return [path for path in self.files if path not in there or not self._same(path, there[path])]

    def _same(self, path: str, entry: RepoFile) -> bool:
        """Large files are known by SHA-256, the others as git does: SHA-1 of `blob SIZE\\0` and their bytes."""
        file = self.folder / path
        if entry.size != file.stat().st_size:
            return False
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == self.files[path])
        content = file.read_bytes()
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())

    def _tagged(self, api: HfApi) -> str | None:
        """The commit of the run's tag, if it is there and holds this very model.

        Raises: RunError if it holds something else.
        """
        found = {str(tag.name): str(tag.target_commit) for tag in api.list_repo_refs(self.repo).tags}
        commit = found.get(self.tag)
        if commit is None:
            return None
        if differing := self._differing(self._tree(api, commit)):
            some = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
            raise RunError(
                f"tag {self.tag} of {self.repo} is commit {commit[:12]}, which holds another model ({some})",
                hint=f"hf repos tag delete {self.repo} {self.tag} lets go of it; or name another repository",
            )
        return commit

    # What is done

    def _committed(self, api: HfApi, head: str | None) -> str:
        """Commit on top of `head` what differs from it. Returns: the commit, `head` itself if nothing does.

        Raises: Moved if `head` is no longer the newest commit.
        """
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        there = self._tree(api, head) if head else {}
        gone = self._gone(api, head, there) if head else set()
        differing = self._differing(there)
        if head and not differing and not gone:
            log.info("commit %s of %s holds it already", head[:12], self.repo)
            return head
        self.reached = f"{self.repo} is there, without this model"
        log.info("sending %d files to %s", len(differing), self.repo)
        operations = [self._addition(path) for path in differing]
        try:
            return api.create_commit(
                self.repo,
                operations=[*operations, *(CommitOperationDelete(path, is_folder=False) for path in sorted(gone))],
                commit_message=f"{NAME} run {self.tag}",
                parent_commit=head,
            ).oid
        except HfHubHTTPError as error:
            if error.response.status_code in {409, 412}:
                raise Moved(f"{self.repo} was changed by somebody else meanwhile") from None
            raise

    def _addition(self, path: str) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(path, self.folder / path)
        addition.upload_info.sha256 = bytes.fromhex(self.files[path])  # so that no file is read twice for it
        return addition

    def _gone(self, api: HfApi, head: str, there: Mapping[str, RepoFile]) -> set[str]:
        """Files of an earlier model of ours that this one does not have. What others put there stays."""
        others = there.keys() - self.files.keys() - NOT_OURS
        if not others:
            return set()
        gone = others & self._listed(api, head, there.get(MANIFEST))
        if kept := sorted(others - gone):
            log.warning("%s keeps what was not published from here: %s", self.repo, ", ".join(kept))
        return gone

    def _listed(self, api: HfApi, head: str, manifest: RepoFile | None) -> set[str]:
        """The files that the manifest at `head` lists, if it is one of ours."""
        if manifest is None or manifest.size > LARGEST_MANIFEST:
            return set()
        with tempfile.TemporaryDirectory() as folder:
            file = api.hf_hub_download(self.repo, MANIFEST, revision=head, local_dir=folder)
            try:
                listed = json.loads(Path(file).read_bytes())["sha256"]
            except (ValueError, KeyError, TypeError):
                return set()
        return set(listed) if isinstance(listed, dict) else set()

    def _read_back(self, api: HfApi, commit: str) -> None:
        """Raises: RunError if the commit does not hold every file with the hash that it has here."""
        if differing := self._differing(self._tree(api, commit)):
            raise RunError(
                f"commit {commit[:12]} does not hold what was sent: {', '.join(differing)}",
                hint="the same command sends it again",
            )

    def _set_tag(self, api: HfApi, commit: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            api.create_tag(self.repo, tag=self.tag, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        if self._tagged(api) != commit:
            raise Moved(f"tag {self.tag} of {self.repo} was set by somebody else meanwhile")

    # What is said

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Turn what goes wrong inside into one sentence, with what is on the Hub by then."""
        try:
            yield
        except UserError as error:
            facts = [f"{problem}; {self.reached}" for problem in error.problems]
            raise RunError(*facts, hint=error.hint or GO_ON) from error
        except Exception as error:
            from src.deploy.hub_client import said

            refusal = said(error, self.repo, self.user, self.own)
            if refusal is None:
                raise
            raise RunError(f"{refusal[0]}; {self.reached}", hint=refusal[1]) from error
